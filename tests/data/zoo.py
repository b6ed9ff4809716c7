"""Payloads that a shard may hold where an image or a caption should be: good ones, bad ones and damaged ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from textlock.data.images import MAX_IMAGE_BYTES


def photo(width=96, height=64, mode="RGB", seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def patched(payload, offset, new):
    return payload[:offset] + new + payload[offset + len(new) :]


def frame_header(payload):
    return next(at for at in range(len(payload)) if payload[at] == 0xFF and payload[at + 1] in (0xC0, 0xC2))


def without_segments(payload, marker):
    """Drop the segments of a kind that come before the scan."""
    kept, at = payload[:2], 2
    while payload[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
        if payload[at + 1] != marker:
            kept += payload[at:end]
        at = end
    return kept + payload[at:]


def with_segment(payload, marker, body):
    return payload[:2] + segment(marker, body) + payload[2:]


def segment(marker, body):
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def adobe(transform):
    """Return the body of Adobe's marker (0xEE): 0 is RGB or CMYK, 1 YCbCr, 2 YCCK."""
    return b"Adobe\0d\0\0\0\0" + bytes([transform])


def named(payload, names):
    """Return a JPEG of three components with other names of these."""
    scan = payload.index(b"\xff\xda")
    for at in (frame_header(payload) + 10, scan + 5):
        for place, name in enumerate(names):
            payload = patched(payload, at + place * (3 if at < scan else 2), bytes([name]))
    return payload


def jpeg_of(samplings, levels):
    """Return a JPEG of one colour, in one unit of blocks: (across, down) sampling and level of each component."""
    bits = ""
    for (across, down), level in zip(samplings, levels, strict=True):
        bits += ("10" + format(level, "07b") if level else "0") + "0" + "00" * (across * down - 1)
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    width, height = (8 * max(factors) for factors in zip(*samplings, strict=True))
    frame = struct.pack(">BHHB", 8, height, width, len(samplings))
    frame += b"".join(bytes((name, h << 4 | v, 0)) for name, (h, v) in enumerate(samplings, 1))
    scan = bytes((len(samplings), *(part for name in range(1, len(samplings) + 1) for part in (name, 0)), 0, 63, 0))
    huffman = segment(0xC4, bytes([0x00, 1, 1, *[0] * 14, 0, 7])) + segment(0xC4, bytes([0x10, 1, *[0] * 15, 0]))
    quantisation = segment(0xDB, bytes([0] + [8] * 64))
    return b"\xff\xd8" + quantisation + segment(0xC0, frame) + huffman + segment(0xDA, scan) + data + b"\xff\xd9"


def with_scans(payload, count):
    """Repeat the last scan of a progressive JPEG."""
    start = payload.rindex(b"\xff\xda")
    return payload[:-2] + payload[start:-2] * count + payload[-2:]


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits, colour, content):
    """Put a PNG together from its header fields and the content of its data chunk."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", content), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def deep_png(values, colour):
    """Encode 16-bit values [H, W, C]; Pillow writes no such PNG with colours."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, colour, zlib.compress(rows))


def webp(*chunks):
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def canvas(width, height, flags=0):
    return b"VP8X", bytes([flags, 0, 0, 0]) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]


RGB = np.asarray(photo())
ALPHA = np.linspace(0, 255, 96 * 64).reshape(64, 96, 1).astype(np.uint8)
RGBA = Image.fromarray(np.concatenate([RGB, ALPHA], axis=2))
DEEP = RGB.astype(np.uint16) * 257 - (RGB > 0) * 100  # low bytes that are not the high ones again
DEEP_ALPHA = ALPHA.astype(np.uint16) * 257
JPEG = encode(photo(), quality=92)
PROGRESSIVE = encode(photo(), progressive=True)
PNG = encode(photo(), "PNG")
WEBP = encode(photo(), "WEBP", lossless=True)
LOSSY = encode(photo(), "WEBP", quality=90)
FRAMES = {"save_all": True, "append_images": [photo(seed=1)]}
SMALL_FRAME = (
    b"ANMF",
    struct.pack("<I", 5)[:3] * 2 + struct.pack("<I", 31)[:3] * 2 + bytes(4) + encode(photo(32, 32), "WEBP")[12:],
)
SOF = frame_header(JPEG)
SCAN = JPEG.index(b"\xff\xda")

