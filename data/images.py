"""Images: the check before any decoder, the decoders, the training crop and the evaluation transform.

How the two decoders of the loader treat what libraries disagree on:

| in the file                               | cpu (simplejpeg, Pillow)      | dali                                |
| ----------------------------------------- | ----------------------------- | ----------------------------------- |
| JPEG: baseline, extended, progressive     | read                          | read; equal to the cpu decoder      |
|                                           |                               | within one grey level except at     |
|                                           |                               | hard edges                          |
| JPEG: grey; MPO                           | to RGB; the first image       | to RGB; the first image             |
| JPEG: RGB by the names of components or   | as libjpeg reads it: JFIF's   | by the cpu decoder                  |
| by Adobe's marker                         | marker wins over Adobe's      |                                     |
| JPEG: CMYK, YCCK, with Adobe's marker or  | to RGB by Pillow, which takes | by the cpu decoder: DALI makes      |
| without                                   | 255 for no ink                | negatives of those without          |
| JPEG: chroma sampled in another way than  | by Pillow: simplejpeg refuses | by the cpu decoder                  |
| 4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1       | such files                    |                                     |
| JPEG: chroma sampled in fractions         | refused by the check, as      | refused by the check                |
|                                           | libjpeg reads none            |                                     |
| JPEG: arithmetic coded, lossless, 12 bits | refused by the check          | refused by the check                |
| JPEG: damaged scan                        | refused; garbage where Pillow | may decode to garbage               |
|                                           | reads it                      |                                     |
| JPEG: any other damage                    | refused                       | the cpu decoder is asked            |
| PNG: grey, palette, 1 to 8 bits           | to RGB                        | by the cpu decoder                  |
| PNG: 16 bits a channel                    | the high 8                    | by the cpu decoder                  |
| WebP: lossy, lossless                     | read                          | by the cpu decoder                  |
| alpha, transparent palette entries        | dropped                       | by the cpu decoder                  |
| several frames (WebP, PNG)                | the first                     | by the cpu decoder                  |
| EXIF orientation                          | not applied, as in the        | not applied                         |
|                                           | reference training            |                                     |
| colour profile, texts, other metadata,    | ignored                       | ignored                             |
| broken or not                             |                               |                                     |
| GIF, BMP, TIFF, PPM, PGM, PBM             | refused by the check; read by | refused by the check                |
|                                           | evaluation: the first frame,  |                                     |
|                                           | a TIFF upright by its tag     |                                     |
| AVIF, JPEG 2000, the rest                 | refused by the check          | refused by the check                |

PNG and WebP never reach DALI: it decodes them on the host anyway, and files whose headers its parsers refuse (a WebP
with EXIF after an odd chunk, a PNG of an unknown colour type) crash it (2.4.0).

The check is a header walk in Python, a few microseconds an image. It bounds memory and time (a header may promise
65,500 x 65,500 pixels, a progressive file a thousand scans over all of them) and keeps rarely exercised decoders away
from untrusted bytes.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, PpmImagePlugin, TiffImagePlugin

from .order import mix64, stream_key, uniform

UInt8Array = npt.NDArray[np.uint8]

MAX_IMAGE_BYTES = 16 * 2**20
MAX_IMAGE_PIXELS = 50_000_000
MAX_JPEG_SIDE = 65_500  # of libjpeg
# Of a JPEG in several scans: each visits all pixels and may take ten bytes of the file. Encoders write about ten scans.
MAX_SCANS = 256
MAX_SCANNED_PIXELS = 20 * MAX_IMAGE_PIXELS
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
EVALUATION_EXTENSIONS = IMAGE_EXTENSIONS | {"gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"}

_CROP_TRIES = 10
_BANNER = 64
_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Formats of evaluation sets, by how their files begin. The readers are called directly: Image.open would warn of large
# sizes in its own words, and try other formats.
_EVALUATION_READERS: dict[bytes, tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    b"GIF87a": ("gif", GifImagePlugin.GifImageFile),
    b"GIF89a": ("gif", GifImagePlugin.GifImageFile),
    b"BM": ("bmp", BmpImagePlugin.BmpImageFile),
    b"II*\0": ("tiff", TiffImagePlugin.TiffImageFile),
    b"II+\0": ("tiff", TiffImagePlugin.TiffImageFile),
    b"MM\0*": ("tiff", TiffImagePlugin.TiffImageFile),
    b"MM\0+": ("tiff", TiffImagePlugin.TiffImageFile),
    **{b"P%d" % number: ("ppm", PpmImagePlugin.PpmImageFile) for number in range(1, 7)},
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 322, 323  # TIFF tags
_SUPPORTED_SOF = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended sequential, progressive; Huffman coded
# Of three components: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1.
_USUAL_SAMPLINGS = frozenset(bytes([first, 0x11, 0x11]) for first in (0x11, 0x21, 0x22, 0x12, 0x41))
_NOT_SOF = frozenset({0xC4, 0xC8, 0xCC})  # DHT, JPG, DAC share the range of the SOF markers
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM and RST markers are two bytes


class BadSample(ValueError):
    """A sample that cannot be used. ``kind`` is a fixed word to count by; ``key`` is empty where it was not read."""

    def __init__(self, kind: str, message: str, key: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.key = key


class BadImage(BadSample):
    """An image that cannot be used."""


@dataclass(frozen=True)
class ImageHeader:
    """What the check has read: the format, and the size in pixels."""

    format: Literal["jpeg", "png", "webp"]
    width: int
    height: int
    is_plain_jpeg: bool = False
    """A JPEG that simplejpeg and DALI read alike: grey, or YCbCr with a usual sampling of the chroma."""


@dataclass(frozen=True)
class CropWindow:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def check_image(payload: bytes) -> ImageHeader:
    """Return the header of a JPEG, PNG or WebP image that is safe to hand to a decoder.

    Raises:
        BadImage: of kind empty, too-large (bytes), format (not one of the three), header, truncated, unsupported
            (a JPEG that is not 8-bit Huffman with 1, 3 or 4 components), too-many-pixels or too-many-scans.
    """
    _check_bytes(payload)
    if payload.startswith(_JPEG_MAGIC):
        header = _check_jpeg(payload)
    elif payload.startswith(_PNG_MAGIC):
        header = _check_png(payload)
    elif payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        header = _check_webp(payload)
    else:
        raise BadImage("format", f"not a JPEG, PNG or WebP image: it begins with {payload[:8]!r}")
    _check_pixels(header.width, header.height)
    return header


def _check_bytes(payload: bytes) -> None:
    if not payload:
        raise BadImage("empty", "the image has 0 bytes")
    if len(payload) > MAX_IMAGE_BYTES:
        raise BadImage("too-large", f"the image has {len(payload):,} bytes, more than {MAX_IMAGE_BYTES:,}")


def _check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("header", f"the header says {width} x {height} pixels")
    if width * height > MAX_IMAGE_PIXELS:
        raise BadImage(
            "too-many-pixels", f"the header says {width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,} in all"
        )


def _check_jpeg(payload: bytes) -> ImageHeader:
    header = None
    components = b""
    progressive = says_rgb = False
    at = 2
    last = len(payload) - 4
    while at <= last:
        if payload[at] != 0xFF:
            raise BadImage("header", f"byte {at} of the JPEG should begin a marker")
        marker = payload[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _NO_LENGTH:
            at += 2
        elif marker == 0xDA:
            if header is None:
                raise BadImage("header", "the JPEG has a scan before any frame header")
            # Searched in the whole scan: files with bytes after the end marker are valid and common.
            if payload.rfind(b"\xff\xd9", at) < 0:
                raise BadImage("truncated", "the JPEG has no end marker")
            if progressive or payload[at + 4 : at + 5] < components:  # more scans follow this one
                _check_scans(header, payload, at)
            return replace(header, is_plain_jpeg=False) if says_rgb and components == b"\3" else header
        elif marker == 0xD9:
            raise BadImage("truncated", "the JPEG ends before any scan")
        else:
            if 0xC0 <= marker <= 0xCF and marker not in _NOT_SOF:
                if header is not None:
                    raise BadImage("header", "the JPEG has two frame headers")
                header = _read_frame_header(payload, at, marker)
                components = payload[at + 9 : at + 10]
                progressive = marker == 0xC2
            elif marker == 0xEE:
                says_rgb |= payload[at + 4 : at + 9] == b"Adobe" and payload[at + 15 : at + 16] == b"\0"
            at += 2 + (payload[at + 2] << 8 | payload[at + 3])
    raise BadImage("truncated", "the JPEG ends inside its headers")


def _read_frame_header(payload: bytes, at: int, marker: int) -> ImageHeader:
    fields = payload[at + 4 : at + 10]
    if len(fields) < 6:
        raise BadImage("truncated", "the JPEG ends inside its frame header")
    precision, components = fields[0], fields[5]
    if marker not in _SUPPORTED_SOF or precision != 8 or components not in (1, 3, 4):
        raise BadImage(
            "unsupported", f"JPEG frame type {marker:#x} with {precision} bits and {components} components is not read"
        )
    samplings = payload[at + 11 : at + 10 + 3 * components : 3]
    if len(samplings) < components:
        raise BadImage("truncated", "the JPEG ends inside its frame header")
    is_plain = components == 1 or (samplings in _USUAL_SAMPLINGS and payload[at + 10 : at + 19 : 3] != b"RGB")
    if not is_plain:
        _check_samplings(samplings)
    height, width = fields[1] << 8 | fields[2], fields[3] << 8 | fields[4]
    if max(width, height) > MAX_JPEG_SIDE:
        raise BadImage(
            "unsupported", f"a JPEG of {width} x {height} pixels is not read: the limit is {MAX_JPEG_SIDE:,}"
        )
    return ImageHeader("jpeg", width, height, is_plain)


def _check_samplings(samplings: bytes) -> None:
    """Refuse what libjpeg does not read. A byte is of a component: samples across and down, four bits each."""
    for factors in ([sampling >> 4 for sampling in samplings], [sampling & 15 for sampling in samplings]):
        if not 1 <= min(factors) <= max(factors) <= 4:
            raise BadImage("header", f"the JPEG says {min(factors)} to {max(factors)} samples of a component")
        if any(max(factors) % factor for factor in factors):
            raise BadImage("unsupported", "a JPEG whose components are sampled in fractions of each other is not read")


def _check_scans(header: ImageHeader, payload: bytes, at: int) -> None:
    data = np.frombuffer(payload, np.uint8, offset=at)
    scans = np.count_nonzero((data[:-1] == 0xFF) & (data[1:] == 0xDA))  # entropy-coded data never holds this pair
    if scans > MAX_SCANS or scans * header.width * header.height > MAX_SCANNED_PIXELS:
        raise BadImage("too-many-scans", f"{scans} scans over {header.width} x {header.height} pixels")


def _check_png(payload: bytes) -> ImageHeader:
    if payload[12:16] != b"IHDR":
        raise BadImage("header", "the PNG does not begin with IHDR")
    if payload.rfind(b"IEND", 33) < 0:
        raise BadImage("truncated", "the PNG has no IEND chunk")
    return ImageHeader("png", int.from_bytes(payload[16:20], "big"), int.from_bytes(payload[20:24], "big"))


def _check_webp(payload: bytes) -> ImageHeader:
    if len(payload) < max(30, 8 + int.from_bytes(payload[4:8], "little")):
        raise BadImage("truncated", "the WebP file is shorter than its header says")
    chunk = payload[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(payload[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(payload[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif chunk == b"VP8 ":
        width, height = (int.from_bytes(payload[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    else:
        raise BadImage("header", f"unknown WebP chunk {chunk!r}")
    return ImageHeader("webp", width, height)


def decode_image(payload: bytes, header: ImageHeader | None = None) -> UInt8Array:
    """Decode a JPEG, PNG or WebP image to RGB, uint8 [H, W, 3]; ``header`` is of the check, where it was done already.

    Raises:
        BadImage: the check refuses the image, or (kind damaged) the decoder does.
    """
    if header is None:
        header = check_image(payload)
    image = _decode(header, payload)
    if image.shape != (header.height, header.width, 3):
        raise BadImage("damaged", f"the header says {header.width} x {header.height} pixels, not {image.shape[1::-1]}")
    return image


def _decode(header: ImageHeader, payload: bytes) -> UInt8Array:
    try:
        if header.is_plain_jpeg:
            try:
                return _decode_plain_jpeg(payload)
            except ValueError:  # of an incomplete colour profile, too
                return _decode_plain_jpeg(_without_jpeg_metadata(header, payload))
        if header.format == "jpeg":
            payload = _without_jpeg_metadata(header, payload)
        elif header.format == "png":
            payload = _without_png_metadata(payload)
        with Image.open(io.BytesIO(payload), formats=[header.format]) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow's readers raise most built-in types on damaged files
        # Some say no more than a number.
        raise BadImage(
            "damaged", f"the {header.format} image does not decode ({type(error).__name__}: {error})"
        ) from error


def _decode_plain_jpeg(payload: bytes) -> UInt8Array:
    return np.asarray(simplejpeg.decode_jpeg(payload, colorspace="RGB", strict=True))


def _without_jpeg_metadata(header: ImageHeader, payload: bytes) -> bytes:
    """Return a JPEG that passed the check without its application segments and comments.

    Those of JFIF and Adobe, which say what the colours are, only go where the header has told that already.
    """
    kept, at = [payload[:2]], 2
    while (marker := payload[at + 1]) != 0xDA:
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + (payload[at + 2] << 8 | payload[at + 3])
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        tells_colours = payload[at + 4 : at + 9] in (b"JFIF\0", b"Adobe") and end - at >= 16  # a short one is none
        if not is_metadata or (tells_colours and not header.is_plain_jpeg):
            kept.append(payload[at:end])
        at = end
    return b"".join((*kept, payload[at:]))


def _without_png_metadata(payload: bytes) -> bytes:
    """Return a PNG with its critical chunks alone: size, palette and data."""
    kept, at = [payload[:8]], 8
    while at + 8 <= len(payload):
        end = at + 12 + int.from_bytes(payload[at : at + 4], "big")
        if not payload[at + 4] & 0x20:  # a small letter begins the name of a chunk that may be left out
            kept.append(payload[at:end])
        at = end
    return b"".join(kept)


def _to_rgb(image: Image.Image, bits: int = 16) -> UInt8Array:
    """Convert to RGB, uint8 [H, W, 3]; of grey with more than 8 ``bits`` the high 8 are taken."""
    if image.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey saturates at 255.
        high_byte = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return np.repeat(high_byte[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # converted, it would be a copy


def _decode_evaluation_image(payload: bytes) -> UInt8Array:
    """Decode an image of any format in EVALUATION_EXTENSIONS to RGB, uint8 [H, W, 3]."""
    reader = next((reader for start, reader in _EVALUATION_READERS.items() if payload.startswith(start)), None)
    if reader is None:
        return decode_image(payload)
    _check_bytes(payload)
    format, read = reader
    try:
        image = read(io.BytesIO(payload))
        bits, is_negative = 16, False
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
            # Pillow minds "white is 0" up to 8 bits only.
            is_negative = bits > 8 and image.tag_v2.get(_PHOTOMETRIC) == 0
            # A tile is decoded whole and may promise more than the image does.
            _check_pixels(int(image.tag_v2.get(_TILE_WIDTH, 1)), int(image.tag_v2.get(_TILE_LENGTH, 1)))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("too-many-pixels", f"the first frame of the {format} image is too large: {error}") from error
    except Exception as error:  # as of damaged files, below
        raise BadImage(
            "header", f"the header of the {format} image is damaged or of a kind that is not read: {error}"
        ) from error
    _check_pixels(*image.size)
    if image.mode == "F" or (image.mode == "I" and format == "tiff"):
        raise BadImage("unsupported", "a TIFF image with signed, 32-bit or floating-point pixels is not read")
    try:
        rgb = _to_rgb(image, bits)
    except Exception as error:
        raise BadImage("damaged", f"the {format} image does not decode: {error}") from error
    return 255 - rgb if is_negative else rgb


def thumbnail(payload: bytes, side: int) -> UInt8Array:
    """Return the whole image, as ``eval_image`` decodes it, uint8 [h, w, 3] with no side above ``side``; none grows.

    Raises:
        BadImage: the image cannot be decoded.
    """
    image = _decode_evaluation_image(payload)
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= side:
        return image
    small = torch.empty(max(1, height * side // longest), max(1, width * side // longest), 3, dtype=torch.uint8)
    crop_and_resize(image, CropWindow(0, 0, height, width), small)
    return small.numpy()


def crop_draws(seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the uniform numbers in [0, 1) of the random crop at each position, shape [n, 10 tries, 4].

    A hash of (seed, epoch, position, counter), so that any position has its numbers without the ones before it.
    """
    streams = mix64(mix64(positions.astype(np.uint64) ^ stream_key(seed, epoch, "crop")))
    counters = np.arange(_CROP_TRIES * 4, dtype=np.uint64)
    bits = mix64(streams[:, None] + mix64(counters)[None, :])
    return uniform(bits).reshape(-1, _CROP_TRIES, 4)


