"""Images to flattened patches: the input of a patch embedding written as one matrix product.

A raw uint8 image is normalised on the way: loaders carry and copy one byte per value, and no normalised image ever
exists. Column (c, row, col) of a patch is (pixel / 255 - mean[c]) / std[c], in the order of a flattened convolution
kernel. Memory bound: one byte read and one number of ``dtype`` written per value.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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

    rows, columns = height // patch_size, width // patch_size
    shape = (batch, rows * columns, channels * patch_size**2)
    if not raw:
        windows = images.view(batch, channels, rows, patch_size, columns, patch_size)
        return windows.permute(0, 2, 4, 1, 3, 5).reshape(shape).to(dtype)

    windows = images.view(batch, rows, patch_size, columns, patch_size, channels).transpose(2, 3)  # [b, r, c, p, p, C]
    compute_dtype = torch.promote_types(dtype, torch.float32)
    patches = images.new_empty((batch, rows, columns, channels, patch_size, patch_size), dtype=dtype)
    # Channel by channel, because Python numbers need no copy to the device, unlike a tensor of means.
    for channel in range(channels):
        pixels = windows[..., channel].to(compute_dtype)
        patches[:, :, :, channel] = pixels.sub_(255 * mean[channel]).mul_(1 / (255 * std[channel]))
    return patches.view(shape)
