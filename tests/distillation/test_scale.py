"""What large models and many processes need: chunked logits, checkpointing, compilation, streams, mixed precision."""

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration

from hf_compress import DistillationArguments, DistillationTrainer, StageConfig, TeacherCache, TermConfig
from tests.distillation import tiny
from tests.distillation.tiny import GradientRecorder, make_trainer, relative_difference, tiny_model, tiny_rows

TOLERANCE = 1e-5
LANGUAGE_TASKS = ("masked-lm", "causal-lm", "seq2seq")


def gradients(task: str, folder, **arguments) -> dict[str, torch.Tensor]:
    recorder = GradientRecorder()
    trainer = make_trainer(
        task, folder, callbacks=[recorder], student=arguments.pop("student", None) or tiny_model(task, 2, seed=1),
        teacher=arguments.pop("teacher", None) or tiny_model(task, 4, seed=2), **arguments,
    )  # fmt: skip
    trainer.train()
    return recorder.gradients


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("task", LANGUAGE_TASKS)
def test_chunks_change_no_gradient(task, chunk, tmp_path):
    whole = gradients(task, tmp_path)
    chunked = gradients(task, tmp_path, logits_chunk=chunk)
    assert relative_difference(whole, chunked) <= TOLERANCE
    two = [tiny_model(task, 2, seed=seed) for seed in (2, 3)]
    whole = gradients(task, tmp_path, teacher=two)
    assert relative_difference(whole, gradients(task, tmp_path, teacher=two, logits_chunk=chunk)) <= TOLERANCE


@pytest.mark.parametrize("task", LANGUAGE_TASKS)
def test_chunks_go_with_mixed_precision_and_with_a_cache(task, tmp_path):
    rows, teacher = tiny_rows(task), tiny_model(task, 4, seed=2)
    whole, chunked = (gradients(task, tmp_path, bf16=True, logits_chunk=chunk) for chunk in (0, 7))
    assert relative_difference(whole, chunked) <= 0.02
    for precision in ("fp32", "top-k"):
        settings = {"temperature": 2.0, "top_k": 9} if precision == "top-k" else {}
        cache = TeacherCache.build(
            tmp_path / precision, teacher, rows, data_collator=tiny.PadCollator(), precision=precision, **settings
        )
        whole, chunked = (gradients(task, tmp_path, cache=cache, logits_chunk=chunk) for chunk in (0, 7))
        assert relative_difference(whole, chunked) <= TOLERANCE


class LargestLogits(TorchDispatchMode):
    """The most rows that any tensor of one entry per token of the vocabulary had."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            # The gradient of the output layer is as large as its weight, which is no logits.
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (997,) and tensor.shape[:-1] != (16,):
                self.rows = max(self.rows, tensor.numel() // 997)
        return output


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_a_chunk_bounds_the_logits(task, tmp_path):
    def largest(chunk: int) -> int:
        with LargestLogits() as mode:
            models = {"student": tiny_model(task, 1, seed=1, vocab_size=997),
                      "teacher": tiny_model(task, 1, seed=2, vocab_size=997)}  # fmt: skip
            trainer = make_trainer(task, tmp_path, logits_chunk=chunk, **models)
            trainer._head_is_checked = True  # the check itself takes one row whole
            trainer.train()
        return mode.rows

    assert largest(5) == 5
    assert largest(0) > 30


def test_a_head_that_is_not_last_cannot_be_chunked(tmp_path):
    config = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=tiny.VOCABULARY, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, dropout=0.0,
    )  # fmt: skip
    models = {"student": BartForConditionalGeneration(config), "teacher": BartForConditionalGeneration(config)}
    assert gradients("seq2seq", tmp_path, **models)
    with pytest.raises(ValueError, match="changes its logits behind the output layer.*logits_chunk=0"):
        gradients("seq2seq", tmp_path, logits_chunk=4, **models)


@pytest.mark.parametrize("task", ["single-label", "causal-lm"])
def test_gradient_checkpointing_changes_no_gradient(task, tmp_path):
    terms = [TermConfig("hidden_mse"), TermConfig("relations")]
    plain = gradients(task, tmp_path, terms=terms)
    checkpointed = gradients(task, tmp_path, terms=terms, activation_checkpointing=True)
    assert relative_difference(plain, checkpointed) <= TOLERANCE


def test_reentrant_checkpointing_would_lose_gradients_and_raises(tmp_path):
    stages = [StageConfig(alpha=0.0, task_weight=0.0, terms=[TermConfig("relations")])]
    with pytest.raises(ValueError, match="use_reentrant"):
        gradients("single-label", tmp_path, stages=stages, activation_checkpointing=True,
                  activation_checkpointing_kwargs={"use_reentrant": True})  # fmt: skip


@pytest.mark.parametrize("terms", [[], [TermConfig("hidden_mse"), TermConfig("relations")]])
def test_compiled_students_have_the_same_gradients(terms, tmp_path):
    rows = [row for row in tiny_rows("single-label") if len(row["input_ids"]) == 12]
    torch._dynamo.reset()
    plain = gradients("single-label", tmp_path, terms=terms, rows=rows)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = gradients("single-label", tmp_path, terms=terms, rows=rows, torch_compile=True,
                             torch_compile_backend="aot_eager", max_steps=1)  # fmt: skip
    assert relative_difference(plain, {n.removeprefix("_orig_mod."): g for n, g in compiled.items()}) <= TOLERANCE


def test_streams_are_learned_from_as_data_sets(tmp_path):
    def trained(stream: bool) -> list[dict]:
        rows = Dataset.from_list(tiny_rows("single-label"))
        args = DistillationArguments(
            str(tmp_path), report_to="none", use_cpu=True, max_steps=4, logging_steps=1, save_strategy="no",
            per_device_train_batch_size=2, disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = DistillationTrainer(
            tiny_model("single-label", 1, seed=1), args, teacher=tiny_model("single-label", 2, seed=2),
            train_dataset=rows.to_iterable_dataset() if stream else rows, data_collator=tiny.PadCollator(),
        )  # fmt: skip
        trainer.train()
        return [log["kd_loss"] for log in trainer.state.log_history if "kd_loss" in log]

    assert trained(stream=True) == trained(stream=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.parametrize("task", ["single-label", "masked-lm"])
def test_adapters_learn_and_the_rest_does_not(task, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_model(task, 2, seed=1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"]))
    terms = [TermConfig("hidden_mse"), TermConfig("relations")]
    trainer = make_trainer(task, tmp_path, tiny_model(task, 4, seed=2), student, terms=terms, max_steps=3,
                           learning_rate=1e-2)  # fmt: skip
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[2]
    assert last["loss"] < first["loss"]
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "classifier" not in name)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_bf16_terms_are_close_to_fp32(tmp_path):
    terms = [TermConfig(kind) for kind in ("hidden_mse", "attention_kl", "relations", "pkd", "distance")]
    logs = []
    for bf16 in (False, True):
        trainer = make_trainer("single-label", tmp_path, tiny_model("single-label", 4, seed=2),
                               tiny_model("single-label", 2, seed=1), terms=terms, bf16=bf16)  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for term in terms:
        assert logs[1][term.kind] == pytest.approx(logs[0][term.kind], rel=0.1)
