"""What a folder with a saved model holds, read from config.json and the headers of its weight files alone."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from hf_compress.evaluation.files import INDEX_FILE, weight_files

CONFIG_FILE = "config.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# A header begins with its own length.
_LENGTH_BYTES = 8


class StoredTensor(NamedTuple):
    """A tensor of a weight file.

    Attributes:
        dtype (`str`): As safetensors calls it: `"F32"`, `"BF16"`, `"I8"`, ...
        shape (`tuple[int, ...]`): As it is stored: packed, or without its zeros.
        n_bytes (`int`): What it takes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Elements that are stored."""
        return math.prod(self.shape)


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The config of a saved model.

    Args:
        folder (`str` or `Path`): Where it is saved.

    Returns:
        `PreTrainedConfig`: Its `quantization_config`, if any, is a plain dict.

    Raises:
        ValueError: if there is no such folder, no config in it, or one that Transformers cannot read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: give the one that `model.save_pretrained` wrote.")
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"The folder {str(folder)!r} holds no {CONFIG_FILE}, so it is no saved model: give the one that "
            "`model.save_pretrained` wrote."
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(folder / CONFIG_FILE)!r} cannot be read as the config of a model: {error} Restore the file that "
            "the model was saved with."
        ) from error


def read_headers(folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a saved model; no weights are read.

    Args:
        folder (`str` or `Path`): Where it is saved.

    Returns:
        `dict[str, StoredTensor]`: By name in the files, those of `weight_files`.

    Raises:
        ValueError: if it holds none, or a file is damaged.
    """
    folder = Path(folder)
    files = weight_files(folder)
    if not files:
        is_pickled = any(any(folder.glob(pattern)) for pattern in _PICKLED)
        hint = "Its weights are in files that can run code when they are read: load the model with from_pretrained "
        hint = f"{hint}and save it with save_pretrained." if is_pickled else "Give the folder of a saved model."
        raise ValueError(f"The folder {str(folder)!r} holds no *.safetensors. {hint}")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"The folder {str(folder)!r} lacks {', '.join(missing)}, which {INDEX_FILE} names: get or save it again."
        )
    return {name: tensor for file in files for name, tensor in _read_header(file).items()}


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a stock config describes, without weights: neither cut nor in a number format.

    Args:
        config (`PreTrainedConfig`): As `read_config` returns it.

    Returns:
        `PreTrainedModel`: Of the class that was saved, on the meta device.

    Raises:
        ValueError: if Transformers has no such class.
    """
    name = (config.architectures or [None])[0]
    if name is not None and not hasattr(transformers, name):
        raise ValueError(
            f"The model is a {name}, which Transformers {transformers.__version__} does not have: its parts are "
            "unknown. Only stock classes can be taken apart."
        )
    with torch.device("meta"), no_init_weights():
        if name is None:
            model = AutoModel.from_config(config, attn_implementation="eager")
        else:
            model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    # Left out with the initialization.
    model.tie_weights()
    return model


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """What the tensors of a file are called in the model: some checkpoints keep names of older classes.

    Args:
        model (`PreTrainedModel`): As `build_skeleton` returns it.
        stored (iterable of `str`): Names in the file.

    Returns:
        `dict[str, str]`: Names in the file -> names in the model, where scales and bitmasks stand beside their weight.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    known = {name for name, _ in (*model.named_modules(remove_duplicate=False), *_tensors(model))}
    prefix = f"{model.base_model_prefix}."

    def depth(name: str) -> int:
        parts = name.split(".")
        return max((n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in known), default=0)

    def find(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters)
        # A model with a head may be stored without it, and the other way round.
        return max((renamed, renamed.removeprefix(prefix), prefix + renamed), key=depth)

    return {name: find(name) for name in stored}


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        n_header = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        content = stream.read(n_header) if _LENGTH_BYTES + n_header <= size else b""
    try:
        header = json.loads(content)
        tensors = {
            name: StoredTensor(
                entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(file, f"its {size} bytes do not begin with the header of a safetensors file") from error
    if _LENGTH_BYTES + n_header + end != size:
        raise _damaged(file, f"it has {size} bytes, but its header tells of {_LENGTH_BYTES + n_header + end}")
    return tensors


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{str(file)!r} is damaged or was cut off: {reason}. Get or save the file again.")
