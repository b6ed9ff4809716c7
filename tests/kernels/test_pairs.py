"""What all pairwise losses promise, each in every mode: float64's values, one pass, one operator, one clear error."""

from functools import partial

import pytest
import torch

from textlock.kernels import contrastive_tiles, pairs, sigmoid
from textlock.kernels.tiles import operand, runs_tiles

from .pairs import (
    ALL_MODES,
    DEVICE,
    LOSSES,
    assert_close,
    every_loss,
    every_mode,
    in_chunks_of,
    inputs_of,
    loss_by_definition,
    make_rows,
    nearly_sure_rows,
    profiled,
    run,
    some_duplicates,
    tiled_modes,
    truth_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CONTRASTIVE = LOSSES["contrastive"]


@every_loss
@pytest.mark.parametrize("with_ids", [False, True], ids=["distinct", "duplicates"])
def test_reference_equals_the_definition(loss, with_ids):
    rows = make_rows(5, 9, 8, first_row=3)
    options = {"first_row": 3, "ids": torch.tensor([0, 1, 2, 1, 4, 4, 4, 2, 0]) if with_ids else None}
    inputs = inputs_of(loss, *rows, 7.0, -2.0, dtype=torch.float64, device="cpu", learnt=loss.learnt)
    leaves = [inputs[name] for name in loss.learnt]
    expected = loss_by_definition(loss, *inputs.values(), **options)
    found = loss.function(**inputs, mode="reference", **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


SCALES = [(1.0, 0.0), (14.3, -10.0), (100.0, -10.0), (300.0, -17.0)]
# Images, texts, width, first row, images at a time, duplicates. The interpreter's tiles are 32 x 32 x 32.
SHAPES = [
    pytest.param(1, 40, 64, 39, 1, False, id="one image, last text"),
    pytest.param(33, 70, 72, 11, 32, True, id="33x70 ragged in all three, a ragged chunk, duplicates"),
    pytest.param(64, 64, 64, 0, 64, True, id="64x64 whole tiles in one chunk, duplicates"),
    pytest.param(70, 98, 136, 28, 40, False, id="70x98 at the end, chunks of 40"),
]


@pytest.mark.gpu
@every_mode
@pytest.mark.parametrize(("scale", "bias"), SCALES)
@pytest.mark.parametrize(("b", "B", "d", "first_row", "chunk", "duplicates"), SHAPES)
def test_value_and_gradients_are_those_of_float64(loss, mode, b, B, d, first_row, chunk, duplicates, scale, bias):
    rows = make_rows(b, B, d, first_row)
    options = {"first_row": first_row, "ids": some_duplicates(B) if duplicates else None}
    truth = truth_of(loss, *rows, scale, bias, **options)
    assert_close(loss, mode, run(loss, mode, *rows, scale, bias, chunk=chunk, **options), truth, *rows, scale)


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "bias"), SCALES)
@pytest.mark.parametrize(("b", "B", "d", "chunk"), [(1, 2, 8, 1), (7, 13, 8, 2), (33, 129, 384, 10)])
@every_loss
def test_chunked_takes_any_width(loss, b, B, d, chunk, scale, bias):
    rows = make_rows(b, B, d, B - b)
    truth = truth_of(loss, *rows, scale, bias, first_row=B - b)
    result = run(loss, "chunked", *rows, scale, bias, first_row=B - b, chunk=chunk)
    assert_close(loss, "chunked", result, truth, *rows, scale)


@pytest.mark.gpu
@pytest.mark.memcheck
@tiled_modes
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_tiles_of_the_size_that_a_gpu_runs(loss, mode, trained, monkeypatch):
    """Their sides differ, unlike the interpreter's: [128, 128] in pass 1, [128, 256] in steps of 64 in pass 2."""
    if trained and "text" not in loss.learnt:
        pytest.skip("its texts are constants")
    monkeypatch.setattr(contrastive_tiles, "INTERPRETED", False)
    monkeypatch.setattr(sigmoid, "INTERPRETED", False)
    rows, options = make_rows(140, 330, 136, 150), {"first_row": 150, "ids": torch.arange(330) % 290}
    learnt = loss.learnt if trained else tuple(name for name in loss.learnt if name != "text")
    result = run(loss, mode, *rows, chunk=128, learnt=learnt, **options)
    assert_close(loss, mode, result, truth_of(loss, *rows, **options), *rows, 50.0)


