"""Which number format suits a model on this machine: all are timed, side by side, on the user's own batch."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from hf_compress.evaluation.cost import saved_bytes
from hf_compress.evaluation.latency import Conditions, compare_latency
from hf_compress.modeling.half import is_fast
from hf_compress.modeling.tasks import unwrap
from hf_compress.quantization.config import FloatConfig, Int8DynamicConfig
from hf_compress.quantization.modules import check_float
from hf_compress.quantization.quantize import quantize

logger = logging.getLogger(__name__)

FLOAT32 = "float32"
# From the one that changes the least of a model to the one that changes the most.
FORMATS: dict[str, Any] = {
    FLOAT32: None,
    "bf16": FloatConfig("bf16"),
    "fp16": FloatConfig("fp16"),
    "int8": Int8DynamicConfig(),
    "int8-bf16": Int8DynamicConfig(dtype="bf16"),
    "llm-int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
CPU_FEATURES = ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2")


@dataclass(frozen=True)
class Candidate:
    """One format, as measured.

    Attributes:
        name (`str`): A key of `FORMATS`.
        median_s (`float`): Median time of a forward in seconds.
        speedup (`float`): Time of float32 divided by this time.
        bytes_on_disk (`int`): Of the saved weights.
    """

    name: str
    median_s: float
    speedup: float
    bytes_on_disk: int


@dataclass(frozen=True)
class Recommendation:
    """What was measured, and what follows.

    Attributes:
        choice (`str`): Name of the format: of those within `tolerance` of the fastest, the one that changes the model
            least.
        candidates (`tuple[Candidate, ...]`): All that were timed.
        skipped (`dict[str, str]`): The others, and why.
        machine (`tuple[str, ...]`): What speeds up small numbers here: features of the CPU, or the GPU's capability.
        conditions (`Conditions`): Device, threads, batch, length and versions.
        tolerance (`float`): By which share of its time a format may be slower than the fastest.
    """

    choice: str
    candidates: tuple[Candidate, ...]
    skipped: dict[str, str]
    machine: tuple[str, ...]
    conditions: Conditions
    tolerance: float

    @property
    def config(self) -> Any:
        """What to give to `quantize`; `None` where the model should stay in float32."""
        return copy.deepcopy(FORMATS[self.choice])

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """A table of what was measured, and the choice."""
        rows = [f"{'format':10} {'ms':>9} {'speed-up':>9} {'MB':>8}"]
        rows += [
            f"{c.name:10} {1e3 * c.median_s:9.2f} {c.speedup:8.2f}x {c.bytes_on_disk / 1e6:8.1f}"
            + (" <- chosen" if c.name == self.choice else "")
            for c in self.candidates
        ]
        rows += [f"{name:10} not timed: {why}" for name, why in self.skipped.items()]
        c = self.conditions
        machine = ", ".join(self.machine) or "nothing for small numbers"
        rows.append(
            f"{c.device} ({c.processor}; {machine}), {c.threads} threads, "
            f"batch {c.batch_size}, length {c.sequence_length}, torch {c.torch_version}"
        )
        return "\n".join(rows)


def recommend_format(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    formats: Sequence[str] | None = None,
    tolerance: float = 0.1,
    n_runs: int = 20,
) -> Recommendation:
    """Times a model in every number format that this machine has use for, and chooses one.

    It says nothing of accuracy: measure that with `score_retention`, or give `evaluate` to `quantize`.

    Args:
        model (`nn.Module`): A Transformers model in float32, on the device where it will run.
        batch (`Mapping[str, torch.Tensor]`): Inputs of the size that it will get.
        formats (`Sequence[str]`, *optional*): Keys of `FORMATS` to try; by default all.
        tolerance (`float`, *optional*, defaults to 0.1): How much slower than the fastest a format may be, as a share
            of its time, to be preferred for changing less.
        n_runs (`int`, *optional*, defaults to 20): Forwards of each on the clock, in turn.

    Returns:
        `Recommendation`: Print it for a table; `.config` goes to `quantize`.

    Raises:
        ValueError: if a format is unknown, the model is quantized already, or `tolerance` is negative.
    """
    model = unwrap(model)
    check_float(model)
    wanted = list(FORMATS) if formats is None else [FLOAT32, *(name for name in formats if name != FLOAT32)]
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not tolerance >= 0:
        raise ValueError(
            f"formats={wanted} with tolerance={tolerance} cannot be tried: give some of {', '.join(FORMATS)}, and a "
            "tolerance of at least 0."
        )
    skipped: dict[str, str] = {}
    models: dict[str, nn.Module] = {}
    # In the order of what changes a model least, whatever that of the argument is.
    for name in (name for name in FORMATS if name in wanted):
        why = _reason_against(name, model.device)
        if why is None:
            try:
                # Timed as they would run: `float32` is a copy too, whatever the model's own dtype is.
                models[name] = _in_format(model, name)
            except ValueError as error:
                why = str(error)
        if why is not None:
            skipped[name] = why
    measured = compare_latency(models, batch, n_runs=n_runs)
    reference = measured.latency[FLOAT32].median_s
    candidates = tuple(
        Candidate(name, latency.median_s, reference / latency.median_s, saved_bytes(models[name]))
        for name, latency in measured.latency.items()
    )
    times = {candidate.name: candidate.median_s for candidate in candidates}
    found = Recommendation(
        choose(times, tolerance), candidates, skipped, _features(model.device), measured.conditions, tolerance
    )
    logger.info("%s", found)
    return found


def choose(times: Mapping[str, float], tolerance: float) -> str:
    """Of the formats that are about as fast as the fastest, the first.

    Args:
        times (`Mapping[str, float]`): Median times by name, in the order of preference.
        tolerance (`float`): Share of the shortest time by which others may be longer.

    Returns:
        `str`: A name.
    """
    limit = min(times.values()) * (1 + tolerance)
    return next(name for name, time in times.items() if time <= limit)


def _in_format(model: nn.Module, name: str) -> nn.Module:
    logger.info("Making the model in %s.", name)
    return copy.deepcopy(model).float() if FORMATS[name] is None else quantize(model, FORMATS[name])


def _reason_against(name: str, device: torch.device) -> str | None:
    config = FORMATS[name]
    if isinstance(config, FloatConfig | Int8DynamicConfig) and config.dtype and not is_fast(device, config.dtype):
        return "this CPU has no instructions for it, and takes many times as long as in float32"
    if isinstance(config, BitsAndBytesConfig) and not is_bitsandbytes_available():
        return "bitsandbytes is missing: pip install bitsandbytes"
    return None


def _features(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (f"compute capability {major}.{minor}",)
    found = torch.cpu.get_capabilities()
    return tuple(feature for feature in CPU_FEATURES if found.get(feature))
