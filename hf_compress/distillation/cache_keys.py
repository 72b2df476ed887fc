"""What names an example and a teacher in a cache: hashes of what is in them, never of where they stand."""

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from hf_compress.modeling.tasks import unwrap

KEY_BYTES = 16
# What a config says of the software that saved it, and of how attention is computed, does not change the answers.
_UNIMPORTANT = frozenset({
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype",
    # Set by the first labels, or by how the last forward was called; or without a part in the answers.
    "problem_type", "use_cache", "output_hidden_states", "output_attentions", "return_dict",
    "id2label", "label2id",
})  # fmt: skip

# What says how an adapter was trained and loaded; its weights count by themselves.
_UNIMPORTANT_OF_ADAPTERS = frozenset({
    "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "modules_to_save",
    "init_lora_weights", "lora_dropout",
})  # fmt: skip


def example_keys(columns: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> list[bytes]:
    """One hash per row of a batch, over the names and the unpadded values of its columns.

    Args:
        columns (`Mapping`): Tensors of shape (batch, ...) on the CPU, by name: all that decides a teacher's answer.
        masks (`Mapping`): By the name of a column, which of its values are real, of shape (batch, length); a column
            without one counts whole. What lies between real values counts too, masked or not.

    Returns:
        `list[bytes]`: 128 bits per row. The same example has the same hash whatever it is padded to, on either side.
    """
    # One mask is that of several columns, mostly.
    known: dict[int, list[tuple[int, int]]] = {}
    parts = []
    for name in sorted(columns):
        tensor = columns[name].contiguous()
        header, values = f"{name}:{tensor.dtype}:".encode(), tensor.numpy()
        everything, size = values.tobytes(), values.itemsize * math.prod(values.shape[2:])
        row_bytes = size * math.prod(values.shape[1:2])
        places = [row_bytes * row for row in range(len(values))]
        if name in masks:
            mask = masks[name]
            if id(mask) not in known:
                known[id(mask)] = _real_parts(mask.numpy())
            rows = [
                everything[place + size * start : place + size * end]
                for place, (start, end) in zip(places, known[id(mask)], strict=True)
            ]
        else:
            rows = [everything[place : place + row_bytes] for place in places]
        # With its length, so that no two rows of columns can run into each other.
        parts.append([header + len(row).to_bytes(8, "little") + row for row in rows])
    return [hashlib.blake2b(b"".join(row), digest_size=KEY_BYTES).digest() for row in zip(*parts, strict=True)]


def _real_parts(real: np.ndarray) -> list[tuple[int, int]]:
    """Where the real values of each row begin and end; equal where there are none."""
    starts, ends = real.argmax(1), real.shape[1] - real[:, ::-1].argmax(1)
    ends = np.where(real.any(1), ends, starts)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def fingerprint(model: nn.Module) -> str:
    """A hash of a teacher: of its class, its config and every bit of its weights.

    Args:
        model (`nn.Module`): A Transformers model, on any device.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    adapters = {
        name: {key: value for key, value in adapter.to_dict().items() if key not in _UNIMPORTANT_OF_ADAPTERS}
        for name, adapter in getattr(model, "peft_config", {}).items()
    }
    in_use = _adapters_in_use(model) if adapters else []
    model = unwrap(model)
    config = {name: value for name, value in model.config.to_dict().items() if name not in _UNIMPORTANT}
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    # The same adapter weights give other answers under another scale.
    said = json.dumps([type(model).__name__, config, adapters, *in_use], sort_keys=True, default=_plain)
    digest.update(said.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapters_in_use(model: nn.Module) -> list[list[str]]:
    """By module, which of its adapters add to it."""
    layers = [module for module in model.modules() if hasattr(module, "active_adapters")]
    return [
        [] if getattr(layer, "disable_adapters", False) is True else sorted(layer.active_adapters)
        for layer in layers
        if isinstance(layer.active_adapters, list | tuple)
    ]


def _plain(value: object) -> object:
    # The order of a set is another in every process.
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
