"""The command line: help that can be read, errors of one paragraph, and the main job from words to table."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compress
from hf_compress.cli.main import DISTILL_DEFAULTS, main
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.jobs.job import DistillJob
from hf_compress.jobs.lock import LOCK_FILE
from tests.tiny_job import files_of, make_inputs, quality, students

ROOT = Path(__file__).parent.parent.parent


pytestmark = pytest.mark.usefixtures("quiet_surroundings")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def distilled(words: list[str]) -> dict:
    """The report of `hf-compress distill`."""
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *words])
    assert not stopped.value.code
    return json.loads((Path(words[words.index("--output-dir") + 1]) / "report.json").read_text())


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the command line; returns its exit code, and what it wrote to stdout and stderr."""

    def run(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


def job_words(inputs, output, *more):
    words = f"""--model {inputs / "model"} --dataset {inputs / "data"} --student-layers 1 --max-length 16
        --output-dir {output} --num-train-epochs 2 --per-device-train-batch-size 8 --learning-rate 1e-2
        --save-steps 2 --use-cpu --disable-tqdm true"""
    return [*words.split(), *more]


# Help


def test_help_names_the_commands(call):
    code, out, _ = call("--help")
    assert code == 0
    assert {"demo", "distill", "prune", "quantize", "--version", "--debug"} <= set(re.findall(r"[\w-]+", out))


def test_version(call):
    assert call("--version") == (0, f"hf_compress {hf_compress.__version__}\n", "")


def test_help_of_distill(call):
    code, out, _ = call("distill", "--help")
    assert code == 0
    assert "--output-dir FOLDER [options]" in out
    shown = set(re.findall(r"--[\w-]+", out))
    job = {f"--{name.replace('_', '-')}" for name in DistillJob.__dataclass_fields__}
    assert job | {"--learning-rate", "--num-train-epochs", "--alpha", "--temperature", "--seed", "--bf16"} <= shown
    assert "--adam-beta1" not in shown
    assert len(re.findall("required", out)) == 4
    for name in ("learning_rate", "per_device_train_batch_size"):
        assert re.search(rf"--{name.replace('_', '-')} +│ +{DISTILL_DEFAULTS[name]} ", out)


def test_help_of_everything(call):
    _, out, _ = call("distill", "--help-all")
    shown = set(re.findall(r"--[\w-]+", out))
    arguments = {name for name, field in DistillationArguments.__dataclass_fields__.items() if field.init}
    assert {f"--{name.replace('_', '-')}" for name in arguments - {"debug"}} <= shown


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: --model, --dataset, --student_layers/--student-layers"),
        ("--model m --dataset d --student-layers 1", "required: --output_dir/--output-dir"),
        ("--modle m", r"--modle is no option \(did you mean --model\?\)"),
        ("--model m --dataset d --student-layers 1 --output-dir o --student 2", "--student is no option"),
        ("--model m n --dataset d --student-layers 1 --output-dir o", "n is no option"),
        ("--model m --dataset d --student-layers one --output-dir o", "invalid int value: 'one'"),
        ("--model m --dataset d --student-layers 1 --output-dir o --bf16 perhaps", "got perhaps but expected"),
        ("--model m --dataset d --student-layers 1 --output-dir o --alpha 2", "alpha=2.0 must lie in"),
        ("--model m --dataset no.csv --student-layers 1 --output-dir o", "There is no file or folder no.csv"),
        ("--model m --dataset d --student-layers 2 --layers 1 --output-dir o", r"layers=\[1\] names 1 layers"),
    ],
)
def test_errors_are_one_paragraph(call, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("distill", *words.split())
    assert code == 1
    assert out == ""
    assert re.fullmatch(rf"Error: .*{message}.*\n", err), err
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_brackets_of_an_error_are_shown(call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *words: None)
    code, _, err = call("demo")
    assert code == 1
    assert 'pip install "hf_compress[demo]"' in err


@pytest.mark.parametrize("words", [("--debug", "distill", "--modle", "m"), ("distill", "--modle", "m", "--debug")])
def test_traceback_only_with_debug(words):
    with pytest.raises(ValueError, match="--modle is no option"):
        main(list(words))


@pytest.mark.parametrize("words", [("nonsense",), ("demo", "--nonsense")])
def test_unknown_commands_and_options(call, words):
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert "No such" in err


# The job


def test_distill_from_words_to_table(inputs, tmp_path, capsys):
    report = distilled(job_words(inputs, tmp_path / "run", "--bf16", "false", "--baseline", "--temperature", "3"))
    shown = capsys.readouterr().out
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training"]["temperature"] == 3
    assert report["training"]["bf16"] is False
    assert report["job"]["baseline"] is True
    for name in ("teacher", "student", "student-alone"):
        assert re.search(rf"^ *{name} ", shown, re.MULTILINE)
    assert f"{100 * quality(report)[1]['compressed']:.1f} %" in shown
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    for name in ("warmup_steps", "weight_decay", "train_sampling_strategy", "per_device_eval_batch_size"):
        assert settings[name] == DISTILL_DEFAULTS[name]


def test_training_shows_its_bar(inputs, tmp_path, call):
    words = job_words(inputs, tmp_path / "run", "--max-steps", "3")
    _, _, err = call("distill", *words[: words.index("--disable-tqdm")], "--max-steps", "3")
    assert re.search(r"100%.*3/3", err)


def start(script, folder, *words):
    """Runs a program of this folder to its end."""
    return subprocess.run(
        [sys.executable, ROOT / "tests" / script, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_killed_process_is_continued(inputs, tmp_path):
    words = job_words(inputs, tmp_path / "killed")
    killed = start("killed_run.py", tmp_path, "5", "distill", *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {LOCK_FILE, "run.json", "student.training", "teacher-cache"}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == left
    continued = distilled(words)
    unbroken = distilled(job_words(inputs, tmp_path / "unbroken"))
    assert quality(continued) == quality(unbroken)
    assert students(tmp_path / "killed") == students(tmp_path / "unbroken")
    assert set(files_of(tmp_path / "killed")) == set(files_of(tmp_path / "unbroken"))


def test_two_processes_write_and_show_one_result(inputs, tmp_path):
    done = start("two_process_job.py", tmp_path, *job_words(inputs, tmp_path / "run", "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "report.json", "report.md", "student"}
    assert len(re.findall(r"^ *student ", done.stdout, re.MULTILINE)) == 1
    assert done.stderr.count("Measuring the saved models") == 1
    assert json.loads((tmp_path / "run" / "report.json").read_text())["rows_measured_on"] == 16
