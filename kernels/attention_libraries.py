"""Attention by libraries: as backends of `attention`, and as what benchmarks compare its kernels with."""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .card import Absent, Outputs

Library = Literal["sdpa", "flash-attn", "flash-attn-4"]


class Heads(NamedTuple):
    """What a library's kernel reads, [B, H, T, d] each."""

    query: Tensor
    key: Tensor
    value: Tensor


def _sdpa_kernel(heads: Heads) -> SDPBackend:
    """Return the kernel that `F.scaled_dot_product_attention` runs on these."""
    return SDPBackend(torch._fused_sdp_choice(*heads))


def _sdpa(heads: Heads) -> tuple[Tensor, Tensor | None]:
    # The operators behind F.scaled_dot_product_attention, called by name: they return what a backward needs.
    if heads.query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    kernel = _sdpa_kernel(heads)
    if kernel == SDPBackend.FLASH_ATTENTION:
        return torch.ops.aten._scaled_dot_product_flash_attention(*heads)[:2]
    if kernel == SDPBackend.CUDNN_ATTENTION:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True)[:2]
        return out, lse.squeeze(-1)
    return F.scaled_dot_product_attention(*heads), None


def _sdpa_backward(d_out: Tensor, heads: Heads, out: Tensor, lse: Tensor | None) -> tuple[Tensor, ...]:
    aten, tokens = torch.ops.aten, heads.query.shape[2]
    if lse is None:  # a kernel that keeps nothing: recompute
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in heads]
            out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
            return torch.autograd.grad(out, leaves, d_out)
    if d_out.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(d_out, *heads, out, lse, 0.0, False)
    lengths = (None, None, tokens, tokens)  # cumulative lengths are for batches of unequal ones
    if _sdpa_kernel(heads) == SDPBackend.CUDNN_ATTENTION:
        seed = offset = torch.empty((), dtype=torch.int64, device=d_out.device)  # of a dropout that there is not
        return aten._scaled_dot_product_cudnn_attention_backward(
            d_out, *heads, out, lse.unsqueeze(-1), seed, offset, None, *lengths, 0.0, False
        )
    state = torch.empty(2, dtype=torch.uint64, device=d_out.device)
    return aten._scaled_dot_product_flash_attention_backward(
        d_out, *heads, out, lse, *lengths, 0.0, False, state, state[0]
    )


def flash_attn(backend: Library) -> ModuleType:
    """Import the module of a library; raises ValueError where it does not import."""
    name = "flash_attn.cute.interface" if backend == "flash-attn-4" else "flash_attn.flash_attn_interface"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"attention backend {backend!r} needs {name}, which does not import ({error}): install {backend}, or choose"
            " triton or sdpa"
        ) from error


def library_forward(backend: Library, heads: Heads) -> tuple[Tensor, Tensor | None]:
    """Return out [B, H, T, d] and lse [B, H, T], or None where the library keeps none.

    Raises:
        ValueError: the library does not import.
    """
    if backend == "sdpa":
        return _sdpa(heads)
    library = flash_attn(backend)
    rows = [x.transpose(1, 2) for x in heads]  # [B, T, H, d]
    if backend == "flash-attn-4":
        out, lse = library._flash_attn_fwd(*rows, return_lse=True)[:2]
    else:
        scale = rows[0].shape[-1] ** -0.5
        out, lse = library._wrapped_flash_attn_forward(*rows, 0.0, scale, False, -1, -1, 0.0, None, False)[:2]
    return out.transpose(1, 2), lse


def library_backward(
    backend: Library, d_out: Tensor, heads: Heads, out: Tensor, lse: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key and value, [B, H, T, d] each; raises as `library_forward`."""
    if backend == "sdpa":
        return _sdpa_backward(d_out, heads, out, lse)
    library = flash_attn(backend)
    d_out, out, *rows = (x.transpose(1, 2) for x in (d_out, out, *heads))  # [B, T, H, d]
    if backend == "flash-attn-4":
        gradients = library._flash_attn_bwd(*rows, out, d_out, lse)[:3]
    else:
        gradients = tuple(torch.empty_like(x) for x in rows)
        scale = rows[0].shape[-1] ** -0.5
        library._wrapped_flash_attn_backward(
            d_out, *rows, out, lse, *gradients, 0.0, scale, False, -1, -1, 0.0, None, False
        )
    return tuple(x.transpose(1, 2) for x in gradients)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key and value [B, T, H, d] to out of the same shape


def _sdpa_of(kernel: SDPBackend, device: torch.device) -> Attend:
    if device.type == "cpu":
        raise Absent("the kernels of scaled_dot_product_attention are compared on a GPU only")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            heads = Heads(*(x.transpose(1, 2) for x in (query, key, value)))
            return F.scaled_dot_product_attention(heads.query, heads.key, heads.value).transpose(1, 2)

    return attend


def _package(name: str, module: str, device: torch.device) -> Attend:
    if device.type == "cpu":
        raise Absent(f"{name} needs a GPU")
    try:
        function = importlib.import_module(module).flash_attn_func
    except ImportError:
        raise Absent(f"{name} is not installed") from None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = function(query, key, value)
        return out[0] if isinstance(out, tuple) else out

    return attend


# By candidate. Raises Absent where the library is missing or does not run on the device.
PEERS: dict[str, Callable[[torch.device], Attend]] = {
    "sdpa_cudnn": partial(_sdpa_of, SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": partial(_sdpa_of, SDPBackend.FLASH_ATTENTION),
    "flash_attn": partial(_package, "flash-attn", "flash_attn"),
    "flash_attn_4": partial(_package, "flash-attn-4", "flash_attn.cute.interface"),
}


def prepare_peer(
    name: str, packed: Tensor, d_out: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None
) -> Callable[[], Outputs]:
    """Prepare a run of a peer: forward, or with d_out backward alone, after a forward pass that is not part of the run.

    Args:
        name: of PEERS.
        packed: query, key and value [B, T, 3, H, d], without RoPE.
        d_out: [B, T, H, d].
        out: of the kernel, which no peer takes.
        lse: likewise.

    Raises:
        Absent: the library is missing, or does not run on this device.
    """
    attend = PEERS[name](packed.device)
    if d_out is None:
        return lambda: {"out": attend(*packed.unbind(2))}
    leaves = [x.detach().requires_grad_() for x in packed.unbind(2)]
    recorded = attend(*leaves)

    def run() -> Outputs:
        gradients = torch.autograd.grad(recorded, leaves, d_out, retain_graph=True)
        return dict(zip(("d_query", "d_key", "d_value"), gradients, strict=True))

    return run