GOOD = {
    "jpeg": JPEG,
    "grey jpeg": encode(photo(mode="L")),
    "cmyk jpeg": encode(photo(mode="CMYK")),
    "rgb jpeg": encode(photo(), keep_rgb=True),
    "progressive jpeg": PROGRESSIVE,
    "progressive grey jpeg": encode(photo(mode="L"), progressive=True),
    "4:4:4 jpeg": encode(photo(), subsampling=0),
    "4:2:2 jpeg": encode(photo(), subsampling=1),
    "jpeg with restarts": encode(photo(), restart_marker_blocks=2),
    "mpo": encode(photo(), "MPO", **FRAMES),
    **{f"exif orientation {number}": encode(photo(), exif=orientation(number)) for number in (2, 3, 6, 8)},
    "jpeg with a broken profile": encode(photo(), icc_profile=b"x" * 200),
    "jpeg with bytes behind the end": JPEG + b"\0" * 1000,
    "jpeg with fill bytes": JPEG[:2] + b"\xff\xff" + JPEG[2:],
    "jpeg with a long comment": JPEG[:2] + b"\xff\xfe\xff\xff" + b"c" * 65533 + JPEG[2:],
    "png": PNG,
    "png with alpha": encode(RGBA, "PNG"),
    "grey png": encode(photo(mode="L"), "PNG"),
    "grey png with alpha": encode(RGBA.convert("LA"), "PNG"),
    "palette png": encode(photo(mode="P"), "PNG"),
    "palette png with a transparent entry": encode(photo().quantize(16), "PNG", transparency=3),
    "1-bit png": encode(photo(mode="1"), "PNG"),
    "16-bit grey png": deep_png(DEEP[:, :, :1], 0),
    "16-bit png": deep_png(DEEP, 2),
    "16-bit grey png with alpha": deep_png(np.concatenate([DEEP[:, :, :1], DEEP_ALPHA], axis=2), 4),
    "16-bit png with alpha": deep_png(np.concatenate([DEEP, DEEP_ALPHA], axis=2), 6),
    "png with exif": encode(photo(), "PNG", exif=orientation(6)),
    "animated png": encode(photo(), "PNG", **FRAMES),
    "lossless webp": WEBP,
    "lossy webp": LOSSY,
    "webp with alpha": encode(RGBA, "WEBP", quality=90),
    "lossless webp with alpha": encode(RGBA, "WEBP", lossless=True, exact=True),
    "webp with exif": encode(photo(), "WEBP", lossless=True, exif=orientation(6)),
    "animated webp": encode(photo(), "WEBP", lossless=True, **FRAMES),
    "webp whose first frame is smaller": webp(canvas(96, 64, 2), (b"ANIM", bytes(6)), SMALL_FRAME),
    "one pixel": encode(photo(1, 1)),
    "one pixel wide": encode(photo(1, 700)),
}

# JPEGs whose colours are told by the names of components or by Adobe's marker, and whether DALI may read them.
BARE = without_segments(JPEG, 0xE0)
COLOURS = {
    "without any marker": (BARE, True),
    "adobe ycc": (with_segment(BARE, 0xEE, adobe(1)), True),
    "adobe transform that nobody knows": (with_segment(BARE, 0xEE, adobe(9)), True),
    "jfif of a later version": (JPEG.replace(b"JFIF\0\1", b"JFIF\0\2"), True),
    "names 0 1 2": (named(BARE, (0, 1, 2)), True),
    "grey with adobe": (with_segment(encode(photo(mode="L")), 0xEE, adobe(0)), True),
    "names RGB": (named(BARE, b"RGB"), False),
    "names RGB with jfif": (named(JPEG, b"RGB"), False),
    "adobe rgb": (with_segment(BARE, 0xEE, adobe(0)), False),
    "adobe rgb after the frame": (
        BARE[:-2].replace(b"\xff\xda", segment(0xEE, adobe(0)) + b"\xff\xda", 1) + BARE[-2:],
        False,
    ),
    "adobe rgb with jfif": (with_segment(JPEG, 0xEE, adobe(0)), False),
    "cmyk": (GOOD["cmyk jpeg"], False),
    "cmyk without adobe": (without_segments(GOOD["cmyk jpeg"], 0xEE), False),
    "ycck": (with_segment(without_segments(GOOD["cmyk jpeg"], 0xEE), 0xEE, adobe(2)), False),
}

