import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from textlock.data import images
from textlock.data.images import (
    MAX_SCANS,
    BadImage,
    CropWindow,
    check_image,
    crop_and_resize,
    crop_draws,
    crop_window,
    decode_image,
    eval_image,
)
from textlock.data.loader import SKIP_KINDS

from .loading import settings, take
from .tars import bad_sample, sample, write_shard
from .zoo import (
    DAMAGED,
    DEEP,
    EVALUATED,
    GOOD,
    PROGRESSIVE,
    REFUSED,
    REFUSED_IN_EVALUATION,
    RGB,
    encode,
    photo,
    with_scans,
)


# Pillow saturates deep greys: they have the next test.
@pytest.mark.parametrize("name", [name for name in GOOD if not name.startswith("16-bit grey")])
def test_decodes_as_pillow_does(name):
    payload = GOOD[name]
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    header = check_image(payload)
    image = decode_image(payload)
    assert image.dtype == np.uint8
    assert image.shape == expected.shape == (header.height, header.width, 3)
    assert np.abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("name", "channels"), [("16-bit grey png", 1), ("16-bit grey png with alpha", 1), ("16-bit png", 3)]
)
def test_sixteen_bits_keep_the_high_byte(name, channels):
    assert np.array_equal(decode_image(GOOD[name]), np.broadcast_to(DEEP[:, :, :channels] >> 8, RGB.shape))


def whole_image(payload):
    header = check_image(payload)
    return CropWindow(0, 0, header.height, header.width)


def test_dali_makes_the_same_of_every_jpeg(device):
    good = {name: payload for name, payload in GOOD.items() if payload.startswith(b"\xff\xd8")}
    windows = [whole_image(payload) for payload in good.values()]
    theirs = torch.empty(len(good), 32, 32, 3, dtype=torch.uint8, device=device)
    dali = pytest.importorskip("textlock.data.dali", reason="DALI is not installed")
    decoder = dali.DaliDecoder(32, threads=1, device_id=0 if device.type == "cuda" else None, hw_decoder_load=0.65)
    decoder.decode(list(good.values()), windows, theirs, range(len(good)))
    for (name, payload), window, image in zip(good.items(), windows, theirs.cpu(), strict=True):
        ours = torch.empty(32, 32, 3, dtype=torch.uint8)
        crop_and_resize(decode_image(payload), window, ours)
        difference = (ours.int() - image.int()).abs().float()
        assert difference.mean() <= 0.35, name
        # Bicubic overshoots at hard edges: torch clips it after each of its two passes, DALI once.
        assert difference.max() <= (8 if name == "one pixel wide" else 1), name


@pytest.mark.parametrize("name", REFUSED)
def test_check_refuses(name):
    payload, kind = REFUSED[name]
    for read in (check_image, decode_image):
        with bad_sample(kind):
            read(payload)
    assert kind in SKIP_KINDS


def test_many_scans_are_read_up_to_the_limit():
    scans = PROGRESSIVE.count(b"\xff\xda")
    check_image(with_scans(PROGRESSIVE, MAX_SCANS - scans))
    with pytest.raises(BadImage, match="scans over 96 x 64 pixels"):
        check_image(with_scans(PROGRESSIVE, MAX_SCANS - scans + 1))


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_behind_a_good_header_is_found_by_the_decoder(name):
    check_image(DAMAGED[name])
    with bad_sample("damaged"):
        decode_image(DAMAGED[name])


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_reads_more_formats_as_their_png(name):
    payload, same = EVALUATED[name]
    assert torch.equal(eval_image(payload, 32), eval_image(encode(same, "PNG"), 32))
    with bad_sample("format"):
        check_image(payload)


@pytest.mark.parametrize("name", REFUSED_IN_EVALUATION)
def test_evaluation_refuses(name):
    payload, kind = REFUSED_IN_EVALUATION[name]
    with bad_sample(kind):
        eval_image(payload, 32)
    assert kind in SKIP_KINDS


