"""Single weights of live models: every architecture, exact counts, blocks from the first to the last, bad input."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.tasks import forward_columns
from hf_compress.pruning.calibration import calibrate
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.prune import prune, prune_
from hf_compress.pruning.unstructured import measure_sparsity
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import find_layers
from tests.modeling.tiny import MODEL_TYPES, auto_class, difference, predict, tiny_batch, tiny_model
from tests.pruning.slow_obs import keep_best, slow_sparsegpt

SCORES = ("sparsegpt", "wanda", "magnitude", "l1", "l2", "random")
TEXT = "BertForSequenceClassification"


def config(sparsity=None, **values) -> UnstructuredPruningConfig:
    return UnstructuredPruningConfig(sparsity, **values)


def many_texts(model, n_texts=48, length=12) -> list[dict[str, torch.Tensor]]:
    """Batches without padding."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (n_texts, length), generator=draw)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]


def zeros(model) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight == 0 for layer in find_layers(model)}


def assert_same_masks(first, second) -> None:
    """Up to ties: sums over batches are rounded in other ways."""
    for name, mask in zeros(first).items():
        assert (mask != zeros(second)[name]).double().mean() <= 0.01, name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_keeps_its_sparsity_by_every_score_and_reloads_exactly(model_type, tmp_path):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    before = copy.deepcopy(model.state_dict())
    # A repair gives them new biases, too.
    inside = {f"{layer.name}.{kind}" for layer in find_layers(model) for kind in ("weight", "bias")}
    for score in SCORES:
        pruned = prune(model, config(0.6, score=score), [batch])
        for name, mask in zeros(pruned).items():
            rows = mask if score == "wanda" else mask.reshape(1, -1)
            assert (rows.sum(1) == round(0.6 * rows.shape[1])).all(), name
        for name, value in pruned.state_dict().items():
            assert name in inside or torch.equal(value, before[name]), name
        pruned.save_pretrained(tmp_path / score)
        reloaded = auto_class(model_type).from_pretrained(tmp_path / score, attn_implementation="eager")
        assert difference(predict(reloaded, batch), predict(pruned, batch)) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("score", SCORES)
def test_sparsity_0_changes_nothing_bit_for_bit(score):
    model = tiny_model("bert")
    for values in (
        {"sparsity": 0},
        {"pattern": "4:4", "repair": "none"},
        {"sparsity": 0.0, "pattern": (2, 2), "repair": "least_squares"},
    ):
        pruned = prune(model, config(score=score, **values), [tiny_batch(model)])
        assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize(
    ("pattern", "group", "share"), [("2:4", (1, 4), 0.5), ("1:4", (1, 4), 0.25), ((4, 2), (4, 2), 0.5)]
)
def test_patterns_hold_in_every_layer(score, pattern, group, share):
    model = tiny_model("gpt2")
    pruned = prune(model, config(score=score, pattern=pattern, scope=None), [tiny_batch(model)])
    for mask in zeros(pruned).values():
        left = (~mask).unflatten(0, (-1, group[0])).unflatten(2, (-1, group[1])).sum((1, 3))
        if isinstance(pattern, str):
            assert (left == int(pattern[0])).all()
        else:
            assert set(left.unique().tolist()) == {0, 8}
        assert (~mask).double().mean() == share


@pytest.mark.parametrize(
    ("score", "steps"), [("sparsegpt", 1), ("sparsegpt", 3), ("wanda", 1), ("magnitude", 1), ("random", 1)]
)
def test_the_global_share_is_exact_and_uneven(score, steps):
    model = tiny_model("bert")
    found = zeros(prune(model, config(0.7, score=score, scope="global", steps=steps), [tiny_batch(model)]))
    assert sum(mask.sum().item() for mask in found.values()) == round(0.7 * sum(map(torch.numel, found.values())))
    assert len({mask.double().mean().item() for mask in found.values()}) > 1


@pytest.mark.parametrize("score", ["sparsegpt", "wanda"])
def test_the_scale_of_a_layer_does_not_matter_where_layers_compete(score):
    model = tiny_model("bert", TEXT)
    rescaled = copy.deepcopy(model)
    attention = find_blocks(rescaled)[1].attention
    with torch.no_grad():
        attention.inputs[2].weight.mul_(8)
        attention.inputs[2].bias.mul_(8)
        attention.output.weight.div_(8)
    batches = many_texts(model)
    assert torch.equal(predict(model, batches[0]), predict(rescaled, batches[0]))
    first, second = (prune(each, config(0.6, score=score, scope="global"), batches) for each in (model, rescaled))
    assert_same_masks(first, second)


