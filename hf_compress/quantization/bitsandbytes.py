"""LLM.int8, NF4 and FP4 by bitsandbytes: from a live model to a quantized one."""

import logging
import math
from collections.abc import Mapping

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_compress.checkpoint.config import CompressionConfig
from hf_compress.checkpoint.inner import mark_inner_
from hf_compress.checkpoint.sparse import mark_sparse_, sparse_names
from hf_compress.checkpoint.widths import write_widths_
from hf_compress.modeling.projections import in_width, out_width, read_matrix
from hf_compress.quantization.bitsandbytes_skips import float_patterns
from hf_compress.quantization.modules import choose_modules, mark_quantized_

logger = logging.getLogger(__name__)

# What the 4-bit kernel of a CPU with AVX512-BF16 takes, and a block of scales: the same everywhere, so that a
# checkpoint runs on other machines than the one it was made on.
MULTIPLE_OF_INPUTS, MULTIPLE_OF_OUTPUTS = 64, 32
# bitsandbytes casts weights to float16 before it rounds them to 8 bits.
LARGEST_HALF = 65504.0


def quantize_bitsandbytes_(model: PreTrainedModel, config: BitsAndBytesConfig, data: None = None) -> None:
    """Quantizes the projections of a model with bitsandbytes, in place and in memory, on the device where it is.

    The config of bitsandbytes is inside a `CompressionConfig`: Transformers can load a stock checkpoint and not save
    it again, 4-bit modules do not survive an inference unharmed (see `ExactLinear4bit`), and the widths of a pruned
    model have to be known before its weights load. Tensors are stored as in a stock checkpoint, but for 8-bit
    integers (see `stored_state`). A dense 4-bit model is a stock checkpoint as soon as `quantization_config` in
    config.json is replaced by the `inner` that is in it.

    With a threshold above 0, which columns LLM.int8 computes in floating point depends on the whole batch; 0.0 makes
    the outputs of a text independent of the others.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point; pruned ones included.
        config (`BitsAndBytesConfig`): These fields have an effect: `load_in_8bit` with `llm_int8_threshold`,
            or `load_in_4bit` with `bnb_4bit_quant_type`, `bnb_4bit_use_double_quant`, `bnb_4bit_compute_dtype` and
            `bnb_4bit_quant_storage`. `llm_int8_skip_modules` are names of modules, or regular expressions for whole
            names, that stay in floating point on top of the task head. It is not changed.
        data (`None`, *optional*): Not needed: activations are measured while the model runs.

    Raises:
        ImportError: if bitsandbytes or accelerate is missing.
        ValueError: if the model is quantized already, or the config, the weights and this library do not fit.
        TypeError: if a field of the config is of another type.
    """
    _check_config(config)
    AutoHfQuantizer.from_config(config).validate_environment()
    modules = choose_projections(model, config)
    make = _make_8bit if config.load_in_8bit else _make_4bit
    for name, module in modules.items():
        _check_weight(name, module, config)
    # All are made before the first is placed, so that an error leaves the model as it was.
    made = {name: make(module, config).train(model.training) for name, module in modules.items()}
    written = BitsAndBytesConfig.from_dict(config.to_dict())
    written.llm_int8_skip_modules = float_patterns(model, modules)
    sparse = [name for name in sparse_names(model) if name.rpartition(".")[0] not in modules]
    if len(sparse) < len(sparse_names(model)):
        mark_sparse_(model, sparse)
    # Widths are read from the projections, which are there no longer afterwards.
    write_widths_(model)
    for name, module in made.items():
        # As Transformers notes it, for whoever turns the module back.
        module.source_cls = type(modules[name])
        model.set_submodule(name, module)
    _mark_(model, written)


def fits_4bit(module: nn.Module) -> bool:
    """Whether a projection has widths that every 4-bit kernel takes.

    Args:
        module (`nn.Module`): An `nn.Linear` or `Conv1D`.

    Returns:
        `bool`: Whether it has a multiple of 64 inputs, so that no block of scales spans two rows, and a multiple of
        32 outputs.
    """
    return in_width(module) % MULTIPLE_OF_INPUTS == 0 and out_width(module) % MULTIPLE_OF_OUTPUTS == 0


def _check_config(config: BitsAndBytesConfig) -> None:
    # Again, because a config may be changed after it was made.
    config.post_init()
    if not config.is_quantizable():
        raise ValueError(
            "This BitsAndBytesConfig has neither load_in_8bit nor load_in_4bit, so it quantizes nothing: set one."
        )
    if config.quantization_method() is None:
        raise ValueError(
            f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r} is no 4-bit format of bitsandbytes: give 'nf4' or "
            "'fp4'."
        )
    if not 0 <= config.llm_int8_threshold < math.inf:
        raise ValueError(
            f"llm_int8_threshold={config.llm_int8_threshold} is no size of an activation: give a number from 0.0, "
            "which rounds all activations, such as 6.0."
        )
    for option, purpose in (
        ("llm_int8_has_fp16_weight", "is for CUDA, and keeps the weights in float16, so that nothing gets smaller"),
        ("llm_int8_enable_fp32_cpu_offload", "splits a model between CUDA and the CPU while it is loaded"),
    ):
        if getattr(config, option):
            raise ValueError(f"{option}=True {purpose}; a model in memory is quantized where it is: leave it out.")


