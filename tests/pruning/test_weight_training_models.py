"""Single weights that go in a training: every kind of model, pattern and scope; saved, and loaded again."""

import pytest
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.checkpoint.sparse import sparse_names
from hf_compress.pruning.weight_layers import find_layers
from tests.modeling.tiny import auto_class, difference, predict, tiny_batch
from tests.pruning.weight_training import CLASSES, Watch, config, make_trainer, model_of, shares, zeros


@pytest.mark.parametrize(
    ("model_type", "score"),
    [(model_type, score) for model_type in CLASSES for score in ("wanda", "movement")] + [("t5", "sparsegpt")],
)
def test_every_architecture_ends_sparse_and_reloads_exactly(model_type, score, tmp_path):
    callback = hc.PruningCallback(config(score=score), n_updates=2, n_batches=2)
    run = make_trainer(tmp_path, [callback], model_type=model_type, max_steps=4)
    before = model_of(model_type)
    run.train()
    for layer in find_layers(run.model):
        mask = layer.weight == 0
        rows = mask if score == "wanda" else mask.reshape(1, -1)
        assert (rows.sum(1) == round(0.6 * rows.shape[1])).all(), layer.name
    assert len(sparse_names(run.model)) == len(find_layers(run.model))
    run.save_model(tmp_path / "model")
    before.save_pretrained(tmp_path / "dense")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("model", "dense")]
    assert sizes[0] < sizes[1]
    kind = AutoModelForSequenceClassification if model_type == "bert" else auto_class(model_type)
    reloaded = kind.from_pretrained(tmp_path / "model", attn_implementation="eager")
    batch = tiny_batch(reloaded)
    assert difference(predict(reloaded, batch), predict(run.model.eval(), batch)) == 0


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({"pattern": "2:4"}, (1, 4)),
        ({"pattern": (4, 2)}, (4, 2)),
        ({"scope": "row"}, None),
        ({"scope": "global"}, None),
        ({"allocation": {".*layer.0": 0.2, ".*query": 0.9}}, None),
        ({"exclude": ".*layer.1"}, None),
    ],
)
@pytest.mark.parametrize("score", ["wanda", "movement"])
def test_patterns_scopes_and_sparsities_by_name_hold(score, values, sizes, tmp_path):
    sparsity = None if values.get("pattern") == "2:4" else 0.5
    callback = hc.PruningCallback(config(sparsity, score, **values), n_updates=3, n_batches=2)
    watch = Watch()
    run = make_trainer(tmp_path, [callback, watch], max_steps=6)
    run.train()
    assert not watch.moved
    masks = zeros(run.model)
    total = sum(mask.sum().item() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    for name, mask in masks.items():
        if sizes:
            left = (~mask).unflatten(0, (-1, sizes[0])).unflatten(2, (-1, sizes[1])).sum((1, 3))
            assert set(left.unique().tolist()) == ({2} if sizes == (1, 4) else {0, 8})
        elif "allocation" in values:
            share = 0.2 if "layer.0" in name else 0.9 if name.endswith("query") else 0.5
            rows = mask if score == "wanda" else mask.reshape(1, -1)
            assert (rows.sum(1) == round(share * rows.shape[1])).all()
        elif "exclude" in values:
            assert mask.any() != ("layer.1" in name)
        elif values["scope"] == "row":
            assert (mask.sum(1) == mask.shape[1] // 2).all()
    if values.get("scope") == "global":
        assert total == pytest.approx(0.5, abs=1e-4)
        assert len(set(shares(run.model).values())) > 1