@pytest.mark.gpu
@tiled_modes
def test_rows_that_float16_does_not_hold_lose_what_it_rounds_off(loss, mode):
    rows = make_rows(40, 50, 200, half=False)
    assert_close(loss, mode, run(loss, mode, *rows), truth_of(loss, *rows), *rows, 50.0, exact=False)


@pytest.mark.gpu
@every_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_width_rows_lose_only_their_own_rounding(loss, mode, dtype):
    rows = [x.to(dtype) for x in make_rows(33, 70, 96, 5)]
    truth = truth_of(loss, *rows, first_row=5)
    assert_close(loss, mode, run(loss, mode, *rows, dtype=dtype, first_row=5), truth, *rows, 50.0)


@pytest.mark.gpu
@every_mode
def test_a_sure_model_keeps_its_gradient(loss, mode):
    """At P_ii = 1 - 1e-6 a float32 softmax or sigmoid minus one would have lost six of its seven digits."""
    if loss.name == "sigmoid":
        axes = torch.eye(64, dtype=torch.float64)  # orthogonal pairs: the weight of every pair is σ(-17)
        rows, scale = (axes[:40], axes), 34.0
    else:
        rows, scale = nearly_sure_rows(), 100.0
    truth = truth_of(loss, *rows, scale, -17.0)
    assert 1e-7 < truth["loss"] < 1e-5
    # The texts of the softmaxes are near to one another: what the pairs add to a gradient is twice as long as it is.
    assert_close(loss, mode, run(loss, mode, *rows, scale, -17.0), truth, *rows, scale, factor=2)


@pytest.mark.gpu
@every_mode
@pytest.mark.parametrize(("scale", "bias"), SCALES)
def test_equal_rows(loss, mode, scale, bias):
    rows = torch.full((40, 64), 0.125)
    result, truth = run(loss, mode, rows, rows, scale, bias), truth_of(loss, rows, rows, scale, bias)
    torch.testing.assert_close(result["loss"], truth["loss"], rtol=1e-5, atol=0)
    # In a softmax the pulls of all pairs cancel; every weight is rounded in the same direction.
    pull = scale / 40 * (1 if loss.name != "sigmoid" else truth["loss"])
    assert (result["image"] - truth["image"]).norm(dim=1).max() <= 2**-8 * pull
    assert (result["logit_scale"] - truth["logit_scale"]).abs() <= 2**-8 * 40 * pull / scale


@pytest.mark.gpu
@every_loss
def test_one_caption_for_all_leaves_the_matching_pairs(loss):
    rows, options = make_rows(36, 40, 64, 2), {"first_row": 2, "ids": torch.full((40,), -7)}
    truth = truth_of(loss, *rows, 20.0, -3.0, **options)
    modes = ["chunked", *loss.tiled] if runs_tiles(torch.empty(1, device=DEVICE)) else ["chunked"]
    for mode in modes:
        result = run(loss, mode, *rows, 20.0, -3.0, **options)
        one_pair = run(loss, mode, rows[0][:1], rows[1][:1], 20.0, -3.0)
        if loss.name == "sigmoid":
            assert_close(loss, mode, result, truth, *rows, 20.0)
            assert result["text"][:2].count_nonzero() == result["text"][38:].count_nonzero() == 0
        else:
            assert all(value.count_nonzero() == 0 for value in (*result.values(), *one_pair.values()))


@every_loss
@pytest.mark.parametrize("mode", ["reference", "chunked"])
def test_gradcheck(loss, mode):
    inputs = inputs_of(loss, *make_rows(5, 9, 8, 2), 9.0, -2.0, dtype=torch.float64, device="cpu", learnt=loss.learnt)
    options = {"first_row": 2, "ids": torch.arange(9) % 7, "mode": mode}
    with in_chunks_of(2):
        assert torch.autograd.gradcheck(
            lambda *values: loss.function(**dict(zip(inputs, values, strict=True)), **options), tuple(inputs.values())
        )


