"""Tasks other than the classification of texts, where methods treat them apart."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AlbertModel, AutoModel, BertConfig, BertModel, BitsAndBytesConfig, pipelines, set_seed

import hf_compress as hc
from hf_compress.hub.card_page import TASKS
from hf_compress.modeling.blocks import find_blocks
from hf_compress.pruning.layers import choose_layers
from hf_compress.pruning.sensitivity import measure_sensitivity
from hf_compress.pruning.units import find_sites
from tests.modeling.tiny import difference, tiny_batch, tiny_model

ANSWERS = "BertForQuestionAnswering"


@pytest.mark.parametrize(
    "settings", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}]
)
def test_images_with_numbers_or_several_labels(settings):
    model = tiny_model("vit", "ViTForImageClassification", num_hidden_layers=4, **settings)
    dead = find_blocks(model)[2]
    for part in (dead.attention, dead.ffn):
        part.output.weight.data.zero_()
        part.output.bias.data.zero_()
    batches = [tiny_batch(model)]
    assert choose_layers(model, batches, 1) == [0, 1, 3]
    removals = hc.calibrate(model, hc.StructuredPruningConfig(score="fisher", multiple_of=1), batches).removals
    assert any(removal.error[-1] > 0 for removal in removals.values())
    hc.prune(model, hc.StructuredPruningConfig(budget=0.5, multiple_of=1), batches)


def test_no_answer_lies_in_the_padding():
    model = tiny_model("bert", ANSWERS)
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    long = {name: torch.nn.functional.pad(value, (0, 20)) for name, value in short.items()}
    sites = find_sites(find_blocks(model))
    last = next(reversed(measure_sensitivity(model, sites, [short], n_draws=4).tokens))
    for batch in (short, long):
        norms = measure_sensitivity(model, sites, [batch], n_draws=64).tokens[last][0]
        assert norms[:, 6:].sum() == 0
        assert norms[:, :6].sum() > 0


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("model_class", "pooler"), [(BertModel, "pooler.dense"), (AlbertModel, "pooler")])
def test_a_base_model_may_add_its_pooler(model_class, pooler, bits, tmp_path):
    set_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}
    model = model_class(model_class.config_class(**sizes, vocab_size=50), add_pooling_layer=False).eval()
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    small = hc.quantize(model, config)
    small.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again.get_submodule(pooler)) is torch.nn.Linear
    batch = {"input_ids": torch.arange(3, 11)[None]}
    assert difference(again(**batch).last_hidden_state, small(**batch).last_hidden_state) < 1e-5


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_classifiers_with_a_decoder_take_labels_too(model_type):
    name = {"bart": "BartForSequenceClassification", "t5": "T5ForSequenceClassification"}[model_type]
    model = tiny_model(model_type, name)
    batch = tiny_batch(model)
    config = hc.FixedPointConfig(bits=8, activations=8)
    scales = [
        {key: value for key, value in hc.quantize(model, config, [some]).named_buffers() if "input_scale" in key}
        for some in (batch, batch | {"labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)})
    ]
    assert scales[0]
    assert all(torch.equal(value, scales[1][key]) for key, value in scales[0].items())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_of_images(pooling, tmp_path):
    teacher = tiny_model("vit", "ViTModel")
    rows = Dataset.from_list(
        [{"pixel_values": torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(i)).tolist()} for i in range(8)]
    )
    args = hc.DistillationArguments(
        str(tmp_path / "run"),
        alpha=1.0,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        pooling=pooling,
        save_strategy="no",
    )
    cache = hc.TeacherCache.build(tmp_path / "cache", teacher, rows, pooling=pooling)
    found = []
    for known in (None, cache):
        student = copy.deepcopy(teacher)
        trainer = hc.DistillationTrainer(
            student, args, teacher=teacher, teacher_cache=known, train_dataset=rows, eval_dataset=rows
        )
        found.append(trainer.train().training_loss)
        assert trainer.predict(rows).predictions.shape == (8, teacher.config.hidden_size)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] == pytest.approx(0.0, abs=1e-6)


def test_cards_show_pipelines_that_there_are():
    for task in TASKS.values():
        if task.pipeline is not None:
            pipelines.check_task(task.pipeline)


def test_a_random_student_of_a_model_without_its_pooler_is_refused():
    teacher = BertModel(
        BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2), add_pooling_layer=False
    )
    with pytest.raises(
        ValueError, match=r"has other tensors than the teacher: pooler.dense.bias, pooler.dense.weight"
    ):
        hc.make_student(teacher, hc.StudentConfig(num_layers=1, init="random"))
