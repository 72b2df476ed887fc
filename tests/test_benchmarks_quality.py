"""The benchmark of distillation: what students choose on held-out rows, and what a share of a gap is."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return {name: importlib.import_module(f"quality_{name}") for name in ("cells", "tasks", "report")}


def plan(bench, **changes):
    return bench["tasks"].Plan(1e-4, 1, 8, rows=100, epochs=6, batch=8, plain=(1e-4, 3e-4), **changes)


def scores_from(table):
    """Held-out figures by depth, rate and epochs, and a list of what was asked for."""
    asked = []

    def score(depth, trial):
        asked.append((depth, *trial))
        return table.get((depth, *trial))

    return score, asked


def test_two_layers_take_over_the_rate_of_three(bench):
    score, asked = scores_from({(3, 1e-4, 6): 0.5, (3, 3e-4, 6): 0.6, (2, 1e-4, 6): 0.9})
    assert bench["cells"].choose(plan(bench), "plain", 2, score) == (3e-4, 6)
    assert {depth for depth, *_ in asked} == {3}


@pytest.mark.parametrize("depth", [3, 2])
def test_where_epochs_are_chosen_each_depth_searches_all(bench, depth):
    table = {(d, rate, epochs): 0.5 for d in (2, 3) for rate in (1e-4, 3e-4) for epochs in (2, 6)}
    score, _ = scores_from(table | {(3, 3e-4, 2): 0.6, (2, 1e-4, 6): 0.6})
    best = bench["cells"].choose(plan(bench, fewer_epochs=2), "plain", depth, score)
    assert best == {3: (3e-4, 2), 2: (1e-4, 6)}[depth]


@pytest.mark.parametrize(("kind", "epochs"), [("distilled", {6}), ("noisy", {6}), ("on_general", {2})])
def test_kinds_without_a_choice_of_epochs(bench, kind, epochs):
    score, asked = scores_from({})
    assert bench["cells"].choose(plan(bench, fewer_epochs=2), kind, 3, score) is None
    assert {number for *_, number in asked} == epochs


def test_one_missing_trial_leaves_the_choice_open(bench):
    score, _ = scores_from({(3, 1e-4, 6): 0.5})
    assert bench["cells"].choose(plan(bench), "plain", 3, score) is None


def test_cells_of_other_budgets_have_other_names(bench):
    names = {
        bench["cells"].student_name(plan(bench, fewer_epochs=2), "plain", 3, bench["cells"].Trial(1e-4, epochs), 0)
        for epochs in (2, 6)
    }
    assert len(names) == 2


def test_a_cell_made_with_other_settings_is_refused(bench, tmp_path):
    bench["cells"].write(tmp_path / "cell.json", {"settings": {"epochs": 2}, "test": 0.5})
    assert bench["cells"].read(tmp_path / "cell.json", {"epochs": 2})["test"] == 0.5
    with pytest.raises(SystemExit, match="move it away"):
        bench["cells"].read(tmp_path / "cell.json", {"epochs": 6})


def test_the_share_of_the_gap_closed(bench):
    cell = bench["report"].compare(0.9, {"plain": [0.7, 0.8], "distilled": [0.85, 0.85], "textbrewer": [0.7, 0.7]})
    assert cell["distilled"]["gap_closed"] == pytest.approx(2 / 3)
    assert not cell["distilled"]["is_worse"]
    assert cell["textbrewer"]["gap_closed"] == pytest.approx(-1 / 3)
    assert cell["textbrewer"]["is_worse"]
    narrow = bench["report"].compare(0.9, {"plain": [0.89], "distilled": [0.9]})
    assert narrow["distilled"]["gap_closed"] is None
