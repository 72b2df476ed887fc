"""Terms inside the models: exact gradients, zero for equal models, layers, projections, stages, what is logged."""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from hf_compress import DistillationArguments, StageConfig, StudentConfig, TermConfig, make_student
from hf_compress.distillation.curriculum import plan_stages, stage_lengths
from hf_compress.distillation.inner_terms import plan_terms
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.layouts import LAYOUTS
from hf_compress.modeling.removal import remove_attention_
from hf_compress.quantization.config import Int8DynamicConfig
from hf_compress.quantization.quantize import quantize
from tests.distillation import tiny
from tests.distillation.tiny import GradientRecorder, make_trainer, relative_difference, tiny_model, tiny_rows
from tests.modeling import tiny as architectures

TOLERANCE = 1e-5
# Those that compare the texts of a micro-batch with each other depend on which these are.
BETWEEN_TEXTS = ("distance", "angle", "contrastive")
KINDS = (
    "hidden_mse", "hidden_cosine", "embedding", "attention_kl", "attention_mse", "pkd", "relations", *BETWEEN_TEXTS,
)  # fmt: skip
ONLY_TERMS = {"alpha": 0.0, "task_weight": 0.0}


def stage(*kinds: str, **settings) -> list[StageConfig]:
    """The whole training on these terms alone."""
    return [StageConfig(terms=[TermConfig(kind=kind, **settings) for kind in kinds], **ONLY_TERMS)]


