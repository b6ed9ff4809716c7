"""The contrastive loss against dense float64 autograd, and many processes against one.

Run as a script this file is one rank of the distributed tests: `python test_contrastive.py RANK WORLD FOLDER`.
"""

import importlib.util
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from textlock.kernels import contrastive
from textlock.kernels.contrastive import STATS, contrastive_loss
from textlock.kernels.gather import TextGather, gather_rows
from textlock.kernels.tiles import runs_tiles
from textlock.tests.kernels.rounding import rounding_bounds, softmax_weights

NAMES = ("loss", "image_grad", "scale_grad")
SCALES = (1.0, 14.3, 50.0, 100.0, 300.0)


def make_rows(b, B, d, first_row=0, signal=0.1, seed=0):
    """Draw unit float64 rows; image i is noise with a share of its text, so that hard negatives remain at any scale."""
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(B, d, dtype=torch.float64, generator=generator))
    noise = F.normalize(torch.randn(b, d, dtype=torch.float64, generator=generator))
    return F.normalize(noise + signal * text[first_row : first_row + b]), text


def in_chunks_of(rows):
    return mock.patch.object(contrastive, "rows_per_chunk", lambda *_: rows)


def run(mode, image, text, scale, dtype=torch.float64, *, rows_per_chunk=None, text_grad=False, **options):
    """Return loss, gradients (as float64) and statistics of one evaluation."""
    image = image.to(dtype, copy=True).requires_grad_()
    text = text.to(dtype, copy=True).requires_grad_(text_grad)
    scale = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    with in_chunks_of(rows_per_chunk) if rows_per_chunk else nullcontext():
        loss, stats = contrastive_loss(image, text, scale, mode=mode, return_stats=True, **options)
    loss.backward()
    assert image.grad.dtype == dtype
    result = {
        "loss": loss.detach().double(),
        "image_grad": image.grad.double(),
        "scale_grad": scale.grad.double(),
        "stats": torch.stack([stats[name] for name in STATS]),
    }
    return result | {"text_grad": text.grad.double()} if text_grad else result


