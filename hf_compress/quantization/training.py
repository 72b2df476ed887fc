"""Training for quantization: from a live model to one that learns with rounded numbers."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_compress.modeling.tasks import unwrap
from hf_compress.quantization.binary import fit_inputs_, prepare_binary_, read_batches
from hf_compress.quantization.config import BinaryConfig, FixedPointConfig, Int8DynamicConfig
from hf_compress.quantization.fake_quant import (
    FakeQuantProjection,
    Int8Inputs,
    attach_,
    fake_quantized,
    int8_table_rows,
    int8_weight,
)
from hf_compress.quantization.fake_quant_fixed_point import prepare_fixed_point_
from hf_compress.quantization.modules import choose_modules

logger = logging.getLogger(__name__)

Data = Iterable[Mapping[str, Any]]


def fake_quantize_(model: nn.Module, config: Any, data: Data | None = None) -> None:
    """Prepares a model for training with the numbers that it will be quantized to.

    Its projections compute with rounded weights and inputs, and learn by straight-through gradients. Parameters keep
    their names, and are joined by the scales that are learned, without weight decay. Train the model with `Trainer` or
    `DistillationTrainer`, and call `quantize` with the same config and no data. A binary model is best trained by
    distillation and with fewer and fewer bits, each time from the weights before (Liu et al., "BiT: Robustly Binarized
    Multi-distilled Transformer", 2022):

        student = copy.deepcopy(teacher)
        fake_quantize_(student, BinaryConfig(activations=8), batches)
        for bits in (8, 4, 2, 1):
            set_activation_bits_(student, bits, batches)
            args = DistillationArguments("out", alpha=1.0, learning_rate=5e-4, dropout=0.0, num_train_epochs=4,
                                         terms=[TermConfig("hidden_mse", weight=10.0)])
            DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, processing_class=tokenizer).train()
        quantize(student, BinaryConfig(activations=1)).save_pretrained("binary")

    A checkpoint of a prepared model holds its weights in floating point and the scales as further tensors. To go on
    from one, prepare a model in the same way and let `Trainer` resume, or load the tensors by `load_state_dict`;
    `from_pretrained` would leave out the scales, and warns of unexpected ones. Convert a model before you share it.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture, in floating point; is changed.
        config (`BinaryConfig`, `FixedPointConfig` or `Int8DynamicConfig`): The format, of at most 8 bits, and what
            stays in floating point besides the task head.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): A few batches that scales of inputs are fitted to.

    Raises:
        ValueError: if the model is quantized or prepared already, config and model do not fit each other, or data are
            missing.
        TypeError: if the config is of no kind that can be trained for.
    """
    if type(config) not in _PREPARE:
        known = ", ".join(kind.__name__ for kind in _PREPARE)
        raise TypeError(f"A model cannot be trained for a {type(config).__name__}: give one of {known}.")
    model = unwrap(model)
    prepared = fake_quantized(model)
    if prepared:
        raise ValueError(
            f"The model was prepared for {prepared[0][1].target()} already: start from one in floating point, or "
            "call set_activation_bits_ to change the bits of a binary one."
        )
    _PREPARE[type(config)](model, config, data)


def set_activation_bits_(model: nn.Module, bits: int, data: Data | None = None) -> None:
    """Changes the bits of the inputs of a model that is trained for weights of one bit; weights stay as they are.

    Args:
        model (`nn.Module`): A model prepared by `fake_quantize_` for a `BinaryConfig`; is changed.
        bits (`int`): 1, 2, 4 or 8, or 32 for inputs that are not rounded.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): A few batches that the scales are fitted to anew;
            thresholds stay. Not needed for 32 bits.

    Raises:
        ValueError: if the model was not prepared for a `BinaryConfig`, or data are missing.
    """
    model = unwrap(model)
    # The config checks the bits.
    replace(_binary_modules(model)[0].prepared_for, activations=bits)
    fit_inputs_(model, read_batches(model, data, bits), bits)


class BinaryCurriculum(TrainerCallback):
    """Lowers the bits of the inputs of a binary model during one training.

    Args:
        stages (`Mapping[float, int]`): Share of the training, from 0 to below 1 -> bits of the inputs from there on.
        data (`Iterable[Mapping[str, torch.Tensor]]`, *optional*): Batches that scales are fitted to when bits change;
            by default the first `n_batches` of the training data.
        n_batches (`int`, *optional*, defaults to 4): Training batches to take.

    Raises:
        ValueError: if there is no stage, or a share is out of range.
    """

    def __init__(self, stages: Mapping[float, int], data: Data | None = None, n_batches: int = 4) -> None:
        if not stages or not all(0 <= share < 1 for share in stages):
            raise ValueError(
                f"stages={dict(stages)} must map shares of the training, from 0 to below 1, to bits of the inputs: "
                "give {0.0: 8, 0.2: 4, 0.5: 2, 0.7: 1}, say."
            )
        self.stages, self.data, self.n_batches = dict(sorted(stages.items())), data, n_batches
        self._batches: list[Mapping[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Keeps the batches that scales will be fitted to."""
        _binary_modules(unwrap(model))
        if args.load_best_model_at_end and len(set(self.stages.values())) > 1:
            logger.warning(
                "load_best_model_at_end=True may end with the weights of an earlier stage, and with its bits. Leave "
                "it False, or evaluate in the last stage only."
            )
        data = islice(kwargs["train_dataloader"], self.n_batches) if self.data is None else self.data
        self._batches = self._batches or list(data)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Changes the bits where a stage begins. A resumed training has those of its checkpoint already."""
        reached = [bits for share, bits in self.stages.items() if share * state.max_steps <= state.global_step]
        if reached and _binary_modules(unwrap(model))[0].input_norm.bits != reached[-1]:
            logger.info("Step %d: inputs are rounded to %d bits.", state.global_step, reached[-1])
            set_activation_bits_(model, reached[-1], self._batches)
            _share_scales_(_binary_modules(unwrap(model)))


def _prepare_int8_(model: PreTrainedModel, config: Int8DynamicConfig, data: Data | None) -> None:
    if config.smooth is not None:
        raise ValueError(
            f"smooth={config.smooth} changes what is rounded after the training, which would be for nothing: leave "
            "smooth out; weights learn to suit their inputs."
        )

    def parts(name: str, module: nn.Module) -> dict[str, Any]:
        if isinstance(module, nn.Embedding):
            return {"round_rows": int8_table_rows}
        return {"round_weight": int8_weight, "input_norm": Int8Inputs()}

    if config.embeddings and config.embedding_bits != 8:
        raise ValueError(
            f"embedding_bits={config.embedding_bits} is for models that are not trained: leave it out, or take "
            "FixedPointConfig for tables of fewer bits."
        )
    attach_(choose_modules(model, config.exclude, config.embeddings), config, parts)


_PREPARE = {
    BinaryConfig: prepare_binary_,
    FixedPointConfig: prepare_fixed_point_,
    Int8DynamicConfig: _prepare_int8_,
}


def _share_scales_(modules: list[FakeQuantProjection]) -> None:
    """Gives all processes, which read batches of their own, the scales of the first."""
    if PartialState().num_processes > 1:
        for module in modules:
            dist.broadcast(module.input_norm.log_scale.data, src=0)
            dist.broadcast(module.input_norm.setting, src=0)
            module.input_norm.read_setting_()


def _binary_modules(model: nn.Module) -> list[FakeQuantProjection]:
    modules = [module for _, module in fake_quantized(model) if isinstance(module.prepared_for, BinaryConfig)]
    if not modules:
        raise ValueError(
            f"This {type(model).__name__} was not prepared for weights of one bit: call fake_quantize_(model, "
            "BinaryConfig(...), data) first."
        )
    return modules
