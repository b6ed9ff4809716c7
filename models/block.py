"""The transformer block of every image tower: pre-norm self-attention with 2-D RoPE, then a SwiGLU or GELU MLP.

One class covers EVA02 (SwiGLU with a LayerNorm inside, https://arxiv.org/abs/2303.11331), the plain ViT, and the ViT
with RoPE and layer scale; a `BlockShape` says what differs.

Between blocks the tokens travel as a `Stream`: the residual stream as it was before the last branch was added, that
branch, and the bias of the linear layer that made it. So every addition to the residual stream is one pass over memory
together with the LayerNorm that follows it, and the bias gradient is taken in the pass of that LayerNorm's backward.

    x1 = x + (branch + bias)       qkv = LN(x1)·Wqkvᵀ + b     a = attention(qkv)      o = a·Woᵀ
    x2 = x1 + (o + bo)             g = LN(x2)·W1ᵀ + b1        h = SwiGLU or GELU(g)   y = h·W2ᵀ
    the next block's stream: (x2, y, b2)

A layer scale s is folded into the preceding linear layer: s∘(a·Wᵀ + b) is a·(diag(s)·W)ᵀ + s∘b.

The backward pass is written by hand, because what is kept for it decides how many images fit on a GPU. Five tiers, in
bytes for a token of D channels and hidden width M, of which the residual stream has r bytes a channel and all else c:

    keep      kept of a block                            bytes (plus row statistics)           recomputed
    all       x1, qkv, a, x2, g                          (2r + 4c)·D + 2cM (GELU: cM)          LayerNorms, h
    no-mlp    x1, qkv, a, x2                             (2r + 4c)·D                           also g
    lean      x1, a, x2                                  (2r + c)·D                            also qkv, g
    block     x1                                         rD                                    the block up to g

The fifth tier, `none`, recomputes the whole tower; engine/step.py does that. Recomputed tensors are bit-identical, and
so are the gradients.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..kernels.attention import attention, attention_backward, rotate
from ..kernels.device import AMPERE, capability_of
from ..kernels.gelu import gelu, gelu_backward
from ..kernels.norm import AddNorm, add_norm, add_norm_backward
from ..kernels.swiglu import Swiglu, SwigluGradients, swiglu_norm, swiglu_norm_backward

Keep = Literal["all", "no-mlp", "lean", "block"]
Implementation = Literal["fused", "plain", "compile"]

# The released EVA02 towers use 1e-6 in the LayerNorms of a block and PyTorch's default inside the MLP.
SUB_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What a block computes: everything but how. Raises ValueError for a shape that cannot be built."""

    width: int  # channels D of a token
    heads: int  # of the attention
    hidden: int  # inner channels of the MLP
    gated: bool  # SwiGLU, else GELU
    sub_norm: bool  # LayerNorm inside the MLP
    layer_scale: float | None  # start of a learned factor per channel on both branches; None: no layer scale
    norm_eps: float = 1e-6  # of the two LayerNorms

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if self.sub_norm and not self.gated:
            raise ValueError("a LayerNorm inside the MLP needs SwiGLU: set gated, or leave sub_norm out")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def first_width(self) -> int:
        """Channels that the MLP's first projection gives: gate and value for SwiGLU."""
        return 2 * self.hidden if self.gated else self.hidden


def tiers_of(implementation: Implementation) -> tuple[Keep, ...]:
    """Return the tiers that blocks of an implementation know."""
    return get_args(Keep) if implementation == "fused" else ("all", "block")


class Stream(NamedTuple):
    """Tokens between two blocks: their value is x + (branch + bias)."""

    x: Tensor  # [b, T, D]
    branch: Tensor | None = None  # [b, T, D]
    bias: Tensor | None = None  # [D]

    def total(self) -> Tensor:
        """Return the tokens, [b, T, D] in the type of x."""
        if self.branch is None or self.bias is None:
            return self.x
        return (self.x + (self.branch + self.bias)).to(self.x.dtype)


