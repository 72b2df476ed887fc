"""The repair after single weights went: every architecture, equal to a slow one, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

import hf_compress as hc
from hf_compress.modeling.blocks import find_blocks
from hf_compress.pruning.prune import prune
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import find_layers
from tests.modeling.tiny import MODEL_TYPES, auto_class, difference, predict, tiny_batch, tiny_model
from tests.pruning.weight_training import make_trainer, shares

TEXT = "BertForSequenceClassification"


def config(sparsity=0.6, score="magnitude", repair="least_squares", **values) -> UnstructuredPruningConfig:
    return UnstructuredPruningConfig(sparsity, score=score, repair=repair, **values)


def weights(model) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight for layer in find_layers(model)}


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_keeps_its_zeros_and_comes_closer_to_the_unpruned_model(model_type, tmp_path):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    plain, repaired = (prune(model, config(repair=repair), [batch]) for repair in ("none", "least_squares"))
    inside = {f"{layer.name}.{kind}" for layer in find_layers(model) for kind in ("weight", "bias")}
    for name, value in repaired.state_dict().items():
        assert name in inside or torch.equal(value, model.state_dict()[name]), name
    for name, weight in weights(repaired).items():
        assert torch.equal(weight == 0, weights(plain)[name] == 0), name
        assert not torch.equal(weight, weights(plain)[name]), name
    errors = [difference(predict(pruned, batch), predict(model, batch)) for pruned in (plain, repaired)]
    assert errors[1] < errors[0]
    repaired.save_pretrained(tmp_path)
    reloaded = auto_class(model_type).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(reloaded, batch), predict(repaired, batch)) == 0


@pytest.mark.parametrize("values", [{"pattern": "2:4"}, {"pattern": (2, 2), "scope": "row"}, {"scope": "global"}])
@pytest.mark.parametrize("score", ["random", "wanda", "sparsegpt"])
def test_patterns_and_scores_keep_their_zeros(score, values):
    model = tiny_model("gpt2")
    batches = [tiny_batch(model)]
    plain, repaired = (
        prune(model, config(0.5, score, repair, **values), batches) for repair in ("none", "least_squares")
    )
    # The first layers read the same in both.
    first = find_layers(model)[0].name
    assert torch.equal(weights(repaired)[first] == 0, weights(plain)[first] == 0)
    count = [sum((weight == 0).sum() for weight in weights(pruned).values()) for pruned in (plain, repaired)]
    assert count[0] == count[1]


def outputs_of(model, names, batches) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of modules on real tokens, by hooks that know nothing of the library's own."""
    seen = {name: ([], []) for name in names}
    for batch in batches:
        mask, hooks = batch["attention_mask"].bool(), []
        for name in names:

            def read(_, args, output, name=name, mask=mask):
                seen[name][0].append(args[0][mask])
                seen[name][1].append(output[mask])

            hooks.append(model.get_submodule(name).register_forward_hook(read))
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
    return {name: tuple(torch.cat(part).double() for part in parts) for name, parts in seen.items()}


def slow_fit_(layer: nn.Module, x: torch.Tensor, y: torch.Tensor, ridge: float) -> None:
    centred, target = x - x.mean(0), y - y.mean(0)
    root = (len(x) * ridge * centred.square().mean()).sqrt()
    weight = layer.weight.detach().double()
    for number, row in enumerate(weight):
        stays = row.nonzero()[:, 0]
        pull = root * torch.eye(len(stays), dtype=torch.float64)
        a, b = torch.cat([centred[:, stays], pull]), torch.cat([target[:, number], pull @ row[stays]])
        row[stays] = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(y.mean(0) - weight @ x.mean(0))


