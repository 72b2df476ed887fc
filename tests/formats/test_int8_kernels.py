import logging
import platform
import shutil
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_compress.formats import int8, int8_kernels, int8_operations
from hf_compress.formats.int8 import Int8Linear, quantize_rows
from hf_compress.formats.int8_compiled import INSTRUCTIONS
from hf_compress.formats.int8_kernels import (
    CANDIDATES,
    COMPILED_AMX,
    COMPILED_AVX2,
    COMPILED_VNNI,
    FLOAT32,
    INT_MM_CUDA,
    Kernel,
    bytes_pay,
    is_exact,
    kernel_for,
)
from hf_compress.formats.int8_operations import (
    in_steps,
    largest_of_rows,
    prepare_float32,
    round_signed,
)

COMPILED = (COMPILED_AVX2, COMPILED_VNNI, COMPILED_AMX)
EVERY = {kernel.name: kernel for kernel in (*CANDIDATES["cpu"], INT_MM_CUDA, FLOAT32)}
# On this processor: those that are missing or clip are not used by `kernel_for` either.
EXACT = [name for name, kernel in EVERY.items() if is_exact(kernel, "cpu")]


def project(kernel: Kernel, tokens: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return kernel.prepare(weight, scales)(tokens, None)


def test_a_product_in_float32_is_always_exact():
    assert FLOAT32.name in EXACT


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 75, 37), (2, 3, 5), (19, 64, 8), (130, 33, 50)])
@pytest.mark.parametrize("name", EXACT)
def test_every_kernel_gives_the_formula(name, shape):
    n_tokens, n_inputs, n_outputs = shape
    generator = torch.Generator().manual_seed(0)
    # Whole numbers, and a power of two as step: no number lies between two that it could be rounded to.
    numbers = torch.randint(-127, 128, (n_tokens, n_inputs), generator=generator)
    numbers[:, 0] = 127
    steps = 2.0 ** torch.arange(-10, 10)[torch.randint(20, (n_tokens, 1), generator=generator)]
    weight = torch.randint(-127, 128, (n_outputs, n_inputs), generator=generator).to(torch.int8)
    scales = torch.rand(n_outputs, generator=generator) + 0.1
    found = project(EVERY[name], numbers * steps, weight, scales)
    expected = (numbers.double() @ weight.double().T) * steps * scales
    torch.testing.assert_close(found, expected.float(), rtol=2e-6, atol=1e-4 * float(steps.max()))


@pytest.mark.parametrize("name", EXACT)
def test_rows_are_rounded_like_weights(name):
    rows = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 3
    expected = quantize_rows(rows)[0].float()
    found = project(EVERY[name], rows, torch.eye(300).to(torch.int8), torch.ones(300)) / quantize_rows(rows)[1]
    # A number halfway between two may go either way.
    is_different = (found - expected).abs() > 1e-3
    assert is_different.float().mean() < 1e-3
    assert (found - expected).abs().max() < 1.001


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(name, wrong):
    rows = torch.randn(20, 40, generator=torch.Generator().manual_seed(1))
    weight = quantize_rows(torch.randn(16, 40, generator=torch.Generator().manual_seed(2)))[0]
    clean = project(EVERY[name], rows, weight, torch.ones(16))
    rows[3, 5] = wrong
    found = project(EVERY[name], rows, weight, torch.ones(16))
    assert not found[3].isfinite().any()
    others = [row for row in range(20) if row != 3]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("name", EXACT)
def test_rows_of_zeros_and_of_tiny_numbers(name):
    rows = torch.zeros(4, 10)
    rows[1] = 1e-9
    weight = torch.full((3, 10), 127, dtype=torch.int8)
    found = project(EVERY[name], rows, weight, torch.ones(3))
    assert (found[[0, 2, 3]] == 0).all()
    torch.testing.assert_close(found[1], torch.full((3,), 1270e-9), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1, 300])