class FeedForward(nn.Module):
    """MLP on tokens: GELU, or SwiGLU with an optional LayerNorm before the last projection.

    SwiGLU projects to gate and value with one matrix, ``gate_up``: the first ``hidden`` rows are the gate.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.gated = shape.gated
        if shape.gated:
            self.gate_up = nn.Linear(shape.width, 2 * shape.hidden)
        else:
            self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=SUB_NORM_EPS) if shape.sub_norm else None
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    @property
    def first(self) -> nn.Linear:
        """The projection to the hidden channels."""
        return self.gate_up if self.gated else self.fc1

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        return self.fc2(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """[..., width] to what ``fc2`` reads, [..., hidden]."""
        if self.gated:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(self.fc1(x))
        return x if self.norm is None else self.norm(x)


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        shape: what it computes; layer scale is that of https://arxiv.org/abs/2103.17239.
        implementation: ``fused``: the kernels and the backward pass of this file, which on a CPU are their references;
            ``plain``: torch's own operations under autograd; ``compile``: these under torch.compile.
        attention: backend of the fused block, see `attention`.

    In the fused block the gradients of weight matrices that have an attribute ``main_grad`` (float32, of the weight's
    shape) are added to that tensor by the matrix product itself, and autograd sees none.
    """

    def __init__(self, shape: BlockShape, *, implementation: Implementation = "fused", attention: str = "auto") -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.implementation = implementation
        self.attention_backend = attention
        self.norm1 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)  # the key bias matters: RoPE turns it by a different angle for every key
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)
        scales = shape.layer_scale
        self.scale1 = None if scales is None else nn.Parameter(torch.full((width,), scales))
        self.scale2 = None if scales is None else nn.Parameter(torch.full((width,), scales))

    def forward(self, stream: Stream, rope: Tensor | None, keep: Keep = "all") -> Stream:
        """Run the block.

        Args:
            stream: tokens [b, T, D].
            rope: [T, head_dim / 2, 2] or [b, T, head_dim / 2, 2] as in `attention`, or None for no positions.
            keep: what is kept for the backward pass, see the top of this file. Where the block is not fused, ``all``
                leaves it to autograd and ``block`` recomputes the block; it has no other tier.

        Raises:
            ValueError: a tier that there is not; fused, on a GPU without the kernels; tensors that `attention` refuses.
        """
        if keep not in (tiers := tiers_of(self.implementation)):
            raise ValueError(f"a {self.implementation} block keeps {', '.join(tiers)}, not {keep!r}")
        if self.implementation == "fused":
            return self._fused(stream, rope, keep)
        plain = _compiled_block() if self.implementation == "compile" else Block._plain
        if keep == "block" and torch.is_grad_enabled():
            return checkpoint(plain, self, stream, rope, use_reentrant=False)
        return plain(self, stream, rope)

    def _plain(self, stream: Stream, rope: Tensor | None) -> Stream:
        x = stream.total()
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [b, T, 3, heads, head_dim]
        query_key, value = qkv.split((2, 1), dim=2)
        if rope is not None:
            query_key = rotate(query_key, rope)
        query, key = query_key.transpose(1, 3).unbind(2)  # [b, heads, T, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value.squeeze(2).transpose(1, 2))
        out_weight, out_bias = _scaled(self.out_proj, self.scale1)
        x = Stream(x, F.linear(attended.transpose(1, 2).flatten(2), out_weight), out_bias).total()
        fc2_weight, fc2_bias = _scaled(self.mlp.fc2, self.scale2)
        return Stream(x, F.linear(self.mlp.hidden(self.norm2(x)), fc2_weight), fc2_bias)

    def _fused(self, stream: Stream, rope: Tensor | None, keep: Keep) -> Stream:
        if stream.x.is_cuda and (capability := capability_of(stream.x.device)) < AMPERE:
            raise ValueError(
                "fused blocks need a GPU of compute capability 8.0 or later, this one has"
                f" {'.'.join(map(str, capability))}: set --model.block compile"
            )
        sub_norm = self.mlp.norm
        out_weight, out_bias = _scaled(self.out_proj, self.scale1)
        fc2_weight, fc2_bias = _scaled(self.mlp.fc2, self.scale2)
        vectors = _Vectors(
            self.norm1.weight,
            self.norm1.bias,
            self.norm2.weight,
            self.norm2.bias,
            None if sub_norm is None else sub_norm.weight,
            None if sub_norm is None else sub_norm.bias,
            out_bias,
        )
        layers = _Layers(
            self.qkv.weight, self.qkv.bias, out_weight, self.mlp.first.weight, self.mlp.first.bias, fc2_weight
        )
        dtype = product_dtype(self.qkv.weight)
        settings = _Settings(
            heads=self.heads,
            eps=self.norm1.eps,
            gated=self.mlp.gated,
            keep=keep,
            backend=self.attention_backend,
            dtype=dtype,
            main_grads=_Layers(*(getattr(parameter, "main_grad", None) for parameter in layers)),
        )
        with torch.autocast(stream.x.device.type, enabled=False):
            sources = (_source_of(parameter, dtype) for parameter in layers)
            x, branch = _FusedBlock.apply(settings, rope, *stream, *vectors, *layers, *sources)
        return Stream(x, branch, fc2_bias)


