"""Training for quantization: gradients are those of the formulas, and what is trained is what is converted."""

import copy
import logging
import re
import textwrap

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_compress
from hf_compress.evaluation.inference import inference
from hf_compress.formats.binary import BinaryLinear
from hf_compress.quantization.binary import ElasticInputs, binary_weight, elastic_numbers
from hf_compress.quantization.config import BinaryConfig, FixedPointConfig, Int8DynamicConfig
from hf_compress.quantization.fake_quant import detach_, fake_quantized, int8_rows, scale_gradient
from hf_compress.quantization.fake_quant_fixed_point import FixedPointInputs, fixed_point_rows, learned_step
from hf_compress.quantization.fixed_point import fit_weights
from hf_compress.quantization.quantize import quantize, quantize_
from hf_compress.quantization.training import BinaryCurriculum, fake_quantize_, set_activation_bits_
from tests.distillation import tiny as distillation
from tests.modeling.tiny import MODEL_TYPES, difference, predict, tiny_batch, tiny_model

CONFIGS = {"int8": Int8DynamicConfig(), "int8-tables": Int8DynamicConfig(embeddings=True)} | {
    f"binary-{bits}": BinaryConfig(activations=bits) for bits in (1, 2, 4, 8, 32)
}
CONFIGS |= {
    "fixed-8": FixedPointConfig(),
    "fixed-8-8": FixedPointConfig(activations=8, symmetric=False, ranges="mse"),
    "fixed-4-8": FixedPointConfig(bits=4, granularity="group", group_size=5, activations=8),
    "fixed-8-8-two": FixedPointConfig(activations=8, granularity="per_tensor", power_of_two=True),
}
# The formats with most to go wrong for every architecture, and all of them for two.
EVERYWHERE = ("int8", "fixed-4-8", "binary-1", "binary-8")
CASES = [(model_type, name) for model_type in MODEL_TYPES for name in EVERYWHERE]
CASES += [(model_type, name) for model_type in ("bert", "gpt2") for name in CONFIGS if name not in EVERYWHERE]


def prepared(model, config):
    model = copy.deepcopy(model)
    fake_quantize_(model, config, [tiny_batch(model)])
    return model


def gradients(function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return torch.autograd.grad((output * torch.arange(1.0, output.numel() + 1).view(output.shape)).sum(), leaves)


X = torch.tensor([-9.0, -1.2, -0.3, 0.1, 0.6, 1.4, 9.0])
UPSTREAM = torch.arange(1.0, 8.0)


@pytest.mark.parametrize(
    ("bits", "is_signed", "lowest", "highest"), [(1, False, 0, 1), (2, True, -2, 1), (4, False, 0, 15)]
)
def test_gradients_of_a_learned_step(bits, is_signed, lowest, highest):
    alpha, beta = torch.tensor([0.5]), torch.tensor([0.2])
    found = gradients(lambda x, a, b: a * elastic_numbers(x, a, b, bits, is_signed), X, alpha, beta)
    z = (X - beta) / alpha
    inside = (z >= lowest) & (z <= highest)
    steps = torch.where(z < lowest, float(lowest), torch.where(z > highest, float(highest), z.round() - z))
    assert torch.allclose(found[0], UPSTREAM * inside)
    assert torch.allclose(found[1], (UPSTREAM * steps).sum(), atol=1e-5)
    assert torch.allclose(found[2], -(UPSTREAM * inside).sum())


def test_gradients_of_learned_signs():
    alpha, beta = torch.tensor([0.5]), torch.tensor([0.2])
    found = gradients(lambda x, a, b: a * elastic_numbers(x, a, b, 1, True), X, alpha, beta)
    inside = ((X - beta) / alpha).abs() <= 1
    assert torch.allclose(found[0], UPSTREAM * inside)
    assert torch.allclose(found[1], (UPSTREAM * torch.where(X < beta, -1, 1)).sum())
    assert torch.allclose(found[2], -(UPSTREAM * inside).sum())


def test_gradients_of_a_learned_step_in_fixed_point():
    scale, zero = torch.tensor([0.5]), torch.tensor([-3.0])
    found = gradients(lambda x, s: s * learned_step(x, s, zero, 4, False), X, scale)
    z, lowest, highest = X / scale, -8 + 3, 7 + 3
    inside = (z >= lowest) & (z <= highest)
    steps = torch.where(z < lowest, float(lowest), torch.where(z > highest, float(highest), z.round() - z))
    assert torch.allclose(found[0], UPSTREAM * inside)
    assert torch.allclose(found[1], (UPSTREAM * steps).sum(), atol=1e-5)


def fixed_point_weight(matrix):
    config = CONFIGS["fixed-4-8"]
    return fixed_point_rows(matrix, fit_weights(matrix.detach(), config), config), torch.ones(3)


@pytest.mark.parametrize("formula", [binary_weight, int8_rows, fixed_point_weight])
def test_weights_get_the_gradient_of_what_they_were_rounded_to(formula):
    def rounded(matrix):
        numbers, scales = formula(matrix)
        return numbers * scales.view(-1, 1)

    matrix = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gradients(rounded, matrix)[0], torch.arange(1.0, 25).view(3, 8), rtol=1e-5)
    assert gradients(rounded, torch.zeros(3, 8))[0].isfinite().all()