def jpeg_of(sampling, levels, *, ids=(1, 2, 3)):
    """Return a JPEG of one colour, in one unit of blocks: (across, down) sampling and level of each component."""

    def segment(marker, body):
        return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body

    bits = ""
    for (across, down), level in zip(sampling, levels, strict=True):
        bits += ("10" + format(level, "07b") if level else "0") + "0" + "00" * (across * down - 1)
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    size = 8 * max(across for across, _ in sampling), 8 * max(down for _, down in sampling)
    frame = struct.pack(">BHHB", 8, size[1], size[0], len(sampling))
    frame += b"".join(bytes((name, h << 4 | v, 0)) for name, (h, v) in zip(ids, sampling, strict=False))
    scan = bytes(
        (len(sampling), *(part for name, _ in zip(ids, sampling, strict=False) for part in (name, 0)), 0, 63, 0)
    )
    tables = segment(0xC4, bytes([0x00, 1, 1, *[0] * 14, 0, 7])) + segment(0xC4, bytes([0x10, 1, *[0] * 15, 0]))
    quantisation = segment(0xDB, bytes([0] + [8] * 64))
    return b"\xff\xd8" + quantisation + segment(0xC0, frame) + tables + segment(0xDA, scan) + data + b"\xff\xd9"


def as_pillow_reads(payload):
    with Image.open(io.BytesIO(payload)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("chroma", [[(1, 1), (1, 1)], [(2, 1), (1, 1)], [(2, 2), (2, 2)], [(1, 2), (2, 1)]], ids=str)
@pytest.mark.parametrize(
    "luma", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4), (3, 1), (1, 3)], ids=str
)
def test_every_sampling_of_the_chroma_gives_the_image_that_pillow_reads(luma, chroma):
    payload = jpeg_of([luma, *chroma], (64, 0, 70))
    try:
        expected = as_pillow_reads(payload)
    except OSError:  # libjpeg reads no factors that do not divide the largest
        with bad_sample("damaged", "the jpeg image does not decode"):
            decode_image(payload)
        return
    assert np.abs(decode_image(payload) - expected).max() <= 1
    usual = luma in [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)] and chroma == [(1, 1), (1, 1)]
    assert check_image(payload).is_plain_jpeg == usual


def without_adobe(payload):
    at = payload.find(b"\xff\xee")
    return payload[:at] + payload[at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big") :]


CMYK = encode(Image.new("RGB", (64, 48), (230, 40, 40)).convert("CMYK"))


@pytest.mark.parametrize(
    "payload", [CMYK, without_adobe(CMYK), jpeg_of([(2, 2)], (64,)), jpeg_of([(1, 4), (1, 1), (1, 1)], (64, 0, 70))],
    ids=["CMYK", "CMYK without Adobe's marker", "grey", "unusual sampling"],
)  # fmt: skip
def test_both_decoders_give_the_same_image(payload, tmp_path):
    pytest.importorskip("nvidia.dali")
    shards = write_shard(tmp_path, sample("a", jpg=payload))
    one, other = (take(settings(shards, batch_size=1, decoder=name), 1)[0].images for name in ("cpu", "dali"))
    assert (one.int() - other.int()).abs().max() <= 2
    red, green, blue = decode_image(payload)[0, 0].tolist()
    if payload in (CMYK, without_adobe(CMYK)):
        assert abs(red - 230) < 9 and abs(green - 40) < 9 and abs(blue - 40) < 9


@pytest.mark.parametrize(("width", "height"), [(1_000_000, 1), (1, 40_000), (65_500, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_banner_costs_little_memory(width, height, format, monkeypatch):
    if format == "JPEG" and width > 65_500:
        pytest.skip("a JPEG has at most 65,500 columns")
    sizes = []
    resize = images.crop_and_resize
    monkeypatch.setattr(
        images, "crop_and_resize", lambda image, window, out: sizes.append(out.numel()) or resize(image, window, out)
    )
    payload = encode(Image.new("RGB", (width, height), (9, 200, 7)), format)
    pixels = eval_image(payload, 224)
    assert pixels.shape == (224, 224, 3) and (pixels.int() - torch.tensor([9, 200, 7])).abs().max() <= 2
    assert max(sizes) <= 3 * 224 * 224 * 64


def test_the_middle_of_a_banner_is_what_the_whole_of_it_shows(monkeypatch):
    payload = encode(photo(1300, 20), "PNG")
    cut = eval_image(payload, 16)
    monkeypatch.setattr(images, "_BANNER", 1000)
    whole = eval_image(payload, 16)
    # The scale of the whole is rounded to pixels, of the middle it is exact: a shift of at most half a pixel.
    assert (cut.int() - whole.int()).abs().float().mean() < 3


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


@pytest.mark.parametrize(("height", "width"), [(384, 512), (100, 700), (700, 100), (1, 1)])
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
