"""Between a live model and the widths in its config."""

from collections import defaultdict
from typing import TYPE_CHECKING

from hf_compress.checkpoint.config import FFN_WIDTH
from hf_compress.checkpoint.sparse import sparse_names, write_config_
from hf_compress.modeling.blocks import FFN, Block, find_blocks, find_layout, find_stacks
from hf_compress.modeling.removal import remove_attention_, remove_ffn_
from hf_compress.modeling.surgery import (
    keep_heads_,
    keep_neurons_,
    keep_stack_heads_,
    shrink_unread_bias_,
    update_config_,
)
from hf_compress.modeling.tasks import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_widths_(model: "PreTrainedModel") -> bool:
    """Writes into a cut model's config what `from_pretrained` needs to rebuild it.

    Args:
        model (`PreTrainedModel`): A model whose heads or neurons were cut. Where the stock config can say how, only
            that is written, and the checkpoint needs no plug-in, unless it leaves out zeros (see `mark_sparse_`).

    Returns:
        `bool`: Whether the checkpoint needs hf_compress to load.
    """
    model = unwrap(model)
    widths = None if update_config_(model) else read_widths(model)
    sparse = sparse_names(model)
    write_config_(model, widths, sparse)
    return widths is not None or bool(sparse)


def read_widths(model: "PreTrainedModel") -> dict[str, dict[str, int]]:
    """The live widths of every block.

    Args:
        model (`PreTrainedModel`): A model of a known architecture.

    Returns:
        `dict[str, dict[str, int]]`: As in `CompressionConfig.widths`.
    """
    return {
        _name(block): {part.kind: part.num_groups for part in block.attentions} | {FFN_WIDTH: block.ffn.width}
        for block in find_blocks(model)
    }


def cut_to_widths_(model: "PreTrainedModel", widths: dict[str, dict[str, int]]) -> None:
    """Cuts a skeleton to recorded widths; which units are kept does not matter before the weights are loaded.

    Args:
        model (`PreTrainedModel`): The skeleton that the stock config describes, on the meta device.
        widths (`dict[str, dict[str, int]]`): As in `CompressionConfig.widths`.

    Raises:
        ValueError: if the widths name other parts than the model has, are larger than the model's, or say that a part
            was removed that cannot be.
    """
    blocks = {_name(block): block for block in find_blocks(model)}
    # An encoder-decoder's checkpoint may be loaded as its encoder alone.
    absent = find_layout(model.config).stacks.keys() - find_stacks(model).keys()
    widths = {name: parts for name, parts in widths.items() if name.split(".")[0] not in absent}
    if blocks.keys() != widths.keys():
        raise ValueError(
            f"quantization_config has widths for the blocks {', '.join(widths)}, but the model has "
            f"{', '.join(blocks)}: restore the config.json that the checkpoint was saved with."
        )
    stack_wide: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, block in blocks.items():
        live = {part.kind: part.num_groups for part in block.attentions} | {FFN_WIDTH: block.ffn.width}
        if live.keys() != widths[name].keys() or any(widths[name][part] > live[part] for part in live):
            raise ValueError(
                f"quantization_config says that block {name} has the widths {widths[name]}, which cannot be cut from "
                f"the {live} of the stock config: restore the config.json that the checkpoint was saved with."
            )
        _cut_ffn_(block.ffn, widths[name][FFN_WIDTH])
        for attention in block.attentions:
            width = widths[name][attention.kind]
            if width == 0:
                remove_attention_(attention)
            elif attention.is_stack_wide:
                stack_wide[block.stack, attention.kind].add(width)
            else:
                keep_heads_(attention, range(width))
    for (stack, kind), found in stack_wide.items():
        _keep_shared_heads_(model, stack, kind, found)
    for stack in find_stacks(model):
        shrink_unread_bias_(model, stack)


def _cut_ffn_(ffn: FFN, width: int) -> None:
    if width == 0:
        remove_ffn_(ffn)
    else:
        keep_neurons_(ffn, range(width))


def _keep_shared_heads_(model: "PreTrainedModel", stack: str, kind: str, found: set[int]) -> None:
    if len(found) != 1:
        raise ValueError(
            f"quantization_config gives the {kind}-attentions of the {stack} the widths {sorted(found)}, but this "
            "architecture shares one position bias in a stack, so they must agree: restore the original config.json."
        )
    keep_stack_heads_(model, range(found.pop()), stack, kind)


def _name(block: Block) -> str:
    return f"{block.stack}.{block.index}"
