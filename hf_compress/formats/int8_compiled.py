"""Eight-bit projections by our own C code, `int8_vnni.c`, where a compiler was there when the package was installed.

PyTorch's operations round, multiply and rescale one after the other, and for few tokens each takes longer to be called
than to be computed. The C code does all three in one call.
"""

import logging
from functools import cache

import torch
from torch.nn.functional import pad

from hf_compress.formats.int8_operations import LARGEST, Product, Projection, largest_numbers, prepare_onednn

logger = logging.getLogger(__name__)

# As in int8_vnni.c.
_PANEL, _LANES = 48, 16
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Multiplications per thread from which AMX pays the calls that it takes: an estimate from peak rates.
_MANY = 1 << 24


def has_amx() -> bool:
    """Whether this processor has units that multiply tiles of bytes, which oneDNN uses and our code does not."""
    is_there = getattr(torch._C._cpu, "_is_amx_tile_supported", None)
    return is_there is not None and is_there()


def prepare(weight: torch.Tensor, scales: torch.Tensor) -> Projection:
    """Packs weights for the C code, see `int8_operations.Prepare`.

    Args:
        weight (`torch.Tensor`): In int8, of shape (outputs, inputs).
        scales (`torch.Tensor`): In float32, of shape (outputs,).

    Returns:
        `Projection`: Equal for a token to the last bit, whatever else is in the batch.

    Raises:
        ImportError: if the C code was not compiled.
        RuntimeError: if the processor has no AVX-512 VNNI.
    """
    return CompiledProjection(weight, scales, has_amx() and onednn_agrees())


@cache
def onednn_agrees() -> bool:
    """Whether oneDNN's product gives the bits that our own gives, the largest integers included; found out once."""
    tokens, weight = largest_numbers("cpu")
    project = CompiledProjection(weight, torch.ones(len(weight), dtype=torch.float32, device="cpu"), amx=False)
    try:
        return torch.equal(project.project_many(tokens, 0, torch.get_num_threads()), project(tokens, None))
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("oneDNN cannot be used for large products of int8: %s", error)
        return False


class CompiledProjection:
    """A `Projection` by the C code, and by oneDNN where there is AMX and much to multiply.

    Args:
        weight (`torch.Tensor`): In int8, of shape (outputs, inputs).
        scales (`torch.Tensor`): In float32, of shape (outputs,).
        amx (`bool`): Whether there is.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, amx: bool) -> None:
        from hf_compress.formats import int8_vnni

        if not int8_vnni.is_supported():
            raise RuntimeError("This processor has no AVX-512 VNNI.")
        self.n_outputs, self.n_inputs = weight.shape
        if scales.shape != (self.n_outputs,):
            raise RuntimeError(f"{self.n_outputs} scales expected, one per output, {tuple(scales.shape)} given")
        self._code, self._has_amx = int8_vnni, amx
        self._weight, self._scales = weight.contiguous(), scales.float() / LARGEST
        self._n_padded = self.n_inputs + -self.n_inputs % _LANES
        n_rows = self.n_outputs + -self.n_outputs % _PANEL
        self._panels = torch.empty(n_rows * self._n_padded, dtype=torch.int8, device="cpu")
        self._sums = torch.empty(n_rows, dtype=torch.int32, device="cpu")
        # The addresses are read once: a call costs as much as some thousand multiplications.
        self._places = self._panels.data_ptr(), self._sums.data_ptr(), self._scales.data_ptr()
        self._code.pack(self._weight.data_ptr(), *weight.shape, *self._places[:2])
        self._onednn: Product | None = None

    def __call__(self, states: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Projects hidden states, see `int8_operations.Projection`; outputs have their dtype."""
        tokens = states.reshape(-1, states.shape[-1]).contiguous()
        if tokens.dtype not in _DTYPES:
            tokens = tokens.float()
        n_tokens, n_outputs, n_threads = len(tokens), self.n_outputs, torch.get_num_threads()
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace sees PyTorch's operations alone, not int8 in C: use torch.compile.")
        # The C code believes what it is told.
        if tokens.shape[1] != self.n_inputs or not tokens.is_cpu:
            raise RuntimeError(
                f"{self.n_inputs} inputs on the CPU expected, {tokens.shape[1]} on {tokens.device} given: bring the "
                "model's inputs to its device, and give it hidden states of its own width."
            )
        if not tokens.data_ptr():
            raise RuntimeError(f"A {type(tokens).__name__} holds no numbers to multiply: give real tensors.")
        if bias is not None:
            bias = bias.float().contiguous()
            if bias.shape != (n_outputs,) or not bias.is_cpu:
                raise RuntimeError(f"{n_outputs} biases on the CPU expected, {tuple(bias.shape)} given")
        address = 0 if bias is None else bias.data_ptr()
        if self._has_amx and n_tokens * self.n_inputs * n_outputs > _MANY * n_threads:
            return self.project_many(tokens, address, n_threads)
        outputs = torch.empty(n_tokens, n_outputs, dtype=tokens.dtype, device="cpu")
        self._code.project(
            tokens.data_ptr(), n_tokens, self.n_inputs, *self._places, address,
            outputs.data_ptr(), n_outputs, _DTYPES[tokens.dtype], n_threads,
        )  # fmt: skip
        return outputs

    def project_many(self, tokens: torch.Tensor, bias: int, n_threads: int) -> torch.Tensor:
        """The outputs of many tokens, by oneDNN; the bias is an address, or 0."""
        if self._onednn is None:
            self._onednn = prepare_onednn(pad(self._weight, (0, self._n_padded - self.n_inputs)), self._scales)
        n_tokens, dtype = len(tokens), _DTYPES[tokens.dtype]
        numbers = torch.empty(n_tokens, self._n_padded, dtype=torch.uint8, device="cpu")
        ranges = torch.empty(n_tokens, dtype=torch.float32, device="cpu")
        places = numbers.data_ptr(), ranges.data_ptr()
        self._code.round(tokens.data_ptr(), n_tokens, self.n_inputs, dtype, *places, n_threads)
        products = self._onednn(numbers)
        outputs = products if dtype == 0 else torch.empty_like(products, dtype=tokens.dtype)
        self._code.rescale(
            products.data_ptr(), n_tokens, self.n_outputs, ranges.data_ptr(), bias,
            outputs.data_ptr(), dtype, n_threads,
        )  # fmt: skip
        return outputs
