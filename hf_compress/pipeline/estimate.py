"""How large the models of a recipe will be, before anything is done."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_compress.distillation.student import make_student
from hf_compress.modeling.blocks import find_blocks, token_embeddings
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.recipe.steps import PruneStep, QuantizeStep, SparsifyStep, StudentStep, VocabularyStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_compress.jobs.task_data import TaskData
    from hf_compress.recipe.recipe import Recipe

# Bits of a weight in the blocks, scales included; those of groups are added for their size.
_BITS = {"int8": 8.0, "bf16": 16.0, "fp16": 16.0, "llm-int8": 8.0, "nf4": 4.5, "fp4": 4.5, "binary": 1.0}
_BITS_OF_A_SCALE = 16


@dataclass(frozen=True)
class Size:
    """What a model is expected to have.

    Attributes:
        blocks (`float`): Weights inside the blocks.
        embeddings (`float`): Weights of the token embeddings.
        rest (`float`): All others.
        macs (`float`): Multiply-accumulates of the blocks, as a share of the first model's.
        block_bits (`float`): Bits of a weight inside the blocks.
        embedding_bits (`float`): Of the token embeddings.
        rest_bits (`float`): Of all others.
    """

    blocks: float
    embeddings: float
    rest: float
    macs: float = 1.0
    block_bits: float = 32.0
    embedding_bits: float = 32.0
    rest_bits: float = 32.0

    @property
    def megabytes(self) -> float:
        """Megabytes on disk."""
        parts = ((self.blocks, self.block_bits), (self.embeddings, self.embedding_bits), (self.rest, self.rest_bits))
        return sum(weights * bits / 8 for weights, bits in parts) / 1e6


def size_of(model: "PreTrainedModel") -> Size:
    """The size of a model in floating point.

    Args:
        model (`PreTrainedModel`): The model.
    """
    blocks = {id(weight): weight.numel() for block in find_blocks(model) for weight in block.module.parameters()}
    tables = {id(table.weight): table.weight.numel() for table in token_embeddings(model)}
    everything = {id(weight): weight.numel() for weight in model.parameters()}
    in_blocks, in_tables = sum(blocks.values()), sum(tables.values())
    return Size(in_blocks, in_tables, sum(everything.values()) - in_blocks - in_tables)


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
        # A bit for each weight says whether it is there.
        return replace(size, block_bits=size.block_bits * (1 - step.target) + 1)
    if isinstance(step, QuantizeStep):
        bits, tables = _bits_of(step)
        rest = 16.0 if step.format in ("bf16", "fp16") else 32.0
        return replace(size, block_bits=bits, embedding_bits=tables, rest_bits=rest)
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
            size = replace(small, macs=size.macs * small.blocks / size.blocks)
        elif isinstance(step, VocabularyStep):
            _, smaller = prune_vocabulary(model, tokenizer, data.texts, step)
            size = replace(size, embeddings=size.embeddings * len(smaller) / len(tokenizer))
        else:
            size = after(size, step)
        sizes.append(size)
    return sizes


def _bits_of(step: QuantizeStep) -> tuple[float, float]:
    """Bits of a weight in the blocks, and in the token embeddings."""
    config = step.config()
    if step.format == "fixed-point":
        scales = _BITS_OF_A_SCALE / config.group_size if config.granularity == "group" else 0.0
        of_tables = config.bits if config.embedding_bits is None else config.embedding_bits
        return config.bits + scales, of_tables + scales if config.embeddings else 32.0
    bits = _BITS[step.format]
    if step.format == "int8" and config.embeddings:
        return bits, 8.0 if config.embedding_bits == 8 else 4 + _BITS_OF_A_SCALE / 32
    has_tables = step.format in ("bf16", "fp16")
    return bits, bits if has_tables else 32.0
