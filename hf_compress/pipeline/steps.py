"""What each step of a recipe does to a model: from the folder before it to a folder of its own."""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, set_seed

from hf_compress.distillation.student import make_student
from hf_compress.evaluation.retention import retention_from_outputs
from hf_compress.jobs.material import HELD_OUT_ROWS, calibration_batches, draw
from hf_compress.jobs.prune_kinds import compare_weights, compare_widths, kind_of
from hf_compress.jobs.quantize import kept_in_float, noise_of
from hf_compress.jobs.stages import remove_folder, save_whole
from hf_compress.modeling.tasks import names_of_labels
from hf_compress.pipeline.state import Place
from hf_compress.pipeline.training import distil, finetune
from hf_compress.pruning.prune import prune
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.quantization.quantize import quantize
from hf_compress.recipe.format_options import needs_texts
from hf_compress.recipe.steps import (
    DistilStep,
    FinetuneStep,
    PruneStep,
    QuantizeStep,
    RecoverStep,
    SparsifyStep,
    StudentStep,
    VocabularyStep,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_compress.jobs.task_data import TaskData

logger = logging.getLogger(__name__)

Details = dict[str, Any]
# What a step makes: a model, its tokenizer, and what the report says of it.
Made = tuple["PreTrainedModel", "PreTrainedTokenizerBase", Details]


def make(place: Place, data: "TaskData", seed: int, options: dict[str, Any]) -> None:
    """Makes the model of a step and saves it, unless that was done before. All processes call it.

    Args:
        place (`Place`): The step.
        data (`TaskData`): The rows.
        seed (`int`): The recipe's.
        options (`dict`): Further arguments of `from_pretrained` for models that are trained.
    """
    state = PartialState()
    if state.is_main_process:
        _prepare(place)
    state.wait_for_everyone()
    if place.folder.exists():
        if state.is_main_process:
            # A run that was stopped right after it saved the model has left them.
            remove_folder(place.work)
            remove_folder(place.cache)
        return
    if type(place.step) in _TRAINERS:
        # The device is kept free of what an earlier step left.
        _TRAINERS[type(place.step)](place, data, seed, options)
    elif state.is_main_process:
        _make_alone(place, data, seed)
    state.wait_for_everyone()


def _prepare(place: Place) -> None:
    """Leaves of the step what can be continued, and nothing else."""
    entry = place.read_entry()
    if not entry:
        place.clear()
        place.write_entry({})
    elif place.folder.exists() and "details" not in entry:
        # Stopped after the model was saved and before its entry was: made anew, which takes seconds.
        place.clear()
        place.write_entry({})


def _make_alone(place: Place, data: "TaskData", seed: int) -> None:
    set_seed(seed)
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    model = data.model_class.from_pretrained(place.model).to(PartialState().device)
    made, tokenizer, details = _MAKERS[type(place.step)](place, data, seed, model, tokenizer)
    save_whole(place.folder, made, tokenizer)
    place.write_entry({"seconds": time.perf_counter() - start, "details": details})


def _student(place: Place, data: "TaskData", seed: int, model: Any, tokenizer: Any) -> Made:
    return make_student(model, place.step), tokenizer, {}


def _vocabulary(place: Place, data: "TaskData", seed: int, model: Any, tokenizer: Any) -> Made:
    pruned, smaller = prune_vocabulary(model, tokenizer, data.texts, place.step)
    return pruned, smaller, {"tokens": {"before": len(tokenizer), "after": len(smaller)}}


def _prune(place: Place, data: "TaskData", seed: int, model: Any, tokenizer: Any) -> Made:
    config, dtype = place.step.config(seed), model.dtype
    batches = calibration(data, place.step.n_texts, config.seed, tokenizer, model, config.use_labels)
    pruned = prune(model, config, kind_of(config).get_data(model, config, batches))
    before, after = compare_widths(model, pruned, batches)
    return pruned.to(dtype), tokenizer, {"widths": {"dense": before["widths"], "pruned": after["widths"]}}


def _sparsify(place: Place, data: "TaskData", seed: int, model: Any, tokenizer: Any) -> Made:
    config, dtype = place.step.config(seed), model.dtype
    batches = calibration(data, place.step.n_texts, config.seed, tokenizer, model)
    sparse = prune(model.float(), config, batches)
    _, found = compare_weights(model, sparse, batches)
    return sparse.to(dtype), tokenizer, {"zeros": found["zeros"], "sparsity": found["layers"]}


def _quantize(place: Place, data: "TaskData", seed: int, model: Any, tokenizer: Any) -> Made:
    step = place.step
    config = step.config()
    batches = calibration(data, step.n_texts, seed, tokenizer, model)
    texts = batches if needs_texts(config) else None
    gate = {}
    if step.max_drop is not None:
        if not data.held_out:
            logger.warning(
                "What %s keeps in floating point is chosen by max_drop on rows of train, which the model may know: "
                "add a split validation beside test.",
                place.name,
            )
        rows = draw(data.held_out or data.train, HELD_OUT_ROWS, seed)
        gate = {"evaluate": lambda tried: score(tried, tokenizer, data, rows), "max_drop": step.max_drop}
    small = quantize(model, config, texts, **gate)
    details = {"kept_in_float": kept_in_float(model, small, config), "noise": noise_of(small, model, batches[0])}
    return small, tokenizer, details


_TRAINERS: dict[type, Callable] = {FinetuneStep: finetune, DistilStep: distil, RecoverStep: distil}
_MAKERS: dict[type, Callable[..., Made]] = {
    StudentStep: _student,
    VocabularyStep: _vocabulary,
    PruneStep: _prune,
    SparsifyStep: _sparsify,
    QuantizeStep: _quantize,
}


def score(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", data: "TaskData", rows: Any) -> float:
    """The metric of one model.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        data (`TaskData`): Knows the metric.
        rows (`Dataset`): What to measure on.
    """
    found = data.outputs(model, tokenizer, rows=rows)
    settings = {"metric": data.metric(model), "kind": data.kind(model), "label_names": names_of_labels(model.config)}
    return retention_from_outputs(found.logits, found.logits, found.labels, n_bootstrap=2, **settings).compressed


def calibration(
    data: "TaskData", n_texts: int, seed: int, tokenizer: Any, model: Any, with_labels: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Batches of rows of the split train, from the shortest to the longest.

    Args:
        data (`TaskData`): The rows.
        n_texts (`int`): How many, drawn by chance.
        seed (`int`): Of the choice.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        model (`PreTrainedModel`): Numbers the labels.
        with_labels (`bool`, *optional*, defaults to `False`): Whether these are in the batches.
    """
    rows = data.encode(draw(data.train, n_texts, seed), tokenizer, model)
    # The collator of labelled words pads labels, so they are taken out after it.
    batches = calibration_batches(rows, data.collator(tokenizer))
    return batches if with_labels else [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