@pytest.mark.gpu
@every_mode
def test_two_runs_give_the_same_bits_and_autocast_none_else(loss, mode):
    rows, options = make_rows(61, 98, 64, 7), {"first_row": 7, "chunk": 32}
    first = run(loss, mode, *rows, **options)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        second = run(loss, mode, *rows, **options)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_loss
def test_autocast_leaves_the_reference_alone(loss):
    inputs = inputs_of(loss, *make_rows(20, 30, 16), device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.function(**inputs, mode="reference")
    assert torch.equal(found, loss.function(**inputs, mode="reference"))


@pytest.mark.gpu
@every_mode
def test_each_input_may_take_a_gradient_alone_or_none_at_all(loss, mode):
    rows, options = make_rows(33, 40, 64, 3), {"first_row": 3, "chunk": 32}
    truth = truth_of(loss, *rows, 11.0, -2.0, first_row=3)
    for name in loss.learnt:
        alone = run(loss, mode, *rows, 11.0, -2.0, learnt=(name,), **options)
        assert_close(loss, mode, alone, truth, *rows, 11.0)
    inputs = inputs_of(loss, *rows, 11.0, -2.0, learnt=("image",))
    (3 * loss.function(**inputs, first_row=3, mode=mode)).backward()
    assert_close(loss, mode, {"image": inputs["image"].grad.double().cpu() / 3}, truth, *rows, 11.0)
    assert_close(loss, mode, run(loss, mode, *rows, 11.0, -2.0, learnt=(), **options), truth, *rows, 11.0)


@every_mode
def test_second_derivative_is_refused(loss, mode):
    inputs = inputs_of(loss, *make_rows(4, 4, 64), learnt=("image",))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss.function(**inputs, mode=mode), inputs["image"], create_graph=True)


@every_loss
def test_reference_gives_a_second_derivative(loss):
    inputs = inputs_of(loss, *make_rows(4, 4, 64), 5.0, learnt=("image",))
    (grad,) = torch.autograd.grad(loss.function(**inputs, mode="reference"), inputs["image"], create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), inputs["image"])[0].count_nonzero()


@every_loss
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_chunked_never_holds_the_logits(loss, trained):
    if trained and "text" not in loss.learnt:
        pytest.skip("its texts are constants")
    b = B = 1024
    learnt = ("image", "text") if trained else ("image",)
    inputs = inputs_of(loss, *make_rows(b, B, 16), device="cpu", learnt=learnt)

    def evaluate(mode):
        loss.function(**inputs, ids=torch.arange(B), mode=mode).backward()

    with in_chunks_of(128):
        _, peak, products = profiled(lambda: evaluate("chunked"))
    # Two buffers of a chunk and its mask; a few copies of [b, d] and, where trained, of [B, d].
    assert peak <= 128 * B * (4 + 4 + 1) + (4 + 3 * trained) * inputs["image"].nbytes < b * B * 4 / 2
    passes = (3 if loss is CONTRASTIVE else 2) + trained
    assert products == passes * b // 128
    assert profiled(lambda: evaluate("reference"))[1] > b * B * 4, "the measure must see dense logits"


@every_loss
def test_evaluation_without_grad_takes_one_pass(loss):
    inputs = inputs_of(loss, *make_rows(20, 20, 8), dtype=torch.float64, device="cpu", learnt=loss.learnt)
    with torch.no_grad():
        assert profiled(lambda: loss.function(**inputs))[2] == 1


@pytest.mark.gpu
@every_mode
def test_text_of_another_dtype_and_rows_that_are_not_contiguous(loss, mode):
    image, text = (rows.float().to(DEVICE) for rows in make_rows(20, 30, 64, 4))
    inputs = inputs_of(loss, image, text)
    results = []
    for rows, columns in ((image, text.half()), (image.T.contiguous().T, text.half().repeat_interleave(2, 0)[::2])):
        inputs |= {"image": rows.detach().requires_grad_(), "text": columns}
        value = loss.function(**inputs, first_row=4, mode=mode)
        value.backward()
        results.append((value, inputs["image"].grad))
    assert results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[0], results[1])


