"""A student that starts from some of its teacher: fewer layers, and in them fewer channels, neurons and heads."""

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_compress.checkpoint.config import METHOD
from hf_compress.checkpoint.widths import cut_to_widths_, read_widths, write_widths_
from hf_compress.distillation.config import LayerRule, StudentConfig
from hf_compress.modeling.autocast import remove_autocast_
from hf_compress.modeling.blocks import count_layers, find_stacks
from hf_compress.modeling.capture import release_gates_
from hf_compress.modeling.narrow import (
    hidden_width,
    keep_strongest_heads_,
    keep_strongest_neurons_,
    narrow_hidden,
    plan_heads,
)
from hf_compress.modeling.surgery import first_layer_stays, keep_layers_
from hf_compress.modeling.tasks import unwrap

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
            (TinyBERT, Jiao et al., 2020, arXiv:1909.10351, section 3.1), so the teacher's last layer is always kept.
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
    """Copies a teacher with fewer layers, channels, neurons or heads; what stays, its head too, keeps its weights.

    Layers are chosen first, then heads and neurons, then hidden channels, each by the size of its weights. The width
    of a head never changes: part of a head would attend to other tokens than the head.

    Args:
        teacher (`PreTrainedModel`): A model of a known architecture; left untouched.
        config (`StudentConfig`): How many layers to keep and which, how wide, and whether with the teacher's weights.

    Returns:
        `PreTrainedModel`: A model of the teacher's class, all of it trainable. Its saved checkpoint is a stock one,
        unless the teacher's is not, or only heads were cut and the stock config has no key for that.

    Raises:
        ValueError: if the layers or sizes cannot be taken from this teacher, no stock config can express a hidden size
            with the other sizes, its architecture is unknown, or it is quantized.
    """
    _check_wrapper(teacher, config)
    _check_teacher(teacher, config)
    release_gates_(teacher)
    student = copy.deepcopy(teacher)
    remove_autocast_(student.modules())
    for position, stack in enumerate(find_stacks(teacher)):
        number, layers = _choice(config, is_decoder=position > 0)
        total = count_layers(teacher, stack)
        if number is None and isinstance(layers, str):
            number = total
        chosen = choose_layers(total, number, layers, first_layer_stays(teacher, stack))
        keep_layers_(student, chosen, stack)
        logger.info("Student %s: layers %s of the teacher's %d.", stack, chosen, total)
    student = _narrow(student, config)
    if config.init == "random":
        student = _redraw(student)
    return student.requires_grad_(True)


def _narrow(student: "PreTrainedModel", config: StudentConfig) -> "PreTrainedModel":
    """A student cut to the widths asked for: itself, or a new model where the hidden size changes."""
    hidden_size = None if config.hidden_size == hidden_width(student) else config.hidden_size
    heads = plan_heads(student, hidden_size, config.num_heads)
    for stack, number in heads.items():
        keep_strongest_heads_(student, number, stack)
    if config.intermediate_size is not None:
        keep_strongest_neurons_(student, config.intermediate_size)
    if hidden_size is not None:
        student = narrow_hidden(student, hidden_size)
    if _compression(student) is not None or heads or config.intermediate_size is not None:
        write_widths_(student)
    for key, value in (("hidden size", hidden_size), ("heads", heads), ("neurons", config.intermediate_size)):
        if value:
            logger.info("Student %s: %s, those with the largest weights.", key, value)
    return student


def _redraw(student: "PreTrainedModel") -> "PreTrainedModel":
    """A model with the shapes of a student, and with weights drawn as its class draws them."""
    fresh = type(student)(copy.deepcopy(student.config))
    if _compression(student) is not None:
        cut_to_widths_(fresh, read_widths(student))
    if fresh.can_generate():
        fresh.generation_config = copy.deepcopy(student.generation_config)
    if fresh.state_dict().keys() != student.state_dict().keys():
        raise ValueError(
            f"init='random' builds a {type(student).__name__} from its config, which has other tensors than the "
            f"teacher: {', '.join(sorted(fresh.state_dict().keys() ^ student.state_dict().keys()))}. Load the teacher "
            "as its config describes it, or leave init out."
        )
    # Tables of angles, which no state has, stay in float32, as `from_pretrained` leaves them.
    dtypes = {name: tensor.dtype for name, tensor in student.state_dict().items()}
    for name, tensor in fresh.state_dict(keep_vars=True).items():
        tensor.data = tensor.detach().to(dtypes[name])
    return fresh.to(student.device).train(student.training)


def _compression(model: "PreTrainedModel") -> Any:
    return model.config.to_dict().get("quantization_config")


def _check_teacher(teacher: "PreTrainedModel", config: StudentConfig) -> None:
    compression = _compression(teacher)
    is_packed = getattr(unwrap(teacher), "is_quantized", False)
    if compression is not None and (compression["quant_method"] != METHOD or is_packed):
        raise ValueError(
            f"The teacher {type(teacher).__name__} is quantized ({compression['quant_method']}): a student of it "
            "could not be trained. Make the student from the full-precision model, then quantize the student."
        )
    is_prepared = any("prepared_for" in vars(module) for module in teacher.modules())
    if is_prepared and (config.hidden_size is not None or config.init == "random"):
        raise ValueError(
            f"The teacher {type(teacher).__name__} was prepared by fake_quantize_, and the new model that "
            f"hidden_size={config.hidden_size} and init={config.init!r} need would not be: make the student of the "
            "model before, and call fake_quantize_ on the student."
        )
    has_decoder = len(find_stacks(teacher)) > 1
    if not has_decoder and (config.num_decoder_layers is not None or config.decoder_layers is not None):
        raise ValueError(
            f"num_decoder_layers={config.num_decoder_layers} and decoder_layers={config.decoder_layers} are for an "
            f"encoder-decoder, and {type(teacher).__name__} is none: leave them out."
        )


def _check_wrapper(teacher: "PreTrainedModel", config: StudentConfig) -> None:
    if unwrap(teacher) is not teacher and (config.hidden_size is not None or config.init == "random"):
        raise ValueError(
            f"The teacher is wrapped in a {type(teacher).__name__}, but hidden_size={config.hidden_size} and "
            f"init={config.init!r} need a new model of its class: give the model inside, with adapters merged."
        )


def _choice(config: StudentConfig, is_decoder: bool) -> tuple[int | None, LayerRule | Sequence[int]]:
    if not is_decoder:
        return config.num_layers, config.layers
    if config.decoder_layers is not None and not isinstance(config.decoder_layers, str):
        return config.num_decoder_layers, config.decoder_layers
    return config.num_decoder_layers or config.num_layers, config.decoder_layers or config.layers
