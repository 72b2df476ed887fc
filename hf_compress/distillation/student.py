"""A student that starts from some of its teacher's layers."""

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_compress.distillation.config import LayerRule, StudentConfig
from hf_compress.modeling.blocks import count_layers, find_stacks
from hf_compress.modeling.surgery import keep_layers_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def choose_layers(total: int, number: int | None, layers: LayerRule | Sequence[int]) -> list[int]:
    """Indices of the teacher layers that a student copies.

    Args:
        total (`int`): Layers of the teacher.
        number (`int` or `None`): Layers of the student; may be `None` when `layers` lists them.
        layers (`str` or sequence of `int`): `"first"`, `"last"`, `"spread"`, or the indices themselves. `"spread"`
            copies the last layer of each of `number` equal runs, `g(m) = m * total / number` counted from 1
            (TinyBERT, Jiao et al., 2020, arXiv:1909.10351, section 3.2), so the teacher's last layer is always kept.

    Returns:
        `list[int]`: Indices from 0, ascending where a rule chose them.

    Raises:
        ValueError: if more layers are asked for than there are, or an index is out of range or named twice.
    """
    if not isinstance(layers, str):
        outside = [index for index in layers if not 0 <= index < total]
        if outside or len(set(layers)) != len(layers) or not layers:
            raise ValueError(
                f"layers={list(layers)} cannot be copied from a teacher of {total} layers: "
                f"name each at most once, from 0 to {total - 1}."
            )
        return list(layers)
    if number is None or not 1 <= number <= total:
        raise ValueError(f"num_layers={number} cannot be taken from a teacher of {total} layers: give 1 to {total}.")
    if layers == "first":
        return list(range(number))
    if layers == "last":
        return list(range(total - number, total))
    return [(m * total) // number - 1 for m in range(1, number + 1)]


def make_student(teacher: "PreTrainedModel", config: StudentConfig) -> "PreTrainedModel":
    """Copies a teacher with fewer layers: the chosen ones, embeddings, pooler and task head keep their weights.

    Args:
        teacher (`PreTrainedModel`): A model of a known architecture; left untouched.
        config (`StudentConfig`): How many layers to keep, and which.

    Returns:
        `PreTrainedModel`: A model of the teacher's class. Its saved checkpoint is a stock one.

    Raises:
        ValueError: if the layers cannot be taken from this teacher, its architecture is unknown, or it is quantized.
    """
    if teacher.config.to_dict().get("quantization_config") is not None:
        raise ValueError(
            f"The teacher {type(teacher).__name__} is quantized or compressed already: a student of it could not be "
            "trained. Make the student from the full-precision model, then compress the student."
        )
    student = copy.deepcopy(teacher)
    for position, stack in enumerate(find_stacks(teacher)):
        number, layers = _choice(config, is_decoder=position > 0)
        total = count_layers(teacher, stack)
        chosen = choose_layers(total, number, layers)
        keep_layers_(student, chosen, stack)
        logger.info("Student %s: layers %s of the teacher's %d.", stack, chosen, total)
    return student


def _choice(config: StudentConfig, is_decoder: bool) -> tuple[int | None, LayerRule | Sequence[int]]:
    if not is_decoder:
        return config.num_layers, config.layers
    if config.decoder_layers is not None:
        return config.num_decoder_layers, config.decoder_layers
    return config.num_decoder_layers or config.num_layers, config.layers
