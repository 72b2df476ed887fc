"""The figure is written in the format that its name asks for, shows every layer, and refuses what does not fit."""

import pytest
from matplotlib.figure import Figure

from hf_compress.checkpoint.widths import read_widths
from hf_compress.pruning.figure import draw_widths
from tests.modeling.tiny import tiny_model


def widths(n_layers: int, stack: str = "encoder", **parts: int) -> dict[str, dict[str, int]]:
    return {f"{stack}.{index}": dict(parts) for index in range(n_layers)}


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that are saved during a test."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(panel) -> list[str]:
    return [text.get_text() for text in panel.texts if text.get_text()]


@pytest.mark.parametrize("n_layers", [6, 28])
def test_every_layer_has_its_number(tmp_path, saved, n_layers):
    before = widths(n_layers, self=12, ffn=1536)
    after = {name: {"self": index % 12 + 1, "ffn": 32 * index + 16} for index, name in enumerate(before)}
    path = draw_widths(before, after, tmp_path / "new" / "widths.png", title="A model")
    assert path.read_bytes().startswith(b"\x89PNG")
    heads, neurons = saved[0].get_axes()
    assert texts(heads) == [str(parts["self"]) for parts in after.values()]
    assert texts(neurons) == [str(parts["ffn"]) for parts in after.values()]
    assert [bar.get_width() for bar in heads.patches[:n_layers]] == [12] * n_layers
    assert saved[0].get_suptitle() == "A model"


def test_what_was_removed_is_marked(tmp_path, saved):
    before = widths(4, self=12, ffn=1536)
    after = {"encoder.0": {"self": 0, "ffn": 16}, "encoder.1": {"self": 3}, "encoder.3": {"self": 12, "ffn": 1536}}
    draw_widths(before, after, tmp_path / "widths.png")
    heads, neurons = saved[0].get_axes()
    assert texts(heads) == ["removed", "0", "3", "removed", "0", "12"]
    assert texts(neurons) == ["16", "removed", "0", "removed", "0", "1536"]


def test_an_encoder_decoder_has_a_row_per_stack(tmp_path, saved):
    before = read_widths(tiny_model("bart"))
    draw_widths(before, before, tmp_path / "widths.png")
    rows = [len(row.axes) for row in saved[0].subfigs]
    assert rows == [2, 3]
    titles = [panel.get_title(loc="left").splitlines()[0] for panel in saved[0].get_axes()]
    assert titles[0] == "Self-attention heads of the encoder"
    assert titles[3] == "Cross-attention heads of the decoder"


def test_uneven_layers_name_their_whole_width(tmp_path, saved):
    before = widths(2, self=4, ffn=64) | {"encoder.2": {"self": 0, "ffn": 48}}
    draw_widths(before, before, tmp_path / "widths.png")
    heads, neurons = saved[0].get_axes()
    assert texts(heads) == ["4 / 4", "4 / 4"]
    assert texts(neurons) == ["64 / 64", "64 / 64", "48 / 48"]


@pytest.mark.parametrize(
    ("name", "start"), [("widths.svg", b"<?xml"), ("widths.pdf", b"%PDF"), ("widths", b"\x89PNG")]
)
def test_the_ending_says_the_format(tmp_path, name, start):
    path = draw_widths(widths(2, self=4, ffn=64), widths(2, self=2, ffn=32), str(tmp_path / name))
    assert path.read_bytes().startswith(start)
    assert path.name == (name if "." in name else "widths.png")


@pytest.mark.parametrize(
    "after",
    [
        widths(3, self=4, ffn=64),
        widths(2, self=5, ffn=64),
        widths(2, self=-1, ffn=64),
        widths(2, self=4, cross=4, ffn=64),
        widths(2, "decoder", self=4, ffn=64),
    ],
)
def test_refuses_widths_of_another_model(tmp_path, after):
    with pytest.raises(ValueError, match="not part of before"):
        draw_widths(widths(2, self=4, ffn=64), after, tmp_path / "widths.png")
    with pytest.raises(ValueError, match="no widths to draw"):
        draw_widths({}, {}, tmp_path / "widths.png")
    assert not list(tmp_path.iterdir())