def relative_error(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_close(result, truth, loss, image_grad, scale_grad, text_grad=None, *, rounding=None):
    """Hold each error to a bound relative to the truth, and what rounding in float32 may add to it."""
    for name, bound in zip((*NAMES, "text_grad"), (loss, image_grad, scale_grad, text_grad), strict=True):
        if bound is not None:
            error = (result[name] - truth[name]).norm()
            allowed = bound * truth[name].norm() + (rounding[name] if rounding else 0)
            assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"


def rounding_of(image, text, scale, first_row=0, ids=None):
    weights = softmax_weights(image, text, scale, first_row, ids, both_directions=True)
    return rounding_bounds(image, text, scale, weights)


# A second spelling of the loss, term by term, so that `reference` itself is not the only witness.
def loss_by_definition(image, text, scale, first_row=0, ids=None):
    b, B = len(image), len(text)
    cosines = image @ text.T
    total = 0.0
    for i in range(b):
        t = first_row + i
        texts = [j for j in range(B) if j == t or ids is None or ids[j] != ids[t]]
        images = [k for k in range(b) if k == i or ids is None or ids[first_row + k] != ids[t]]
        row = torch.stack([scale * cosines[i, j] for j in texts]).exp().sum().log()
        column = torch.stack([scale * cosines[k, t] for k in images]).exp().sum().log()
        total = total + (row + column) / 2 - scale * cosines[i, t]
    return total / b


@pytest.mark.parametrize("with_ids", [False, True], ids=["distinct", "duplicates"])
def test_reference_equals_the_definition(with_ids):
    image, text = make_rows(5, 9, 8, first_row=3)
    ids = torch.tensor([0, 1, 2, 1, 4, 4, 4, 2, 0]) if with_ids else None
    image, scale = image.requires_grad_(), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    expected = loss_by_definition(image, text, scale, first_row=3, ids=ids)
    loss = contrastive_loss(image, text, scale, first_row=3, ids=ids, mode="reference")
    torch.testing.assert_close(loss, expected)
    for ours, true in zip(
        torch.autograd.grad(loss, (image, scale)), torch.autograd.grad(expected, (image, scale)), strict=True
    ):
        torch.testing.assert_close(ours, true)


SHAPES = [
    pytest.param(1, 1, 8, 0, 1, id="one pair"),
    pytest.param(7, 13, 8, 3, 2, id="7x13 narrow, offset, chunks of 2"),
    pytest.param(64, 64, 96, 0, 64, id="64x64 in one chunk"),
    pytest.param(33, 129, 384, 96, 10, id="33x129 at the end, chunks of 10"),
    pytest.param(95, 251, 768, 41, 32, id="95x251 wide, chunks of 32"),
    pytest.param(257, 257, 768, 0, 100, id="257x257 wide, chunks of 100"),
]


@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("b", "B", "d", "first_row", "rows_per_chunk"), SHAPES)
def test_chunked_float32_matches_float64_truth(b, B, d, first_row, rows_per_chunk, scale, duplicates):
    image, text = make_rows(b, B, d, first_row)
    image, text = image.float(), text.float()
    options = {"first_row": first_row, "ids": torch.arange(B) % max(1, 2 * B // 3) if duplicates else None}
    truth = run("reference", image, text, scale, text_grad=True, **options)
    result = run("chunked", image, text, scale, torch.float32, rows_per_chunk=rows_per_chunk, text_grad=True, **options)
    if B == 1:
        assert all(result[name].abs().max() <= 1e-12 for name in NAMES)
    else:
        assert_close(result, truth, 0, 0, 0, 0, rounding=rounding_of(image, text, scale, **options))
    torch.testing.assert_close(result["stats"], truth["stats"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_width_rows_lose_only_their_own_rounding(dtype):
    image, text = (rows.to(dtype) for rows in make_rows(33, 70, 96, 5))
    truth = run("reference", image, text, 100.0, first_row=5)
    result = run("chunked", image, text, 100.0, dtype, first_row=5, rows_per_chunk=8)
    assert_close(result, truth, 0, torch.finfo(dtype).eps, 0, rounding=rounding_of(image, text, 100.0, 5))


@pytest.mark.parametrize("mode", ["reference", "chunked"])
@pytest.mark.parametrize(("b", "B", "first_row"), [(6, 6, 0), (5, 9, 2)], ids=["square", "offset"])
def test_gradcheck(mode, b, B, first_row):
    image, text = make_rows(b, B, 8, first_row)
    ids = torch.arange(B) % (B - 2)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)

    def loss(image, text, scale):
        return contrastive_loss(image, text, scale, first_row=first_row, ids=ids, mode=mode)

    with in_chunks_of(4):
        assert torch.autograd.gradcheck(loss, (image.requires_grad_(), text.requires_grad_(), scale))


@pytest.mark.parametrize(
    ("scale", "shared"),
    [pytest.param(18.0, 0.0, id="scale 18, orthogonal"), pytest.param(100.0, 2.1, id="scale 100, crowded")],
)
@pytest.mark.parametrize("rows_per_chunk", [64, 20])
def test_nearly_sure_model_keeps_its_gradient(scale, shared, rows_per_chunk):
    """At P_ii = 1 - 1e-6 a float32 softmax minus one would have lost six of its seven digits."""
    axes = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(1))).Q
    text = F.normalize(axes[:64] + shared * axes[64])
    image = F.normalize(text + 0.003 * axes.roll(1, 0)[:64])
    truth = run("reference", image, text, scale)
    assert 1e-7 < truth["loss"] < 1e-5
    result = run("chunked", image, text, scale, torch.float32, rows_per_chunk=rows_per_chunk)
    assert_close(result, truth, 0, 1e-3, 1e-3, rounding=rounding_of(image, text, scale))


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rows_give_log_of_the_batch_and_no_gradient(scale):
    image = F.normalize(torch.ones(12, 24)).requires_grad_()
    scale = torch.tensor(scale, requires_grad=True)
    loss, stats = contrastive_loss(image, image.detach(), scale, mode="chunked", return_stats=True)
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(12), rtol=1e-6, atol=0)
    assert image.grad.abs().max() <= 1e-6 * scale
    assert scale.grad.abs() <= 1e-6 * scale
    assert stats["image_to_text_top1"] == stats["text_to_image_top1"] == 0, "a tie is a miss"