def choose_projections(model: PreTrainedModel, config: BitsAndBytesConfig) -> dict[str, nn.Module]:
    """The projections that bitsandbytes quantizes; the widths of those that 4 bits cannot take are logged.

    Args:
        model (`PreTrainedModel`): A model of a known architecture, in floating point.
        config (`BitsAndBytesConfig`): Names what stays in floating point besides the task head.

    Returns:
        `dict[str, nn.Module]`: By dotted name.

    Raises:
        ValueError: if none is left.
    """
    chosen = choose_modules(model, config.llm_int8_skip_modules or ())
    # What bitsandbytes' quantizer passes over when it rebuilds the model, it must not find quantized.
    float32 = list(model._keep_in_fp32_modules or [])
    chosen = {
        name: module
        for name, module in chosen.items()
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, float32)
    }
    if not chosen:
        raise ValueError(
            f"llm_int8_skip_modules={config.llm_int8_skip_modules} leaves nothing to quantize, besides what "
            f"{type(model).__name__} keeps in float32: name fewer modules."
        )
    if config.load_in_8bit:
        return chosen
    odd = [name for name, module in chosen.items() if not fits_4bit(module)]
    rule = (
        f"4-bit kernels need a multiple of {MULTIPLE_OF_INPUTS} inputs and of {MULTIPLE_OF_OUTPUTS} outputs. Prune to "
        f"such widths with multiple_of={MULTIPLE_OF_INPUTS}, or give load_in_8bit=True, which takes all widths."
    )
    if len(odd) == len(chosen):
        raise ValueError(
            f"None of the {len(chosen)} projections has widths that 4 bits can take ({_sizes(chosen)}): {rule}"
        )
    if odd:
        names = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        counts = f"{len(odd)} of {len(chosen)}"
        logger.warning("%s projections are left in floating point for their widths (%s): %s", counts, names, rule)
    return {name: module for name, module in chosen.items() if name not in set(odd)}


def _sizes(modules: Mapping[str, nn.Module]) -> str:
    sizes = {f"{in_width(module)} -> {out_width(module)}": None for module in modules.values()}
    return ", ".join(list(sizes)[:5])


def _check_weight(name: str, module: nn.Module, config: BitsAndBytesConfig) -> None:
    largest = module.weight.detach().abs().max().item()
    if not math.isfinite(largest):
        raise ValueError(
            f"The weight of {name} has infinities or NaN, which no integer can stand for: quantize a model whose "
            "weights are finite."
        )
    if config.load_in_8bit and largest > LARGEST_HALF:
        raise ValueError(
            f"The weight of {name} goes up to {largest:.3g}, and bitsandbytes casts weights to float16, whose largest "
            f"number is {LARGEST_HALF:.0f}, before it rounds them to 8 bits: add it to llm_int8_skip_modules."
        )


def _make_8bit(module: nn.Module, config: BitsAndBytesConfig) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(
        in_width(module),
        out_width(module),
        module.bias is not None,
        has_fp16_weights=False,
        threshold=config.llm_int8_threshold,
        device="meta",
    )
    # It rounds weights that are moved from the CPU, be it to the CPU.
    weight = bnb.nn.Int8Params(read_matrix(module).cpu(), requires_grad=False, has_fp16_weights=False)
    return _finish(made, module, weight)


def _make_4bit(module: nn.Module, config: BitsAndBytesConfig) -> nn.Module:
    import bitsandbytes as bnb

    from hf_compress.formats.linear4bit import ExactLinear4bit

    made = ExactLinear4bit(
        in_width(module),
        out_width(module),
        module.bias is not None,
        config.bnb_4bit_compute_dtype,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        device="meta",
    )
    weight = bnb.nn.Params4bit(
        read_matrix(module),
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        module=made,
    )
    return _finish(made, module, weight)


def _finish(made: nn.Module, module: nn.Module, weight: nn.Parameter) -> nn.Module:
    made.weight = weight.to(module.weight.device)
    # A parameter of its own: that of the module goes on as it is if another module cannot be quantized.
    made.bias = None if module.bias is None else nn.Parameter(module.bias.detach(), requires_grad=False)
    return made


def _mark_(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    ours = vars(model.config).get("quantization_config")
    inner = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    inner["quant_method"] = config.quant_method.value
    model.config.quantization_config = CompressionConfig(
        ours.widths if ours else None, ours.sparse if ours else None, inner=inner
    )
    mark_quantized_(model)
    mark_inner_(model, model.hf_quantizer.inner)
