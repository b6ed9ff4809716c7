import pytest
import torch
import torch.nn.functional as F

from textlock.kernels import patchify as module
from textlock.kernels.patchify import patchify

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

MEAN = (0.48, 0.46, 0.41)
STD = (0.27, 0.26, 0.28)

SHAPES = [
    pytest.param((1, 4, 4, 4), id="one-patch"),
    pytest.param((3, 6, 15, 3), id="odd-rectangle"),
    pytest.param((2, 35, 14, 7), id="patch-7"),
    pytest.param((0, 8, 8, 4), id="empty-batch"),
]


def raw_images(batch, height, width):
    return torch.randint(
        0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def normalise(images):
    """Do what torchvision's ToTensor and Normalize do, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "normalised"])
def test_product_with_a_flattened_kernel_is_the_convolution(shape, raw):
    batch, height, width, patch = shape
    images = raw_images(batch, height, width)
    kernel = torch.randn(5, 3, patch, patch, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    given = images if raw else normalise(images)
    patches = patchify(given, patch, mean=MEAN, std=STD, dtype=torch.float64)

    expected = F.conv2d(normalise(images), kernel, stride=patch).flatten(2).mT
    assert patches.is_contiguous()
    torch.testing.assert_close(patches @ kernel.flatten(1).mT, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_normalises_in_float32_and_rounds_once(dtype):
    images = raw_images(2, 8, 8)
    exact = patchify(images, 4, mean=MEAN, std=STD, dtype=torch.float64)
    patches = patchify(images, 4, mean=MEAN, std=STD, dtype=dtype)
    assert patches.dtype == dtype
    torch.testing.assert_close(patches.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_takes_rectangles_and_means_of_each_channel():
    """In Triton's interpreter, or on a GPU where there is one."""
    images = raw_images(3, 32, 48)
    exact = patchify(images, 16, mean=MEAN, std=STD, dtype=torch.float64)
    (patches,) = module._launch_patchify(images.to(DEVICE), 16, MEAN, STD, torch.float32)
    torch.testing.assert_close(patches.cpu().double(), exact, rtol=torch.finfo(torch.float32).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: on a CPU no image goes to the kernel")
@pytest.mark.parametrize(("patch", "offset"), [(16, 0), (16, 3), (4, 0)], ids=["kernel", "odd-address", "patch-4"])
def test_gpu_images_give_what_cpu_images_do(patch, offset):
    images = raw_images(2, 33, 32).flatten()[offset : offset + 2 * 32 * 32 * 3].view(2, 32, 32, 3)
    settings = {"mean": MEAN, "std": STD, "dtype": torch.float32}
    on_gpu = raw_images(2, 33, 32).to(DEVICE).flatten()[offset : offset + 2 * 32 * 32 * 3].view(2, 32, 32, 3)
    torch.testing.assert_close(patchify(on_gpu, patch, **settings).cpu(), patchify(images, patch, **settings))


def test_reads_strided_images():
    cropped = raw_images(2, 10, 10)[:, 1:9, 2:10]
    channels_last = normalise(raw_images(2, 8, 8)).contiguous(memory_format=torch.channels_last)
    for images in (cropped, channels_last):
        torch.testing.assert_close(
            patchify(images, 4, mean=MEAN, std=STD, dtype=torch.float64),
            patchify(images.contiguous(), 4, mean=MEAN, std=STD, dtype=torch.float64),
            rtol=0,
            atol=0,
        )


def test_gradient_of_normalised_images():
    images = normalise(raw_images(1, 4, 6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patchify(x, 2, mean=MEAN, std=STD, dtype=torch.float64), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        pytest.param(torch.zeros(8, 8, 3, dtype=torch.uint8), "shape \\[8, 8, 3\\]", id="no-batch"),
        pytest.param(torch.zeros(1, 8, 8, 3, dtype=torch.int64), "torch.int64", id="integers"),
        pytest.param(torch.zeros(1, 8, 9, 3, dtype=torch.uint8), "8 x 9 pixels", id="ragged"),
        pytest.param(torch.zeros(1, 4, 8, 8), "4 channels", id="four-channels"),
    ],
)
def test_refuses_other_images(images, message):
    with pytest.raises(ValueError, match=message):
        patchify(images, 4, mean=MEAN, std=STD, dtype=torch.float32)