class ComputeCopies:
    """Copies of the blocks' linear layers in the type of their products, for all forwards and backwards of one step.

    Within ``with copies:`` the fused blocks of the module read these copies, made once on the way in; without it every
    forward and every backward makes its own. The weights must not change inside. The copies' memory is kept from step
    to step.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Allocate the copies of the parameters that are of another type than ``dtype``."""
        blocks = [block for block in module.modules() if isinstance(block, Block)]
        layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
        self._parameters = [p for layer in layers for p in layer.parameters() if p.dtype != dtype]
        self._copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self._parameters]

    def __enter__(self) -> None:
        """Copy the weights as they are now."""
        if self._copies:
            torch._foreach_copy_(self._copies, [p.detach() for p in self._parameters])
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.compute_copy = copy  # type: ignore[attr-defined]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Forget that there are copies: the weights may change from here on."""
        for parameter in self._parameters:
            del parameter.compute_copy  # type: ignore[attr-defined]


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of a product with this weight: autocast's where it is on and the weight float32, or its own."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def kept_bytes(block: Block, tokens: int, keep: Keep, *, residual: torch.dtype, compute: torch.dtype) -> int:
    """Return the bytes that a fused block keeps of one image of ``tokens`` tokens: the table at the top, exactly.

    The attention backend is taken to keep its row statistics, as all do but torch's operator for float32 on a GPU.
    """
    width, first = block.norm1.normalized_shape[0], block.mlp.first.out_features
    stat = torch.promote_types(compute, torch.float32).itemsize
    stream = width * residual.itemsize
    kept = stream + (0 if block.mlp.norm is None else 2 * stat)
    if keep != "block":
        kept += stream + width * compute.itemsize + block.heads * stat  # x2, a, its row statistics
    if keep in ("all", "no-mlp"):
        kept += 3 * width * compute.itemsize
    if keep == "all":
        kept += first * compute.itemsize
    return tokens * kept


