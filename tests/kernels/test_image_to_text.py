"""The image->text loss against dense float64 autograd, and any parts of the batch against the whole."""

from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from textlock.kernels import contrastive_tiles, pairs
from textlock.kernels.contrastive import contrastive_loss
from textlock.kernels.image_to_text import (
    LARGEST_SCALE,
    ROWS_PER_TILE,
    _one_visit,
    even_chunk,
    image_to_text_loss,
    one_visit,
    reference,
)
from textlock.kernels.tiles import INTERPRETED_SHAPE, runs_tiles
from textlock.tests.kernels.rounding import rounding_bounds, softmax_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("loss", "image_grad", "scale_grad")
SCALES = (1.0, 14.3, 50.0, 100.0, 300.0)
needs_tiles = pytest.mark.skipif(
    not runs_tiles(torch.empty(1, device=DEVICE)),
    reason="the kernels need compute capability 9.0, or TRITON_INTERPRET=1 on a CPU",
)
MODES = ["chunked", pytest.param("fused", marks=needs_tiles)]
chunked, fused = partial(one_visit, fused=False), partial(one_visit, fused=True)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_rows(b, B, d, first_row=0, signal=0.1, seed=0):
    """Draw unit float64 rows; image i is noise with a share of its text, so that hard negatives remain at any scale."""
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(B, d, dtype=torch.float64, generator=generator))
    noise = F.normalize(torch.randn(b, d, dtype=torch.float64, generator=generator))
    return F.normalize(noise + signal * text[first_row : first_row + b]), text


def nearly_sure_rows():
    """Draw rows whose loss is near 1e-6 at a scale of 100: their texts crowd around one direction."""
    axes = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(1))).Q
    text = F.normalize(axes[:64] + 2.1 * axes[64])
    return F.normalize(text + 0.003 * axes.roll(1, 0)[:64]).half().float(), text.half().float()


def run(loss_fn, image, text, scale, dtype=torch.float64, **options):
    """Return the loss and its gradients of one evaluation, as float64 on the CPU."""
    device = torch.device("cpu") if dtype == torch.float64 else DEVICE
    image = image.to(device, dtype, copy=True).requires_grad_()
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(scale, dtype=scalar, device=device, requires_grad=True)
    if options.get("ids") is not None:
        options["ids"] = options["ids"].to(device)
    loss = loss_fn(image, text.to(device, dtype), scale, **options)
    loss.backward()
    assert image.grad.dtype == dtype and scale.grad.dtype == scalar
    return {
        name: value.double().cpu() for name, value in zip(NAMES, (loss.detach(), image.grad, scale.grad), strict=True)
    }


