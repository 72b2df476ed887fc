"""What units cost: multiply-accumulates, parameters and bytes, counted from the live weights."""

from typing import Literal

from hf_compress.modeling.blocks import Attention
from hf_compress.pruning.units import Part, Site, count_units

CostKind = Literal["macs", "params", "bytes", "latency"]


def site_cost(site: Site, kind: CostKind, tokens: float, context: float) -> float:
    """What one unit of a site costs.

    Args:
        site (`Site`): Heads or neurons.
        kind (`str`): `"macs"`, `"params"` or `"bytes"`.
        tokens (`float`): Tokens of a text.
        context (`float`): Tokens that a token attends to.

    Returns:
        `float`: Multiply-accumulates of one text, weights, or bytes of the weights.
    """
    return sum(_unit_cost(part, kind, tokens, context) for part in site.parts) * (
        site.repeats if kind == "macs" else 1
    )


def _unit_cost(part: Part, kind: CostKind, tokens: float, context: float) -> float:
    projections = (*part.inputs, part.output)
    extra = part.extra_inputs if isinstance(part, Attention) else ()
    if kind == "macs":
        products = sum(module.weight.numel() for module in projections) / count_units(part)
        if isinstance(part, Attention):
            products += 2 * context * part.group_size * part.head_dim
        return products * tokens
    # The output's bias stays whatever is cut.
    tensors = [module.weight for module in (*projections, *extra)]
    tensors += [module.bias for module in (*part.inputs, *extra) if module.bias is not None]
    sizes = [tensor.numel() * (tensor.element_size() if kind == "bytes" else 1) for tensor in tensors]
    return sum(sizes) / count_units(part)
