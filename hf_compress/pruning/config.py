"""What can be chosen about structured pruning."""

from dataclasses import dataclass, field
from typing import Literal

Cost = Literal["macs", "params", "bytes", "latency"]
Unit = Literal["heads", "neurons", "layers"]
Score = Literal["obs", "fisher", "taylor", "activation", "l1", "l2", "linf", "random"]
Repair = Literal["least_squares", "bias", "none"]
# What can be told from the weights alone.
BLIND_SCORES = ("l1", "l2", "linf", "random")


@dataclass
class StructuredPruningConfig:
    """What to cut from a model, down to what, and how to make up for it."""

    budget: float = field(
        default=0.5,
        metadata={
            "help": "Share of the cost that may be left, above 0 and at most 1. It is never exceeded. Of the blocks' "
            "cost, or for cost='latency' of the time of a whole forward pass."
        },
    )
    cost: Cost = field(
        default="macs",
        metadata={
            "help": "What the budget counts: 'macs' (multiply-accumulates of the blocks at the mean length of the "
            "data), 'params' or 'bytes' (the blocks' weights), 'latency' (time, from a table that is measured on this "
            "machine with the batch of median size)."
        },
    )
    units: list[str] = field(
        default_factory=lambda: ["heads", "neurons"],
        metadata={
            "help": "What may go: 'heads' (key-value groups with all their heads under grouped-query attention), "
            "'neurons' of the feed-forward networks, and with 'layers' also whole attentions and feed-forward "
            "networks; 'layers' alone removes whole layers, each time the one whose absence changes the predictions "
            "least."
        },
    )
    score: Score = field(
        default="obs",
        metadata={
            "help": "How units are ranked: 'obs' (what their removal costs after the others were refitted, in the "
            "metric of the model's Fisher information), 'fisher' (squared derivatives of the log-likelihood by gates, "
            "per sample), 'taylor' (first order, |gradient x gate|), 'activation' (norm of weights times norm of "
            "activations), 'l1', 'l2', 'linf' (norms of weights), 'random'."
        },
    )
    scope: Literal["global", "local"] = field(
        default="global",
        metadata={"help": "'global' weighs all layers against each other, 'local' cuts the same share in each."},
    )
    search: Literal["dynamic", "ranking"] = field(
        default="dynamic",
        metadata={
            "help": "How a global plan is found: 'dynamic' programming over errors and costs (SPDY), or a 'ranking' "
            "by error per cost."
        },
    )
    uniform: bool = field(
        default=False,
        metadata={
            "help": "One width for all layers, so that stock Transformers loads the result without hf_compress "
            "(neurons of every architecture; heads where the config has head_dim)."
        },
    )
    multiple_of: int = field(
        default=16,
        metadata={
            "help": "Feed-forward networks keep a multiple of so many neurons. Odd widths can make bfloat16 1.5 times "
            "slower on a CPU."
        },
    )
    steps: int = field(
        default=1,
        metadata={"help": "Prune in so many rounds, each with new scores and a repair: budget^(1/steps) each time."},
    )
    repair: Repair = field(
        default="least_squares",
        metadata={
            "help": "What makes up for the units that go: 'least_squares' fits each output projection, from the first "
            "layer to the last, to the unpruned model (K-prune), 'bias' keeps the mean of its outputs (FLAP), 'none'."
        },
    )
    ridge: float = field(
        default=0.1,
        metadata={"help": "Pull of the repair towards the old weights, in units of the mean variance of the inputs."},
    )
    use_labels: bool = field(
        default=False,
        metadata={
            "help": "Take derivatives of the loss on the labels of the data ('fisher', 'taylor', 'obs'). Without, "
            "labels come from the model itself, which needs none."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of random scores, and of labels that are drawn from the model."})

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                raise ValueError(f"{name}={given!r} is unknown: give one of {', '.join(map(repr, choices))}.")
        units = [self.units] if isinstance(self.units, str) else list(self.units)
        unknown = sorted(set(units) - set(Unit.__args__))
        if unknown or not units:
            raise ValueError(f"units={self.units!r}: give one or more of {', '.join(map(repr, Unit.__args__))}.")
        self.units = tuple(units)
        if not isinstance(self.budget, int | float) or not 0 < self.budget <= 1:
            raise ValueError(
                f"budget={self.budget!r} is no share: give a number above 0 and at most 1, such as 0.5 for half."
            )
        for name, least in (("multiple_of", 1), ("steps", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number of at least {least}.")
        if self.ridge < 0:
            raise ValueError(f"ridge={self.ridge!r}: the pull towards the old weights is 0 or more.")
        self._check_together()

    def _check_together(self) -> None:
        if self.uniform and self.scope == "local":
            raise ValueError("uniform=True chooses widths for all layers together: leave scope='global'.")
        if self.use_labels and self.score not in ("fisher", "taylor", "obs"):
            raise ValueError(f"score={self.score!r} takes no derivative, so use_labels=True has no effect: leave it.")

    @property
    def needs_data(self) -> bool:
        """Whether scores, repair or cost are computed from calibration data."""
        is_blind = self.score in BLIND_SCORES and self.units != ("layers",)
        return not is_blind or self.repair != "none" or self.cost == "latency"


_CHOICES = {
    "cost": Cost.__args__,
    "score": Score.__args__,
    "scope": ("global", "local"),
    "search": ("dynamic", "ranking"),
    "repair": Repair.__args__,
}
