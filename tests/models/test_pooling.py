import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent

from textlock.models.block import BlockShape
from textlock.models.pooling import AttentionPooling
from textlock.models.vision import VISION_CONFIGS

SHAPES = [
    pytest.param((2, 197, 48, 4), id="197-tokens"),
    pytest.param((3, 1, 16, 1), id="one-token"),
    pytest.param((1, 7, 24, 3), id="one-image"),
]


def randomised_head(width, heads, *, gated=True, dtype=torch.float64):
    torch.manual_seed(0)
    shape = BlockShape(width=width, heads=heads, hidden=20, gated=gated, sub_norm=False, layer_scale=None)
    head = AttentionPooling(shape).to(dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def plain_head(head, tokens):
    """Compute the head with keys and values of every token, as the released code does."""
    batch, _, width = tokens.shape
    query = head.query(head.latent).expand(batch, -1, -1)
    key, value = F.linear(tokens, head.key_value.weight, head.key_value.bias).chunk(2, dim=-1)
    query, key, value = (x.unflatten(-1, (head.heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.mT / math.sqrt(width // head.heads)).softmax(-1)
    attended = head.out_proj((weights @ value).transpose(1, 2).flatten(2))[:, 0]
    return tokens[:, 0] + head.mlp(head.norm(attended))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_timm(shape):
    batch, length, width, heads = shape
    head = randomised_head(width, heads)
    theirs = AttentionPoolLatent(width, num_heads=heads).double()
    with torch.no_grad():
        theirs.latent.copy_(head.latent)
        for target, source in ((theirs.q, head.query), (theirs.kv, head.key_value), (theirs.proj, head.out_proj)):
            target.load_state_dict(source.state_dict())
        attended = []
        theirs.proj.register_forward_hook(lambda module, inputs, output: attended.append(output[:, 0]))
        tokens = torch.randn(batch, length, width, dtype=torch.float64)
        theirs(tokens)
        torch.testing.assert_close(head.attend(tokens)[0], attended[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_values_and_gradients_are_those_of_the_plain_form(shape, gated):
    batch, length, width, heads = shape
    head = randomised_head(width, heads, gated=gated)
    tokens = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(batch, width, dtype=torch.float64)
    ours = results_of(head, head, tokens, direction)
    plain = results_of(lambda x: plain_head(head, x), head, tokens, direction)
    for name, value in plain.items():
        assert torch.allclose(ours[name], value, rtol=1e-9, atol=1e-9), name


def test_key_bias_has_no_effect():
    head = randomised_head(24, 3)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    head(tokens).sum().backward()
    assert torch.count_nonzero(head.key_value.bias.grad[:24]) == 0
    assert torch.count_nonzero(head.key_value.bias.grad[24:]) == 24


def test_first_token_comes_back_untouched():
    head = randomised_head(24, 3, dtype=torch.float32)
    tokens = torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        attended, first = head.attend(tokens)
    assert attended.dtype == torch.bfloat16
    assert torch.equal(first, tokens[:, 0]) and first.data_ptr() != tokens.data_ptr()


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_loses_no_more_than_the_plain_form(stream):
    head = randomised_head(64, 4, dtype=torch.float32)
    tokens = torch.randn(16, 65, 64).to(stream).requires_grad_()
    direction = torch.randn(16, 64)
    exact = copy.deepcopy(head).double()
    wide = tokens.detach().double().requires_grad_()
    truth = results_of(lambda x: plain_head(exact, x), exact, wide, direction.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (results_of(f, head, tokens, direction) for f in (head, lambda x: plain_head(head, x)))
    for name, value in truth.items():
        assert ours[name].dtype == plain[name].dtype
        errors = [(result[name] - value).norm() for result in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-9, f"{name}: error {errors[0]:.2e}, of the plain form {errors[1]:.2e}"


def results_of(form, head, tokens, direction):
    """Return the embeddings and the gradients of tokens and parameters by name."""
    named = {"tokens": tokens, **dict(head.named_parameters())}
    embeddings = form(tokens)
    gradients = torch.autograd.grad((embeddings * direction).sum(), list(named.values()))
    return {"embeddings": embeddings, **dict(zip(named, gradients, strict=True))}


def test_starts_from_a_zero_latent_and_default_projections():
    torch.manual_seed(0)
    head = AttentionPooling(VISION_CONFIGS["eva02_micro_patch8_32"])
    assert torch.count_nonzero(head.latent) == 0
    for linear in (head.query, head.key_value, head.out_proj, head.mlp.gate_up):
        # nn.Linear draws from a uniform distribution of half-width 1 / sqrt(inputs).
        assert 0.9 / 8 < linear.weight.abs().max() <= 1 / 8
        assert linear.bias.abs().max() > 0
