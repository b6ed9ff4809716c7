import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from textlock.data.images import (
    MAX_IMAGE_BYTES,
    BadImage,
    CropWindow,
    check_image,
    crop_and_resize,
    crop_draws,
    crop_window,
    decode_image,
    eval_image,
)


def photo(width=96, height=64, mode="RGB", seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def orientation_6():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


JPEG = encode(photo(), quality=92)
PNG = encode(photo(), "PNG")
WEBP = encode(photo(), "WEBP", lossless=True)


def frame_header(payload):
    return next(at for at in range(len(payload)) if payload[at] == 0xFF and payload[at + 1] in (0xC0, 0xC2))


def patched(payload, offset, new):
    return payload[:offset] + new + payload[offset + len(new) :]


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


GOOD = [
    pytest.param(JPEG, "RGB", id="jpeg"),
    pytest.param(encode(photo(mode="L")), "RGB", id="grey jpeg"),
    pytest.param(encode(photo(mode="CMYK")), "RGB", id="cmyk jpeg"),
    pytest.param(encode(photo(), progressive=True), "RGB", id="progressive jpeg"),
    pytest.param(encode(photo(), subsampling=0), "RGB", id="4:4:4 jpeg"),
    pytest.param(encode(photo(), exif=orientation_6()), "RGB", id="exif orientation is not applied"),
    pytest.param(JPEG + b"\0" * 1000, "RGB", id="jpeg with bytes behind the end"),
    pytest.param(JPEG[:2] + b"\xff\xff" + JPEG[2:], "RGB", id="jpeg with fill bytes"),
    pytest.param(JPEG[:2] + b"\xff\xfe\xff\xff" + b"c" * 65533 + JPEG[2:], "RGB", id="jpeg with a long comment"),
    pytest.param(PNG, "RGB", id="png"),
    pytest.param(encode(photo(mode="RGBA"), "PNG"), "RGB", id="png with alpha"),
    pytest.param(encode(photo(mode="P"), "PNG"), "RGB", id="palette png"),
    pytest.param(encode(photo(mode="1"), "PNG"), "RGB", id="1-bit png"),
    pytest.param(WEBP, "RGB", id="lossless webp"),
    pytest.param(encode(photo(), "WEBP", quality=90), "RGB", id="lossy webp"),
    pytest.param(encode(photo(mode="RGBA"), "WEBP"), "RGB", id="webp with alpha"),
    pytest.param(
        encode(photo(), "WEBP", save_all=True, append_images=[photo(seed=1)]), "RGB", id="first frame of a webp"
    ),
    pytest.param(encode(photo(1, 1)), "RGB", id="one pixel"),
    pytest.param(encode(photo(1, 700)), "RGB", id="one pixel wide"),
]


@pytest.mark.parametrize(("payload", "mode"), GOOD)
def test_decodes_as_pillow_does(payload, mode):
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert(mode))
    header = check_image(payload)
    image = decode_image(payload)
    assert image.dtype == np.uint8
    assert image.shape == expected.shape == (header.height, header.width, 3)
    assert np.abs(image.astype(int) - expected).max() <= 1


