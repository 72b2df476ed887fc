"""What a model says in a forward pass beside its outputs: hidden states, queries, keys and values, by name.

A signal's name is its kind, stack and layer: `hidden.encoder.3` is what layer 3, counted from 1, passes on, and
`hidden.encoder.0` what enters the first; `qkv.encoder.3` are layer 3's queries, keys and values.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from hf_compress.modeling.capture import QKV, capture_hidden_states, capture_qkv

Signals = dict[str, torch.Tensor | QKV]


def signal_name(kind: str, stack: str, layer: int) -> str:
    """The name of a signal.

    Args:
        kind (`str`): `"hidden"` or `"qkv"`.
        stack (`str`): `"encoder"` or `"decoder"`.
        layer (`int`): Number of the layer from 1, or 0 for the embeddings' output.

    Returns:
        `str`: As the module's docstring says.
    """
    return f"{kind}.{stack}.{layer}"


def split_name(name: str) -> tuple[str, str, int]:
    """The parts of a signal's name.

    Args:
        name (`str`): Such as `signal_name` returns.

    Returns:
        `tuple[str, str, int]`: Kind, stack and layer.
    """
    kind, stack, layer = name.split(".")
    return kind, stack, int(layer)


class Probe:
    """Reads signals of every forward pass of a model until it is closed.

    The hooks stay on between the passes, since a compiled model would be compiled anew whenever they change.

    Args:
        model (`nn.Module`): A Transformers model, wrapped or not.
        names (iterable of `str`): Names of signals.

    Raises:
        ValueError: if a stack or a layer does not exist.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        wanted: dict[tuple[str, str], set[int]] = defaultdict(set)
        for name in names:
            kind, stack, layer = split_name(name)
            wanted[kind, stack].add(layer)
        self._hooks = ExitStack()
        self._captured: dict[tuple[str, str], dict[int, Any]] = {}
        for (kind, stack), layers in sorted(wanted.items()):
            if kind == "hidden":
                context = capture_hidden_states(model, sorted(layers), stack)
            else:
                context = capture_qkv(model, sorted(layer - 1 for layer in layers), stack)
            self._captured[kind, stack] = self._hooks.enter_context(context)

    def take(self) -> Signals:
        """The signals of the last forward pass; they are handed over and not kept.

        Returns:
            `Signals`: Tensors by name: hidden states (batch, length, hidden size), or `QKV`.
        """
        signals: Signals = {}
        for (kind, stack), captured in self._captured.items():
            first = 0 if kind == "hidden" else 1
            for layer in list(captured):
                signals[signal_name(kind, stack, layer + first)] = captured.pop(layer)
        return signals

    def close(self) -> None:
        """Takes the hooks off."""
        self._hooks.close()
        self._captured = {}