# Metadata that is broken, or too long for a decoder, of images whose pixels are good.
CMYK = GOOD["cmyk jpeg"]
METADATA = {
    **{
        f"{name} of a {colours} jpeg": (with_segment(payload, marker, body), payload)
        for colours, payload in (("usual", JPEG), ("cmyk", CMYK))
        for name, marker, body in (
            ("no exif", 0xE1, b"Exif\0\0junk"),
            ("exif cut short", 0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30)),
            ("half a profile", 0xE2, b"ICC_PROFILE\0\1\2abc"),
            ("profile numbered 0", 0xE2, b"ICC_PROFILE\0\0\0"),
            ("directory of no images", 0xE2, b"MPF\0junk"),
            ("no adobe", 0xEE, b"Adobe"),
            ("comment of markers", 0xFE, b"\xff\xda\xff\xd9\xff\xc0"),
        )
    },
    **{
        f"{name} of a png": (PNG[:33] + png_chunk(kind, content) + PNG[33:], PNG)
        for name, kind, content in (
            ("long text", b"zTXt", b"k\0\0" + zlib.compress(bytes(2 * 2**20))),
            ("long profile", b"iCCP", b"k\0\0" + zlib.compress(bytes(2 * 2**20))),
            ("profile of another method", b"iCCP", b"k\0\1"),
            ("no gamma", b"gAMA", b""),
            ("no animation", b"acTL", b"abc"),
            ("no transparency", b"tRNS", b""),
        )
    },
    "wrong checksum of a text of a png": (PNG[:33] + png_chunk(b"tEXt", b"k\0a")[:-1] + b"\0" + PNG[33:], PNG),
}

