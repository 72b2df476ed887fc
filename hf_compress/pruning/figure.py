"""A figure of what was kept of each layer."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_compress.checkpoint.config import FFN_WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Widths = Mapping[str, Mapping[str, int]]

PARTS = {"self": "Self-attention heads", "cross": "Cross-attention heads", FFN_WIDTH: "Feed-forward neurons"}
# Blue and orange of Okabe and Ito, which are told apart with every kind of colour vision.
COLOURS = {"self": "#0072B2", "cross": "#56B4E9", FFN_WIDTH: "#E69F00"}
BEFORE, LINE, TEXT = "#E4E4E4", "#999999", "#333333"
LABEL = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
# Inches.
PANEL_WIDTH, ROW_HEIGHT, MARGIN = 4.2, 0.26, 1.0


def draw_widths(before: Widths, after: Widths, path: str | Path, title: str | None = None) -> Path:
    """Draws how many heads and neurons each layer kept, and saves the figure.

    Args:
        before (`Mapping[str, Mapping[str, int]]`): Widths by block and part, as `read_widths` returns them. Heads
            that share their keys and values count as one.
        after (`Mapping[str, Mapping[str, int]]`): The same of the smaller model. A part that is 0 or absent was
            removed, and so was a block that is absent: where layers went, name those that stay as in `before`.
        path (`str` or `Path`): File to write; its ending says the format, PNG without one. Folders are made.
        title (`str`, *optional*): Above the figure.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if `before` is empty, or `after` has blocks, parts or widths that `before` has not.
    """
    from matplotlib.figure import Figure

    _check_widths(before, after)
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    stacks = _by_stack(before)
    n_panels = max(len(_parts_of(blocks)) for blocks in stacks.values())
    heights = [MARGIN + ROW_HEIGHT * len(blocks) for blocks in stacks.values()]
    # Not of pyplot, which would keep the figure and choose a window system.
    figure = Figure(figsize=(PANEL_WIDTH * n_panels, sum(heights) + 0.5), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(stacks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (stack, blocks) in zip(rows, stacks.items(), strict=True):
        _draw_stack(row, stack if len(stacks) > 1 else None, blocks, after)
    if title is not None:
        figure.suptitle(title, color=TEXT, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_stack(row: "SubFigure", stack: str | None, blocks: Widths, after: Widths) -> None:
    parts = _parts_of(blocks)
    panels = row.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for panel, part in zip(panels, parts, strict=True):
        full = [widths.get(part, 0) for widths in blocks.values()]
        kept = [after.get(name, {}).get(part, 0) for name in blocks]
        _draw_part(panel, part, full, kept)
        where = f" of the {stack}" if stack else ""
        share = f"{sum(kept):,} of {sum(full):,} kept ({100 * sum(kept) / sum(full):.0f} %)"
        panel.set_title(f"{PARTS[part]}{where}\n{share}", fontsize=10, color=TEXT, loc="left")
    panels[0].set_ylabel("Layer", color=TEXT)


def _draw_part(panel: "Axes", part: str, full: list[int], kept: list[int]) -> None:
    places = range(len(full))
    panel.barh(places, full, height=0.72, color=BEFORE)
    panel.barh(places, kept, height=0.72, color=COLOURS[part])
    widest = max(full)
    is_even = len(set(full)) == 1
    for place, n_full, n_kept in zip(places, full, kept, strict=True):
        if n_full and not n_kept:
            panel.barh(place, n_full, height=0.72, fill=False, edgecolor=LINE, hatch="////", linewidth=0)
            panel.text(widest * 0.02, place, "removed", va="center", fontsize=8, color=TEXT, bbox=LABEL)
        number = f"{n_kept}" if is_even else f"{n_kept} / {n_full}"
        panel.text(widest * 1.02, place, number if n_full else "", va="center", fontsize=8, color=TEXT)
    panel.set_yticks(places)
    panel.set_ylim(len(full) - 0.5, -0.5)
    panel.set_xlim(0, widest * (1.12 if is_even else 1.25))
    panel.set_xticks([0, widest] if widest % 2 else [0, widest // 2, widest])
    panel.tick_params(labelsize=8, labelcolor=TEXT, color=LINE, left=False)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set(color=LINE, bounds=(0, widest))


def _by_stack(widths: Widths) -> dict[str, dict[str, Mapping[str, int]]]:
    stacks: dict[str, dict[str, Mapping[str, int]]] = defaultdict(dict)
    for name, parts in widths.items():
        stacks[name.split(".")[0]][name] = parts
    return stacks


def _parts_of(blocks: Widths) -> list[str]:
    """The parts that some block of a stack has, in the order in which they are drawn."""
    return [part for part in PARTS if any(widths.get(part) for widths in blocks.values())]


def _check_widths(before: Widths, after: Widths) -> None:
    if not any(_parts_of({name: widths}) for name, widths in before.items()):
        raise ValueError(f"before={dict(before)} has no widths to draw: give what read_widths returns.")
    wrong = {
        f"{name}.{part}": width
        for name, widths in after.items()
        for part, width in widths.items()
        if not 0 <= width <= before.get(name, {}).get(part, -1)
    }
    if wrong:
        raise ValueError(
            f"after has the widths {wrong}, which are not part of before, {dict(before)}: give the widths of one "
            "model before and after it was cut, with the blocks named as before."
        )
