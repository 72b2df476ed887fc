"""Models that compute with sparse weights: equal to dense ones, saved as those, and by which times they are chosen."""

import copy
import hashlib
import logging

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn

from hf_compress.checkpoint.sparse import BITMASK, mark_sparse_
from hf_compress.modeling.projections import write_matrix_
from hf_compress.modeling.surgery import keep_layers_
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.prune import prune, prune_
from hf_compress.pruning.sparse_compute import _kind, dense_kernels, use_dense_kernels_, use_sparse_kernels_
from hf_compress.pruning.sparse_formats import PACKERS
from hf_compress.pruning.sparse_report import choose
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.pruning.weight_layers import find_layers
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from tests.modeling.tiny import MODEL_TYPES, auto_class, difference, predict, tiny_batch, tiny_model

ON_CPU = [name for name in PACKERS if name != "semi_structured"]


def sparse_model(model_type="bert", pattern=(2, 1), class_name=None) -> nn.Module:
    config = UnstructuredPruningConfig(0.6, score="magnitude", pattern=pattern)
    return prune(tiny_model(model_type, class_name), config)


def formats(model) -> dict[str, str]:
    return {layer.name: vars(layer.module).get("sparse_format", "dense") for layer in find_layers(model)}


def fake_timer(of_layers, of_models=(2.0, 1.0), log=None):
    """Runs each call once and returns given times: of layers' formats, then of the dense and the sparse model."""

    def time(calls, device, n_warmup, n_runs):
        for call in calls:
            call()
        is_model = len(calls) == 2 and isinstance(calls[1].func, nn.Module)
        if log is not None:
            log.append(("model" if is_model else "layer", n_runs))
        return np.tile((of_models if is_model else of_layers)[: len(calls)], (n_runs, 1))

    return time


def digest(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_computes_the_same_in_every_format_and_is_saved_the_same(model_type, tmp_path):
    model = sparse_model(model_type)
    mark_sparse_(model, [f"{layer.name}.weight" for layer in find_layers(model)])
    batch = tiny_batch(model)
    one = {name: tensor[:1] for name, tensor in batch.items()}
    wanted, wanted_of_one = predict(model, batch), predict(model, one)
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "dense")
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        assert any(name.endswith(BITMASK) for name in file.keys())
    for name in ON_CPU:
        report = use_sparse_kernels_(model, sparse_compute=name)
        assert set(formats(model).values()) == {name} == {layer.chosen for layer in report.layers}
        assert difference(predict(model, batch), wanted) < 1e-5
        assert difference(predict(model, one), wanted_of_one) < 1e-5
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model.save_pretrained(tmp_path / name)
        assert digest(tmp_path / name) == digest(tmp_path / "dense")
        copied = copy.deepcopy(model)
        assert formats(copied) == formats(model)
        assert difference(predict(copied, batch), predict(model, batch)) == 0
    reloaded = auto_class(model_type).from_pretrained(tmp_path / "csr", attn_implementation="eager")
    assert set(formats(reloaded).values()) == {"dense"}
    assert difference(predict(reloaded, batch), wanted) == 0
    use_dense_kernels_(model)
    assert set(formats(model).values()) == {"dense"}
    assert difference(predict(model, batch), wanted) == 0


@pytest.mark.parametrize("name", ON_CPU)
def test_text_is_generated_as_by_the_dense_model(name):
    model = sparse_model("llama")
    ids = tiny_batch(model)["input_ids"][:, :4]
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    use_sparse_kernels_(model, sparse_compute=name)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), wanted)


def test_models_without_some_heads_and_neurons_too():
    cut = StructuredPruningConfig(budget=0.6, score="l2", repair="none")
    model = tiny_model("bert", "BertForSequenceClassification")
    model = prune(model, cut, [tiny_batch(model)])
    prune_(model, UnstructuredPruningConfig(0.6, score="magnitude"))
    wanted = predict(model, tiny_batch(model))
    for name in ("csr", "row_groups", "sliced"):
        use_sparse_kernels_(model, sparse_compute=name)
        assert difference(predict(model, tiny_batch(model)), wanted) < 1e-5


def test_bfloat16():
    model = sparse_model().bfloat16()
    wanted = predict(model, tiny_batch(model))
    use_sparse_kernels_(model, sparse_compute="row_groups")
    assert difference(predict(model, tiny_batch(model)), wanted) < 0.05 * wanted.abs().max()


def test_hooks_and_identities_stay():
    model = sparse_model()
    layer = find_layers(model)[0]
    seen = []
    layer.module.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    use_sparse_kernels_(model, sparse_compute="csr")
    assert find_layers(model)[0].module is layer.module
    assert isinstance(layer.module, nn.Linear)
    predict(model, tiny_batch(model))
    assert len(seen) == 1


