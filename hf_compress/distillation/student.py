"""A student that starts from some of its teacher's layers."""

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_compress.checkpoint.config import METHOD
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.distillation.config import LayerRule, StudentConfig
from hf_compress.modeling.blocks import count_layers, find_stacks
from hf_compress.modeling.surgery import first_layer_stays, keep_layers_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def choose_layers(
    total: int, number: int | None, layers: LayerRule | Sequence[int], keep_first: bool = False
) -> list[int]:
    """Indices of the teacher layers that a student copies.

    Args:
        total (`int`): Layers of the teacher.
        number (`int` or `None`): Layers of the student; may be `None` when `layers` lists them.
        layers (`str` or sequence of `int`): `"first"`, `"last"`, `"spread"`, or the indices themselves. `"spread"`
            copies the last layer of each of `number` equal runs, `g(m) = m * total / number` counted from 1
            (TinyBERT, Jiao et al., 2020, arXiv:1909.10351, section 3.2), so the teacher's last layer is always kept.
        keep_first (`bool`, *optional*, defaults to `False`): Whether a rule has to keep layer 0; it then chooses the
            others among the rest.

    Returns:
        `list[int]`: Indices from 0, ascending where a rule chose them.

    Raises:
        ValueError: if more layers are asked for than there are, or an index is out of range or named twice.
    """
    if not isinstance(layers, str):
        chosen = [int(index) for index in layers]
        outside = [index for index in chosen if not 0 <= index < total]
        if outside or len(set(chosen)) != len(chosen) or not chosen:
            raise ValueError(
                f"layers={chosen} cannot be copied from a teacher of {total} layers: "
                f"name each at most once, from 0 to {total - 1}."
            )
        return chosen
    if number is None or not 1 <= number <= total:
        raise ValueError(f"num_layers={number} cannot be taken from a teacher of {total} layers: give 1 to {total}.")
    if layers == "first":
        return list(range(number))
    if keep_first:
        return [0, *(1 + index for index in choose_layers(total - 1, number - 1, layers))] if number > 1 else [0]
    if layers == "last":
        return list(range(total - number, total))
    return [(m * total) // number - 1 for m in range(1, number + 1)]


def make_student(teacher: "PreTrainedModel", config: StudentConfig) -> "PreTrainedModel":
    """Copies a teacher with fewer layers: the chosen ones, embeddings, pooler and task head keep their weights.

    Args:
        teacher (`PreTrainedModel`): A model of a known architecture; left untouched.
        config (`StudentConfig`): How many layers to keep, and which.

    Returns:
        `PreTrainedModel`: A model of the teacher's class, all of it trainable. Its saved checkpoint is a stock one,
        unless the teacher's is not: a student of an unevenly pruned teacher keeps the widths of its layers.

    Raises:
        ValueError: if the layers cannot be taken from this teacher, its architecture is unknown, or it is quantized.
    """
    _check_teacher(teacher, config)
    student = copy.deepcopy(teacher).requires_grad_(True)
    for position, stack in enumerate(find_stacks(teacher)):
        number, layers = _choice(config, is_decoder=position > 0)
        total = count_layers(teacher, stack)
        chosen = choose_layers(total, number, layers, first_layer_stays(teacher, stack))
        keep_layers_(student, chosen, stack)
        logger.info("Student %s: layers %s of the teacher's %d.", stack, chosen, total)
    if _compression(teacher) is not None:
        write_widths_(student)
    return student


def _compression(model: "PreTrainedModel") -> Any:
    return model.config.to_dict().get("quantization_config")


def _check_teacher(teacher: "PreTrainedModel", config: StudentConfig) -> None:
    compression = _compression(teacher)
    if compression is not None and compression["quant_method"] != METHOD:
        raise ValueError(
            f"The teacher {type(teacher).__name__} is quantized ({compression['quant_method']}): a student of it "
            "could not be trained. Make the student from the full-precision model, then quantize the student."
        )
    has_decoder = len(find_stacks(teacher)) > 1
    if not has_decoder and (config.num_decoder_layers is not None or config.decoder_layers is not None):
        raise ValueError(
            f"num_decoder_layers={config.num_decoder_layers} and decoder_layers={config.decoder_layers} are for an "
            f"encoder-decoder, and {type(teacher).__name__} is none: leave them out."
        )


def _choice(config: StudentConfig, is_decoder: bool) -> tuple[int | None, LayerRule | Sequence[int]]:
    if not is_decoder:
        return config.num_layers, config.layers
    if config.decoder_layers is not None:
        return config.num_decoder_layers, config.decoder_layers
    return config.num_decoder_layers or config.num_layers, config.layers
