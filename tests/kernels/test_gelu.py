"""GELU: the reference by gradcheck, the kernels against it in float64, in Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from textlock.kernels import gelu as module
from textlock.kernels.gelu import gelu, gelu_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TINY = 5e-7  # relative error of a few operations in float32


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(*shapes, dtype=F64):
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.randn(shape, dtype=F64, generator=generator)).to(DEVICE, dtype) for shape in shapes]


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def assert_as_good_as_torch(value, truth, by_torch, name):
    """The interpreter cuts float32 off to bfloat16 instead of rounding it, which doubles the error."""
    cut_off = 2 if value.dtype == BF16 and DEVICE.type == "cpu" else 1
    error, bound = relative_error(value, truth), 2 * cut_off * relative_error(by_torch, truth) + TINY
    assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.2e}"


CASES = [
    pytest.param((5, 64), F32, id="5x64 float32"),
    pytest.param((2, 50, 768), F16, id="2x50x768 float16"),
    pytest.param((7, 3072), F32, id="7x3072 float32"),
    pytest.param((33, 513), F16, id="33x513 unaligned, a last block of one column", marks=pytest.mark.memcheck),
    pytest.param((20, 352), BF16, id="20x352 bfloat16"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_kernel_is_the_exact_gelu(shape, dtype):
    (fc1,) = make(shape, dtype=dtype)
    h = module._launch_gelu(fc1)
    assert h.dtype == dtype
    assert_as_good_as_torch(h, F.gelu(fc1.double()), F.gelu(fc1), "h")


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_kernel_finds_the_gradient(shape, dtype):
    d_h, fc1 = make(shape, shape, dtype=dtype)
    result = module._launch_gelu_backward(d_h, fc1)
    truth = module._gelu_backward_reference(d_h.double(), fc1.double())
    leaf = fc1.clone().requires_grad_()
    (by_torch,) = torch.autograd.grad(F.gelu(leaf), leaf, d_h)
    assert result.d_fc1.dtype == result.h.dtype == dtype and result.d_fc1_sum.dtype == F32
    assert_as_good_as_torch(result.d_fc1, truth.d_fc1, by_torch, "d_fc1")
    assert_as_good_as_torch(result.h, truth.h, F.gelu(fc1), "h")
    assert relative_error(result.d_fc1_sum, truth.d_fc1_sum) <= 1e-6


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    d_h, fc1 = make((70, 96), (70, 96), dtype=F16)
    for first, second in zip(*(module._launch_gelu_backward(d_h, fc1) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_no_rows_have_no_sum():
    empty = torch.empty((0, 64), device=DEVICE)
    assert module._launch_gelu(empty).shape == (0, 64)
    assert torch.equal(module._launch_gelu_backward(empty, empty).d_fc1_sum, torch.zeros(64, device=DEVICE))


class GeluFunction(torch.autograd.Function):
    """The public functions, as a block calls them."""

    @staticmethod
    def forward(ctx, fc1):
        ctx.save_for_backward(fc1)
        return gelu(fc1)

    @staticmethod
    def backward(ctx, d_h):
        return gelu_backward(d_h, *ctx.saved_tensors).d_fc1


def test_reference_passes_gradcheck():
    (fc1,) = make((2, 3, 6))
    assert torch.autograd.gradcheck(GeluFunction.apply, fc1.cpu().requires_grad_())


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_reference_makes_h_again_and_sums(dtype):
    d_h, fc1 = (t.cpu() for t in make((4, 5, 8), (4, 5, 8), dtype=dtype))
    result = gelu_backward(d_h, fc1)
    assert torch.equal(result.h, gelu(fc1)) and result.d_fc1.dtype == dtype
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 0.05}[dtype]
    expected = result.d_fc1.double().sum((0, 1))
    torch.testing.assert_close(result.d_fc1_sum.double(), expected, rtol=tolerance, atol=tolerance)


def test_refuses_strides_that_kernels_cannot_walk():
    (fc1,) = make((64, 6), dtype=F32)
    with pytest.raises(ValueError, match=r"fc1 of shape \[6, 64\] has strides \[1, 6\]: give a contiguous tensor"):
        module._launch_gelu(fc1.T)


@pytest.mark.gpu
@pytest.mark.xdist_group("much memory")
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 20 GiB of a GPU: offsets beyond 2^31 elements")
def test_offsets_beyond_32_bits():
    fc1 = torch.randn(2**31 // 3072 + 5, 3072, dtype=F16, device=DEVICE)
    result = gelu_backward(fc1, fc1)
    exact = module._gelu_backward_reference(fc1[-3:], fc1[-3:])
    torch.testing.assert_close(gelu(fc1)[-3:], exact.h, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.h[-3:], exact.h, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.d_fc1[-3:], exact.d_fc1, rtol=1e-3, atol=1e-3)
