"""What the two models are compared on, for each task: the items of a batch and the terms of the loss.

The only place that knows both what a task's outputs look like and which formulas of `losses.py` fit them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from hf_compress.distillation import losses
from hf_compress.modeling.tasks import CLASSIFICATION, IGNORED, MAIN_INPUTS, unwrap

TASKS = (
    *CLASSIFICATION,
    "token-classification",
    "question-answering",
    "masked-lm",
    "causal-lm",
    "seq2seq-lm",
    "feature-extraction",
)


# A batch's column of this prefix is for the teacher alone; see `tokenizers.py`.
OWN = "teacher_"
POSITIONS = f"{OWN}positions"


class Items(NamedTuple):
    """The predictions of one batch, one row each.

    Attributes:
        logits (`torch.Tensor` of shape `(items, classes)`): Outputs of a model.
        labels (`torch.Tensor` of shape `(items,)` or `(items, classes)`, or `None`): Targets of the task.
        mask (`torch.Tensor` of shape `(items,)`, or `None`): True where the teacher is imitated; `None`: everywhere.
        label_mask (`torch.Tensor` of shape `(items,)`, or `None`): True where there is a label; `None`: everywhere.
        class_mask (`torch.Tensor` of shape `(items, classes)`, or `None`): True where a class may be predicted.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None
    mask: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    class_mask: torch.Tensor | None = None


def items_of(
    task: str, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], pooling: str = "mean"
) -> Items:
    """Lays the outputs of a batch out as one row per prediction.

    Args:
        task (`str`): One of `TASKS`.
        outputs (`Mapping`): A model's outputs: `logits`, `start_logits` and `end_logits`, or `last_hidden_state`.
        batch (`Mapping`): The inputs, with the labels where there are any.
        pooling (`str`, *optional*, defaults to `"mean"`): How embeddings are made of tokens.

    Returns:
        `Items`: Texts, images, tokens, or answer ends. What does not count is masked, not removed, so that nothing
        waits for the device; on a CPU, where nothing waits, masked language models keep the masked tokens' rows only.
    """
    if task in CLASSIFICATION:
        labels, label_mask = _example_labels(batch)
        return Items(outputs["logits"], labels, None, label_mask)
    if task == "feature-extraction":
        return Items(embedding_of(outputs["last_hidden_state"], batch, pooling), None)
    if task == "question-answering":
        labels, label_mask, class_mask = _answers(batch)
        logits = torch.cat([outputs["start_logits"], outputs["end_logits"]])
        return Items(logits, labels, None, label_mask, class_mask)
    labels, label_mask, logits = batch.get("labels"), token_mask(task, batch), outputs["logits"]
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:] if labels is not None else None
    mask = _taught(task, label_mask, batch).flatten()
    logits, label_mask = logits.flatten(0, 1), label_mask.flatten()
    labels = labels.flatten() if labels is not None else None
    if task == "masked-lm" and logits.device.type == "cpu":
        rows = mask.nonzero().squeeze(-1)
        return Items(logits[rows], labels[rows] if labels is not None else None)
    return Items(logits, labels, mask, label_mask)


def embedding_of(hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], pooling: str) -> torch.Tensor:
    """The embeddings of a batch of texts, or of images, of which all parts count.

    Args:
        hidden (`torch.Tensor` of shape `(batch, length, width)`): Last hidden states.
        batch (`Mapping`): The inputs.
        pooling (`str`): As for `embed`.

    Returns:
        `torch.Tensor` of shape `(batch, width)`: Not normalised.
    """
    return embed(hidden, None if "pixel_values" in batch else attention_mask(batch), pooling)