# What the check refuses before any decoder runs, and by which kind.
REFUSED = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html>Not found</html>", "format"),
    **{format: (encode(photo(), format), "format") for format in ("GIF", "BMP", "TIFF", "ICO")},
    "random bytes": (np.random.default_rng(0).bytes(4000), "format"),
    "leading junk": (b"\0" + JPEG, "format"),
    "junk after the start marker": (JPEG[:2] + b"junk" + JPEG[2:], "format"),
    "too many bytes": (JPEG + bytes(MAX_IMAGE_BYTES), "too-large"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "no end marker": (JPEG[:-2], "truncated"),
    "ends at the frame header": (JPEG[:SOF], "truncated"),
    "ends inside the frame header": (JPEG[: SOF + 7], "truncated"),
    "start marker only": (JPEG[:3], "truncated"),
    "no scan": (JPEG[:2] + b"\xff\xd9", "truncated"),
    "lossless frame": (patched(JPEG, SOF + 1, b"\xc3"), "unsupported"),
    "arithmetic frame": (patched(JPEG, SOF + 1, b"\xc9"), "unsupported"),
    "12 bits": (patched(JPEG, SOF + 4, b"\x0c"), "unsupported"),
    "two components": (patched(JPEG, SOF + 9, b"\x02"), "unsupported"),
    "no height": (patched(JPEG, SOF + 5, b"\0\0"), "header"),
    "no frame header": (without_segments(JPEG, 0xC0), "header"),
    "junk between segments": (JPEG[:SOF] + b"junk" + JPEG[SOF:], "header"),
    "two frame headers": (JPEG[:SOF] + JPEG[SOF : SOF + 19] + JPEG[SOF:], "header"),
    "jpeg bomb header": (patched(JPEG, SOF + 5, b"\x4e\x20\x4e\x20"), "too-many-pixels"),
    "a thousand scans": (with_scans(PROGRESSIVE, 1000), "too-many-scans"),
    "a hundred scans over a large image": (
        patched(with_scans(PROGRESSIVE, 100), frame_header(PROGRESSIVE) + 5, struct.pack(">HH", 5000, 5000)),
        "too-many-scans",
    ),
    "many scans of one component": (
        patched(JPEG[:SCAN], SOF + 5, struct.pack(">HH", 5000, 5000))
        + segment(0xDA, bytes((1, 1, 0, 0, 63, 0))) * 100
        + b"\xff\xd9",
        "too-many-scans",
    ),
    "components sampled in fractions": (patched(JPEG, SOF + 11, b"\x31\1\2\x21"), "unsupported"),
    "no samples of a component": (patched(JPEG, SOF + 14, b"\x01"), "header"),
    "five samples of a component": (patched(JPEG, SOF + 11, b"\x51"), "header"),
    "more columns than libjpeg reads": (patched(JPEG, SOF + 5, struct.pack(">HH", 1, 65501)), "unsupported"),
    "png signature only": (PNG[:8], "header"),
    "half a png": (PNG[: len(PNG) // 2], "truncated"),
    "png without width": (patched(PNG, 16, bytes(4)), "header"),
    "png bomb header": (png(10**9, 10**9, 8, 2, b""), "too-many-pixels"),
    "half a webp": (WEBP[: len(WEBP) // 2], "truncated"),
    "empty webp": (b"RIFF\x04\0\0\0WEBP", "truncated"),
    "webp of an unknown chunk": (webp((b"JUNK", bytes(40))), "header"),
    "webp bomb header": (webp(canvas(2**24, 2**24), (b"VP8 ", bytes(20))), "too-many-pixels"),
}


def tiled(width, height):
    """Return a TIFF image in one tile of another size: the tags of its strip become those of a tile."""
    whole = bytearray(encode(photo(), "TIFF"))
    start = int.from_bytes(whole[4:8], "little") + 2
    for at in range(start, start + 12 * int.from_bytes(whole[start - 2 : start], "little"), 12):
        tag = int.from_bytes(whole[at : at + 2], "little")
        if tag in (273, 279):
            whole[at : at + 2] = {273: 324, 279: 325}[tag].to_bytes(2, "little")
        elif tag in (278, 284):
            whole[at : at + 12] = struct.pack("<HHII", {278: 322, 284: 323}[tag], 4, 1, width if tag == 278 else height)
    return bytes(whole)


# What only evaluation reads, and the image that its first frame shows.
PALETTE = photo().quantize(64)
GIF = encode(PALETTE, "GIF")
GREY16 = Image.fromarray(DEEP[:, :, 0].astype(np.uint16))
GREY8 = Image.fromarray((DEEP[:, :, 0] >> 8).astype(np.uint8))
DEEP_TIFF = encode(Image.fromarray(np.full((48, 64), 0x7777, np.uint16)), "TIFF")
EVALUATED = {
    "gif": (GIF, PALETTE),
    "animated gif": (encode(PALETTE, "GIF", save_all=True, append_images=[photo(seed=1).quantize(64)]), PALETTE),
    "gif with a transparent entry": (encode(PALETTE, "GIF", transparency=3), PALETTE),
    "bmp": (encode(photo(), "BMP"), photo()),
    "palette bmp": (encode(PALETTE, "BMP"), PALETTE),
    "tiff": (encode(photo(), "TIFF"), photo()),
    "tiff of several pages": (encode(photo(), "TIFF", save_all=True, append_images=[photo(seed=1)]), photo()),
    "compressed tiff with alpha": (encode(RGBA, "TIFF", compression="tiff_lzw"), photo()),
    "cmyk tiff": (encode(photo(mode="CMYK"), "TIFF"), photo(mode="CMYK").convert("RGB")),
    "16-bit grey tiff": (encode(GREY16, "TIFF"), GREY8),
    "12-bit grey tiff": (  # of one colour, whose bytes are all the same: fewer bits of them are 12-bit numbers, too
        patched(DEEP_TIFF, DEEP_TIFF.index(struct.pack("<HH", 258, 3)) + 8, b"\x0c"),
        Image.new("L", (64, 48), 0x77),
    ),
    "16-bit grey tiff whose white is 0": (
        encode(Image.fromarray(65535 - np.asarray(GREY16)), "TIFF", tiffinfo={262: 0}),
        GREY8,
    ),
    "tiff of 64-bit offsets": (encode(photo(), "TIFF", big_tiff=True), photo()),
    "ppm": (encode(photo(), "PPM"), photo()),
    "pgm": (encode(photo(mode="L"), "PPM"), photo(mode="L")),
    "16-bit pgm": (encode(GREY16, "PPM"), GREY8),
    "pbm": (encode(photo(mode="1"), "PPM"), photo(mode="1")),
}
GIF_FRAME = GIF.index(b",\0\0\0\0")
REFUSED_IN_EVALUATION = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html>", "format"),
    "another netpbm format": (b"P7\nWIDTH 1\n", "format"),
    "too many bytes": (GIF + bytes(MAX_IMAGE_BYTES), "too-large"),
    "gif bomb header": (patched(GIF, 6, b"\xdc\xff\xdc\xff"), "too-many-pixels"),
    "gif bomb frame": (patched(GIF, GIF_FRAME + 5, b"\xdc\xff\xdc\xff"), "too-many-pixels"),
    "ppm bomb header": (b"P6 65500 65500 255\n" + bytes(99), "too-many-pixels"),
    "bmp bomb header": (patched(encode(photo(), "BMP"), 18, struct.pack("<ii", 65500, -65500)), "too-many-pixels"),
    "tiff bomb tile": (tiled(65536, 65536), "too-many-pixels"),
    "floating-point tiff": (encode(photo(mode="F"), "TIFF"), "unsupported"),
    "32-bit tiff": (encode(photo(mode="I"), "TIFF"), "unsupported"),
    "gif signature only": (GIF[:6], "header"),
    "bmp of an unknown kind": (b"BM" + bytes(60), "header"),
    "tiff without a page": (b"II*\0" + bytes(60), "header"),
    "half a gif": (GIF[: len(GIF) // 2], "damaged"),
    "half a tiff": (encode(photo(), "TIFF")[:900], "damaged"),
    "half a bmp": (encode(photo(), "BMP")[:900], "damaged"),
    "half a ppm": (encode(photo(), "PPM")[:900], "damaged"),
}

# What only a decoder can find. DALI takes the first two for good and makes garbage of them.
DAMAGED = {
    "scan data": patched(JPEG, len(JPEG) // 2, b"\xff\x01" * 20),
    "header of a larger image": patched(JPEG, SOF + 5, struct.pack(">HH", 128, 192)),
    "jpeg without quantisation": without_segments(JPEG, 0xDB),
    "png data": patched(PNG, len(PNG) // 2, b"\x55" * 20),
    "png without data": png(96, 64, 8, 2, b""),
    "png with data of a smaller image": png(96, 64, 8, 2, zlib.compress(bytes(500))),
    "png of an unknown colour type": png(96, 64, 8, 5, zlib.compress(bytes(64 * 97))),
    "webp data": patched(WEBP, 30, b"\x55" * 60),
    "webp canvas of another size": webp(canvas(96, 64), (b"VP8 ", encode(photo(32, 32), "WEBP")[20:])),
}
GARBAGE_FOR_DALI = ("scan data", "header of a larger image")

# Captions without any text, or in another encoding than UTF-8.
NO_CAPTIONS = {
    "no bytes": b"",
    "white space": b" \r\n\t ",
    "nul bytes": bytes(10),
    "unicode spaces": "\u3000\u2003\xa0".encode(),
    "latin-1": b"caf\xe9",
    "utf-16": "a red bus".encode("utf-16"),
    "a surrogate": b"\xed\xa0\x80x",
    "overlong": b"\xc0\xaf etc",
}

# Captions that look harmful and are used.
ODD_CAPTIONS = {
    "byte order mark": b"\xef\xbb\xbfa bus",
    "two megabytes": b"word " * 400_000,
    "control characters": b"\x1b[2Ja\x07\x08 bus",
    "line breaks": b'a\nb\r\n{"step": 1}\n',
}
