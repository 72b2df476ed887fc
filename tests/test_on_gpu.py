"""On a GPU: every number format, pruning and distillation give what they give on a CPU, and are stored alike."""

import copy

import bitsandbytes as bnb
import pytest
import torch

import hf_compress as hc
from hf_compress.pruning.prune import prune
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig
from hf_compress.quantization.quantize import quantize
from tests.distillation import tiny
from tests.distillation.tiny import ALL_TASKS, make_trainer
from tests.modeling.tiny import MODEL_TYPES, predict, tiny_batch, tiny_model
from tests.quantization import test_bitsandbytes, test_reload
from tests.quantization.test_reload import assert_same, reload
from tests.quantization.wide import wide_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA"),
]
FORMATS = test_reload.CONFIGS | {"bf16": hc.FloatConfig("bf16"), "fp16": hc.FloatConfig("fp16")}
# Sums are rounded in another order.
CLOSE = 5e-3


def on_gpu(model):
    return copy.deepcopy(model).cuda()


def predict_there(model, batch) -> torch.Tensor:
    return predict(model, {name: tensor.cuda() for name, tensor in batch.items()}).cpu().float()


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_formats_predict_and_are_stored_as_on_a_cpu(model_type, format_name, tmp_path):
    model = tiny_model(model_type)
    quantized = quantize(model, FORMATS[format_name])
    moved = on_gpu(quantized)
    batch = tiny_batch(model)
    is_half = format_name in ("bf16", "fp16")
    assert relative(predict_there(moved, batch), predict(quantized, batch).float()) < (0.1 if is_half else CLOSE)
    assert_same(reload(moved, tmp_path), quantized)
    made_there = quantize(on_gpu(model), FORMATS[format_name]).state_dict()
    for name, tensor in quantized.state_dict().items():
        found = made_there[name].cpu()
        if tensor.is_floating_point():
            # Quotients are rounded in another way.
            torch.testing.assert_close(found, tensor, msg=name)
        else:
            # A number halfway between two may be rounded either way.
            assert (found == tensor).double().mean() >= 0.99, name


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("format_name", test_bitsandbytes.CONFIGS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bitsandbytes_comes_back_exactly_before_and_after_an_inference(model_type, format_name, tmp_path):
    model = wide_model(model_type)
    batch = tiny_batch(model)
    on_cpu = predict(quantize(model, test_bitsandbytes.CONFIGS[format_name]), batch).float()
    quantized = quantize(model.cuda(), test_bitsandbytes.CONFIGS[format_name])
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    expected = predict_there(quantized, batch)
    assert any(isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit) for module in quantized.modules())
    assert relative(expected, on_cpu) < 0.2
    for number in range(2):
        quantized.save_pretrained(tmp_path / str(number))
        again = type(model).from_pretrained(tmp_path / str(number), attn_implementation="eager", device_map="cuda")
        found = again.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
        assert torch.equal(predict_there(again, batch), expected)
        quantized = again


@pytest.mark.parametrize("n_tokens", [1, 3, 40])
def test_int8_does_not_depend_on_the_batch(n_tokens):
    model = quantize(tiny_model("bert").cuda(), hc.Int8DynamicConfig())
    ids = torch.randint(3, 40, (6, n_tokens), device="cuda")
    together = predict_there(model, {"input_ids": ids})
    for row, text in zip(together, ids, strict=True):
        torch.testing.assert_close(predict_there(model, {"input_ids": text[None]})[0], row, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_equal_models_have_no_loss(task, tmp_path):
    model = tiny.tiny_model(task, 2, seed=2)
    trainer = make_trainer(task, tmp_path, model, copy.deepcopy(model), use_cpu=False, alpha=1.0)
    trainer.train()
    assert trainer.args.device.type == "cuda"
    assert abs(trainer.state.log_history[0]["kd_loss"]) < 1e-6


@pytest.mark.parametrize("task", ALL_TASKS)
def test_gradients_are_those_of_a_cpu(task, tmp_path):
    here, there = (tiny.step_gradients(task, tmp_path, 4, 2, use_cpu=use_cpu) for use_cpu in (True, False))
    assert tiny.relative_difference(here, {name: value.cpu() for name, value in there.items()}) < CLOSE


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_cache_stands_for_the_teacher(task, precision, tmp_path):
    settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "use_cpu": False, **precision}
    rows, teacher = tiny.tiny_rows(task), tiny.tiny_model(task, 2, seed=2).cuda()
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if precision else None
    held = hc.TeacherCache.build(
        tmp_path / "cache", teacher, rows, data_collator=tiny.PadCollator(), batch_size=8, autocast_dtype=dtype
    )
    online = make_trainer(task, tmp_path, teacher, **settings)
    cached = make_trainer(task, tmp_path, teacher, cache=held, **settings)
    online.train(), cached.train()
    for name, value in online.model.state_dict().items():
        torch.testing.assert_close(value, cached.model.state_dict()[name], rtol=0, atol=0.02)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
def test_single_weights_are_pruned_as_on_a_cpu(model_type, score):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    settings = UnstructuredPruningConfig(0.5, score=score)
    here = prune(model, settings, [batch]).state_dict()
    there = prune(on_gpu(model), settings, [batch]).state_dict()
    for name, tensor in here.items():
        assert there[name].is_cuda
        assert ((there[name].cpu() == 0) != (tensor == 0)).double().mean() < 0.02, name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("score", ["obs", "l2"])
def test_structures_are_pruned_as_on_a_cpu(model_type, score, tmp_path):
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    settings = hc.StructuredPruningConfig(budget=0.6, score=score)
    here, there = prune(model, settings, [batch]), prune(on_gpu(model), settings, [batch])
    assert {name: tensor.shape for name, tensor in here.state_dict().items()} == {
        name: tensor.shape for name, tensor in there.state_dict().items()
    }
    assert relative(predict_there(there, batch), predict(here, batch)) < CLOSE
    there.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert all(torch.equal(tensor.cpu(), again.state_dict()[name]) for name, tensor in there.state_dict().items())
