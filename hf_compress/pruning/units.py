"""What can be cut: the heads and neurons of a live model, as sites whose units are chosen among each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hf_compress.modeling.blocks import FFN, Attention, Block
from hf_compress.modeling.removal import can_remove

UnitKind = Literal["heads", "neurons"]
Part = Attention | FFN


@dataclass(frozen=True, eq=False)
class Site:
    """Units of one kind that are ranked among each other.

    Attributes:
        name (`str`): Stack, block and part: `"encoder.0.self"`, `"encoder.0.ffn"`; `"encoder.self"` for all blocks.
        kind (`str`): `"heads"` (key-value groups under grouped-query attention) or `"neurons"`.
        parts (`tuple[Attention | FFN, ...]`): One, or those of a whole stack where they must keep the same heads.
        repeats (`int`): How often a forward pass runs it.
    """

    name: str
    kind: UnitKind
    parts: tuple[Part, ...]
    repeats: int = 1

    @property
    def n_units(self) -> int:
        """Number of units."""
        return count_units(self.parts[0])


def find_sites(blocks: Iterable[Block]) -> list[Site]:
    """The sites of some blocks, from the first to the last.

    Args:
        blocks (`Iterable[Block]`): From `find_blocks`.

    Returns:
        `list[Site]`: Attentions before the feed-forward network of their block; what was removed before is left out.
    """
    shared: dict[str, list[Part]] = {}
    sites: list[Site] = []
    for block in blocks:
        place = f"{block.stack}.{block.index}"
        for part in block.attentions:
            if not part.is_stack_wide:
                sites.append(Site(f"{place}.{part.kind}", "heads", (part,), block.repeats))
                continue
            name = f"{block.stack}.{part.kind}"
            if name not in shared:
                # Its place is that of its first part; the others join it as they come.
                shared[name] = []
                sites.append(Site(name, "heads", ()))
            if part.num_heads:
                shared[name].append(part)
        sites.append(Site(f"{place}.ffn", "neurons", (block.ffn,), block.repeats))
    filled = [Site(site.name, site.kind, tuple(shared.get(site.name, site.parts)), site.repeats) for site in sites]
    return [site for site in filled if site.parts and site.n_units > 0]


def count_units(part: Part) -> int:
    """Number of units of a part: of neurons, or of heads or key-value groups."""
    return part.width if isinstance(part, FFN) else part.num_groups


def unit_size(part: Part) -> int:
    """Inputs of the output projection that belong to one unit."""
    return 1 if isinstance(part, FFN) else part.group_size * part.head_dim


def allowed_widths(site: Site, multiple_of: int, may_go: bool) -> list[int]:
    """How many units a site may keep.

    Args:
        site (`Site`): Heads or neurons.
        multiple_of (`int`): Neurons come in multiples of so many, but for all of them.
        may_go (`bool`): Whether none may stay, where the architecture can do without.

    Returns:
        `list[int]`: Falling, from all of them.

    Raises:
        ValueError: if `multiple_of` is larger than the site.
    """
    step = multiple_of if site.kind == "neurons" else 1
    if step > site.n_units:
        raise ValueError(
            f"multiple_of={step} is larger than the {site.n_units} neurons of {site.name}: give at most that."
        )
    widths = list(range(site.n_units // step * step, 0, -step))
    if widths[0] != site.n_units:
        widths.insert(0, site.n_units)
    return widths + [0] * (may_go and all(can_remove(part) for part in site.parts))