def test_largest_of_rows(size):
    rows = torch.randn(size, 300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(largest_of_rows(rows), rows.abs().amax(1, keepdim=True))
    rows[0, 7] = torch.nan
    assert largest_of_rows(rows).isnan().sum() == 1


def test_a_product_that_clips_or_is_missing_is_not_used(monkeypatch, caplog):
    def clipping(weight: torch.Tensor, scales: torch.Tensor):
        # As processors without VNNI do: pairs of products are added in 16 bits.
        def multiply(numbers: torch.Tensor) -> torch.Tensor:
            products = numbers.float()[:, None] * weight.float()
            pairs = torch.nn.functional.pad(products, (0, products.shape[2] % 2)).unflatten(2, (-1, 2)).sum(3)
            return pairs.clamp(-(2**15), 2**15 - 1).sum(2) * scales

        return multiply

    def missing(weight: torch.Tensor, scales: torch.Tensor):
        return torch.ops.onednn.no_such_product.default(weight, scales)

    # Unsigned integers reach further, as oneDNN's do; here a larger weight does.
    clips = Kernel("clips", in_steps(round_signed, lambda weight, scales: clipping(weight.int() * 2, scales / 2)))
    lacks = Kernel("lacks", in_steps(round_signed, missing))
    assert not is_exact(clips, "cpu")
    assert not is_exact(lacks, "cpu")
    monkeypatch.setitem(CANDIDATES, "cpu", (clips, lacks))
    kernel_for.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, int8_kernels.__name__):
            assert kernel_for("cpu") is FLOAT32
            assert kernel_for("cpu") is FLOAT32
    finally:
        kernel_for.cache_clear()
    assert len(caplog.records) == 1
    assert "slower than in floating point" in caplog.text


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_product_of_integers_slower_than_float32_is_not_used(is_slow, monkeypatch):
    def waiting(kernel: Kernel) -> Kernel:
        def prepare(weight: torch.Tensor, scales: torch.Tensor):
            project = kernel.prepare(weight, scales)
            return lambda states, bias: time.sleep(0.2) or project(states, bias)

        return Kernel(kernel.name, prepare)

    name = "INT_MM" if is_slow else "FLOAT32"
    monkeypatch.setattr(int8_kernels, name, waiting(getattr(int8_kernels, name)))
    monkeypatch.setitem(CANDIDATES, "cpu", (int8_kernels.INT_MM,))
    for found_out in (kernel_for, bytes_pay):
        found_out.cache_clear()
    try:
        assert kernel_for("cpu") is (int8_kernels.FLOAT32 if is_slow else int8_kernels.INT_MM)
        assert bytes_pay() is not is_slow
    finally:
        for found_out in (kernel_for, bytes_pay):
            found_out.cache_clear()


def test_other_devices_multiply_in_float32(caplog):
    kernel_for.cache_clear()
    with caplog.at_level(logging.WARNING, int8_kernels.__name__):
        assert kernel_for("meta") is FLOAT32
    assert "float32" in caplog.text
    kernel_for.cache_clear()


@pytest.fixture
def roundings(monkeypatch) -> list[int]:
    """How many tokens were rounded before they were multiplied, one entry each time."""
    sizes = []

    def count(tokens):
        sizes.append(len(tokens))
        return round_signed(tokens)

    monkeypatch.setattr(int8, "kernel_for", lambda _: Kernel("counts", in_steps(count, prepare_float32)))
    return sizes


def two_projections() -> list[Int8Linear]:
    return [Int8Linear.from_float(torch.randn(16, 8), None) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_hidden_states_are_rounded_once(roundings, dtype):
    first, second = two_projections()
    states = torch.randn(2, 3, 8, dtype=dtype)
    with torch.no_grad():
        together = first(states), second(states)
        assert roundings == [6]
        assert torch.equal(second(states.clone()), together[1])
        assert torch.equal(first(states.clone()), together[0])
        assert roundings == [6, 6, 6]


def test_what_one_kernel_rounded_is_not_taken_by_another():
    tokens, weight, scales, _ = random_case(5, 40, 16)
    found = [EVERY[name].prepare(weight, scales)(tokens, None) for name in EXACT]
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0.02 * float(found[0].abs().max()))


