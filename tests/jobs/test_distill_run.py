"""The main job from end to end on a tiny BERT: figures are those of the files, and being stopped changes nothing."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, TrainerCallback

from hf_compress.jobs.distill import distill
from hf_compress.jobs.job import DistillJob, run_settings
from tests.tiny_job import (
    files_of,
    make_inputs,
    quality,
    students,
    tiny_arguments,
    tiny_job,
    tiny_texts,
    write_rows,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs):
    """A finished run with the student without a teacher, and its report."""
    report = distill(tiny_job(inputs, baseline=True), tiny_arguments(inputs / "run"))
    return inputs / "run", report


def predictions(folder, texts):
    """Logits of a saved model for each text alone, without any code of the library."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).numpy()


# The result


def test_files_of_a_run(run):
    folder, report = run
    assert {path.name for path in folder.iterdir()} == {
        "run.json",
        "report.json",
        "report.md",
        "student",
        "student-alone",
    }
    for student in ("student", "student-alone"):
        suffixes = {name.rsplit(".", 1)[-1] for name in files_of(folder / student)}
        assert suffixes <= {"json", "md", "safetensors", "txt"}
    assert json.loads((folder / "report.json").read_text()) == report


def test_figures_are_those_of_the_saved_models(run, inputs):
    folder, report = run
    rows = tiny_texts(16, seed=2)
    texts, labels = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    teacher_decisions = predictions(inputs / "model", texts).argmax(-1)
    places = (inputs / "model", folder / "student", folder / "student-alone")
    for place, model in zip(places, report["models"], strict=True):
        decisions = predictions(place, texts).argmax(-1)
        accuracy = float((decisions == labels).mean())
        assert model["quality"]["compressed"] == pytest.approx(accuracy, abs=1e-12)
        assert model["quality"]["teacher"] == pytest.approx(float((teacher_decisions == labels).mean()), abs=1e-12)
        assert model["quality"]["agreement"] == pytest.approx(float((decisions == teacher_decisions).mean()))
        assert model["quality"]["n_examples"] == len(rows)
        tensors = load_file(place / "model.safetensors")
        assert model["cost"]["parameters"]["total"] == sum(tensor.numel() for tensor in tensors.values())
        assert model["cost"]["bytes_on_disk"] == (place / "model.safetensors").stat().st_size
    assert [model["name"] for model in report["models"]] == ["teacher", "student", "student-alone"]
    assert report["models"][0]["quality"]["retention"] == 1
    assert (report["rows_trained_on"], report["rows_measured_on"]) == (24, 16)


def test_student_is_a_stock_checkpoint_that_has_learned(run, inputs):
    folder, _ = run
    teacher = AutoModelForSequenceClassification.from_pretrained(inputs / "model")
    student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert student.config.num_hidden_layers == 1
    assert student.config.id2label == teacher.config.id2label
    # Neither truncation nor padding of the run is left in it.
    assert files_of(folder / "student")["tokenizer.json"] == files_of(inputs / "model")["tokenizer.json"]
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)
    both = students(folder)
    assert both["student"]["model.safetensors"] != both["student-alone"]["model.safetensors"]


def test_baseline_is_the_student_of_alpha_0(run, inputs, tmp_path):
    folder, _ = run
    distill(tiny_job(inputs), tiny_arguments(tmp_path / "run", alpha=0.0))
    assert students(tmp_path / "run")["student"] == students(folder)["student-alone"]


def test_same_seed_same_result(run, inputs, tmp_path):
    folder, report = run
    again = distill(tiny_job(inputs, baseline=True), tiny_arguments(tmp_path / "run"))
    assert quality(again) == quality(report)
    assert students(tmp_path / "run") == students(folder)
    other = distill(tiny_job(inputs), tiny_arguments(tmp_path / "other", seed=1))
    assert other["models"][1]["quality"]["kl"] != report["models"][1]["quality"]["kl"]


def test_teacher_is_fine_tuned_from_a_headless_model(tmp_path):
    make_inputs(tmp_path, model={"model_class": BertModel}, label=lambda row: ("no", "yes")[row["label"]])
    job = tiny_job(tmp_path, teacher_epochs=4, teacher_learning_rate=5e-3, student_layers=2)
    report = distill(job, tiny_arguments(tmp_path / "run"))
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "teacher")
    assert teacher.config.label2id == {"no": 0, "yes": 1}
    rows = tiny_texts(16, seed=2)
    decisions = predictions(tmp_path / "run" / "teacher", [row["text"] for row in rows]).argmax(-1)
    accuracy = float(np.mean(decisions == [row["label"] for row in rows]))
    assert quality(report)[0]["compressed"] == pytest.approx(accuracy, abs=1e-12)


def test_teacher_epochs_are_not_the_students_steps(tmp_path, inputs):
    distill(tiny_job(inputs, teacher_epochs=1), tiny_arguments(tmp_path / "run", max_steps=1))
    before = load_file(inputs / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "teacher" / "model.safetensors")
    # Adam's first steps are as long as its learning rates: three of them leave the reach of one.
    moved = max((before[name] - after[name]).abs().max().item() for name in before)
    assert moved > 1.5 * tiny_job(inputs).teacher_learning_rate


