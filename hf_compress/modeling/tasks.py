"""What a model predicts: its task, read from its class, and the order of its labels, read from its config."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.auto import modeling_auto

# The label that Transformers' losses skip.
IGNORED = -100

CLASSIFICATION = ("sequence-classification", "image-classification")
LANGUAGE_MODELS = ("masked-lm", "causal-lm", "seq2seq-lm")
# The inputs that models read first: one of them is in every batch.
MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values")

# The first match wins: T5ForConditionalGeneration, for one, is listed under several tasks.
_CLASS_NAMES: dict[str, frozenset[str]] = {
    task: frozenset(name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names))
    for task, mapping in (
        ("sequence-classification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("token-classification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
        ("question-answering", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
        ("seq2seq-lm", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("masked-lm", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("causal-lm", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image-classification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("feature-extraction", modeling_auto.MODEL_MAPPING_NAMES),
    )
}
# Encoders alone, whose whole models want decoder inputs too.
_CLASS_NAMES["feature-extraction"] |= frozenset(modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values())


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformers model inside wrappers that add none of their own outputs.

    Args:
        model (`nn.Module`): A model, possibly inside `DistributedDataParallel`, `torch.compile` or a PEFT wrapper.

    Returns:
        `nn.Module`: The innermost model, whose class and config say what it is.
    """
    from accelerate.utils import extract_model_from_parallel
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and "_orig_mod" not in vars(model):
        # Looking for compiled parts inside takes a third of a millisecond, which is much in a training step.
        return model
    model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def task_of(model: nn.Module) -> str:
    """The task that a model was built for.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.

    Returns:
        `str`: `"sequence-classification"`, `"token-classification"`, `"question-answering"`, `"seq2seq-lm"`,
        `"masked-lm"`, `"causal-lm"`, `"image-classification"` or `"feature-extraction"`.

    Raises:
        ValueError: if the class is none that an `AutoModelFor...` of these tasks would build, nor a subclass of one.
    """
    names = [cls.__name__ for cls in type(unwrap(model)).__mro__]
    for name in names:
        for task, class_names in _CLASS_NAMES.items():
            if name in class_names:
                return task
    raise ValueError(
        f"The task of a {names[0]} is unknown: no AutoModelFor... class of {', '.join(_CLASS_NAMES)} builds it. "
        "Load the model with the AutoModelFor... class of its task."
    )


def shared_task(teacher: nn.Module, model: nn.Module) -> str:
    """The task of two models that are to be compared.

    Args:
        teacher (`nn.Module`): The larger model.
        model (`nn.Module`): The smaller one.

    Returns:
        `str`: As `task_of` returns it.

    Raises:
        ValueError: if the tasks differ.
    """
    task, teacher_task = task_of(model), task_of(teacher)
    if task != teacher_task:
        raise ValueError(
            f"The teacher is a {type(unwrap(teacher)).__name__} for {teacher_task}, the other model a "
            f"{type(unwrap(model)).__name__} for {task}: load both with the AutoModelFor... class of one task."
        )
    return task


def problem_type(config: Any, labels: torch.Tensor | None = None) -> str:
    """Which kind of classification a head does, by the rule of Transformers' own models.

    Args:
        config (`PreTrainedConfig`): Config of the model; its `problem_type` decides where it is set.
        labels (`torch.Tensor`, *optional*): Labels of one batch; floats for more than one output mean multi-label.

    Returns:
        `str`: `"regression"`, `"single_label_classification"` or `"multi_label_classification"`.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    if labels is not None and labels.is_floating_point():
        return "multi_label_classification"
    return "single_label_classification"


def matching_columns(teacher: nn.Module, model: nn.Module) -> list[int] | None:
    """The columns of a teacher's logits in the order of another model's labels.

    Args:
        teacher (`nn.Module`): The model whose logits are to be reordered.
        model (`nn.Module`): The model that sets the order, built for the same task.

    Returns:
        `list[int]` or `None`: `None` where the orders agree, or where the task has no named labels.

    Raises:
        ValueError: if the label names differ as sets.
    """
    teacher_config, config = unwrap(teacher).config, unwrap(model).config
    task = task_of(model)
    is_named = task in CLASSIFICATION and problem_type(config) != "regression"
    return label_permutation(teacher_config, config) if is_named or task == "token-classification" else None


def label_permutation(source_config: Any, target_config: Any) -> list[int] | None:
    """The columns of one model's logits in the order of another model's labels.

    Args:
        source_config (`PreTrainedConfig`): Config of the model whose logits are to be reordered (the teacher).
        target_config (`PreTrainedConfig`): Config of the model that sets the order (the student).

    Returns:
        `list[int]` or `None`: `source_logits[..., permutation]` is in the target's order; `None` where the orders
        agree already.

    Raises:
        ValueError: if the label names differ as sets, or if a name occurs twice.
    """
    source, target = names_of_labels(source_config), names_of_labels(target_config)
    if source == target:
        return None
    if len(source) != len(target) or set(source) != set(target) or len(set(source)) != len(source):
        raise ValueError(
            f"Teacher and student do not share their labels: the teacher has {source}, the student {target}. "
            "Outputs can only be matched by name: give both the same `id2label` and `label2id` "
            "(`AutoModelFor....from_pretrained(..., id2label=teacher.config.id2label, "
            "label2id=teacher.config.label2id)`)."
        )
    return [source.index(name) for name in target]


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with which a language model keeps no keys and values.

    They would grow from call to call, and with them packed texts, which `position_ids` alone tell apart, would read
    each other.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        inputs (`Mapping`): Of its forward.

    Returns:
        `dict`: The same, with `use_cache=False` where there is such an argument.
    """
    return {**inputs, "use_cache": False} if "use_cache" in forward_columns(model) else dict(inputs)


def forward_columns(model: nn.Module) -> set[str]:
    """Names of the inputs that a model's `forward` takes.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.

    Returns:
        `set[str]`: The parameter names, without `*args` and `**kwargs`.
    """
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(unwrap(model).forward).parameters
    return {name for name, parameter in parameters.items() if parameter.kind not in kinds}


def names_of_labels(config: Any) -> list[str]:
    """The names of a model's labels, in the order of their ids.

    Args:
        config (`PreTrainedConfig`): The model's config.
    """
    return [config.id2label[i] for i in range(config.num_labels)]


def count_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch, told by what models read: positions and the like may be one row for all.

    Args:
        inputs (`Mapping[str, torch.Tensor]`): Of a forward.

    Returns:
        `int`: The batch size.
    """
    return len(inputs[next((name for name in MAIN_INPUTS if name in inputs), next(iter(inputs)))])
