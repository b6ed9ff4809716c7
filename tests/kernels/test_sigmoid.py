"""The sigmoid loss against dense float64 autograd, and many processes against one.

Run as a script this file is one rank of the distributed tests: `python test_sigmoid.py RANK WORLD FOLDER`.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from textlock.kernels import pairs
from textlock.kernels.sigmoid import _one_visit, one_visit, reference, sigmoid_loss
from textlock.kernels.tiles import runs_tiles
from textlock.tests.kernels.rounding import rounding_bounds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("loss", "image_grad", "text_grad", "scale_grad", "bias_grad")
SCALES_AND_BIASES = [(scale, bias) for scale in (1.0, 10.0, 100.0, 300.0) for bias in (-10.0, 0.0, -17.0)]
needs_tiles = pytest.mark.skipif(
    not runs_tiles(torch.empty(1, device=DEVICE)),
    reason="the kernel needs compute capability 9.0, or TRITON_INTERPRET=1 on a CPU",
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


def run(loss_fn, image, text, scale, bias, dtype=torch.float64, **options):
    """Return the loss and its four gradients of one evaluation, as float64 on the CPU."""
    device = torch.device("cpu") if dtype == torch.float64 else DEVICE
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in (image, text)]
    inputs += [torch.tensor(x, dtype=scalar, device=device, requires_grad=True) for x in (scale, bias)]
    if options.get("ids") is not None:
        options["ids"] = options["ids"].to(device)
    loss = loss_fn(*inputs, **options)
    loss.backward()
    assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]
    values = (loss.detach(), *(x.grad for x in inputs))
    return {name: value.double().cpu() for name, value in zip(NAMES, values, strict=True)}


def weights_of(image, text, scale, bias, first_row=0, ids=None):
    """Return the magnitudes of b · dL/dS [b, B], S being the logits."""
    logits = scale * (image.double() @ text.double().T) + bias
    weights = torch.sigmoid(logits)
    weights.diagonal(first_row).copy_(torch.sigmoid(-logits.diagonal(first_row)))
    if ids is not None:
        masked = ids[first_row : first_row + len(image), None] == ids
        masked.diagonal(first_row).fill_(False)
        weights[masked] = 0
    return weights


def assert_close(result, truth, image, text, scale, bias, first_row=0, ids=None, *, loss=0, rows=0, scalars=0):
    """Hold each error to a bound relative to the truth, and what rounding in float32 may add to it.

    The bounds of scale and bias are relative to the sum of the magnitudes of their terms: matching pairs push these
    gradients down, the others up, and at the optimum they cancel, where nothing is small beside their value.
    """
    weights = weights_of(image, text, scale, bias, first_row, ids)
    cosines = image.double() @ text.double().T
    rounding = rounding_bounds(image, text, scale, weights, bias=bias)
    sizes = {name: truth[name].norm() for name in NAMES}
    sizes |= {"scale_grad": (weights * cosines.abs()).sum() / len(image), "bias_grad": weights.sum() / len(image)}
    for name, bound in zip(NAMES, (loss, rows, rows, scalars, scalars), strict=True):
        error, allowed = (result[name] - truth[name]).norm(), bound * sizes[name] + rounding[name]
        assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"


# A second spelling of the loss, pair by pair, so that `reference` itself is not the only witness.
def loss_by_definition(image, text, scale, bias, first_row=0, ids=None):
    total = 0.0
    for i in range(len(image)):
        t = first_row + i
        for j in range(len(text)):
            logit = scale * image[i].dot(text[j]) + bias
            if j == t:
                total = total + torch.log(1 + torch.exp(-logit))
            elif ids is None or ids[j] != ids[t]:
                total = total + torch.log(1 + torch.exp(logit))
    return total / len(image)


@pytest.mark.parametrize("with_ids", [False, True], ids=["distinct", "duplicates"])
def test_reference_equals_the_definition(with_ids):
    image, text = make_rows(5, 9, 8, first_row=3)
    ids = torch.tensor([0, 1, 2, 1, 4, 4, 4, 2, 0]) if with_ids else None
    expected = run(loss_by_definition, image, text, 7.0, -2.0, first_row=3, ids=ids)
    result = run(partial(sigmoid_loss, mode="reference"), image, text, 7.0, -2.0, first_row=3, ids=ids)
    for name in NAMES:
        torch.testing.assert_close(result[name], expected[name])


def compare(loss_fn, b, B, d, first_row, rows_per_chunk, scale, bias, duplicates, *, rounded=False, **bounds):
    image, text = (x.float() for x in make_rows(b, B, d, first_row))
    if rounded:
        image, text = image.half().float(), text.half().float()
    ids = (torch.arange(B) % max(1, 2 * B // 3)) << 33 if duplicates else None  # they differ in the high half alone
    options = {"first_row": first_row, "ids": ids}
    truth = run(reference, image, text, scale, bias, **options)
    result = run(loss_fn, image, text, scale, bias, torch.float32, rows_per_chunk=rows_per_chunk, **options)
    assert_close(result, truth, image, text, scale, bias, **options, **bounds)


with_duplicates = pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])


@pytest.mark.gpu
@with_duplicates
@pytest.mark.parametrize(("scale", "bias"), SCALES_AND_BIASES)
@pytest.mark.parametrize(
    ("b", "B", "d", "first_row", "rows_per_chunk"),
    [
        pytest.param(1, 1, 8, 0, 1, id="one pair"),
        pytest.param(7, 13, 8, 3, 2, id="7x13 narrow, offset, chunks of 2"),
        pytest.param(64, 64, 96, 0, 64, id="64x64 in one chunk"),
        pytest.param(33, 129, 384, 96, 10, id="33x129 at the end, chunks of 10"),
    ],
)
def test_chunked_float32_matches_float64_truth(b, B, d, first_row, rows_per_chunk, scale, bias, duplicates):
    compare(chunked, b, B, d, first_row, rows_per_chunk, scale, bias, duplicates)


TILE_SHAPES = [
    pytest.param(1, 1, 64, 0, 1, id="one pair"),
    pytest.param(1, 40, 64, 39, 1, id="one image, last text"),
    pytest.param(40, 70, 72, 11, 32, id="40x70 ragged in all three, a ragged chunk"),
    pytest.param(64, 64, 64, 0, 64, id="64x64 whole tiles"),
    pytest.param(61, 130, 96, 69, 40, id="61x130 at the end, chunks of 40", marks=pytest.mark.memcheck),
    pytest.param(33, 97, 384, 2, 64, id="33x97 wide, chunk larger than the rows"),
    pytest.param(140, 330, 136, 150, 128, id="140x330, several tiles of a GPU too, a ragged chunk"),
]


@pytest.mark.gpu
@needs_tiles
@with_duplicates
@pytest.mark.parametrize(("scale", "bias"), [(10.0, 0.0), (100.0, -10.0)])
@pytest.mark.parametrize(("b", "B", "d", "first_row", "rows_per_chunk"), TILE_SHAPES)
def test_fused_matches_float64_truth_of_rounded_rows(b, B, d, first_row, rows_per_chunk, scale, bias, duplicates):
    """Rows that float16 holds exactly: what is left is the kernel's own arithmetic."""
    case = (b, B, d, first_row, rows_per_chunk, scale, bias, duplicates)
    compare(fused, *case, rows=5e-4, scalars=1e-4, rounded=True)


