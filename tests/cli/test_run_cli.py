"""`hf-compress run`: a recipe from the command line, to its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_compress.cli.main import main
from hf_compress.recipe.recipe import Recipe
from tests.tiny_recipe import left_behind, tiny_recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def recipe(tmp_path):
    """A recipe's file, without the model and the data, and the words that name them."""
    made = tiny_recipe(tmp_path)
    made.steps = [*made.steps[:3], made.steps[-1]]
    text = made.to_yaml()
    text = text.replace(f"model: {made.model}\n", "").replace(f"  dataset: {made.data.dataset}\n", "")
    (tmp_path / "recipe.yaml").write_text(text)
    return [str(tmp_path / "recipe.yaml"), "--model", made.model, "--dataset", made.data.dataset]


def run(*words):
    with pytest.raises(SystemExit) as exit_:
        main(["run", *map(str, words)])
    return exit_.value.code


def test_from_the_file_to_the_table_and_the_card(recipe, tmp_path, capsys):
    assert run(*recipe, "--output-dir", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    for name in ("01-finetune", "02-vocabulary", "03-prune", "04-quantize", "smaller on disk", "report.html"):
        assert name in shown
    assert "'loss'" not in shown
    card = (tmp_path / "out" / "04-quantize" / "README.md").read_text()
    assert "import hf_compress" in card
    assert str(tmp_path) not in card
    assert Recipe.from_yaml(tmp_path / "out" / "04-quantize" / "recipe.yaml", model="m", dataset="d").steps
    assert run(*recipe, "--output-dir", tmp_path / "out", "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out)["result"] == "04-quantize"


def test_a_gate_that_is_not_passed_is_an_exit_code(recipe, tmp_path):
    file = Path(recipe[0])
    file.write_text(file.read_text() + "  - evaluate:\n      min_retention: 5\n")
    assert run(*recipe, "--output-dir", tmp_path / "out") == 3
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stopped_by"]["step"] == "05-evaluate"


def test_a_dry_run_does_nothing(recipe, tmp_path, capsys):
    assert run(*recipe, "--output-dir", tmp_path / "out", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "to do" in shown
    assert "Nothing was done" in shown
    assert not (tmp_path / "out").exists()
    assert run(*recipe, "--output-dir", tmp_path / "out", "--dry-run", "--json") == 0
    out = capsys.readouterr().out
    rows = json.loads(out[out.index("[") :])
    assert [row["name"] for row in rows] == ["01-finetune", "02-vocabulary", "03-prune", "04-quantize"]
    assert rows[-1]["megabytes"] < rows[0]["megabytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output-dir", "out"], "There is no recipe: give it first, as in `hf-compress run recipe.yaml"),
        (["none.yaml", "--output-dir", "out"], "none.yaml"),
        (["{}", "--output-dir", "out", "--dry-rum"], "--dry-rum is no option"),
        (["{}", "--output-dir", "out"], "--model"),
    ],
)
def test_errors_are_one_paragraph(recipe, words, message, capsys):
    assert run(*(word.format(recipe[0]) for word in words)) == 1
    shown = capsys.readouterr().err
    assert message in " ".join(shown.split())
    assert "Traceback" not in shown


def start(*words, launcher=()):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "hf_compress.cli", "run", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_continued(recipe, tmp_path):
    killed = start(*recipe, "--output-dir", tmp_path / "killed")
    # Nothing is printed on the way, so the folder tells how far it is.
    while killed.poll() is None and not (tmp_path / "killed" / "02-vocabulary").exists():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode in (-signal.SIGKILL, 0)
    assert run(*recipe, "--output-dir", tmp_path / "killed") == 0
    assert run(*recipe, "--output-dir", tmp_path / "unbroken") == 0
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "unbroken")


@pytest.mark.slow
def test_two_processes_make_one_result(recipe, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731")
    done = start(*recipe, "--output-dir", tmp_path / "two", launcher=launcher)
    _, err = done.communicate()
    assert done.returncode == 0, err
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [step["name"] for step in report["steps"]] == ["01-finetune", "02-vocabulary", "03-prune", "04-quantize"]
