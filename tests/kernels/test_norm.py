"""Residual add and LayerNorm: the references by gradcheck, the kernels against them in float64.

The kernels run in Triton's interpreter, or on a GPU where there is one.
"""

import pytest
import torch
import torch.nn.functional as F

from textlock.kernels import norm
from textlock.kernels.norm import NormGradients, add_norm, add_norm_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TINY = 3e-7  # relative error of a few operations in float32


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


# Leading shape, width, types of the residual stream, of the branch and of its bias (None: there is none).
CASES = [
    pytest.param((5,), 64, F16, F16, None, id="5x64 float16"),
    pytest.param((5,), 2048, F32, F16, None, id="5x2048 float32 stream"),
    pytest.param((2, 50), 96, F32, F32, F32, id="2x50x96 float32 with bias"),
    pytest.param((1, 197), 768, F16, F16, F16, id="1x197x768 float16 with bias"),
    pytest.param((257,), 768, F32, F16, F32, id="257x768 float32 stream with bias"),
    pytest.param((1, 50), 768, F16, F16, F32, id="1x50x768 float16 with float32 bias"),
    pytest.param((7,), 768, F32, BF16, BF16, id="7x768 bfloat16 branch with bias"),
    pytest.param((50,), 352, BF16, BF16, None, id="50x352 bfloat16"),
    pytest.param((50,), 768, F32, None, None, id="50x768 no branch"),
    pytest.param((3,), 37, F32, F16, F16, id="3x37 unaligned rows with bias", marks=pytest.mark.memcheck),
]


def inputs_of(rows, width, stream, branch_type, bias_type):
    x, branch, weight, bias, branch_bias = make((*rows, width), (*rows, width), width, width, width)
    return (
        x.to(stream),
        None if branch_type is None else branch.to(branch_type),
        None if bias_type is None else branch_bias.to(bias_type),
        weight.float() + 1,
        bias.float(),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "stream", "branch_type", "bias_type"), CASES)
def test_kernel_adds_and_normalises(rows, width, stream, branch_type, bias_type):
    x, branch, branch_bias, weight, bias = inputs_of(rows, width, stream, branch_type, bias_type)
    dtype = branch_type or F16
    result = norm._launch_add_norm(x, branch, branch_bias, weight, bias, EPS, dtype)
    assert (result.residual.dtype, result.normed.dtype) == (stream, dtype)
    assert result.mean.shape == result.rstd.shape == rows and result.mean.dtype == result.rstd.dtype == F32

    summed = x
    if branch is None:
        assert result.residual is x
    else:
        truth = x.double() + branch.double() + (0 if branch_bias is None else branch_bias.double())
        summed = (x + (branch if branch_bias is None else branch + branch_bias.to(branch_type))).to(stream)
        assert_as_good_as_torch(result.residual, truth, summed, "residual")
    # From here on the truth is that of the rounded sum, which is what the backward pass reads.
    kept = result.residual.double()
    truth = F.layer_norm(kept, (width,), weight.double(), bias.double(), EPS)
    by_torch = F.layer_norm(result.residual.to(dtype), (width,), weight.to(dtype), bias.to(dtype), EPS)
    assert_as_good_as_torch(result.normed, truth, by_torch, "normed")
    torch.testing.assert_close(result.mean.double(), kept.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.rstd.double(), (kept.var(-1, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "stream", "branch_type", "bias_type"), CASES)
@pytest.mark.parametrize("last", [False, True], ids=["", "nothing behind"])
def test_kernel_finds_all_gradients(rows, width, stream, branch_type, bias_type, last):
    residual, _, _, weight, _ = inputs_of(rows, width, stream, branch_type, bias_type)
    d_normed, d_residual = make((*rows, width), (*rows, width), seed=1)
    d_normed = (3 * d_normed + 0.5).to(branch_type or F16)
    d_residual = None if last else d_residual.to(stream)
    mean, rstd = residual.double().mean(-1), (residual.double().var(-1, correction=0) + EPS).rsqrt()

    result = norm._launch_add_norm_backward(
        d_normed, d_residual, residual, mean.float(), rstd.float(), weight, branch_type
    )

    wide = [None if t is None else t.double() for t in (d_normed, d_residual, residual, mean, rstd, weight)]
    truth = norm._add_norm_backward_reference(*wide, None if branch_type is None else F64)
    by_torch = gradients_by_torch(d_normed, d_residual, residual, weight)
    assert result.d_x.dtype == stream
    assert_as_good_as_torch(result.d_x, truth.d_x, by_torch, "d_x")
    if branch_type is None:
        assert result.d_branch is None and result.d_branch_bias is None
    else:
        assert result.d_branch.dtype == branch_type
        assert (result.d_branch is result.d_x) == (branch_type == stream)
        assert_as_good_as_torch(result.d_branch, truth.d_branch, by_torch.to(branch_type), "d_branch")
    for name in ("d_weight", "d_bias", "d_branch_bias"):
        total, exact = getattr(result, name), getattr(truth, name)
        assert (total is None) == (exact is None)
        if total is not None:
            assert total.dtype == F32 and total.shape == (width,)
            error = relative_error(total, exact)
            assert error <= 1e-6, f"{name}: relative error {error:.2e}, where sums in float32 have less than 1e-6"


def gradients_by_torch(d_normed, d_residual, residual, weight):
    """Return d_x as plain torch finds it in the types of its inputs."""
    residual, dtype = residual.clone().requires_grad_(), d_normed.dtype
    normed = F.layer_norm(residual.to(dtype), weight.shape, weight.to(dtype), None, EPS)
    (d_x,) = torch.autograd.grad(normed, residual, d_normed)
    return d_x if d_residual is None else d_x + d_residual


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [F16, F32], ids=str)
@pytest.mark.parametrize("launch", [True, False], ids=["kernel", "reference"])
def test_normed_is_made_again_from_what_is_kept(launch, stream):
    x, branch, branch_bias, weight, bias = inputs_of((2, 33), 768, stream, F16, F32)
    run = norm._launch_add_norm if launch else norm._add_norm_reference
    result = run(x, branch, branch_bias, weight, bias, EPS, F16)
    again = run(result.residual, None, None, weight, bias, EPS, F16)
    assert all(map(torch.equal, again, result))