def test_hidden_states_that_changed_in_their_place_are_rounded_anew(roundings):
    first, second = two_projections()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            states = torch.randn(3, 8)
            first(states)
            states.mul_(2)
            assert torch.equal(second(states), second(states.clone()))
    with torch.inference_mode():
        # Their versions are not counted, so that nobody could tell.
        roundings.clear()
        first(states), second(states)
        assert roundings == [3, 3]


def test_nothing_is_kept_of_hidden_states_that_are_gone(roundings):
    first, _ = two_projections()
    states = torch.randn(3, 8)
    with torch.no_grad():
        first(states)
    assert int8_operations._last_rounded._known.states() is states
    del states
    assert int8_operations._last_rounded._known is None


@pytest.mark.skipif(
    platform.system() != "Linux"
    or platform.machine() != "x86_64"
    or shutil.which("gcc") is None
    or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="our C code is optional",
)
def test_c_code_is_there_where_it_can_be_compiled():
    from hf_compress.formats import int8_native

    supported = {f"compiled for {name}": is_supported for name, is_supported, _, _ in int8_native.sets()}
    assert {kernel.name: kernel.name in EXACT for kernel in COMPILED} == supported


def test_the_c_code_and_its_callers_number_instructions_alike():
    native = pytest.importorskip("hf_compress.formats.int8_native")
    assert tuple(name for name, *_ in native.sets()) == INSTRUCTIONS
    for wrong in (-1, len(INSTRUCTIONS)):
        with pytest.raises(ValueError, match="none has the number"):
            native.pack(wrong, 0, 0, 0, 0, 0)
    with pytest.raises(TypeError, match="6 integers expected, 2 given"):
        native.pack(0, 0)
    with pytest.raises(TypeError):
        native.pack(0, "weights", 0, 0, 0, 0)


compiled = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(
            kernel,
            id=kernel.name,
            marks=pytest.mark.skipif(kernel.name not in EXACT, reason="not compiled, or not for this processor"),
        )
        for kernel in COMPILED
    ],
)
SHAPES = [(1, 1, 1), (3, 75, 37), (8, 16, 48), (33, 64, 100), (70, 130, 49), (129, 384, 384)]


