"""A recipe proposed for a model, from what pruning and rounding do to it on some hundred rows."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_compress.jobs.material import draw
from hf_compress.pipeline.estimate import Size, after, size_of
from hf_compress.pipeline.steps import calibration, score
from hf_compress.pruning.calibration import calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.prune import prune
from hf_compress.pruning.structured import check_budget
from hf_compress.pruning.vocabulary import prune_vocabulary
from hf_compress.quantization.quantize import quantize
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.steps import EvaluateStep, PruneStep, QuantizeStep, RecoverStep, Step, VocabularyStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_compress.jobs.task_data import TaskData

logger = logging.getLogger(__name__)

# From all of the blocks' multiply-accumulates to an eighth of them.
BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.2, 0.125)
FORMATS: dict[str, QuantizeStep] = {
    "int8": QuantizeStep("int8", {"embeddings": True}),
    "fixed-point 4": QuantizeStep("fixed-point", {"bits": 4, "granularity": "group", "group_size": 32}),
}
FLOAT = "float32"


@dataclass(frozen=True)
class Sensitivity:
    """What a model loses.

    Attributes:
        size (`Size`): Of the model.
        tokens (`float` or `None`): Share of its tokens that the texts use; none where they cannot be cut.
        pruned (`dict[float, float]`): Share of the metric that is kept, by budget, without a training.
        rounded (`dict[str, float]`): The same by format, `FORMATS`.
        rows (`int`): Rows that it was measured on.
        held_out (`bool`): Whether these are held out, and none that the model may have learned from.
    """

    size: Size
    tokens: float | None
    pruned: dict[float, float]
    rounded: dict[str, float]
    rows: int
    held_out: bool = True


@dataclass(frozen=True)
class Proposal:
    """Steps, and what is expected of them.

    Attributes:
        steps (`list[Step]`): In order.
        megabytes (`float`): On disk.
        macs (`float`): Multiply-accumulates of the blocks, as a share of the model's.
        retention (`float`): Share of the metric that is kept before any training.
        needs_training (`bool`): Whether that is too little, so that a recovery is among the steps.
    """

    steps: list[Step]
    megabytes: float
    macs: float
    retention: float
    needs_training: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = asdict(self)
        return plain | {"steps": [step.key for step in self.steps]}


def measure_sensitivity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: "TaskData",
    *,
    n_texts: int = 256,
    n_rows: int = 500,
    seed: int = 0,
) -> Sensitivity:
    """Measures what pruning and rounding cost a model, each by itself and without a training.

    Nothing is chosen on the rows that a recipe measures on: they are held out of the others.

    Args:
        model (`PreTrainedModel`): Fine-tuned.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        data (`TaskData`): The rows.
        n_texts (`int`, *optional*, defaults to `256`): Texts to calibrate with.
        n_rows (`int`, *optional*, defaults to `500`): Rows to score on, of validation or dev, or else of train, which
            the model may know by heart.
        seed (`int`, *optional*, defaults to `0`): Of the choice of rows.

    Returns:
        `Sensitivity`: Measured.

    Raises:
        ValueError: if the model's metric is not above 0, so that no share of it can be kept, or rows do not fit.
    """
    data.check_held_out(model)
    if data.held_out is None:
        logger.warning("There are no rows beside those measured on, so those of train decide: it may know them.")
    rows = draw(data.train if data.held_out is None else data.held_out, n_rows, seed)
    whole = score(model, tokenizer, data, rows)
    if not whole > 0:
        raise ValueError(f"The model's {data.metric(model)} is {whole:.4g} on {len(rows)} rows: is it fine-tuned?")
    tokens = _tokens_in_use(model, tokenizer, data.texts)
    batches = calibration(data, n_texts, seed, tokenizer, model)
    config = StructuredPruningConfig(seed=seed)
    found = calibrate(model, config, batches)
    pruned, rounded = {1.0: 1.0}, {FLOAT: 1.0}
    for budget in tqdm(_possible(model, batches), desc="Pruning to budgets"):
        pruned[budget] = _kept(
            score(prune(model, replace(config, budget=budget), found), tokenizer, data, rows), whole
        )
    for name, step in tqdm(FORMATS.items(), desc="Rounding"):
        rounded[name] = _kept(score(quantize(model, step.config()), tokenizer, data, rows), whole)
    return Sensitivity(size_of(model), tokens, pruned, rounded, len(rows), data.held_out is not None)


def _tokens_in_use(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> float | None:
    """The share of its tokens that texts use; `None` where a vocabulary is of a kind that stays as it is."""
    try:
        _, smaller = prune_vocabulary(model, tokenizer, texts)
    except (TypeError, ValueError) as error:
        logger.warning("No vocabulary step is proposed. %s", error)
        return None
    return len(smaller) / len(tokenizer)


def _possible(model: "PreTrainedModel", batches: list) -> list[float]:
    """The budgets that leave a model all that it cannot do without."""
    possible = []
    for budget in BUDGETS:
        try:
            check_budget(model, StructuredPruningConfig(budget=budget), batches)
        except ValueError as error:
            logger.info("%s", error)
            break
        possible.append(budget)
    return possible


def _kept(score: float, whole: float) -> float:
    """A share of the whole model's score; outputs that are all alike, whose correlation is undefined, keep nothing."""
    return 0.0 if math.isnan(score) else score / whole