@pytest.mark.parametrize("mode", ["reference", "chunked"])
def test_one_caption_for_all_leaves_no_negative(mode):
    image, text = (rows.float() for rows in make_rows(6, 10, 8, 2))
    image.requires_grad_()
    loss, stats = contrastive_loss(
        image, text, torch.tensor(20.0), first_row=2, ids=torch.full((10,), -7), mode=mode, return_stats=True
    )
    loss.backward()
    assert loss == 0
    assert image.grad.count_nonzero() == 0
    assert stats["masked_duplicates"] == 6 * 9


def test_scale_within_the_documented_range_is_exact_and_beyond_it_loud():
    image, text = make_rows(16, 16, 8)
    limit = (1024 - 4) * math.log(2)  # B = 16
    # The worst case of the range: one pair of rows is parallel, another opposite.
    image[0], image[1] = text[5], -text[9]
    truth = run("reference", image, text, limit - 1)
    assert_close(run("chunked", image, text, limit - 1, rows_per_chunk=5), truth, 1e-12, 1e-9, 1e-9)
    assert not run("chunked", image, text, limit + 10, rows_per_chunk=5)["loss"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_two_runs_give_the_same_bits(dtype):
    image, text = make_rows(61, 130, 96, 7)
    first, second = (run("chunked", image, text, 50.0, dtype, first_row=7, rows_per_chunk=16) for _ in range(2))
    for name in (*NAMES, "stats"):
        assert torch.equal(first[name], second[name]), name


def test_autocast_changes_nothing():
    image, text = (rows.float() for rows in make_rows(20, 30, 16))
    for mode in ("reference", "chunked"):
        plain = contrastive_loss(image, text, torch.tensor(50.0), mode=mode)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(contrastive_loss(image, text, torch.tensor(50.0), mode=mode), plain)


@pytest.mark.parametrize("wanted", ["image", "scale"])
def test_gradient_of_one_input_alone(wanted):
    image, text = make_rows(6, 9, 8)
    truth = run("reference", image, text, 11.0)
    image.requires_grad_(wanted == "image")
    scale = torch.tensor(11.0, dtype=torch.float64, requires_grad=wanted == "scale")
    (3 * contrastive_loss(image, text, scale)).backward()
    if wanted == "image":
        torch.testing.assert_close(image.grad, 3 * truth["image_grad"])
    else:
        torch.testing.assert_close(scale.grad, 3 * truth["scale_grad"])


def test_second_derivative_is_refused_by_chunked_and_given_by_reference():
    image, text = make_rows(4, 4, 8)
    image.requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad(contrastive_loss(image, text, scale, mode="reference"), image, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), image)[0].count_nonzero()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(contrastive_loss(image, text, scale, mode="chunked"), image, create_graph=True)


