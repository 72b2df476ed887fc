"""A run's folder is never taken from others, and a stopped training ends where an unbroken one does."""

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_compress.jobs.data import tokenize
from hf_compress.jobs.stages import last_checkpoint, open_run, train_once
from tests.tiny_job import files_of, save_tiny_bert, tiny_arguments, tiny_texts, tiny_tokenizer

SETTINGS = {"model": "bert", "layers": [1, 3], "alpha": 0.9, "seed": None}
STAGES = ("teacher", "student")


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize("exists", [False, True])
def test_new_and_empty_folders_are_taken(tmp_path, exists):
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    open_run(folder, SETTINGS, overwrite=False, stages=STAGES)
    assert list(files_of(folder)) == ["run.json"]
    assert json.loads((folder / "run.json").read_text())["settings"] == SETTINGS


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"notes__txt": "mine"},
        {"run__json": "{}"},
        {"run__json": "no json"},
        {"run__json": '{"settings": {}}', "report__json": "{}", "student": "mine"},
    ],
)
def test_files_of_others_are_refused_and_untouched(tmp_path, overwrite, files):
    write(tmp_path, **files)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="not of a run of hf-compress.*nothing deleted: give a new"):
        open_run(tmp_path, SETTINGS, overwrite, STAGES)
    assert files_of(tmp_path) == before


def test_file_in_place_of_the_folder(tmp_path):
    write(tmp_path, out="mine")
    with pytest.raises(ValueError, match="out is a file"):
        open_run(tmp_path / "out", SETTINGS, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_unfinished_run_is_continued(tmp_path):
    open_run(tmp_path, SETTINGS, overwrite=False, stages=STAGES)
    write(tmp_path / "student.training", weights="half")
    before = files_of(tmp_path)
    open_run(tmp_path, SETTINGS, overwrite=False, stages=STAGES)
    assert files_of(tmp_path) == before


def test_another_version_continues_and_says_so(tmp_path, monkeypatch, caplog):
    open_run(tmp_path, SETTINGS, overwrite=False)
    open_run(tmp_path, SETTINGS, overwrite=False)
    assert not caplog.records
    monkeypatch.setattr("hf_compress.__version__", "9.9")
    open_run(tmp_path, SETTINGS, overwrite=False)
    assert "and this is 9.9: what is done stays as it is" in caplog.text


def test_folder_that_was_opened_halfway_is_taken(tmp_path):
    write(tmp_path, run__json__partial='{"half')
    open_run(tmp_path, SETTINGS, overwrite=False)
    assert list(files_of(tmp_path)) == ["run.json"]


def test_other_settings_are_refused_with_both_values(tmp_path):
    open_run(tmp_path, SETTINGS, overwrite=False)
    before = files_of(tmp_path)
    message = r"\(alpha was 0\.9 and is 0\.5, new was None and is 1\)\. Repeat the former command.*--overwrite"
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path, {**SETTINGS, "alpha": 0.5, "new": 1}, overwrite=False)
    assert files_of(tmp_path) == before