@pytest.mark.gpu
def test_rows_far_from_zero_keep_their_variance():
    """The mean of the squares less the square of the mean would be nothing but rounding here."""
    (x,) = make((9, 768))
    x = (x + 5000).float()
    ones, zeros = torch.ones(768, device=DEVICE), torch.zeros(768, device=DEVICE)
    result = norm._launch_add_norm(x, None, None, ones, zeros, EPS, F32)
    truth = F.layer_norm(x.double(), (768,), eps=EPS)
    assert relative_error(result.normed, truth) < 1e-3
    torch.testing.assert_close(result.rstd.double(), x.double().std(-1, correction=0).reciprocal(), rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    x, branch, branch_bias, weight, bias = inputs_of((130,), 64, F32, F16, F32)
    runs = []
    for _ in range(2):
        forward = norm._launch_add_norm(x, branch, branch_bias, weight, bias, EPS, F16)
        backward = norm._launch_add_norm_backward(
            forward.normed, x, forward.residual, forward.mean, forward.rstd, weight, F16
        )
        runs.append((*forward, *backward))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_no_rows_have_no_sums():
    x, branch, branch_bias, weight, bias = inputs_of((0,), 64, F32, F16, F32)
    forward = norm._launch_add_norm(x, branch, branch_bias, weight, bias, EPS, F16)
    assert forward.normed.shape == (0, 64)
    result = norm._launch_add_norm_backward(forward.normed, x, x, forward.mean, forward.rstd, weight, F16)
    for total in (result.d_weight, result.d_bias, result.d_branch_bias):
        assert torch.equal(total, torch.zeros(64, device=DEVICE))


class AddNormFunction(torch.autograd.Function):
    """The public functions, as a block calls them."""

    @staticmethod
    def forward(ctx, x, branch, branch_bias, weight, bias):
        residual, normed, mean, rstd = add_norm(x, branch, branch_bias, weight, bias, EPS)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.save_for_backward(residual, mean, rstd, weight)
        return residual, normed

    @staticmethod
    def backward(ctx, d_residual, d_normed):
        result = add_norm_backward(d_normed, d_residual, *ctx.saved_tensors, branch_dtype=ctx.branch_dtype)
        d_branch_bias = result.d_branch_bias if ctx.needs_input_grad[2] else None
        return result.d_x, result.d_branch, d_branch_bias, result.d_weight, result.d_bias


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_reference_passes_gradcheck(biased):
    x, branch, branch_bias, weight, bias = (t.cpu().requires_grad_() for t in make((2, 3, 6), (2, 3, 6), 6, 6, 6))
    inputs = (x, branch, branch_bias if biased else None, weight, bias)
    assert torch.autograd.gradcheck(AddNormFunction.apply, inputs)


def test_reference_passes_gradcheck_without_a_branch():
    x, weight, bias = (t.cpu().requires_grad_() for t in make((4, 6), 6, 6))
    # The residual is x itself then, so that only its LayerNorm is an output of the function.
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: AddNormFunction.apply(x + 0, None, None, weight, bias)[1], (x, weight, bias)
    )


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_reference_sums_are_those_of_the_gradients(dtype):
    x, branch, branch_bias, weight, bias = (t.cpu() for t in make((4, 5, 8), (4, 5, 8), 8, 8, 8))
    x, branch = x.to(dtype), branch.to(dtype)
    residual, normed, mean, rstd = add_norm(x, branch, branch_bias, weight, bias, EPS)
    wide = F64 if dtype == F64 else F32
    assert (residual.dtype, normed.dtype, mean.dtype, rstd.dtype) == (dtype, dtype, wide, wide)
    result = add_norm_backward(normed, x, residual, mean, rstd, weight, branch_dtype=dtype)
    assert result.d_branch is result.d_x and result.d_branch_bias.dtype == wide
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 0.05}[dtype]
    expected = result.d_branch.double().sum((0, 1))
    torch.testing.assert_close(result.d_branch_bias.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [BF16, F32], ids=str)
