"""The figure shows every layer with its numbers, and the error only where there is one."""

import pytest
from matplotlib.figure import Figure

from hf_compress.pruning.sparsity_figure import draw_sparsity, short_names


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that are saved during a test."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def values(n_layers: int, **more: float) -> dict[str, dict[str, float]]:
    return {f"model.layer.{index}.query": {"sparsity": index / n_layers, **more} for index in range(n_layers)}


@pytest.mark.parametrize("n_layers", [1, 36])
def test_every_layer_has_its_numbers(tmp_path, saved, n_layers):
    found = values(n_layers, output_error=0.25)
    path = draw_sparsity(found, tmp_path / "new" / "sparsity", title="A model")
    assert path.read_bytes().startswith(b"\x89PNG")
    shares, errors = saved[0].get_axes()
    assert [text.get_text() for text in shares.texts] == [f"{100 * i / n_layers:.1f} %" for i in range(n_layers)]
    assert [text.get_text() for text in errors.texts] == ["0.250"] * n_layers
    assert [label.get_text() for label in shares.get_yticklabels()] == short_names(list(found))
    assert saved[0].get_suptitle() == "A model"


def test_without_a_reference_there_is_one_panel(tmp_path, saved):
    draw_sparsity(values(3), tmp_path / "sparsity.svg")
    assert len(saved[0].get_axes()) == 1
    with pytest.raises(ValueError, match="no layers to draw"):
        draw_sparsity({}, tmp_path / "sparsity.png")


def test_names_lose_what_all_share():
    assert short_names(["a.b.0.c", "a.b.1.c"]) == ["0.c", "1.c"]
    assert short_names(["a.b"]) == ["b"]
    assert short_names(["a", "a.b"]) == ["a", "a.b"]
