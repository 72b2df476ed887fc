"""Tiny models and batches of every task that the trainer knows, and the gradients of one optimizer step."""

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)

from hf_compress import DistillationArguments, DistillationTrainer

VOCABULARY = 50
LENGTHS = (3, 9, 5, 12, 4, 7, 12, 6)
MINIMAL_LENGTH = 0  # what batches are padded to at least
PADDING_SIDE = "right"

SHAPE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

TASKS = (
    "single-label",
    "multi-label",
    "regression",
    "token-classification",
    "question-answering",
    "masked-lm",
    "causal-lm",
    "seq2seq",
)
# Embeddings have no labels: their teacher is all they learn from.
ALL_TASKS = (*TASKS, "embeddings")

_CLASSES = {
    "single-label": (BertForSequenceClassification, {"num_labels": 3}),
    "multi-label": (
        BertForSequenceClassification,
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "regression": (BertForSequenceClassification, {"num_labels": 1}),
    "token-classification": (BertForTokenClassification, {"num_labels": 5}),
    "question-answering": (BertForQuestionAnswering, {}),
    "masked-lm": (BertForMaskedLM, {}),
    "embeddings": (BertModel, {}),
}


def tiny_model(task: str, layers: int = 2, seed: int = 0, **config) -> PreTrainedModel:
    set_seed(seed)
    if task == "causal-lm":
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{"num_key_value_heads": 1, **SHAPE, **config}))
    if task == "seq2seq":
        shape = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24, "vocab_size": VOCABULARY, "dropout_rate": 0.0}
        ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "initializer_factor": 0.3}
        return T5ForConditionalGeneration(T5Config(num_layers=layers, **{**shape, **ids, **config}))
    model_class, extra = _CLASSES[task]
    return model_class(BertConfig(num_hidden_layers=layers, **{**SHAPE, **NO_DROPOUT, **extra, **config}))


def tiny_rows(task: str) -> list[dict]:
    """Eight rows of unequal length and, for tokens, of unequally many labels."""
    generator = torch.Generator().manual_seed(1)

    def integers(high: int, size: tuple, low: int = 0) -> list:
        return torch.randint(low, high, size, generator=generator).tolist()

    rows = []
    for n, length in enumerate(LENGTHS):
        row = {"input_ids": integers(VOCABULARY, (length,), 1), "attention_mask": [1] * length}
        if task == "single-label":
            row["labels"] = integers(3, ())
        elif task == "multi-label":
            row["labels"] = [float(x) for x in integers(2, (3,))]
        elif task == "regression":
            row["labels"] = float(n) / 4
        elif task == "question-answering":
            # The last row's answer was cut off: its positions lie outside the text.
            inside = 1000 if n == 7 else length - 1
            row["start_positions"], row["end_positions"] = min(1, inside) if n != 7 else 1000, inside
        elif task == "seq2seq":
            row["labels"] = integers(VOCABULARY, (14 - length,), 1)
        elif task != "embeddings":
            classes = 5 if task == "token-classification" else VOCABULARY
            labels = integers(classes, (length,))
            row["labels"] = [x if (i + n) % 3 else -100 for i, x in enumerate(labels)]
        rows.append(row)
    return rows


class PadCollator:
    """Pads every column of token level; the tokenizer-free stand-in for Transformers' collators."""

    padding = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "decoder_input_ids": 0, "labels": -100}

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name in self.padding and self.per_token(rows, name):
                length = max(MINIMAL_LENGTH, max(map(len, values)))
                values = [self.pad(value, name, length) for value in values]
            batch[name] = torch.tensor(values)
        return batch

    def pad(self, value: list, name: str, length: int) -> list:
        padding = [self.padding[name]] * (length - len(value))
        return padding + value if PADDING_SIDE == "left" else value + padding

    @staticmethod
    def per_token(rows: list[dict], name: str) -> bool:
        # One row would not tell: three labels of a text may stand beside three tokens.
        values = rows[0][name]
        return isinstance(values, list) and len(values) > 1 and not isinstance(values[0], float)


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of every optimizer step, before clipping, and apart those of the last one."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name: parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        self.steps.append(self.gradients)


def make_trainer(task: str, folder, teacher=None, student=None, rows=None, callbacks=None, cache=None, **arguments):
    rows = tiny_rows(task) if rows is None else rows
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "max_steps": 1,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "teacher_check_rows": 0,
        "alpha": 1.0 if task == "embeddings" else 0.9,
    }
    return DistillationTrainer(
        model=student if student is not None else tiny_model(task, layers=1, seed=1),
        teacher=teacher if teacher is not None else tiny_model(task, layers=2, seed=2),
        args=DistillationArguments(**{**defaults, **arguments}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=PadCollator(),
        callbacks=callbacks,
        teacher_cache=cache,
    )


def step_gradients(task: str, folder, batch_size: int, accumulation: int, **arguments) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step over the eight rows."""
    recorder = GradientRecorder()
    trainer = make_trainer(
        task,
        folder,
        callbacks=[recorder],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )
    trainer.train()
    return recorder.gradients


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two sets of gradients over the norm of the first."""
    assert first.keys() == second.keys()
    difference = torch.cat([(first[name] - second[name]).flatten() for name in first])
    return (difference.norm() / torch.cat([value.flatten() for value in first.values()]).norm()).item()
