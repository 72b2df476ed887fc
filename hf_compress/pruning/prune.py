"""`prune` and `prune_`: the type of the config chooses what is cut."""

import copy
from typing import Any

from torch import nn

from hf_compress.modeling.autocast import remove_autocast_
from hf_compress.modeling.capture import release_gates_
from hf_compress.pruning.config import StructuredPruningConfig
from hf_compress.pruning.structured import Data, prune_structured_
from hf_compress.pruning.unstructured import prune_unstructured_
from hf_compress.pruning.unstructured_config import UnstructuredPruningConfig

_STEPS = {StructuredPruningConfig: prune_structured_, UnstructuredPruningConfig: prune_unstructured_}


def prune(model: nn.Module, config: Any, data: Data | None = None) -> nn.Module:
    """A smaller or sparser copy of a model; the model itself is left as it is.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): What to cut, down to what, and how: heads,
            neurons and layers, or single weights, which become 0.
        data (`Iterable[Mapping[str, torch.Tensor]]` or `Calibration`, *optional*): Calibration data: batches of
            inputs, as a `DataLoader` or `tokenizer(..., return_tensors="pt")` gives them, a few hundred texts without
            labels. Scores of the weights alone need none. For structured pruning, what `calibrate` returned serves
            several budgets.

    Returns:
        `nn.Module`: Of the same class, on the same device. Save it with `save_pretrained`.

    Raises:
        ValueError: if the budget cannot be met, a pattern does not divide a layer, or model or data do not fit.
        TypeError: if the config is of no known kind.
    """
    release_gates_(model)
    pruned = copy.deepcopy(model)
    remove_autocast_(pruned.modules())
    prune_(pruned, config, data)
    return pruned


def prune_(model: nn.Module, config: Any, data: Data | None = None) -> None:
    """Cuts or thins out a model in place; otherwise like `prune`, and needs no room for a second model.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture. Make its optimizer afterwards.
        config (`StructuredPruningConfig` or `UnstructuredPruningConfig`): What to cut, down to what, and how.
        data (`Iterable[Mapping[str, torch.Tensor]]` or `Calibration`, *optional*): Calibration data.

    Raises:
        ValueError: if the budget cannot be met, a pattern does not divide a layer, or model or data do not fit.
        TypeError: if the config is of no known kind.
    """
    if type(config) not in _STEPS:
        known = ", ".join(step.__name__ for step in _STEPS)
        raise TypeError(f"A {type(config).__name__} does not say how to prune: give one of {known}.")
    release_gates_(model)
    _STEPS[type(config)](model, config, data)