def crop_window(
    height: int,
    width: int,
    draws: npt.NDArray[np.float64],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> CropWindow:
    """Return the random-resized-crop window that ``draws`` [10, 4] (one position of ``crop_draws``) select.

    The distribution is that of torchvision's RandomResizedCrop: ``scale`` bounds the part of the area, ``ratio`` the
    width over the height (log-uniform); after ten windows that do not fit, the largest central one of a legal ratio.
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio, u_top, u_left in draws.tolist():
        target = area * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(low + u_ratio * (high - low))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return CropWindow(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w)
    w, h = width, height
    if width < ratio[0] * height:
        h = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = max(1, round(height * ratio[1]))
    return CropWindow((height - h) // 2, (width - w) // 2, h, w)


def crop_and_resize(image: UInt8Array, window: CropWindow, out: torch.Tensor) -> None:
    """Cut ``window`` from ``image`` [H, W, 3]; write its bicubic, antialiased resize into ``out`` uint8 [h, w, 3]."""
    bottom, right = window.top + window.height, window.left + window.width
    # A compact crop and a channels-last ``out`` keep torch on its one-thread path and save the transposed copy: the
    # decode threads are the parallelism, and OpenMP teams under each of them would fight for the same cores.
    crop = np.ascontiguousarray(image[window.top : bottom, window.left : right])
    source = torch.from_numpy(crop).unsqueeze(0).permute(0, 3, 1, 2)
    target = out.unsqueeze(0).permute(0, 3, 1, 2)
    torch.ops.aten._upsample_bicubic2d_aa.out(source, list(out.shape[:2]), False, out=target)


def eval_image(payload: bytes, image_size: int) -> torch.Tensor:
    """Return the image as evaluated, uint8 [S, S, 3]: short side to S (bicubic, antialiased), then the central square.

    Formats that only evaluation sets hold are read as well: GIF, BMP, TIFF, PPM, PGM, PBM (``EVALUATION_EXTENSIONS``).
    Of a banner, whose long side has more than ``_BANNER`` times the pixels of the short one, the middle is cut out
    before: resized as a whole it would grow with that ratio. Its square may lie up to a pixel aside for it.

    Raises:
        BadImage: the image cannot be decoded.
    """
    return _central_square(_decode_evaluation_image(payload), image_size)


def eval_picture(picture: Image.Image, image_size: int) -> torch.Tensor:
    """Return what ``eval_image`` does of an image that Pillow has opened.

    Raises:
        BadImage: the image is too large, or cannot be decoded.
    """
    _check_pixels(*picture.size)
    try:
        image = _to_rgb(picture)
    except Exception as error:  # as of damaged files, above
        raise BadImage("damaged", f"the image does not decode: {error}") from error
    return _central_square(image, image_size)


def _central_square(image: UInt8Array, image_size: int) -> torch.Tensor:
    height, width = image.shape[:2]
    short = min(height, width)
    if max(height, width) > _BANNER * short:
        # The rest is even: the middle stays where it was, to the pixel.
        height, width = (
            min(side, _BANNER // 2 * short + (side - _BANNER // 2 * short) % 2) for side in (height, width)
        )
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        image = image[top : top + height, left : left + width]
    resized = torch.empty(image_size * height // short, image_size * width // short, 3, dtype=torch.uint8)
    crop_and_resize(image, CropWindow(0, 0, height, width), resized)
    top = round((resized.shape[0] - image_size) / 2)
    left = round((resized.shape[1] - image_size) / 2)
    return resized[top : top + image_size, left : left + image_size].contiguous()
