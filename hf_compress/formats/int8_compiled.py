"""Eight-bit projections by our own C code, in `csrc`, where a compiler was there when the package was installed.

PyTorch's operations round, multiply and rescale one after the other, and for few tokens each takes longer to be called
than to be computed; for many, products are written and read once more. The C code does all three in one call.
"""

import torch

from hf_compress.formats.int8_operations import LARGEST, Prepare

# As in csrc/int8.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INSTRUCTIONS = ("AVX2", "AVX-512 VNNI", "AMX")
"""What there is code for, as csrc/int8.c numbers it."""


def prepare_with(instructions: str) -> Prepare:
    """Packs weights for one set of instructions, see `int8_operations.Prepare`.

    Args:
        instructions (`str`): One of `INSTRUCTIONS`.

    Returns:
        `Prepare`: From weights, in int8 of shape (outputs, inputs), and their scales, in float32 of shape (outputs,),
        to a projection that is equal for a token to the last bit, whatever else is in the batch, and by whichever
        instructions. It raises an `ImportError` if the C code was not compiled, and a `RuntimeError` if the processor
        has no such instructions.
    """
    return lambda weight, scales: CompiledProjection(weight, scales, instructions)


class CompiledProjection:
    """A `Projection` by the C code.

    Args:
        weight (`torch.Tensor`): In int8, of shape (outputs, inputs).
        scales (`torch.Tensor`): In float32, of shape (outputs,).
        instructions (`str`): One of `INSTRUCTIONS`.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, instructions: str) -> None:
        from hf_compress.formats import int8_native

        self._set = INSTRUCTIONS.index(instructions)
        name, is_supported, panel, multiple = int8_native.sets()[self._set]
        assert name == instructions
        if not is_supported:
            raise RuntimeError(f"This processor has no {instructions}.")
        self.n_outputs, self.n_inputs = weight.shape
        if scales.shape != (self.n_outputs,):
            raise RuntimeError(f"{self.n_outputs} scales expected, one per output, {tuple(scales.shape)} given")
        self._code, self._scales = int8_native, scales.float() / LARGEST
        n_rows, n_columns = self.n_outputs + -self.n_outputs % panel, self.n_inputs + -self.n_inputs % multiple
        self._panels = torch.empty(n_rows * n_columns, dtype=torch.int8, device="cpu")
        self._sums = torch.empty(n_rows, dtype=torch.int32, device="cpu")
        # The addresses are read once: a call costs as much as some thousand multiplications.
        self._places = self._panels.data_ptr(), self._sums.data_ptr(), self._scales.data_ptr()
        weight = weight.contiguous()
        self._code.pack(self._set, weight.data_ptr(), *weight.shape, *self._places[:2])

    def __call__(self, states: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Projects hidden states, see `int8_operations.Projection`; outputs have their dtype."""
        tokens = states.reshape(-1, states.shape[-1]).contiguous()
        if tokens.dtype not in _DTYPES:
            tokens = tokens.float()
        n_tokens, n_outputs = len(tokens), self.n_outputs
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
        outputs = torch.empty(n_tokens, n_outputs, dtype=tokens.dtype, device="cpu")
        self._code.project(
            self._set, tokens.data_ptr(), n_tokens, self.n_inputs, *self._places,
            0 if bias is None else bias.data_ptr(), outputs.data_ptr(), n_outputs, _DTYPES[tokens.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return outputs