def test_a_scaled_gradient_leaves_the_values():
    values = torch.randn(5)
    assert torch.equal(scale_gradient(values, 0.1), values)
    assert torch.allclose(gradients(lambda x: scale_gradient(x, 0.5), values)[0], torch.arange(1.0, 6) / 2)


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_converted_predicts_what_was_trained(model_type, name):
    model = tiny_model(model_type)
    before = predict(model, tiny_batch(model))
    student = prepared(model, CONFIGS[name])
    assert not getattr(student, "is_quantized", False)
    assert "quantization_config" not in vars(student.config)
    plain = copy.deepcopy(student)
    detach_(plain)
    assert difference(predict(plain, tiny_batch(model)), before) == 0
    with torch.no_grad():
        for module in student.modules():
            # As if it had been trained.
            if isinstance(module, ElasticInputs):
                module.threshold.add_(0.1)
            if isinstance(module, ElasticInputs | FixedPointInputs):
                module.log_scale.sub_(0.2)
    trained = predict(student, tiny_batch(model))
    assert difference(trained, before) > 0
    assert difference(trained, predict(quantize(student, CONFIGS[name]), tiny_batch(model))) <= 1e-3


def training_arguments(folder, **settings):
    defaults = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 4,
        "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": 2, "save_steps": 2,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **settings})


def student_of(config):
    model = distillation.tiny_model("single-label", layers=2, seed=1)
    fake_quantize_(model, config, batches())
    return model


def batches():
    rows = distillation.tiny_rows("single-label")
    return [distillation.PadCollator()(rows)]


def stock_trainer(folder, config, callbacks=None, **settings):
    return Trainer(
        model=student_of(config),
        args=training_arguments(folder, **settings),
        train_dataset=distillation.tiny_rows("single-label"),
        data_collator=distillation.PadCollator(),
        callbacks=callbacks,
    )


def test_learned_scales_have_no_weight_decay(tmp_path):
    trainer = stock_trainer(tmp_path, BinaryConfig(activations=4))
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    learned = [name for name in decays if ".input_norm." in name]
    assert len(learned) == 2 * len(fake_quantized(trainer.model))
    assert {decays[name] for name in learned} == {0.0}
    projections = [f"{name}.weight" for name, _ in fake_quantized(trainer.model)]
    assert {decays[name] for name in projections} == {0.1}


@pytest.mark.parametrize("name", ["int8", "fixed-4-8", "binary-1", "binary-8"])
def test_a_resumed_training_ends_where_an_unbroken_one_does(name, tmp_path):
    unbroken = stock_trainer(tmp_path / "one", CONFIGS[name])
    before = copy.deepcopy(unbroken.model.state_dict())
    unbroken.train()
    resumed = stock_trainer(tmp_path / "two", CONFIGS[name])
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    after = resumed.model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in unbroken.model.state_dict().items())
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any(".query.weight" in one for one in moved)
    assert any(".input_norm.log_scale" in one for one in moved) == (name != "int8")
    assert any(".input_norm.threshold" in one for one in moved) == name.startswith("binary")


@pytest.mark.parametrize("has_data", [True, False])
def test_a_resumed_curriculum_goes_on_with_the_bits_of_its_checkpoint(has_data, tmp_path):
    stages = {0.0: 8, 0.25: 4, 0.75: 1}
    seen = []

    def trained(folder, resume=None):
        curriculum = BinaryCurriculum(stages, batches() if has_data else None)
        trainer = stock_trainer(folder, BinaryConfig(activations=8), [curriculum])
        trainer.train(resume_from_checkpoint=resume)
        seen.append({module.input_norm.bits for _, module in fake_quantized(trainer.model)})
        return trainer.model

    unbroken = trained(tmp_path / "one")
    resumed = trained(tmp_path / "two", str(tmp_path / "one" / "checkpoint-2"))
    assert seen == [{1}, {1}]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in unbroken.state_dict().items())
    assert quantize(unbroken, BinaryConfig(activations=1)).is_quantized


