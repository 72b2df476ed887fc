"""Taking chosen units out of a live model."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from hf_compress.modeling.removal import remove_attention_, remove_ffn_
from hf_compress.modeling.surgery import keep_heads_, keep_neurons_, keep_stack_heads_, shrink_unread_bias_
from hf_compress.pruning.units import Site


def cut_(model: nn.Module, sites: Sequence[Site], kept: Mapping[str, Iterable[int]]) -> None:
    """Takes units out of a model.

    Args:
        model (`nn.Module`): Is changed.
        sites (`Sequence[Site]`): Of the model.
        kept (`Mapping[str, Iterable[int]]`): By site, indices of the units that stay; none where all of it goes. Sites
            that are not named stay whole.
    """
    for site in sites:
        units = [int(unit) for unit in kept.get(site.name, range(site.n_units))]
        if len(units) == site.n_units:
            continue
        if not units:
            for part in site.parts:
                remove_attention_(part) if site.kind == "heads" else remove_ffn_(part)
            shrink_unread_bias_(model, site.name.split(".")[0])
        elif site.kind == "neurons":
            keep_neurons_(site.parts[0], units)
        elif site.parts[0].is_stack_wide:
            keep_stack_heads_(model, units, *site.name.split("."))
        else:
            keep_heads_(site.parts[0], units)
