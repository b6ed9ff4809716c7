"""Attention on packed qkv: hard inputs, backends and messages; tests/kernels/test_cards.py has the rest."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from textlock.kernels import attention as module
from textlock.kernels import attention_libraries
from textlock.kernels.attention import attention, attention_backward, reference, rotate
from textlock.kernels.tiles import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD_DIM = 64

needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="the kernels need a GPU or TRITON_INTERPRET=1"
)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_rope(tokens, *, images=None):
    """Return a table for all images, or one for each."""
    shape = (tokens,) if images is None else (images, tokens)
    angles = 6.3 * torch.rand(*shape, HEAD_DIM // 2, generator=torch.Generator().manual_seed(0))
    angles[..., 0, :] = 0  # the class token
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(DEVICE)


def make_inputs(tokens, heads, dtype, *, batch=2, logit_scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, HEAD_DIM, generator=generator)
    qkv[:, :, :2] *= logit_scale
    d_out = torch.randn(batch, tokens, heads * HEAD_DIM, generator=generator)
    return qkv.to(DEVICE, dtype), d_out.to(DEVICE, dtype)


def truth_of(qkv, d_out, rope):
    """Return what autograd gets from the formula in float64."""
    leaf = qkv.double().requires_grad_()
    out, lse = reference(leaf, rope)
    out.backward(d_out.double())
    d_bias = leaf.grad.sum((0, 1)).flatten()
    return {"out": out.detach(), "lse": lse.detach(), "d_qkv": leaf.grad, "d_bias": d_bias}


def torch_of(qkv, d_out, rope):
    """Return what the plain modules get in the inputs' own type."""
    leaf = qkv.detach().requires_grad_()
    query_key, value = leaf.split((2, 1), dim=2)
    if rope is not None:
        query_key = rotate(query_key, rope)
    query, key = query_key.transpose(1, 3).unbind(2)
    out = F.scaled_dot_product_attention(query, key, value.squeeze(2).transpose(1, 2)).transpose(1, 2).flatten(2)
    out.backward(d_out)
    _, lse = reference(qkv, rope)
    d_bias = leaf.grad.float().sum((0, 1)).flatten()
    return {"out": out.detach(), "lse": lse, "d_qkv": leaf.grad, "d_bias": d_bias}


def kernels_of(qkv, d_out, rope):
    out, lse = module._launch_forward(qkv, rope)
    d_qkv, d_bias = module._launch_backward(d_out, qkv, rope, out, lse)
    return {"out": out, "lse": lse, "d_qkv": d_qkv, "d_bias": d_bias}


def assert_as_good_as_torch(result, qkv, d_out, rope):
    truth, by_torch = truth_of(qkv, d_out, rope), torch_of(qkv, d_out, rope)
    for name, exact in truth.items():
        error, bound = ((x[name].double() - exact).abs().max().item() for x in (result, by_torch))
        least = 1e-6 * exact.abs().max().item()
        assert error <= 2 * bound + least, f"{name}: error {error:.2e}, torch's {bound:.2e}"


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("tokens", [5, 70, 197])
def test_logits_in_the_hundreds_do_not_overflow(tokens):
    qkv, d_out = make_inputs(tokens, 1, torch.float16, logit_scale=10.0)
    rope = make_rope(tokens)
    assert truth_of(qkv, d_out, rope)["lse"].max() > 100
    assert_as_good_as_torch(kernels_of(qkv, d_out, rope), qkv, d_out, rope)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # in rows that are not stored
@pytest.mark.parametrize("tokens", [5, 70])
def test_logits_far_below_zero_do_not_overflow(tokens):
    """Where every logit is near -200, a padded key with its logit of 0 would weigh exp(200)."""
    qkv, d_out = make_inputs(tokens, 1, torch.float16)
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 40.0, -40.0
    assert truth_of(qkv, d_out, None)["lse"].max() < -100
    assert_as_good_as_torch(kernels_of(qkv, d_out, None), qkv, d_out, None)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("tokens", [5, 50, 70, 197])