def test_one_row_of_a_wider_matrix_is_copied_for_the_kernels():
    """It is contiguous whatever its stride, which the tensor memory accelerator does not take all the same."""
    assert operand(torch.ones(5, 68).half()[:1, :64]).stride() == (64, 1)


@every_loss
def test_a_number_is_a_constant_scale(loss):
    inputs = inputs_of(loss, *make_rows(6, 9, 8), 20.0, -3.0, learnt=("image",))
    expected = loss.function(**inputs)
    numbers = {name: x if x.ndim else x.item() for name, x in inputs.items()}
    assert torch.equal(loss.function(**numbers), expected)
    whole = {name: x if x.ndim else int(x) for name, x in inputs.items()}
    assert torch.equal(loss.function(**whole), expected)


@every_loss
@pytest.mark.parametrize("mode", ["reference", "chunked"])
@pytest.mark.parametrize("scale", [0, -20.0, torch.tensor(0.0), torch.tensor(-20.0)], ids=str)
def test_a_scale_that_is_not_above_zero_is_refused(loss, mode, scale):
    inputs = inputs_of(loss, *make_rows(4, 6, 64), device="cpu") | {"logit_scale": scale}
    with pytest.raises(ValueError, match=rf"logit_scale is {float(scale)}; pass the exponentiated scale"):
        loss.function(**inputs, mode=mode)


@every_loss
def test_auto_is_chunked_on_a_cpu_and_tiles_differ(loss):
    inputs = inputs_of(loss, *make_rows(20, 30, 64, half=False), device="cpu")
    assert torch.equal(loss.function(**inputs), loss.function(**inputs, mode="chunked"))
    if runs_tiles(inputs["image"]):
        assert not torch.equal(loss.function(**inputs), loss.function(**inputs, mode=loss.tiled[0]))


@pytest.mark.gpu
@every_loss
def test_compiles_whole_and_equals_eager(loss):
    results = []
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
    for function in (loss.function, torch.compile(loss.function, fullgraph=True, backend="aot_eager")):
        inputs = inputs_of(loss, *make_rows(10, 17, 64, 4), learnt=loss.learnt)
        value = function(**inputs, first_row=4, ids=torch.arange(17, device=DEVICE) % 11)
        value.backward()
        results.append((value, *(inputs[name].grad for name in loss.learnt)))
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
@every_mode
def test_operator_is_registered_consistently(loss, mode, monkeypatch):
    """As the public function calls it, with gradients and without."""
    operator = f"_{loss.name}"
    called = getattr(loss.module, operator)
    calls = []
    monkeypatch.setattr(loss.module, operator, lambda *given: (calls.append(given), called(*given))[1])
    for learnt in (loss.learnt, ("image",), ()):
        loss.function(**inputs_of(loss, *make_rows(5, 8, 64), learnt=learnt), first_row=2, mode=mode)
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(called, calls[-1], test_utils=utilities)


