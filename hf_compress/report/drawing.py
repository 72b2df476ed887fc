"""Drawing for a page: figures as SVG in the page's colours, each with its meaning in words."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Colours that stand for variables of the page, so that a figure is readable in the light and in the dark.
INK, FAINT, PAPER = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0a0a{number:02x}" for number in range(1, 9))
_VARIABLES = {INK: "--ink", FAINT: "--faint", PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate(SERIES, start=1)
}
# Inches. A telephone shows a figure of this width at about its size, so no text gets smaller than it is here.
WIDTH = 4.0
TEXT, SMALL = 9.5, 8.5  # points
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_compress",
    # Names are a user's, and a dollar sign in them is no formula.
    "text.parse_math": False,
    "font.size": TEXT,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.titlesize": TEXT,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    # One pixel is one point, as in SVG.
    "figure.dpi": 72,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "legend.labelcolor": INK,
}


class Figure(NamedTuple):
    """A figure of a page.

    Attributes:
        title (`str`): Above it.
        meaning (`str`): What it shows, in words and numbers, for those who do not see it.
        drawing (`str`): An `<svg>` element without names and texts for screen readers, which `svg` adds.
    """

    title: str
    meaning: str
    drawing: str

    def svg(self, mark: str) -> str:
        """The element to put into a page.

        Args:
            mark (`str`): Letters and digits that no other figure of the page has: figures name what they define
                alike, and on a page a name may occur once.
        """
        svg = re.sub(r'( id="|href="#)', rf"\1{mark}-", self.drawing)
        svg = svg.replace("url(#", f"url(#{mark}-")
        opening, rest = svg.split(">", 1)
        # Both, because what reads pages aloud does not always read descriptions.
        named = f'role="img" aria-labelledby="{mark}-title {mark}-desc"'
        title = f'<title id="{mark}-title">{escape(self.title)}</title>'
        return f'{opening} {named}>{title}<desc id="{mark}-desc">{escape(self.meaning)}</desc>{rest}'


def drawn(title: str, meaning: str, height: float, draw: Callable[["Canvas"], None]) -> Figure:
    """Draws a figure; the same figure is the same text.

    Args:
        title (`str`): Above it.
        meaning (`str`): What it shows, in words and numbers.
        height (`float`): In inches; the width is `WIDTH`.
        draw (`Callable[[matplotlib.figure.Figure], None]`): Draws it, in colours of this file.

    Returns:
        `Figure`: With its drawing.
    """
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    with style.context(["default", _STYLE]):
        # Not of pyplot, which would keep the figure and choose a window system.
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        draw(canvas)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return Figure(title, meaning, _embeddable(file.getvalue()))


def _embeddable(text: str) -> str:
    """The element alone, as wide as the page lets it, in the page's colours and letters."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    # In attributes alone: a name that looks like a colour stays.
    svg = re.sub(r"(?<=: )#\w{6}(?=[;\"])", lambda colour: f"var({_VARIABLES.get(colour[0], '--ink')})", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"<]*", "system-ui, sans-serif", svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height|xmlns:\w+)="[^"]*"', "", opening)
    return f'{opening} xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'.strip()