def test_finished_run_is_refused_unless_overwritten(tmp_path):
    open_run(tmp_path, SETTINGS, overwrite=False, stages=STAGES)
    write(tmp_path, report__json="{}", report__md="table", notes__txt="mine")
    write(tmp_path / "student", weights="whole")
    write(tmp_path / "teacher.training", weights="half")
    write(tmp_path / "better-student", weights="mine")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="holds a finished run.*report.json.*--overwrite"):
        open_run(tmp_path, SETTINGS, overwrite=False, stages=STAGES)
    assert files_of(tmp_path) == before
    open_run(tmp_path, {**SETTINGS, "alpha": 0.5}, overwrite=True, stages=STAGES)
    assert sorted(files_of(tmp_path)) == ["better-student/weights", "notes.txt", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["alpha"] == 0.5


def test_overwriting_deletes_what_the_former_run_made(tmp_path):
    open_run(tmp_path, SETTINGS, overwrite=False, stages=("pruned-0.5", "widths-0.5.png", "..", ""))
    write(tmp_path, **{"widths-0__5__png": "figure", "notes__txt": "mine"})
    write(tmp_path / "pruned-0.5", weights="whole")
    open_run(tmp_path, SETTINGS, overwrite=True, stages=STAGES)
    assert sorted(files_of(tmp_path)) == ["notes.txt", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["stages"] == list(STAGES)


def test_last_checkpoint_was_written_to_its_end(tmp_path):
    assert last_checkpoint(tmp_path / "missing") is None
    write(tmp_path / "checkpoint-9", trainer_state__json='{"global_step": 9}')
    write(tmp_path / "checkpoint-10", trainer_state__json='{"global_step": 10}')
    write(tmp_path / "checkpoint-11", model__safetensors="half")
    # What a full disk leaves.
    write(tmp_path / "checkpoint-12", trainer_state__json="")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# Training


class Stop(TrainerCallback):
    """Stops a training as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("source"))


@pytest.fixture
def maker(source):
    """Builds `make_trainer` for `train_once`; notes the folders it was called with."""
    rows = tiny_texts(24)
    data = tokenize(Dataset.from_list(rows), tiny_tokenizer(), ["text"], [row["label"] for row in rows], 16)

    def build(stop=None, calls=None, order="group_by_length"):
        def make_trainer(work):
            if calls is not None:
                calls.append(work)
            return Trainer(
                AutoModelForSequenceClassification.from_pretrained(source),
                tiny_arguments(work, train_sampling_strategy=order),
                train_dataset=data,
                processing_class=tiny_tokenizer(),
                callbacks=[Stop(stop)] if stop is not None else None,
            )

        return make_trainer

    return build


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return tmp_path_factory.mktemp("unbroken") / "model"


@pytest.fixture
def expected(unbroken, maker):
    """The files of a training that nothing stopped."""
    train_once(unbroken, maker())
    return files_of(unbroken)


def test_result_is_a_plain_checkpoint(expected, unbroken, source):
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(expected)
    assert {name.rsplit(".", 1)[-1] for name in expected} <= {"safetensors", "json", "txt"}
    assert expected["model.safetensors"] != files_of(source)["model.safetensors"]
    assert [path.name for path in unbroken.parent.iterdir()] == ["model"]


def test_finished_stage_is_not_trained_again(expected, unbroken, maker):
    calls = []
    (unbroken.parent / "model.training").mkdir()
    assert not train_once(unbroken, maker(calls=calls))
    assert not calls
    assert files_of(unbroken) == expected
    assert [path.name for path in unbroken.parent.iterdir()] == ["model"]


# Before the first checkpoint, between two, after the last step.
@pytest.mark.parametrize("step", [1, 5, 6])
def test_stopped_training_ends_like_an_unbroken_one(tmp_path, expected, maker, step):
    folder = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        train_once(folder, maker(stop=step))
    assert not folder.exists()
    checkpoint = last_checkpoint(tmp_path / "model.training")
    assert (checkpoint.name if checkpoint else None) == {1: None, 5: "checkpoint-4", 6: "checkpoint-4"}[step]
    assert train_once(folder, maker())
    assert files_of(folder) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("order", ["random", "batch_rebalance"])
def test_every_order_of_rows_continues_exactly(tmp_path, maker, order):
    train_once(tmp_path / "unbroken", maker(order=order))
    with pytest.raises(KeyboardInterrupt):
        train_once(tmp_path / "stopped", maker(stop=5, order=order))
    train_once(tmp_path / "stopped", maker(order=order))
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "unbroken")


def test_checkpoint_that_was_cut_off_is_passed_over(tmp_path, expected, maker):
    folder = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        train_once(folder, maker(stop=5))
    write(tmp_path / "model.training" / "checkpoint-5", model__safetensors="half")
    assert train_once(folder, maker())
    assert files_of(folder) == expected


def test_model_appears_whole_or_not_at_all(tmp_path, expected, maker, monkeypatch):
    folder = tmp_path / "model"

    def cut_off(tokenizer, path, **options):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", cut_off)
        # Checkpoints hold the tokenizer too, and would fail first.
        patched.setattr("transformers.Trainer._save_checkpoint", lambda *args, **kwargs: None)
        with pytest.raises(OSError, match="disk is full"):
            train_once(folder, maker())
    assert (tmp_path / "model.partial" / "model.safetensors").exists()
    assert not folder.exists()
    assert train_once(folder, maker())
    assert files_of(folder) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
