"""SwiGLU and its LayerNorm: the references by gradcheck, the kernels against them in float64.

The kernels run in Triton's interpreter, or on a GPU where there is one.
"""

import pytest
import torch
import torch.nn.functional as F

from textlock.kernels import swiglu
from textlock.kernels.swiglu import swiglu_norm, swiglu_norm_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TINY = 5e-7  # relative error of a few operations in float32


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(*shapes, seed=0):
    """Return float64 tensors that are no sums of few bits."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=F64, generator=generator).to(DEVICE) for shape in shapes]


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def assert_as_good_as_torch(value, truth, by_torch, name):
    """The interpreter cuts float32 off to bfloat16 instead of rounding it, which doubles the error."""
    cut_off = 2 if value.dtype == BF16 and DEVICE.type == "cpu" else 1
    error, bound = relative_error(value, truth), 2 * cut_off * relative_error(by_torch, truth) + TINY
    assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.2e}"


def plain(gate_up, weight, bias):
    """SwiGLU and LayerNorm as a user writes them."""
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate) * up
    if weight is None:
        return product
    return F.layer_norm(product, weight.shape, weight.to(product.dtype), bias.to(product.dtype), EPS)


# Leading shape, hidden width, type, LayerNorm.
CASES = [
    pytest.param((5,), 64, F32, True, id="5x64 float32"),
    pytest.param((50,), 352, F16, True, id="50x352 float16"),
    pytest.param((2, 5), 2048, F16, True, id="2x5x2048 float16"),
    pytest.param((1, 197), 352, F32, True, id="1x197x352 float32"),
    pytest.param((5,), 3072, F32, True, id="5x3072 float32"),
    pytest.param((257,), 64, F16, True, id="257x64 float16"),
    pytest.param((20,), 2048, BF16, True, id="20x2048 bfloat16"),
    pytest.param((7,), 170, F32, True, id="7x170 unaligned rows", marks=pytest.mark.memcheck),
    pytest.param((50,), 352, F16, False, id="50x352 float16 without LayerNorm"),
    pytest.param((3, 5), 2048, F32, False, id="3x5x2048 float32 without LayerNorm"),
]


def inputs_of(rows, hidden, dtype, normed):
    gate_up, weight, bias = make((*rows, 2 * hidden), hidden, hidden)
    gate_up = (2 * gate_up).to(dtype)
    return (gate_up, weight.float() + 1, bias.float()) if normed else (gate_up, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "hidden", "dtype", "normed"), CASES)
def test_kernel_multiplies_and_normalises(rows, hidden, dtype, normed):
    gate_up, weight, bias = inputs_of(rows, hidden, dtype, normed)
    result = swiglu._launch_swiglu_norm(gate_up, weight, bias, EPS)
    assert result.h.dtype == dtype and result.h.shape == (*rows, hidden)
    truth = swiglu._swiglu_norm_reference(gate_up.double(), weight, bias, EPS)
    assert_as_good_as_torch(result.h, truth.h, plain(gate_up, weight, bias), "h")
    if not normed:
        assert result.mean is None and result.rstd is None
        return
    assert result.mean.shape == result.rstd.shape == rows and result.mean.dtype == result.rstd.dtype == F32
    torch.testing.assert_close(result.mean.double(), truth.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.rstd.double(), truth.rstd, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "hidden", "dtype", "normed"), CASES)
def test_kernel_finds_all_gradients(rows, hidden, dtype, normed):
    gate_up, weight, bias = inputs_of(rows, hidden, dtype, normed)
    d_h = (make((*rows, hidden), seed=1)[0] + 0.5).to(dtype)
    _, mean, rstd = swiglu._swiglu_norm_reference(gate_up.double(), weight, bias, EPS)
    statistics = (mean.float(), rstd.float()) if normed else (None, None)

    result = swiglu._launch_swiglu_norm_backward(d_h, gate_up, *statistics, weight, bias)

    truth = swiglu._swiglu_norm_backward_reference(d_h.double(), gate_up.double(), mean, rstd, weight, bias)
    leaf = gate_up.clone().requires_grad_()
    by_torch = plain(leaf, weight, bias)
    assert result.h.dtype == result.d_gate_up.dtype == dtype
    assert_as_good_as_torch(result.h, truth.h, by_torch.detach(), "h")
    (gradient,) = torch.autograd.grad(by_torch, leaf, d_h)
    names = ("d_gate", "d_up")
    for name, *parts in zip(
        names, *(t.chunk(2, -1) for t in (result.d_gate_up, truth.d_gate_up, gradient)), strict=True
    ):
        assert_as_good_as_torch(*parts, name)
    for name in ("d_weight", "d_bias", "d_gate_up_sum"):
        total, exact = getattr(result, name), getattr(truth, name)
        assert (total is None) == (exact is None)
        if total is not None:
            assert total.dtype == F32 and total.shape == exact.shape
            error = relative_error(total, exact)
            assert error <= 1e-6, f"{name}: relative error {error:.2e}, where sums in float32 have less than 1e-6"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("normed", [True, False], ids=["", "without LayerNorm"])
def test_kernel_keeps_large_gates_finite(normed):
    gate_up, weight, bias = inputs_of((4,), 64, F32, normed)
    gate_up[0, :32], gate_up[1, :32] = 200.0, -200.0  # exp of these is beyond float32
    h, mean, rstd = swiglu._launch_swiglu_norm(gate_up, weight, bias, EPS)
    assert relative_error(h, plain(gate_up.double(), weight, bias)) < 1e-6
    result = swiglu._launch_swiglu_norm_backward(h, gate_up, mean, rstd, weight, bias)
    assert result.d_gate_up.isfinite().all()


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    gate_up, weight, bias = inputs_of((130,), 96, F16, True)
    runs = []
    for _ in range(2):
        h, mean, rstd = swiglu._launch_swiglu_norm(gate_up, weight, bias, EPS)
        runs.append((h, mean, rstd, *swiglu._launch_swiglu_norm_backward(h, gate_up, mean, rstd, weight, bias)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_no_rows_have_no_sums():
    gate_up, weight, bias = inputs_of((0,), 64, F32, True)
    h, mean, rstd = swiglu._launch_swiglu_norm(gate_up, weight, bias, EPS)
    assert h.shape == (0, 64)
    result = swiglu._launch_swiglu_norm_backward(h, gate_up, mean, rstd, weight, bias)
    assert torch.equal(result.d_gate_up_sum, torch.zeros(128, device=DEVICE))


class SwigluFunction(torch.autograd.Function):
    """The public functions, as a block calls them."""

    @staticmethod
    def forward(ctx, gate_up, weight, bias):
        h, mean, rstd = swiglu_norm(gate_up, weight, bias, EPS)
        ctx.save_for_backward(gate_up, mean, rstd, weight, bias)
        return h

    @staticmethod
    def backward(ctx, d_h):
        result = swiglu_norm_backward(d_h, *ctx.saved_tensors)
        return result.d_gate_up, result.d_weight, result.d_bias


@pytest.mark.parametrize("normed", [True, False], ids=["", "without LayerNorm"])
def test_reference_passes_gradcheck(normed):
    gate_up, weight, bias = (t.cpu().requires_grad_() for t in make((2, 3, 12), 6, 6))
    inputs = (gate_up, weight, bias) if normed else (gate_up, None, None)
    assert torch.autograd.gradcheck(SwigluFunction.apply, inputs)


@pytest.mark.parametrize("normed", [True, False], ids=["", "without LayerNorm"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_reference_makes_h_again_and_sums(dtype, normed):
    gate_up, weight, bias = make((4, 5, 16), 8, 8)
    gate_up = gate_up.to(dtype).cpu()
    weight, bias = (weight.cpu(), bias.cpu()) if normed else (None, None)
    h, mean, rstd = swiglu_norm(gate_up, weight, bias, EPS)
    result = swiglu_norm_backward(h, gate_up, mean, rstd, weight, bias)
    assert h.dtype == result.h.dtype == result.d_gate_up.dtype == dtype
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 0.05}[dtype]
    torch.testing.assert_close(result.h, h, rtol=tolerance, atol=tolerance)
    expected = result.d_gate_up.double().sum((0, 1))
    torch.testing.assert_close(result.d_gate_up_sum.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normed", [True, False], ids=["", "without LayerNorm"])
def test_reference_takes_rows_in_parts_and_any_strides(normed, monkeypatch):
    """More rows than it takes at once, the last part smaller, laid out by columns."""
    gate_up, d_h, weight, bias = (t.cpu() for t in make((12, 2, 70), (6, 2, 70), 6, 6))
    gate_up, d_h = gate_up.permute(2, 1, 0), d_h.permute(2, 1, 0)
    assert d_h.shape == (70, 2, 6)
    monkeypatch.setattr(swiglu, "_REFERENCE_ELEMENTS", 64 * 6)
    weight, bias = (weight, bias) if normed else (None, None)
    _, mean, rstd = swiglu_norm(gate_up, weight, bias, EPS)
    result = swiglu_norm_backward(d_h, gate_up, mean, rstd, weight, bias)

    leaves = [t if t is None else t.clone().requires_grad_() for t in (gate_up, weight, bias)]
    h = plain(*leaves)
    torch.testing.assert_close(result.h, h.detach(), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(h, [leaf for leaf in leaves if leaf is not None], d_h)
    found = [total for total in (result.d_gate_up, result.d_weight, result.d_bias) if total is not None]
    torch.testing.assert_close(found, list(expected), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result.d_gate_up_sum, expected[0].sum((0, 1)), rtol=1e-11, atol=1e-11)


def test_refuses_strides_that_kernels_cannot_walk():
    gate_up, weight, bias = inputs_of((6,), 64, F32, True)
    with pytest.raises(ValueError, match=r"gate_up of shape \[6, 128\] has strides \[256, 1\]: give a contiguous"):
        swiglu._launch_swiglu_norm(gate_up.repeat(1, 2)[:, :128], weight, bias, EPS)


@pytest.mark.gpu
@pytest.mark.xdist_group("much memory")
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 24 GiB of a GPU: offsets beyond 2^31 elements")
def test_offsets_beyond_32_bits():
    rows, hidden = 2**31 // 4096 + 5, 2048
    gate_up = torch.randn(rows, 2 * hidden, dtype=F16, device=DEVICE)
    weight, bias = torch.ones(hidden, device=DEVICE), torch.zeros(hidden, device=DEVICE)
    h, mean, rstd = swiglu_norm(gate_up, weight, bias, EPS)
    torch.testing.assert_close(h[-3:], plain(gate_up[-3:].float(), weight, bias).half(), rtol=1e-2, atol=1e-3)
    result = swiglu_norm_backward(h, gate_up, mean, rstd, weight, bias)
    last = slice(-3, None)
    exact = swiglu._swiglu_norm_backward_reference(h[last], gate_up[last], mean[last], rstd[last], weight, bias)
    torch.testing.assert_close(result.h[last], exact.h, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(result.d_gate_up[last], exact.d_gate_up, rtol=1e-2, atol=1e-3)
