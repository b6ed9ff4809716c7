"""Multi-head attention pooling (MAP): one learned query reads all tokens.

The head of Nomic Embed Vision. It differs from the MAP head of https://arxiv.org/abs/2106.04560 in its residual, which
is the first token of the trunk and not the attention output: embedding = token_0 + MLP(LayerNorm(attention)).

There is a single query, so the key projection is absorbed into it, score_h(x) = x . (Wk_h^T q_h), and tokens are
averaged before the value projection. This is exact, and two projections of T tokens become two of one row per head.
The key bias adds the same number to all scores of a head and drops out of the softmax.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.latent_pool import latent_pool, latent_pool_backward
from .block import BlockShape, FeedForward


class AttentionPooling(nn.Module):
    """The MAP head: tokens [b, T, D] to one row [b, D] per image, with width, heads and MLP of the trunk's blocks.

    The latent query starts at zero and the projections at PyTorch's defaults, as in the released training code.
    ``key_value`` holds the key rows, then the value rows.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=shape.norm_eps)
        self.mlp = FeedForward(replace(shape, sub_norm=False))

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T, D] to [b, D]."""
        attended, first = self.attend(tokens)
        return first + self.mlp(self.norm(attended))

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention of the latent query over the tokens [b, T, D], and the first token, [b, D] each."""
        width = tokens.shape[-1]
        head_dim = width // self.heads
        key_weight, value_weight = self.key_value.weight.view(2, self.heads, head_dim, width).unbind()
        value_bias = self.key_value.bias.view(2, width)[1]

        query = self.query(self.latent).view(self.heads, 1, head_dim) * head_dim**-0.5
        absorbed = (query @ key_weight).squeeze(1)  # [heads, D]
        pooled, first = _LatentPool.apply(tokens, absorbed)  # [b, heads, D], [b, D]
        values = pooled.transpose(0, 1) @ value_weight.mT  # [heads, b, head_dim]
        return self.out_proj(values.transpose(0, 1).flatten(1) + value_bias), first


class _LatentPool(torch.autograd.Function):
    """`latent_pool` for autograd: tokens and absorbed queries to pooled tokens and the first token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, absorbed: Tensor) -> tuple[Tensor, Tensor]:
        # matmul takes another route for an operand that requires a gradient, and another forward would differ in a bit.
        pooled, first, lse, rounded = latent_pool(tokens.detach(), absorbed.detach())
        ctx.save_for_backward(rounded, absorbed, pooled, lse)
        return pooled, first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_pooled: Tensor, d_first: Tensor) -> tuple[Tensor, Tensor]:
        d_tokens, d_absorbed = latent_pool_backward(d_pooled, d_first.contiguous(), *ctx.saved_tensors)
        return d_tokens, d_absorbed
