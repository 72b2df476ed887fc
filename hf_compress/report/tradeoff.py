"""Figures of what was lost against what was gained: the quality of every model against its size and its time."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_compress.report.drawing import FAINT, PAPER, SERIES, SMALL, Figure, drawn
from hf_compress.report.words import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.transforms import Bbox

Report = dict[str, Any]
Entry = dict[str, Any]

_HEIGHT, _LEGEND_LINE = 3.1, 0.19  # inches
_DOT = 4  # points from the middle of a model's dot to its edge
_NAME_LENGTH = 44


class Point(NamedTuple):
    """A model in a figure.

    Attributes:
        run (`int`): Number of its run.
        name (`str`): Of the model.
        cost (`float`): To the right.
        quality (`float`): Upwards.
        interval (`tuple[float, float]` or `None`): Of the quality.
        is_best (`bool`): Whether no other model, measured on the same rows, is better in one and as good in the other.
    """

    run: int
    name: str
    cost: float
    quality: float
    interval: tuple[float, float] | None
    is_best: bool = False


def models_of(report: Report) -> list[Entry]:
    """The entries of a report that are of models.

    Args:
        report (`dict`): Of a recipe's run.
    """
    return [entry for entry in report["steps"] if "quality" in entry]


def draw_tradeoffs(reports: Mapping[str, Report]) -> list[Figure]:
    """Quality against size, and against the time at every batch size that all runs share.

    Runs that were measured on the same rows are compared by their metric, others by the share of it that they kept.

    Args:
        reports (`Mapping[str, dict]`): Reports of recipes' runs, by what each is called.

    Returns:
        `list[Figure]`: In the order of the page.
    """
    figures = [_draw(reports, "Quality and size", "MB on disk", lambda entry: entry["cost"]["bytes_on_disk"] / 1e6)]
    shared = set.intersection(*(set(models_of(report)[0]["latency"]) for report in reports.values()))
    first = "the first model's" if len(reports) == 1 else "its run's first model's"
    for size in sorted(shared, key=int):

        def share(entry: Entry, size: str = size) -> float:
            return 100 * entry["latency"][size]["ratio"]

        title = f"Quality and time, {size} rows at a time"
        figures.append(_draw(reports, title, f"time, % of {first}", share, is_relative=True))
    return figures


def mark_best(points: Sequence[Point], groups: Sequence[object]) -> list[Point]:
    """Finds the models that no other of their group beats.

    Args:
        points (`Sequence[Point]`): All models.
        groups (`Sequence`): Of each run, what it was measured on.

    Returns:
        `list[Point]`: In the same order.
    """

    def beats(one: Point, other: Point) -> bool:
        is_as_good = one.cost <= other.cost and one.quality >= other.quality
        return is_as_good and (one.cost, one.quality) != (other.cost, other.quality)

    return [
        point._replace(
            is_best=not any(beats(other, point) for other in points if groups[other.run] == groups[point.run])
        )
        for point in points
    ]


def _draw(
    reports: Mapping[str, Report],
    title: str,
    label: str,
    cost_of: Callable[[Entry], float],
    is_relative: bool = False,
) -> Figure:
    groups = [_measured_on(report) for report in reports.values()]
    axis, quality_of = _quality_axis(reports, len(set(groups)) == 1)
    if is_relative:
        # Of shares of different models' times, none is more or less than another.
        groups = [
            (*group, one["recipe"]["model"], *map(str, one["machine"].values()))
            for group, one in zip(groups, reports.values(), strict=True)
        ]
    points = [
        Point(number, entry["name"], cost_of(entry), *quality)
        for number, report in enumerate(reports.values())
        for entry in models_of(report)
        if (quality := quality_of(entry)) is not None
    ]
    points = mark_best(points, groups)
    runs = list(reports)
    height = _HEIGHT + (_LEGEND_LINE * (len(runs) + 1) if len(runs) > 1 else 0)

    def draw(canvas: "Canvas") -> None:
        axes = canvas.subplots()
        axes.set_xscale("log")
        lines = []
        for group in dict.fromkeys(groups):
            best = sorted((point for point in points if point.is_best and groups[point.run] == group), key=_cost_of)
            lines.append([(point.cost, point.quality) for point in best])
            colour = FAINT if groups.count(group) > 1 or len(runs) == 1 else SERIES[groups.index(group) % len(SERIES)]
            axes.plot(*zip(*lines[-1], strict=True) if best else ([], []), color=colour, linewidth=1, ls=":", zorder=1)
        for point in points:
            _draw_point(axes, point)
        axes.set_xlabel(f"{label} (less is better)")
        axes.set_ylabel(axis)
        axes.margins(0.2, 0.1)
        if len({point.cost for point in points}) == 1:
            # matplotlib's own limits are too near each other for its logarithms.
            axes.set_xlim(points[0].cost / 2, points[0].cost * 2)
        _plain_ticks(axes)
        if len(runs) > 1:
            _name_runs(canvas, axes, runs)
        _name_points(canvas, axes, points, lines, len(runs) > 1)

    return drawn(title, _in_words(title, axis, label, points, runs), height, draw)


def _measured_on(report: Report) -> tuple[object, ...]:
    data = report["recipe"]["data"]
    columns = data.get("label_column"), *(data.get("text_columns") or ())
    source = data.get("dataset"), data.get("dataset_name")
    return report["metric"], source, columns, report["split"], report["rows_measured_on"]


def _quality_axis(
    reports: Mapping[str, Report], is_one_group: bool
) -> tuple[str, Callable[[Entry], tuple[float, tuple[float, float] | None] | None]]:
    """What goes upwards, and from a model to its value and interval, or to `None` where that is undefined."""
    metric = next(iter(reports.values()))["metric"]
    scale = 100 if not is_one_group or is_share(metric) else 1
    is_first = {id(entry): entry["name"] == one["reference"] for one in reports.values() for entry in models_of(one)}

    def scaled(value: float | None, interval: Sequence[float | None], start: float) -> Any:
        if value is None:
            return None
        return scale * value, None if None in interval else tuple(scale * (start + bound) for bound in interval)

    def measured(entry: Entry) -> Any:
        quality = entry["quality"]
        # Intervals are of the difference to the first model, which has none of its own.
        interval = [None] if is_first[id(entry)] else quality["difference_interval"]
        return scaled(quality["compressed"], interval, quality["teacher"] or 0.0)

    def kept(entry: Entry) -> Any:
        quality = entry["quality"]
        interval = [None] if is_first[id(entry)] else quality["retention_interval"]
        return scaled(quality["retention"], interval, 0.0)

    if is_one_group:
        return (f"{metric}, %" if scale == 100 else metric), measured
    return "kept of the first model's quality, %", kept


def _draw_point(axes: "Axes", point: Point) -> None:
    colour = SERIES[point.run % len(SERIES)]
    if point.interval is not None:
        low, high = point.interval
        distances = [[max(0.0, point.quality - low)], [max(0.0, high - point.quality)]]
        axes.errorbar(point.cost, point.quality, yerr=distances, color=colour, fmt="none", capsize=2, linewidth=1)
    face = colour if point.is_best else PAPER
    axes.plot(point.cost, point.quality, "o", color=colour, markerfacecolor=face, markersize=6, zorder=3)


def _plain_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_runs(canvas: "Canvas", axes: "Axes", runs: Sequence[str]) -> None:
    colours = [SERIES[number % len(SERIES)] for number in range(len(runs))]
    dots = [axes.plot([], [], "o", color=colour, markersize=6)[0] for colour in colours]
    # A legend leaves out what begins with an underscore, which a space before it does not.
    names = [f" {shortened(name)}" for name in runs]
    room = {"handletextpad": 0, "borderpad": 0, "labelspacing": 0.3}
    what = {"title": "Run, with the numbers of its steps", "title_fontsize": SMALL, "alignment": "left"}
    canvas.legend(dots, names, loc="outside upper left", ncols=1, **room, **what)


def shortened(name: str) -> str:
    """A name that fits into a figure, without its middle if it is long.

    Args:
        name (`str`): The name.
    """
    half = _NAME_LENGTH // 2
    return name if len(name) <= _NAME_LENGTH else f"{name[: half - 2]}...{name[-half:]}"


def _name_points(
    canvas: "Canvas", axes: "Axes", points: Sequence[Point], lines: Sequence[Any], has_runs: bool
) -> None:
    """Writes names where they cover no dot, interval, line or other name, as far as there is room."""
    canvas.draw_without_rendering()  # fixes where the axes are
    taken = [box for point in points for box in _boxes_of(axes, point)]
    taken += [box for line in lines for box in _boxes_along(axes.transData.transform(line))]
    named: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in sorted(points, key=lambda point: -point.quality):
        # Of several runs the number of the step, since colours tell the run.
        text = point.name[:2] if has_runs else point.name
        x, y = axes.transData.transform((point.cost, point.quality))
        if any(abs(x - x_other) < _DOT and abs(y - y_other) < _DOT for x_other, y_other in named[text]):
            continue
        named[text].append((x, y))
        label = axes.annotate(text, (point.cost, point.quality), (0, 0), textcoords="offset points", fontsize=SMALL)
        label.set(va="center", in_layout=False)
        size = label.get_window_extent()
        boxes = {place: _box_at(x, y, place, size) for place in _places(axes, point)}
        best = min(boxes, key=lambda place: _crowding(boxes[place], taken, axes.bbox) + abs(place[1]) / 5)
        label.set(position=best[:2], ha=best[2])
        taken.append(boxes[best])


def _places(axes: "Axes", point: Point) -> Iterator[tuple[float, float, str]]:
    """Where a name may stand: points to the right and upwards of its dot, and how it is aligned there."""
    _, y = axes.transData.transform((point.cost, point.quality))
    low, high = (axes.transData.transform((point.cost, bound))[1] for bound in point.interval or [point.quality] * 2)
    for dy in (0, 7, -7, 11, -11, 18, -18, 27, -27, 38, -38):
        yield 7, dy, "left"
        yield -7, dy, "right"
    yield 0, max(high - y, _DOT) + 7, "center"
    yield 0, min(low - y, -_DOT) - 7, "center"


def _box_at(x: float, y: float, place: tuple[float, float, str], size: "Bbox") -> "Bbox":
    from matplotlib.transforms import Bbox

    dx, dy, side = place
    start = {"left": 0.0, "right": -size.width, "center": -size.width / 2}[side]
    return Bbox.from_bounds(x + dx + start, y + dy - size.height / 2, size.width, size.height)


def _crowding(box: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> float:
    """The area of what a name would cover; what is out of the axes counts more than anything inside."""
    covered = [_shared_area(box, other) for other in taken]
    return sum(covered) + 10 * (box.width * box.height - _shared_area(box, inside))


def _shared_area(one: "Bbox", other: "Bbox") -> float:
    width, height = (
        max(0.0, min(one.x1, other.x1) - max(one.x0, other.x0)),
        max(0.0, min(one.y1, other.y1) - max(one.y0, other.y0)),
    )
    return width * height


def _boxes_of(axes: "Axes", point: Point) -> Iterator["Bbox"]:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((point.cost, point.quality))
    yield Bbox([[x - _DOT, y - _DOT], [x + _DOT, y + _DOT]])
    if point.interval is not None:
        low, high = (axes.transData.transform((point.cost, bound))[1] for bound in point.interval)
        yield Bbox([[x - 2, low], [x + 2, high]])


def _boxes_along(line: Sequence[tuple[float, float]]) -> Iterator["Bbox"]:
    """Small boxes that cover a line of several points."""
    from matplotlib.transforms import Bbox

    for (x, y), (x_next, y_next) in pairwise(line):
        n_boxes = 1 + int(max(abs(x_next - x), abs(y_next - y)) / _DOT)
        for number in range(n_boxes):
            share = (number + 0.5) / n_boxes
            middle_x, middle_y = x + share * (x_next - x), y + share * (y_next - y)
            yield Bbox([[middle_x - _DOT / 2, middle_y - 1], [middle_x + _DOT / 2, middle_y + 1]])


def _cost_of(point: Point) -> float:
    return point.cost


def _in_words(title: str, axis: str, label: str, points: Sequence[Point], runs: Sequence[str]) -> str:
    def name(point: Point) -> str:
        return point.name if len(runs) == 1 else f"{runs[point.run]} {point.name}"

    def words(point: Point) -> str:
        interval = "" if point.interval is None else " [{:.4g}, {:.4g}]".format(*point.interval)
        return f"{name(point)} {point.quality:.4g}{interval} at {point.cost:.3g}"

    if not points:
        return f"{title}: {axis} is undefined for every model, so there is nothing to draw."
    best = ", ".join(name(point) for point in points if point.is_best)
    shown = "; ".join(map(words, points))
    return f"{title}. {axis} [95 % interval] at {label}: {shown}. Filled dots, which no other beats in both: {best}."