@pytest.mark.parametrize("values", [{"sparsity": 0.8}, {"pattern": "2:8"}, {"sparsity": 0.8, "score": "wanda"}])
def test_rounds_end_at_the_same_sparsity(values):
    model = tiny_model("bert", TEXT)
    batches = many_texts(model)
    once, often = (prune(model, config(steps=steps, **values), batches) for steps in (1, 3))
    counts = [{name: mask.sum().item() for name, mask in zeros(pruned).items()} for pruned in (once, often)]
    assert counts[0] == counts[1]
    assert not torch.equal(*(predict(pruned, batches[0]) for pruned in (once, often)))


def layer_inputs(model, batches) -> dict[str, torch.Tensor]:
    """What each projection reads, without padding, by hooks that know nothing of the library's own."""
    rows: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            read = lambda _, args, name=name: rows.setdefault(name, []).append(args[0])  # noqa: E731
            hooks.append(module.register_forward_pre_hook(read))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    real = [batch["attention_mask"].bool() for batch in batches]
    names = {layer.name for layer in find_layers(model)}
    return {
        name: torch.cat([part[mask] for part, mask in zip(parts, real, strict=True)]).double()
        for name, parts in rows.items()
        if name in names
    }


def slow_wanda(weight: torch.Tensor, x: torch.Tensor, share: float) -> torch.Tensor:
    left = weight.clone()
    for row in range(len(weight)):
        scores = [(abs(weight[row, j].item()) * x[:, j].norm().item(), j) for j in range(weight.shape[1])]
        for _, j in sorted(scores)[: round(share * len(scores))]:
            left[row, j] = 0
    return left


@pytest.mark.parametrize("score", ["sparsegpt", "wanda"])
def test_each_block_is_pruned_by_what_it_reads_from_pruned_ones(score):
    model = tiny_model("bert", TEXT)
    batches = [*many_texts(model), tiny_batch(model)]
    pruned = prune(model, config(0.5, score=score, precision="float64", repair="none"), batches)
    expected = copy.deepcopy(model)
    for block in find_blocks(expected):
        inputs = layer_inputs(expected, batches)
        for layer in [layer for layer in find_layers(expected) if layer.block.name == block.name]:
            weight, x = layer.weight.double(), inputs[layer.name]
            if score == "wanda":
                left = slow_wanda(weight, x, 0.5)
            else:
                left = slow_sparsegpt(weight, x, lambda costs: keep_best(costs, 0.5), 128)
            with torch.no_grad():
                layer.module.weight.copy_(left)
    errors, slow_errors = (measure_sparsity(result, model, batches) for result in (pruned, expected))
    assert_same_masks(pruned, expected)
    for name, values in errors.items():
        assert values["output_error"] == pytest.approx(slow_errors[name]["output_error"], rel=0.01), name


@pytest.mark.parametrize("score", ["sparsegpt", "wanda"])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("bert", {}), ("bart", {}), ("t5", {}), ("deberta-v2", {"share_att_key": True}), ("albert", {}), ("gpt2", {})],
)
def test_batches_and_padding_do_not_matter(model_type, settings, score):
    model = tiny_model(model_type, **settings)
    batch = tiny_batch(model)
    padded = {name: torch.cat([rows, torch.full((2, 3), int(name == "input_ids"))], 1) for name, rows in batch.items()}
    if "decoder_input_ids" in batch:
        padded["decoder_input_ids"] = batch["decoder_input_ids"]
    elif "decoder_input_ids" in forward_columns(model):
        batch["decoder_input_ids"] = padded["decoder_input_ids"] = batch["input_ids"][:, :5]
    short = int(batch["attention_mask"][1].sum())
    alone = [{name: rows[:1] for name, rows in batch.items()}, {name: rows[1:] for name, rows in batch.items()}]
    for name in ("input_ids", "attention_mask"):
        alone[1][name] = alone[1][name][:, :short]
    settings = config(0.5, score=score, precision="float64")
    together, longer, apart = (prune(model, settings, batches) for batches in ([batch], [padded], alone))
    assert_same_masks(together, longer)
    assert_same_masks(together, apart)


def test_a_shared_block_is_pruned_once_by_the_inputs_of_all_layers():
    model = tiny_model("albert")
    batches = [tiny_batch(model)]
    pruned = prune(model, config(0.5, score="wanda", repair="none"), batches)
    reads = layer_inputs_of_all_runs(model, batches)
    for layer in find_layers(model):
        assert torch.equal(slow_wanda(layer.weight, reads[layer.name], 0.5) == 0, zeros(pruned)[layer.name])


def layer_inputs_of_all_runs(model, batches) -> dict[str, torch.Tensor]:
    repeated = [batch for batch in batches for _ in range(model.config.num_hidden_layers)]
    rows: dict[str, list[torch.Tensor]] = {}
    for layer in find_layers(model):
        read = lambda _, args, name=layer.name: rows.setdefault(name, []).append(args[0])  # noqa: E731
        layer.module.register_forward_pre_hook(read)
    for batch in batches:
        predict(model, batch)
    masks = [batch["attention_mask"].bool() for batch in repeated]
    return {name: torch.cat([x[m] for x, m in zip(parts, masks, strict=True)]) for name, parts in rows.items()}