@pytest.mark.gpu
@needs_tiles
@pytest.mark.parametrize(("scale", "bias"), SCALES_AND_BIASES)
def test_fused_matches_float64_truth_of_unrounded_rows(scale, bias):
    """The loss of 40 rows does not yet average the rounding of rows to float16 away."""
    compare(fused, 40, 70, 72, 11, 32, scale, bias, True, loss=1e-4, rows=1e-3, scalars=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("scale", "bias"), [(34.0, -17.0), (20.0, -10.0)])
def test_a_sure_model_keeps_its_gradient(mode, scale, bias):
    """Orthogonal pairs: σ(-17) = 4e-8 is the weight of every pair, and a sigmoid minus one would have no digit left."""
    axes = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    image, text = (rows.half().float() for rows in (F.normalize(axes[:40] + 0.003 * axes[1:41]), axes))
    truth = run(reference, image, text, scale, bias)
    assert 1e-7 < truth["loss"] < 1e-2
    result = run(partial(one_visit, fused=mode == "fused"), image, text, scale, bias, torch.float32, rows_per_chunk=32)
    assert_close(result, truth, image, text, scale, bias, rows=1e-3, scalars=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("scale", "bias"), SCALES_AND_BIASES)
def test_equal_rows(mode, scale, bias):
    rows = torch.full((35, 64), 0.125)
    result = run(partial(sigmoid_loss, mode=mode), rows, rows, scale, bias, torch.float32)
    logit = torch.tensor(scale + bias).double()
    pull = 34 * torch.sigmoid(logit) - torch.sigmoid(-logit)  # of one row towards, or here away from, all others
    torch.testing.assert_close(result["loss"], 34 * F.softplus(logit) + F.softplus(-logit), rtol=1e-5, atol=0)
    torch.testing.assert_close(result["bias_grad"], pull, rtol=1e-5, atol=0)
    torch.testing.assert_close(result["scale_grad"], pull, rtol=1e-3, atol=0)
    expected = (scale / 35 * pull * 0.125).expand(35, 64)
    for name in ("image_grad", "text_grad"):
        torch.testing.assert_close(result[name], expected, rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reference", *MODES])
def test_one_caption_for_all_leaves_the_matching_pairs(mode):
    image, text = make_rows(36, 40, 64, 2)
    result = run(
        partial(sigmoid_loss, mode=mode),
        image,
        text,
        20.0,
        -3.0,
        torch.float32,
        first_row=2,
        ids=torch.full((40,), -7),
    )
    logits = 20.0 * (image * text[2:38]).sum(1) - 3.0
    torch.testing.assert_close(result["loss"], F.softplus(-logits).mean(), rtol=1e-5, atol=0)
    expected = -20.0 / 36 * torch.sigmoid(-logits)[:, None] * text[2:38]
    torch.testing.assert_close(result["image_grad"], expected, rtol=1e-5, atol=1e-8)
    assert result["text_grad"][:2].count_nonzero() == result["text_grad"][38:].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_half_width_rows_lose_only_their_own_rounding(mode, dtype):
    image, text = (rows.to(dtype) for rows in make_rows(33, 70, 96, 5))
    truth = run(reference, image, text, 50.0, -10.0, first_row=5)
    result = run(partial(sigmoid_loss, mode=mode), image, text, 50.0, -10.0, dtype, first_row=5)
    assert_close(result, truth, image, text, 50.0, -10.0, 5, rows=torch.finfo(dtype).eps, scalars=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_text_of_another_dtype_and_rows_that_are_not_contiguous(mode):
    image, text = (rows.float().to(DEVICE) for rows in make_rows(20, 30, 64, 4))
    scale, bias = torch.tensor(30.0, device=DEVICE), torch.tensor(-5.0, device=DEVICE)
    plain = sigmoid_loss(image, text.half(), scale, bias, first_row=4, mode=mode)
    spread = sigmoid_loss(
        image.T.contiguous().T, text.half().repeat_interleave(2, 0)[::2], scale, bias, first_row=4, mode=mode
    )
    torch.testing.assert_close(spread, plain)
    assert spread.dtype == torch.float32


@pytest.mark.parametrize(("b", "B", "first_row"), [(6, 6, 0), (5, 9, 2)], ids=["square", "offset"])
@pytest.mark.parametrize("loss_fn", [reference, partial(chunked, rows_per_chunk=4)], ids=["reference", "chunked"])
def test_gradcheck(loss_fn, b, B, first_row):
    image, text = make_rows(b, B, 8, first_row)
    inputs = (image, text, torch.tensor(9.0).double(), torch.tensor(-2.0).double())
    options = {"first_row": first_row, "ids": torch.arange(B) % (B - 2)}
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *inputs: loss_fn(*inputs, **options), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_give_the_same_bits(mode):
    image, text = make_rows(61, 130, 96, 7)
    loss_fn = partial(one_visit, fused=mode == "fused", rows_per_chunk=32)
    first, second = (run(loss_fn, image, text, 50.0, -10.0, torch.float32, first_row=7) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def test_auto_is_chunked_on_a_cpu_and_fused_differs():
    image, text = (rows.float() for rows in make_rows(20, 30, 64))
    loss = partial(sigmoid_loss, image, text, torch.tensor(50.0), torch.tensor(-10.0))
    assert torch.equal(loss(), loss(mode="chunked"))
    if runs_tiles(image):
        assert not torch.equal(loss(), loss(mode="fused"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reference", *MODES])
def test_autocast_changes_nothing(mode):
    image, text = (rows.float().to(DEVICE) for rows in make_rows(20, 30, 64))
    loss = partial(sigmoid_loss, image, text, torch.tensor(50.0).to(DEVICE), torch.tensor(-10.0).to(DEVICE), mode=mode)
    plain = loss()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(loss(), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", range(4), ids=["image", "text", "scale", "bias"])
def test_gradient_of_one_input_alone(mode, wanted):
    image, text = make_rows(6, 9, 64)
    truth = run(reference, image, text, 11.0, -2.0)
    inputs = [x.float().to(DEVICE) for x in (image, text, torch.tensor(11.0), torch.tensor(-2.0))]
    inputs[wanted].requires_grad_()
    (3 * sigmoid_loss(*inputs, mode=mode)).backward()
    name = NAMES[1 + wanted]
    weights = weights_of(image, text, 11.0, -2.0)
    allowed = rounding_bounds(image, text, 11.0, weights, bias=-2.0)[name]
    allowed += 1e-3 * truth[name].norm() if mode == "fused" else 0
    assert (inputs[wanted].grad.double().cpu() - 3 * truth[name]).norm() <= 3 * allowed


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(mode):
    image, text = (rows.float().to(DEVICE) for rows in make_rows(4, 4, 64))
    image.requires_grad_()
    scale, bias = torch.tensor(5.0, device=DEVICE), torch.tensor(-1.0, device=DEVICE)
    (grad,) = torch.autograd.grad(sigmoid_loss(image, text, scale, bias, mode="reference"), image, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), image)[0].count_nonzero()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sigmoid_loss(image, text, scale, bias, mode=mode), image, create_graph=True)


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
    return peak, sum(event.name() in ("aten::mm", "aten::addmm") for event in events)


@pytest.mark.parametrize("text_gradient", [False, True], ids=["frozen text", "text gradient"])
def test_chunked_never_holds_the_logits(text_gradient):
    b = B = 1024
    image, text = (rows.float() for rows in make_rows(b, B, 32))
    image.requires_grad_()
    text.requires_grad_(text_gradient)
    scale, bias = torch.tensor(50.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def loss(mode):
        sigmoid_loss(image, text, scale, bias, ids=torch.arange(B), mode=mode, chunk_mib=1).backward()

    chunks = -(-b // (2**20 // (B * (4 + 4 + 1))))
    peak, products = profiled(lambda: loss("chunked"))
    # Beside the chunk: the gradient and its product with the upstream gradient, rows of a chunk, [b] vectors, and for
    # text its gradient, the share of one chunk and the product.
    rows = (3 + 3 * text_gradient) * image.nbytes
    assert peak <= 2**20 + rows < b * B * 4 / 2
    assert products == (3 if text_gradient else 2) * chunks
    assert profiled(lambda: loss("reference"))[0] > b * B * 4, "the measure must see dense logits"


@pytest.mark.gpu
@needs_tiles
def test_fused_never_holds_the_logits():
    b = B = 384
    image, text = (rows.float().to(DEVICE) for rows in make_rows(b, B, 64))
    image.requires_grad_()
    scale, bias = torch.tensor(50.0, device=DEVICE), torch.tensor(-10.0, device=DEVICE)

    def loss():
        one_visit(image, text, scale, bias, rows_per_chunk=32, fused=True).backward()

    if DEVICE.type == "cuda":
        loss()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak, _ = profiled(loss)
    # Weights in float16 (and on a CPU their copy in float32 for the product), text rows in both, three of image rows.
    assert peak <= 32 * B * (2 + 4) + 1.5 * text.nbytes + 3 * image.nbytes < b * B * 4


def test_evaluation_without_grad_takes_one_pass():
    image, text = make_rows(20, 20, 8)
    image.requires_grad_()
    with torch.no_grad():
        assert profiled(lambda: sigmoid_loss(image, text, torch.tensor(5.0), torch.tensor(0.0)))[1] == 1


@pytest.mark.gpu
@needs_tiles
def test_fused_evaluation_without_grad_is_the_same_loss():
    image, text = make_rows(40, 70, 72, 11)
    inputs = [x.float().to(DEVICE) for x in (image, text, torch.tensor(50.0), torch.tensor(-10.0))]
    loss = partial(one_visit, first_row=11, rows_per_chunk=32, fused=True)
    plain = loss(*inputs)
    inputs[0].requires_grad_()
    assert torch.equal(loss(*inputs), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole_and_equals_eager(mode):
    rows = make_rows(10, 17, 64, 4)
    ids = (torch.arange(17) % 11).to(DEVICE)
    results = []
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    for function in (sigmoid_loss, torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager")):
        inputs = [x.float().to(DEVICE).requires_grad_() for x in (*rows, torch.tensor(30.0), torch.tensor(-8.0))]
        loss = function(*inputs, first_row=4, ids=ids, mode=mode)
        loss.backward()
        results.append((loss, *(x.grad for x in inputs)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_operator_is_registered_consistently(mode, with_grad):
    inputs = [x.float().to(DEVICE) for x in (*make_rows(5, 8, 64), torch.tensor(5.0), torch.tensor(-1.0))]
    inputs = [x.requires_grad_(with_grad) for x in inputs]
    torch.library.opcheck(_one_visit, (*inputs, None, 2, None, 3, mode == "fused", with_grad, with_grad))


ONE = torch.tensor(1.0)
BAD_INPUTS = {
    "widths differ": ({"text": torch.ones(6, 7)}, "image must be .* one d"),
    "text is a vector": ({"text": torch.ones(8)}, "image must be"),
    "no rows": ({"image": torch.ones(0, 8)}, "b > 0"),
    "integer rows": ({"image": torch.ones(4, 8, dtype=torch.int64)}, "image must be floating point"),
    "scale is a vector": ({"logit_scale": torch.ones(1)}, "logit_scale must be a 0-dim tensor"),
    "bias is a vector": ({"logit_bias": torch.ones(1)}, "logit_bias must be a 0-dim tensor"),
    "bias is an integer": ({"logit_bias": torch.tensor(3)}, "logit_bias must be floating point"),
    "first_row too large": ({"first_row": 3}, "image rows 3:7 must lie inside the 6 text rows"),
    "first_row negative": ({"first_row": -1}, "must lie inside"),
    "ids too short": ({"ids": torch.arange(4)}, r"ids must be int64 \[6\]"),
    "ids not int64": ({"ids": torch.arange(6).int()}, "ids must be int64"),
    "unknown mode": ({"mode": "dense"}, "choose one of auto, reference, chunked, fused"),
    "another device": ({"text": torch.ones(6, 8, device="meta")}, "text is on meta"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_one_clear_error(change, message):
    arguments = {"image": torch.ones(4, 8), "text": torch.ones(6, 8), "logit_scale": ONE, "logit_bias": ONE} | change
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(**arguments)


@pytest.mark.parametrize(
    ("d", "dtype", "message"),
    [
        (56, torch.float32, "rows of width 56"),
        (68, torch.float32, "rows of width 68"),
        (4104, torch.float32, "rows of width 4104"),
        (64, torch.float64, "float64 rows"),
    ],
)
def test_fused_refuses_rows_it_cannot_take(d, dtype, message, monkeypatch):
    rows = torch.ones(4, d, dtype=dtype)
    monkeypatch.setattr(pairs, "runs_tiles", lambda rows: True)
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(rows, rows, ONE, ONE, mode="fused")


def test_fused_refuses_a_device_it_cannot_run_on(monkeypatch):
    monkeypatch.setattr(pairs, "runs_tiles", lambda rows: False)
    with pytest.raises(ValueError, match=r"rows on cpu .* capability 9\.0 .* use mode='chunked'"):
        sigmoid_loss(torch.ones(4, 64), torch.ones(4, 64), ONE, ONE, mode="fused")


@dataclass(frozen=True)
class Split:
    """A global batch of sum(sizes) pairs, one part a rank; rank r holds part order[r]."""

    sizes: tuple[int, ...]
    d: int
    scale: float
    bias: float
    duplicates: bool = False
    dtype: torch.dtype = torch.float64
    reverse: bool = False

    @property
    def B(self) -> int:
        return sum(self.sizes)

    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        image, text = make_rows(self.B, self.B, self.d)
        return image.to(self.dtype), text.to(self.dtype), torch.arange(self.B) % 17 if self.duplicates else None

    def part(self, rank: int) -> slice:
        index = len(self.sizes) - 1 - rank if self.reverse else rank
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def functions(self) -> dict[str, partial]:
        functions = {"reference": reference, "chunked": partial(chunked, rows_per_chunk=4)}
        if self.dtype == torch.float32:
            functions["fused"] = partial(fused, rows_per_chunk=32)
        return functions


def splits(world: int) -> dict[str, Split]:
    uneven = {1: (37,), 2: (30, 7), 4: (11, 1, 20, 5)}[world]
    return {
        "even": Split((8,) * world, 16, 14.3, -10.0),
        "uneven": Split(uneven, 24, 50.0, 0.0),
        "uneven float32": Split(uneven, 64, 14.3, -10.0, dtype=torch.float32),
        "uneven duplicates": Split(uneven, 24, 100.0, -10.0, duplicates=True),
        "reversed ranks": Split(uneven, 8, 300.0, -17.0, reverse=True),
    }


def open_clip_losses(rank: int, world: int):
    """Load open_clip's distributed loss from its file alone: importing the package takes seconds in every process."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return {}
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).parent / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {kind: module.SigLipLoss(rank=rank, world_size=world, dist_impl=kind) for kind in ("gather", "bidir")}


def one_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group = dist.group.WORLD
    found: dict[str, Tensor] = {}
    for name, split in splits(world).items():
        image, text, ids = split.rows()
        own = split.part(rank)
        for mode, function in split.functions().items():
            values = run_on_cpu(function, image[own], text, split, first_row=own.start, ids=ids, group=group)
            found |= {f"{name}/{mode}/{key}": value for key, value in values.items()}

    split = splits(world)["even"]
    image, text, _ = split.rows()
    own = split.part(rank)
    for kind, loss in open_clip_losses(rank, world).items():
        values = run_on_cpu(loss, image[own], text[own], split)
        found |= {f"open_clip/{kind}/{key}": value for key, value in values.items()}

    if world == 1:
        compiled = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager")
        scalars = (torch.tensor(x).double() for x in (split.scale, split.bias))
        found["compiled"] = compiled(image, text, *scalars, group=group)

    try:  # every rank claims the first rows of a batch one row too long
        sigmoid_loss(torch.ones(8, split.d), torch.ones(split.B + 1, split.d), ONE, ONE, group=group)
        message = "no error"
    except ValueError as error:
        message = str(error)
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{rank}", {"error": message})
    dist.destroy_process_group()


def run_on_cpu(loss_fn, image, text, split, **options):
    """Return the loss and its four gradients in the dtype of the split."""
    inputs = [x.clone().requires_grad_() for x in (image, text)]
    inputs += [torch.tensor(x, dtype=split.dtype, requires_grad=True) for x in (split.scale, split.bias)]
    loss = loss_fn(*inputs, **options)
    loss.backward()
    return dict(zip(NAMES, (loss.detach(), *(x.grad for x in inputs)), strict=True))


@pytest.fixture(
    scope="module",
    params=[1, 2, pytest.param(4, marks=pytest.mark.slow)],
    ids=["1 process", "2 processes", "4 processes"],
)
def ranks(request, tmp_path_factory):
    """Start the ranks of one world size once, for all tests, and open what each computed."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}  # the ranks compute on the CPU, the kernel too
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)],
            env=interpreted,
            stderr=subprocess.PIPE,
            text=True,
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


CASES = [(name, mode) for name, split in splits(1).items() for mode in split.functions()]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name}, {mode}" for name, mode in CASES])
def test_ranks_together_equal_one_process(ranks, name, mode):
    split = splits(len(ranks))[name]
    image, text, ids = split.rows()
    truth = run(reference, image, text, split.scale, split.bias, ids=ids)
    bound = 1e-10 if split.dtype == torch.float64 else 1e-3 if mode == "fused" else 1e-6
    parts = [{key: rank.get_tensor(f"{name}/{mode}/{key}").double() for key in NAMES} for rank in ranks]
    assert all(part["loss"] == parts[0]["loss"] for part in parts), "one value on all ranks, to the bit"
    whole = {key: sum(part[key] for part in parts) for key in ("text_grad", "scale_grad", "bias_grad")}
    whole["loss"] = parts[0]["loss"]
    whole["image_grad"] = torch.zeros_like(truth["image_grad"])
    for rank, part in enumerate(parts):
        whole["image_grad"][split.part(rank)] = part["image_grad"]
    assert_close(whole, truth, image, text, split.scale, split.bias, 0, ids, loss=bound, rows=bound, scalars=bound)


@pytest.mark.parametrize("kind", ["gather", "bidir"])
def test_open_clip_agrees(ranks, kind):
    """Its value is the mean over its own rows, its gradients are those of the sum over ranks."""
    world = len(ranks)
    if f"open_clip/{kind}/loss" not in ranks[0].keys():  # noqa: SIM118  a safetensors file is no dict
        pytest.skip("open_clip is not installed")

    def values(key):
        return [tensors.get_tensor(key) for tensors in ranks]

    torch.testing.assert_close(values("even/chunked/loss")[0], sum(values(f"open_clip/{kind}/loss")) / world)
    for name in ("scale_grad", "bias_grad"):
        torch.testing.assert_close(sum(values(f"even/chunked/{name}")), sum(values(f"open_clip/{kind}/{name}")) / world)
    for mine, theirs in zip(values("even/chunked/image_grad"), values(f"open_clip/{kind}/image_grad"), strict=True):
        torch.testing.assert_close(mine, theirs / world)
    text_grad = torch.cat(values(f"open_clip/{kind}/text_grad"))  # each rank's own rows, complete
    torch.testing.assert_close(sum(values("even/chunked/text_grad")), text_grad / world)


def test_ranks_that_do_not_make_up_the_batch_are_told_so(ranks):
    for tensors in ranks:
        assert "must hold every image row once" in tensors.metadata()["error"]


def test_compiles_whole_with_a_group(ranks):
    if len(ranks) > 1:
        pytest.skip("compiled in one process: tracing takes seconds in each")
    tensors = ranks[0]
    torch.testing.assert_close(tensors.get_tensor("compiled"), tensors.get_tensor("even/chunked/loss"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
