"""What the sigmoid loss alone has: exponents far from zero, and the memory of `fused`. The rest: test_pairs.py."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from textlock.kernels import sigmoid

from .pairs import DEVICE, LOSSES, in_chunks_of, inputs_of, make_rows, needs_tiles, profiled

LOSS = LOSSES["sigmoid"]
pytestmark = [needs_tiles, pytest.mark.usefixtures("poisoned_memory")]

softplus_and_sigmoid = sigmoid.softplus_and_sigmoid


@triton.jit
def curves_kernel(z, softplus, weight, n: tl.constexpr):
    i = tl.arange(0, n)
    first, second = softplus_and_sigmoid(tl.load(z + i))
    tl.store(softplus + i, first)
    tl.store(weight + i, second)


@pytest.mark.gpu
def test_softplus_and_sigmoid_are_right_to_a_millionth_however_small():
    z = torch.cat([torch.linspace(-120, 120, 4095), torch.tensor([-torch.inf])]).to(DEVICE)
    found = torch.empty(2, 4096, device=DEVICE)
    curves_kernel[(1,)](z, *found, n=4096)
    exact = z.double() * torch.log(torch.tensor(2.0, dtype=torch.float64))
    for values, truth in zip(found.double(), (F.softplus(exact, threshold=1e9), exact.sigmoid()), strict=True):
        assert values[-1] == 0
        assert (values[:-1] / truth[:-1] - 1).abs().max() <= 1e-6


@pytest.mark.gpu
def test_fused_never_holds_the_logits():
    b = B = 256
    inputs = inputs_of(LOSS, *make_rows(b, B, 64), learnt=("image",))

    def evaluate():
        LOSS.function(**inputs, mode="fused").backward()

    with in_chunks_of(32):
        if DEVICE.type == "cuda":
            evaluate()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            evaluate()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            _, peak, _ = profiled(evaluate)
    # Weights in float16 (and on a CPU their copy in float32 for the product), texts in both, three of [b, d].
    assert peak <= 32 * B * (2 + 4) + 1.5 * inputs["text"].nbytes + 3 * inputs["image"].nbytes < 1.5 * b * B * 4
