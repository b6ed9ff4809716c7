"""The loss by tiles (`store` and `recompute`) against dense float64 autograd, in Triton's interpreter or on a GPU.

The interpreter's tiles are 32 × 32 × 32, so small inputs have several of them, ragged ones included.
"""

import math
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from textlock.kernels import contrastive, contrastive_tiles, pairs, tiles
from textlock.kernels.contrastive import STATS, contrastive_loss
from textlock.kernels.contrastive_tiles import STORED_RANGE
from textlock.kernels.gather import GatherProgress

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES = ("store", "recompute")
SCALES = (1.0, 14.3, 50.0, 100.0, 300.0)

pytestmark = [
    pytest.mark.skipif(
        not tiles.runs_tiles(torch.empty(0, device=DEVICE)),
        reason="the kernels need a GPU of compute capability 9.0 or later, or TRITON_INTERPRET=1",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]


def make_rows(b, B, d, first_row=0, signal=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(B, d, dtype=torch.float64, generator=generator))
    noise = F.normalize(torch.randn(b, d, dtype=torch.float64, generator=generator))
    image = F.normalize(noise + signal * text[first_row : first_row + b])
    return image.float().to(DEVICE), text.float().to(DEVICE)


def as_float16(*rows):
    """Round rows to float16, the arithmetic of the tiles, and give them back as float32."""
    return tuple(row.half().float() for row in rows)


def run(mode, image, text, scale, *, text_grad=False, dtype=torch.float32, **options):
    image = image.to(dtype, copy=True).requires_grad_()
    text = text.to(dtype, copy=True).requires_grad_(text_grad)
    scale = torch.tensor(scale, dtype=dtype, device=image.device, requires_grad=True)
    loss, stats = contrastive_loss(image, text, scale, mode=mode, return_stats=True, **options)
    loss.backward()
    result = {"loss": loss.detach(), "image_grad": image.grad, "scale_grad": scale.grad}
    if text_grad:
        result["text_grad"] = text.grad
    return result | {"stats": torch.stack([stats[name] for name in STATS])}


def truth_of(image, text, scale, **options):
    return run("reference", image, text, scale, dtype=torch.float64, **options)


def relative_error(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


BOUNDS = {"loss": 1e-5, "image_grad": 1e-3, "text_grad": 1e-3, "scale_grad": 5e-3}


def assert_close(result, truth, **bounds):
    for name, bound in (BOUNDS | bounds).items():
        if name in result:
            error = relative_error(result[name], truth[name])
            assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.0e}"


SHAPES = [
    pytest.param(1, 40, 64, 3, False, id="one image among 40 texts"),
    pytest.param(33, 129, 72, 96, False, id="33x129 at the end, width 72"),
    pytest.param(33, 70, 72, 20, True, id="33x70 with duplicates"),
    pytest.param(70, 70, 136, 0, False, id="70x70, width 136"),
    pytest.param(64, 64, 64, 0, True, id="64x64 whole tiles with duplicates"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("b", "B", "d", "first_row", "duplicates"), SHAPES)
def test_float16_rows_match_float64_truth(b, B, d, first_row, duplicates, scale, mode):
    image, text = as_float16(*make_rows(b, B, d, first_row))
    options = {"first_row": first_row, "ids": torch.arange(B, device=DEVICE) % (2 * B // 3) if duplicates else None}
    truth = truth_of(image, text, scale, **options)
    result = run(mode, image, text, scale, **options)
    # A stored weight is right to 2^-9, a sum of several to less; with one image a single weight can be all there is.
    assert_close(result, truth, image_grad=2**-9 if (mode, b) == ("store", 1) else 1e-3)
    torch.testing.assert_close(result["stats"], truth["stats"], rtol=1e-6, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [14.3, 300.0])
@pytest.mark.parametrize(("b", "B", "d", "first_row", "duplicates"), SHAPES)
def test_trained_text_takes_its_gradient(b, B, d, first_row, duplicates, scale, mode):
    image, text = as_float16(*make_rows(b, B, d, first_row))
    options = {"first_row": first_row, "ids": torch.arange(B, device=DEVICE) % (2 * B // 3) if duplicates else None}
    truth = truth_of(image, text, scale, text_grad=True, **options)
    assert_close(run(mode, image, text, scale, text_grad=True, **options), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_float32_rows_lose_what_float16_operands_lose(scale, mode):
    """Each logit of a negative moves by scale · 2e-5, so the loss of 96 pairs by less than 1e-4 of itself."""
    image, text = make_rows(96, 96, 768)
    assert_close(run(mode, image, text, scale), truth_of(image, text, scale), loss=1e-4)


@pytest.mark.gpu
@pytest.mark.memcheck
@pytest.mark.parametrize("text_grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mode", MODES)
def test_tiles_of_the_size_that_a_gpu_runs(mode, text_grad, monkeypatch):
    """Their sides differ, unlike the interpreter's: [128, 128] in pass 1, [128, 256] in steps of 64 in pass 2."""
    monkeypatch.setattr(contrastive_tiles, "INTERPRETED", False)
    assert contrastive_tiles.product_shape() != tiles.INTERPRETED_SHAPE
    image, text = as_float16(*make_rows(140, 330, 136, 150))
    options = {"first_row": 150, "ids": torch.arange(330, device=DEVICE) % 290, "text_grad": text_grad}
    assert_close(run(mode, image, text, 50.0, **options), truth_of(image, text, 50.0, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_half_width_rows(dtype, mode):
    image, text = (rows.to(dtype) for rows in make_rows(40, 50, 64, 7))
    truth = truth_of(image, text, 50.0, first_row=7)
    rows, scale = image.clone().requires_grad_(), torch.tensor(50.0, device=DEVICE)
    loss = contrastive_loss(rows, text, scale, first_row=7, mode=mode)
    loss.backward()
    assert rows.grad.dtype == dtype
    result = {"loss": loss.detach(), "image_grad": rows.grad}
    assert_close(result, truth, image_grad=max(1e-3, torch.finfo(dtype).eps))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_nearly_sure_model_keeps_its_gradient(mode):
    axes = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(1))).Q.to(DEVICE)
    text = F.normalize(axes[:64] + 2.1 * axes[64])
    image = F.normalize(text + 0.003 * axes.roll(1, 0)[:64])
    image, text = as_float16(image, text)
    truth = truth_of(image, text, 100.0)
    assert 1e-7 < truth["loss"] < 1e-5
    assert_close(run(mode, image, text, 100.0), truth, loss=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rows_give_log_of_the_batch_and_no_gradient(scale, mode):
    rows = torch.full((40, 64), 0.125, device=DEVICE)
    result = run(mode, rows, rows, scale)
    torch.testing.assert_close(result["loss"].item(), math.log(40), rtol=1e-5, atol=0)
    pull = scale / 40  # of the matching pair alone; every weight against it is rounded in the same direction
    assert result["image_grad"].norm(dim=1).max() <= 2**-9 * pull
    assert result["stats"][0] == result["stats"][1] == 0, "a tie is a miss"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_no_negative_at_all(mode):
    image, text = as_float16(*make_rows(36, 40, 64, 2))
    one_caption = run(mode, image, text, 20.0, first_row=2, ids=torch.full((40,), -7, device=DEVICE))
    assert one_caption["loss"] == 0
    assert one_caption["image_grad"].count_nonzero() == 0
    assert one_caption["stats"][3] == 36 * 39
    one_pair = run(mode, image[:1], text[:1], 20.0)
    assert one_pair["loss"] == 0 and one_pair["image_grad"].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("text_grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_give_the_same_bits(mode, text_grad):
    image, text = make_rows(61, 130, 96, 7)
    first, second = (run(mode, image, text, 50.0, first_row=7, text_grad=text_grad) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def spread_apart(n=64, d=96):
    """Rows around one direction, but the last text is against it: its cosines lie 0.6 below all others."""
    image, text = make_rows(n, n, d)
    direction = torch.full((d,), d**-0.5, device=DEVICE)
    image, text = F.normalize(0.6 * direction + image), F.normalize(0.8 * direction + text)
    text[-1] = -text[-1]
    return as_float16(image, text)


@pytest.mark.gpu
def test_column_far_below_its_tile_is_summed_again():
    image, text = spread_apart()
    for scale in (50.0, 300.0):
        exact = (scale * image.double() @ text.double().T).exp()
        exact.fill_diagonal_(0)
        gap = (exact.amax(0).amax() / exact.amax(0)[-1]).log2()
        assert (gap > 150) == (scale == 300), "beyond the range of float32 at the second scale only"
        arguments = (image.half(), text.half(), torch.tensor(scale, device=DEVICE), None, 0)
        sums = contrastive_tiles.sum_exponentials(*arguments, store=False, peaks=False)
        assert relative_error(sums.rows.log(), exact.sum(1).log()) < 1e-6
        torch.testing.assert_close(sums.columns, exact.sum(0), rtol=1e-3, atol=0)
    assert_close(run("recompute", image, text, 300.0), truth_of(image, text, 300.0))


@pytest.mark.gpu
def test_stored_exponentials_are_right_in_all_of_their_range():
    """Far below 2^-126 of the highest of their row, the least that an exp2 of float32 can give."""
    image, text = spread_apart()
    arguments = (image.half(), text.half(), torch.tensor(300.0, device=DEVICE), None, 0)
    stored = contrastive_tiles.sum_exponentials(*arguments, store=True, peaks=False).stored
    logits = 300.0 / math.log(2) * image.double() @ text.double().T
    below = logits - stored.offsets[:, : len(image)].double().repeat_interleave(stored.block_n, 0)[: len(text)].T
    found = (stored.exponentials[:, : len(text)].int() & 0xFFFF) << 15
    # Eight bits of mantissa, and cosines in float32 times 433.
    right = (found.view(torch.float32) / (below + contrastive_tiles.HEADROOM).exp2() - 1).abs() < 2**-8
    counted = (below > -125 - contrastive_tiles.HEADROOM) & ~torch.eye(len(image), dtype=torch.bool, device=DEVICE)
    assert below[counted].min() < -160
    assert right[counted].all()


@pytest.mark.gpu
def test_store_is_nan_rather_than_wrong_beyond_its_range():
    image, text = spread_apart()
    cosines = image.double() @ text.double().T

    def gap(scale):
        """Return by how much the highest row maximum exceeds the lowest normaliser of a column, in units of log2."""
        logits = scale * cosines
        lowest = logits.logsumexp(0).amin()
        return (logits.fill_diagonal_(-torch.inf).amax() - lowest) / math.log(2)

    inside, beyond = (
        min(range(50, 400), key=lambda scale: abs(gap(scale) - wanted)) for wanted in (STORED_RANGE - 4, 160.0)
    )
    assert STORED_RANGE - 8 < gap(inside) < STORED_RANGE < 150 < gap(beyond) < 170
    assert_close(run("store", image, text, float(inside)), truth_of(image, text, float(inside)))
    truth = truth_of(image, text, float(beyond))
    for text_grad in (False, True):
        result = run("store", image, text, float(beyond), text_grad=text_grad)
        assert_close({"loss": result["loss"]}, truth)
        assert result["image_grad"].isnan().all()
    assert_close(run("recompute", image, text, float(beyond)), truth)


@pytest.mark.gpu
def test_scale_beyond_the_documented_range_is_loud():
    image, text = make_rows(33, 33, 64)
    image[3] = text[9]
    for mode in MODES:
        assert not run(mode, image, text, 720.0)["loss"].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["image", "text", "scale", "nothing"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_one_input_alone(mode, wanted):
    image, text = as_float16(*make_rows(40, 50, 64, 3))
    truth = truth_of(image, text, 11.0, first_row=3, text_grad=True)
    inputs = {"image": image, "text": text, "scale": torch.tensor(11.0, device=DEVICE)}
    if wanted == "nothing":
        loss = contrastive_loss(*inputs.values(), first_row=3, mode=mode)
        assert not loss.requires_grad
        assert_close({"loss": loss}, truth)
        return
    inputs[wanted] = inputs[wanted].clone().requires_grad_()
    (3 * contrastive_loss(*inputs.values(), first_row=3, mode=mode)).backward()
    assert_close({f"{wanted}_grad": inputs[wanted].grad / 3}, truth)


@pytest.mark.gpu
def test_recompute_in_chunks_equals_recompute_at_once():
    image, text = make_rows(70, 90, 64, 5)
    options = {"first_row": 5, "ids": torch.arange(90, device=DEVICE) % 50, "text_grad": True}
    whole = run("recompute", image, text, 30.0, **options)
    with mock.patch.object(contrastive, "rows_per_chunk", lambda *_: 32):
        parts = run("recompute", image, text, 30.0, **options)
    for name in whole:
        assert relative_error(parts[name], whole[name]) <= 1e-5, name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="reads the CPU allocator")
@pytest.mark.parametrize(("mode", "share"), [("recompute", 0.25), ("store", 0.75)])
def test_peak_memory(mode, share):
    """`recompute` never holds the logits, in no width; `store` holds them in two bytes."""
    b, d = 384, 64
    image, text = (rows.half() for rows in make_rows(b, b, d))
    scale = torch.tensor(50.0, requires_grad=True)
    image.requires_grad_()
    with (
        mock.patch.object(contrastive, "rows_per_chunk", lambda *_: 64),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        contrastive_loss(image, text, scale, mode=mode).backward()
    alive = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    rows_in_float32 = 4 * b * d
    assert peak <= share * 4 * b * b + 6 * rows_in_float32
    assert mode == "recompute" or peak >= 2 * b * b, "the measure must see what is stored"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole_and_equals_eager(mode):
    image, text = make_rows(33, 40, 64, 4)
    ids = torch.arange(40, device=DEVICE) % 30
    results = []
    for function in (contrastive_loss, torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")):
        rows, columns = image.clone().requires_grad_(), text.clone().requires_grad_()
        scale = torch.tensor(30.0, device=DEVICE, requires_grad=True)
        loss, stats = function(rows, columns, scale, first_row=4, ids=ids, mode=mode, return_stats=True)
        loss.backward()
        results.append((loss, rows.grad, columns.grad, scale.grad, *(stats[name] for name in STATS)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("wants", [[True, False, True], [True, True, True], [False, False, False]])
def test_operator_is_registered_consistently(wants):
    image, text = make_rows(5, 8, 64)
    inputs = [
        tensor.requires_grad_(wanted)
        for tensor, wanted in zip((image, text, torch.tensor(5.0, device=DEVICE)), wants, strict=True)
    ]
    torch.library.opcheck(contrastive._contrastive, (*inputs, None, 2, None, 0, "store", 1, wants, True, None, []))


@pytest.mark.gpu
@pytest.mark.parametrize("bank", [0, 13, 45])
def test_text_rows_may_arrive_while_the_first_pass_runs(bank):
    """Blocks of other ranks come late and in any order; what has not come is nan. A bank behind them is there."""
    per_rank, per_block, world, rank = 40, 16, 3, 1
    image, text = (rows.half() for rows in make_rows(per_rank, per_rank * world + bank, 64, rank * per_rank))
    scale, first_row = torch.tensor(20.0, device=DEVICE), rank * per_rank
    expected = contrastive_loss(image, text, scale, first_row=first_row, mode="recompute")

    blocks = -(-per_rank // per_block)
    flags = torch.zeros(world * blocks, dtype=torch.int32, device=DEVICE)
    arriving = text.clone()
    # On a GPU the sender must not queue behind the kernel that waits for it.
    sending = torch.cuda.Stream(priority=-1) if DEVICE.type == "cuda" else None

    def deliver(step, pause):
        with torch.cuda.stream(sending):
            for block in (3, 4, 2, 6, 5, 1, 0, 8, 7):  # every tile would be early, were it not to wait
                owner, part = divmod(block, blocks)
                first = owner * per_rank + part * per_block
                rows = slice(first, min(first + per_block, (owner + 1) * per_rank))
                threading.Event().wait(pause)
                arriving[rows] = text[rows]
                flags[block] = step

    def loss_at(step):
        progress = GatherProgress(flags, step, per_rank, per_block)
        return contrastive_loss(image, arriving, scale, first_row=first_row, mode="recompute", progress=progress)

    # Once with all rows there: kernels are compiled, and loaded by CUDA, which may wait for one that spins.
    deliver(7, pause=0)
    assert torch.equal(loss_at(7), expected)
    arriving[: per_rank * world] = torch.nan
    if sending is not None:
        sending.wait_stream(torch.cuda.current_stream())
    sender = threading.Thread(target=deliver, args=(8, 0.1))
    sender.start()
    loss = loss_at(8)
    sender.join()
    assert torch.equal(loss, expected)
    with pytest.raises(ValueError, match="cannot wait for text rows"):
        contrastive_loss(image, arriving, scale, progress=GatherProgress(flags, 8, per_rank, per_block))


@triton.jit
def code_kernel(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, contrastive_tiles_decode(contrastive_tiles_encode(tl.load(x + i))))


contrastive_tiles_encode, contrastive_tiles_decode = contrastive_tiles.encode, contrastive_tiles.decode


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


@pytest.mark.gpu
def test_ids_are_numbered_without_changing_what_is_equal():
    ids = torch.tensor([5, -3, 5, 2**62, -3, 0, 2**62 + 1], device=DEVICE)
    dense = pairs.dense_ids(ids)
    assert dense.dtype == torch.int32
    assert torch.equal(dense[:, None] == dense, ids[:, None] == ids)


def test_parts_fill_the_last_wave():
    assert contrastive_tiles._splits(96, 132, 1024) == 4  # 4,096 images of width 768: 384 programs, 2.9 waves
    assert contrastive_tiles._splits(1536, 132, 1024) == 1
    assert contrastive_tiles._splits(12, 132, 1024) == 11  # 512 images: as many programs as there are multiprocessors
    assert contrastive_tiles._splits(96, 132, 2) <= 2


def test_auto_is_chunked_without_a_gpu_and_goes_by_memory_with_one(monkeypatch):
    def choice(b, B, *, allocated=0, d=768, dtype=torch.float32, cuda=True):
        image = SimpleNamespace(is_cuda=cuda, shape=(b, d), dtype=dtype, device=torch.device("cuda:0"))
        text = SimpleNamespace(shape=(B, d), dtype=dtype)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        return contrastive._choose_mode(SimpleNamespace(image=image, text=text))

    assert choice(4096, 65536) == "store"
    assert choice(65536, 65536) == "store"
    assert choice(65536, 65536, allocated=70 * 10**9) == "recompute"
    assert choice(65536, 2**20) == "recompute"
    assert choice(4096, 65536, cuda=False) == "chunked"
    assert choice(4096, 65536, dtype=torch.float64) == "chunked"
    assert choice(4096, 65536, d=20) == "chunked"
