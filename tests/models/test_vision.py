import math
from dataclasses import replace
from typing import get_args

import pytest
import timm
import torch
import torch.nn.functional as F

from textlock.kernels.attention import rotate
from textlock.models.block import ComputeCopies, Keep
from textlock.models.vision import (
    IMAGE_MEAN,
    IMAGE_STD,
    VISION_CONFIGS,
    VisionConfig,
    VisionTower,
    build_vision_tower,
    rotary_table,
)
from textlock.models.weights import from_timm

MICRO = "eva02_micro_patch8_32"

# Small towers of every kind: EVA02, plain ViT, ViT with RoPE, layer scale and a register token.
KINDS = {
    "eva02": replace(
        VISION_CONFIGS["eva02_base_patch16_224"],
        image_size=12,
        patch_size=4,
        width=16,
        heads=2,
        hidden=12,
        depth=2,
        rotary_grid=5,
    ),
    "vit": replace(
        VISION_CONFIGS["vit_base_patch16_224"], image_size=12, patch_size=4, width=16, heads=2, hidden=12, depth=2
    ),
    "vit-rope": replace(
        VISION_CONFIGS["vit_base_patch16_rope_reg1_gap_256"],
        image_size=12,
        patch_size=4,
        width=16,
        heads=2,
        hidden=12,
        depth=2,
        rotary_grid=3,
    ),
}

EVA02_AT_PATCH_16 = {"patch_size": 16, "ref_feat_shape": (14, 14)}
# Ours, timm's name for it, and timm's arguments that make it the same model.
TIMM_MODELS = [
    pytest.param("eva02_base_patch16_224", "eva02_base_patch14_224", EVA02_AT_PATCH_16, id="eva02"),
    pytest.param(
        "eva02_base_patch16_224", "eva02_base_patch14_224", {**EVA02_AT_PATCH_16, "qkv_fused": True}, id="eva02-fused"
    ),
    pytest.param("vit_base_patch16_224", "vit_base_patch16_224", {}, id="vit"),
    pytest.param(
        "vit_base_patch16_rope_reg1_gap_256",
        "vit_base_patch16_rope_reg1_gap_256",
        {"img_size": 224, "ref_feat_shape": (14, 14)},
        id="vit-rope",
    ),
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
    tower = VisionTower(config, pooling="mean").double().eval()
    state = from_timm(model.state_dict(), final_norm=config.final_norm)
    if key_bias is not None:
        for layer, bias in enumerate(key_bias):
            state[f"blocks.{layer}.qkv.bias"][config.width : 2 * config.width] = bias
    tower.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        return relative_error(tower.forward_features(images), model.double().forward_features(images))


@pytest.mark.parametrize(("name", "timm_name", "arguments"), TIMM_MODELS)
def test_features_are_those_of_timm(name, timm_name, arguments):
    config = replace(VISION_CONFIGS[name], depth=2)
    assert feature_error(timm_model(timm_name, depth=2, **arguments), config) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "timm_name", "arguments"), [case for case in TIMM_MODELS if case.id != "eva02-fused"])
def test_features_are_those_of_timm_at_full_depth(name, timm_name, arguments):
    assert feature_error(timm_model(timm_name, **arguments), VISION_CONFIGS[name]) < 1e-5


def test_trained_key_bias_is_that_of_timm():
    config = replace(VISION_CONFIGS["eva02_base_patch16_224"], depth=2)
    model = timm_model("eva02_base_patch14_224", depth=2, qkv_fused=True, **EVA02_AT_PATCH_16)
    key_bias = torch.randn(2, config.width, generator=torch.Generator().manual_seed(2))
    for block, bias in zip(model.blocks, key_bias, strict=True):
        block.attn.k_bias.copy_(bias)
    assert feature_error(model, config, key_bias=key_bias) < 1e-5
    assert feature_error(model, config) > 1e-3  # under RoPE the key bias does not drop out of the softmax


def test_positions_scale_to_the_reference_grid():
    config = replace(VISION_CONFIGS["eva02_base_patch16_224"], depth=1, image_size=96)
    model = timm_model("eva02_base_patch14_224", depth=1, img_size=96, **EVA02_AT_PATCH_16)
    assert feature_error(model, config) < 1e-5


def test_epsilons_are_those_of_timm_and_of_the_released_towers():
    """Activations this small make the epsilon of every LayerNorm matter."""
    config = replace(VISION_CONFIGS["eva02_base_patch16_224"], depth=1, image_size=32)
    model = timm_model("eva02_base_patch14_224", depth=1, img_size=32, **EVA02_AT_PATCH_16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.01)
    assert feature_error(model, config) < 1e-5


def plain_rotation(x, config):
    """Apply RoPE written with rotation matrices; x [b, heads, T, head_dim]."""
    rotated = x.clone()
    bands = config.head_dim // 4
    for patch in range(config.grid**2):
        row, column = divmod(patch, config.grid)
        for pair in range(2 * bands):
            position = (row if pair < bands else column) * config.rotary_grid / config.grid
            angle = position * 10000 ** (-(pair % bands) / bands)
            turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])  # float32
            token, channels = config.prefix_tokens + patch, slice(2 * pair, 2 * pair + 2)
            rotated[:, :, token, channels] = x[:, :, token, channels] @ turn.to(x.dtype).T
    return rotated


