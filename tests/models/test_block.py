"""The fused block against torch's own operations under autograd: values, gradients, and what is kept between."""

from dataclasses import replace
from typing import get_args
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from textlock.models import block as module
from textlock.models.block import Block, BlockShape, ComputeCopies, Keep, Stream, kept_bytes, weight_gradient
from textlock.models.vision import VISION_CONFIGS, ModelConfig, VisionTower, build_vision_tower, rotary_table
from textlock.tests.kernels.rounding import sum_rounding

TIERS = get_args(Keep)
KINDS = {
    "eva02": {"gated": True, "sub_norm": True, "layer_scale": None},
    "swiglu": {"gated": True, "sub_norm": False, "layer_scale": None},
    "gelu": {"gated": False, "sub_norm": False, "layer_scale": None},
    "layer-scale": {"gated": False, "sub_norm": False, "layer_scale": 0.3},
    "eva02-layer-scale": {"gated": True, "sub_norm": True, "layer_scale": 0.3},
}
WIDTH, HEADS, HIDDEN, TOKENS = 16, 2, 12, 5
MICRO = "eva02_micro_patch8_32"


def make_block(kind, *, shape=(WIDTH, HEADS, HIDDEN), seed=0, dtype=torch.float64, **arguments):
    width, heads, hidden = shape
    block = Block(BlockShape(width=width, heads=heads, hidden=hidden, **KINDS[kind]), **arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=2 / shape[0] ** 0.5, generator=generator)
    return block.to(dtype)


