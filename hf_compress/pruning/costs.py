"""What units cost: multiply-accumulates, parameters and bytes, counted from the live weights, or measured time."""

from collections.abc import Sequence

import numpy as np

from hf_compress.modeling.blocks import Attention
from hf_compress.pruning.batches import Batch, text_length
from hf_compress.pruning.config import Cost
from hf_compress.pruning.latency import LatencyTable
from hf_compress.pruning.units import Part, Site, count_units

# Without data, the length of texts only shifts the weight between heads and neurons.
USUAL_LENGTH = 128.0


class Costs:
    """The cost of sites by how many of their units stay.

    Args:
        kind (`str`): `"macs"` of one text of the data, `"params"`, `"bytes"`, or `"latency"` in milliseconds.
        sites (`Sequence[Site]`): Of the dense model.
        batches (`Sequence[dict[str, torch.Tensor]]`): Whose lengths count.
        table (`LatencyTable`, *optional*): Measured times.
    """

    def __init__(
        self, kind: Cost, sites: Sequence[Site], batches: Sequence[Batch], table: LatencyTable | None = None
    ) -> None:
        self._table = table if kind == "latency" else None
        self.fixed = 0.0 if self._table is None else self._table.fixed
        self._per_unit = {}
        if self._table is None:
            stacks = {site.name.split(".")[0] for site in sites}
            usual = (USUAL_LENGTH, USUAL_LENGTH)
            lengths = {stack: text_length(batches, stack) if batches else usual for stack in stacks}
            self._per_unit = {site.name: site_cost(site, kind, *lengths[site.name.split(".")[0]]) for site in sites}

    def at(self, name: str, kept: np.ndarray) -> np.ndarray:
        """The cost of a site.

        Args:
            name (`str`): Of the site.
            kept (`np.ndarray`): Numbers of units that stay.

        Returns:
            `np.ndarray`: One cost for each.
        """
        if self._table is None:
            return kept * self._per_unit[name]
        return np.interp(kept, self._table.levels[name][::-1], self._table.times[name][::-1])

    def total(self, sites: Sequence[Site]) -> float:
        """The cost of a model.

        Args:
            sites (`Sequence[Site]`): All of its sites as they are now; what it has no longer costs nothing.
        """
        return self.fixed + sum(float(self.at(site.name, np.array(site.n_units))) for site in sites)


def site_cost(site: Site, kind: Cost, tokens: float, context: float) -> float:
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


def _unit_cost(part: Part, kind: Cost, tokens: float, context: float) -> float:
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