def random_case(n_tokens: int, n_inputs: int, n_outputs: int) -> tuple[torch.Tensor, ...]:
    """Tokens, integers of weights, scales and biases."""
    torch.manual_seed(0)
    weight, scales = quantize_rows(torch.randn(n_outputs, n_inputs))
    return torch.randn(n_tokens, n_inputs), weight, scales[:, 0], torch.randn(n_outputs)


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_c_code_gives_each_token_the_same_bits(shape, kernel, monkeypatch):
    tokens, weight, scales, bias = random_case(*shape)
    project = kernel.prepare(weight, scales)
    found = project(tokens, bias)
    for row in {0, shape[0] // 2, shape[0] - 1}:
        assert torch.equal(project(tokens[row : row + 1], bias)[0], found[row])
    for number in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert torch.equal(project(tokens, bias), found)
    # Every other column of every other row, as of a slice.
    wide = torch.stack([tokens, tokens], 2).repeat_interleave(2, 0)[::2, :, 0]
    assert not wide.is_contiguous() or shape == (1, 1, 1)
    assert torch.equal(project(wide, bias), found)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_set_of_instructions_gives_the_same_bits(shape):
    tokens, weight, scales, bias = random_case(*shape)
    tokens[-1, -1], tokens[0, 0] = torch.inf, torch.nan
    projections = [kernel.prepare(weight, scales) for kernel in COMPILED if kernel.name in EXACT]
    for one in (bias, None):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            found = [project(tokens.to(dtype), one) for project in projections]
            assert all(torch.equal(one.nan_to_num(0.5), found[0].nan_to_num(0.5)) for one in found)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_c_code_reads_and_writes_16_bits_as_torch_casts_them(dtype, kernel):
    tokens, weight, scales, bias = random_case(40, 75, 130)
    tokens[3], tokens[4], tokens[5, 2], tokens[6, 3] = 0, 1e-6, torch.nan, torch.inf
    # Products out of float16's range become infinite, and those near the smallest number lose bits.
    scales = scales * torch.logspace(-6, 6, 130)
    project = kernel.prepare(weight, scales)
    found, expected = project(tokens.to(dtype), bias), project(tokens.to(dtype).float(), bias).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@compiled
def test_c_code_may_be_called_by_several_threads_at_once(kernel):
    cases = [random_case(n_tokens, 96, 200) for n_tokens in (40, 64, 150, 7)]
    calls = [(kernel.prepare(weight, scales), tokens, bias) for tokens, weight, scales, bias in cases]
    expected = [project(tokens, bias) for project, tokens, bias in calls]

    def work(first: int) -> bool:
        turns = [(first + turn) % len(calls) for turn in range(100)]
        return all(torch.equal(calls[turn][0](*calls[turn][1:]), expected[turn]) for turn in turns)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@compiled
def test_c_code_and_operations_round_alike(kernel):
    tokens, weight, scales, bias = random_case(200, 384, 200)
    found, other = (one.prepare(weight, scales)(tokens, bias) for one in (kernel, FLOAT32))
    # A number halfway between two may be rounded either way.
    is_far = (found - other).abs().amax(1) > 1e-5 * other.abs().amax(1)
    assert is_far.float().mean() < 0.05
    torch.testing.assert_close(found, other, rtol=0, atol=0.01 * float(other.abs().max()))


@compiled
def test_c_code_is_told_the_truth(kernel):
    tokens, weight, scales, bias = random_case(4, 75, 37)
    project = kernel.prepare(weight, scales)
    with pytest.raises(RuntimeError, match="75 inputs on the CPU"):
        project(tokens[:, :74], bias)
    with pytest.raises(RuntimeError, match="on meta"):
        project(tokens.to("meta"), bias)
    assert torch.equal(project(tokens.double(), bias), project(tokens, bias))
    with pytest.raises(RuntimeError, match="37 biases"):
        project(tokens, bias[:36])
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="holds no numbers"):
        project(mode.from_tensor(tokens), None)
    with pytest.raises(RuntimeError, match="trace"):
        torch.jit.trace(lambda states: project(states, None), (tokens,))
    with pytest.raises(RuntimeError, match="37 scales"):
        kernel.prepare(weight, scales[:36])


@compiled
def test_rows_too_small_to_divide_by_are_zeros(kernel):
    tokens = torch.full((2, 20), 1e-38)
    tokens[1] = 1e-44
    assert kernel.prepare(torch.ones(3, 20, dtype=torch.int8), torch.ones(3))(tokens, None).eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 75, 37), (16, 64, 64), (17, 64, 64), (300, 384, 1536)])
def test_cuda_agrees_with_the_cpu(shape):
    n_tokens, n_inputs, n_outputs = shape
    assert kernel_for("cuda") is INT_MM_CUDA
    linear = torch.nn.Linear(n_inputs, n_outputs)
    module = Int8Linear.from_float(linear.weight, linear.bias)
    tokens = torch.randn(n_tokens, n_inputs)
    with torch.no_grad():
        expected = module(tokens)
        found = module.cuda()(tokens.cuda()).cpu()
    # A number halfway between two may be rounded either way.
    assert (found - expected).norm() < 1e-3 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these products are of x86 processors")
@pytest.mark.parametrize("kernel", [one for one in CANDIDATES["cpu"] if one not in COMPILED], ids=lambda one: one.name)
def test_operations_that_kernels_call_are_there(kernel):
    tokens = (torch.arange(120).view(8, 15) % 255 - 127).float()
    tokens[:, 0] = 127
    # Weights so small that no processor clips.
    weight = (torch.arange(60).view(4, 15) % 61 - 30).to(torch.int8)
    found = project(kernel, tokens, weight, torch.ones(4))
    torch.testing.assert_close(found, tokens @ weight.float().T, rtol=1e-6, atol=1e-2)