def make_stream(*, first, dtype=torch.float64, images=3, tokens=TOKENS, width=WIDTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((images, tokens, width), (images, tokens, width), (width,))
    x, branch, bias = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    tensors = (x,) if first else (x, branch, bias)
    return Stream(*(tensor.requires_grad_() for tensor in tensors))


def make_rope(images=None, *, tokens=TOKENS, head_dim=WIDTH // HEADS, seed=2):
    shape = (tokens, head_dim // 2) if images is None else (images, tokens, head_dim // 2)
    angles = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def direction_of(total):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(total.shape, dtype=torch.float64, generator=generator).to(total)


def outcome(block, stream, rope, **arguments):
    """Return values and gradients by name."""
    result = block(stream, rope, **arguments)
    total = result.total()
    inputs = {f"stream.{name}": value for name, value in stream._asdict().items() if value is not None}
    inputs |= dict(block.named_parameters())
    gradients = torch.autograd.grad(total, list(inputs.values()), direction_of(total))
    return {"x": result.x, "branch": result.branch, **dict(zip(inputs, gradients, strict=True))}


def assert_same(result, expected, **tolerance):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_bits(result, expected):
    assert all(torch.equal(value, expected[name]) for name, value in result.items())


@pytest.mark.parametrize("keep", TIERS)
@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
@pytest.mark.parametrize("turned", [None, "one table", "a table for each image"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_autograd(kind, turned, first, keep):
    rope = None if turned is None else make_rope(3 if "each" in turned else None)
    plain, fused = (make_block(kind, implementation=form) for form in ("plain", "fused"))
    stream = make_stream(first=first)
    expected = outcome(plain, stream, rope)
    assert_same(outcome(fused, stream, rope, keep=keep), expected, rtol=1e-11, atol=1e-13)


def kept_tensors(run):
    """Return what ``run`` keeps for its backward pass, every storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storage.nbytes() for storage in kept.values()), result


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16 next to a float32 stream", "float64"])
@pytest.mark.parametrize("keep", TIERS)
@pytest.mark.parametrize("kind", ["eva02", "gelu"])
def test_kept_bytes_are_those_predicted(kind, keep, precision):
    compute = getattr(torch, precision.split()[0])
    residual = torch.float32 if "stream" in precision else compute
    block = make_block(kind, dtype=torch.float64 if compute == torch.float64 else torch.float32)

    def bytes_of(images):
        x, branch, bias = make_stream(first=False, images=images)
        stream = Stream(x.detach().to(residual).requires_grad_(), branch.detach().to(compute), bias.detach())
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
            return kept_tensors(lambda: block(stream, make_rope(), keep))[0]

    expected = kept_bytes(block, TOKENS, keep, residual=residual, compute=compute)
    assert bytes_of(5) - bytes_of(3) == 2 * expected


@pytest.mark.parametrize(
    ("keep", "layers"),
    [("all", []), ("no-mlp", ["first"]), ("lean", ["first", "qkv"]), ("block", ["first", "qkv", "out"])],
)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_products_are_those_of_the_table(kind, keep, layers):
    block, stream = make_block(kind), make_stream(first=False)
    weights = {"first": block.mlp.first.weight, "qkv": block.qkv.weight, "out": block.out_proj.weight}
    total = block(stream, make_rope(), keep).total()
    with FlopCounterMode(display=False) as counter:
        total.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    rows = 3 * TOKENS
    of_gradients = 2 * sum(weight.numel() for weight in (*weights.values(), block.mlp.fc2.weight))
    recomputed = sum(weights[name].numel() for name in layers)
    assert products == 2 * rows * (of_gradients + recomputed)


def kept_by_blocks(tower, keep, dtype):
    tokens = tower.config.tokens
    return sum(kept_bytes(block, tokens, keep, residual=dtype, compute=dtype) for block in tower.blocks)


def test_kept_bytes_of_the_base_tower():
    """The table of tiers, MB an image in bfloat16."""
    with torch.device("meta"):
        tower = build_vision_tower("eva02_base_patch16_224")
    table = [round(kept_by_blocks(tower, keep, torch.bfloat16) / 1e6, 1) for keep in TIERS]
    assert table == [41.3, 21.9, 11.0, 3.7]


def test_the_tower_keeps_little_outside_of_its_blocks():
    """The patches, the pooled tokens and the head's few rows; tests/engine/test_plan.py has what each tier keeps."""
    tower = build_vision_tower("eva02_tiny_patch8_64")
    few, more = (kept_tensors(lambda n=n: tower(torch.zeros(n, 64, 64, 3, dtype=torch.uint8)))[0] for n in (3, 5))
    outside = (more - few) / 2 - kept_by_blocks(tower, "all", torch.float32)
    config = tower.config
    patches, tokens = config.grid**2 * 3 * config.patch_size**2 * 4, config.tokens * config.width * 4
    assert patches + tokens <= outside < 1.2 * (patches + tokens) + 64 * config.width * 4


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_add_to_their_main_gradient(kind):
    stream, rope = make_stream(first=False), make_rope()
    block = make_block(kind)
    expected = outcome(block, stream, rope)
    matrices = {
        name: parameter
        for name, parameter in block.named_parameters()
        # A layer scale stands between the product and the parameter: autograd carries the gradient through it.
        if parameter.ndim == 2 and (block.scale1 is None or name.split(".")[-2] not in ("out_proj", "fc2"))
    }
    assert len(matrices) == (4 if block.scale1 is None else 2)
    for parameter in matrices.values():
        parameter.main_grad = torch.ones_like(parameter)
    for _ in range(2):  # two micro-batches
        total = block(stream, rope).total()
        total.backward(direction_of(total))
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (name in matrices), name
        gradient = parameter.main_grad - 1 if name in matrices else parameter.grad
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_weight_gradients_are_summed_wide(dtype):
    generator = torch.Generator().manual_seed(0)
    d_y, x = (torch.randn(3, 50, n, dtype=torch.float64, generator=generator).to(dtype) for n in (4, 6))
    truth = torch.einsum("bti,btj->ij", d_y.double(), x.double())
    gradient = weight_gradient(d_y, x, None)
    assert gradient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    largest = torch.einsum("bti,btj->ij", d_y.double().abs(), x.double().abs()).max().item()
    rounding = sum_rounding(150) * largest
    torch.testing.assert_close(gradient.double(), truth, rtol=0, atol=rounding)
    main_grad = torch.full_like(gradient, 2.0)
    assert weight_gradient(d_y, x, main_grad) is None
    torch.testing.assert_close(main_grad.double(), truth + 2, rtol=0, atol=rounding)


def test_frozen_matrices_get_no_gradient():
    block, stream, rope = make_block("eva02"), make_stream(first=False), make_rope()
    expected = outcome(block, stream, rope)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    block.norm2.weight.requires_grad_()
    with mock.patch.object(module, "weight_gradient") as product:
        total = block(stream, rope).total()
        total.backward(direction_of(total))
    product.assert_not_called()
    torch.testing.assert_close(block.norm2.weight.grad, expected["norm2.weight"])
    torch.testing.assert_close(stream.branch.grad, expected["stream.branch"])


def autocast_run(tower, images):
    for parameter in tower.parameters():
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = tower(images)
    embeddings.float().square().sum().backward()
    return [embeddings.detach(), *(parameter.grad for parameter in tower.parameters())]


def tower_of(**arguments):
    torch.manual_seed(0)
    return build_vision_tower(MICRO, **arguments)


@pytest.fixture
def tower():
    tower = tower_of()
    torch.nn.init.normal_(tower.pool.latent, std=0.5)  # it starts at zero, and so would the gradients of the keys
    return tower


def random_images(count=4):
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_copies_are_made_once_and_change_nothing(tower):
    images = random_images()
    expected = autocast_run(tower, images)
    copies = ComputeCopies(tower, torch.bfloat16)
    with copies, mock.patch.object(module, "_source_of", wraps=module._source_of) as source_of:
        for _ in range(2):
            assert all(map(torch.equal, autocast_run(tower, images), expected))
        seen = {id(source_of(parameter, torch.bfloat16)) for parameter in tower.blocks[0].qkv.parameters()}
        assert seen == {id(parameter.compute_copy) for parameter in tower.blocks[0].qkv.parameters()}
    assert not any(hasattr(parameter, "compute_copy") for parameter in tower.parameters())

    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.01)
    changed = autocast_run(tower, images)
    assert not torch.equal(changed[0], expected[0])
    with copies:
        assert all(map(torch.equal, autocast_run(tower, images), changed))


def test_a_backward_pass_after_its_weights_have_changed_is_refused(tower):
    copies = ComputeCopies(tower, torch.bfloat16)
    with copies, torch.autocast("cpu", torch.bfloat16):
        embeddings = tower(random_images())
    with copies, pytest.raises(RuntimeError, match="modified by an inplace operation"):
        embeddings.float().sum().backward()


LOW_PRECISION = [
    pytest.param("eva02", True, True, id="eva02, first block"),
    pytest.param("eva02", False, True, id="eva02"),
    pytest.param("eva02", False, False, id="eva02 without rope"),
    pytest.param("gelu", True, False, id="gelu, first block"),
    pytest.param("layer-scale", False, True, id="layer scale"),
]


@pytest.mark.parametrize(("kind", "first", "turned"), LOW_PRECISION)
def test_low_precision_is_as_exact_as_torchs(device, kind, first, turned):
    """Both in bfloat16 with a float32 stream, against float64; the block may lose twice what the plain form loses."""
    shape, tokens = (128, 2, 176), 37
    rope = make_rope(tokens=tokens, head_dim=64) if turned else None
    drawn = make_stream(first=first, images=5, tokens=tokens, width=shape[0])
    types = (torch.float32, torch.bfloat16, torch.float32)
    parts = [part.detach().to(dtype) for part, dtype in zip(drawn, types, strict=True) if part is not None]
    exact_stream = Stream(*(part.double().requires_grad_() for part in parts))
    low = Stream(*(part.to(device).requires_grad_() for part in parts))
    truth = outcome(make_block(kind, shape=shape, implementation="plain"), exact_stream, rope)
    rope = None if rope is None else rope.to(device)

    def run(form, keep="all"):
        block = make_block(kind, shape=shape, implementation=form, dtype=torch.float32).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return outcome(block, low, rope, keep=keep)

    plain, fused = run("plain"), run("fused")
    for name, exact in truth.items():
        error, bound = ((found[name].double().cpu() - exact).norm() for found in (fused, plain))
        assert error <= 2 * bound + 1e-6 * exact.norm(), f"{name}: {error / exact.norm():.2e}"
    for keep in TIERS[1:]:
        assert_same_bits(run("fused", keep), fused)


@pytest.mark.parametrize("residual", ["auto", "fp32"])
def test_stream_is_of_the_asked_type(residual):
    tower = tower_of(pooling="mean", residual=residual)
    seen = []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.autocast("cpu", torch.bfloat16):
        tower(random_images())
    assert {stream.x.dtype for stream in seen} == {torch.float32 if residual == "fp32" else torch.bfloat16}
    assert seen[1].branch.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_block_is_the_plain_one():
    stream, rope = make_stream(first=False), make_rope()
    plain, compiled = (make_block("eva02-layer-scale", implementation=form) for form in ("plain", "compile"))
    expected = outcome(plain, stream, rope)
    for keep in ("all", "block"):
        assert_same(outcome(compiled, stream, rope, keep=keep), expected, rtol=1e-10, atol=1e-12)


def test_plain_block_recomputes_where_it_keeps_only_its_input():
    stream, rope = make_stream(first=False, images=20), make_rope()
    block = make_block("eva02", implementation="plain")
    least, result = kept_tensors(lambda: block(stream, rope, "block"))
    most, _ = kept_tensors(lambda: block(stream, rope))
    assert least < most / 5
    assert_same(outcome(block, stream, rope, keep="block"), outcome(block, stream, rope), rtol=0, atol=0)
    assert torch.equal(result.x, block(stream, rope).x)


SMALL_VIT = {"image_size": 32, "patch_size": 8, "width": 64, "heads": 1, "hidden": 96, "depth": 2}


@pytest.mark.parametrize(
    "config",
    [VISION_CONFIGS[MICRO], replace(VISION_CONFIGS["vit_base_patch16_224"], **SMALL_VIT)],
    ids=["eva02", "vit"],
)
def test_kept_patches_keep_their_positions(config):
    torch.manual_seed(0)
    tower = VisionTower(config, ModelConfig(pooling="mean", kept_patches=5)).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(7)
    kept = tower._draw_tokens(3)
    assert kept.shape == (3, 6) and (kept[:, 0] == 0).all() and (kept.diff(dim=1) > 0).all()
    torch.manual_seed(7)
    dropped = tower.train()(images)

    # The same images one by one, each through a tower that has no other patches.
    tower.eval()
    rope = None if config.rotary_grid is None else rotary_table(config)
    for image, numbers, embedding in zip(images, kept, dropped, strict=True):
        patches = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)[numbers[1:] - 1]
        tokens = torch.cat((tower.class_token[0], tower.patch_embed(patches))) + tower.position[0, numbers]
        stream = Stream(tokens[None])
        for block in tower.blocks:
            stream = block(stream, None if rope is None else rope[numbers])
        tokens = stream.total() if tower.norm is None else tower.norm(stream.total())
        torch.testing.assert_close(embedding, tokens[0, 1:].mean(dim=0))


def test_kept_patches_are_for_training_alone():
    whole, part = tower_of(), tower_of(kept_patches=3)
    images = random_images()
    assert torch.equal(part.eval()(images), whole.eval()(images))
    every = tower_of(kept_patches=16)
    torch.testing.assert_close(every.train()(images), whole.train()(images))
    part.train()
    first, second = part(images), part(images)
    assert not torch.equal(first, second)
    for keep in TIERS:
        torch.manual_seed(5)
        embeddings = part(images, keep=keep)
        torch.manual_seed(5)
        assert torch.equal(embeddings, part(images))


def on_an_old_gpu(block):
    stream = mock.Mock(x=mock.Mock(is_cuda=True, device=torch.device("cuda")))
    with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
        block._fused(stream, None, "all")


def run_with(keep, **arguments):
    make_block("gelu", **arguments)(make_stream(first=True), None, keep)


REFUSED = {
    "form": (lambda: tower_of(block="triton"), "--model.block is 'triton', must be one of fused, plain, compile"),
    "tier": (lambda: run_with("none"), "a fused block keeps all, no-mlp, lean, block, not 'none'"),
    "tier of another form": (lambda: run_with("lean", implementation="plain"), "a plain block keeps all, block, not"),
    "sub-norm": (
        lambda: BlockShape(width=8, heads=1, hidden=8, gated=False, sub_norm=True, layer_scale=None),
        "a LayerNorm inside the MLP needs SwiGLU",
    ),
    "old GPU": (lambda: on_an_old_gpu(make_block("gelu")), "this one has 7.5: set --model.block compile"),
    "attention": (lambda: tower_of(attention="fast"), "--model.attention is 'fast', must be one of auto, triton"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    act, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        act()
