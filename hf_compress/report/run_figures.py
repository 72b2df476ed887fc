"""The figures of a recipe's run: what each step did to the model, and where its bytes and its time are."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_compress.report.drawing import FAINT, INK, PAPER, SERIES, SMALL, Figure, drawn
from hf_compress.report.tradeoff import models_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Report = dict[str, Any]
Entry = dict[str, Any]

# What a Trainer logs besides the terms of its loss.
_NOT_LOSSES = ("step", "epoch", "learning_rate", "grad_norm", "stage", "temperature", "alpha")
_WIDTHS = {"self": "Self-attention heads", "cross": "Cross-attention heads", "ffn": "Feed-forward neurons"}
_PARTS = ("embeddings", "attention", "feed-forward", "head", "other")
_ROW = 0.2  # inches
_LABEL_LENGTH, _MAX_NUMBERED_LAYERS = 22, 12
# Ink stays readable on a colour that is no stronger.
_WEAKEST, _STRONGEST = 0.06, 0.5


def draw_run(report: Report) -> list[Figure]:
    """All figures of one run that there are data for.

    Args:
        report (`dict`): Of a recipe's run.

    Returns:
        `list[Figure]`: In the order of the page.
    """
    draws = (_draw_widths, _draw_sparsity, _draw_noise, _draw_losses, _draw_bytes, _draw_seconds)
    return [figure for draw in draws for figure in draw(report)]


def _details(report: Report, name: str) -> Iterator[tuple[Entry, Any]]:
    for entry in models_of(report):
        if found := entry.get("details", {}).get(name):
            yield entry, found


def _draw_widths(report: Report) -> Iterator[Figure]:
    for entry, found in _details(report, "widths"):
        dense, pruned = found["dense"], found["pruned"]
        for part, what in _WIDTHS.items():
            blocks = [name for name in dense if dense[name].get(part)]
            if not blocks:
                continue
            full = [dense[name][part] for name in blocks]
            kept = [pruned.get(name, {}).get(part, 0) for name in blocks]
            # Numbers alone are enough where there is one stack of layers.
            is_one_stack = len({name.split(".")[0] for name in blocks}) == 1
            labels = [name.split(".")[-1] if is_one_stack else name for name in blocks]
            title = f"{what} that {entry['name']} kept"
            meaning = f"{title}: {sum(kept)} of {sum(full)}. By layer: {', '.join(map(str, kept))}."
            yield drawn(title, meaning, 0.6 + _ROW * len(blocks), _bars(labels, full, kept))


def _bars(labels: Sequence[str], full: Sequence[int], kept: Sequence[int]) -> Callable[["Canvas"], None]:
    def draw(canvas: "Canvas") -> None:
        axes = canvas.subplots()
        places = range(len(labels))
        axes.barh(places, full, color=FAINT, alpha=0.25)
        axes.barh(places, kept, color=SERIES[0])
        for place, number in enumerate(kept):
            axes.text(max(full) * 1.02, place, f"{number}", va="center", fontsize=SMALL)
        axes.set_yticks(places, labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_ylabel("Layer")
        axes.set_xlim(0, max(full) * 1.12)
        axes.set_xticks([0, max(full) // 2, max(full)] if max(full) > 1 else [0, 1])
        axes.spines["bottom"].set_bounds(0, max(full))

    return draw


def _draw_sparsity(report: Report) -> Iterator[Figure]:
    for entry, layers in _details(report, "sparsity"):
        shares = {name: 100 * one["sparsity"] for name, one in layers.items()}
        title = f"Weights that are 0 after {entry['name']}, %"
        strength = {name: share / 100 for name, share in shares.items()}
        yield _grid(title, f"{title}: {_range_of(shares)}.", shares, strength, SERIES[0])


def _draw_noise(report: Report) -> Iterator[Figure]:
    for entry, modules in _details(report, "noise"):
        ratios = {name: one["outputs"] for name, one in modules.items() if one["outputs"] is not None}
        if not ratios:
            continue
        title = f"Signal-to-noise ratio of outputs after {entry['name']}, dB"
        low, high = min(ratios.values()), max(ratios.values())
        # What lost most is what one looks for.
        strength = {name: (high - ratio) / max(high - low, 1e-9) for name, ratio in ratios.items()}
        yield _grid(title, f"{title}, more is better: {_range_of(ratios)}.", ratios, strength, SERIES[5])


def _range_of(values: Mapping[str, float]) -> str:
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    mean = sum(values.values()) / len(values)
    return f"from {values[lowest]:.1f} ({lowest}) to {values[highest]:.1f} ({highest}), {mean:.1f} in the mean"


def _grid(title: str, meaning: str, values: Mapping[str, float], strength: Mapping[str, float], colour: str) -> Figure:
    """A row for each kind of module, a column for each layer; modules outside the layers have a row of their own."""
    places = {name: _kind_and_layer(name) for name in values}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    n_layers = 1 + max((layer for _, layer in places.values() if layer is not None), default=0)

    def draw(canvas: "Canvas") -> None:
        from matplotlib.patches import Rectangle

        axes = canvas.subplots()
        for name, (kind, layer) in places.items():
            left, width = (0, n_layers) if layer is None else (layer, 1)
            row, alpha = kinds.index(kind), _WEAKEST + (_STRONGEST - _WEAKEST) * strength[name]
            axes.add_patch(Rectangle((left, row), width, 1, facecolor=colour, alpha=alpha, linewidth=0))
            axes.add_patch(Rectangle((left, row), width, 1, fill=False, edgecolor=PAPER, linewidth=1.5))
            if layer is None or n_layers <= _MAX_NUMBERED_LAYERS:
                middle = left + width / 2, row + 0.52
                axes.text(*middle, f"{values[name]:.0f}", ha="center", va="center", fontsize=SMALL, color=INK)
        axes.set_xlim(0, n_layers)
        axes.set_ylim(len(kinds), 0)
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], _labels(kinds))
        every = 1 + n_layers // (_MAX_NUMBERED_LAYERS + 1)
        axes.set_xticks([layer + 0.5 for layer in range(0, n_layers, every)], range(0, n_layers, every))
        axes.set_xlabel("Layer")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return drawn(title, meaning, 0.5 + _ROW * len(kinds), draw)


def _kind_and_layer(name: str) -> tuple[tuple[str, str], int | None]:
    """What stands before and after the number of the layer, and the number; without one, all stands after it."""
    before, after = [], name.split(".")
    while after and not after[0].isdigit():
        before.append(after.pop(0))
    if not after:
        return ("", name), None
    return (".".join(before), ".".join(after[1:])), int(after[0])


def _labels(kinds: Sequence[tuple[str, str]]) -> list[str]:
    """Short names of kinds of modules: the last words of each, all of them where others end alike."""
    short = []
    for _, words in kinds:
        rest = words
        while len(rest) > _LABEL_LENGTH and "." in rest:
            rest = rest.split(".", 1)[1]
        short.append(rest if len(rest) <= _LABEL_LENGTH else f"...{rest[3 - _LABEL_LENGTH :]}")
    is_clear = [short.count(label) == 1 for label in short]
    return [
        label if clear else f"{before.split('.')[0]}: {label}"
        for label, clear, (before, _) in zip(short, is_clear, kinds, strict=True)
    ]


def _draw_losses(report: Report) -> Iterator[Figure]:
    for entry, logged in _details(report, "losses"):
        names = dict.fromkeys(name for one in logged for name in one)
        curves = {
            name: [(one["step"], one[name]) for one in logged if _is_finite(one, name, "step")]
            for name in names
            if name not in _NOT_LOSSES and not name.endswith("_share")
        }
        curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
        if not curves:
            continue
        title = f"Losses while {entry['name']} was trained, by step"
        ends = (f"{name} from {curve[0][1]:.3g} to {curve[-1][1]:.3g}" for name, curve in curves.items())
        meaning = f"{title}, from the first to the last: {'; '.join(ends)}."
        yield drawn(title, meaning, 0.3 + 1.35 * math.ceil(len(curves) / 2), _small_multiples(curves))


def _is_finite(logged: Mapping[str, float | None], *names: str) -> bool:
    values = [logged.get(name) for name in names]
    return all(value is not None and math.isfinite(value) for value in values)


def _small_multiples(curves: Mapping[str, list[tuple[float, float]]]) -> Callable[["Canvas"], None]:
    def draw(canvas: "Canvas") -> None:
        n_columns = min(2, len(curves))
        panels = canvas.subplots(math.ceil(len(curves) / n_columns), n_columns, squeeze=False).flatten()
        for panel in panels[len(curves) :]:
            panel.remove()
        for panel, (name, curve) in zip(panels, curves.items(), strict=False):
            panel.plot(*zip(*curve, strict=True), color=SERIES[0], linewidth=1.2)
            panel.set_title(name)
            panel.locator_params(nbins=4)
            panel.set_ylim(bottom=min(0, *(value for _, value in curve)))
            panel.set_xlim(left=0)

    return draw


def _draw_bytes(report: Report) -> Iterator[Figure]:
    found = {entry["name"]: entry.get("parts", {}).get("bytes") or {} for entry in models_of(report)}
    return _stacked("Bytes by part of the model", found, 1e-6, "MB")


def _draw_seconds(report: Report) -> Iterator[Figure]:
    found = {entry["name"]: _shares_of_time(entry) for entry in models_of(report)}
    return _stacked("Where the time goes", found, 100, "% of the first model's time")


def _shares_of_time(entry: Entry) -> dict[str, float]:
    """The time of each part, in that of the whole first model: steps were measured at other moments."""
    seconds = entry.get("parts", {}).get("seconds") or {}
    whole = sum(seconds.values())
    if not whole:
        return {}
    largest = max(entry["latency"], key=int)
    return {part: value * entry["latency"][largest]["ratio"] / whole for part, value in seconds.items()}


def _stacked(title: str, found: Mapping[str, Mapping[str, float]], scale: float, unit: str) -> Iterator[Figure]:
    found = {name: {part: scale * value for part, value in parts.items()} for name, parts in found.items() if parts}
    if not found:
        return

    def draw(canvas: "Canvas") -> None:
        axes = canvas.subplots()
        left = [0.0] * len(found)
        for number, part in enumerate(_PARTS):
            values = [parts.get(part, 0) for parts in found.values()]
            bars = {"color": SERIES[number], "edgecolor": PAPER, "linewidth": 0.6, "height": 0.75}
            axes.barh(range(len(found)), values, left=left, label=part, **bars)
            left = [start + value for start, value in zip(left, values, strict=True)]
        for place, total in enumerate(left):
            axes.text(total, place, f" {total:.3g}", va="center", fontsize=SMALL)
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel(unit)
        axes.margins(x=0.14)
        axes.locator_params(axis="x", nbins=5)
        canvas.legend(loc="outside upper left", ncols=3, handlelength=1, columnspacing=1.2, borderpad=0)

    def words(parts: Mapping[str, float]) -> str:
        by_part = ", ".join(f"{part} {parts[part]:.3g}" for part in _PARTS if part in parts)
        return f"{sum(parts.values()):.3g} ({by_part})"

    meaning = f"{title}, in {unit}: {'; '.join(f'{name} {words(parts)}' for name, parts in found.items())}."
    yield drawn(title, meaning, 0.9 + 0.24 * len(found), draw)
