from dataclasses import replace
from typing import get_args

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from textlock.kernels.attention import rotate
from textlock.models.block import ComputeCopies, Keep
from textlock.models.vision import (
    IMAGE_MEAN,
    IMAGE_STD,
    VISION_CONFIGS,
    ModelConfig,
    VisionTower,
    build_vision_tower,
    rotary_table,
)
from textlock.models.weights import from_timm

MICRO = "eva02_micro_patch8_32"

# Small towers of every kind: EVA02, plain ViT, ViT with RoPE, layer scale and a register token.
SMALL = {"image_size": 12, "patch_size": 4, "width": 16, "heads": 2, "hidden": 12, "depth": 2}
KINDS = {
    "eva02": replace(VISION_CONFIGS["eva02_base_patch16_224"], **SMALL, rotary_grid=5),
    "vit": replace(VISION_CONFIGS["vit_base_patch16_224"], **SMALL),
    "vit-rope": replace(VISION_CONFIGS["vit_base_patch16_rope_reg1_gap_256"], **SMALL, rotary_grid=3),
}

BASE, EVA02 = VISION_CONFIGS["eva02_base_patch16_224"], "eva02_base_patch14_224"
AT_PATCH_16 = {"patch_size": 16, "ref_feat_shape": (14, 14)}
VIT, VIT_ROPE = "vit_base_patch16_224", "vit_base_patch16_rope_reg1_gap_256"
# Our config, timm's name for it, and timm's arguments that make it the same model.
TIMM_MODELS = [
    pytest.param(BASE, EVA02, AT_PATCH_16, id="eva02"),
    pytest.param(BASE, EVA02, {**AT_PATCH_16, "qkv_fused": True}, id="eva02-fused"),
    pytest.param(VISION_CONFIGS[VIT], VIT, {}, id="vit"),
    pytest.param(VISION_CONFIGS[VIT_ROPE], VIT_ROPE, {"img_size": 224, "ref_feat_shape": (14, 14)}, id="vit-rope"),
]


