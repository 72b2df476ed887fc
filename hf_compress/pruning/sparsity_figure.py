"""A figure of how sparse each layer is, and how much its outputs changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_compress.pruning.figure import BEFORE, LINE, MARGIN, PANEL_WIDTH, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and vermilion of Okabe and Ito, which are told apart with every kind of colour vision.
TITLES = {"sparsity": "Weights that are 0", "output_error": "Relative output error"}
COLOURS = {"sparsity": "#0072B2", "output_error": "#D55E00"}
# Inches.
ROW_HEIGHT, LABEL_WIDTH = 0.18, 0.075


def draw_sparsity(found: Mapping[str, Mapping[str, float]], path: str | Path, title: str | None = None) -> Path:
    """Draws the sparsity of each layer, and beside it the relative error of its outputs, and saves the figure.

    Args:
        found (`Mapping[str, Mapping[str, float]]`): By layer, as `measure_sparsity` returns it.
        path (`str` or `Path`): File to write; its ending says the format, PNG without one. Folders are made.
        title (`str`, *optional*): Above the figure.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if there is no layer.
    """
    from matplotlib.figure import Figure

    if not found:
        raise ValueError("found has no layers to draw: give what measure_sparsity returns.")
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    kinds = [kind for kind in TITLES if all(kind in values for values in found.values())]
    labels = short_names(list(found))
    width = PANEL_WIDTH * len(kinds) + LABEL_WIDTH * max(map(len, labels))
    # Not of pyplot, which would keep the figure and choose a window system.
    figure = Figure(figsize=(width, MARGIN + ROW_HEIGHT * len(found)), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        _draw_panel(panel, kind, [values[kind] for values in found.values()])
    _label_layers(panels[0], labels)
    if title is not None:
        figure.suptitle(title, color=TEXT, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts at the front that all of them share.

    Args:
        names (`Sequence[str]`): At least one.

    Returns:
        `list[str]`: In the same order, none of them empty.
    """
    split = [name.split(".") for name in names]
    n_shared = 0
    while all(len(parts) > n_shared + 1 and parts[n_shared] == split[0][n_shared] for parts in split):
        n_shared += 1
    return [".".join(parts[n_shared:]) for parts in split]


def _draw_panel(panel: "Axes", kind: str, values: list[float]) -> None:
    places = range(len(values))
    is_share = kind == "sparsity"
    # Shares are read against the whole, errors against the largest of them.
    widest = 1.0 if is_share else max(*values, 1e-9)
    if is_share:
        panel.barh(places, 1.0, height=0.72, color=BEFORE)
    panel.barh(places, values, height=0.72, color=COLOURS[kind])
    texts = [f"{100 * value:.1f} %" if is_share else f"{value:.3f}" for value in (*values, sum(values) / len(values))]
    for place, text in zip(places, texts, strict=False):
        panel.text(widest * 1.02, place, text, va="center", fontsize=7, color=TEXT)
    panel.set_title(f"{TITLES[kind]}\n{texts[-1]} in the mean of layers", fontsize=10, color=TEXT, loc="left")
    panel.set_ylim(len(values) - 0.5, -0.5)
    panel.set_xlim(0, widest * 1.15)
    panel.set_xticks([tick for tick in panel.get_xticks() if tick <= widest])
    panel.tick_params(labelsize=8, labelcolor=TEXT, color=LINE, left=False)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set(color=LINE, bounds=(0, widest))


def _label_layers(panel: "Axes", labels: Sequence[str]) -> None:
    panel.set_yticks(range(len(labels)), labels, fontsize=7)