class _Vectors(NamedTuple):
    """Parameters that are used in the type they have."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    sub_norm_weight: Tensor | None
    sub_norm_bias: Tensor | None
    out_bias: Tensor


class _Layers(NamedTuple):
    """Something for each matrix and bias of the linear layers: parameters, copies, gradients."""

    qkv_weight: Any  # [3D, D]
    qkv_bias: Any  # [3D]
    out_weight: Any  # [D, D]
    first_weight: Any  # [2M, D] for SwiGLU, else [M, D]
    first_bias: Any  # [2M] or [M]
    fc2_weight: Any  # [D, M]


@dataclass(frozen=True)
class _Settings:
    heads: int
    eps: float
    gated: bool
    keep: Keep
    backend: str
    dtype: torch.dtype  # of the products
    main_grads: _Layers


class _Pieces(NamedTuple):
    """The pieces that the forward pass is made of; the backward pass recomputes with them what was not kept."""

    settings: _Settings
    rope: Tensor | None
    vectors: _Vectors
    layers: _Layers  # in the type of the products

    def norm1(self, x: Tensor, branch: Tensor | None = None, bias: Tensor | None = None) -> AddNorm:
        weight, norm_bias = self.vectors.norm1_weight, self.vectors.norm1_bias
        return add_norm(x, branch, bias, weight, norm_bias, self.settings.eps, dtype=self.layers.qkv_weight.dtype)

    def qkv(self, normed: Tensor) -> Tensor:
        qkv = F.linear(normed, self.layers.qkv_weight, self.layers.qkv_bias)
        return qkv.unflatten(-1, (3, self.settings.heads, -1))

    def attend(self, qkv: Tensor) -> tuple[Tensor, Tensor | None]:
        return attention(qkv, self.rope, backend=self.settings.backend)

    def norm2(self, x: Tensor, attended: Tensor | None = None) -> AddNorm:
        branch = None if attended is None else F.linear(attended, self.layers.out_weight)
        bias = None if attended is None else self.vectors.out_bias
        weight, norm_bias = self.vectors.norm2_weight, self.vectors.norm2_bias
        return add_norm(x, branch, bias, weight, norm_bias, self.settings.eps, dtype=self.layers.first_weight.dtype)

    def first(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.layers.first_weight, self.layers.first_bias)

    def hidden(self, first: Tensor) -> Swiglu:
        if not self.settings.gated:
            return Swiglu(gelu(first), None, None)
        return swiglu_norm(first, self.vectors.sub_norm_weight, self.vectors.sub_norm_bias, SUB_NORM_EPS)

    def hidden_backward(self, d_h: Tensor, first: Tensor, mean: Tensor | None, rstd: Tensor | None) -> SwigluGradients:
        if not self.settings.gated:
            d_first, h, d_bias = gelu_backward(d_h, first)
            return SwigluGradients(d_first, h, None, None, d_bias)
        weight, bias = self.vectors.sub_norm_weight, self.vectors.sub_norm_bias
        return swiglu_norm_backward(d_h, first, mean, rstd, weight, bias)


class _FusedBlock(torch.autograd.Function):
    """(x, branch, bias) to (x2, y), as at the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        rope: Tensor | None,
        x: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        *weights: Any,
    ) -> tuple[Tensor, Tensor]:
        vectors, sources = _Vectors(*weights[:7]), _Layers(*weights[13:])
        pieces = _Pieces(settings, rope, vectors, _in_type(sources, settings.dtype))
        x1, normed, *_ = pieces.norm1(x, branch, bias)
        qkv = pieces.qkv(normed)
        attended, lse = pieces.attend(qkv)
        x2, normed, *_ = pieces.norm2(x1, attended)
        first = pieces.first(normed)
        h, mean, rstd = pieces.hidden(first)

        of_attention = (None, None, None) if settings.keep == "block" else (attended, lse, x2)
        kept_qkv = qkv if settings.keep in ("all", "no-mlp") else None
        kept_first = first if settings.keep == "all" else None
        ctx.settings = settings
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.save_for_backward(rope, *vectors, *sources, x1, kept_qkv, *of_attention, kept_first, mean, rstd)
        return x2, F.linear(h, pieces.layers.fc2_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x2: Tensor, d_y: Tensor) -> tuple[Any, ...]:
        settings: _Settings = ctx.settings
        saved = ctx.saved_tensors
        rope, vectors, layers = saved[0], _Vectors(*saved[1:8]), _in_type(saved[8:14], settings.dtype)
        x1, qkv, attended, lse, x2, first, mean, rstd = saved[14:]
        pieces = _Pieces(settings, rope, vectors, layers)
        wanted = _Layers(*ctx.needs_input_grad[12:18])
        main_grads = settings.main_grads

        if attended is None:
            qkv = pieces.qkv(pieces.norm1(x1).normed)
            attended, lse = pieces.attend(qkv)
            x2 = pieces.norm2(x1, attended).residual

        # MLP
        _, normed, row_mean, row_rstd = pieces.norm2(x2)
        if first is None:
            first = pieces.first(normed)
        d_h = d_y @ layers.fc2_weight
        d_first, h, d_sub_norm_weight, d_sub_norm_bias, d_first_bias = pieces.hidden_backward(d_h, first, mean, rstd)
        d_fc2 = weight_gradient(d_y, h, main_grads.fc2_weight) if wanted.fc2_weight else None
        del d_h, h, first
        d_first_weight = weight_gradient(d_first, normed, main_grads.first_weight) if wanted.first_weight else None
        d_normed = d_first @ layers.first_weight
        del d_first, normed
        norm2 = add_norm_backward(
            d_normed, d_x2, x2, row_mean, row_rstd, vectors.norm2_weight, branch_dtype=attended.dtype
        )
        assert norm2.d_branch is not None and norm2.d_branch_bias is not None

        # Attention
        d_attended = norm2.d_branch @ layers.out_weight
        d_out_weight = weight_gradient(norm2.d_branch, attended, main_grads.out_weight) if wanted.out_weight else None
        _, normed, row_mean, row_rstd = pieces.norm1(x1)
        if qkv is None:
            qkv = pieces.qkv(normed)
        d_qkv, d_qkv_bias = attention_backward(d_attended, qkv, rope, attended, lse, backend=settings.backend)
        del d_attended, qkv
        d_qkv = d_qkv.flatten(2)
        d_qkv_weight = weight_gradient(d_qkv, normed, main_grads.qkv_weight) if wanted.qkv_weight else None
        d_normed = d_qkv @ layers.qkv_weight
        norm1 = add_norm_backward(
            d_normed, norm2.d_x, x1, row_mean, row_rstd, vectors.norm1_weight, branch_dtype=ctx.branch_dtype
        )
        of_stream = (norm1.d_x, norm1.d_branch, norm1.d_branch_bias)
        of_vectors = _Vectors(
            norm1.d_weight,
            norm1.d_bias,
            norm2.d_weight,
            norm2.d_bias,
            d_sub_norm_weight,
            d_sub_norm_bias,
            norm2.d_branch_bias,
        )
        of_layers = _Layers(d_qkv_weight, d_qkv_bias, d_out_weight, d_first_weight, d_first_bias, d_fc2)
        return (None, None, *of_stream, *of_vectors, *of_layers, *(None for _ in layers))


