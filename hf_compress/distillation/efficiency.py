"""What makes a training step cheaper without changing what is learned from: each for a while, then undone."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hf_compress.modeling.blocks import token_embeddings
from hf_compress.modeling.tasks import unwrap


@contextmanager
def training_shortcuts(
    model: nn.Module, *, dropout: float | None = None, freeze_embeddings: bool = False, plain_attention: bool = False
) -> Iterator[None]:
    """The shortcuts asked for, until the block ends. What is saved inside of it is as the user's config says.

    Args:
        model (`nn.Module`): The student, before its optimizer is made and before it is wrapped for several processes.
        dropout (`float`, *optional*): See `dropout_set_to`; `None` leaves the student's own.
        freeze_embeddings (`bool`, *optional*, defaults to `False`): See `frozen_embeddings`.
        plain_attention (`bool`, *optional*, defaults to `False`): See `attention_as_products`.

    Raises:
        ValueError: if the dropout is no probability, or the embeddings cannot be frozen.
    """
    with ExitStack() as stack:
        if dropout is not None:
            stack.enter_context(dropout_set_to(model, dropout))
        if freeze_embeddings:
            stack.enter_context(frozen_embeddings(model))
        if plain_attention:
            stack.enter_context(attention_as_products(model))
        yield


@contextmanager
def dropout_set_to(model: nn.Module, probability: float) -> Iterator[None]:
    """Gives every dropout of a model one probability, and each its own back when the block ends.

    Only the live modules change: the config, and with it what a checkpoint says, stays. LayerDrop, which skips whole
    layers, is left alone.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        probability (`float`): From 0 to below 1. With 0, no random numbers are drawn.

    Raises:
        ValueError: if it is no such probability.
    """
    check_dropout(probability)
    before = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if _is_dropout(module, name, value)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, probability)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def frozen_embeddings(model: nn.Module) -> Iterator[None]:
    """Keeps the token embeddings out of the training until the block ends.

    A table of 30,522 tokens is half of a small model, a batch reads a few hundred of its rows, and yet its gradient,
    the gradient's norm and the optimizer's step run through all of it. Position embeddings are small, and train on.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not, before its optimizer is made.

    Raises:
        ValueError: if it has no token embeddings, or its output layer is made of the same weights.
    """
    check_embeddings(model)
    before = [(table.weight, table.weight.requires_grad) for table in token_embeddings(model)]
    try:
        for weight, _ in before:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, was_trained in before:
            weight.requires_grad_(was_trained)


@contextmanager
def attention_as_products(model: nn.Module) -> Iterator[None]:
    """Computes attention as plain products instead of by the fused kernel, until the block ends.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
    """
    model = unwrap(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def plain_attention_pays(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> bool:
    """Whether plain products are the faster attention to train with on short texts.

    On a CPU in bfloat16 PyTorch's fused kernel takes up to six times as long as plain products in the forward and
    backward of texts of 16 to 128 tokens; at 512 tokens the two are even. In float32 the fused kernel always wins.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        autocast_dtype (`torch.dtype`, *optional*): Under which it is trained.

    Returns:
        `bool`: Whether it is on a CPU, trained in bfloat16, and uses the fused kernel.
    """
    model = unwrap(model)
    is_bfloat16 = torch.bfloat16 in (model.dtype, autocast_dtype)
    return model.device.type == "cpu" and is_bfloat16 and model.config._attn_implementation == "sdpa"


def check_dropout(probability: float) -> None:
    """Raises if a value is no probability of dropout.

    Args:
        probability (`float`): What was given.

    Raises:
        ValueError: if it is below 0, or 1 and above.
    """
    if not 0 <= probability < 1:
        raise ValueError(
            f"dropout={probability} does not lie in [0, 1): it is the share of values that are set to 0. Give 0 to "
            "train without dropout, or None to leave the student's own."
        )


def check_embeddings(model: nn.Module) -> None:
    """Raises if a model's token embeddings cannot be frozen by themselves.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.

    Raises:
        ValueError: if it has none, or its output layer is made of the same weights.
    """
    model = unwrap(model)
    tables = token_embeddings(model)
    if not tables:
        raise ValueError(
            f"freeze_embeddings=True, but this {type(model).__name__} has no token embeddings: leave it out."
        )
    head = model.get_output_embeddings()
    if head is not None and any(head.weight is table.weight for table in tables):
        raise ValueError(
            f"freeze_embeddings=True would freeze the output layer of this {type(model).__name__} too, which is made "
            "of the same weights: leave it out, or load the student with tie_word_embeddings=False."
        )


def _is_dropout(module: nn.Module, name: str, value: object) -> bool:
    # Some models keep the probability as a number and call the function instead of a module.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and ("dropout" in name or (isinstance(module, nn.Dropout) and name == "p"))
