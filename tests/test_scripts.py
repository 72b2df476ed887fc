"""Every script runs, from its command line to its result, and its help can be read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertModel

import hf_compress as hc
from hf_compress.modeling.blocks import count_layers
from tests.tiny_job import make_inputs, save_tiny_bert, tiny_texts, tiny_tokenizer, write_rows

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


TRAINING = ("--use_cpu", "--max_steps", 2, "--report_to", "none", "--disable_tqdm", "True")


def test_a_fine_tuning_script_with_a_teacher(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    write_rows(inputs / "data" / "validation.csv", tiny_texts(12, seed=3))
    output = tmp_path / "student"
    shown = run("trainer_with_teacher.py", tmp_path, inputs / "model", inputs / "data", output, *TRAINING)
    assert "eval_accuracy" in shown
    assert count_layers(AutoModelForSequenceClassification.from_pretrained(output)) == 1


def test_a_fine_tuning_script_that_prunes(tmp_path):
    inputs = make_inputs(tmp_path / "inputs", model={"intermediate_size": 64})
    write_rows(inputs / "data" / "validation.csv", tiny_texts(12, seed=3))
    output, words = tmp_path / "pruned", (*TRAINING[:2], 12, *TRAINING[3:])
    shown = run("finetune_with_pruning.py", tmp_path, inputs / "model", inputs / "data", output, 0.6, *words)
    before, after = (int(word) for word in re.findall(r"(\d+) parameters became (\d+)", shown)[0])
    assert after < before
    assert AutoModelForSequenceClassification.from_pretrained(output).num_parameters() == after


def test_adapters_on_a_pruned_4bit_model(tmp_path):
    inputs = make_inputs(tmp_path / "inputs", model={"hidden_size": 64, "intermediate_size": 128})
    write_rows(inputs / "data" / "validation.csv", tiny_texts(12, seed=3))
    output = tmp_path / "out"
    shown = run("adapters_on_pruned_4bit.py", tmp_path, inputs / "model", inputs / "data", output, 0.6, *TRAINING)
    assert "eval_loss" in shown
    assert (output / "adapters" / "adapter_model.safetensors").exists()
    assert AutoModelForSequenceClassification.from_pretrained(output / "base").is_quantized


def test_sentence_embeddings(tmp_path):
    model = save_tiny_bert(tmp_path / "model", BertModel)
    (tmp_path / "texts.txt").write_text("\n".join(row["text"] for row in tiny_texts(40)))
    shown = run("sentence_embeddings.py", tmp_path, model, tmp_path / "texts.txt", tmp_path / "student", 2, *TRAINING)
    assert re.search(r"of the embeddings of 4 new texts: 0\.\d{4}", shown)


def test_serving(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "model"))
    hc.quantize(model, hc.Int8DynamicConfig()).save_pretrained(tmp_path / "int8")
    tiny_tokenizer().save_pretrained(tmp_path / "int8")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "serve.py"), str(tmp_path / "int8")],
        # More words than the model has positions.
        input=f"a good film\n{'dull ' * 200}\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(answer) for answer in answers] == [["label", "score"]] * 2


def test_help_of_pruning(tmp_path):
    shown = run("sparsify_bert.py", tmp_path, "--help")
    for option in ("--budget ", "--budgets", "--text-columns", "--units", "--n-texts", "--sparsities", "--pattern"):
        assert option in shown


def test_help_of_distil_bert(tmp_path):
    shown = run("distil_bert.py", tmp_path, "--help")
    for option in ("--student-layers", "--text-columns", "--temperature", "--learning-rate", "--help-all"):
        assert option in shown