def weight_gradient(d_y: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """Return d_yᵀ·x, the gradient of the weight of y = x·Wᵀ, or add it to ``main_grad`` and return None.

    Args:
        d_y: [..., N].
        x: [..., K], of d_y's type.
        main_grad: [N, K] float32 (float64 for float64), or None.

    Sums are float32 for every type below; on a GPU the product itself adds to ``main_grad``.
    """
    d_y, x = d_y.flatten(0, -2).mT, x.flatten(0, -2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda and x.dtype != dtype:
        if main_grad is None:
            return torch.mm(d_y, x, out_dtype=dtype)
        torch.addmm(main_grad, d_y, x, out_dtype=dtype, out=main_grad)
        return None
    d_y, x = d_y.to(dtype), x.to(dtype)
    if main_grad is None:
        return d_y @ x
    main_grad.addmm_(d_y, x)
    return None


def _scaled(layer: nn.Linear, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer whose output is multiplied by a scale for each channel."""
    if scale is None:
        return layer.weight, layer.bias
    return scale[:, None] * layer.weight, scale * layer.bias


def _source_of(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is kept of a parameter for the backward pass: its copy, or where it has none what to make it from.

    A copy for each forward pass between its forward and its backward would be as much memory as the weights. Weights
    multiplied by layer scale exist nowhere else, so they are saved, in the compute dtype.
    """
    copy: Tensor | None = getattr(parameter, "compute_copy", None)
    if copy is not None and copy.dtype == dtype:
        return copy
    return parameter.detach() if parameter.is_leaf else parameter.detach().to(dtype)


def _in_type(sources: Sequence[Tensor], dtype: torch.dtype) -> _Layers:
    return _Layers(*(source.to(dtype) for source in sources))


@functools.cache
def _compiled_block() -> Any:
    return torch.compile(Block._plain, dynamic=False)
