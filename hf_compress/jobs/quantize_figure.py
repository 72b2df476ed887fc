"""Figures of a quantization: what each format costs and keeps, and what rounding did to each module."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress.report.words import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito, which are told apart with every kind of colour vision.
SIZE, QUALITY, SPEED = "#0072B2", "#D55E00", "#009E73"
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = "osD^vP"
GRID, LINE, TEXT = "#E4E4E4", "#999999", "#333333"
# Inches.
PANEL_WIDTH, ROW_HEIGHT, MODULE_HEIGHT, LABEL_WIDTH, MARGIN = 2.7, 0.32, 0.18, 0.075, 1.2


def draw_formats(report: Mapping[str, Any], path: str | Path, title: str | None = None) -> Path:
    """Draws size, quality and speed of each model of a report side by side, and saves the figure.

    Args:
        report (`Mapping[str, Any]`): As `quantize_classifier` returns it: `models`, `metric` and `latency`.
        path (`str` or `Path`): File to write; its ending says the format.
        title (`str`, *optional*): Above the figure.

    Returns:
        `Path`: The file.
    """
    from matplotlib.figure import Figure

    models, metric = report["models"], report["metric"]
    names = [model["name"] for model in models]
    scale = 100 if is_share(metric) else 1
    size = (3 * PANEL_WIDTH + LABEL_WIDTH * max(map(len, names)), MARGIN + ROW_HEIGHT * len(names))
    # Not of pyplot, which would keep the figure and choose a window system.
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3, sharey=True)
    _draw_bars(panels[0], [model["cost"]["bytes_on_disk"] / 1e6 for model in models], SIZE, "{:.1f}", "MB on disk")
    unit = " in %" if scale == 100 else ""
    _draw_quality(panels[1], [model["quality"] for model in models], scale, f"{metric}{unit}, with 95 % interval")
    speeds = [1 / report["latency"]["ratio"][name] for name in names]
    _draw_bars(panels[2], speeds, SPEED, "{:.2f}x", "times as fast")
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    return _save(figure, path, title)


def draw_noise(
    noise: Mapping[str, Mapping[str, Mapping[str, float | None]]], path: str | Path, title: str | None = None
) -> Path:
    """Draws the signal-to-noise ratio of each module in each format, and saves the figure.

    Args:
        noise (`Mapping[str, Mapping[str, Mapping[str, float | None]]]`): By format and module, the ratios of
            `weights` and `outputs` in decibels; `None` is left out.
        path (`str` or `Path`): File to write; its ending says the format.
        title (`str`, *optional*): Above the figure.

    Returns:
        `Path`: The file.
    """
    from matplotlib.figure import Figure

    modules = list(dict.fromkeys(name for found in noise.values() for name in found))
    labels = _short_names(modules)
    size = (2 * 1.3 * PANEL_WIDTH + LABEL_WIDTH * max(map(len, labels)), MARGIN + MODULE_HEIGHT * len(modules))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, what in zip(panels, ("weights", "outputs"), strict=True):
        for place, (name, found) in enumerate(noise.items()):
            # Side by side, because formats of as many bits round weights alike.
            shift = 0.5 * ((place + 0.5) / len(noise) - 0.5)
            at = [(found[module][what], row + shift) for row, module in enumerate(modules) if module in found]
            points = [(value, row) for value, row in at if value is not None]
            style = {"marker": MARKERS[place % len(MARKERS)], "color": SERIES[place % len(SERIES)]}
            panel.plot(
                *zip(*points, strict=True) if points else ([], []), linestyle="", markersize=4, label=name, **style
            )
        panel.grid(axis="both", color=GRID, linewidth=0.6)
        _finish(panel, len(modules), f"Signal to noise of {what}, dB")
    panels[0].set_yticks(range(len(modules)), labels, fontsize=7)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    return _save(figure, path, title)


def _draw_bars(panel: "Axes", values: Sequence[float], colour: str, form: str, title: str) -> None:
    panel.barh(range(len(values)), values, height=0.66, color=[LINE, *[colour] * (len(values) - 1)])
    widest = max(values)
    for place, value in enumerate(values):
        panel.text(widest * 1.02, place, form.format(value), va="center", fontsize=8, color=TEXT)
    _finish(panel, len(values), title)
    panel.set_xlim(0, widest * 1.22)
    panel.set_xticks([tick for tick in panel.get_xticks() if tick <= widest])
    panel.spines["bottom"].set_bounds(0, widest)


def _draw_quality(panel: "Axes", qualities: Sequence[Mapping[str, Any]], scale: float, title: str) -> None:
    """Each model's metric as a point, with the interval of its difference from the first, which is a line."""
    first = qualities[0]["compressed"]
    if first is not None:
        panel.axvline(scale * first, color=LINE, linewidth=1)
    for place, quality in enumerate(qualities):
        value, (low, high) = quality["compressed"], quality["difference_interval"]
        if value is None:
            continue
        if place and None not in (low, high, first):
            panel.plot([scale * (first + low), scale * (first + high)], [place, place], color=QUALITY, linewidth=1.6)
        panel.plot(scale * value, place, "o", markersize=6, color=QUALITY if place else LINE)
        text = f"{scale * value:.1f}" if scale == 100 else f"{value:.3f}"
        panel.annotate(text, (1, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=TEXT)
    panel.margins(x=0.08)
    _finish(panel, len(qualities), title)


def _finish(panel: "Axes", n_rows: int, title: str) -> None:
    panel.set_title(title, fontsize=10, color=TEXT, loc="left")
    panel.set_ylim(n_rows - 0.5, -0.5)
    panel.tick_params(labelsize=8, labelcolor=TEXT, color=LINE, left=False)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(LINE)


def _save(figure: Any, path: str | Path, title: str | None) -> Path:
    if title is not None:
        figure.suptitle(title, color=TEXT, fontsize=13)
    figure.savefig(path, dpi=150)
    return Path(path)


def _short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without the part at the front that all of them share."""
    split = [name.split(".") for name in names]
    is_shared = len({parts[0] for parts in split}) == 1 and min(map(len, split)) > 1
    return [".".join(parts[1:] if is_shared else parts) for parts in split]
