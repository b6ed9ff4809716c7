"""GELU: what is special to it; tests/kernels/test_cards.py has the rest."""

import pytest
import torch

from textlock.kernels import gelu as module
from textlock.kernels.gelu import gelu, gelu_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F16 = torch.float16


def test_on_a_cpu_the_public_functions_are_the_reference():
    d_h, fc1 = torch.randn(2, 4, 5, 8).bfloat16()
    assert torch.equal(gelu(fc1), torch.nn.functional.gelu(fc1))
    assert all(map(torch.equal, gelu_backward(d_h, fc1), module._gelu_backward_reference(d_h, fc1)))


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