@pytest.mark.parametrize("name", ["int8", "fixed-8-8", "binary-1", "binary-4", "binary-32"])
def test_distillation_gives_one_gradient_however_a_step_is_cut(name, tmp_path):
    found = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        recorder = distillation.GradientRecorder()
        distillation.make_trainer(
            "single-label", tmp_path, student=student_of(CONFIGS[name]), callbacks=[recorder],
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        ).train()  # fmt: skip
        found.append(recorder.gradients)
    assert distillation.relative_difference(*found) <= 1e-5
    names = [one for one, gradient in found[0].items() if gradient.any()]
    assert any("input_norm" in one for one in names) == (name not in ("int8", "binary-32"))


def test_the_recipe_of_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = re.search(r"\n\n((?: {8}.*\n)+)\n", fake_quantize_.__doc__).group(1)
    teacher = distillation.tiny_model("single-label", layers=1)
    # Without a tokenizer, texts are of one length.
    rows = [{"input_ids": [3, n + 4, 5], "labels": n % 3} for n in range(8)]
    names = {"teacher": teacher, "rows": Dataset.from_list(rows), "tokenizer": None, "batches": batches()}
    everything = {**vars(hf_compress.quantization.training), **names, "copy": copy, "quantize": quantize}
    everything |= {name: getattr(hf_compress, name) for name in hf_compress.__all__}
    exec(textwrap.dedent(recipe), everything)
    converted = AutoModelForSequenceClassification.from_pretrained("binary")
    assert {m.fields["activations"] for m in converted.modules() if isinstance(m, BinaryLinear)} == {1}
    assert difference(*(predict(model, batches()[0]) for model in (converted, everything["student"].eval()))) <= 1e-6


def test_a_checkpoint_in_training_is_loaded_by_preparing_again(tmp_path, caplog):
    student = student_of(BinaryConfig(activations=4))
    set_activation_bits_(student, 2, batches())
    student.save_pretrained(tmp_path)
    monitor = logging.getLogger("transformers")
    monitor.propagate = True
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    finally:
        monitor.propagate = False
    assert "input_norm.log_scale" in caplog.text
    fake_quantize_(plain, BinaryConfig(activations=8), batches())
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    inputs = {name: value for name, value in batches()[0].items() if name != "labels"}
    assert difference(predict(plain, inputs), predict(student.eval(), inputs)) == 0
    assert quantize(plain, BinaryConfig(activations=2)).is_quantized


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_bits_change_in_place(bits):
    model = tiny_model("bert")
    student = prepared(model, BinaryConfig(activations=4))
    weights = {name: parameter for name, parameter in student.named_parameters() if "input_norm" not in name}
    set_activation_bits_(student, bits, [tiny_batch(model)])
    fresh = prepared(model, BinaryConfig(activations=bits))
    assert all(parameter is weights[name] for name, parameter in student.named_parameters() if name in weights)
    assert difference(predict(student, tiny_batch(model)), predict(fresh, tiny_batch(model))) == 0
    with pytest.raises(ValueError, match=f"trained for .*activations={bits}.* quantized to .*activations=4"):
        quantize(student, BinaryConfig(activations=4))


def test_bits_that_cannot_be_fitted_leave_the_model_as_it_was():
    student = prepared(tiny_model("bert"), BinaryConfig(activations=4))
    before = copy.deepcopy(student.state_dict())
    for bits, batch in ((1, {"inputs_embeds": torch.full((1, 3, 32), torch.inf)}), (3, tiny_batch(student))):
        with pytest.raises(ValueError, match="cannot be fitted|bits are not known"):
            set_activation_bits_(student, bits, [batch])
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert quantize(student, BinaryConfig(activations=4)).is_quantized


def test_modules_keep_parameters_hooks_and_modes():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].attn.eval()
    before = dict(model.named_parameters())
    modules, modes = dict(model.named_modules()), [module.training for module in model.modules()]
    fake_quantize_(model, BinaryConfig(activations=4), [tiny_batch(model)])
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert [model.get_submodule(name).training for name in modules] == modes


