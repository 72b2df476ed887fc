"""A recipe's run: figures are those of the saved models, and neither changes nor interruptions spoil a result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from hf_compress.evaluation.cost import count_macs, count_parameters
from hf_compress.evaluation.sample import sample_batch
from hf_compress.pipeline import compress as pipeline
from hf_compress.pipeline.compress import compress
from hf_compress.pipeline.training import hold_zeros
from hf_compress.pruning.callback import PruningCallback
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import find_layers
from hf_compress.recipe.steps import (
    DataConfig,
    DistilStep,
    EvaluateStep,
    FinetuneStep,
    PruneStep,
    QuantizeStep,
    RecoverStep,
    SparsifyStep,
    StudentStep,
    VocabularyStep,
)
from tests.modeling.tiny import tiny_model
from tests.tiny_job import NAMES, save_tiny_bert, tiny_texts, tiny_tokenizer, write_rows
from tests.tiny_recipe import CPU, left_behind, tiny_recipe, tiny_words


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    recipe = tiny_recipe(folder)
    return recipe, folder / "out", compress(recipe, folder / "out")


def accuracy(folder, rows):
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    inputs = tokenizer(rows["text"][:], truncation=True, max_length=12, padding=True, return_tensors="pt")
    with torch.inference_mode():
        decided = model(**inputs).logits.argmax(-1)
    return (decided == torch.tensor(rows["label"][:])).float().mean().item()


def test_every_figure_is_of_the_saved_model(finished):
    recipe, output, report = finished
    rows = load_dataset("csv", data_files=f"{recipe.data.dataset}/validation.csv", split="train")
    models = [step for step in report["steps"] if step["folder"]]
    assert [step["step"] for step in models] == ["finetune", "vocabulary", "prune", "recover", "quantize"]
    for step in models:
        folder = output / step["folder"]
        assert step["quality"]["compressed"] == pytest.approx(accuracy(folder, rows))
        assert step["cost"]["bytes_on_disk"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        batch = sample_batch([loaded], 3, 12, recipe.seed)
        assert step["cost"]["parameters"] == vars(count_parameters(loaded))
        assert step["cost"]["macs"] == count_macs(loaded, batch)
        assert set(step["latency"]) == {"2", "3"}
        assert sum(step["parts"]["bytes"].values()) <= step["cost"]["bytes_on_disk"]
    assert models[0]["quality"]["retention"] == 1.0
    assert report["result"] == models[-1]["folder"]
    assert report["stopped_by"] is None
    assert json.loads((output / "report.json").read_text()) == report


def test_sizes_follow_the_settings(finished):
    _, output, report = finished
    by_step = {step["step"]: step for step in report["steps"]}
    assert by_step["vocabulary"]["details"]["tokens"] == {"before": 38, "after": 35}
    assert by_step["vocabulary"]["quality"]["agreement"] == 1.0
    blocks = {name: by_step[name]["parts"]["bytes"] for name in ("vocabulary", "prune", "quantize")}
    kept = [blocks[name]["attention"] + blocks[name]["feed-forward"] for name in ("vocabulary", "prune")]
    assert kept[1] <= 0.6 * kept[0]
    assert sum(blocks["quantize"].values()) < sum(blocks["prune"].values())
    widths = by_step["prune"]["details"]["widths"]
    assert widths["dense"].keys() == widths["pruned"].keys()
    assert by_step["recover"]["details"]["losses"]


def test_a_finished_run_is_not_done_again(finished):
    recipe, output, report = finished
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*.safetensors")}
    # The same files are the same data, whenever they were written.
    for file in Path(recipe.data.dataset).iterdir():
        file.touch()
    assert compress(recipe, output) == report
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("*/*.safetensors")}


def test_a_changed_recipe_redoes_what_follows(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe.steps = [*recipe.steps[:3], recipe.steps[-1]]
    compress(recipe, tmp_path / "out")
    first = left_behind(tmp_path / "out")
    made = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/model.safetensors")}
    changed = replace(recipe, steps=[*recipe.steps[:2], PruneStep(budget=0.75, n_texts=32, multiple_of=4)])
    report = compress(changed, tmp_path / "out")
    after = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/model.safetensors")}
    assert [step["name"] for step in report["steps"]] == ["01-finetune", "02-vocabulary", "03-prune"]
    assert {n: made[n] == after[n] for n in after} == {"01-finetune": True, "02-vocabulary": True, "03-prune": False}
    # And back again, which gives what it gave before.
    compress(recipe, tmp_path / "out")
    assert left_behind(tmp_path / "out") == first


def test_steps_with_another_number_are_moved(tmp_path):
    recipe, output = tiny_recipe(tmp_path), tmp_path / "out"
    half = PruneStep(budget=0.75, n_texts=32, multiple_of=4)
    recipe.steps = [recipe.steps[0], half, replace(half, budget=0.6)]
    report = compress(recipe, output)
    first, made = left_behind(output), [path.stat().st_mtime_ns for path in sorted(output.glob("*/model.safetensors"))]
    checked = replace(recipe, steps=[recipe.steps[0], EvaluateStep(max_mb=100), *recipe.steps[1:]])
    again = compress(checked, output)
    assert [step["name"] for step in again["steps"]] == ["01-finetune", "02-evaluate", "03-prune", "04-prune"]
    assert made == [path.stat().st_mtime_ns for path in sorted(output.glob("*/model.safetensors"))]
    assert [step["quality"] for step in again["steps"] if "quality" in step] == [s["quality"] for s in report["steps"]]
    assert not list(output.glob("02-*"))
    compress(recipe, output)
    assert left_behind(output) == first
    assert made == [path.stat().st_mtime_ns for path in sorted(output.glob("*/model.safetensors"))]


def test_a_run_that_was_stopped_ends_like_an_unbroken_one(finished, tmp_path, monkeypatch):
    recipe, output, _ = finished

    class Stopped(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    for place in ("make", "_measured", "_finish"):
        with monkeypatch.context() as patch:
            real, calls = getattr(pipeline, place), []

            def sometimes(*args, real=real, calls=calls, at=1 if place == "_finish" else 3, **kwargs):
                calls.append(args)
                return stop() if len(calls) == at else real(*args, **kwargs)

            patch.setattr(f"hf_compress.pipeline.compress.{place}", sometimes)
            with pytest.raises(Stopped):
                compress(recipe, tmp_path / "out")
    compress(recipe, tmp_path / "out")
    assert left_behind(tmp_path / "out") == left_behind(output)


def test_a_gate_stops_and_what_was_good_stays(tmp_path):
    recipe = tiny_recipe(tmp_path)
    steps = [*recipe.steps[:3], EvaluateStep(min_retention=1.5), recipe.steps[-1]]
    report = compress(replace(recipe, steps=steps), tmp_path / "out")
    assert report["stopped_by"]["step"] == "04-evaluate"
    assert "min_retention is 1.5" in report["stopped_by"]["reason"]
    assert [step["name"] for step in report["steps"]][-1] == "04-evaluate"
    assert (tmp_path / "out" / "03-prune" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "05-quantize").exists()
    # With a gate that lets the model before it pass, that is the result.
    size = report["steps"][1]["cost"]["bytes_on_disk"] / 1e6
    steps = [*recipe.steps[:3], EvaluateStep(max_mb=report["steps"][2]["cost"]["bytes_on_disk"] / 1e6 - 1e-6)]
    assert size > steps[-1].max_mb
    assert compress(replace(recipe, steps=steps), tmp_path / "out")["result"] is None


def test_zeros_survive_the_recovery(tmp_path):
    steps = [
        *tiny_recipe(tmp_path).steps[:1],
        SparsifyStep(sparsity=0.5, n_texts=32),
        RecoverStep(num_train_epochs=1, arguments=CPU),
    ]
    compress(tiny_recipe(tmp_path, steps=steps), tmp_path / "out")
    load = AutoModelForSequenceClassification.from_pretrained
    before, after = load(tmp_path / "out" / "02-sparsify"), load(tmp_path / "out" / "03-recover")
    weights = [name for name, weight in before.named_parameters() if (weight == 0).float().mean() > 0.4]
    assert len(weights) >= 6 * 3
    for name in weights:
        old, new = before.get_parameter(name), after.get_parameter(name)
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)
    sizes = [(tmp_path / "out" / name / "model.safetensors").stat().st_size for name in ("02-sparsify", "03-recover")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


class Killed(Exception):
    pass


def test_a_recovery_that_was_killed_before_its_masks_were_saved_continues(tmp_path, monkeypatch):
    arguments = {**CPU, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    steps = [
        SparsifyStep(sparsity=0.5, score="magnitude", repair="none"),
        RecoverStep(max_steps=4, per_device_train_batch_size=8, arguments=arguments),
    ]
    save_tiny_bert(tmp_path / "model")
    recipe = tiny_recipe(tmp_path, steps=steps)
    compress(recipe, tmp_path / "whole")

    def die(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(PruningCallback, "on_save", die)
        with pytest.raises(Killed):
            compress(recipe, tmp_path / "out")
    work = tmp_path / "out" / "02-recover.training"
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(work.glob("checkpoint-2/pruning.*"))
    # What a full disk leaves of a file that is written to again.
    (work / "seconds.json").write_text("")
    compress(recipe, tmp_path / "out")
    assert left_behind(tmp_path / "out")["weights"] == left_behind(tmp_path / "whole")["weights"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".training", ".cache")]


def test_a_decoder_with_a_head_is_pruned_and_recovers(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": len(tiny_tokenizer())}
    tokens = {"pad_token_id": tiny_tokenizer().pad_token_id, "bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(**sizes, **tokens, id2label=dict(enumerate(NAMES)))
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    steps = [
        PruneStep(budget=0.7, n_texts=16, multiple_of=4),
        RecoverStep(max_steps=1, arguments=CPU),
    ]
    report = compress(tiny_recipe(tmp_path, steps=steps), tmp_path / "out")
    assert [step["name"] for step in report["steps"]][1:] == ["01-prune", "02-recover"]


def test_layers_without_any_weight_are_held_too():
    model = tiny_model("bert", "BertForSequenceClassification")
    layer = find_layers(model)[0]
    layer.weight.data.zero_()
    held = hold_zeros(model, UnstructuredPruningConfig(0.5, score="magnitude", scope="global"))
    assert held.config.allocation[layer.name.replace(".", r"\.")] == 1.0


def test_a_student_of_a_model_with_a_head(tmp_path):
    save_tiny_bert(tmp_path / "model")
    steps = [StudentStep(num_layers=1), DistilStep(num_train_epochs=1, arguments=CPU), QuantizeStep("bf16")]
    report = compress(tiny_recipe(tmp_path, steps=steps), tmp_path / "out")
    assert [step["name"] for step in report["steps"]] == ["00-model", "01-student", "02-distil", "03-quantize"]
    assert report["reference"] == "00-model"
    assert report["steps"][0]["folder"] is None
    assert report["steps"][1]["seconds_of_reference"] is None


def test_labelled_words(tmp_path):
    steps = [
        FinetuneStep(num_train_epochs=30, learning_rate=1e-2, arguments=CPU, per_device_train_batch_size=16),
        VocabularyStep(max_size=36, characters="corpus"),
        PruneStep(budget=0.6, n_texts=32, multiple_of=4),
        RecoverStep(num_train_epochs=1, augment_copies=1, arguments=CPU),
        QuantizeStep("fixed-point", {"bits": 4, "granularity": "group", "group_size": 8}),
    ]
    report = compress(tiny_recipe(tmp_path, tiny_words(tmp_path / "data"), steps), tmp_path / "out")
    assert (report["task"], report["metric"]) == ("token-classification", "seqeval")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / report["result"])
    assert [model.config.id2label[i] for i in range(3)] == ["O", "B-BAD", "B-GOOD"]
    assert report["steps"][0]["quality"]["compressed"] > 0.5
    # A vocabulary that still has all words of these texts changes nothing.
    assert report["steps"][1]["quality"]["agreement"] == 1.0


def test_pairs_and_numbers(tmp_path):
    for name, n, seed in (("train", 48, 0), ("validation", 20, 1)):
        rows = [{"a": r["text"], "b": r["text"][::-1], "score": r["label"] + 0.5} for r in tiny_texts(n, seed)]
        write_rows(tmp_path / "pairs" / f"{name}.csv", rows)
    data = DataConfig(str(tmp_path / "pairs"), text_columns=["a", "b"], label_column="score", max_length=20)
    steps = [*tiny_recipe(tmp_path).steps[:1], PruneStep(budget=0.5, n_texts=32, multiple_of=4)]
    report = compress(tiny_recipe(tmp_path, data, steps), tmp_path / "out")
    assert report["metric"] == "pearsonr"
    assert report["steps"][1]["quality"]["mse"] > 0


@pytest.mark.parametrize("step", [PruneStep(budget=0.75, n_texts=32), SparsifyStep(sparsity=0.5, n_texts=32)])
def test_a_model_keeps_its_dtype(tmp_path, step):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "model"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    report = compress(tiny_recipe(tmp_path, steps=[step]), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / report["result"])
    assert model.dtype == torch.bfloat16
    assert report["steps"][1]["cost"]["bytes_on_disk"] < report["steps"][0]["cost"]["bytes_on_disk"]


def test_refusals_come_before_anything_is_written(tmp_path):
    save_tiny_bert(tmp_path / "model", BertModel)
    headless = tiny_recipe(tmp_path, steps=[PruneStep(budget=0.5)])
    with pytest.raises(ValueError, match="no trained task head.*begin the steps with `- finetune:`"):
        compress(headless, tmp_path / "out")
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match="max_size=5 is less than"):
        compress(replace(recipe, steps=[recipe.steps[0], VocabularyStep(max_size=5)]), tmp_path / "out")
    with pytest.raises(ValueError, match="metric='f2' does not fit"):
        compress(replace(recipe, data=replace(recipe.data, metric="f2")), tmp_path / "out")
    with pytest.raises(ValueError, match="cannot read texts of 64 tokens, of which it is to be timed"):
        compress(replace(recipe, data=replace(recipe.data, max_length=64)), tmp_path / "out")
    with pytest.raises(ValueError, match="lies in the output folder"):
        compress(recipe, tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not of a run of a recipe.*nothing deleted"):
        compress(recipe, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_held_out_rows_are_checked_before_anything_is_trained(tmp_path):
    recipe = tiny_recipe(tmp_path)
    write_rows(tmp_path / "data" / "test.csv", tiny_texts(8))
    gated = replace(recipe, steps=[recipe.steps[0], QuantizeStep("int8", max_drop=0.5)])
    gated.data = replace(recipe.data, eval_split="test")
    write_rows(tmp_path / "data" / "validation.csv", [row | {"label": 7} for row in tiny_texts(8)])
    with pytest.raises(ValueError, match="Label 7 of row 0 of the split 'validation' is unknown"):
        compress(gated, tmp_path / "out")
    write_rows(tmp_path / "data" / "validation.csv", [{"text": row["text"]} for row in tiny_texts(8)])
    with pytest.raises(ValueError, match="'validation', on which is chosen .* has no column 'label'"):
        compress(gated, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    compress(replace(recipe, steps=recipe.steps[:2]), tmp_path / "out")
    before = left_behind(tmp_path / "out")["weights"]
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("hf_compress.pipeline.checks.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="03-prune may write .* GB left: make room"):
        compress(replace(recipe, steps=recipe.steps[:3]), tmp_path / "out")
    monkeypatch.undo()
    compress(replace(recipe, steps=recipe.steps[:3]), tmp_path / "out")
    after = left_behind(tmp_path / "out")["weights"]
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("n_held_out", [None, 0, 8])
def test_a_choice_on_rows_to_learn_from_is_said(n_held_out, tmp_path, caplog):
    save_tiny_bert(tmp_path / "model")
    recipe = tiny_recipe(tmp_path, steps=[QuantizeStep("int8", max_drop=1.0)])
    splits = DatasetDict({"train": Dataset.from_list(tiny_texts(24)), "test": Dataset.from_list(tiny_texts(8, 2))})
    if n_held_out is not None:
        splits["validation"] = Dataset.from_list(tiny_texts(8, seed=3)).select(range(n_held_out))
        recipe.data.eval_split = "test"
    compress(recipe, tmp_path / "out", splits=splits)
    assert ("is chosen by max_drop on rows of train" in caplog.text) == (not n_held_out)