@pytest.mark.parametrize("change", ["load", "prune", "write", "double"])
def test_changed_weights_are_seen(change):
    model = sparse_model()
    use_sparse_kernels_(model, sparse_compute="row_groups")
    before = predict(model, tiny_batch(model))
    if change == "load":
        model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    elif change == "prune":
        prune_(model, UnstructuredPruningConfig(0.8, score="magnitude"))
    elif change == "write":
        layer = find_layers(model)[2]
        write_matrix_(layer.module, layer.weight * 2)
    else:
        model.double()
    found = predict(model, tiny_batch(model))
    assert change == "double" or difference(found, before) > 1e-3
    with dense_kernels(model):
        assert difference(predict(model, tiny_batch(model)), found) < 1e-5
    assert set(formats(model).values()) == {"row_groups"}


def test_weights_that_no_longer_fit_are_refused():
    model = sparse_model()
    use_sparse_kernels_(model, sparse_compute="csr")
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"no longer fits sparse_compute='csr'.*use_dense_kernels_"):
        predict(model, tiny_batch(model))
    use_dense_kernels_(model)
    predict(model, tiny_batch(model))


def test_training_is_refused_until_the_model_is_dense_again():
    model = sparse_model()
    use_sparse_kernels_(model, sparse_compute="csr")
    with pytest.raises(RuntimeError, match="use_dense_kernels_"):
        model(**tiny_batch(model))
    use_dense_kernels_(model)
    model(**tiny_batch(model)).logits.sum().backward()
    assert all(layer.module.weight.grad is not None for layer in find_layers(model))


def test_autocast_is_refused():
    model = sparse_model()
    use_sparse_kernels_(model, sparse_compute="row_groups")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="leave out autocast"):
        predict(model, tiny_batch(model))


def test_the_fastest_is_chosen_where_it_is_clear():
    steady = {"dense": [10.0] * 9, "csr": [8.0] * 9, "bsr": [9.0] * 9}
    assert choose(steady) == "csr"
    assert choose({"dense": [10.0] * 9, "csr": [9.8] * 9}) == "dense"
    assert choose({"dense": [10.0] * 9, "csr": [9.8] * 9}, margin=0.01) == "csr"
    assert choose({"dense": [10.0] * 9, "csr": [12.0] * 9}) == "dense"
    assert choose({"dense": [10.0]}) == "dense"
    with pytest.raises(ValueError, match="time it too"):
        choose({"csr": [1.0]})


def test_noise_makes_the_choice_dense_or_the_steadier_one():
    noisy = [2.0, 2.0, 8.0, 8.0, 9.0, 30.0, 30.0, 30.0]
    assert choose({"dense": [10.0] * 8, "csr": noisy}) == "dense"
    assert choose({"dense": [10.0] * 8, "csr": noisy, "bsr": [9.0] * 8}) == "bsr"
    # The same spread over a thousand times as many rounds is noise no more.
    assert choose({"dense": [10.0] * 8000, "csr": 1000 * noisy}) == "csr"


def test_auto_follows_the_times_and_takes_them_once_per_kind(caplog):
    model = sparse_model()
    log = []
    with caplog.at_level(logging.INFO):
        report = use_sparse_kernels_(model, tiny_batch(model), timer=fake_timer([2.0, 3.0, 1.0, 3.9, 3.8], log=log))
    assert set(formats(model).values()) == {"bsr"}
    # 32 x 32, 24 x 32 and 32 x 24, of which zeros may differ a little, and the whole model.
    assert len(log) - 1 < 2 * len(report.layers)
    assert log[:2] == [("layer", 3), ("layer", 30)]
    assert log[-1] == ("model", 30)
    assert report.times == {"dense": 2.0, "sparse": 1.0}
    first = report.layers[0]
    assert (first.shape, first.chosen, first.n_tokens) == ((32, 32), "bsr", 16)
    assert first.times["dense"] == 2.0
    assert first.times["bsr"] == 1.0
    assert 0.5 < first.sparsity < 0.7
    assert report.describe() in caplog.text
    assert first.layer in report.describe()
    assert report.to_dict()["layers"][0]["shape"] == [32, 32]
    with torch.no_grad():
        model(**tiny_batch(model))


def test_two_of_four_is_a_kind_of_its_own():
    model = tiny_model("bert")
    for pattern, exclude in (("2:4", r".*layer\.[1-9]"), (None, r".*layer\.0")):
        settings = {"pattern": pattern, "exclude": [exclude], "score": "random"}
        model = prune(model, UnstructuredPruningConfig(0.5, **settings))
    one, other = [layer for layer in find_layers(model) if layer.name.endswith("attention.self.query")][:2]
    assert _kind(one) != _kind(other)


def test_formats_that_are_far_behind_are_not_timed_on():
    counts = []

    def time(calls, device, n_warmup, n_runs):
        counts.append(len(calls))
        return np.tile(([10.0, 25.0, 9.0, 30.0, 30.0] if len(calls) > 2 else [10.0, 8.0])[: len(calls)], (n_runs, 1))

    model = sparse_model()
    report = use_sparse_kernels_(model, tiny_batch(model), timer=time)
    assert set(counts[1::2]) == {2}
    assert {layer.chosen for layer in report.layers} == {"bsr"}
    assert report.layers[0].times["csr"] == 25
    assert report.layers[0].times["bsr"] == 8


