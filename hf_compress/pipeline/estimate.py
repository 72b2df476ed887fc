"""How large the models of a recipe will be, before anything is done."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_compress.distillation.student import make_student
from hf_compress.modeling.blocks import find_blocks, task_head_names, token_embeddings
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.recipe.steps import PruneStep, QuantizeStep, SparsifyStep, StudentStep, TrainingStep, VocabularyStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_compress.jobs.task_data import TaskData
    from hf_compress.recipe.recipe import Recipe

# Bits of a weight in the blocks, scales included; those of groups are added for their size.
_BITS = {"int8": 8.0, "llm-int8": 8.0, "nf4": 4.5, "fp4": 4.5, "binary": 1.0}
_BITS_OF_A_SCALE = 16
_FLOATS = ("bf16", "fp16")
_FLOAT_BITS = ("block_bits", "embedding_bits", "rest_bits", "element_bits")


@dataclass(frozen=True)
class Size:
    """What a model is expected to have.

    Attributes:
        blocks (`float`): Weights inside the blocks.
        embeddings (`float`): Weights of the token embeddings.
        rest (`float`): All others, which no format rounds.
        tables (`float`): Weights of other embeddings, such as those of positions.
        projections (`float`): Weights of projections outside the blocks and the task head, such as a pooler's.
        macs (`float`): Multiply-accumulates of the blocks, as a share of the first model's.
        block_bits (`float`): Bits of a projection's weight.
        embedding_bits (`float`): Of an embedding's.
        rest_bits (`float`): Of all others.
        scale_bits (`float`): Of the scales that each weight of the blocks shares with its group.
        density (`float`): Share of the blocks' weights that are not 0, and stored.
        element_bits (`float`): Bits of what is left out where it is 0: a number, or a byte of packed ones.
    """

    blocks: float
    embeddings: float
    rest: float
    tables: float = 0.0
    projections: float = 0.0
    macs: float = 1.0
    block_bits: float = 32.0
    embedding_bits: float = 32.0
    rest_bits: float = 32.0
    scale_bits: float = 0.0
    density: float = 1.0
    element_bits: float = 32.0

    @property
    def megabytes(self) -> float:
        """Megabytes on disk."""
        of_block = self.block_bits
        if self.density < 1:
            # A byte is 0 if all numbers are that reach into it: so many in the mean. A bit for each element says
            # whether it is there.
            shared = math.gcd(int(self.element_bits), int(self.block_bits))
            numbers = (self.element_bits + self.block_bits - shared) / self.block_bits
            of_block *= 1 - (1 - self.density) ** numbers + 1 / self.element_bits
        bits = self.blocks * (of_block + self.scale_bits) + self.projections * (self.block_bits + self.scale_bits)
        bits += (self.embeddings + self.tables) * self.embedding_bits + self.rest * self.rest_bits
        return bits / 8 / 1e6


def size_of(model: "PreTrainedModel") -> Size:
    """The size of a model in floating point.

    Args:
        model (`PreTrainedModel`): The model.
    """
    everything = {id(weight): weight.numel() for weight in model.parameters()}
    heads = tuple(f"{name}." for name in task_head_names(model))
    others = [module for name, module in model.named_modules() if not f"{name}.".startswith(heads)]

    def take(weights: Iterable[Any]) -> int:
        """How many there are of those that were not counted before."""
        return sum(everything.pop(id(weight), 0) for weight in weights)

    blocks = take(weight for block in find_blocks(model) for weight in block.module.parameters())
    tokens = take(table.weight for table in token_embeddings(model))
    tables = take(module.weight for module in others if isinstance(module, nn.Embedding))
    projections = take(module.weight for module in others if isinstance(module, nn.Linear))
    bits = dict.fromkeys(_FLOAT_BITS, 8.0 * model.dtype.itemsize)
    return Size(blocks, tokens, sum(everything.values()), tables, projections, **bits)


def after(size: Size, step: Any) -> Size:
    """The size after a step, as far as its settings tell it.

    Args:
        size (`Size`): Before.
        step (`Step`): The step.

    Returns:
        `Size`: Expected. What depends on data or weights is left as it was, but for the tokens of a vocabulary with a
        largest size.
    """
    if isinstance(step, PruneStep):
        return replace(size, blocks=size.blocks * step.budget, macs=size.macs * step.budget)
    if isinstance(step, SparsifyStep):
        return replace(size, density=1 - step.target)
    if isinstance(step, QuantizeStep):
        return replace(size, **_bits_of(step, size.rest_bits, size.density))
    if isinstance(step, TrainingStep):
        # Weights are trained in float32, and saved so.
        return replace(size, **dict.fromkeys(_FLOAT_BITS, 32.0))
    return size


def estimate(
    recipe: "Recipe", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", data: "TaskData"
) -> list[Size]:
    """The size after each step of a recipe.

    Args:
        recipe (`Recipe`): The steps.
        model (`PreTrainedModel`): What they begin with.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        data (`TaskData`): Its texts decide which tokens stay.

    Returns:
        `list[Size]`: One per step.
    """
    size, sizes = size_of(model), []
    for step in recipe.steps:
        if isinstance(step, StudentStep):
            small = size_of(make_student(model, step))
            bits = {name: getattr(size, name) for name in _FLOAT_BITS}
            size = replace(small, macs=size.macs * small.blocks / size.blocks, **bits)
        elif isinstance(step, VocabularyStep):
            _, smaller = prune_vocabulary(model, tokenizer, data.texts, step)
            size = replace(size, embeddings=size.embeddings * len(smaller) / len(tokenizer))
        else:
            size = after(size, step)
        sizes.append(size)
    return sizes


def _bits_of(step: QuantizeStep, float_bits: float, density: float) -> dict[str, float]:
    """Fields of `Size` after a rounding."""
    config = step.config()
    if step.format in _FLOATS:
        return dict.fromkeys(_FLOAT_BITS, 16.0)
    found = {"embedding_bits": float_bits, "rest_bits": float_bits, "element_bits": 8.0}
    if step.format == "fixed-point":
        scales = _BITS_OF_A_SCALE / config.group_size if config.granularity == "group" else 0.0
        of_tables = config.bits if config.embedding_bits is None else config.embedding_bits
        found["embedding_bits"] = of_tables + scales if config.embeddings else float_bits
        # 0 is another integer where ranges are not symmetric.
        return found | {
            "block_bits": float(config.bits),
            "scale_bits": scales,
            "density": density if config.symmetric else 1.0,
        }
    if step.format == "int8" and config.embeddings:
        found["embedding_bits"] = 8.0 if config.embedding_bits == 8 else 4 + _BITS_OF_A_SCALE / 32
    return found | {"block_bits": _BITS[step.format], "density": density if "int8" in step.format else 1.0}
