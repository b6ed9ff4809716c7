"""Multi-head attention pooling (MAP): one learned query reads all tokens.

The head of Nomic Embed Vision. It differs from the MAP head of https://arxiv.org/abs/2106.04560 in its residual, which
is the first token of the trunk and not the attention output: embedding = token_0 + MLP(LayerNorm(attention)).

There is a single query, so the key projection is absorbed into it, score_h(x) = x . (Wk_h^T q_h), and tokens are
averaged before the value projection. This is exact, and two projections of T tokens become two of one row per head.
The key bias adds the same number to all scores of a head and drops out of the softmax.
"""

import torch
from torch import Tensor, nn

from .block import FeedForward


class AttentionPooling(nn.Module):
    """The MAP head: tokens [b, T, D] to one row [b, D] per image.

    The latent query starts at zero and the projections at PyTorch's defaults, as in the released training code.
    ``key_value`` holds the key rows, then the value rows.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, gated: bool, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = FeedForward(width, hidden, gated=gated, sub_norm=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T, D] to [b, D]."""
        return tokens[:, 0] + self.mlp(self.norm(self.attend(tokens)))

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention of the latent query over the tokens, [b, T, D] to [b, D]."""
        width = tokens.shape[-1]
        head_dim = width // self.heads
        key_weight, value_weight = self.key_value.weight.view(2, self.heads, head_dim, width).unbind()
        value_bias = self.key_value.bias.view(2, width)[1]

        query = self.query(self.latent).view(self.heads, 1, head_dim) * head_dim**-0.5
        absorbed = (query @ key_weight).squeeze(1)  # [heads, D]
        scores = tokens @ absorbed.mT  # [b, T, heads]
        weights = scores.softmax(dim=1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(tokens.dtype)
        pooled = weights.mT @ tokens  # [b, heads, D]
        values = pooled.transpose(0, 1) @ value_weight.mT  # [heads, b, head_dim]
        return self.out_proj(values.transpose(0, 1).flatten(1) + value_bias)
