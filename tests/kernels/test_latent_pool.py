"""Attention pooling with an absorbed query: what is special to it; tests/kernels/test_cards.py has the rest."""

from types import SimpleNamespace

import pytest
import torch

from textlock.kernels import latent_pool as module

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


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


def run(forward, backward, inputs):
    tokens, absorbed, d_pooled, d_first = inputs
    result = forward(tokens, absorbed)
    gradients = backward(d_pooled, d_first, result.rounded, absorbed, result.pooled, result.lse)
    return result, gradients


LAUNCHERS = (module._launch_latent_pool, module._launch_latent_pool_backward)


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
