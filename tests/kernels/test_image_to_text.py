"""What the image->text loss alone has: parts of a batch that add up, texts of no image. The rest: test_pairs.py."""

import pytest
import torch

from textlock.kernels.contrastive import contrastive_loss
from textlock.kernels.image_to_text import LARGEST_SCALE, even_chunk, image_to_text_loss

from .pairs import (
    ALL_MODES,
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
    some_duplicates,
    truth_of,
)

LOSS = LOSSES["image_to_text"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")
its_modes = pytest.mark.parametrize(
    "mode", [pytest.param(case.values[1], marks=case.marks) for case in ALL_MODES if case.values[0] is LOSS]
)


@pytest.mark.gpu
@its_modes
def test_texts_of_no_image_and_a_masked_one_among_them(mode):
    """Texts that no part of the batch owns are negatives, but for the one with the id of the image's own text."""
    image, text = make_rows(20, 47, 64)
    ids = torch.arange(47)
    ids[45] = 3
    kept = torch.arange(47) != 45
    whole = run(LOSS, mode, image, text, 30.0, ids=ids)
    for rows, texts in ((slice(3, 4), text[kept]), (slice(4, 5), text)):
        alone = truth_of(LOSS, image[rows], texts, 30.0, first_row=rows.start, batch=20)
        assert relative_error(whole["image"][rows], alone["image"]) <= 2**-8


def test_it_is_one_half_of_the_symmetric_loss():
    image, text = make_rows(17, 17, 24)
    halves = image_to_text_loss(image, text, 30.0) + image_to_text_loss(text, image, 30.0)
    torch.testing.assert_close(halves / 2, contrastive_loss(image, text, 30.0))


@pytest.mark.gpu
@its_modes
def test_micro_batches_and_ranks_add_up_to_the_batch(mode):
    """Uneven parts in any order, each gone backward before the next is looked at."""
    rows, ids = make_rows(61, 80, 64), some_duplicates(80)
    truth = truth_of(LOSS, *rows, ids=ids)
    parts = [slice(40, 61), slice(0, 1), slice(1, 33), slice(33, 40)]
    results = [run(LOSS, mode, rows[0][part], rows[1], first_row=part.start, batch=61, ids=ids) for part in parts]
    whole = {name: sum(result[name] for result in results) for name in ("loss", "logit_scale")}
    whole["image"] = torch.cat([results[index]["image"] for index in (1, 2, 3, 0)])
    assert_close(LOSS, mode, whole, truth, *rows, 50.0)


@pytest.mark.gpu
@needs_tiles
def test_scale_within_the_range_is_exact_and_beyond_it_loud():
    image, text = make_rows(16, 16, 64)
    image[0], image[1] = text[5], -text[9]  # the worst case: one pair of rows is parallel, another opposite
    scale = LARGEST_SCALE - 1
    truth = truth_of(LOSS, image, text, scale)
    assert_close(LOSS, "fused", run(LOSS, "fused", image, text, scale), truth, image, text, scale)
    assert all(value.isnan().any() for value in run(LOSS, "fused", image, text, 720.0).values())
    opposite = torch.full((2, 64), 0.125)
    assert run(LOSS, "fused", opposite, -opposite, 720.0)["loss"].isnan(), "all sums vanish, as if without a negative"
    dense = run(LOSS, "chunked", image, text, 2000.0, dtype=torch.float64, device="cpu")
    assert all(
        relative_error(dense[name], value) <= 1e-9 for name, value in truth_of(LOSS, image, text, 2000.0).items()
    )


@needs_tiles
@pytest.mark.skipif(DEVICE.type == "cuda", reason="reads the CPU allocator")
def test_fused_holds_a_chunk_in_two_bytes_and_only_for_a_gradient():
    b, B, chunk = 96, 328, 32

    def allocations(learnt):
        inputs = inputs_of(LOSS, *make_rows(b, B, 64), dtype=torch.float16, learnt=learnt)
        with in_chunks_of(chunk):
            loss = LOSS.function
            return profiled(lambda: loss(**inputs, mode="fused").backward() if learnt else loss(**inputs, mode="fused"))

    assert max(allocations(())[0]) < chunk * B
    held = allocations(("image",))[0]
    assert held.count(2 * chunk * B) == b // chunk
    assert max(held) == 4 * b * 64 < b * B, "nothing but the gradient is larger"


@pytest.mark.parametrize(
    ("b", "limit", "step", "rows"),
    [
        pytest.param(4096, 1024, 128, 1024, id="the limit fits"),
        pytest.param(4096, 1020, 128, 896, id="five of 896 rather than four of 896 and one of 512"),
        pytest.param(1024, 1020, 128, 512, id="two halves rather than 896 and 128"),
        pytest.param(5, 1024, 128, 128, id="less than a step"),
        pytest.param(512, 60, 128, 128, id="a limit below one step"),
        pytest.param(10, 4, 1, 4, id="single rows"),
    ],
)
def test_chunks_are_even(b, limit, step, rows):
    assert even_chunk(b, limit, step) == rows