def plain_tower(tower, images):
    """Compute the tower with nothing fused, absorbed or packed; mean pooling."""
    config = tower.config
    weight = tower.patch_embed.weight.unflatten(1, (3, config.patch_size, config.patch_size))
    x = F.conv2d(images, weight, tower.patch_embed.bias, stride=config.patch_size).flatten(2).mT
    for prefix in (tower.register_tokens, tower.class_token):
        if prefix is not None:
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    if tower.position is not None:
        x = x + tower.position
    for block in tower.blocks:
        heads = [
            part.unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for part in block.qkv(block.norm1(x)).chunk(3, dim=-1)
        ]
        query, key, value = heads
        if config.rotary_grid is not None:
            query, key = plain_rotation(query, config), plain_rotation(key, config)
        weights = (query @ key.mT / math.sqrt(config.head_dim)).softmax(-1)
        attended = block.out_proj((weights @ value).transpose(1, 2).flatten(2))
        x = x + (1 if block.scale1 is None else block.scale1) * attended
        h = block.norm2(x)
        if config.gated:
            gate, up = (
                F.linear(h, *rows)
                for rows in zip(block.mlp.gate_up.weight.chunk(2), block.mlp.gate_up.bias.chunk(2), strict=True)
            )
            h = block.mlp.norm(gate * torch.sigmoid(gate) * up)
        else:
            h = F.gelu(block.mlp.fc1(h))
        x = x + (1 if block.scale2 is None else block.scale2) * block.mlp.fc2(h)
    x = x if tower.norm is None else tower.norm(x)
    return x[:, config.prefix_tokens :].mean(dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_plain_form(kind):
    tower = randomise(VisionTower(KINDS[kind], pooling="mean")).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator).requires_grad_()
    direction = torch.randn(2, 16, dtype=torch.float64, generator=generator)
    named = {"images": images, **dict(tower.named_parameters())}

    results = []
    for form in (tower, lambda x: plain_tower(tower, x)):
        embeddings = form(images)
        gradients = torch.autograd.grad((embeddings * direction).sum(), list(named.values()))
        results.append({"embeddings": embeddings, **dict(zip(named, gradients, strict=True))})

    ours, plain = results
    for name in plain:
        torch.testing.assert_close(
            ours[name], plain[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tower = randomise(VisionTower(KINDS[kind], pooling="map")).double()
    images = torch.randn(1, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = [name for name, _ in tower.named_parameters()]

    def embed(*parameters):
        return torch.func.functional_call(tower, dict(zip(names, parameters, strict=True)), images)

    assert torch.autograd.gradcheck(embed, list(tower.parameters()), fast_mode=True)


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
def test_runs_in_low_precision(kind, pooling):
    tower = randomise(VisionTower(KINDS[kind], pooling=pooling))
    images = torch.randint(0, 256, (8, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    truth = tower.double()(images)
    tower.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tower(images)
    mixed.float().sum().backward()
    assert relative_error(mixed, truth) < 0.05
    assert all(parameter.grad.dtype == torch.float32 for parameter in tower.parameters())
    low = tower.bfloat16()(images)
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
        tower = randomise(VisionTower(config, pooling="map", block=block))
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
    config = VISION_CONFIGS["eva02_base_patch16_224"]
    x = torch.randn(2, config.tokens, 3, config.head_dim).bfloat16()
    table = rotary_table(config)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())
    assert torch.equal(rotate(x, table)[:, : config.prefix_tokens], x[:, : config.prefix_tokens])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tower: tower.bfloat16(), id="bfloat16"),
        pytest.param(lambda tower: tower.to(torch.float64), id="float64"),
        pytest.param(lambda tower: tower.to("meta").to_empty(device="cpu"), id="to_empty"),
    ],
)
def test_rotary_table_survives(change):
    tower = build_vision_tower(MICRO)
    table = tower.rope.clone()
    assert "rope" not in tower.state_dict()
    tower = change(tower)
    assert tower.rope.dtype == torch.float32
    assert torch.equal(tower.rope, table)


def test_dtype_argument():
    tower = build_vision_tower(MICRO, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}


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


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), id="uint8-planar"),
        pytest.param(torch.zeros(1, 32, 32, 3), id="float-interleaved"),
        pytest.param(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), id="size"),
        pytest.param(torch.zeros(3, 32, 32), id="no-batch"),
        pytest.param(torch.zeros(1, 3, 32, 32, dtype=torch.int64), id="int64"),
    ],
)
def test_refuses_other_images(images):
    with pytest.raises(ValueError, match="this tower takes uint8 \\[batch, 32, 32, 3\\]"):
        build_vision_tower(MICRO)(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"name": "eva02_huge"}, "'eva02_huge' is unknown: choose from eva02_base", id="name"),
        pytest.param({"pooling": "max"}, "'max' is unknown: choose from cls, mean, map", id="pooling"),
        pytest.param({"image_size": 36}, "36 is not a positive multiple of the patch size 8", id="size"),
    ],
)
def test_refuses_other_towers(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_vision_tower(**{"name": MICRO, **arguments})


def test_refuses_class_token_pooling_without_class_token():
    with pytest.raises(ValueError, match="'cls' needs a class token"):
        VisionTower(KINDS["vit-rope"], pooling="cls")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"heads": 3}, "width 16 does not divide into 3 heads", id="heads"),
        pytest.param({"class_token": False}, "needs a class token or a register token", id="no-prefix"),
    ],
)
def test_refuses_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        VisionConfig(**{**vars(KINDS["eva02"]), **change})