def test_layers_can_be_left_out_by_name_and_by_pattern(caplog):
    model = tiny_model("bert", TEXT, num_hidden_layers=11, intermediate_size=8)
    names = [layer.name for layer in find_layers(model)]
    first = names[0].rsplit(".", 3)[0]
    second = first[:-1] + "1"
    with caplog.at_level(logging.INFO):
        pruned = prune(model, config(0.5, score="magnitude", exclude=[second, ".*query"]))
    kept = {name for name, mask in zeros(pruned).items() if not mask.any()}
    assert kept == {name for name in names if name.startswith(f"{second}.") or name.endswith("query")}
    assert f"{second}0.attention" in " ".join(names)
    said = " ".join(caplog.messages)
    assert "Whole stay the embeddings (bert.embeddings.word_embeddings" in said
    assert "the task head (classifier)" in said
    assert names[0] in said


def test_sparsities_by_name_and_by_outliers():
    model = tiny_model("bert", TEXT)
    names = [layer.name for layer in find_layers(model)]
    settings = config(0.5, score="magnitude", allocation={names[0]: 0.25, ".*query": 0.75, ".*layer.2": 0})
    found = {name: values["sparsity"] for name, values in measure_sparsity(prune(model, settings)).items()}
    for name, share in found.items():
        expected = 0.25 if name == names[0] else 0.75 if name.endswith("query") else 0 if "layer.2" in name else 0.5
        assert share == expected, name
    for score in ("magnitude", "wanda", "sparsegpt"):
        settings = config(0.5, score=score, allocation="owl", outlier_factor=2.0, outlier_spread=0.2)
        masks = zeros(prune(model, settings, many_texts(model)))
        shares = {name: mask.double().mean().item() for name, mask in masks.items()}
        blocks = sorted({round(share, 1) for share in shares.values()})
        assert len(blocks) > 1
        assert sum(mask.sum().item() for mask in masks.values()) / sum(map(torch.numel, masks.values())) == (
            pytest.approx(0.5, abs=0.02)
        )


def test_a_calibration_of_structured_pruning_serves_too_and_few_tokens_are_said(caplog):
    model = tiny_model("bert", TEXT)
    batches = many_texts(model)
    calibration = calibrate(model, StructuredPruningConfig(score="l2"), batches)
    first, second = (prune(model, config(0.5), data) for data in (batches, calibration))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert "some hundred texts" not in " ".join(caplog.messages)
    prune(model, config(0.5), [tiny_batch(model)])
    assert "have 14 tokens for up to 32 weights" in " ".join(caplog.messages)


def test_a_model_comes_back_in_the_mode_and_dtype_it_was_in():
    model = tiny_model("gpt2").bfloat16().train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(7)
    model.config.attn_pdrop = 0.5
    first, second = (prune(model, config(0.5), [tiny_batch(model)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.training
    assert first.dtype == torch.bfloat16
    assert [parameter.requires_grad for parameter in first.parameters()] == flags
    assert first.lm_head.weight is first.transformer.wte.weight


def test_errors_of_outputs_are_measured_where_the_model_reads():
    model = tiny_model("bert", TEXT)
    batches = [*many_texts(model), tiny_batch(model)]
    pruned = prune(model, config(0.5, score="magnitude"))
    found = measure_sparsity(pruned, model, batches)
    inputs = layer_inputs(pruned, batches)
    old = {layer.name: layer.weight.double() for layer in find_layers(model)}
    for layer in find_layers(pruned):
        x, weight = inputs[layer.name], old[layer.name]
        expected = (x @ (layer.weight - weight).T).norm() / (x @ weight.T).norm()
        assert found[layer.name]["output_error"] == pytest.approx(expected.item(), rel=1e-4)
    assert measure_sparsity(pruned) == {name: {"sparsity": 0.5} for name in old}
    whole = measure_sparsity(model, model, batches)
    assert {tuple(values.values()) for values in whole.values()} == {(0.0, 0.0)}
    with pytest.raises(ValueError, match="needs both"):
        measure_sparsity(pruned, model)
    with pytest.raises(ValueError, match="not of the same shape"):
        measure_sparsity(pruned, tiny_model("bert", TEXT, intermediate_size=8), batches)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": -0.1}, "sparsity=-0.1 is no share"),
        ({"sparsity": 1}, "from 0 to below 1"),
        ({"sparsity": "half"}, "sparsity='half' is no share"),
        ({"score": "magic"}, "score='magic' is unknown: give one of 'sparsegpt'"),
        ({"scope": "column"}, "scope='column' is unknown"),
        ({"pattern": "4:2"}, "pattern='4:2' is no n:m pattern.*1 <= n <= m"),
        ({"pattern": "0:2"}, "is no n:m pattern"),
        ({"pattern": "banana"}, "is no n:m pattern"),
        ({"pattern": (4, 0)}, "is no block"),
        ({"pattern": (1, 2, 3)}, "is no block"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "contradict each other: the pattern makes 0.5"),
        ({"pattern": "2:4", "scope": "row"}, "leave out scope"),
        ({"allocation": "erk"}, "allocation='erk' is unknown"),
        ({"allocation": {".*": 1.5}}, r"allocation\['\.\*'\]=1.5 is no share"),
        ({"scope": "global", "allocation": "owl"}, "leave out allocation, or scope"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 4, "score": "magnitude"}, "'magnitude' with repair=None does not change from round to round"),
        ({"steps": 4, "score": "random", "repair": "least_squares"}, "does not change from round to round"),
        ({"repair": "bias"}, "repair='bias' is unknown: give one of 'least_squares', 'none'"),
        ({"ridge": -1.0}, "ridge=-1.0: give a number of at least 0"),
        ({"damping": 0.0}, "damping=0.0: give a number above 0"),
        ({"precision": "float16"}, "precision='float16' is unknown"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.3, "7:10"), (0.2, "4:5"), (2 / 3, "1:3")])
