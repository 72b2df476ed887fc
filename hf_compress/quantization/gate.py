"""An accuracy gate: which modules have to stay in floating point for a score to hold."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig

from hf_compress.quantization.config import FloatConfig

logger = logging.getLogger(__name__)

_ROUNDING = 1e-9

Evaluate = Callable[[nn.Module], float]
Convert = Callable[[nn.Module, Any], None]


@dataclass(frozen=True)
class Gate:
    """What a model may lose.

    Attributes:
        evaluate (`Callable[[nn.Module], float]`): From a model to its score; higher is better.
        max_drop (`float`): How much lower the score of the quantized model may be, in the unit of the score.

    Raises:
        ValueError: if `max_drop` is negative or not finite.
        TypeError: if `evaluate` cannot be called.
    """

    evaluate: Evaluate
    max_drop: float

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TypeError(
                f"evaluate={self.evaluate!r} cannot be called: give a function from a model to a score, of which "
                "higher is better, such as `lambda model: accuracy_of(model, dataset)`."
            )
        if not math.isfinite(self.max_drop) or self.max_drop < 0:
            raise ValueError(
                f"max_drop={self.max_drop} is no loss that could be allowed: give a number of at least 0, in the unit "
                "of the score, such as 0.01."
            )

    def score(self, model: nn.Module) -> float:
        """The score of a model.

        Args:
            model (`nn.Module`): The model.

        Returns:
            `float`: Finite.

        Raises:
            TypeError: if `evaluate` returns no number.
            ValueError: if it returns NaN or an infinity.
        """
        found = self.evaluate(model)
        try:
            score = float(found)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"evaluate returned {found!r}, a {type(found).__name__}, which is no number: let it return the score "
                "itself, such as `metrics['accuracy']`."
            ) from error
        if not math.isfinite(score):
            raise ValueError(f"evaluate returned {score}, which cannot be compared: check the data and the metric.")
        return score


def find_exclusions(
    model: nn.Module, config: Any, names: Sequence[str], convert_: Convert, gate: Gate
) -> tuple[str, ...]:
    """The fewest modules, chosen greedily, that have to stay in floating point for a score to hold.

    If the fully quantized model does not pass, each module is quantized alone, and scored. Then those that cost most
    are left out, one more at a time, until what is left passes.

    Args:
        model (`nn.Module`): In floating point; is not changed.
        config (`Any`): How to quantize, with modules that stay in any case.
        names (`Sequence[str]`): Dotted names of the modules that the config would quantize.
        convert_ (`Callable[[nn.Module, Any], None]`): Quantizes a model in place, given a config.
        gate (`Gate`): What the model may lose.

    Returns:
        `tuple[str, ...]`: Names, the costliest first; empty where everything can be quantized.

    Raises:
        ValueError: if the score does not hold with one module quantized alone.
    """
    # A model that was just trained would be scored with its dropout.
    dense = gate.score(copy.deepcopy(model).eval())

    def drop(excluded: Sequence[str]) -> float:
        trial = copy.deepcopy(model).eval()
        convert_(trial, exclude(config, excluded))
        return dense - gate.score(trial)

    # Scores are shares: 0.90 - 0.89 is a little more than 0.01.
    allowed = gate.max_drop + _ROUNDING
    lost = drop(())
    if not names and lost > allowed:
        raise ValueError(
            f"max_drop={gate.max_drop} cannot be kept: a {type(config).__name__} takes the whole model, whose score "
            f"is {dense:.4f} before and {lost:.4f} lower after. Allow more, or take another format."
        )
    logger.info("Score %.4f in floating point, %.4f lower quantized; %.4f allowed.", dense, lost, gate.max_drop)
    if lost <= allowed:
        return ()
    costs = {name: drop([other for other in names if other != name]) for name in _progress(names)}
    ranked = sorted(names, key=lambda name: -costs[name])
    for number in range(1, len(ranked)):
        lost = drop(ranked[:number])
        if lost <= allowed:
            kept = ", ".join(f"{name} ({costs[name]:.4f})" for name in ranked[:number])
            logger.info("Stay in floating point, with what each alone would cost: %s. Lost: %.4f.", kept, lost)
            return tuple(ranked[:number])
    raise ValueError(
        f"max_drop={gate.max_drop} cannot be kept: the score is {dense:.4f} in floating point and {lost:.4f} lower "
        f"with {ranked[-1]} alone quantized, the cheapest of {len(ranked)} modules. Allow more, or take a format with "
        "more bits."
    )


def exclude(config: Any, names: Sequence[str]) -> Any:
    """A copy of a config by which further modules stay in floating point.

    Args:
        config (`Any`): One of the configs of this folder, or a `BitsAndBytesConfig`.
        names (`Sequence[str]`): Dotted names.

    Returns:
        `Any`: Of the same type.
    """
    if not names:
        return config
    if isinstance(config, BitsAndBytesConfig):
        changed = copy.deepcopy(config)
        changed.llm_int8_skip_modules = [*excluded_names(config), *names]
        return changed
    return replace(config, exclude=(*config.exclude, *names))


def excluded_names(config: Any) -> Sequence[str] | None:
    """The modules that stay in floating point by a config, besides the task head.

    Args:
        config (`Any`): One of the configs of this folder, or a `BitsAndBytesConfig`.

    Returns:
        `Sequence[str]` or `None`: Dotted names or patterns; `None` where a config takes the whole model.
    """
    if isinstance(config, BitsAndBytesConfig):
        return config.llm_int8_skip_modules or []
    return None if isinstance(config, FloatConfig) else config.exclude


def _progress(names: Sequence[str]) -> Iterator[str]:
    return tqdm(names, "Scoring modules", leave=False)