def relative_error(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


def assert_close(result, truth, *bounds, rounding=None):
    """Hold each error to a bound relative to the truth, and what rounding in float32 may add to it."""
    for name, bound in zip(NAMES, bounds, strict=True):
        error = (result[name] - truth[name]).norm()
        allowed = bound * truth[name].norm() + (rounding[name] if rounding else 0)
        assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"


def rounding_of(image, text, scale, first_row=0, ids=None):
    weights = softmax_weights(image, text, scale, first_row, ids, both_directions=False)
    return rounding_bounds(image, text, scale, weights)


def some_duplicates(B):
    return (torch.arange(B) % max(1, 2 * B // 3)) << 33  # they differ in the high half alone


# A second spelling of the loss, image by image, so that `reference` itself is not the only witness.
def loss_by_definition(image, text, scale, first_row=0, ids=None, batch=None):
    total = 0.0
    for i in range(len(image)):
        t = first_row + i
        texts = [j for j in range(len(text)) if j == t or ids is None or ids[j] != ids[t]]
        logits = torch.stack([scale * image[i].dot(text[j]) for j in texts])
        total = total - (logits[texts.index(t)].exp() / logits.exp().sum()).log()
    return total / (len(image) if batch is None else batch)


@pytest.mark.parametrize("batch", [None, 8])
@pytest.mark.parametrize("with_ids", [False, True], ids=["distinct", "duplicates"])
def test_reference_equals_the_definition(with_ids, batch):
    image, text = make_rows(5, 9, 8, first_row=3)
    ids = torch.tensor([0, 1, 2, 1, 4, 4, 4, 2, 0]) if with_ids else None
    options = {"first_row": 3, "ids": ids, "batch": batch}
    expected = run(loss_by_definition, image, text, 7.0, **options)
    result = run(partial(image_to_text_loss, mode="reference"), image, text, 7.0, **options)
    for name in NAMES:
        torch.testing.assert_close(result[name], expected[name])


@pytest.mark.gpu
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("b", "B", "d", "first_row", "rows_per_chunk"),
    [
        pytest.param(1, 2, 8, 1, 1, id="one image of two"),
        pytest.param(7, 13, 8, 3, 2, id="7x13 narrow, offset, chunks of 2"),
        pytest.param(64, 64, 96, 0, 64, id="64x64 in one chunk"),
        pytest.param(33, 129, 384, 96, 10, id="33x129 at the end, chunks of 10"),
    ],
)
def test_chunked_float32_matches_float64_truth(b, B, d, first_row, rows_per_chunk, scale, duplicates):
    image, text = (rows.float() for rows in make_rows(b, B, d, first_row))
    options = {"first_row": first_row, "ids": some_duplicates(B) if duplicates and B > 2 else None}
    truth = run(reference, image, text, scale, **options)
    result = run(chunked, image, text, scale, torch.float32, rows_per_chunk=rows_per_chunk, **options)
    assert_close(result, truth, 0, 0, 0, rounding=rounding_of(image, text, scale, **options))


TILE_SHAPES = [
    pytest.param(1, 40, 64, 39, 1, False, id="one image, last text"),
    pytest.param(40, 71, 72, 11, 32, True, id="40x71 ragged in all three, a ragged chunk, duplicates"),
    pytest.param(64, 64, 64, 0, 64, True, id="64x64 whole tiles, duplicates"),
    pytest.param(61, 98, 96, 37, 40, False, id="61x98 at the end, chunks of 40"),
    pytest.param(33, 65, 200, 2, 64, False, id="33x65 wide, chunk larger than the rows"),
    pytest.param(70, 70, 64, 0, 70, False, id="70x70, more blocks of rows than a launch takes"),
]


@pytest.mark.gpu
@needs_tiles
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("b", "B", "d", "first_row", "rows_per_chunk", "duplicates"), TILE_SHAPES)
def test_fused_matches_float64_truth_of_rounded_rows(b, B, d, first_row, rows_per_chunk, duplicates, scale):
    """Rows that float16 holds exactly: what is left is the kernels' own arithmetic."""
    image, text = (rows.half().float() for rows in make_rows(b, B, d, first_row))
    options = {"first_row": first_row, "ids": some_duplicates(B) if duplicates else None}
    truth = run(reference, image, text, scale, **options)
    result = run(fused, image, text, scale, torch.float32, rows_per_chunk=rows_per_chunk, **options)
    # A stored weight is right to 2^-9, a sum of several to less; with one image a single weight can be all there is.
    assert_close(result, truth, 0, 2**-9 if b == 1 else 1e-3, 5e-3, rounding=rounding_of(image, text, scale, **options))


@pytest.mark.gpu
@needs_tiles
def test_fused_loses_what_float16_operands_lose():
    """Each logit of a negative moves by 2e-3, so the loss of 64 images by less than 1e-4 of itself."""
    image, text = (rows.float() for rows in make_rows(64, 64, 768))
    truth = run(reference, image, text, 100.0)
    assert_close(run(fused, image, text, 100.0, torch.float32, rows_per_chunk=64), truth, 1e-4, 1e-3, 1e-3)


@pytest.mark.gpu
@pytest.mark.memcheck
@needs_tiles
def test_tiles_of_the_size_that_a_gpu_runs(monkeypatch):
    """Their sides differ, unlike the interpreter's: [128, 128] in pass 1, [128, 256] in steps of 64 in pass 2."""
    monkeypatch.setattr(contrastive_tiles, "INTERPRETED", False)
    shapes = [contrastive_tiles.sums_shape(store=True, has_ids=True, peaks=False), contrastive_tiles.product_shape()]
    assert all(shape != INTERPRETED_SHAPE and shape.block_m == ROWS_PER_TILE for shape in shapes)
    image, text = (rows.half().float() for rows in make_rows(140, 330, 136, 150))
    options = {"first_row": 150, "ids": torch.arange(330) % 290}
    truth = run(reference, image, text, 50.0, **options)
    result = run(fused, image, text, 50.0, torch.float32, rows_per_chunk=128, **options)
    assert_close(result, truth, 0, 1e-3, 1e-3, rounding=rounding_of(image, text, 50.0, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_sure_model_keeps_its_gradient(mode):
    """At P_ii = 1 - 1e-6 a float32 softmax minus one would have lost six of its seven digits."""
    image, text = nearly_sure_rows()
    truth = run(reference, image, text, 100.0)
    assert 1e-7 < truth["loss"] < 1e-5
    result = run(partial(image_to_text_loss, mode=mode), image, text, 100.0, torch.float32)
    assert_close(result, truth, 0, 1e-3, 1e-3, rounding=rounding_of(image, text, 100.0))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rows_give_log_of_the_texts_and_no_gradient(mode, scale):
    rows = torch.full((40, 64), 0.125)
    result = run(partial(image_to_text_loss, mode=mode), rows, rows, scale, torch.float32)
    exact = torch.tensor(40.0).double().log()
    torch.testing.assert_close(result["loss"], exact, rtol=0, atol=rounding_of(rows, rows, scale)["loss"])
    pull = scale / 40  # of the matching text alone; every weight against it is rounded in the same direction
    assert result["image_grad"].norm(dim=1).max() <= 2**-9 * pull
    assert result["scale_grad"].abs() <= 2**-9


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reference", *MODES])
def test_no_negative_at_all(mode):
    image, text = (rows.float() for rows in make_rows(36, 40, 64, 2))
    loss = partial(image_to_text_loss, mode=mode)
    one_caption = run(loss, image, text, 20.0, torch.float32, first_row=2, ids=torch.full((40,), -7))
    one_pair = run(loss, image[:1], text[:1], 20.0, torch.float32)
    for result in (one_caption, one_pair):
        assert all(result[name].count_nonzero() == 0 for name in NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reference", *MODES])
def test_rows_of_no_image_and_a_masked_one_among_them(mode):
    """Text rows that no part of the batch owns are negatives, but for the one with the id of the image's own text."""
    image, text = (rows.half().float() for rows in make_rows(20, 47, 64))
    loss = partial(image_to_text_loss, mode=mode)
    ids = torch.arange(47)
    ids[45] = 3
    kept = torch.arange(47) != 45
    whole = run(loss, image, text, 30.0, torch.float32, ids=ids)
    for rows, texts in ((slice(3, 4), text[kept]), (slice(4, 5), text)):
        alone = run(loss, image[rows], texts, 30.0, torch.float32, first_row=rows.start, batch=20)
        assert relative_error(whole["image_grad"][rows], alone["image_grad"]) <= 1e-3
    assert relative_error(whole["loss"], run(reference, image, text, 30.0, ids=ids)["loss"]) <= 1e-5


def test_it_is_one_half_of_the_symmetric_loss():
    image, text = make_rows(17, 17, 24)
    scale = torch.tensor(30.0).double()
    halves = image_to_text_loss(image, text, scale) + image_to_text_loss(text, image, scale)
    torch.testing.assert_close(halves / 2, contrastive_loss(image, text, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_and_ranks_add_up_to_the_batch(mode):
    """Uneven parts in any order, each gone backward before the next is looked at."""
    image, text = make_rows(61, 80, 64)
    dtype = torch.float64 if mode == "chunked" else torch.float32
    loss = partial(image_to_text_loss, mode=mode, ids=some_duplicates(80).to(DEVICE if mode == "fused" else "cpu"))
    whole = run(loss, image, text, 50.0, dtype, batch=61)
    parts = [slice(40, 61), slice(0, 1), slice(1, 33), slice(33, 40)]
    results = [run(loss, image[part], text, 50.0, dtype, first_row=part.start, batch=61) for part in parts]
    bound = 1e-12 if mode == "chunked" else 1e-3
    for name in ("loss", "scale_grad"):
        assert relative_error(sum(result[name] for result in results), whole[name]) <= bound, name
    for part, result in zip(parts, results, strict=True):
        assert relative_error(result["image_grad"], whole["image_grad"][part]) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_half_width_rows_lose_only_their_own_rounding(mode, dtype):
    image, text = (rows.to(dtype) for rows in make_rows(33, 70, 96, 5))
    truth = run(reference, image, text, 50.0, first_row=5)
    result = run(partial(image_to_text_loss, mode=mode), image, text, 50.0, dtype, first_row=5)
    rounding = rounding_of(image, text, 50.0, 5)
    assert_close(result, truth, 0, max(1e-3, torch.finfo(dtype).eps), 1e-3, rounding=rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_text_of_another_dtype_and_rows_that_are_not_contiguous(mode):
    image, text = (rows.half().float().to(DEVICE) for rows in make_rows(20, 30, 64, 4))
    scale = torch.tensor(30.0, device=DEVICE)
    results = []
    for rows, columns in (
        (image, text.half()),
        (image.T.contiguous().T, text.half().repeat_interleave(2, 0)[::2]),
    ):
        rows = rows.detach().requires_grad_()
        loss = image_to_text_loss(rows, columns, scale, first_row=4, mode=mode)
        loss.backward()
        results.append((loss, rows.grad))
    assert results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.gpu
@needs_tiles
def test_scale_within_the_range_is_exact_and_beyond_it_loud():
    image, text = (rows.float() for rows in make_rows(16, 16, 64))
    image[0], image[1] = text[5], -text[9]  # the worst case: one pair of rows is parallel, another opposite
    image, text = image.half().float(), text.half().float()
    loss = partial(image_to_text_loss, mode="fused")
    truth = run(reference, image, text, LARGEST_SCALE - 1)
    rounding = rounding_of(image, text, LARGEST_SCALE - 1)
    assert_close(run(loss, image, text, LARGEST_SCALE - 1, torch.float32), truth, 0, 1e-3, 1e-3, rounding=rounding)
    assert all(run(loss, image, text, 720.0, torch.float32)[name].isnan().any() for name in NAMES)
    opposite = run(loss, torch.full((2, 64), 0.125), -torch.full((2, 64), 0.125), 720.0, torch.float32)
    assert opposite["loss"].isnan(), "all sums vanish here, as if there were no negative"
    dense = partial(image_to_text_loss, mode="chunked")
    assert_close(run(dense, image, text, 2000.0), run(reference, image, text, 2000.0), 1e-12, 1e-9, 1e-9)


@pytest.mark.parametrize("loss_fn", [reference, partial(chunked, rows_per_chunk=4)], ids=["reference", "chunked"])
@pytest.mark.parametrize(("b", "B", "first_row"), [(6, 6, 0), (5, 9, 2)], ids=["square", "offset"])
def test_gradcheck(loss_fn, b, B, first_row):
    image, text = make_rows(b, B, 8, first_row)
    scale = torch.tensor(9.0).double().requires_grad_()
    options = {"first_row": first_row, "ids": torch.arange(B) % (B - 2), "batch": 7}
    assert torch.autograd.gradcheck(lambda i, s: loss_fn(i, text, s, **options), (image.requires_grad_(), scale))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_give_the_same_bits(mode):
    image, text = make_rows(61, 130, 96, 7)
    loss_fn = partial(one_visit, fused=mode == "fused", rows_per_chunk=32)
    first, second = (run(loss_fn, image, text, 50.0, torch.float32, first_row=7) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def test_auto_is_chunked_on_a_cpu_and_fused_differs():
    image, text = (rows.float() for rows in make_rows(20, 30, 64))
    loss = partial(image_to_text_loss, image, text, torch.tensor(50.0))
    assert torch.equal(loss(), loss(mode="chunked"))
    if runs_tiles(image):
        assert not torch.equal(loss(), loss(mode="fused"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reference", *MODES])
def test_autocast_changes_nothing(mode):
    image, text = (rows.float().to(DEVICE) for rows in make_rows(20, 30, 64))
    loss = partial(image_to_text_loss, image, text, torch.tensor(50.0).to(DEVICE), mode=mode)
    plain = loss()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(loss(), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", ["image", "scale"])
def test_gradient_of_one_input_alone(mode, wanted):
    image, text = (rows.half() for rows in make_rows(30, 40, 64))
    name = f"{wanted}_grad"
    truth = run(reference, image, text, 11.0)[name]
    allowed = rounding_of(image, text, 11.0)[name] + (5e-3 * truth.norm() if mode == "fused" else 0)
    image, text, scale = (x.float().to(DEVICE) for x in (image, text, torch.tensor(11.0)))
    leaf = (image if wanted == "image" else scale).requires_grad_()
    (3 * image_to_text_loss(image, text, scale, mode=mode)).backward()
    assert (leaf.grad.double().cpu() - 3 * truth).norm() <= 3 * allowed


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(mode):
    image, text = (rows.float().to(DEVICE) for rows in make_rows(4, 4, 64))
    image.requires_grad_()
    scale = torch.tensor(5.0, device=DEVICE)
    (grad,) = torch.autograd.grad(image_to_text_loss(image, text, scale, mode="reference"), image, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), image)[0].count_nonzero()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(image_to_text_loss(image, text, scale, mode=mode), image, create_graph=True)


def profiled(function):
    """Return the bytes of a call's allocations, the most that are alive at once, and its number of matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    peak = max(accumulate(changes))
    return [n for n in changes if n > 0], peak, sum(event.name() == "aten::mm" for event in events)


def test_chunked_never_holds_the_logits():
    b = B = 1024
    image, text = (rows.float() for rows in make_rows(b, B, 32))
    image.requires_grad_()
    scale, ids = torch.tensor(50.0, requires_grad=True), torch.arange(B)
    _, peak, products = profiled(lambda: chunked(image, text, scale, ids=ids, rows_per_chunk=128).backward())
    # Beside the chunk: the gradient and its product with the upstream gradient, rows of a chunk, and [b] vectors.
    assert peak <= 128 * B * (4 + 1) + 3 * image.nbytes < b * B * 4 / 2
    assert products == 2 * b // 128
    dense = profiled(lambda: reference(image, text, scale, ids=ids).backward())[1]
    assert dense > b * B * 4, "the measure must see dense logits"


@needs_tiles
@pytest.mark.skipif(DEVICE.type == "cuda", reason="reads the CPU allocator")
def test_fused_holds_a_chunk_in_two_bytes_and_only_for_a_gradient():
    b, B, chunk = 96, 328, 32
    image, text = (rows.half() for rows in make_rows(b, B, 64))
    loss = partial(fused, image, text, torch.tensor(50.0), rows_per_chunk=chunk)
    assert max(profiled(loss)[0]) < chunk * B
    image.requires_grad_()
    allocations = profiled(lambda: loss().backward())[0]
    assert allocations.count(2 * chunk * B) == b // chunk
    assert max(allocations) == 4 * image.numel() < b * B, "nothing but the gradient is larger"


def test_evaluation_without_grad_takes_one_pass():
    image, text = make_rows(20, 20, 8)
    image.requires_grad_()
    with torch.no_grad():
        assert profiled(lambda: image_to_text_loss(image, text, torch.tensor(5.0)))[2] == 1


@pytest.mark.gpu
@needs_tiles
def test_fused_evaluation_without_grad_is_the_same_loss():
    image, text = make_rows(40, 70, 72, 11)
    image, text, scale = (x.float().to(DEVICE) for x in (image, text, torch.tensor(50.0)))
    loss = partial(fused, first_row=11, rows_per_chunk=32)
    plain = loss(image, text, scale)
    assert torch.equal(loss(image.requires_grad_(), text, scale), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole_and_equals_eager(mode):
    image, text = (rows.float().to(DEVICE) for rows in make_rows(10, 17, 64, 4))
    ids = (torch.arange(17) % 11).to(DEVICE)
    results = []
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    for function in (image_to_text_loss, torch.compile(image_to_text_loss, fullgraph=True, backend="aot_eager")):
        rows, scale = image.clone().requires_grad_(), torch.tensor(30.0, device=DEVICE, requires_grad=True)
        loss = function(rows, text, scale, first_row=4, ids=ids, batch=16, mode=mode)
        loss.backward()
        results.append((loss, rows.grad, scale.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_operator_is_registered_consistently(mode, with_grad):
    image, text, scale = (x.float().to(DEVICE) for x in (*make_rows(5, 8, 64), torch.tensor(5.0)))
    inputs = (image.requires_grad_(with_grad), text, scale.requires_grad_(with_grad))
    torch.library.opcheck(_one_visit, (*inputs, None, 2, 5, 3, mode == "fused", with_grad))


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


ONE = torch.tensor(1.0)
BAD_INPUTS = {
    "widths differ": ({"text": torch.ones(6, 7)}, "image must be .* one d"),
    "no rows": ({"image": torch.ones(0, 8)}, "b > 0"),
    "integer rows": ({"image": torch.ones(4, 8, dtype=torch.int64)}, "image must be floating point"),
    "scale is a vector": ({"logit_scale": torch.ones(1)}, "logit_scale must be a 0-dim tensor"),
    "first_row too large": ({"first_row": 3}, "image rows 3:7 must lie inside the 6 text rows"),
    "ids too short": ({"ids": torch.arange(4)}, r"ids must be int64 \[6\]"),
    "unknown mode": ({"mode": "store"}, "choose one of auto, reference, chunked, fused"),
    "trained text": ({"text": torch.ones(6, 8, requires_grad=True)}, r"pass text\.detach\(\)"),
    "batch below the rows": ({"batch": 3}, "batch is 3, but there are 4 image and 6 text rows"),
    "batch above the texts": ({"batch": 7}, "batch is 7, but"),
    "another device": ({"text": torch.ones(6, 8, device="meta")}, "text is on meta"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_one_clear_error(change, message):
    arguments = {"image": torch.ones(4, 8), "text": torch.ones(6, 8), "logit_scale": ONE} | change
    with pytest.raises(ValueError, match=message):
        image_to_text_loss(**arguments)


@pytest.mark.parametrize(
    ("d", "dtype", "runs", "message"),
    [
        (56, torch.float32, True, "rows of width 56"),
        (64, torch.float64, True, "float64 rows"),
        (64, torch.float32, False, r"rows on cpu .* capability 9\.0 .* use mode='chunked'"),
    ],
)
def test_fused_refuses_what_it_cannot_take(d, dtype, runs, message, monkeypatch):
    rows = torch.ones(4, d, dtype=dtype)
    monkeypatch.setattr(pairs, "runs_tiles", lambda rows: runs)
    with pytest.raises(ValueError, match=message):
        image_to_text_loss(rows, rows, ONE, mode="fused")