def test_a_sparsity_may_say_what_the_pattern_says(sparsity, pattern):
    assert UnstructuredPruningConfig(sparsity, pattern=pattern).target == pytest.approx(sparsity)


def test_bad_input_is_refused():
    model = tiny_model("bert", TEXT)
    batch = tiny_batch(model)
    refused = [
        (config(score="movement"), [batch], "prune.. does not train: give the config to the pruning callback"),
        (config(), None, "data=None"),
        (config(score="magnitude", allocation="owl"), None, "data=None"),
        (config(score="magnitude", repair="least_squares"), None, "repair='least_squares' is computed from data"),
        (config(), [], "hold no batch"),
        (config(), [{"input_ids": batch["input_ids"]}], "no attention_mask, but holds the padding token 1"),
        (config(pattern="2:5"), [batch], "does not divide .*query, which has 32 outputs and 32 inputs"),
        (config(pattern=(5, 1)), [batch], "does not divide .* or add '.*query' to exclude"),
        (config(exclude="encoder"), [batch], "exclude has 'encoder', which matches none of the 18 projections"),
        (config(exclude=["("]), [batch], "is no regular expression"),
        (config(exclude=["bert"]), [batch], "leaves none of the 18"),
        (config(allocation={"x": 0.1}), [batch], "allocation has 'x', which matches none"),
        (config(), [batch | {"attention_mask": torch.zeros(2, 8)}], "never reach bert.*query"),
    ]
    for settings, data, message in refused:
        with pytest.raises(ValueError, match=message):
            prune(model, settings, data)
    for name, message in (("bert.embeddings.word_embeddings", "NaN or infinity"), (find_layers(model)[4].name, "NaN")):
        broken = copy.deepcopy(model)
        nn.init.constant_(broken.get_submodule(name).weight, float("nan"))
        with pytest.raises(ValueError, match=message):
            prune(broken, config(), [batch])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_models_that_cannot_be_pruned_are_refused():
    model = tiny_model("bert", TEXT)
    batch = tiny_batch(model)
    packed = copy.deepcopy(model)
    packed.is_quantized, packed.config.quantization_config = True, object()
    with pytest.raises(ValueError, match="is quantized .* Prune the full-precision model"):
        prune(packed, config(), [batch])
    with pytest.raises(TypeError, match="Merge adapters first"):
        prune(get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["query"])), config(), [batch])
    decoder = tiny_model("bert", "BertModel", is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="never reach .*crossattention.* to exclude"):
        prune(decoder, config(), [batch])
    prune_(decoder, config(exclude=".*crossattention"), [batch])


def test_tied_weights_are_pruned_once_or_refused(caplog):
    model = tiny_model("bert", TEXT)
    first, *_, last = find_blocks(model)
    last.attention.inputs[0].weight = first.attention.inputs[0].weight
    with caplog.at_level(logging.INFO):
        pruned = prune(model, config(0.5), [tiny_batch(model)])
    assert "Tied to weights of earlier layers" in " ".join(caplog.messages)
    assert {mask.double().mean().item() for mask in zeros(pruned).values()} == {0.5}
    with pytest.raises(ValueError, match="is tied to that of .*, which stays whole"):
        prune(model, config(0.5, exclude=[last.name]), [tiny_batch(model)])
