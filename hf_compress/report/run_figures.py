"""The figures of a recipe's run, as SVG that follows the page's colours, each with its meaning in words."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_compress.report.words import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Report = dict[str, Any]
Entry = dict[str, Any]

# Colours that stand for variables of the page, so that a figure is readable in the light and in the dark.
INK, FAINT, PAPER = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0a0a{number:02x}" for number in range(1, 9))
_VARIABLES = {INK: "--ink", FAINT: "--faint", PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate(SERIES, start=1)
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_compress",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
_WIDTH = 6.4  # inches
# Loss terms apart from these are what a Trainer logs of itself.
_NOT_LOSSES = ("step", "epoch", "learning_rate", "grad_norm", "stage", "temperature", "alpha")
_WIDTHS = {"self": "Self-attention heads", "cross": "Cross-attention heads", "ffn": "Feed-forward neurons"}
_PARTS = ("embeddings", "attention", "feed-forward", "head", "other")


class Figure(NamedTuple):
    """A figure of a page.

    Attributes:
        title (`str`): Above it.
        meaning (`str`): What it shows, in words and numbers, for those who do not see it.
        svg (`str`): An `<svg>` element.
    """

    title: str
    meaning: str
    svg: str


def run_figures(reports: Mapping[str, Report]) -> list[Figure]:
    """All figures that there are data for: of all runs together, then of each.

    Args:
        reports (`Mapping[str, dict]`): Reports of recipes' runs, by what each is called.

    Returns:
        `list[Figure]`: In the order of the page.
    """
    figures = [_against_size(reports), *_against_time(reports)]
    for name, report in reports.items():
        of_run = f" ({name})" if len(reports) > 1 else ""
        for draw in (_draw_widths, _draw_sparsity, _draw_noise, _draw_losses, _draw_bytes, _draw_seconds):
            figures += [figure._replace(title=figure.title + of_run) for figure in draw(report)]
    return figures


def models_of(report: Report) -> list[Entry]:
    """The entries of a report that are of models.

    Args:
        report (`dict`): Of a recipe's run.
    """
    return [entry for entry in report["steps"] if "quality" in entry]


def _drawn(title: str, meaning: str, height: float, draw: Callable[["Canvas"], None], width: float = _WIDTH) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return Figure(title, meaning, _embedded(file.getvalue(), title, meaning))


def _embedded(text: str, title: str, meaning: str) -> str:
    """The element alone, as wide as the page lets it, in the page's colours and with a text for screen readers."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Several figures are on a page, and what they define is named alike.
    mark = f"f{hash_of(title + svg) % 10**8}-"
    svg = re.sub(r'id="', f'id="{mark}', svg)
    svg = re.sub(r'href="#', f'href="#{mark}', svg)
    svg = re.sub(r"url\(#", f"url(#{mark}", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    opening = re.sub(r' xmlns:\w+="[^"]*"', "", opening) + ' xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = escape(meaning, quote=True)
    return f'{opening} role="img" aria-label="{label}"><title>{escape(title)}</title>{rest}'.strip()


def hash_of(text: str) -> int:
    """A number that is the same for the same text on every machine.

    Args:
        text (`str`): The text.
    """
    number = 0
    for character in text:
        number = (number * 31 + ord(character)) % (1 << 61)
    return number


def _scale(report: Report) -> tuple[float, str]:
    metric = report["metric"]
    return (100.0, f"{metric}, %") if is_share(metric) else (1.0, metric)


def _against_size(reports: Mapping[str, Report]) -> Figure:
    return _scatter(
        reports, "Quality and size", "MB on disk", lambda entry: entry["cost"]["bytes_on_disk"] / 1e6, "MB"
    )


def _against_time(reports: Mapping[str, Report]) -> list[Figure]:
    figures = []
    shared = set.intersection(*(set(models_of(report)[0]["latency"]) for report in reports.values()))
    for size in sorted(shared, key=int):

        def share(entry: Entry, size: str = size) -> float:
            return 100 * entry["latency"][size]["ratio"]

        title = f"Quality and time, {size} rows at a time"
        figures.append(_scatter(reports, title, "time of a batch, % of the first model's", share, "%"))
    return figures


def _scatter(
    reports: Mapping[str, Report], title: str, label: str, value: Callable[[Entry], float], unit: str
) -> Figure:
    """Models by quality and cost, with the interval of the first and the line of those that none beats in both."""
    scale, quality = _scale(next(iter(reports.values())))
    words, points = [], []
    for number, (run, report) in enumerate(reports.items()):
        for entry in models_of(report):
            kept = entry["quality"]
            if kept["compressed"] is None:
                continue
            low, high = (scale * (kept["teacher"] + (x or 0.0)) for x in kept["difference_interval"])
            name = entry["name"] if len(reports) == 1 else f"{run}: {entry['name']}"
            points.append((value(entry), scale * kept["compressed"], low, high, name, number))
            words.append(f"{name} {scale * kept['compressed']:.1f} at {value(entry):.3g} {unit}")
    front = _front([(x, y) for x, y, *_ in points])

    def draw(canvas: "Canvas") -> None:
        axes = canvas.subplots()
        axes.set_xscale("log")
        axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=1, linestyle="--", zorder=1)
        for position, (x, y, low, high, name, run) in enumerate(points):
            colour = SERIES[run % len(SERIES)]
            interval = [[max(0.0, y - low)], [max(0.0, high - y)]]
            axes.errorbar(x, y, yerr=interval, color=colour, fmt="o", capsize=2, linewidth=1, zorder=2)
            axes.annotate(
                name,
                (x, y),
                xytext=(6, _height_of_label(position, [point[:2] for point in points])),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
        axes.set_xlabel(f"{label} (smaller is better)")
        axes.set_ylabel(quality)
        axes.margins(0.18, 0.12)
        _plain_ticks(axes)

    meaning = f"{title}: {'; '.join(words)}. The line joins the models that no other beats in both."
    return _drawn(title, meaning, 4.0, draw)


def _height_of_label(position: int, points: Sequence[tuple[float, float]]) -> int:
    """Where a point's name stands, in points above it: of points that lie above each other, below all but the top."""
    x = points[position][0]
    near = [other for other, (x_other, _) in enumerate(points) if 0.8 < x_other / x < 1.25]
    near.sort(key=lambda other: -points[other][1])
    rank = near.index(position)
    return 6 if rank == 0 else -3 - 10 * rank


def _plain_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is better than in both: less to the left, more upwards.

    Args:
        points (sequence of pairs): Cost and quality.
    """
    best, front = float("-inf"), []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            best = y
            front.append((x, y))
    return front


def _details(report: Report, name: str) -> list[tuple[Entry, Any]]:
    return [(entry, entry["details"][name]) for entry in models_of(report) if entry.get("details", {}).get(name)]


def _draw_widths(report: Report) -> list[Figure]:
    figures = []
    for entry, found in _details(report, "widths"):
        dense, pruned = found["dense"], found["pruned"]
        for part, what in _WIDTHS.items():
            blocks = [name for name in dense if dense[name].get(part)]
            if not blocks:
                continue
            full = [dense[name][part] for name in blocks]
            kept = [pruned.get(name, {}).get(part, 0) for name in blocks]
            title = f"{what} that {entry['name']} kept"
            meaning = f"{title}, of {sum(full)} in all {sum(kept)}. By layer: {', '.join(map(str, kept))}."
            draw = _bars_of([str(number) for number in range(len(blocks))], full, kept)
            figures.append(_drawn(title, meaning, 0.9 + 0.28 * len(blocks), draw))
    return figures


def _bars_of(names: list[str], full: list[float], kept: list[float]) -> Callable[["Canvas"], None]:
    def draw(canvas: "Canvas") -> None:
        axes = canvas.subplots()
        places = range(len(names))
        axes.barh(places, full, color=FAINT, alpha=0.25)
        axes.barh(places, kept, color=SERIES[0])
        for place, number in zip(places, kept, strict=True):
            axes.text(max(full) * 1.01, place, f"{number}", va="center", fontsize=9)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_ylabel("Layer")

    return draw


def _draw_sparsity(report: Report) -> list[Figure]:
    figures = []
    for entry, layers in _details(report, "sparsity"):
        shares = {name: 100 * one["sparsity"] for name, one in layers.items()}
        title = f"Weights that are 0 after {entry['name']}"
        meaning = f"{title}, in percent by layer: {_range_of(shares)}."
        figures.append(_columns(title, meaning, shares, "%"))
    return figures


def _draw_noise(report: Report) -> list[Figure]:
    figures = []
    for entry, modules in _details(report, "noise"):
        ratios = {name: one["outputs"] for name, one in modules.items() if one["outputs"] is not None}
        if not ratios:
            continue
        title = f"Signal-to-noise ratio of outputs after {entry['name']}"
        meaning = f"{title}, in dB, more is better: {_range_of(ratios)}."
        figures.append(_columns(title, meaning, ratios, "dB"))
    return figures


def _range_of(values: Mapping[str, float]) -> str:
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"from {values[lowest]:.1f} ({lowest}) to {values[highest]:.1f} ({highest})"


def _columns(title: str, meaning: str, values: Mapping[str, float], unit: str) -> Figure:
    """One column for each module, in the order of the model; what they have in common is left out of their names."""

    def draw(canvas: "Canvas") -> None:
        axes = canvas.subplots()
        axes.bar(range(len(values)), list(values.values()), color=SERIES[0], width=0.8)
        axes.set_ylabel(unit)
        axes.set_xlabel("Modules, from the first to the last")
        axes.set_xticks([])
        lowest = min(values, key=values.__getitem__)
        axes.set_title(f"lowest: {values[lowest]:.1f} {unit}, {lowest}", fontsize=8, color=INK, loc="left")
        axes.margins(x=0.01)

    return _drawn(title, meaning, 2.8, draw)


def _draw_losses(report: Report) -> list[Figure]:
    figures = []
    for entry, logged in _details(report, "losses"):
        names = [name for name in _names_in(logged) if name not in _NOT_LOSSES and not name.endswith("_share")]
        curves = {
            name: [(one["step"], one[name]) for one in logged if name in one and "step" in one] for name in names
        }
        curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
        if not curves:
            continue
        title = f"Losses while {entry['name']} was trained"
        ends = (f"{name} from {curve[0][1]:.3g} to {curve[-1][1]:.3g}" for name, curve in curves.items())
        figures.append(_drawn(title, f"{title}: {'; '.join(ends)}.", 2.4, _small_multiples(curves)))
    return figures


def _names_in(logged: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for one in logged for name in one))


def _small_multiples(curves: Mapping[str, list[tuple[float, float]]]) -> Callable[["Canvas"], None]:
    def draw(canvas: "Canvas") -> None:
        panels = canvas.subplots(1, len(curves), squeeze=False)[0]
        for panel, (name, curve) in zip(panels, curves.items(), strict=True):
            panel.plot(*zip(*curve, strict=True), color=SERIES[0], linewidth=1.2)
            panel.set_title(name, fontsize=9, color=INK)
            panel.set_xlabel("step", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.set_ylim(bottom=0)
            panel.xaxis.get_major_locator().set_params(nbins=3)

    return draw


def _draw_bytes(report: Report) -> list[Figure]:
    found = {entry["name"]: entry.get("parts", {}).get("bytes") or {} for entry in models_of(report)}
    return _stacked("Bytes by part of the model", found, 1e-6, "MB")


def _draw_seconds(report: Report) -> list[Figure]:
    found = {entry["name"]: _shares_of_time(entry) for entry in models_of(report)}
    return _stacked("Where the time goes", found, 100, "% of the first model's time")


def _shares_of_time(entry: Entry) -> dict[str, float]:
    """The time of each part, in that of the whole first model: steps were measured at other moments."""
    seconds = entry.get("parts", {}).get("seconds") or {}
    largest = max(entry["latency"], key=int)
    scale = entry["latency"][largest]["ratio"] / sum(seconds.values()) if seconds else 0.0
    return {part: scale * value for part, value in seconds.items()}


def _stacked(title: str, found: Mapping[str, Mapping[str, float]], scale: float, unit: str) -> list[Figure]:
    found = {name: parts for name, parts in found.items() if parts}
    if not found:
        return []
    totals = (f"{name} {scale * sum(parts.values()):.3g}" for name, parts in found.items())

    def draw(canvas: "Canvas") -> None:
        axes = canvas.subplots()
        left = [0.0] * len(found)
        for number, part in enumerate(_PARTS):
            values = [scale * parts.get(part, 0) for parts in found.values()]
            axes.barh(range(len(found)), values, left=left, color=SERIES[number], label=part, height=0.7)
            left = [start + value for start, value in zip(left, values, strict=True)]
        for place, total in enumerate(left):
            axes.text(total, place, f" {total:.3g}", va="center", fontsize=9)
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.1)
        canvas.legend(loc="outside upper left", ncols=len(_PARTS), fontsize=8)

    meaning = f"{title}, in {unit}: {', '.join(totals)}."
    return [_drawn(title, meaning, 1.2 + 0.34 * len(found), draw)]