def test_head_for_other_classes_is_replaced(tmp_path):
    make_inputs(tmp_path, model={"num_labels": 3, "problem_type": "multi_label_classification"})
    distill(tiny_job(tmp_path, teacher_epochs=1), tiny_arguments(tmp_path / "run", max_steps=1))
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student").config.num_labels == 2


def test_half_precision_checkpoint_trains_in_float32(tmp_path):
    make_inputs(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    distill(tiny_job(tmp_path), tiny_arguments(tmp_path / "run", max_steps=1))
    student = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in student.values()} == {torch.float32}


def test_regression(tmp_path):
    make_inputs(tmp_path, model={"num_labels": 1}, label=lambda row: 0.5 + 2.0 * row["label"])
    report = distill(tiny_job(tmp_path), tiny_arguments(tmp_path / "run"))
    rows = tiny_texts(16, seed=2)
    scores = predictions(tmp_path / "run" / "student", [row["text"] for row in rows])[:, 0]
    expected = np.corrcoef(scores, [row["label"] for row in rows])[0, 1]
    assert report["metric"] == "pearsonr"
    assert quality(report)[1]["compressed"] == pytest.approx(expected, abs=1e-5)
    assert "%" not in (tmp_path / "run" / "report.md").read_text().split("| student |")[1].split("|")[0]


def test_pairs_and_data_in_memory(tmp_path, inputs):
    rows = [{"a": row["text"], "b": "a film", "target": row["label"]} for row in tiny_texts(16)]
    splits = DatasetDict({"train": Dataset.from_list(rows), "dev": Dataset.from_list(rows)})
    job = tiny_job(inputs, dataset="pairs", text_columns=["a", "b"], label_column="target")
    report = distill(job, tiny_arguments(tmp_path / "run", max_steps=1), splits=splits)
    assert report["rows_measured_on"] == 16


# Being stopped


class Stop(TrainerCallback):
    """Stops the second training of a run after its fifth step."""

    trainings = 0

    def on_train_begin(self, args, state, control, **kwargs):
        Stop.trainings += 1

    def on_step_end(self, args, state, control, **kwargs):
        if Stop.trainings == 2 and state.global_step == 5:
            raise KeyboardInterrupt


def test_run_stopped_in_its_second_training(run, inputs, tmp_path, monkeypatch):
    folder, report = run
    job, args = tiny_job(inputs, baseline=True), tiny_arguments(tmp_path / "run")
    with monkeypatch.context() as patched:
        from transformers import trainer

        patched.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Stop])
        with pytest.raises(KeyboardInterrupt):
            distill(job, args)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "run.json",
        "student",
        "student-alone.training",
    }
    continued = distill(job, args)
    assert quality(continued) == quality(report)
    assert students(tmp_path / "run") == students(folder)


def test_run_stopped_while_measuring(run, inputs, tmp_path, monkeypatch):
    folder, report = run
    job, args = tiny_job(inputs, baseline=True), tiny_arguments(tmp_path / "run")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.jobs.distill.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distill(job, args)
    saved = students(tmp_path / "run")
    monkeypatch.setattr("transformers.Trainer.train", interrupt)
    assert quality(distill(job, args)) == quality(report)
    assert students(tmp_path / "run") == saved == students(folder)


def test_other_settings_do_not_continue_a_run(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.jobs.distill.measure", lambda *arguments: {}["stop"])
    with pytest.raises(KeyError):
        distill(tiny_job(inputs), tiny_arguments(tmp_path / "run", max_steps=1))
    before = files_of(tmp_path / "run")
    message = r"\(learning_rate was 0\.01 and is 0\.02, max_length was 16 and is 12\)"
    with pytest.raises(ValueError, match=message):
        distill(tiny_job(inputs, max_length=12), tiny_arguments(tmp_path / "run", max_steps=1, learning_rate=0.02))
    assert files_of(tmp_path / "run") == before


def test_settings_survive_their_file(inputs, tmp_path):
    settings = run_settings(tiny_job(inputs), tiny_arguments(tmp_path / "a"))
    assert json.loads(json.dumps(settings)) == settings
    assert settings == run_settings(tiny_job(inputs, overwrite=True), tiny_arguments(tmp_path / "b"))


# Bad input leaves nothing behind


def refuse(inputs, output, message, job=None, arguments=None):
    with pytest.raises(ValueError, match=message):
        distill(tiny_job(inputs, **(job or {})), tiny_arguments(output, **(arguments or {})))


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ({"student_layers": 4}, {}, "num_layers=4 cannot be taken from a teacher of 3 layers"),
        ({"layers": "3"}, {}, r"layers=\[3\] cannot be copied from a teacher of 3 layers"),
        ({"metric": "pearsonr"}, {}, "choose one of accuracy"),
        ({"metric": "nonsense"}, {}, "metric='nonsense' does not fit a model with 2 outputs.*choose one of accuracy"),
        ({"label_column": "nope"}, {}, "no column 'nope'; its columns are text, label"),
        ({"eval_split": "validation"}, {}, "validation cannot be measured on"),
        ({"dataset": "nobody/nothing"}, {}, "Hub"),
        ({"max_length": 2}, {}, "--max-length 3 or more"),
        ({}, {"eval_strategy": "epoch"}, "eval_strategy=.*cannot be used here: .*Leave it out"),
        ({}, {"save_only_model": True}, "save_only_model=True cannot be used here"),
        ({}, {"resume_from_checkpoint": "x"}, "continues by itself"),
    ],
)
def test_bad_input_makes_no_folder(inputs, tmp_path, job, arguments, message):
    refuse(inputs, tmp_path / "run", message, job, arguments)
    assert not (tmp_path / "run").exists()