def randomise(module, seed=0):
    """Draw every parameter, biases and norms too: they start alike, which would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.05 if parameter.ndim == 2 else 0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module


def timm_model(name, **arguments):
    model = randomise(timm.create_model(name, num_classes=0, **arguments)).eval()
    for block in model.blocks:
        if isinstance(getattr(block.mlp, "norm", None), torch.nn.LayerNorm):
            block.mlp.norm.eps = 1e-5  # that of the released towers; timm uses 1e-6 throughout
    return model


def relative_error(value, truth):
    return ((value - truth).abs().max() / truth.abs().max()).item()


def feature_error(model, config, *, key_bias=None):
    """Compare in float64, where what is left is no rounding: tables of both are made in float32."""
    tower = VisionTower(config, ModelConfig(pooling="mean")).double().eval()
    state = from_timm(model.state_dict(), final_norm=config.final_norm)
    if key_bias is not None:
        for layer, bias in enumerate(key_bias):
            state[f"blocks.{layer}.qkv.bias"][config.width : 2 * config.width] = bias
    tower.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        return relative_error(tower.forward_features(images), model.double().forward_features(images))


@pytest.mark.parametrize(("config", "name", "arguments"), TIMM_MODELS)
def test_features_are_those_of_timm(config, name, arguments):
    assert feature_error(timm_model(name, depth=2, **arguments), replace(config, depth=2)) < 1e-5


@pytest.mark.parametrize(("config", "name", "arguments"), TIMM_MODELS)
def test_weights_are_those_of_timm_at_full_depth(config, name, arguments):
    with torch.device("meta"):
        tower = VisionTower(config, ModelConfig(pooling="mean"))
        model = timm.create_model(name, num_classes=0, **arguments)
    state = from_timm(model.state_dict(), final_norm=config.final_norm)
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in tower.state_dict().items()}


def test_trained_key_bias_is_that_of_timm():
    config = replace(BASE, depth=1)
    model = timm_model(EVA02, depth=1, qkv_fused=True, **AT_PATCH_16)
    key_bias = torch.randn(1, config.width, generator=torch.Generator().manual_seed(2))
    model.blocks[0].attn.k_bias.copy_(key_bias[0])
    assert feature_error(model, config, key_bias=key_bias) < 1e-5
    assert feature_error(model, config) > 1e-3  # under RoPE the key bias does not drop out of the softmax


def test_positions_scale_to_the_reference_grid():
    model = timm_model(EVA02, depth=1, img_size=96, **AT_PATCH_16)
    assert feature_error(model, replace(BASE, depth=1, image_size=96)) < 1e-5


def test_epsilons_are_those_of_timm_and_of_the_released_towers():
    """Activations this small make the epsilon of every LayerNorm matter."""
    model = timm_model(EVA02, depth=1, img_size=32, **AT_PATCH_16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.01)
    assert feature_error(model, replace(BASE, depth=1, image_size=32)) < 1e-5


def test_raw_and_normalised_images_give_the_same_embeddings():
    tower = randomise(build_vision_tower(MICRO))
    raw = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    normalised = ((raw.double() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).permute(0, 3, 1, 2).float()
    assert relative_error(tower(raw), tower(normalised)) < 1e-5


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [("cls", lambda tokens: tokens[:, 0]), ("mean", lambda tokens: tokens[:, 1:].mean(dim=1))],
    ids=["cls", "mean"],
)
def test_pooling_without_weights(pooling, pool):
    tower = randomise(build_vision_tower(MICRO, pooling=pooling))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(images), pool(tower.forward_features(images)))


def test_projection_only_where_the_width_differs():
    images = torch.randn(2, 3, 32, 32)
    same, wider = (build_vision_tower(MICRO, embed_dim=width) for width in (64, 80))
    assert same.projection is None
    assert wider.projection.bias is None
    assert wider(images).shape == (2, wider.embed_dim) == (2, 80)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "map"])
def test_a_tower_of_low_precision_computes_in_it(kind, pooling):
    tower = randomise(VisionTower(KINDS[kind], ModelConfig(pooling=pooling)))
    images = torch.randint(0, 256, (8, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    truth, low = tower.double()(images), tower.bfloat16()(images)
    assert low.dtype == torch.bfloat16
    assert relative_error(low, truth) < 0.1


def gradients_of(tower, images, keep="all"):
    """Return embeddings in bfloat16 autocast and all gradients, those of the blocks' matrices from `main_grad`."""
    matrices = {p for b in tower.blocks for p in b.parameters() if p.ndim == 2 and b.implementation == "fused"}
    for parameter in tower.parameters():
        parameter.grad = None
        if parameter in matrices:
            parameter.main_grad = torch.zeros_like(parameter)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=tower.patch_embed.weight.dtype == torch.float32):
        embeddings = tower(images, keep=keep)
    direction = torch.randn(embeddings.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    embeddings.backward(direction.to(embeddings))
    found = {name: p.main_grad if p in matrices else p.grad for name, p in tower.named_parameters()}
    return {"embeddings": embeddings.detach(), **found}


@pytest.mark.parametrize("name", ["eva02", "vit-rope"])
def test_bfloat16_loses_what_torch_loses(device, name):
    """Heads of 64 channels, as the kernels have them; every tier, with and without copies of the weights."""
    config = replace(KINDS[name], image_size=80, patch_size=16, width=128, hidden=176, rotary_grid=5, layer_scale=None)
    images = torch.randint(0, 256, (6, 80, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def make(block, dtype=torch.float32):
        tower = randomise(VisionTower(config, ModelConfig(block=block)))
        return tower.to(device if dtype == torch.float32 else "cpu", dtype)

    truth = gradients_of(make("plain", torch.float64), images)
    images = images.to(device)
    plain, tower = gradients_of(make("plain"), images), make("fused")
    fused = gradients_of(tower, images)
    for name, exact in truth.items():
        error, bound = ((found[name].double().cpu() - exact).norm() for found in (fused, plain))
        assert error <= 2 * bound + 1e-6 * exact.norm(), f"{name}: {error:.2e} of {exact.norm():.2e}"
    copies = ComputeCopies(tower, torch.bfloat16)
    for keep in get_args(Keep):
        with copies:
            again = gradients_of(tower, images, keep)
        assert all(torch.equal(value, fused[name]) for name, value in again.items()), keep


def test_rotation_is_done_in_float32():
    x = torch.randn(2, BASE.tokens, 3, BASE.head_dim).bfloat16()
    table = rotary_table(BASE)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())
    assert torch.equal(rotate(x, table)[:, : BASE.prefix_tokens], x[:, : BASE.prefix_tokens])


def test_rotary_table_survives_changes_of_type_and_device():
    tower = build_vision_tower(MICRO, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert "rope" not in tower.state_dict()
    for change in (
        torch.nn.Module.bfloat16,
        torch.nn.Module.double,
        lambda module: module.to("meta").to_empty(device="cpu"),
    ):
        rope = change(tower).rope
        assert rope.dtype == torch.float32 and torch.equal(rope, rotary_table(tower.config))


def test_trunk_starts_from_a_truncated_normal_and_zero_biases():
    torch.manual_seed(0)
    tower = build_vision_tower("eva02_tiny_patch8_64")
    for name, parameter in tower.named_parameters():
        if name.startswith("pool.") or "norm" in name:
            continue
        if name.endswith("bias"):
            assert torch.count_nonzero(parameter) == 0, name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name


OTHER_IMAGES = {
    "uint8-planar": torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    "float-interleaved": torch.zeros(1, 32, 32, 3),
    "size": torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
    "no-batch": torch.zeros(3, 32, 32),
    "int64": torch.zeros(1, 3, 32, 32, dtype=torch.int64),
}


@pytest.mark.parametrize("case", OTHER_IMAGES)
def test_refuses_other_images(case):
    with pytest.raises(ValueError, match="this tower takes uint8 \\[batch, 32, 32, 3\\]"):
        build_vision_tower(MICRO)(OTHER_IMAGES[case])


# What flags can ask for in vain, tests/test_train.py has.
REFUSED = {
    "pooling": (lambda: ModelConfig(pooling="max"), "--model.pooling is 'max', must be one of cls, mean, map"),
    "class token": (
        lambda: VisionTower(KINDS["vit-rope"], ModelConfig(pooling="cls")),
        "--model.pooling is 'cls', must be mean or map: this tower has no class token",
    ),
    "heads": (lambda: replace(KINDS["eva02"], heads=3), "width 16 does not divide into 3 heads"),
    "no prefix": (lambda: replace(KINDS["eva02"], class_token=False), "needs a class token or a register token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_other_towers(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "map"])
def test_flops_are_those_that_torch_counts(kind, pooling):
    """The difference of two batches: what is done once a batch is none of an image's."""
    tower = VisionTower(KINDS[kind], ModelConfig(pooling=pooling, block="plain", kept_patches=3)).train()
    size = tower.image_size

    def counted(images):
        with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
            out = tower(torch.zeros(images, size, size, 3, dtype=torch.uint8))
        with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = (two - one for one, two in zip(counted(1), counted(2), strict=True))
    config, tokens = tower.config, tower.tokens_in_training
    embedding = config.embedding_flops(3)
    # Attention pooling computes its scores a second time on the way back, as flash attention does.
    again = 2 * tokens * config.heads * config.width if pooling == "map" else 0
    assert forward == (tower.training_flops + embedding) / 3
    assert backward == 2 * forward - embedding + again


def test_flops_of_the_base_tower_are_the_published_ones():
    """106.6 GFLOP, of which absorption removes the products of all tokens with the head's key and value weights."""
    absorbed = 3 * (2 * BASE.tokens * 2 * BASE.width**2 - 4 * BASE.width**2)
    assert (BASE.training_flops() + absorbed) / 1e9 == pytest.approx(106.6, abs=0.05)
    assert BASE.training_flops() / 1e9 == pytest.approx(105.20, abs=0.01)