@pytest.mark.parametrize("launch", [norm._launch_add_norm, norm._add_norm_reference], ids=["kernel", "reference"])
def test_bias_and_branch_are_added_before_any_rounding(launch, stream):
    x, weight, bias = torch.full((3, 64), -255.0), torch.ones(64), torch.zeros(64)
    # No bfloat16 lies halfway between 256 and 258, or 258 and 260.
    branch, branch_bias = torch.full((3, 64), 256.0, dtype=BF16), torch.tensor([1.0, 3.0] * 32)
    args = (t.to(DEVICE) for t in (x.to(stream), branch, branch_bias, weight, bias))
    residual = launch(*args, EPS, BF16).residual
    assert residual.dtype == stream
    assert residual.tolist() == [[2.0, 4.0] * 32] * 3


def test_refuses_strides_that_kernels_cannot_walk():
    x, branch, _, weight, bias = inputs_of((6,), 64, F32, F32, None)
    with pytest.raises(ValueError, match=r"branch of shape \[6, 64\] has strides \[128, 1\]: give a contiguous tensor"):
        norm._launch_add_norm(x, branch.repeat(1, 2)[:, :64], None, weight, bias, EPS, F32)
    mean = rstd = torch.ones(6, device=DEVICE)
    with pytest.raises(ValueError, match=r"d_normed of shape \[6, 64\] has strides \[1, 6\]"):
        norm._launch_add_norm_backward(x.T.contiguous().T, None, x, mean, rstd, weight, None)


def test_refuses_a_bias_without_its_branch():
    x, _, branch_bias, weight, bias = inputs_of((6,), 64, F32, F32, F32)
    with pytest.raises(ValueError, match="branch_bias is added to a branch, and there is none"):
        add_norm(x, None, branch_bias, weight, bias, EPS)


@pytest.mark.gpu
@pytest.mark.xdist_group("much memory")
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 16 GiB of a GPU: offsets beyond 2^31 elements")
def test_offsets_beyond_32_bits():
    rows, width = 2**31 // 768 + 5, 768
    x = torch.randn(rows, width, dtype=F16, device=DEVICE)
    weight, bias = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    result = add_norm(x, None, None, weight, bias, EPS)
    expected = F.layer_norm(x[-3:].float(), (width,), eps=EPS)
    torch.testing.assert_close(result.normed[-3:].float(), expected, rtol=1e-3, atol=1e-3)
    gradients: NormGradients = add_norm_backward(
        result.normed, x, x, result.mean, result.rstd, weight, branch_dtype=F16
    )
    # A LayerNorm's own output is a direction it removes.
    torch.testing.assert_close(gradients.d_x[-3:], x[-3:], rtol=1e-2, atol=1e-2)
