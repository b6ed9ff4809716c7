"""SwiGLU and its LayerNorm: what is special to them; tests/kernels/test_cards.py has the rest."""

import pytest
import torch
import torch.nn.functional as F

from textlock.kernels import swiglu
from textlock.kernels.swiglu import swiglu_norm, swiglu_norm_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(*shapes, seed=0):
    """Return float64 tensors that are no sums of few bits."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=F64, generator=generator).to(DEVICE) for shape in shapes]


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def plain(gate_up, weight, bias):
    """SwiGLU and LayerNorm as a user writes them."""
    gate, up = gate_up.chunk(2, dim=-1)
    product = F.silu(gate) * up
    if weight is None:
        return product
    return F.layer_norm(product, weight.shape, weight.to(product.dtype), bias.to(product.dtype), EPS)


def inputs_of(rows, hidden, dtype, normed):
    gate_up, weight, bias = make((*rows, 2 * hidden), hidden, hidden)
    gate_up = (2 * gate_up).to(dtype)
    return (gate_up, weight.float() + 1, bias.float()) if normed else (gate_up, None, None)


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