def propose(
    sensitivity: Sensitivity, target_mb: float | None, min_retention: float, max_macs: float = 1.0
) -> list[Proposal]:
    """Steps that meet a size, those that keep most first.

    What pruning keeps times what rounding keeps is expected to be kept of both. Where that is less than is asked for,
    a recovery is added, which wins back most of what pruning lost; how much is known after the training alone.

    Args:
        sensitivity (`Sensitivity`): As measured.
        target_mb (`float` or `None`): Megabytes on disk, at most.
        min_retention (`float`): Share of the metric that must be kept.
        max_macs (`float`, *optional*, defaults to `1.0`): Share of the multiply-accumulates, at most.

    Returns:
        `list[Proposal]`: Best first: those that need no training, that keep most, of the fewest steps, the smallest;
            last, those that keep too little and have nothing to recover.

    Raises:
        ValueError: if no steps meet the size; with the smallest that there are.
    """
    found, smallest, least = [], float("inf"), float("inf")
    for cuts_tokens in (False,) if sensitivity.tokens is None else (False, True):
        for budget, kept in sensitivity.pruned.items():
            for name, kept_rounded in sensitivity.rounded.items():
                steps: list[Step] = [VocabularyStep()] if cuts_tokens else []
                size = sensitivity.size
                if cuts_tokens:
                    size = replace(size, embeddings=size.embeddings * sensitivity.tokens)
                if budget < 1:
                    steps.append(PruneStep(budget=budget))
                expected = kept * kept_rounded
                needs_training = expected < min_retention and budget < 1
                if needs_training:
                    steps.append(RecoverStep())
                if name != FLOAT:
                    steps.append(FORMATS[name])
                for step in steps:
                    size = after(size, step)
                if not steps:
                    continue
                smallest, least = min(smallest, size.megabytes), min(least, size.macs)
                if (target_mb is None or size.megabytes <= target_mb) and size.macs <= max_macs:
                    steps.append(EvaluateStep(min_retention=min_retention, max_mb=target_mb))
                    found.append(Proposal(steps, size.megabytes, size.macs, expected, needs_training))
    if not found:
        megabytes = "" if target_mb is None else f"{target_mb} MB and "
        raise ValueError(
            f"Nothing gets to {megabytes}{100 * max_macs:.0f} % of the multiply-accumulates: the smallest is "
            f"{smallest:.2f} MB, and the least are {100 * least:.0f} %. Give a larger --target-mb or --max-macs, or "
            "write a recipe with a smaller vocabulary (max_size) or a narrower student."
        )
    return sorted(
        found,
        key=lambda one: (
            one.retention < min_retention and not one.needs_training,
            one.needs_training,
            -round(one.retention, 3),
            len(one.steps),
            one.megabytes,
        ),
    )


def as_recipe(proposal: Proposal, recipe: Recipe) -> Recipe:
    """The recipe of a proposal.

    Args:
        proposal (`Proposal`): The steps.
        recipe (`Recipe`): Names the model and the data.
    """
    return replace(recipe, steps=proposal.steps)
