"""What can be known of a recipe's run before anything is trained or written."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from hf_compress.distillation.student import make_student
from hf_compress.evaluation.files import weight_files
from hf_compress.evaluation.sample import sample_batch
from hf_compress.jobs.fit import check_length, check_tokenizer
from hf_compress.jobs.job import check_output
from hf_compress.jobs.overlap import warn_of_rows_in_both
from hf_compress.jobs.stages import folder_bytes
from hf_compress.pipeline.state import Place, places_of
from hf_compress.pipeline.training import training_arguments
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.recipe.steps import FinetuneStep, QuantizeStep, StudentStep, TrainingStep, VocabularyStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_compress.jobs.task_data import TaskData
    from hf_compress.recipe.recipe import Recipe

# A training keeps one checkpoint while it writes the next: weights, and two moments of each, twice.
_OF_A_TRAINING = 6


def check_before(recipe: "Recipe", data: "TaskData", output: Path) -> "PreTrainedModel":
    """Raises if model and data do not fit each other, a step's values are refused, or the output holds the inputs.

    Args:
        recipe (`Recipe`): What is to be done.
        data (`TaskData`): The rows.
        output (`Path`): The run's folder.

    Returns:
        `PreTrainedModel`: The model that the recipe names.

    Raises:
        ValueError: with what does not fit, and what to do.
    """
    check_output(recipe.model, recipe.data.dataset, output)
    is_finetuned = isinstance(recipe.steps[0], FinetuneStep)
    options: dict[str, Any] = data.head_options(recipe.model) if is_finetuned else {}
    model, loading = data.model_class.from_pretrained(recipe.model, output_loading_info=True, **options)
    if loading["missing_keys"] and not is_finetuned:
        raise ValueError(
            f"{recipe.model} holds no trained task head (missing: {', '.join(sorted(loading['missing_keys']))}), so "
            "it has nothing to keep. Give a fine-tuned model, or begin the steps with `- finetune:`."
        )
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    check_tokenizer(tokenizer, model)
    data.metric(model)
    check_length(model, data.encode(data.test, tokenizer, model))
    if any(isinstance(step, TrainingStep) for step in recipe.steps):
        check_length(model, data.encode(data.train, tokenizer, model))
    _check_timed(model, recipe)
    warn_of_rows_in_both(data.train, data.test, data.config.text_columns)
    data.label_ids(data.train, model)
    if any(isinstance(step, QuantizeStep) and step.max_drop is not None for step in recipe.steps):
        data.check_held_out(model)
    for place in places_of(recipe, output):
        if isinstance(place.step, StudentStep):
            make_student(model, place.step)
        if isinstance(place.step, VocabularyStep) and not place.folder.exists():
            prune_vocabulary(model, tokenizer, data.texts, place.step)
        if isinstance(place.step, TrainingStep):
            training_arguments(place.step, place.work, recipe.seed)
    return model


def check_room(place: Place) -> None:
    """Raises if the disk has no room for what a step writes.

    Args:
        place (`Place`): The step.

    Raises:
        OSError: with what it needs and what there is.
    """
    if place.folder.exists():
        return
    n_bytes = sum(file.stat().st_size for file in weight_files(place.model))
    needed = n_bytes * (1 + (_OF_A_TRAINING if isinstance(place.step, TrainingStep) else 0))
    # What a run that was stopped has written of the step is part of the room.
    free = shutil.disk_usage(place.folder.parent).free + folder_bytes(place.work) + folder_bytes(place.cache)
    if needed > free:
        raise OSError(
            f"{place.name} may write {needed / 1e9:.1f} GB, and {place.folder.parent} has {free / 1e9:.1f} GB left: "
            "make room, and repeat the command to continue."
        )


def _check_timed(model: "PreTrainedModel", recipe: "Recipe") -> None:
    """Raises if the model cannot read what it will be timed with, which is as long as rows may be."""
    length = recipe.measure.length or recipe.data.max_length
    try:
        with torch.inference_mode():
            model.eval()(**sample_batch([model], 1, length))
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot read texts of {length} tokens, of which it is to be timed: {error}. Give "
            "max_length of the data, or length of measure, at most the number of positions that the model has, 512 "
            "for most."
        ) from error
