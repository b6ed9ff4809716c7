"""Images to flattened patches: the input of a patch embedding written as one matrix product.

A raw uint8 image is normalised on the way: loaders carry and copy one byte per value, and no normalised image ever
exists. Column (c, row, col) of a patch is (pixel / 255 - mean[c]) / std[c], in the order of a flattened convolution
kernel. Memory bound: one byte read and one number of ``dtype`` written per value.

On a GPU a thread takes 8 neighbouring pixels of 3 channels, which are three words of 8 bytes, and writes 8 neighbouring
columns of each channel: 16 bytes in bfloat16. Images of other shapes go the way of the CPU, channel by channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, Data, Inputs, Pass, TowerSizes
from .device import AMPERE, capability_of

_BLOCK = 256  # words of 8 pixels that a program takes


class Patches(NamedTuple):
    """What the launcher and the reference of `patchify` return for raw images."""

    patches: Tensor  # [b, N, C * p * p]


def _patchify_reference(
    images: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Patches:
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    windows = images.view(batch, rows, patch_size, columns, patch_size, channels).transpose(2, 3)  # [b, r, c, p, p, C]
    wide = torch.promote_types(dtype, torch.float32)
    patches = images.new_empty((batch, rows, columns, channels, patch_size, patch_size), dtype=dtype)
    # Channel by channel, because Python numbers need no copy to the device, unlike a tensor of means.
    for channel in range(channels):
        pixels = windows[..., channel].to(wide)
        patches[:, :, :, channel] = pixels.sub_(255 * mean[channel]).mul_(1 / (255 * std[channel]))
    return Patches(patches.view(batch, rows * columns, channels * patch_size**2))


@triton.jit
def patchify_kernel(
    images,  # [b, H, W, 3 / 8] int64: 8 bytes each
    patches,  # [b, N, 3 * p * p]
    factors,  # 3 of float32: of a pixel
    offsets,  # 3 of float32
    height,
    width,
    blocks,  # programs an image
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Groups of 8 pixels are counted in the order in which one channel of the patches lies in memory.
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    groups = height * width // 8
    patch = group // (P * P // 8)
    row = (patch // (width // P)) * P + group // (P // 8) % P
    column = (patch % (width // P)) * P + group % (P // 8) * 8
    word = images + image * groups * 3 + (row * width + column) // 8 * 3
    first = tl.load(word, mask=group < groups, other=0)[:, None]  # [BLOCK, 1]
    second = tl.load(word + 1, mask=group < groups, other=0)[:, None]
    third = tl.load(word + 2, mask=group < groups, other=0)[:, None]

    pixel = tl.arange(0, 8)[None, :]
    own = patches + image * groups * 24 + patch * (3 * P * P) + group % (P * P // 8) * 8
    for channel in tl.static_range(3):
        byte = 3 * pixel + channel
        words = tl.where(byte < 8, first, tl.where(byte < 16, second, third))  # [BLOCK, 8]
        value = ((words >> (byte % 8 * 8)) & 255).to(tl.float32) * factors[channel] + offsets[channel]
        at = own[:, None] + channel * P * P + pixel
        tl.store(at, value.to(patches.dtype.element_ty), mask=(group < groups)[:, None])


def _runs_kernel(images: Tensor, patch_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes these raw images: words of 8 bytes must not reach beyond a patch."""
    if dtype == torch.float64 or capability_of(images.device) < AMPERE:
        return False
    in_words = images.is_contiguous() and int(images.storage_offset()) % 8 == 0
    return in_words and images.shape[-1] == 3 and patch_size % 8 == 0


def _launch_patchify(
    images: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Patches:
    batch, height, width, channels = images.shape
    count = (height // patch_size) * (width // patch_size)
    patches = images.new_empty((batch, count, channels * patch_size**2), dtype=dtype)
    blocks = triton.cdiv(height * width // 8, _BLOCK)
    factors = tuple(1 / (255 * deviation) for deviation in std)
    offsets = tuple(-m / deviation for m, deviation in zip(mean, std, strict=True))
    patchify_kernel[(batch * blocks,)](
        images.flatten().view(torch.int64),
        patches,
        factors,
        offsets,
        height,
        width,
        blocks,
        P=patch_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return Patches(patches)


def patchify(
    images: Tensor,  # uint8 [b, H, W, C] or float [b, C, H, W]
    patch_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Cut images into square patches, row by row, and normalise raw ones.

    Args:
        images: uint8 [b, H, W, C] with values 0 to 255, normalised here; or floating point [b, C, H, W], taken as
            already normalised.
        patch_size: side p of a patch in pixels; H and W must be multiples of it.
        mean: channel means of raw images, for pixels scaled to [0, 1].
        std: channel standard deviations, on the same scale.
        dtype: floating-point type of the result. Normalisation is done in float32, or float64 if asked for.

    Returns:
        [b, N, C * p * p] with N = (H / p) * (W / p); differentiable with respect to floating-point images.

    Raises:
        ValueError: images of another rank, type or size, or with a number of channels other than ``len(mean)``.
    """
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"images are {images.dtype} of shape {list(images.shape)}:"
            " give uint8 [b, H, W, C] or floating point [b, C, H, W]"
        )
    raw = images.dtype == torch.uint8
    # Both layouts are read as [b, H, W, C]; for the planar one this is a view.
    batch, height, width, channels = (images if raw else images.permute(0, 2, 3, 1)).shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be cut into patches of {patch_size} x {patch_size}"
        )
    if channels != len(mean):
        raise ValueError(f"images have {channels} channels but {len(mean)} means were given")

    if raw:
        run = _launch_patchify if _runs_kernel(images, patch_size, dtype) else _patchify_reference
        return run(images, patch_size, mean, std, dtype).patches
    rows, columns = height // patch_size, width // patch_size
    windows = images.view(batch, channels, rows, patch_size, columns, patch_size)
    return windows.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2).to(dtype)


def _inputs(sizes: TowerSizes, data: Data) -> Inputs:
    side = sizes.image_size
    return {
        "images": data.integers(256, sizes.images, side, side, 3, dtype=torch.uint8),
        "patch_size": sizes.patch_size,
        "mean": (0.48, 0.46, 0.41),
        "std": (0.27, 0.26, 0.28),
        "dtype": sizes.dtype,
    }


CARDS = (
    Card(
        (
            Pass[TowerSizes](
                "patchify",
                patchify_kernel,
                _launch_patchify,
                _patchify_reference,
                _inputs,
                traffic=lambda s: s.images * 3 * s.image_size**2 * (1 + s.dtype.itemsize),
            ),
        ),
        TowerSizes,
        odd={
            "one patch": TowerSizes(dtype=torch.float32),
            "patch 16 bfloat16": TowerSizes(images=3, image_size=48, patch_size=16),
            "patch 8, a last block in part": TowerSizes(images=2, image_size=56, dtype=torch.float16),
            "patch 32": TowerSizes(image_size=64, patch_size=32, dtype=torch.float16),
            "patch 24": TowerSizes(image_size=72, patch_size=24, dtype=torch.float32),
        },
        compiled={"": TowerSizes(images=512, image_size=224, patch_size=16)},
    ),
)