def embed(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """A text's or an image's embedding.

    Args:
        hidden (`torch.Tensor` of shape `(batch, length, width)`): Last hidden states.
        mask (`torch.Tensor` of shape `(batch, length)`, or `None`): True at real tokens; without one, all are.
        pooling (`str`): `"mean"` over the real tokens, or `"cls"`, the first of them.

    Returns:
        `torch.Tensor` of shape `(batch, width)`: Not normalised.
    """
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    if pooling == "cls":
        first = mask.int().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    weights = mask.float()[..., None]
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def token_mask(task: str, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which predictions of tokens count: those with a label, or without labels all that are no padding.

    Args:
        task (`str`): A task that predicts tokens.
        batch (`Mapping`): The inputs, with the labels where there are any.

    Returns:
        `torch.Tensor` of shape `(batch, length)`, or `(batch, length - 1)` for a causal language model: Booleans. The
        latter's first real token is not predicted from padding on its left.
    """
    if task == "seq2seq-lm":
        return decoder_mask(batch)
    attention = attention_mask(batch)
    mask = batch["labels"] != IGNORED if "labels" in batch else attention
    return mask[:, 1:] & attention[:, :-1] if task == "causal-lm" else mask


def decoder_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of a decoder are real: those with a label, else those that its mask or its inputs say.

    Args:
        batch (`Mapping`): The inputs of an encoder-decoder.

    Returns:
        `torch.Tensor` of shape `(batch, decoder length)`: Booleans.

    Raises:
        ValueError: if the batch has neither labels nor decoder inputs.
    """
    if "labels" in batch:
        return batch["labels"] != IGNORED
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"].bool()
    if "decoder_input_ids" in batch:
        return torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
    raise ValueError(
        f"The batch has the columns {sorted(batch)}, and a sequence-to-sequence model needs something to decode: add "
        "labels, for instance what teacher.generate writes for each text."
    )


def with_decoder_inputs(task: str, model: Any, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A batch from which student and teacher decode the same tokens, though neither is given labels.

    Args:
        task (`str`): One of `TASKS`.
        model (`PreTrainedModel`): An encoder-decoder, wrapped or not, which knows how to shift labels.
        batch (`Mapping`): The inputs, with the labels where there are any.

    Returns:
        `Mapping`: The same, with `decoder_input_ids` made from the labels where there were none.
    """
    if task != "seq2seq-lm" or "decoder_input_ids" in batch or "labels" not in batch:
        return batch
    shifted = unwrap(model).prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return {**batch, "decoder_input_ids": shifted}


def step_counts(
    task: str, batch: Mapping[str, torch.Tensor], with_tokens: bool = True
) -> dict[str, torch.Tensor | int]:
    """What a batch holds, by what the terms of the loss are divided by.

    Args:
        task (`str`): One of `TASKS`.
        batch (`Mapping`): The inputs, with the labels where there are any.
        with_tokens (`bool`, *optional*, defaults to `True`): Whether to count tokens too, which only terms inside the
            models are divided by.

    Returns:
        `dict[str, torch.Tensor or int]`: Counts of shape `()`, or numbers where nothing has to be looked at: `items`
        that imitate the teacher, `labelled` ones, `rows`, and with tokens `tokens` and, of an encoder-decoder,
        `decoder_tokens`.
    """
    # On a GPU, each small operation costs as much as a larger one: what is a number already stays one.
    rows = _inputs(batch).shape[0]
    counts: dict[str, torch.Tensor | int] = {"items": rows, "labelled": rows, "rows": rows}
    if with_tokens:
        counts["tokens"] = rows
    if with_tokens and "pixel_values" not in batch:
        counts["tokens"] = attention_mask(batch).sum()
    if task in CLASSIFICATION:
        label_mask = _example_labels(batch)[1]
        counts["labelled"] = rows if label_mask is None else label_mask.sum()
    elif task == "question-answering":
        label_mask = _answers(batch)[1]
        counts["items"] = 2 * rows
        counts["labelled"] = 2 * rows if label_mask is None else label_mask.sum()
    elif task != "feature-extraction":
        mask = token_mask(task, batch)
        counts["items"], counts["labelled"] = _taught(task, mask, batch).sum(), mask.sum()
    if with_tokens and task == "seq2seq-lm":
        counts["decoder_tokens"] = decoder_mask(batch).sum()
    return counts


def attention_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of a batch are real.

    Args:
        batch (`Mapping`): The inputs of a model of texts.

    Returns:
        `torch.Tensor` of shape `(batch, length)`: Booleans; all true without a mask.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    inputs = _inputs(batch)
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)


def teacher_inputs(batch: Mapping[str, torch.Tensor], columns: Collection[str]) -> dict[str, torch.Tensor]:
    """The columns of a batch that a teacher is fed, under its own names.

    Args:
        batch (`Mapping`): The batch. Where it has `teacher_input_ids`, only columns with that prefix count.
        columns (collection of `str`): What the teacher's forward takes, without labels.

    Returns:
        `dict[str, torch.Tensor]`: Keyword arguments of its forward.
    """
    if f"{OWN}input_ids" in batch:
        batch = {name.removeprefix(OWN): value for name, value in batch.items() if name.startswith(OWN)}
    return {name: value for name, value in batch.items() if name in columns}


def _inputs(batch: Mapping[str, Any]) -> torch.Tensor:
    for name in MAIN_INPUTS:
        if name in batch:
            return batch[name]
    raise ValueError(f"The batch has the columns {sorted(batch)}, but no input_ids, inputs_embeds or pixel_values.")


def _taught(task: str, mask: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens that imitate the teacher: those that count, and all of a text without any label.

    Not those that the teacher's own truncation cut off, of which it says nothing.
    """
    if task == "token-classification":
        mask = mask | (attention_mask(batch) & ~mask.any(1, keepdim=True))
    return mask & (batch[POSITIONS] >= 0) if POSITIONS in batch else mask


def _example_labels(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Labels of examples, and which have one: -100 marks a missing class, NaN a missing number or list of them."""
    labels = batch.get("labels")
    if labels is None:
        return None, None
    if labels.is_floating_point():
        missing = labels.isnan()
        return labels.masked_fill(missing, 0.0), ~missing.view(len(labels), -1).any(-1)
    if labels.numel() != labels.shape[0]:
        return labels, None
    labels = labels.view(-1)
    return labels, labels != IGNORED


def _answers(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Labels and mask of answer starts and ends, `(2 * batch,)`, and where an answer can be, `(2 * batch, length)`.

    An answer cannot lie in the padding; counting it would make the loss depend on the longest text of the batch.
    Positions outside the text mean that the answer was cut off: Transformers' heads ignore them too.
    """
    inside = attention_mask(batch).repeat(2, 1)
    if "start_positions" not in batch:
        return None, None, inside
    labels = torch.cat([batch["start_positions"].view(-1), batch["end_positions"].view(-1)])
    within = (labels >= 0) & (labels < inside.shape[1])
    mask = within & inside.gather(1, labels.where(within, 0)[:, None]).squeeze(1)
    return labels.where(mask, IGNORED), mask, inside


def soft_loss(
    problem: str,
    student: Items,
    teacher_logits: torch.Tensor,
    temperature: float,
    divergence: str = "auto",
    beta: float = 0.5,
) -> torch.Tensor:
    """What the student pays for differing from the teacher.

    Args:
        problem (`str`): `"regression"`, `"single_label_classification"`, `"multi_label_classification"` or
            `"embedding"`.
        student (`Items`): The student's predictions.
        teacher_logits (`torch.Tensor` of shape `(items, classes)`): The teacher's, in the student's label order.
        temperature (`float`): Of the soft targets; unused for regression and embeddings.
        divergence (`str`, *optional*, defaults to `"auto"`): How they are compared; see `DistillationArguments`.
        beta (`float`, *optional*, defaults to `0.5`): Share of the teacher in `"jensen_shannon"`.

    Returns:
        `torch.Tensor` of shape `(items,)`: One value per item.

    Raises:
        ValueError: if the divergence does not fit the problem.
    """
    check_divergence(problem, divergence)
    divergence = _AUTO.get(problem, "forward_kl") if divergence == "auto" else divergence
    formulas = _DIVERGENCES[problem]
    if problem in _AUTO:
        return formulas[divergence](student.logits, teacher_logits)
    options = {"beta": beta} if divergence == "jensen_shannon" else {}
    if problem == "single_label_classification":
        options["class_mask"] = student.class_mask
    if divergence == "mse":
        return formulas[divergence](student.logits, teacher_logits, **options)
    return formulas[divergence](student.logits, teacher_logits, temperature, **options)


def fits(problem: str, divergence: str) -> bool:
    """Whether outputs can be compared as asked.

    Args:
        problem (`str`): As for `soft_loss`.
        divergence (`str`): How they are to be compared.
    """
    return divergence == "auto" or divergence in _DIVERGENCES[problem]


def check_divergence(problem: str, divergence: str) -> None:
    """Raises if outputs cannot be compared as asked.

    Args:
        problem (`str`): As for `soft_loss`.
        divergence (`str`): How they are to be compared.

    Raises:
        ValueError: with what fits.
    """
    if not fits(problem, divergence):
        raise ValueError(
            f"divergence={divergence!r} does not fit this model ({problem}): give one of "
            f"{', '.join(_DIVERGENCES[problem])}."
        )


def hard_loss(problem: str, student: Items, label_smoothing: float = 0.0) -> torch.Tensor:
    """What the student pays for differing from the labels: the loss of the task.

    Args:
        problem (`str`): `"regression"`, `"single_label_classification"` or `"multi_label_classification"`.
        student (`Items`): The student's predictions, with labels.
        label_smoothing (`float`, *optional*, defaults to `0.0`): Share of the target spread over all classes.

    Returns:
        `torch.Tensor` of shape `(items,)`: One value per item.
    """
    if problem == "regression":
        return losses.squared_error(student.logits, student.labels)
    if problem == "multi_label_classification":
        return losses.binary_cross_entropy(student.logits, student.labels)
    return losses.cross_entropy(student.logits, student.labels, label_smoothing, student.class_mask)


# Problems without a distribution of classes, and what they take where nothing is asked for.
_AUTO = {"embedding": "cosine", "regression": "mse"}
_DIVERGENCES: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "single_label_classification": {
        "forward_kl": losses.kl_divergence,
        "reverse_kl": losses.reverse_kl_divergence,
        "jensen_shannon": losses.jensen_shannon,
        "cross_entropy": losses.soft_cross_entropy,
        "mse": losses.logit_squared_error,
    },
    "multi_label_classification": {
        "forward_kl": losses.bernoulli_kl_divergence,
        "reverse_kl": losses.bernoulli_reverse_kl_divergence,
        "jensen_shannon": losses.bernoulli_jensen_shannon,
        "cross_entropy": losses.bernoulli_soft_cross_entropy,
        "mse": losses.logit_squared_error,
    },
    "regression": {"mse": losses.squared_error},
    "embedding": {"cosine": losses.cosine_distance, "mse": losses.squared_error},
}
