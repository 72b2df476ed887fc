"""What can be chosen about the pruning of single weights."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

WeightScore = Literal["sparsegpt", "wanda", "magnitude", "l1", "l2", "random", "movement"]
WeightScope = Literal["layer", "row", "global"]
WeightRepairKind = Literal["least_squares", "none"]
Precision = Literal["float32", "float64"]
# What is computed from the inputs of the layers.
DATA_SCORES = ("sparsegpt", "wanda")
DEFAULT_SPARSITY = 0.5


@dataclass
class UnstructuredPruningConfig:
    """Which weights of the projections inside the blocks become 0. Embeddings and task heads stay whole."""

    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Share of the weights that becomes 0, from 0 to below 1. Without it, what an n:m pattern says, or "
            "else 0.5."
        },
    )
    score: WeightScore = field(
        default="sparsegpt",
        metadata={
            "help": "How weights are ranked: 'sparsegpt' (what their removal costs once the others made up for it, "
            "which they do; Frantar and Alistarh 2023), 'wanda' (|weight| times the norm of its input; Sun et al. "
            "2024), 'magnitude' or 'l1' (absolute value; of a block the sum), 'l2' (of a block the Euclidean norm), "
            "'random', 'movement' (learned in a training, by PruningCallback alone; Sanh et al. 2020)."
        },
    )
    scope: WeightScope | None = field(
        default=None,
        metadata={
            "help": "What is ranked together: the weights of a 'layer', of one output of it ('row'), or of all layers "
            "('global', where scores from data are relative to the outputs of their layer). By default 'row' for "
            "'wanda', else 'layer', as in the papers."
        },
    )
    pattern: str | tuple[int, int] | None = field(
        default=None,
        metadata={
            "help": "'n:m', such as '2:4' or '4:8', leaves n of each m weights side by side along the inputs; (rows, "
            "columns), or '32x1', makes whole blocks 0, with rows along the outputs. Without it, single weights go."
        },
    )
    allocation: str | Mapping[str, float] = field(
        default="uniform",
        metadata={
            "help": "Sparsities of the layers: 'uniform'; 'owl' (blocks with many outliers keep more; Yin et al. "
            "2024); or by name, as in {'.*layer.0': 0.3}, on a command line '.*layer.0=0.3': the first pattern that "
            "matches counts, other layers have `sparsity`. Names match as in `exclude`."
        },
    )
    steps: int = field(
        default=1,
        metadata={
            "help": "Prune in so many rounds, each with scores and a repair anew: (1 - sparsity)^(1/steps) of the "
            "weights are left each time. At 80 % it changed scores by two points at most, in either direction."
        },
    )
    repair: WeightRepairKind | None = field(
        default=None,
        metadata={
            "help": "What makes up for the weights that go: 'least_squares' fits what each layer keeps, from the "
            "first layer to the last, to the unpruned model, which takes data; 'none'. By default 'least_squares' "
            "where scores or sparsities are computed from data, else 'none'. Not in a training, which repairs itself."
        },
    )
    ridge: float = field(
        default=0.1,
        metadata={"help": "Pull of the repair towards the old weights, in units of the mean variance of the inputs."},
    )
    exclude: Sequence[str] = field(
        default=(),
        metadata={
            "help": "Layers to leave whole: regular expressions that match the whole dotted name of a layer, or of a "
            "module that it is in, such as '.*query'."
        },
    )
    damping: float = field(
        default=0.01,
        metadata={"help": "Share of the mean of a Hessian's diagonal that is added to it, above 0 ('sparsegpt')."},
    )
    precision: Precision = field(
        default="float32",
        metadata={"help": "In which Hessians are inverted ('sparsegpt'), whatever the model's own dtype."},
    )
    sweep_width: int = field(
        default=128,
        metadata={
            "help": "Columns whose mask is chosen together, before those to the right adapt ('sparsegpt'). In layers "
            "of a few hundred inputs, 16 can do better, in the same time."
        },
    )
    outlier_factor: float = field(
        default=5.0,
        metadata={
            "help": "Scores above so many times their mean are outliers ('owl'; M = 5, which its authors use for "
            "LLaMA-7B)."
        },
    )
    outlier_spread: float = field(
        default=0.08,
        metadata={
            "help": "Half the distance between the sparsities of the blocks with the most and the fewest outliers, "
            "from 0 ('owl'; lambda = 0.08, as for M)."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of random scores."})

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                raise ValueError(f"{name}={given!r} is unknown: give one of {', '.join(map(repr, choices))}.")
        self.pattern = _read_pattern(self.pattern)
        self.exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        self._check_pattern()
        self._check_shares()
        self._check_numbers()
        self._check_together()

    @property
    def group(self) -> tuple[int, int] | None:
        """Of an n:m pattern, n and m."""
        return tuple(int(part) for part in self.pattern.split(":")) if isinstance(self.pattern, str) else None

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of what becomes 0 at once."""
        return self.pattern if isinstance(self.pattern, tuple) else (1, 1)

    @property
    def target(self) -> float:
        """The share of weights that becomes 0."""
        if self.group is not None:
            return 1 - self.group[0] / self.group[1]
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    def ranking(self) -> WeightScope:
        """What is ranked together, filled in."""
        return self.scope or ("row" if self.score == "wanda" else "layer")

    @property
    def is_repaired(self) -> bool:
        """Whether the weights that are left make up for those that go; `repair`, filled in."""
        return self._ranks_by_data if self.repair is None else self.repair == "least_squares"

    @property
    def needs_data(self) -> bool:
        """Whether scores, sparsities or a repair are computed from calibration data."""
        return self._ranks_by_data or self.is_repaired

    @property
    def _ranks_by_data(self) -> bool:
        return self.score in DATA_SCORES or self.allocation == "owl"

    def _check_pattern(self) -> None:
        pattern = self.pattern
        if pattern is None:
            return
        if isinstance(pattern, str):
            found = re.fullmatch(r"(\d+):(\d+)", pattern)
            if not found or not 1 <= int(found[1]) <= int(found[2]):
                raise ValueError(
                    f"pattern={pattern!r} is no n:m pattern: n of each m weights stay, so give 1 <= n <= m, as in "
                    "'2:4'; or '32x1' for blocks of 32 rows and 1 column."
                )
        elif len(pattern) != 2 or not all(type(size) is int and size >= 1 for size in pattern):
            raise ValueError(
                f"pattern={pattern!r} is no block: give the numbers of its rows and columns, as in (4, 1)."
            )

    def _check_shares(self) -> None:
        given = {} if self.sparsity is None else {"sparsity": self.sparsity}
        if isinstance(self.allocation, Mapping):
            given |= {f"allocation[{name!r}]": share for name, share in self.allocation.items()}
        elif self.allocation not in ("uniform", "owl"):
            raise ValueError(
                f"allocation={self.allocation!r} is unknown: give 'uniform', 'owl', or sparsities by name of layer."
            )
        for name, share in given.items():
            # A single layer may go as a whole, as it may where all weights are ranked together.
            is_whole = share == 1 and name != "sparsity"
            if not isinstance(share, int | float) or not (0 <= share < 1 or is_whole):
                raise ValueError(
                    f"{name}={share!r} is no share of weights to prune: give a number from 0 to below 1, such as 0.5."
                )

    def _check_numbers(self) -> None:
        for name, least in (("steps", 1), ("sweep_width", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number of at least {least}.")
        for name in ("damping", "outlier_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number above 0.")
        for name in ("outlier_spread", "ridge"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number of at least 0.")

    def _check_together(self) -> None:
        if self.group is not None and self.sparsity is not None and not math.isclose(self.sparsity, self.target):
            raise ValueError(
                f"sparsity={self.sparsity} and pattern={self.pattern!r} contradict each other: the pattern makes "
                f"{self.target:g} of the weights 0. Leave sparsity out."
            )
        if self.group is not None and (self.scope is not None or self.allocation != "uniform"):
            raise ValueError(
                f"pattern={self.pattern!r} ranks each {self.group[1]} weights among each other, and all layers lose "
                "the same share: leave out scope and allocation."
            )
        if self.scope == "global" and self.allocation != "uniform":
            raise ValueError("scope='global' decides how much each layer keeps: leave out allocation, or scope.")
        changes = self.score in DATA_SCORES or (self.is_repaired and self.score != "random")
        if self.steps > 1 and not changes:
            raise ValueError(
                f"score={self.score!r} with repair={self.repair!r} does not change from round to round, so "
                f"steps={self.steps} would give what one gives: leave steps=1, or take score='sparsegpt', or "
                "score='magnitude' with repair='least_squares'."
            )


def _read_pattern(pattern: str | Sequence[int] | None) -> str | tuple[int, ...] | None:
    if isinstance(pattern, str):
        sizes = re.fullmatch(r"(\d+)x(\d+)", pattern)
        return (int(sizes[1]), int(sizes[2])) if sizes else pattern
    return tuple(pattern) if isinstance(pattern, list) else pattern


_CHOICES = {
    "score": WeightScore.__args__,
    "scope": (*WeightScope.__args__, None),
    "repair": (*WeightRepairKind.__args__, None),
    "precision": Precision.__args__,
}