def test_what_cannot_be_trained_for_is_refused():
    model = tiny_model("bert")
    with pytest.raises(TypeError, match="str: give one of"):
        fake_quantize_(model, "int8")
    with pytest.raises(ValueError, match="smooth=0.5 .* leave smooth out"):
        fake_quantize_(model, Int8DynamicConfig(smooth=0.5))
    with pytest.raises(ValueError, match="activations=4 needs data"):
        fake_quantize_(model, BinaryConfig(activations=4))
    with pytest.raises(ValueError, match="not prepared for weights of one bit"):
        set_activation_bits_(model, 4, [tiny_batch(model)])
    with pytest.raises(RuntimeError):
        # More tokens than there are positions.
        fake_quantize_(model, BinaryConfig(), [{"input_ids": torch.zeros(1, 4096, dtype=torch.long)}])
    unfit = [{"inputs_embeds": torch.full((1, 3, 32), torch.nan)}]
    with pytest.raises(ValueError, match="bert.encoder.layer.0.attention.self.query cannot be fitted"):
        fake_quantize_(model, BinaryConfig(), unfit)
    assert not fake_quantized(model)
    assert {type(module) for module in model.modules() if hasattr(module, "in_features")} == {nn.Linear}
    fake_quantize_(model, BinaryConfig(activations=32))
    with pytest.raises(ValueError, match="was prepared for BinaryConfig.* already"):
        fake_quantize_(model, BinaryConfig(activations=32))
    with pytest.raises(ValueError, match="shares of the training"):
        BinaryCurriculum({1.0: 4})


def test_sums_of_whole_numbers_do_not_overflow_in_float16():
    model = tiny_model("bert").eval()
    layer = model.base_model.encoder.layer[0]
    for parameter, value in ((layer.intermediate.dense.weight, 0.0), (layer.intermediate.dense.bias, 1.0)):
        nn.init.constant_(parameter, value)
    # Sums of 127 x 127 over all neurons, where float16 ends at 65,504.
    nn.init.constant_(layer.output.dense.weight, 1.0)
    fake_quantize_(model, Int8DynamicConfig())
    inputs = tiny_batch(model)
    expected = predict(model, inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        found = predict(model, inputs)
    assert difference(found.float(), expected) < 0.05 * expected.abs().max()


def test_loading_the_best_of_a_curriculum_is_warned_of(tmp_path, caplog):
    stages = {0.0: 8, 0.5: 1}
    trainer = stock_trainer(tmp_path, BinaryConfig(activations=8), [BinaryCurriculum(stages, batches())])
    trainer.args.load_best_model_at_end = True
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "may end with the weights of an earlier stage" in caplog.text


@pytest.mark.parametrize(
    "config", [FixedPointConfig(bits=4), Int8DynamicConfig(embeddings=True)], ids=["fixed", "int8"]
)
def test_tables_that_were_trained_for_rounding_are_packed(config, tmp_path):
    model = tiny_model("bert", "BertForSequenceClassification")
    trained = prepared(model, config)
    packed = quantize(trained, config)
    assert not fake_quantized(packed)
    packed.save_pretrained(tmp_path)
    inputs = tiny_batch(model)
    again = type(packed).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(predict(again, inputs), predict(packed, inputs)) == 0
    assert difference(predict(packed, inputs), predict(trained, inputs)) < 1e-3


def test_submodules_keep_their_modes_while_ranges_are_measured():
    model = tiny_model("bert").train()
    model.base_model.embeddings.eval()
    modes = [module.training for module in model.base_model.embeddings.modules()]
    quantize_(model, FixedPointConfig(activations=8), [tiny_batch(model)])
    assert [module.training for module in model.base_model.embeddings.modules()][: len(modes)] == modes
    assert model.training


@pytest.mark.parametrize("settings", [{"hidden_size": 16}, {"init": "random"}])
def test_students_that_would_forget_the_rounding_are_refused(settings):
    model = tiny_model("bert")
    fake_quantize_(model, Int8DynamicConfig())
    with pytest.raises(ValueError, match="was prepared by fake_quantize_"):
        hf_compress.make_student(model, hf_compress.StudentConfig(**settings))


def test_what_a_training_in_bfloat16_leaves_is_not_copied_or_measured(tmp_path):
    trainer = distillation.make_trainer("single-label", tmp_path, bf16=True)
    trainer.train()
    model = trainer.model
    model.save_pretrained(tmp_path / "saved")
    inputs = batches()[0]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    saved = predict(type(model).from_pretrained(tmp_path / "saved"), inputs)
    assert "_original_forward" in vars(model)
    with inference(model):
        assert difference(model(**inputs).logits, saved) == 0
    assert "_original_forward" in vars(model)
    student = hf_compress.make_student(model, hf_compress.StudentConfig(num_layers=1)).eval()
    assert difference(predict(student, inputs), saved) == 0
    again = distillation.make_trainer("single-label", tmp_path / "again", student=student, bf16=True)
    again.train()
    assert "_original_forward" in vars(student)
    hf_compress.quantize_(model, Int8DynamicConfig())
    model.save_pretrained(tmp_path / "int8")
    assert difference(predict(model, inputs), predict(type(model).from_pretrained(tmp_path / "int8"), inputs)) == 0
