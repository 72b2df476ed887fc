"""Every script runs, from its command line to its result, and its help can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from hf_compress.modeling.blocks import count_layers
from tests.tiny_job import make_inputs

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(script: str, folder: Path, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *(str(word) for word in words)],
        env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distil_bert(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    output = tmp_path / "run"
    words = ("--model", inputs / "model", "--dataset", inputs / "data", "--student-layers", 2, "--output-dir", output)
    shown = run("distil_bert.py", tmp_path, *words, "--use-cpu", "--max-length", 16, "--max-steps", 2)
    assert "retention" in shown
    assert json.loads((output / "report.json").read_text())["training"]["alpha"] == 0.9
    assert count_layers(AutoModelForSequenceClassification.from_pretrained(output / "student")) == 2


def test_prune_bert(tmp_path):
    inputs = make_inputs(tmp_path / "inputs", model={"intermediate_size": 64})
    output = tmp_path / "run"
    words = ("--model", inputs / "model", "--dataset", inputs / "data", "--budget", 0.5, "--output-dir", output)
    shown = run("prune_bert.py", tmp_path, *words, "--use-cpu", "--max-length", 16, "--score", "activation")
    assert "retention" in shown
    assert json.loads((output / "report.json").read_text())["pruning"]["score"] == "activation"
    assert (output / "widths.png").exists()


def test_sparsify_bert(tmp_path):
    inputs = make_inputs(tmp_path / "inputs", model={"intermediate_size": 64})
    output = tmp_path / "run"
    words = ("--model", inputs / "model", "--dataset", inputs / "data", "--sparsity", 0.75, "--output-dir", output)
    shown = run("sparsify_bert.py", tmp_path, *words, "--use-cpu", "--max-length", 16, "--score", "wanda")
    assert " 75.0 % " in shown
    assert json.loads((output / "report.json").read_text())["pruning"]["score"] == "wanda"
    assert (output / "sparsity.png").exists()


@pytest.mark.parametrize("number_format", ["int8", "nf4"])
def test_quantize_bert(number_format, tmp_path):
    inputs = make_inputs(tmp_path / "inputs", model={"hidden_size": 64, "intermediate_size": 128})
    output = tmp_path / "quantized"
    words = ("--model", inputs / "model", "--dataset", inputs / "data", "--format", number_format)
    shown = run("quantize_bert.py", tmp_path, *words, "--max-length", 16, "--output-dir", output)
    assert "accuracy" in shown
    assert number_format in shown
    assert json.loads((output / "report.json").read_text())["models"][1]["name"] == number_format
    assert AutoModelForSequenceClassification.from_pretrained(output / number_format).is_quantized


def test_help_of_pruning(tmp_path):
    shown = run("sparsify_bert.py", tmp_path, "--help")
    for option in ("--budget ", "--budgets", "--text-columns", "--units", "--n-texts", "--sparsities", "--pattern"):
        assert option in shown


def test_help_of_distil_bert(tmp_path):
    shown = run("distil_bert.py", tmp_path, "--help")
    for option in ("--student-layers", "--text-columns", "--temperature", "--learning-rate", "--help-all"):
        assert option in shown
