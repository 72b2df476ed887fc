"""Removing a whole attention or feed-forward network in place: what is left does what all units gated with 0 would.

The bias of the output projection and the norm after it stay, so a removed part still adds a constant. Everything else
is gone, parameters and products. The names of what is left do not change.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache

from hf_compress.modeling.blocks import FFN, Attention
from hf_compress.modeling.projections import keep_outputs_, without_inputs
from hf_compress.modeling.roles import AttentionLayout


def can_remove(part: Attention | FFN) -> bool:
    """Whether an attention or feed-forward network can be removed.

    Args:
        part (`Attention` or `FFN`): From `find_blocks`.

    Returns:
        `bool`: False for the one attention that the others of its stack need: the owner of their position bias.
    """
    return isinstance(part, FFN) or not part.owns_bias


def remove_attention_(attention: Attention) -> None:
    """Remove all heads of one attention, as `gate_outputs` would with gates of 0; a second time changes nothing.

    In a decoder, it goes on to count the tokens in its layer of the cache, with one number for each: Transformers
    reads the length of the text from there.

    Args:
        attention (`Attention`): From `find_blocks`; `num_heads` and `num_groups` are 0 afterwards.

    Raises:
        ValueError: if the other attentions of the stack need it (see `can_remove`).
        TypeError: if a projection is neither `nn.Linear` nor `Conv1D`, or is quantized.
    """
    if not can_remove(attention):
        raise ValueError(
            f"{attention.name} cannot be removed: it holds the position bias that all attentions of its stack share. "
            "Keep at least one of its heads, or remove another attention."
        )
    if not attention.num_heads:
        return
    layout, core = attention.layout, attention.attributes
    attention.module.set_submodule(layout.output, without_inputs(attention.output))
    needed = {path.split(".")[0] for path in (*layout.tail, layout.post_norm) if path is not None}
    for name in [name for name, _ in core.named_children() if name not in needed]:
        delattr(core, name)
    for attribute in (*layout.head_count, *layout.all_heads_width):
        setattr(core, attribute, 0)
    core.attention_layout = layout
    core.__class__ = _without_heads(type(core))


def remove_ffn_(ffn: FFN) -> None:
    """Remove all neurons of one feed-forward network, as `gate_outputs` would with gates of 0.

    Args:
        ffn (`FFN`): From `find_blocks`; its `width` is 0 afterwards.

    Raises:
        TypeError: if a projection is neither `nn.Linear` nor `Conv1D`, or is quantized.
    """
    ffn.module.set_submodule(ffn.layout.output, without_inputs(ffn.output))
    for projection in ffn.inputs:
        keep_outputs_(projection, [])
    for attribute in ffn.layout.width:
        setattr(ffn.module, attribute, 0)


class WithoutHeads(nn.Module):
    """Mixed into the class of a removed attention, so that the attention remains one for everybody else."""

    attention_layout: AttentionLayout
    # Some architectures look for projections in every attention that from_pretrained has not marked like this.
    _is_hf_initialized = True

    def forward(
        self, hidden_states: torch.Tensor, *_: Any, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """What the attention gives for contexts without any heads.

        Args:
            hidden_states (`torch.Tensor`): Shape (batch, length, hidden size).
            past_key_values (`Cache`, *optional*): Counts the tokens.
            **kwargs: Read by the names in `passes_on` of the layout.

        Returns:
            `tuple`: States; what is passed on; and weights of shape (batch, 0, length, 0), `None` unless the
            attention is eager, which is when others return theirs.
        """
        layout = self.attention_layout
        if past_key_values is not None and layout.kind == "self":
            _count_tokens_(past_key_values, self.layer_idx, hidden_states)
        # A slice has a graph: a norm before this gets gradients, zeros, as distributed training asks for.
        states = hidden_states[..., :0]
        for path in layout.tail:
            states = self.get_submodule(path)(states)
        if layout.post_norm is not None:
            states = self.get_submodule(layout.post_norm)(hidden_states + states)
        batch, length = hidden_states.shape[:2]
        weights = hidden_states.new_empty(batch, 0, length, 0) if self._is_eager() else None
        return (states, *(kwargs[name] for name in layout.passes_on), weights)

    def _is_eager(self) -> bool:
        # Architectures without a choice of implementations keep no config here.
        config = vars(self).get("config")
        return config is None or config._attn_implementation == "eager"

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so pickle would not find it by its name.
        return _rebuild, (type(self).__bases__[1],), self.__dict__


@cache
def _without_heads(attention_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"{attention_class.__name__}WithoutHeads", (WithoutHeads, attention_class), {})


def _rebuild(attention_class: type[nn.Module]) -> nn.Module:
    removed = _without_heads(attention_class)
    return removed.__new__(removed)


def _count_tokens_(past: Cache, layer: int, hidden_states: torch.Tensor) -> None:
    # A cache takes a layer of empty tensors for one that saw no token yet.
    counted = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
    cached = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
    cached.update(counted, counted, layer)
