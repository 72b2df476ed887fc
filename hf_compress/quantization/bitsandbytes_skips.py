"""Which modules stay in floating point, in the words of Transformers' bitsandbytes quantizer.

It passes over a module if one of its patterns, taken as a regular expression, matches the beginning of the name up to
a dot or the end, or if the name ends in the pattern: `"classifier"` also stands for `pre_classifier`.
"""

import re
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_compress.modeling.blocks import find_layout


def float_patterns(model: PreTrainedModel, quantized: Collection[str]) -> list[str]:
    """Patterns that have Transformers pass over all modules but those that are quantized.

    Task heads and the pooler, where this class of model does not have them, are among them: a checkpoint may be loaded
    into another class.

    Args:
        model (`PreTrainedModel`): The model, before its modules are replaced.
        quantized (`Collection[str]`): Names of the modules that are quantized.

    Returns:
        `list[str]`: For `llm_int8_skip_modules`.
    """
    quantized = set(quantized)
    prefix = f"{model.base_model_prefix}."
    layout = find_layout(model.config)
    patterns = [_pattern(head, "", quantized) for head in layout.heads]
    if layout.pooler is not None and not any("pooler" in name.split(".") for name in quantized):
        # Which the base model has, and classes with a head may not.
        patterns.append(_pattern(layout.pooler, prefix, quantized))
    # These it knows by itself.
    known = list(model._keep_in_fp32_modules or [])
    for name, module in model.named_modules():
        # What is replaced, by its exact type.
        is_candidate = isinstance(module, Conv1D) or type(module) is nn.Linear
        if is_candidate and name not in quantized and should_convert_module(name, patterns + known):
            # Without the name of the base model, which a model of another class may not have, or have in addition.
            patterns.append(_pattern(name.removeprefix(prefix), prefix, quantized))
    assert all(should_convert_module(name, patterns + known) for name in quantized)
    return patterns


def _pattern(name: str, prefix: str, quantized: Collection[str]) -> str:
    """The name, where it stands for none of the quantized modules; else an expression that no name ends in."""
    if all(should_convert_module(other, [name]) for other in quantized):
        return name
    return f"^(?:{re.escape(prefix)})?{re.escape(name)}"
