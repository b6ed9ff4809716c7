"""Attention pooling with an absorbed query: the references by gradcheck, the kernels against float64.

The kernels run in Triton's interpreter, or on a GPU where there is one.
"""

from types import SimpleNamespace

import pytest
import torch

from textlock.kernels import latent_pool as module
from textlock.kernels.latent_pool import latent_pool, latent_pool_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TINY = 1e-6  # relative error of sums in float32


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(*shapes, seed=0):
    """Return float64 tensors that are no sums of few bits."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=F64, generator=generator).to(DEVICE) for shape in shapes]


def inputs_of(shape, stream, products, common=0.0):
    """Return tokens that share a direction of `common` times their own length, queries, and gradients."""
    batch, length, width, heads = shape
    tokens, absorbed, d_pooled, d_first, shared = make(
        (batch, length, width), (heads, width), (batch, heads, width), (batch, width), width
    )
    return (
        (tokens + common * shared).to(stream),
        (1.5 * absorbed / width**0.5).to(products),
        d_pooled.to(products),
        d_first.to(stream),
    )


def by_formula(tokens, absorbed, d_pooled, d_first):
    """Return pooled, lse, d_tokens and d_absorbed as autograd has them in the types given, as under autocast."""
    tokens, absorbed = tokens.clone().requires_grad_(), absorbed.clone().requires_grad_()
    x = tokens.to(absorbed.dtype)
    scores = x @ absorbed.mT
    weights = scores.softmax(dim=1, dtype=torch.promote_types(scores.dtype, F32)).to(x.dtype)
    pooled = weights.mT @ x
    gradients = torch.autograd.grad((pooled, tokens[:, 0]), (tokens, absorbed), (d_pooled, d_first))
    return pooled.detach(), scores.detach().to(torch.promote_types(scores.dtype, F32)).logsumexp(1), *gradients


def relative_error(value, truth):
    # The gradient of a query over one token is zero: no scale for an error.
    return ((value.double() - truth).norm() / truth.norm().clamp(min=0.1)).item()


def assert_as_good_as_torch(results, inputs):
    truths, by_torch = by_formula(*(t.double() for t in inputs)), by_formula(*inputs)
    names = ("pooled", "lse", "d_tokens", "d_absorbed")
    for name, value, truth, other in zip(names, results, truths, by_torch, strict=True):
        # The interpreter cuts float32 off to bfloat16 instead of rounding it, which doubles the error.
        cut_off = 2 if value.dtype == BF16 and DEVICE.type == "cpu" else 1
        error, bound = relative_error(value, truth), 2 * cut_off * relative_error(other, truth) + TINY
        assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.2e}"


def run(forward, backward, inputs):
    tokens, absorbed, d_pooled, d_first = inputs
    result = forward(tokens, absorbed)
    gradients = backward(d_pooled, d_first, result.rounded, absorbed, result.pooled, result.lse)
    return result, gradients


LAUNCHERS = (module._launch_latent_pool, module._launch_latent_pool_backward)
REFERENCES = (module._latent_pool_reference, module._latent_pool_backward_reference)

# Images (six programs in the interpreter share them), tokens, channels, heads; type of the tokens, of the products.
ON_GPU_ALONE = pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter's tl.dot is wrong in bfloat16")
CASES = [
    pytest.param((14, 5, 64, 1), F16, F16, id="5 tokens float16", marks=pytest.mark.memcheck),
    pytest.param((1, 1, 64, 2), F32, F32, id="one token float32"),
    pytest.param((2, 50, 192, 3), F32, F32, id="50 tokens float32"),
    pytest.param((8, 64, 128, 2), F32, F16, id="64 tokens, wide stream"),
    pytest.param((1, 197, 768, 12), F16, F16, id="197 tokens float16"),
    pytest.param((1, 197, 768, 12), F32, F16, id="197 tokens, wide stream"),
    pytest.param((7, 197, 64, 12), F32, F32, id="197 tokens float32"),
    pytest.param((2, 257, 128, 1), F16, F16, id="257 tokens float16"),
    pytest.param((1, 257, 256, 16), F32, F32, id="257 tokens float32"),
    pytest.param((600, 197, 768, 12), BF16, BF16, id="197 tokens bfloat16", marks=ON_GPU_ALONE),
]
REFERENCE_CASES = [
    *CASES[:-1],
    pytest.param((3, 197, 768, 12), BF16, BF16, id="197 tokens bfloat16"),
    pytest.param((3, 50, 48, 17), F32, BF16, id="17 heads of 48 channels, wide stream"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("common", [0.0, 3.0], ids=["", "tokens alike"])
@pytest.mark.parametrize(("shape", "stream", "products"), CASES)
def test_kernels_are_as_exact_as_torch(shape, stream, products, common):
    if products == F32 and DEVICE.type == "cuda":
        pytest.skip("on a GPU products in float32 are for the references")
    check(LAUNCHERS, inputs_of(shape, stream, products, common))


@pytest.mark.gpu
@pytest.mark.parametrize("common", [0.0, 3.0], ids=["", "tokens alike"])
@pytest.mark.parametrize(("shape", "stream", "products"), REFERENCE_CASES)
def test_references_are_as_exact_as_torch(shape, stream, products, common):
    check(REFERENCES, inputs_of(shape, stream, products, common))


def check(functions, inputs):
    tokens, absorbed, *_ = inputs
    result, (d_tokens, d_absorbed) = run(*functions, inputs)
    assert result.pooled.dtype == result.rounded.dtype == absorbed.dtype
    assert (result.rounded is tokens) == (tokens.dtype == absorbed.dtype)
    assert result.lse.dtype == d_absorbed.dtype == F32
    assert d_tokens.dtype == tokens.dtype
    assert torch.equal(result.first, tokens[:, 0])
    assert_as_good_as_torch((result.pooled, result.lse, d_tokens, d_absorbed), inputs)


@pytest.mark.gpu
def test_any_strides_of_the_gradient_will_do():
    tokens, absorbed, d_pooled, d_first = inputs_of((3, 70, 128, 3), F16, F16)
    result, expected = run(*LAUNCHERS, (tokens, absorbed, d_pooled, d_first))
    for strided in (d_pooled.transpose(0, 1).contiguous().transpose(0, 1), d_pooled.mT.contiguous().mT):
        assert not strided.is_contiguous()
        gradients = LAUNCHERS[1](strided, d_first, tokens, absorbed, result.pooled, result.lse)
        for name, value, wanted in zip(("d_tokens", "d_absorbed"), gradients, expected, strict=True):
            assert torch.equal(value, wanted), name


@pytest.mark.gpu
def test_scores_of_any_size_are_safe():
    """A running maximum that did not start anew for every image would leave nothing of the second one."""
    tokens, absorbed, d_pooled, d_first = inputs_of((8, 130, 64, 2), F16, F16)
    tokens *= torch.tensor([200.0, 1, 1, 1e-3, 30, 1, 1e-2, 1], dtype=F16, device=DEVICE)[:, None, None]
    assert (tokens @ absorbed.mT).amax() > 200
    result, (d_tokens, _) = run(*LAUNCHERS, (tokens, absorbed, d_pooled, d_first))
    for image in range(8):
        own = [tokens[image, None], absorbed, d_pooled[image, None], d_first[image, None]]
        pooled, lse, expected, _ = by_formula(*(t.double() for t in own))
        assert relative_error(result.pooled[image], pooled[0]) < 2e-3, image
        assert relative_error(result.lse[image], lse[0]) < 1e-5, image
        assert relative_error(d_tokens[image], expected[0]) < 2e-3, image


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    inputs = inputs_of((9, 70, 128, 3), F32, F16)
    first, second = (run(*LAUNCHERS, inputs) for _ in range(2))
    for once, again in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(once, again)


class Pool(torch.autograd.Function):
    """The public functions, as a pooling head calls them."""

    @staticmethod
    def forward(ctx, tokens, absorbed):
        pooled, first, lse, rounded = latent_pool(tokens, absorbed)
        ctx.save_for_backward(rounded, absorbed, pooled, lse)
        return pooled, first

    @staticmethod
    def backward(ctx, d_pooled, d_first):
        return latent_pool_backward(d_pooled, d_first, *ctx.saved_tensors)


@pytest.mark.parametrize("shape", [(2, 5, 6, 1), (1, 1, 4, 2), (3, 7, 4, 3)], ids=str)
def test_reference_passes_gradcheck(shape):
    batch, length, width, heads = shape
    inputs = [t.cpu().requires_grad_() for t in make((batch, length, width), (heads, width))]
    assert torch.autograd.gradcheck(Pool.apply, inputs)


def test_refuses_strides_that_kernels_cannot_walk():
    tokens, absorbed, *_ = inputs_of((2, 6, 64, 1), F32, F32)
    with pytest.raises(
        ValueError, match=r"tokens of shape \[2, 6, 64\] has strides \[768, 128, 1\]: give a contiguous"
    ):
        module._launch_latent_pool(tokens.repeat(1, 1, 2)[..., :64], absorbed)


@pytest.mark.parametrize(
    ("shape", "products"),
    [((17, 64), F16), ((2, 96), F16), ((2, 832), F16), ((2, 64), F32)],
    ids=["17 heads", "96 channels", "832 channels", "float32 products"],
)
def test_what_the_kernels_cannot_do_is_for_the_references(shape, products, monkeypatch):
    monkeypatch.setattr(module, "runs_tiles", lambda tokens: True)
    on_a_gpu = SimpleNamespace(is_cuda=True)
    heads, width = shape
    assert not module._runs_kernels(on_a_gpu, torch.empty(heads, width, dtype=products))
    assert module._runs_kernels(on_a_gpu, torch.empty(16, 768, dtype=F16))
    assert not module._runs_kernels(SimpleNamespace(is_cuda=False), torch.empty(16, 768, dtype=F16))