def test_bad_input_does_not_cost_an_earlier_run(inputs, tmp_path):
    distill(tiny_job(inputs), tiny_arguments(tmp_path / "run", max_steps=1))
    before = files_of(tmp_path / "run")
    refuse(inputs, tmp_path / "run", "cannot be taken", {"student_layers": 9, "overwrite": True})
    refuse(inputs, tmp_path / "run", "holds a finished run")
    assert files_of(tmp_path / "run") == before
    distill(tiny_job(inputs, overwrite=True, student_layers=2), tiny_arguments(tmp_path / "run", max_steps=1))
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.num_hidden_layers == 2


def test_head_that_was_never_trained(tmp_path):
    make_inputs(tmp_path, model={"model_class": BertModel})
    message = r"holds no trained task head \(missing: classifier.bias, classifier.weight\).*--teacher-epochs 3"
    refuse(tmp_path, tmp_path / "run", message)
    assert not (tmp_path / "run").exists()


def test_texts_beyond_the_models_positions(tmp_path):
    make_inputs(tmp_path)
    write_rows(tmp_path / "data" / "test.csv", [{"text": "film " * 50, "label": 0}])
    refuse(tmp_path, tmp_path / "run", "cannot read the longest row, of 52 tokens", {"max_length": 64})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_results_may_not_replace_the_input(inputs, tmp_path, what):
    distill(tiny_job(inputs), tiny_arguments(tmp_path / "run", max_steps=1))
    before = files_of(tmp_path / "run")
    job = {what: str(tmp_path / "run" / "student"), "overwrite": True}
    refuse(inputs, tmp_path / "run", "lies in the output folder", job)
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_epochs": -1}, "below 0"),
        ({"layers": "1,,2"}, "is no rule"),
        ({"layers": "middle"}, "is no rule"),
        ({"layers": "0,1", "student_layers": 3}, "names 2 layers"),
        ({"student_layers": 0}, "at least 1 layer"),
    ],
)
def test_jobs_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        DistillJob(**{"model": "m", "dataset": "d", "student_layers": 2, **options})


def test_layers_of_a_job():
    assert DistillJob("m", "d", 3, layers=" 0, 2,5").student_config().layers == [0, 2, 5]
    assert DistillJob("m", "d", 3).student_config().layers == "spread"


# Other students, more rows, and the teacher's answers


def test_a_cached_teacher_teaches_the_same(inputs, tmp_path):
    weights = []
    for cached in (True, False):
        output = tmp_path / str(cached)
        # One batch of all rows, so that the teacher reads the same batches either way.
        arguments = tiny_arguments(output, per_device_train_batch_size=24, train_sampling_strategy="sequential")
        distill(tiny_job(inputs, cache_teacher=cached), arguments)
        assert not (output / "teacher-cache").exists()
        weights.append(load_file(output / "student" / "model.safetensors"))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


def test_narrow_students_of_noisy_copies(inputs, tmp_path):
    job = tiny_job(
        inputs, baseline=True, augment_copies=2, student_hidden_size=8, student_intermediate_size=16, student_heads=1
    )
    report = distill(job, tiny_arguments(tmp_path / "run"))
    widths = [
        json.loads((tmp_path / "run" / name / "config.json").read_text())["hidden_size"]
        for name in ("student", "student-alone")
    ]
    assert widths == [8, 8]
    assert report["models"][1]["cost"]["parameters"]["total"] < report["models"][0]["cost"]["parameters"]["total"]
    assert np.isfinite(report["models"][1]["quality"]["compressed"])


def test_terms_and_stages_run_from_the_job(inputs, tmp_path):
    stages = [{"epochs": 1, "alpha": 0.0, "task_weight": 0.0, "terms": [{"kind": "hidden_mse"}]}, {"alpha": 1.0}]
    report = distill(tiny_job(inputs), tiny_arguments(tmp_path / "run", stages=json.dumps(stages)))
    assert np.isfinite(report["models"][1]["quality"]["compressed"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["stages"][0]["epochs"] == 1


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"augment_copies": -1}, "augment_copies=-1 is below 0"),
        ({"student_hidden_size": 9}, "9"),
        ({"student_heads": 5}, "5"),
    ],
)
def test_impossible_students_raise_before_training(job, message, inputs, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(tiny_job(inputs, **job), tiny_arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