def test_layers_are_fitted_one_after_the_other_to_the_unpruned_model():
    model = tiny_model("bert", TEXT)
    batches = [tiny_batch(model, tuple(range(3, 3 + size))) for size in (35, 20, 10, 5)]
    repaired = prune(model, config(0.5, ridge=0.05), batches)
    expected = prune(model, config(0.5, repair="none"))
    names = {module: name for name, module in expected.named_modules()}
    for block in find_blocks(expected):
        for part in (*block.attentions, block.ffn):
            inner = [names[module] for module in part.inputs]
            # A post-norm block adds what a part reads to what it gives.
            output, source = names[part.output], inner[0]
            dense = outputs_of(model, [*inner, output], batches)
            pruned = outputs_of(expected, inner, batches)
            for name in inner:
                slow_fit_(expected.get_submodule(name), pruned[name][0], dense[name][1], 0.05)
            target = dense[output][1] + dense[source][0] - pruned[source][0]
            inputs = outputs_of(expected, [output], batches)[output][0]
            slow_fit_(part.output, inputs, target, 0.05)
    for name, weight in weights(repaired).items():
        assert torch.allclose(weight, weights(expected)[name], rtol=1e-3, atol=1e-4), name
    assert difference(predict(repaired, batches[0]), predict(expected, batches[0])) < 1e-3


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("bert", {}), ("t5", {}), ("deberta-v2", {"share_att_key": True}), ("albert", {}), ("gpt2", {})],
)
def test_batches_and_padding_do_not_matter(model_type, settings):
    model = tiny_model(model_type, **settings)
    batch = tiny_batch(model)
    padded = {name: torch.cat([rows, torch.full((2, 3), int(name == "input_ids"))], 1) for name, rows in batch.items()}
    if model_type == "t5":
        batch["decoder_input_ids"] = padded["decoder_input_ids"] = batch["input_ids"][:, :5]
    alone = [{name: rows[i : i + 1] for name, rows in batch.items()} for i in range(2)]
    together, longer, apart = (prune(model, config(0.5), batches) for batches in ([batch], [padded], alone))
    for name, weight in weights(together).items():
        for other in (longer, apart):
            assert torch.allclose(weights(other)[name], weight, rtol=1e-3, atol=1e-4), name


def test_rounds_by_magnitude_choose_other_weights_than_one():
    model = tiny_model("bert", TEXT)
    batches = [tiny_batch(model)]
    once, often = (prune(model, config(0.8, steps=steps), batches) for steps in (1, 4))
    assert shares(once) == shares(often)
    assert any(not torch.equal(weight == 0, weights(often)[name] == 0) for name, weight in weights(once).items())


def test_what_is_left_out_or_tied_stays_as_it_is():
    model = tiny_model("bert", TEXT)
    names = list(weights(model))
    left_out = [name for name in names if "layer.1" in name or "attention.output" in name]
    repaired = prune(model, config(exclude=left_out), [tiny_batch(model)])
    for name, value in repaired.state_dict().items():
        is_inside = name.rpartition(".")[0] in set(names) - set(left_out)
        assert is_inside or torch.equal(value, model.state_dict()[name]), name
    first, *_, last = find_blocks(model)
    last.attention.inputs[0].weight = first.attention.inputs[0].weight
    plain, tied = (prune(model, config(repair=repair), [tiny_batch(model)]) for repair in ("none", "least_squares"))
    assert torch.equal(weights(tied)[names[0]], weights(plain)[names[0]])
    assert find_blocks(tied)[-1].attention.inputs[0].weight is find_blocks(tied)[0].attention.inputs[0].weight


def test_without_wish_there_is_a_repair_where_data_are_read():
    model = tiny_model("bert", TEXT)
    batches = [tiny_batch(model)]
    read = {"score": "sparsegpt"}, {"score": "wanda"}, {"score": "magnitude", "allocation": "owl"}
    for values in (*read, {"score": "magnitude"}, {"score": "random"}):
        default = UnstructuredPruningConfig(**values)
        assert default.is_repaired is default.needs_data is (values in read)
        asked = config(None, repair="least_squares" if values in read else "none", **values)
        assert same(prune(model, default, batches), prune(model, asked, batches))
    assert config().needs_data


def test_dead_inputs_and_half_precision_are_no_trouble():
    model = tiny_model("bert", TEXT).bfloat16()
    batch = tiny_batch(model)
    with torch.no_grad():
        for block in find_blocks(model):
            for parameter in block.ffn.inputs[0].parameters():
                parameter[:4] = 0
    repaired = prune(model, config(), [batch])
    assert predict(repaired, batch).isfinite().all()
    assert {weight.dtype for weight in weights(repaired).values()} == {torch.bfloat16}


def test_a_training_refuses_a_repair_and_ignores_one_that_was_not_asked_for(tmp_path):
    with pytest.raises(ValueError, match="the training itself makes up for what goes: leave repair out"):
        hc.PruningCallback(config())
    found = []
    for values in ({"repair": None}, {"repair": "none"}):
        trainer = make_trainer(tmp_path, [hc.PruningCallback(config(0.5, "wanda", **values))])
        trainer.train()
        found.append(copy.deepcopy(trainer.model))
    assert same(*found)
    assert set(shares(found[0]).values()) == {0.5}
