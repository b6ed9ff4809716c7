"""The passes of `store` and `recompute` at the ends of their ranges, and their memory. The rest: test_cards.py.

The interpreter's tiles are 32 × 32 × 32, so small inputs have several of them, ragged ones included.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from textlock.kernels import contrastive_tiles
from textlock.kernels.contrastive_tiles import STORED_RANGE

from .pairs import (
    DEVICE,
    LOSSES,
    assert_close,
    in_chunks_of,
    inputs_of,
    make_rows,
    needs_tiles,
    profiled,
    relative_error,
    run,
    truth_of,
)

LOSS = LOSSES["contrastive"]
pytestmark = [needs_tiles, pytest.mark.usefixtures("poisoned_memory")]


def spread_apart(n=64, d=96):
    """Rows around one direction, but the last text is against it: its cosines lie 0.6 below all others."""
    image, text = make_rows(n, n, d)
    direction = torch.full((d,), d**-0.5)
    image, text = F.normalize(0.6 * direction + image), F.normalize(0.8 * direction + text)
    text[-1] = -text[-1]
    return image.half().double(), text.half().double()


def sums_of(image, text, scale, *, store):
    rows = (image.to(DEVICE, torch.float16), text.to(DEVICE, torch.float16))
    return contrastive_tiles.sum_exponentials(*rows, torch.tensor(scale, device=DEVICE), None, 0, store=store)


@pytest.mark.gpu
def test_column_far_below_its_tile_is_summed_anew():
    image, text = spread_apart()
    for scale in (50.0, 300.0):
        exact = (scale * image @ text.T).exp()
        exact.fill_diagonal_(0)
        gap = (exact.amax(0).amax() / exact.amax(0)[-1]).log2()
        assert (gap > 150) == (scale == 300), "beyond the range of float32 at the second scale only"
        sums = sums_of(image, text, scale, store=False)
        assert relative_error(sums.rows.cpu().log(), exact.sum(1).log()) < 1e-6
        torch.testing.assert_close(sums.columns.cpu(), exact.sum(0), rtol=2**-24 * scale * 10, atol=0)
    assert_close(LOSS, "recompute", run(LOSS, "recompute", image, text, 300.0), truth_of(LOSS, image, text, 300.0),
                 image, text, 300.0)  # fmt: skip


@pytest.mark.gpu
def test_stored_exponentials_are_right_in_all_of_their_range():
    """Far below 2^-126 of the highest of their row, the least that an exp2 of float32 can give."""
    image, text = spread_apart()
    stored = sums_of(image, text, 300.0, store=True).stored
    logits = 300.0 / math.log(2) * image @ text.T
    below = logits - stored.offsets[:, : len(image)].double().cpu().repeat_interleave(stored.block_n, 0)[: len(text)].T
    found = ((stored.exponentials[:, : len(text)].int() & 0xFFFF) << 15).view(torch.float32).cpu()
    # Eight bits of mantissa, and cosines in float32 times 433.
    right = (found / (below + contrastive_tiles.HEADROOM).exp2() - 1).abs() < 2**-8
    counted = (below > -125 - contrastive_tiles.HEADROOM) & ~torch.eye(len(image), dtype=torch.bool)
    assert below[counted].min() < -160
    assert right[counted].all()


@pytest.mark.gpu
def test_store_is_nan_rather_than_wrong_beyond_its_range():
    image, text = spread_apart()

    def gap(scale):
        """Return by how much the highest row maximum exceeds the lowest normaliser of a column, in units of log2."""
        logits = scale * image @ text.T
        lowest = logits.logsumexp(0).amin()
        return (logits.fill_diagonal_(-torch.inf).amax() - lowest) / math.log(2)

    inside, beyond = (
        float(min(range(50, 400), key=lambda scale: abs(gap(scale) - wanted))) for wanted in (STORED_RANGE - 4, 160.0)
    )
    assert STORED_RANGE - 8 < gap(inside) < STORED_RANGE < 150 < gap(beyond) < 170
    truth = truth_of(LOSS, image, text, inside)
    assert_close(LOSS, "store", run(LOSS, "store", image, text, inside), truth, image, text, inside)
    truth = truth_of(LOSS, image, text, beyond)
    for learnt in (LOSS.learnt, ("image",)):
        result = run(LOSS, "store", image, text, beyond, learnt=learnt)
        assert_close(LOSS, "store", {"loss": result["loss"]}, truth, image, text, beyond)
        assert result["image"].isnan().all()


@pytest.mark.gpu
def test_scale_beyond_the_documented_range_is_loud():
    image, text = make_rows(33, 33, 64)
    image[3] = text[9]
    for mode in LOSS.tiled:
        result = run(LOSS, mode, image, text, 720.0)
        assert not result["loss"].isfinite() and result["image"].isnan().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="reads the CPU allocator")
@pytest.mark.parametrize(("mode", "share"), [("recompute", 0.25), ("store", 0.75)])
def test_peak_memory(mode, share):
    """`recompute` never holds the logits, in no width; `store` holds them in two bytes."""
    b, d = 224, 64
    inputs = inputs_of(LOSS, *make_rows(b, b, d), dtype=torch.float16, learnt=("image",))
    with in_chunks_of(32):
        _, peak, _ = profiled(lambda: LOSS.function(**inputs, mode=mode).backward())
    rows_in_float32 = 4 * b * d
    assert peak <= share * 4 * b * b + 6 * rows_in_float32
    assert mode == "recompute" or peak >= 2 * b * b, "the measure must see what is stored"


encode, decode = contrastive_tiles.encode, contrastive_tiles.decode


@triton.jit
def code_kernel(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, decode(encode(tl.load(x + i))))


@pytest.mark.gpu
def test_stored_numbers_keep_eight_bits_of_mantissa():
    exponent = torch.linspace(-120, 46, 1024, device=DEVICE)
    values = torch.cat([exponent.exp2(), torch.zeros(1024, device=DEVICE)])
    decoded = torch.empty_like(values)
    code_kernel[(1,)](values, decoded, n=2048)
    assert decoded[1024:].count_nonzero() == 0
    error = (decoded[:1024] / values[:1024] - 1).abs()
    assert 2**-10 < error.max() <= 2**-9 and error.mean() < 2**-10
    assert (decoded[:1024] / values[:1024] - 1).mean().abs() < 2**-13, "rounded, not cut"


def test_parts_fill_the_last_wave():
    assert contrastive_tiles._splits(96, 132, 1024) == 4  # 4,096 images of width 768: 384 programs, 2.9 waves
    assert contrastive_tiles._splits(1536, 132, 1024) == 1
    assert contrastive_tiles._splits(12, 132, 1024) == 11  # 512 images: as many programs as there are multiprocessors
    assert contrastive_tiles._splits(96, 132, 2) <= 2