def profiled(function):
    """Return the most bytes that a call adds, as the allocator sees them, and its number of matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak, sum(event.name() == "aten::mm" for event in events)


def test_chunked_never_holds_the_logits():
    b = B = 1024
    image, text = (rows.float() for rows in make_rows(b, B, 32))
    image.requires_grad_()
    scale, ids = torch.tensor(50.0, requires_grad=True), torch.arange(B)
    row_bytes = B * (4 + 4 + 1)

    def loss(mode):
        contrastive_loss(image, text, scale, ids=ids, mode=mode, chunk_mib=1).backward()

    peak, products = profiled(lambda: loss("chunked"))
    inputs = (
        4 * image.nbytes
    )  # scaled rows, gradient, its product with the upstream gradient, and slack for [B] vectors
    assert peak <= 2**20 + inputs < b * B * 4 / 2
    assert products == 3 * math.ceil(b / (2**20 // row_bytes))
    assert profiled(lambda: loss("reference"))[0] > b * B * 4, "the measure must see dense logits"


@pytest.mark.parametrize(
    ("rows_per_chunk", "gradient", "products"),
    [(5, False, 4), (5, True, 12), (20, False, 1), (20, True, 2)],
    ids=["evaluate in chunks", "gradient in chunks", "evaluate at once", "gradient at once keeps the logits"],
)
def test_number_of_matrix_products(rows_per_chunk, gradient, products):
    image, text = make_rows(20, 20, 8)
    image.requires_grad_(gradient)
    scale = torch.tensor(5.0)
    with in_chunks_of(rows_per_chunk):
        assert profiled(lambda: contrastive_loss(image, text, scale))[1] == products


def test_evaluation_without_grad_takes_one_pass():
    image, text = make_rows(20, 20, 8)
    image.requires_grad_()
    with torch.no_grad():
        assert profiled(lambda: contrastive_loss(image, text, torch.tensor(5.0)))[1] == 1


def test_compiles_whole_and_equals_eager():
    image, text = (rows.float() for rows in make_rows(10, 17, 16, 4))
    ids = torch.arange(17) % 11
    results = []
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    for function in (contrastive_loss, torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")):
        rows, scale = image.clone().requires_grad_(), torch.tensor(30.0, requires_grad=True)
        loss, stats = function(rows, text, scale, first_row=4, ids=ids, return_stats=True)
        loss.backward()
        results.append((loss, rows.grad, scale.grad, *(stats[name] for name in STATS)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("with_grad", [False, True])
def test_operator_is_registered_consistently(with_grad):
    image, text = (rows.float() for rows in make_rows(5, 8, 8))
    scale = torch.tensor(5.0, requires_grad=with_grad)
    wants = [with_grad, False, with_grad]
    arguments = (image.requires_grad_(with_grad), text, scale, None, 2, None, 0, "chunked", 1, wants, True, None, [])
    torch.library.opcheck(contrastive._contrastive, arguments)


ONE = torch.tensor(1.0)
BAD_INPUTS = {
    "widths differ": ({"text": torch.ones(6, 7)}, "image must be .* one d"),
    "text is a vector": ({"text": torch.ones(8)}, "image must be"),
    "no rows": ({"image": torch.ones(0, 8)}, "b > 0"),
    "integer rows": ({"image": torch.ones(4, 8, dtype=torch.int64)}, "image must be floating point"),
    "scale is a vector": ({"logit_scale": torch.ones(1)}, "logit_scale must be a 0-dim tensor"),
    "first_row too large": ({"first_row": 3}, "image rows 3:7 must lie inside the 6 text rows"),
    "first_row negative": ({"first_row": -1}, "must lie inside"),
    "first_row in the bank": ({"bank": 1, "first_row": 2}, "2:6 must lie inside the 5 text rows before the bank"),
    "bank negative": ({"bank": -1}, "bank is -1"),
    "ids too short": ({"ids": torch.arange(4)}, r"ids must be int64 \[6\]"),
    "ids not int64": ({"ids": torch.arange(6).int()}, "ids must be int64"),
    "unknown mode": ({"mode": "dense"}, "choose one of auto, reference, chunked, store, recompute"),
    "too narrow for tiles": ({"mode": "store"}, "rows of width 8"),
    "float64 in tiles": (
        {"mode": "recompute", "image": torch.ones(4, 64).double(), "text": torch.ones(6, 64)},
        "'recompute' cannot take float64 rows; use mode='chunked'",
    ),
    "another device": ({"text": torch.ones(6, 8, device="meta")}, "text is on meta"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_one_clear_error(change, message):
    arguments = {"image": torch.ones(4, 8), "text": torch.ones(6, 8), "logit_scale": ONE} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


@dataclass(frozen=True)
class Split:
    """A global batch of sum(sizes) pairs and `bank` texts more, one part a rank; rank r holds part order[r]."""

    sizes: tuple[int, ...]
    d: int
    scale: float
    duplicates: bool = False
    dtype: torch.dtype = torch.float64
    reverse: bool = False
    bank: int = 0

    @property
    def B(self) -> int:
        return sum(self.sizes) + self.bank

    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        image, text = make_rows(sum(self.sizes), self.B, self.d)
        return image.to(self.dtype), text.to(self.dtype), torch.arange(self.B) % 17 if self.duplicates else None

    def part(self, rank: int) -> slice:
        index = len(self.sizes) - 1 - rank if self.reverse else rank
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


def splits(world: int) -> dict[str, Split]:
    uneven = {1: (37,), 2: (30, 7), 4: (11, 1, 20, 5)}[world]
    return {
        "even": Split((8,) * world, 16, 14.3),
        "uneven": Split(uneven, 24, 50.0),
        "uneven float32": Split(uneven, 24, 14.3, dtype=torch.float32),
        "uneven duplicates": Split(uneven, 24, 100.0, duplicates=True),
        "reversed ranks": Split(uneven, 8, 300.0, reverse=True),
        "bank": Split(uneven, 24, 50.0, bank=13),
        "bank with duplicates, float32": Split(uneven, 24, 14.3, duplicates=True, dtype=torch.float32, bank=5),
        "bank larger than the batch": Split(uneven, 16, 100.0, duplicates=True, reverse=True, bank=91),
    }


TILED_BANKS = (0, 31)


def tiled_split(world: int, bank: int) -> Split:
    """Return a batch for the kernels, uneven and wide enough for them."""
    sizes = {1: (40,), 2: (34, 6), 4: (33, 1, 4, 2)}[world]
    return Split(sizes, 64, 50.0, duplicates=True, dtype=torch.float32, bank=bank)


def open_clip_loss(rank: int, world: int):
    """Load open_clip's distributed loss from its file alone: importing the package takes seconds in every process."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).parent / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)


