"""Residual add and LayerNorm: what is special to them; tests/kernels/test_cards.py has the rest."""

import pytest
import torch
import torch.nn.functional as F

from textlock.kernels import norm
from textlock.kernels.norm import NormGradients, add_norm, add_norm_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(*shapes, seed=0):
    """Return float64 tensors that are no sums of few bits."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=F64, generator=generator).to(DEVICE) for shape in shapes]


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


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
@pytest.mark.parametrize("stream", [F16, F32], ids=str)
@pytest.mark.parametrize("launch", [True, False], ids=["kernel", "reference"])
def test_normed_is_recomputed_from_what_is_kept(launch, stream):
    x, branch, branch_bias, weight, bias = inputs_of((2, 33), 768, stream, F16, F32)
    run = norm._launch_add_norm if launch else norm._add_norm_reference
    result = run(x, branch, branch_bias, weight, bias, EPS, F16)
    second = run(result.residual, None, None, weight, bias, EPS, F16)
    assert all(map(torch.equal, second, result))


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
