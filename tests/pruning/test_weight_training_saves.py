"""What was pruned is saved without its zeros: after `prune`, after a training, and where heads were cut before."""

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.checkpoint.sparse import BITMASK, mark_sparse_, sparse_names
from hf_compress.checkpoint.widths import read_widths
from hf_compress.pruning.weight_layers import find_layers
from tests.modeling.tiny import difference, predict, tiny_batch
from tests.pruning.weight_training import config, make_trainer, model_of, shares, zeros


def packed(folder) -> set[str]:
    return {name.removesuffix(BITMASK) for name in load_file(folder / "model.safetensors") if name.endswith(BITMASK)}


def reload(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")


def weights(model) -> set[str]:
    return {f"{layer.name}.weight" for layer in find_layers(model)}


@pytest.mark.parametrize(
    "values", [{}, {"pattern": "2:4", "sparsity": None}, {"pattern": (4, 4)}, {"scope": "global"}]
)
def test_prune_packs_what_it_pruned(values, tmp_path):
    model = model_of()
    pruned = hc.prune(model, config(**values), [tiny_batch(model)])
    pruned.save_pretrained(tmp_path)
    assert packed(tmp_path) == weights(model)
    reloaded = reload(tmp_path)
    assert difference(predict(reloaded, tiny_batch(model)), predict(pruned, tiny_batch(model))) == 0
    assert sparse_names(model) == []


def test_marks_stay_and_layers_without_zeros_get_none(tmp_path):
    model = model_of()
    mark_sparse_(model, ["bert.embeddings.word_embeddings.weight"])
    names = sorted(weights(model))
    hc.prune_(model, config(0, allocation={f"{names[0].removesuffix('.weight')}": 0.5}))
    assert set(sparse_names(model)) == {"bert.embeddings.word_embeddings.weight", names[0]}
    whole = hc.prune(model_of(), config(0))
    whole.save_pretrained(tmp_path)
    assert not isinstance(vars(whole.config).get("quantization_config"), CompressionConfig)
    assert packed(tmp_path) == set()


@pytest.mark.parametrize("trained", [False, True])
def test_cut_and_thinned_out_and_cut_again(trained, tmp_path):
    model = model_of()
    batches = [tiny_batch(model)]
    structured = hc.StructuredPruningConfig(budget=0.7, score="fisher", multiple_of=1)
    cut = hc.prune(model, structured, batches)
    widths = read_widths(cut)
    assert widths != read_widths(model)
    if trained:
        run = make_trainer(tmp_path / "run", [hc.PruningCallback(config(), n_updates=2)], model=cut, max_steps=3)
        run.train()
        thin = run.model.eval()
    else:
        thin = hc.prune(cut, config())
    thin.save_pretrained(tmp_path / "thin")
    assert packed(tmp_path / "thin") <= weights(thin)
    assert packed(tmp_path / "thin")
    reloaded = reload(tmp_path / "thin")
    assert read_widths(reloaded) == widths
    assert set(sparse_names(reloaded)) == weights(thin)
    assert difference(predict(reloaded, batches[0]), predict(thin, batches[0])) == 0
    again = hc.prune(
        reloaded, hc.StructuredPruningConfig(budget=0.6, score="l2", repair="none", multiple_of=1), batches
    )
    again.save_pretrained(tmp_path / "again")
    final = reload(tmp_path / "again")
    assert read_widths(final) == read_widths(again) != widths
    assert set(sparse_names(final)) == weights(again)
    assert difference(predict(final, batches[0]), predict(again, batches[0])) == 0
    assert all(mask.any() for mask in zeros(final).values())


def test_a_sparse_model_is_trained_on_and_resumed(tmp_path):
    hc.prune(model_of(), config(0.5)).save_pretrained(tmp_path / "sparse")
    ends = []
    for resumed in (False, True):
        callback = hc.PruningCallback(config(0.75), n_updates=2)
        saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        run = make_trainer(tmp_path / "run", [callback], model=reload(tmp_path / "sparse"), **saves)
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resumed else None)
        assert set(shares(run.model).values()) == {0.75}
        ends.append(predict(run.model.eval(), tiny_batch(run.model)))
    assert difference(*ends) == 0
    assert packed(tmp_path / "run" / "checkpoint-4") == weights(run.model)
