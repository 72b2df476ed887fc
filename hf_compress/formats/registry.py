"""Which class belongs to which format in config.json."""

from hf_compress.formats.binary import BinaryLinear
from hf_compress.formats.fixed_point_modules import FixedPointEmbedding, FixedPointLinear
from hf_compress.formats.int8 import Int8Embedding, Int8Linear
from hf_compress.formats.packed import PackedEmbedding, PackedLinear, PackedModule

LINEARS: dict[str, type[PackedLinear]] = {kind.format: kind for kind in (BinaryLinear, FixedPointLinear, Int8Linear)}
EMBEDDINGS: dict[str, type[PackedEmbedding]] = {kind.format: kind for kind in (FixedPointEmbedding, Int8Embedding)}


def class_of(name: str) -> type[PackedModule]:
    """The class of a format.

    Args:
        name (`str`): As in config.json.

    Returns:
        `type[PackedModule]`: A `PackedLinear` or a `PackedEmbedding`.

    Raises:
        ValueError: if there is no such format.
    """
    known = LINEARS | EMBEDDINGS
    if name not in known:
        raise ValueError(
            f"The checkpoint has weights in the format {name!r}, but this library knows {', '.join(known)}: type "
            "`pip install --upgrade hf_compress`."
        )
    return known[name]
