"""What units cost: multiply-accumulates, parameters and bytes, counted from the live weights, or measured time."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from hf_compress.modeling.blocks import Attention, find_blocks, find_stacks
from hf_compress.pruning.batches import Batch, token_mask
from hf_compress.pruning.config import Cost
from hf_compress.pruning.latency import LatencyTable
from hf_compress.pruning.replay import state_of
from hf_compress.pruning.sensitivity import frozen
from hf_compress.pruning.units import Part, Site, count_units

# Without data, the length of texts only shifts the weight between heads and neurons.
USUAL_LENGTH = 128.0

Lengths = Mapping[str, torch.Tensor]


class Costs:
    """The cost of sites by how many of their units stay.

    Args:
        kind (`str`): `"macs"` of one text of the data, `"params"`, `"bytes"`, or `"latency"` in milliseconds.
            Multiply-accumulates are those of the projections and of queries, keys and values; products with relative
            positions (DeBERTa) are left out.
        sites (`Sequence[Site]`): Of the dense model.
        batches (`Sequence[dict[str, torch.Tensor]]`): Whose lengths count.
        table (`LatencyTable`, *optional*): Measured times.
        lengths (`Mapping[str, torch.Tensor]`, *optional*): Tokens of the texts in each stack, as `measure_lengths`
            gives them; by default read from the batches, which tell it of text, and not of images.

    Raises:
        ValueError: if the batches hold images and no lengths are given.
    """

    def __init__(
        self,
        kind: Cost,
        sites: Sequence[Site],
        batches: Sequence[Batch],
        table: LatencyTable | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self._table = table if kind == "latency" else None
        self.fixed = 0.0 if self._table is None else self._table.fixed
        self._per_unit = {}
        if self._table is None:
            if kind == "macs" and not lengths:
                lengths = count_tokens(batches, {"encoder", *map(stack_of, sites)})
            self._per_unit = {site.name: site_cost(site, kind, lengths) for site in sites}

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


def stack_of(site: Site) -> str:
    """The stack that a site is in."""
    return site.name.split(".")[0]


def measure_lengths(model: nn.Module, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """How many real tokens each text of some batches has, in each stack of a model.

    How many an image makes is seen in a forward pass of one image per batch: its patches, and what comes before them.

    Args:
        model (`nn.Module`): A Transformers model of a known architecture.
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs of its forward.

    Returns:
        `dict[str, torch.Tensor]`: By stack, shape (texts,), in float64.
    """
    # A decoder alone may have attentions over an encoder that is not there.
    return count_tokens(batches, {*find_stacks(model), "encoder"}, [_image_length(model, batch) for batch in batches])


def count_tokens(
    batches: Sequence[Batch], stacks: Iterable[str], image_lengths: Sequence[int | None] | None = None
) -> dict[str, torch.Tensor]:
    """How many real tokens each text of some batches has.

    Args:
        batches (`Sequence[dict[str, torch.Tensor]]`): Inputs; without any, there is one text of usual length.
        stacks (`Iterable[str]`): Where.
        image_lengths (`Sequence[int or None]`, *optional*): Tokens that an image of each batch makes.

    Returns:
        `dict[str, torch.Tensor]`: By stack, shape (texts,), in float64.

    Raises:
        ValueError: if it is not known how many tokens an image makes.
    """
    if not batches:
        return {stack: torch.tensor([USUAL_LENGTH], dtype=torch.float64) for stack in stacks}
    pairs = list(zip(batches, image_lengths or [None] * len(batches), strict=True))
    if any(_is_image(batch) and length is None for batch, length in pairs):
        raise ValueError(
            "How many tokens an image makes is not seen from a batch of images: give Costs the lengths that "
            "measure_lengths(model, batches) returns."
        )
    return {
        stack: torch.cat([token_mask(batch, stack, length).sum(1).cpu() for batch, length in pairs]).double()
        for stack in stacks
    }


def _is_image(batch: Batch) -> bool:
    return "pixel_values" in batch


@torch.no_grad()
def _image_length(model: nn.Module, batch: Batch) -> int | None:
    if not _is_image(batch):
        return None
    seen = []
    first = find_blocks(model)[0].module
    hook = first.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(state_of(args, kwargs).shape[1]), with_kwargs=True
    )
    try:
        with frozen(model):
            model(**{name: value[:1] for name, value in batch.items()})
    finally:
        hook.remove()
    return seen[0]


def site_cost(site: Site, kind: Cost, lengths: Lengths | None = None) -> float:
    """What one unit of a site costs.

    Args:
        site (`Site`): Heads or neurons.
        kind (`str`): `"macs"`, `"params"` or `"bytes"`.
        lengths (`Mapping[str, torch.Tensor]`, *optional*): By stack, tokens of each text; needed for `"macs"`.

    Returns:
        `float`: Multiply-accumulates of one text, the mean over all texts; weights; or bytes of the weights.
    """
    if kind == "macs":
        return site.repeats * sum(_unit_macs(part, lengths, stack_of(site)) for part in site.parts)
    return sum(_unit_weights(part, kind) for part in site.parts)


def _unit_macs(part: Part, lengths: Lengths, stack: str) -> float:
    is_attention = isinstance(part, Attention)
    tokens = lengths[stack]
    # Cross-attention takes its keys and values from the encoder.
    attended = lengths["encoder"] if is_attention and part.kind == "cross" else tokens
    read = [tokens, attended, attended] if is_attention and not part.is_fused else [tokens] * len(part.inputs)
    products = part.output.weight.numel() * tokens
    for projection, length in zip(part.inputs, read, strict=True):
        products = products + projection.weight.numel() * length
    products = products / count_units(part)
    if is_attention:
        products = products + 2 * tokens * attended * part.group_size * part.head_dim
    return products.mean().item()


def _unit_weights(part: Part, kind: Cost) -> float:
    extra = part.extra_inputs if isinstance(part, Attention) else ()
    # The output's bias stays whatever is cut.
    tensors = [module.weight for module in (*part.inputs, part.output, *extra)]
    tensors += [module.bias for module in (*part.inputs, *extra) if module.bias is not None]
    sizes = [tensor.numel() * (tensor.element_size() if kind == "bytes" else 1) for tensor in tensors]
    return sum(sizes) / count_units(part)