def test_auto_stays_dense_where_nothing_is_faster_or_the_whole_is_not():
    model = sparse_model()
    wanted = predict(model, tiny_batch(model))
    for timer in (fake_timer([1.0] * 5), fake_timer([2.0, 1.0, 1.0, 1.0, 1.0], of_models=(1.0, 1.1))):
        report = use_sparse_kernels_(model, tiny_batch(model), timer=timer)
        assert set(formats(model).values()) == {"dense"} == {layer.chosen for layer in report.layers}
        assert difference(predict(model, tiny_batch(model)), wanted) == 0


@pytest.mark.parametrize("model_type", ["bart", "deberta-v2", "gpt2", "albert", "vit"])
def test_auto_on_architectures_with_layers_of_several_kinds(model_type):
    model = sparse_model(model_type)
    wanted = predict(model, tiny_batch(model))
    report = use_sparse_kernels_(model, tiny_batch(model), timer=fake_timer([2.0, 1.0, 1.5, 1.5, 1.5]))
    assert {layer.chosen for layer in report.layers} == {"csr"}
    assert all(layer.n_tokens for layer in report.layers)
    assert difference(predict(model, tiny_batch(model)), wanted) < 1e-5


def test_a_model_without_zeros_stays_dense_with_a_warning(caplog):
    model = tiny_model("bert")
    use_sparse_kernels_(model, tiny_batch(model))
    assert set(formats(model).values()) == {"dense"}
    assert "prune the model first" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparse_compute": "coo"}, "'coo' is unknown: give one of 'auto', 'dense', 'csr'"),
        ({"sparse_compute": "semi_structured"}, "only NVIDIA GPUs"),
        ({"sparse_compute": "auto"}, "batch=None"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(values, message):
    model = sparse_model()
    use_sparse_kernels_(model, sparse_compute="sliced")
    with pytest.raises(ValueError, match=message):
        use_sparse_kernels_(model, **values)
    assert set(formats(model).values()) == {"sliced"}


def test_formats_that_cannot_hold_a_layer_are_refused_before_anything_changes():
    model = sparse_model().bfloat16()
    with pytest.raises(ValueError, match=r"'csr' cannot hold .*torch.bfloat16.*sparse_compute='auto'"):
        use_sparse_kernels_(model, sparse_compute="csr")
    odd = tiny_model("bert", intermediate_size=23)
    prune_(odd, UnstructuredPruningConfig(0.6, score="magnitude"))
    with pytest.raises(ValueError, match="do not divide 23 x 32"):
        use_sparse_kernels_(odd, sparse_compute="bsr")
    for each in (model, odd):
        assert set(formats(each).values()) == {"dense"}


def test_a_timer_that_fails_leaves_the_model_as_it_was():
    def broken(*_):
        raise MemoryError

    model = sparse_model()
    use_sparse_kernels_(model, sparse_compute="csr")
    with pytest.raises(MemoryError):
        use_sparse_kernels_(model, tiny_batch(model), timer=broken)
    assert set(formats(model).values()) == {"csr"}


@pytest.mark.gpu
def test_auto_on_a_gpu():
    model = prune(tiny_model("bert", hidden_size=64), UnstructuredPruningConfig(pattern="2:4", score="magnitude"))
    model = model.to("cuda", torch.bfloat16)
    batch = {name: tensor.cuda() for name, tensor in tiny_batch(model).items()}
    wanted = predict(model, batch)
    use_sparse_kernels_(model, batch)
    assert difference(predict(model, batch), wanted) < 0.05 * wanted.abs().max()


def test_what_sparse_kernels_do_not_go_with():
    model = sparse_model(pattern=None)
    use_sparse_kernels_(model, sparse_compute="row_groups")
    with pytest.raises(ValueError, match="computes with sparse kernels.*use_dense_kernels_"):
        quantize(model, Int8DynamicConfig())
    use_dense_kernels_(model)
    quantize(model, Int8DynamicConfig())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, ModelHook())
    with pytest.raises(TypeError, match="without hooks of accelerate"):
        use_sparse_kernels_(model, sparse_compute="row_groups")


def test_sparse_models_lose_layers(tmp_path):
    model = prune(tiny_model("bert"), UnstructuredPruningConfig(0.6, score="magnitude"))
    keep_layers_(model, [0, 2])
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert difference(predict(reloaded, tiny_batch(model)), predict(model.eval(), tiny_batch(model))) == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_merged_adapters_are_seen():
    model = tiny_model("bert")
    sparse = prune(model, UnstructuredPruningConfig(0.9, score="magnitude", repair="none"))
    inputs = tiny_batch(model)
    use_sparse_kernels_(sparse, sparse_compute="csr")
    predict(sparse, inputs)
    settings = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    merged = get_peft_model(sparse, settings).eval().merge_and_unload()
    found = predict(merged, inputs)
    use_dense_kernels_(merged)
    assert difference(found, predict(merged, inputs)) < 1e-5