def one_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group = dist.group.WORLD
    found: dict[str, Tensor] = {}
    cases = [(name, split, ("reference", "chunked")) for name, split in splits(world).items()]
    if runs_tiles(torch.empty(0)):
        cases += [(f"tiles {bank}", tiled_split(world, bank), ("store", "recompute")) for bank in TILED_BANKS]
    for name, split, modes in cases:
        image, text, ids = split.rows()
        own = split.part(rank)
        for mode in modes:
            result = run(
                mode,
                image[own],
                text,
                split.scale,
                split.dtype,
                rows_per_chunk=4,
                text_grad=True,
                first_row=own.start,
                ids=ids,
                group=group,
                bank=split.bank,
            )
            found |= {f"{name}/{mode}/{key}": value for key, value in result.items()}

    split = splits(world)["even"]
    image, text, _ = split.rows()
    own = split.part(rank)
    gathered = TextGather(group, tuple(text[own].shape), text.dtype).start(text[own]).wait()
    found["gathered"] = gathered.clone()
    clip_loss = open_clip_loss(rank, world)
    if clip_loss is not None:

        def two_towers(loss_of) -> dict[str, Tensor]:
            inputs = [rows[own].clone().requires_grad_() for rows in (image, text)]
            scale = torch.tensor(split.scale).double().requires_grad_()
            loss = loss_of(*inputs, scale)
            loss.backward()
            gradients = {"image_grad": inputs[0].grad, "text_grad": inputs[1].grad, "scale_grad": scale.grad}
            return {"loss": loss.detach()} | gradients

        def our_loss(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
            return contrastive_loss(rows, gather_rows(columns, group), scale, first_row=own.start, group=group)

        for name, loss_of in (("open_clip", clip_loss), ("ours", our_loss)):
            found |= {f"{name}/{key}": value for key, value in two_towers(loss_of).items()}

    if world == 1:
        compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
        found["compiled"] = compiled(image, text, torch.tensor(split.scale).double(), group=group)

    messages = {}
    for bank in (0, 2):  # every rank claims the first rows of a batch one row too long
        try:
            text = torch.ones(split.B + 1 + bank, split.d)
            contrastive_loss(torch.ones(8, split.d), text, ONE, group=group, bank=bank)
        except ValueError as error:
            messages[f"error {bank}"] = str(error)
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{rank}", messages)
    dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[1, 2, pytest.param(4, marks=pytest.mark.slow)],
    ids=["1 process", "2 processes", "4 processes"],
)
def ranks(request, tmp_path_factory):
    """Start the ranks of one world size once, for all tests, and open what each computed."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        failures = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(failures)
    return [safe_open(folder / f"{rank}", "pt") for rank in range(world)]


@pytest.mark.parametrize("mode", ["reference", "chunked"])
@pytest.mark.parametrize("name", splits(1))
def test_ranks_together_equal_one_process(ranks, name, mode):
    split = splits(len(ranks))[name]
    image, text, ids = split.rows()
    truth = run("reference", image, text, split.scale, ids=ids, text_grad=True)
    if split.bank:
        assert relative_error(truth["loss"], loss_by_definition(image, text, split.scale, ids=ids)) <= 1e-6
    bound = 1e-6 if split.dtype == torch.float32 else 1e-10
    scale_grad = text_grad = torch.zeros(())
    for rank, tensors in enumerate(ranks):
        part = {key: tensors.get_tensor(f"{name}/{mode}/{key}") for key in (*NAMES, "text_grad", "stats")}
        assert relative_error(part["loss"], truth["loss"]) <= bound
        assert relative_error(part["image_grad"], truth["image_grad"][split.part(rank)]) <= bound
        torch.testing.assert_close(part["stats"], truth["stats"], rtol=1e-6, atol=1e-6)
        scale_grad = scale_grad + part["scale_grad"]
        text_grad = text_grad + part["text_grad"]
    assert relative_error(scale_grad, truth["scale_grad"]) <= bound
    assert relative_error(text_grad, truth["text_grad"]) <= bound


@pytest.mark.skipif(not runs_tiles(torch.empty(0)), reason="the kernels run on CPU tensors in the interpreter only")
@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize("bank", TILED_BANKS)
def test_ranks_together_equal_one_process_by_tiles(ranks, bank, mode):
    """The loss to 1e-6; the tiles of other ranks begin elsewhere, so weights are rounded from other row maxima."""
    split = tiled_split(len(ranks), bank)
    image, text, ids = split.rows()
    truth = run(mode, image, text, split.scale, split.dtype, ids=ids, text_grad=True)
    parts = [
        {key: tensors.get_tensor(f"tiles {bank}/{mode}/{key}") for key in (*NAMES, "text_grad", "stats")}
        for tensors in ranks
    ]
    bound = 1e-3 if mode == "store" else 1e-5
    for rank, part in enumerate(parts):
        assert relative_error(part["loss"], truth["loss"]) <= 1e-6
        assert relative_error(part["image_grad"], truth["image_grad"][split.part(rank)]) <= bound
        torch.testing.assert_close(part["stats"], truth["stats"], rtol=1e-6, atol=1e-6)
    for name in ("scale_grad", "text_grad"):
        assert relative_error(sum(part[name] for part in parts), truth[name]) <= bound


def test_message_between_ranks_leaves_the_bank_out(monkeypatch):
    """It holds one number for each image of the batch and four more, whatever the bank."""
    sizes = []
    monkeypatch.setattr(contrastive, "check_layout", lambda *_, **__: None)
    monkeypatch.setattr(contrastive, "group_of", lambda name: name)
    monkeypatch.setattr(contrastive, "_all_reduce", lambda values, group, *_: sizes.append((group, len(values))))
    image, text = make_rows(6, 35, 8)
    contrastive_loss(image, text, torch.tensor(9.0), group=SimpleNamespace(group_name="all"), bank=15)
    assert sizes == [("all", 20 + 4)]


def test_bank_without_a_group_changes_nothing():
    """Text rows that match no image of the call are negatives of the image->text half alone in any case."""
    image, text = make_rows(6, 35, 8, 2)
    plain, banked = (run("chunked", image, text, 30.0, first_row=2, bank=bank) for bank in (0, 15))
    assert all(torch.equal(plain[name], banked[name]) for name in (*NAMES, "stats"))


def test_open_clip_agrees(ranks):
    """Its value is the mean over its own rows, its gradients are those of the sum over ranks."""
    world = len(ranks)
    if "open_clip/loss" not in ranks[0].keys():  # noqa: SIM118  a safetensors file is no dict
        pytest.skip("open_clip is not installed")

    def values(key):
        return [tensors.get_tensor(key).double() for tensors in ranks]

    torch.testing.assert_close(values("ours/loss")[0], sum(values("open_clip/loss")) / world)
    for name in ("image_grad", "text_grad"):
        for mine, theirs in zip(values(f"ours/{name}"), values(f"open_clip/{name}"), strict=True):
            torch.testing.assert_close(mine, theirs / world)
    torch.testing.assert_close(sum(values("ours/scale_grad")), sum(values("open_clip/scale_grad")) / world)


def test_gathered_text_is_the_global_batch(ranks):
    _, text, _ = splits(len(ranks))["even"].rows()
    for tensors in ranks:
        assert torch.equal(tensors.get_tensor("gathered"), text)


def test_ranks_that_do_not_make_up_the_batch_are_told_so(ranks):
    images = splits(len(ranks))["even"].B + 1
    for tensors in ranks:
        told = tensors.metadata()
        assert "must hold every image row once" in told["error 0"]
        assert f"0:8 of {images}; pass" in told["error 0"]
        assert f"0:8 of {images} before a bank of 2; pass" in told["error 2"]


def test_compiles_whole_with_a_group(ranks):
    if len(ranks) > 1:
        pytest.skip("compiled in one process: tracing takes seconds in each")
    tensors = ranks[0]
    torch.testing.assert_close(tensors.get_tensor("compiled"), tensors.get_tensor("even/chunked/loss"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