def test_nothing_beyond_the_last_token_is_read_or_written(tokens):
    """Each program gets one image in front of one of nan, in every tensor."""
    heads, width = 2, 2 * HEAD_DIM
    qkv, d_out = make_inputs(tokens, heads, torch.float16, batch=1)
    rope = make_rope(tokens)
    expected = kernels_of(qkv, d_out, rope)

    def guarded(*shape, dtype=torch.float16):
        return torch.full((2, *shape), torch.nan, dtype=dtype, device=DEVICE)

    packed, gradient, out, d_qkv = (
        guarded(tokens, *shape) for shape in ((3, heads, HEAD_DIM), (width,), (width,), (3, heads, HEAD_DIM))
    )
    table = guarded(tokens, HEAD_DIM // 2, 2, dtype=torch.float32)
    lse = guarded(heads, tokens, dtype=torch.float32)
    d_bias = guarded(3 * width, dtype=torch.float32)
    of_rows = guarded(heads, 2, -(-tokens // 16) * 16, dtype=torch.float32)
    packed[0], gradient[0], table[0] = qkv[0], d_out[0], rope
    sizes = {"T": tokens, "H": heads, "HEAD": HEAD_DIM, "ROPE_STRIDE": table.stride(0), "BLOCK": 64} | module.OPTIONS
    sizes["PARTS"] = module._column_parts(tokens, module.FORWARD_PART)
    module.attention_kernel[(heads,)](packed, table, out, lse, HEAD_DIM**-0.5, **sizes)
    sizes["PARTS"] = module._column_parts(tokens, module.BACKWARD_PART)
    module.attention_backward_kernel[(heads,)](
        packed, table, out, lse, gradient, d_qkv, d_bias, of_rows, HEAD_DIM**-0.5, **sizes
    )
    for name, written in (("out", out), ("lse", lse), ("d_qkv", d_qkv), ("d_bias", d_bias)):
        assert written[1].isnan().all(), name
        assert torch.equal(written[0].flatten(), expected[name].flatten()), name
    assert of_rows[1].isnan().all()


@pytest.mark.parametrize("largest", [module.FORWARD_PART, module.BACKWARD_PART])
def test_parts_cover_the_columns(largest):
    for tokens in range(1, module.LONGEST + 1):
        parts = module._column_parts(tokens, largest)
        assert {size for _, size, _ in parts} <= {128, 64, 32, 16} and parts[0][1] <= largest
        assert parts[0][0] == 0
        assert all(first + size == following for (first, size, _), (following, *_) in pairwise(parts))
        end = parts[-1][0] + parts[-1][1]
        assert tokens <= end < tokens + 16
        assert [whole for *_, whole in parts] == [True] * (len(parts) - 1) + [end == tokens]


def by_name(backend, qkv, d_out, rope):
    out, lse = attention(qkv, rope, backend=backend)
    d_qkv, d_bias = attention_backward(d_out, qkv, rope, out, lse, backend=backend)
    return {"out": out, "lse": lse, "d_qkv": d_qkv, "d_bias": d_bias}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("turned", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize(("tokens", "heads"), [(5, 3), (50, 1), (197, 2), (257, 1)])
def test_float64_is_exact(tokens, heads, turned, backend):
    qkv, d_out = make_inputs(tokens, heads, torch.float64)
    rope = make_rope(tokens) if turned else None
    result, truth = by_name(backend, qkv, d_out, rope), truth_of(qkv, d_out, rope)
    for name, exact in truth.items():
        if result[name] is not None:
            assert result[name].dtype == torch.float64, name
            torch.testing.assert_close(result[name], exact, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_float64_is_exact_with_a_table_for_each_image(backend):
    qkv, d_out = make_inputs(50, 3, torch.float64, batch=3)
    rope = make_rope(50, images=3)
    result, truth = by_name(backend, qkv, d_out, rope), [truth_of(qkv[[n]], d_out[[n]], rope[n]) for n in range(3)]
    for name in ("out", "lse", "d_qkv"):
        torch.testing.assert_close(result[name], torch.cat([image[name] for image in truth]), msg=name)


class WrittenByHand(torch.autograd.Function):
    """How a block calls these functions."""

    @staticmethod
    def forward(ctx, qkv, bias, rope, backend):
        packed = qkv + bias.view(qkv.shape[2:])
        out, lse = attention(packed, rope, backend=backend)
        ctx.save_for_backward(packed, rope, out, lse)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx, d_out):
        packed, rope, out, lse = ctx.saved_tensors
        d_qkv, d_bias = attention_backward(d_out.contiguous(), packed, rope, out, lse, backend=ctx.backend)
        return d_qkv, d_bias, None, None


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("images", [None, 2], ids=["one table", "a table an image"])
def test_a_function_written_by_hand_has_the_gradient_of_its_differences(images, backend):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 3, 2, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(48, dtype=torch.float64, generator=generator, requires_grad=True)
    rope = make_rope(3, images=images)[..., :4, :].contiguous().cpu()
    assert torch.autograd.gradcheck(lambda *leaves: WrittenByHand.apply(*leaves, rope, backend), (qkv, bias))


NAMED = [
    *(pytest.param("sdpa", dtype, t) for dtype in (torch.float32, torch.bfloat16, torch.float16) for t in (50, 257)),
    pytest.param("sdpa", torch.bfloat16, 197),
    # bfloat16, which the interpreter has wrong; 257 tokens are too many for these kernels.
    *(pytest.param("triton", dtype, 197, marks=on_a_gpu) for dtype in (torch.bfloat16, torch.float16)),
    *(pytest.param("triton", torch.bfloat16, t, marks=on_a_gpu) for t in (17, 256)),
    *(
        pytest.param(name, torch.bfloat16, t, marks=on_a_gpu)
        for name in ("flash-attn", "flash-attn-4")
        for t in (197, 257)
    ),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype", "tokens"), NAMED, ids=str)
def test_backends_are_as_exact_as_torch(backend, dtype, tokens):
    if backend.startswith("flash"):
        try:
            attention_libraries.flash_attn(backend)
        except ValueError as missing:
            pytest.skip(str(missing))
    qkv, d_out = make_inputs(tokens, 2, dtype)
    rope = make_rope(tokens)
    result = by_name(backend, qkv, d_out, rope)
    assert result["out"].dtype == result["d_qkv"].dtype == dtype
    assert result["d_bias"].dtype == torch.float32
    if result["lse"] is None:
        assert backend == "sdpa"
        del result["lse"]
    truth, by_torch = truth_of(qkv, d_out, rope), torch_of(qkv, d_out, rope)
    for name in result:
        error, bound = ((x[name].double() - truth[name]).abs().max().item() for x in (result, by_torch))
        assert error <= 2 * bound + 1e-6 * truth[name].abs().max().item(), name


def test_rotation_by_its_formula_and_back():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(7, 4, generator=torch.Generator().manual_seed(1))
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1)
    turned = rotate(x, rope)
    cosine, sine = (table.double()[:, None] for table in rope.unbind(-1))
    torch.testing.assert_close(turned[..., 0::2], x[..., 0::2] * cosine - x[..., 1::2] * sine)
    torch.testing.assert_close(turned[..., 1::2], x[..., 0::2] * sine + x[..., 1::2] * cosine)
    torch.testing.assert_close(rotate(turned, rope, inverse=True), x, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("between", [(), (2,), (2, 3)], ids=str)
def test_rotation_by_a_table_for_each_image(between, inverse):
    x = torch.randn(3, 7, *between, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rope = make_rope(7, images=3)
    image_by_image = [rotate(x[[n]], rope[n], inverse=inverse) for n in range(3)]
    assert torch.equal(rotate(x, rope, inverse=inverse), torch.cat(image_by_image))


GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda kernel: kernel.name)
def test_operators_of_a_gpu_take_what_they_are_given(kernel):
    """Without a GPU only types and shapes can be followed through them."""
    with mock.patch.object(attention_libraries, "_sdpa_kernel", return_value=kernel), FakeTensorMode():
        qkv = torch.empty(2, 197, 3, 12, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        rope = torch.empty(197, HEAD_DIM // 2, 2, device="cuda")
        out, lse = attention(qkv, rope, backend="sdpa")
        assert out.shape == (2, 197, 768) and out.is_contiguous()
        assert lse.shape == (2, 12, 197) and lse.dtype == torch.float32
        d_qkv, d_bias = attention_backward(out, qkv, rope, out, lse, backend="sdpa")
        assert d_qkv.shape == qkv.shape and d_qkv.dtype == qkv.dtype
        assert d_bias.shape == (2304,) and d_bias.dtype == torch.float32


@pytest.mark.gpu
def test_a_kernel_that_keeps_nothing_is_run_again():
    """As for float32 on a GPU."""
    qkv, d_out = make_inputs(50, 2, torch.float32)
    rope = make_rope(50)
    out, _ = attention(qkv, rope, backend="sdpa")
    d_qkv, _ = attention_backward(d_out, qkv, rope, out, None, backend="sdpa")
    torch.testing.assert_close(d_qkv.double(), truth_of(qkv, d_out, rope)["d_qkv"], rtol=1e-4, atol=1e-5)


def flash_attn_2():
    """Stand in for flash-attn 2.8: the argument lists of its interface, the arithmetic of a CPU."""

    def forward(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax):
        assert (dropout_p, causal, left, right, softcap, alibi_slopes) == (0.0, False, -1, -1, 0.0, None)
        assert softmax_scale == HEAD_DIM**-0.5 and not return_softmax
        out, lse = module._sdpa(module._Heads(*(x.transpose(1, 2) for x in (q, k, v))))
        return out.transpose(1, 2), lse, None, None

    def backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        left,
        right,
        softcap,
        alibi,
        deterministic,
    ):
        assert (dropout_p, causal, left, right, softcap, alibi) == (0.0, False, -1, -1, 0.0, None)
        assert softmax_scale == HEAD_DIM**-0.5 and not deterministic
        d_out, out, *heads = (x.transpose(1, 2) for x in (d_out, out, q, k, v))
        for x, gradient in zip(
            (dq, dk, dv), module._sdpa_backward(d_out, module._Heads(*heads), out, lse), strict=True
        ):
            x.copy_(gradient.transpose(1, 2))

    return {"_wrapped_flash_attn_forward": forward, "_wrapped_flash_attn_backward": backward}


def flash_attn_4():
    """Stand in for flash-attn-4 4.0, likewise."""

    def forward(q, k, v, *, return_lse):
        assert return_lse
        out, lse = module._sdpa(module._Heads(*(x.transpose(1, 2) for x in (q, k, v))))
        return out.transpose(1, 2), lse, None, None, None

    def backward(q, k, v, out, dout, lse):
        d_out, out, *heads = (x.transpose(1, 2) for x in (dout, out, q, k, v))
        return tuple(x.transpose(1, 2) for x in module._sdpa_backward(d_out, module._Heads(*heads), out, lse))

    return {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}


PACKAGES = [
    pytest.param("flash-attn", "flash_attn.flash_attn_interface", flash_attn_2, id="2.x"),
    pytest.param("flash-attn-4", "flash_attn.cute.interface", flash_attn_4, id="4"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what stands in for the package computes on a CPU")
@pytest.mark.parametrize(("backend", "name", "functions"), PACKAGES)
def test_flash_attn_is_called_as_it_asks(backend, name, functions):
    stand_in = ModuleType(name)
    vars(stand_in).update(functions())
    qkv, d_out = make_inputs(50, 2, torch.float32)
    rope = make_rope(50)
    parents = {name.rsplit(".", n)[0]: ModuleType("") for n in range(1, name.count(".") + 1)}
    with mock.patch.dict(sys.modules, parents | {name: stand_in}):
        result = by_name(backend, qkv, d_out, rope)
    for name, exact in truth_of(qkv, d_out, rope).items():
        torch.testing.assert_close(result[name].double(), exact, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("backend", "name", "functions"), PACKAGES)
def test_a_package_that_is_missing_is_named(backend, name, functions):
    qkv, _ = make_inputs(5, 1, torch.float32)
    with (
        mock.patch.dict(sys.modules, {"flash_attn": None}),
        pytest.raises(ValueError, match=f"backend '{backend}' needs {name}.*: install {backend}, or choose"),
    ):
        attention(qkv, None, backend=backend)


def chosen_on_a_gpu(capability, *, tokens=197, head_dim=64, dtype=torch.bfloat16, measured=None):
    qkv = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(2, tokens, 3, 12, head_dim))
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA H100 80GB HBM3"),
        mock.patch.dict(module.MEASURED, measured or {}, clear=True),
    ):
        return module._chosen("auto", qkv)


def test_auto_keeps_its_rule():
    assert chosen_on_a_gpu((9, 0)) == chosen_on_a_gpu((10, 0)) == "triton"
    assert chosen_on_a_gpu((9, 0), tokens=256, dtype=torch.float16) == "triton"
    for other in ({"tokens": 257}, {"head_dim": 32}, {"dtype": torch.float32}):
        assert chosen_on_a_gpu((9, 0), **other) == "sdpa"
    assert chosen_on_a_gpu((8, 0)) == chosen_on_a_gpu((7, 5)) == "sdpa"
    assert module._chosen("auto", torch.empty(1, 5, 3, 1, 64)) == "sdpa"


def test_auto_prefers_what_was_measured():
    table = {("NVIDIA H100 80GB HBM3", 197): "flash-attn-4", ("another GPU", 50): "sdpa"}
    assert chosen_on_a_gpu((9, 0), measured=table) == "flash-attn-4"
    assert chosen_on_a_gpu((9, 0), tokens=50, measured=table) == "triton"
    assert chosen_on_a_gpu((9, 0), dtype=torch.float32, measured=table) == "sdpa"
    long = {("NVIDIA H100 80GB HBM3", 577): "flash-attn"}
    assert chosen_on_a_gpu((9, 0), tokens=577, measured=long) == "flash-attn"


BAD = [
    pytest.param({"backend": "cudnn"}, r"backend 'cudnn' is unknown: choose from auto, reference", id="backend"),
    pytest.param({"qkv": torch.zeros(2, 5, 1, 64)}, r"shape \[2, 5, 1, 64\].*give a contiguous", id="rank"),
    pytest.param({"qkv": torch.zeros(2, 3, 5, 1, 64).transpose(1, 2)}, r"give a contiguous", id="strides"),
    pytest.param({"rope": torch.zeros(4, 32, 2)}, r"rope is .* of shape \[5, 32, 2\]", id="short table"),
    pytest.param({"rope": torch.zeros(3, 5, 32, 2)}, r"\[5, 32, 2\], or \[2, 5, 32, 2\]", id="table of three images"),
    pytest.param({"rope": torch.zeros(5, 32, 2).double()}, r"rope is torch.float64", id="table's type"),
    pytest.param(
        {"backend": "triton", "qkv": torch.zeros(2, 5, 3, 1, 64)}, r"takes float16 and bfloat16", id="float32"
    ),
]


@pytest.mark.parametrize(("changed", "sentence"), BAD)
def test_bad_input_is_refused(changed, sentence):
    arguments = {"qkv": torch.zeros(2, 5, 3, 1, 64), "rope": None, "backend": "auto"} | changed
    with pytest.raises(ValueError, match=sentence):
        attention(arguments["qkv"], arguments["rope"], backend=arguments["backend"])


@pytest.mark.parametrize(("shape", "takes"), [((1, 257, 3, 1, 64), "257 and 64"), ((1, 5, 3, 1, 32), "5 and 32")])
def test_triton_refuses_long_sequences_and_other_heads(shape, takes):
    qkv = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=shape)
    with pytest.raises(ValueError, match=f"up to 256 tokens and heads of 64 channels, not {takes}"):
        module._chosen("triton", qkv)


def test_triton_refuses_old_gpus():
    qkv = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float16, shape=(1, 5, 3, 1, 64))
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)),
        pytest.raises(ValueError, match=r"'triton' takes GPUs of compute capability 8.0 and later, not 7.5: choose"),
    ):
        module._chosen("triton", qkv)


def test_triton_refuses_what_another_backend_left_without_lse():
    qkv, rows = torch.zeros(1, 5, 3, 1, 64), torch.zeros(1, 5, 64)
    with (
        mock.patch.object(module, "_chosen", return_value="triton"),
        pytest.raises(ValueError, match="lse is None: give attention_backward the backend that attention had"),
    ):
        attention_backward(rows, qkv, None, rows, None, backend="triton")


@pytest.mark.parametrize("name", ["d_out", "out"])
@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 5, 65), torch.zeros(2, 5, 64).double(), torch.zeros(5, 2, 64).transpose(0, 1)]
)
def test_backward_refuses_a_gradient_of_another_layout(name, bad):
    rows = {"d_out": torch.zeros(2, 5, 64), "out": torch.zeros(2, 5, 64)} | {name: bad}
    with pytest.raises(ValueError, match=f"^{name} is .*: give a contiguous torch.float32 of shape"):
        attention_backward(rows["d_out"], torch.zeros(2, 5, 3, 1, 64), None, rows["out"], None)
