"""The transformer block of every image tower: pre-norm self-attention with 2-D RoPE, then a SwiGLU or GELU MLP.

One class covers EVA02 (SwiGLU with a LayerNorm inside, https://arxiv.org/abs/2303.11331), the plain ViT, and the ViT
with RoPE and layer scale; what differs is given by arguments. A block is a function of (x, rope) and its weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The released EVA02 towers use 1e-6 in the LayerNorms of a block and PyTorch's default inside the MLP.
_SUB_NORM_EPS = 1e-5


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels by the angle of their token (RoPE, https://arxiv.org/abs/2104.09864).

    Args:
        x: [b, T, *, head_dim], channels contiguous.
        rope: [T, head_dim / 2, 2] float32, cosine and sine; a token without a position has cosine 1 and sine 0.

    Returns:
        Like x, in x's dtype; the rotation itself is done in float32 (float64 for float64 x).
    """
    # A complex product is one fused pass on every device; the usual form with stack and negation makes four.
    pairs = torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    turns = torch.view_as_complex(rope).view(rope.shape[0], *[1] * (x.ndim - 3), rope.shape[1])
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    """MLP on tokens: GELU, or SwiGLU with an optional LayerNorm before the last projection.

    SwiGLU projects to gate and value with one matrix, ``gate_up``: the first ``hidden`` rows are the gate.
    """

    def __init__(self, width: int, hidden: int, *, gated: bool, sub_norm: bool) -> None:
        super().__init__()
        self.gated = gated
        if gated:
            self.gate_up = nn.Linear(width, 2 * hidden)
        else:
            self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=_SUB_NORM_EPS) if sub_norm else None
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        if self.gated:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(self.fc1(x))
        if self.norm is not None:
            x = self.norm(x)
        return self.fc2(x)


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        width: channels D of a token.
        heads: attention heads; D is a multiple of it.
        hidden: inner channels of the MLP.
        gated: SwiGLU instead of GELU.
        sub_norm: LayerNorm inside the MLP.
        layer_scale: start value of the learned per-channel factor on both branches (https://arxiv.org/abs/2103.17239);
            None for none.
        norm_eps: epsilon of the two LayerNorms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        gated: bool,
        sub_norm: bool,
        layer_scale: float | None,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.qkv = nn.Linear(width, 3 * width)  # the key bias matters: RoPE turns it by a different angle for every key
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = FeedForward(width, hidden, gated=gated, sub_norm=sub_norm)
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
        self.scale2 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """Tokens [b, T, D] to tokens [b, T, D]; ``rope`` as in `rotate`, or None for a block without positions."""
        attended = self._attend(self.norm1(x), rope)
        x = x + (attended if self.scale1 is None else self.scale1 * attended)
        transformed = self.mlp(self.norm2(x))
        return x + (transformed if self.scale2 is None else self.scale2 * transformed)

    def _attend(self, x: Tensor, rope: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [b, T, 3, heads, head_dim]
        query_key, value = qkv.split((2, 1), dim=2)
        if rope is not None:
            query_key = rotate(query_key, rope)
        query, key = query_key.transpose(1, 3).unbind(2)  # [b, heads, T, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value.squeeze(2).transpose(1, 2))
        return self.out_proj(attended.transpose(1, 2).flatten(2))