class AllGradients(GradientRecorder):
    """Those of the projections too."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.gradients |= {f"projection.{n}": p.grad.clone() for n, p in self.projections.named_parameters()}


def gradients(task: str, folder, batch_size: int = 8, accumulation: int = 1, **arguments) -> dict[str, torch.Tensor]:
    recorder = AllGradients()
    trainer = make_trainer(
        task, folder, callbacks=[recorder], student=arguments.pop("student", None) or tiny_model(task, 2, seed=1),
        teacher=arguments.pop("teacher", None) or tiny_model(task, 4, seed=2), per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation, **arguments,
    )  # fmt: skip
    recorder.projections = trainer.projections
    trainer.train()
    return recorder.gradients


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BETWEEN_TEXTS])
@pytest.mark.parametrize("task", ["single-label", "token-classification"])
def test_accumulation_and_padding_change_no_gradient(kind, task, tmp_path, monkeypatch):
    whole = gradients(task, tmp_path, stages=stage(kind))
    assert any(value.abs().max() > 0 for value in whole.values())
    for batch_size, accumulation in ((1, 8), (2, 4)):
        parts = gradients(task, tmp_path, batch_size, accumulation, stages=stage(kind))
        assert relative_difference(whole, parts) <= TOLERANCE
    monkeypatch.setattr(tiny, "MINIMAL_LENGTH", 20)
    assert relative_difference(whole, gradients(task, tmp_path, stages=stage(kind))) <= TOLERANCE


@pytest.mark.parametrize("kind", BETWEEN_TEXTS)
def test_padding_changes_no_comparison_of_texts(kind, tmp_path, monkeypatch):
    short = gradients("single-label", tmp_path, stages=stage(kind))
    monkeypatch.setattr(tiny, "MINIMAL_LENGTH", 20)
    assert relative_difference(short, gradients("single-label", tmp_path, stages=stage(kind))) <= TOLERANCE


# The attention of Llama and T5 adds positions after its queries and keys.
EVERYWHERE = [kind for kind in KINDS if kind != "contrastive" and not kind.startswith("attention")]


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        *(("attention_kl", "single-label"), ("attention_mse", "single-label")),
        *((kind, task) for kind in EVERYWHERE for task in ("single-label", "causal-lm", "seq2seq")),
    ],
)
def test_equal_models_pay_nothing(kind, task, tmp_path):
    student, teacher = tiny_model(task, 2, seed=3), tiny_model(task, 2, seed=3)
    recorder = GradientRecorder()
    trainer = make_trainer(task, tmp_path, teacher, student, callbacks=[recorder], stages=stage(kind))
    trainer.train()
    assert abs(trainer.state.log_history[0][kind]) <= 1e-6
    assert max(gradient.abs().max() for gradient in recorder.gradients.values()) <= 1e-6


@pytest.mark.parametrize("kind", ["hidden_mse", "hidden_cosine", "embedding", "pkd", "relations", "distance"])
def test_widths_may_differ(kind, tmp_path):
    wide = tiny_model("single-label", 4, seed=2, hidden_size=24, num_attention_heads=4)
    options = {"num_relation_heads": 2} if kind == "relations" else {}
    arguments = {"teacher": wide, "stages": stage(kind, **options)}
    whole = gradients("single-label", tmp_path, **arguments)
    has_projection = any(name.startswith("projection.") for name in whole)
    assert has_projection == (kind not in ("relations", "distance"))
    if kind != "distance":
        assert relative_difference(whole, gradients("single-label", tmp_path, 2, 4, **arguments)) <= TOLERANCE


def test_the_terms_are_those_of_the_formulas(tmp_path):
    student, teacher = tiny_model("single-label", 2, seed=1), tiny_model("single-label", 4, seed=2).eval()
    batch = tiny.PadCollator()(tiny_rows("single-label"))
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True).hidden_states
        theirs = teacher(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    pairs = [(ours[1], theirs[2]), (ours[2], theirs[4])]
    expected = sum((s - t)[real].square().mean() for s, t in pairs) / 2
    trainer = make_trainer("single-label", tmp_path, teacher, student, stages=stage("hidden_mse", weight=0.5))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["hidden_mse"] == pytest.approx(expected.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(0.5 * expected.item(), rel=1e-4)
    assert not {"kd_loss", "task_loss"} & set(log)


def test_attention_maps_are_those_that_the_model_returns(tmp_path):
    student, teacher = tiny_model("single-label", 1, seed=1), tiny_model("single-label", 1, seed=2).eval()
    batch = tiny.PadCollator()(tiny_rows("single-label"))
    maps = []
    for model in (student, teacher):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            maps.append(eager(**batch, output_attentions=True).attentions[0])
    real = batch["attention_mask"].bool()
    divergence = (maps[1] * (maps[1].clamp(min=1e-30).log() - maps[0].clamp(min=1e-30).log())).sum(-1).mean(1)
    trainer = make_trainer("single-label", tmp_path, teacher, student, stages=stage("attention_kl"))
    assert student.config._attn_implementation == "sdpa"
    trainer.train()
    assert trainer.state.log_history[0]["attention_kl"] == pytest.approx(divergence[real].mean().item(), rel=1e-4)


@pytest.mark.parametrize("model_type", sorted(LAYOUTS))
def test_every_architecture_gives_hidden_states_and_relations(model_type):
    teacher, student = (architectures.tiny_model(model_type) for _ in range(2))
    plain = LAYOUTS[model_type].stacks
    terms = plan_terms([TermConfig(kind="hidden_mse"), TermConfig(kind="relations")], student, [teacher])
    assert [term.name for term in terms] == ["hidden_mse", "relations"]
    has_maps = all(stack.attentions[0].has_plain_scores for stack in plain.values())
    if not has_maps:
        with pytest.raises(ValueError, match="do not follow from its queries and keys alone"):
            plan_terms([TermConfig(kind="attention_kl")], student, [teacher])


@pytest.mark.parametrize("kind", ["attention_kl", "attention_mse", "relations"])
def test_a_layer_without_attention_is_refused(kind):
    teacher, student = (architectures.tiny_model("bert") for _ in range(2))
    remove_attention_(find_blocks(student)[1].attention)
    remove_attention_(find_blocks(teacher)[2].attention)

    def plan(layers):
        return plan_terms([TermConfig(kind=kind, layers=layers)], student, [teacher])

    where = "layer 2 of the student's encoder and layer 3 of the teacher's encoder"
    with pytest.raises(ValueError, match=rf"{kind} .* none in {where}, .* layers=\[\[1, 1\]\]\."):
        plan("uniform")
    with pytest.raises(ValueError, match="other layers, or kind='hidden_mse'"):
        plan([[2, 1]])
    assert plan([[1, 1], [3, 2]])
    assert plan_terms([TermConfig(kind="hidden_mse")], student, [teacher])


def test_projections_are_trained_clipped_saved_and_resumed(tmp_path):
    def trained(folder, resume=None):
        teacher = tiny_model("single-label", 2, seed=2, hidden_size=24, num_attention_heads=4)
        trainer = make_trainer(
            "single-label", folder, teacher, tiny_model("single-label", 1, seed=1), max_steps=6, learning_rate=1e-2,
            per_device_train_batch_size=2, train_sampling_strategy="random", save_strategy="steps", save_steps=3,
            max_grad_norm=0.01, terms=[TermConfig(kind="hidden_mse")],
        )  # fmt: skip
        first = copy.deepcopy(trainer.projections.state_dict())
        trainer.train(resume_from_checkpoint=resume)
        return trainer, first

    unbroken, first = trained(tmp_path)
    saved = load_file(tmp_path / "checkpoint-6" / "projections.safetensors")
    for name, value in unbroken.projections.state_dict().items():
        assert not torch.equal(value, first[name])
        assert torch.equal(value, saved[name])
    model = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert model.keys() == unbroken.model.state_dict().keys()
    assert all(p.grad is None or not p.grad.any() for p in unbroken.projections.parameters())
    resumed, _ = trained(tmp_path / "other", resume=str(tmp_path / "checkpoint-3"))
    for ours, theirs in ((unbroken.model, resumed.model), (unbroken.projections, resumed.projections)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    save_file({"other": torch.ones(1)}, tmp_path / "checkpoint-3" / "projections.safetensors")
    with pytest.raises(ValueError, match="saved with other terms or layers"):
        trained(tmp_path / "third", resume=str(tmp_path / "checkpoint-3"))


def test_clipping_counts_the_projections(tmp_path):
    teacher = tiny_model("single-label", 2, seed=2, hidden_size=24, num_attention_heads=4)
    arguments = {"teacher": teacher, "stages": stage("hidden_mse")}
    raw = gradients("single-label", tmp_path, **arguments)
    trainer = make_trainer(
        "single-label", tmp_path, teacher, tiny_model("single-label", 2, seed=1), stages=stage("hidden_mse"),
        max_grad_norm=1e-3,
    )  # fmt: skip
    trainer.train()
    norm = torch.cat([value.flatten() for value in raw.values()]).norm().item()
    assert trainer.state.log_history[0]["grad_norm"] >= norm * (1 - 1e-4)


def test_stages_follow_each_other(tmp_path, caplog):
    stages = [StageConfig(steps=2, terms=[TermConfig(kind="hidden_mse")], **ONLY_TERMS), StageConfig(alpha=1.0)]
    trainer = make_trainer("single-label", tmp_path, max_steps=5, stages=stages)
    with caplog.at_level(logging.INFO, "hf_compress"):
        trainer.train()
    assert "Stage 1 (2 steps): hidden_mse, layers of the encoder (student<-teacher) 1<-2." in caplog.text
    logs = trainer.state.log_history[:5]
    assert ["hidden_mse" in log for log in logs] == [True, True, False, False, False]
    assert ["kd_loss" in log for log in logs] == [False, False, True, True, True]
    assert all("task_loss" not in log for log in logs)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([StageConfig(steps=2), StageConfig(steps=9)], r"last \[2, 9\] steps, but the training has 5"),
        ([StageConfig(steps=5), StageConfig()], r"last \[5, 0\] steps"),
        ([StageConfig(), StageConfig()], "Stage 1 of 2 gives neither steps nor epochs"),
        ([StageConfig(**ONLY_TERMS)], "Stage 1 of 1 has no term that counts"),
        ([StageConfig(terms=[TermConfig("pkd", weight=0.0)], **ONLY_TERMS)], "has no term that counts"),
    ],
)
def test_stages_that_do_not_fit_raise(stages, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer("single-label", tmp_path, student=tiny_model("single-label", 2, seed=1), max_steps=5,
                     stages=stages).train()  # fmt: skip


def test_epochs_of_stages_are_turned_into_steps(tmp_path):
    stages = [StageConfig(epochs=1, alpha=0.0), StageConfig(epochs=2, alpha=1.0)]
    trainer = make_trainer(
        "single-label", tmp_path, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=4, stages=stages
    )
    trainer.train()
    assert ["kd_loss" in log for log in trainer.state.log_history[:6]] == [False, False, True, True, True, True]


def test_parts_of_an_epoch_add_up():
    halves = [StageConfig(epochs=0.5), StageConfig(epochs=0.5)]
    args = DistillationArguments("out", stages=halves, use_cpu=True)
    stages = plan_stages(args, tiny_model("single-label", 1), [tiny_model("single-label", 2)])
    assert stage_lengths(stages, 5, 5) == [3, 2]


def test_weights_and_temperature_follow_their_schedules(tmp_path):
    trainer = make_trainer(
        "single-label", tmp_path, student=tiny_model("single-label", 1, seed=1), max_steps=5, alpha=1.0, end_alpha=0.5,
        alpha_schedule="linear", temperature=4.0, end_temperature=1.0, temperature_schedule="cosine",
        terms=[TermConfig("hidden_mse", weight=1.0, end_weight=0.0, schedule="linear")],
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history[:5]
    for step, log in enumerate(logs):
        share = step / 4
        expected = (1 - 0.5 * share) * log["kd_loss"] + 0.5 * share * log.get("task_loss", 0.0)
        expected += (1 - share) * log.get("hidden_mse", 0.0)
        assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert "task_loss" not in logs[0]
    assert "hidden_mse" not in logs[-1]


def test_shares_of_the_gradient_are_logged(tmp_path):
    terms = [TermConfig("hidden_mse", weight=2.0)]
    settings = {"student": tiny_model("single-label", 2, seed=1), "terms": terms, "max_steps": 2}
    trainer = make_trainer("single-label", tmp_path, log_gradient_shares=True, **settings)
    plain = make_trainer("single-label", tmp_path, **{**settings, "student": copy.deepcopy(settings["student"])})
    trainer.train(), plain.train()
    log = trainer.state.log_history[0]
    shares = [log[f"{name}_gradient_share"] for name in ("kd_loss", "task_loss", "hidden_mse")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert min(shares) > 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name])


def test_layer_maps_are_checked_before_training(tmp_path):
    with pytest.raises(ValueError, match="The term hidden_mse: .*5"):
        make_trainer("single-label", tmp_path, terms=[TermConfig("hidden_mse", layers=[(1, 5)])])
    with pytest.raises(ValueError, match="teacher=1 of the term pkd is out of range"):
        make_trainer("single-label", tmp_path, terms=[TermConfig("pkd", layers=[(1, 1)], teacher=1)])
    with pytest.raises(ValueError, match="5 relation heads do not divide the width 16"):
        make_trainer("single-label", tmp_path, terms=[TermConfig("relations", num_relation_heads=5)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hiden"}, "kind='hiden' is no term"),
        ({"kind": "pkd", "weight": -1.0}, "weight of pkd=-1.0"),
        ({"kind": "pkd", "num_relation_heads": 2}, "is for relations, not pkd"),
        ({"kind": "pkd", "end_weight": 0.0}, "weight of pkd"),
        ({"kind": "contrastive", "temperature": 0.0}, "temperature of contrastive=0.0"),
    ],
)
def test_impossible_terms_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        TermConfig(**settings)


def test_terms_and_stages_are_read_from_json(tmp_path):
    args = DistillationArguments(
        str(tmp_path), terms='[{"kind": "relations", "layers": [[-1, -1]]}]', stages='[{"steps": 3, "alpha": 1.0}]'
    )
    assert args.terms == [TermConfig("relations", layers=[(-1, -1)])]
    assert args.stages == [StageConfig(steps=3, alpha=1.0)]
    assert args.to_dict()["terms"][0]["kind"] == "relations"
    assert "relations" in args.to_json_string()
    with pytest.raises(ValueError, match=r"unknown keys \['wieght'\]"):
        DistillationArguments(str(tmp_path), terms='[{"kind": "pkd", "wieght": 2}]')
    with pytest.raises(ValueError, match="is no JSON"):
        DistillationArguments(str(tmp_path), terms="pkd")


def test_teachers_of_another_architecture(tmp_path):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        dim=16, n_heads=2, hidden_dim=24, n_layers=1, vocab_size=tiny.VOCABULARY, max_position_embeddings=32,
        num_labels=3,
    )  # fmt: skip
    student = DistilBertForSequenceClassification(config)
    teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=2, num_labels=3, **tiny.SHAPE))
    terms = [TermConfig(kind) for kind in ("hidden_mse", "attention_kl", "relations")]
    trainer = make_trainer("single-label", tmp_path, teacher, student, terms=terms)
    trainer.train()
    assert all(trainer.state.log_history[0][kind.kind] > 0 for kind in terms)


@pytest.mark.parametrize("kind", ["hidden_mse", "relations", "attention_kl"])
def test_a_quantized_teacher_shows_its_insides(tmp_path, kind):
    teacher = quantize(tiny_model("single-label", 2, seed=2), Int8DynamicConfig())
    trainer = make_trainer("single-label", tmp_path, teacher, terms=[TermConfig(kind)])
    assert trainer.train().training_loss > 0
    with pytest.raises(ValueError, match="is quantized.*full-precision model"):
        make_student(teacher, StudentConfig(num_layers=1))


@pytest.mark.parametrize("key", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
def test_attention_maps_that_are_scaled_in_another_way_are_refused(key):
    config = {key: key != "scale_attn_weights"}
    teacher, student = (architectures.tiny_model("gpt2", **config) for _ in range(2))
    with pytest.raises(ValueError, match="scaled in another way"):
        plan_terms([TermConfig("attention_kl")], student, [teacher])