def test_sixteen_bit_grey_keeps_its_high_byte():
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 7
    image = decode_image(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(image, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


SOF = frame_header(JPEG)
BAD = [
    pytest.param(b"", "empty", id="empty"),
    pytest.param(b"\xff", "format", id="one byte"),
    pytest.param(b"<!DOCTYPE html><html>Not found</html>", "format", id="html"),
    pytest.param(encode(photo(), "GIF"), "format", id="gif"),
    pytest.param(b"\0" + JPEG, "format", id="leading junk"),
    pytest.param(JPEG + bytes(MAX_IMAGE_BYTES), "too-large", id="too many bytes"),
    pytest.param(JPEG[: len(JPEG) // 2], "truncated", id="half a jpeg"),
    pytest.param(JPEG[:-2], "truncated", id="no end marker"),
    pytest.param(JPEG[:SOF], "truncated", id="ends at the frame header"),
    pytest.param(JPEG[: SOF + 7], "truncated", id="ends inside the frame header"),
    pytest.param(JPEG[:3], "truncated", id="start marker only"),
    pytest.param(JPEG[:2] + b"\xff\xd9", "truncated", id="no scan"),
    pytest.param(patched(JPEG, SOF + 1, b"\xc3"), "unsupported", id="lossless frame"),
    pytest.param(patched(JPEG, SOF + 1, b"\xc9"), "unsupported", id="arithmetic frame"),
    pytest.param(patched(JPEG, SOF + 4, b"\x0c"), "unsupported", id="12 bits"),
    pytest.param(patched(JPEG, SOF + 9, b"\x02"), "unsupported", id="two components"),
    pytest.param(patched(JPEG, SOF + 5, b"\0\0"), "header", id="no height"),
    pytest.param(JPEG[:2] + b"junk" + JPEG[2:], "format", id="junk after the start marker"),
    pytest.param(JPEG[:SOF] + b"junk" + JPEG[SOF:], "header", id="junk between segments"),
    pytest.param(JPEG[:SOF] + JPEG[SOF : SOF + 19] + JPEG[SOF:], "header", id="two frame headers"),
    pytest.param(patched(JPEG, SOF + 5, b"\x4e\x20\x4e\x20"), "too-many-pixels", id="jpeg bomb header"),
    pytest.param(png_header(10**9, 10**9), "too-many-pixels", id="png bomb header"),
    pytest.param(PNG[: len(PNG) // 2], "truncated", id="half a png"),
    pytest.param(WEBP[: len(WEBP) // 2], "truncated", id="half a webp"),
    pytest.param(b"RIFF\x04\0\0\0WEBP", "truncated", id="empty webp"),
]


@pytest.mark.parametrize(("payload", "kind"), BAD)
def test_check_refuses(payload, kind):
    with pytest.raises(BadImage) as caught:
        check_image(payload)
    assert caught.value.kind == kind
    with pytest.raises(BadImage):
        decode_image(payload)


DAMAGED = [
    pytest.param(patched(JPEG, len(JPEG) // 2, b"\xff\x01" * 20), id="scan data"),
    pytest.param(patched(PNG, len(PNG) // 2, b"\x55" * 20), id="png data"),
    pytest.param(patched(WEBP, 30, b"\x55" * 60), id="webp data"),
    pytest.param(patched(JPEG, SOF + 5, struct.pack(">HH", 128, 192)), id="header of a larger image"),
]


@pytest.mark.parametrize("payload", DAMAGED)
def test_damage_behind_a_good_header_is_found_by_the_decoder(payload):
    check_image(payload)
    with pytest.raises(BadImage) as caught:
        decode_image(payload)
    assert caught.value.kind == "damaged"


@pytest.mark.parametrize("whole", [JPEG, PNG, WEBP], ids=["jpeg", "png", "webp"])
def test_mutants_never_raise_anything_else(whole):
    rng = np.random.default_rng(0)
    for _ in range(300):
        mutant = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.2 else whole)
        for at in rng.integers(0, min(len(mutant), 700), 3):
            mutant[at] = rng.integers(256)
        try:
            header = check_image(bytes(mutant))
            if header.width * header.height < 1_000_000:
                decode_image(bytes(mutant))
        except BadImage:
            pass


WINDOW_RULE = {"scale": (0.9, 1.0), "ratio": (0.75, 4 / 3)}


def test_draws_are_random_access_and_uniform():
    draws = crop_draws(7, 2, np.arange(4000))
    assert draws.shape == (4000, 10, 4)
    assert np.array_equal(crop_draws(7, 2, np.array([1234, 5])), draws[[1234, 5]])
    assert not np.array_equal(crop_draws(7, 3, np.array([5])), draws[[5]])
    assert not np.array_equal(crop_draws(8, 2, np.array([5])), draws[[5]])
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    expected = draws.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 85.4  # chi-square with 49 degrees of freedom, p = 0.001
    columns = draws.reshape(4000, 40)
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(40)
    assert np.abs(correlation).max() < 0.09
    assert abs(np.corrcoef(columns[:-1, 0], columns[1:, 0])[0, 1]) < 0.07


@pytest.mark.parametrize(("height", "width"), [(384, 512), (512, 384), (300, 300), (100, 700), (700, 100), (1, 1)])
def test_windows_are_distributed_as_in_torchvision(height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    draws = crop_draws(0, 0, np.arange(3000))
    ours = [crop_window(height, width, row, **WINDOW_RULE) for row in draws]
    ours = np.array([[window.top, window.left, window.height, window.width] for window in ours])
    frame = torch.zeros(3, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(frame, [0.9, 1.0], [0.75, 4 / 3]) for _ in range(3000)])
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    for column in range(4):
        # Two-sample Kolmogorov-Smirnov distance; 1.95 sqrt(2 / n) is p = 0.001.
        grid = np.union1d(ours[:, column], theirs[:, column])
        one = np.searchsorted(np.sort(ours[:, column]), grid, side="right")
        other = np.searchsorted(np.sort(theirs[:, column]), grid, side="right")
        assert np.abs(one - other).max() / 3000 < 1.95 * (2 / 3000) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(60, 90), (64, 64), (33, 200), (17, 5)])
def test_crop_and_resize_matches_interpolate(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height + 9, width + 7, 3), dtype=np.uint8)
    out = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    crop_and_resize(image, CropWindow(4, 3, height, width), out[1])
    source = torch.from_numpy(image[4 : 4 + height, 3 : 3 + width].copy()).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(source, (64, 64), mode="bicubic", antialias=True)
    assert torch.equal(out[1], expected[0].permute(1, 2, 0))
    assert not out[0].any()


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (300, 200), (32, 32), (20, 31), (33, 500)])
def test_evaluation_matches_pillow_bicubic(width, height):
    payload = encode(photo(width, height), "PNG")
    image = eval_image(payload, 32)
    assert image.shape == (32, 32, 3) and image.dtype == torch.uint8 and image.is_contiguous()
    transforms = pytest.importorskip("torchvision.transforms")
    recipe = transforms.Compose(
        [transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )
    expected = np.asarray(recipe(Image.open(io.BytesIO(payload)).convert("RGB"))).astype(int)
    difference = np.abs(image.numpy().astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.2