ROWS = torch.ones(4, 8)
BAD_INPUTS = {
    "widths differ": ({"text": torch.ones(6, 7)}, "image must be .* one d"),
    "text is a vector": ({"text": torch.ones(8)}, "image must be"),
    "no rows": ({"image": torch.ones(0, 8)}, "b > 0"),
    "rows are an array": ({"image": ROWS.numpy()}, "image must be a tensor, not ndarray"),
    "integer rows": ({"image": ROWS.long()}, "image must be floating point"),
    "scale is a vector": ({"logit_scale": torch.ones(1)}, "logit_scale must be a 0-dim tensor"),
    "scale is an integer": ({"logit_scale": torch.tensor(3)}, "logit_scale must be floating point"),
    "scale is no number": ({"logit_scale": "20"}, "logit_scale must be a number or a tensor, not str"),
    "first_row too large": ({"first_row": 3}, "image rows 3:7 must lie inside the 6 text rows"),
    "first_row negative": ({"first_row": -1}, "must lie inside"),
    "first_row a tensor": ({"first_row": torch.tensor(1)}, "first_row must be an int, not Tensor"),
    "ids too short": ({"ids": torch.arange(4)}, r"ids must be int64 \[6\]"),
    "ids not int64": ({"ids": torch.arange(6).int()}, "ids must be int64"),
    "ids a list": ({"ids": [0] * 6}, "ids must be a tensor, not list"),
    "unknown mode": ({"mode": "dense"}, "choose one of auto, reference, chunked"),
    "another device": ({"text": torch.ones(6, 8, device="meta")}, "text is on meta"),
}
ITS_OWN = {
    "first_row in the bank": ("contrastive", {"bank": 1, "first_row": 2}, "2:6 must lie inside the 5 text rows before"),
    "bank negative": ("contrastive", {"bank": -1}, "bank is -1"),
    "bank a float": ("contrastive", {"bank": 1.0}, "bank must be an int, not float"),
    "no chunk": ("contrastive", {"chunk_mib": 0}, "chunk_mib is 0; pass 1 or more"),
    "no chunk of weights": ("sigmoid", {"chunk_mib": -5}, "chunk_mib is -5; pass 1 or more"),
    "reduction": ("contrastive", {"gradient_reduction": "avg"}, "gradient_reduction is 'avg'; choose sum or mean"),
    "reduction of sigmoid": ("sigmoid", {"gradient_reduction": "avg"}, "gradient_reduction is 'avg'"),
    "bias is a vector": ("sigmoid", {"logit_bias": torch.ones(1)}, "logit_bias must be a 0-dim tensor"),
    "bias is an integer": ("sigmoid", {"logit_bias": torch.tensor(3)}, "logit_bias must be floating point"),
    "bias is no number": ("sigmoid", {"logit_bias": None}, "logit_bias must be a number or a tensor, not NoneType"),
    "trained text": ("image_to_text", {"text": torch.ones(6, 8, requires_grad=True)}, r"pass text\.detach\(\)"),
    "batch below the rows": ("image_to_text", {"batch": 3}, "batch is 3, but there are 4 image and 6 text rows"),
    "batch above the texts": ("image_to_text", {"batch": 7}, "batch is 7, but"),
}
CASES = [
    *(pytest.param(name, *case, id=f"{name}, {what}") for name in LOSSES for what, case in BAD_INPUTS.items()),
    *(pytest.param(*case, id=what) for what, case in ITS_OWN.items()),
]


@pytest.mark.parametrize(("name", "change", "message"), CASES)
def test_bad_input_is_one_clear_error(name, change, message):
    inputs = inputs_of(LOSSES[name], ROWS, torch.ones(6, 8), device="cpu")
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        LOSSES[name].function(**inputs | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("loss", "mode"), [case.values for case in ALL_MODES if case.values[1] != "chunked"], ids=str)
@pytest.mark.parametrize(
    ("d", "dtype", "runs", "message"),
    [
        (56, torch.float32, True, "rows of width 56"),
        (68, torch.float32, True, "rows of width 68"),
        (4104, torch.float32, True, "rows of width 4104"),
        (64, torch.float64, True, "float64 rows"),
        (64, torch.float32, False, r"rows on cpu .* capability 9\.0 .* use mode='chunked'"),
    ],
)
def test_kernels_refuse_what_they_cannot_take(loss, mode, d, dtype, runs, message, monkeypatch):
    monkeypatch.setattr(pairs, "runs_tiles", lambda rows: runs)
    function = partial(loss.function, **inputs_of(loss, torch.ones(4, d), torch.ones(4, d), dtype=dtype, device="cpu"))
    with pytest.raises(ValueError, match=f"mode '{mode}' cannot take {message}"):
        function(mode=mode)


def test_ids_are_numbered_without_changing_what_is_equal():
    ids = torch.tensor([5, -3, 5, 2**62, -3, 0, 2**62 + 1])
    dense = pairs.dense_ids(ids)
    assert dense.dtype == torch.int32
    assert torch.equal(dense[:, None] == dense, ids[:, None] == ids)
