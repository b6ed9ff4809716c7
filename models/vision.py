"""Image towers: patches, a trunk of transformer blocks, pooling, one embedding per image.

``eva02_base_patch16_224`` is the tower of Nomic Embed Vision: learned positions and 2-D RoPE together, no LayerNorm
after the last block. The ViTs are the other backbones of that report; the small EVA02 towers are for demos and tests.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..kernels.patchify import patchify
from .block import Block, Implementation, Keep, Stream, product_dtype
from .pooling import AttentionPooling
from .weights import load_weights

# OpenAI CLIP's channel statistics, for pixels scaled to [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

Pooling = Literal["cls", "mean", "map"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a tower's trunk; the MAP head takes its MLP, heads and epsilon from it."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    hidden: int  # inner channels of the MLPs
    gated: bool  # SwiGLU, else GELU
    sub_norm: bool  # LayerNorm inside the MLPs of the trunk
    class_token: bool
    register_tokens: int
    absolute_position: bool  # learned, prefix tokens included
    rotary_grid: int | None  # side of the patch grid that positions are scaled to for RoPE; None: no RoPE
    layer_scale: float | None  # start value; None: no layer scale
    final_norm: bool
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        if self.image_size <= 0 or self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size} is not a positive multiple of the patch size {self.patch_size}"
            )
        if self.width % self.heads or (self.rotary_grid is not None and self.head_dim % 4):
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads of a multiple of 4 channels")
        if self.prefix_tokens == 0:
            raise ValueError("a tower needs a class token or a register token: pooling reads the first token")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        return self.class_token + self.register_tokens

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.prefix_tokens + self.grid**2


def _eva02(image_size: int, patch_size: int, *, width: int, depth: int, heads: int, hidden: int) -> VisionConfig:
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        gated=True,
        sub_norm=True,
        class_token=True,
        register_tokens=0,
        absolute_position=True,
        rotary_grid=image_size // patch_size,
        layer_scale=None,
        final_norm=False,
    )


_VIT_BASE = VisionConfig(
    image_size=224,
    patch_size=16,
    width=768,
    depth=12,
    heads=12,
    hidden=3072,
    gated=False,
    sub_norm=False,
    class_token=True,
    register_tokens=0,
    absolute_position=True,
    rotary_grid=None,
    layer_scale=None,
    final_norm=True,
)

VISION_CONFIGS: dict[str, VisionConfig] = {
    "eva02_base_patch16_224": _eva02(224, 16, width=768, depth=12, heads=12, hidden=2048),
    "eva02_tiny_patch8_64": _eva02(64, 8, width=128, depth=4, heads=2, hidden=352),
    "eva02_micro_patch8_32": _eva02(32, 8, width=64, depth=2, heads=1, hidden=176),
    "vit_base_patch16_224": _VIT_BASE,
    # The name is timm's; the report trains it, like the others, at 224 pixels on a 14 x 14 grid.
    "vit_base_patch16_rope_reg1_gap_256": replace(
        _VIT_BASE,
        class_token=False,
        register_tokens=1,
        absolute_position=False,
        rotary_grid=14,
        layer_scale=1e-5,
        final_norm=False,
    ),
}


def rotary_table(config: VisionConfig) -> Tensor:
    """Cosine and sine of the RoPE angles, [T, head_dim / 2, 2] float32 on the CPU.

    The first half of the pairs of a head turns with the row of the patch, the second with its column, at frequencies
    10000^(-i / (head_dim / 4)). Prefix tokens have no position: angle 0.
    """
    assert config.rotary_grid is not None
    bands = config.head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(bands, dtype=torch.float64) / bands)
    positions = torch.arange(config.grid, dtype=torch.float64) * (config.rotary_grid / config.grid)
    angles = positions[:, None] * frequencies  # [grid, bands]
    by_row = angles[:, None].expand(-1, config.grid, -1)
    by_column = angles[None].expand(config.grid, -1, -1)
    of_patches = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)  # [grid^2, 2 bands]
    of_tokens = torch.cat((of_patches.new_zeros(config.prefix_tokens, 2 * bands), of_patches))
    return torch.stack((of_tokens.cos(), of_tokens.sin()), dim=-1).float()


class VisionTower(nn.Module):
    """An image encoder with random weights; `build_vision_tower` loads given ones.

    Args:
        config: shape of the trunk.
        pooling: ``cls`` (the class token), ``mean`` (over patch tokens) or ``map`` (attention pooling).
        embed_dim: width d of the embeddings; a projection without bias is added only where it differs from the trunk's
            width. None: the trunk's width.
        block: how the blocks are computed, see `Block`.
        attention: backend of the fused blocks' attention, see `attention`.
        residual: type of the tokens between the blocks. None: that of the blocks' products.
        kept_patches: patches of each image that go through the trunk in training mode, drawn anew for each image and
            forward (https://arxiv.org/abs/2212.00794); their positions stay their own. None: all.

    The trunk's weights are drawn as DeiT and EVA draw them (https://arxiv.org/abs/2012.12877): truncated normal with
    standard deviation 0.02, biases zero. The head keeps PyTorch's defaults.
    """

    rope: Tensor | None

    def __init__(
        self,
        config: VisionConfig,
        *,
        pooling: Pooling = "map",
        embed_dim: int | None = None,
        block: Implementation = "fused",
        attention: str = "auto",
        residual: torch.dtype | None = None,
        kept_patches: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling {pooling!r} is unknown: choose from {', '.join(get_args(Pooling))}")
        if pooling == "cls" and not config.class_token:
            raise ValueError("pooling 'cls' needs a class token, which this tower has not: choose mean or map")
        if kept_patches is not None and not 0 < kept_patches <= config.grid**2:
            raise ValueError(f"{kept_patches} patches of an image cannot be kept: it has {config.grid**2}")
        self.config = config
        self.pooling = pooling
        self.embed_dim = config.width if embed_dim is None else embed_dim
        self.image_size = config.image_size
        self.residual = residual
        self.kept_patches = kept_patches

        def learned_tokens(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(1, count, config.width)) if count else None

        self.patch_embed = nn.Linear(3 * config.patch_size**2, config.width)
        self.class_token = learned_tokens(int(config.class_token))
        self.register_tokens = learned_tokens(config.register_tokens)
        self.position = learned_tokens(config.tokens if config.absolute_position else 0)
        self.register_buffer("rope", None if config.rotary_grid is None else rotary_table(config), persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.hidden,
                gated=config.gated,
                sub_norm=config.sub_norm,
                layer_scale=config.layer_scale,
                norm_eps=config.norm_eps,
                implementation=block,
                attention_backend=attention,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else None
        self._initialise_trunk()

        self.pool = (
            AttentionPooling(config.width, config.heads, config.hidden, gated=config.gated, norm_eps=config.norm_eps)
            if pooling == "map"
            else None
        )
        self.projection = (
            nn.Linear(config.width, self.embed_dim, bias=False) if self.embed_dim != config.width else None
        )

    @property
    def tokens_in_training(self) -> int:
        """Length of the sequence in training mode."""
        return self.config.prefix_tokens + (self.kept_patches or self.config.grid**2)

    def _initialise_trunk(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for tokens in (self.class_token, self.register_tokens, self.position):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # A cast to bfloat16 must not reach the angles' cosines, nor `to_empty` leave them unset.
        if self.rope is not None:
            self.rope = rotary_table(self.config).to(self.rope.device)
        return self

    def forward(
        self, images: Tensor, *, keep: Keep = "all", on_gradients: Callable[[int], None] | None = None
    ) -> Tensor:
        """Embed images; the rows are not normalised.

        Args:
            images: uint8 [b, S, S, 3] raw, or floating point [b, 3, S, S] normalised by IMAGE_MEAN and IMAGE_STD.
            keep: what every block keeps for the backward pass, see models/block.py.
            on_gradients: called in the backward pass with the number of each block whose parameters have received all
                they receive from these images.

        Returns:
            [b, embed_dim].

        Raises:
            ValueError: images of another type, layout or size; a tier that the blocks do not know; fused blocks on a
                GPU that they do not run on.
        """
        tokens = self.forward_features(images, keep=keep, on_gradients=on_gradients)
        if self.pool is not None:
            embeddings = self.pool(tokens)
        elif self.pooling == "mean":
            embeddings = tokens[:, self.config.prefix_tokens :].mean(dim=1)
        else:
            embeddings = tokens[:, 0]
        return embeddings if self.projection is None else self.projection(embeddings)

    def forward_features(
        self, images: Tensor, *, keep: Keep = "all", on_gradients: Callable[[int], None] | None = None
    ) -> Tensor:
        """Images as in `forward` to tokens [b, T, D] before pooling: class token, registers, patches row by row."""
        self._check(images)
        dtype = product_dtype(self.patch_embed.weight)
        patches = patchify(images, self.config.patch_size, mean=IMAGE_MEAN, std=IMAGE_STD, dtype=dtype)
        position: Tensor | None = self.position
        rope = self.rope
        if self.training and self.kept_patches is not None:
            kept = self._draw_tokens(len(images))  # [b, T]
            of_patches = kept[:, self.config.prefix_tokens :, None] - self.config.prefix_tokens
            patches = patches.take_along_dim(of_patches, dim=1)
            position = None if position is None else position[0, kept]
            rope = None if rope is None else rope[kept]
        prefix = [t.expand(len(images), -1, -1) for t in (self.class_token, self.register_tokens) if t is not None]
        tokens = torch.cat((*prefix, self.patch_embed(patches)), dim=1)  # [b, T, D]
        if position is not None:
            tokens = tokens + position
        stream = Stream(tokens.to(self.residual or dtype))
        for number, block in enumerate(self.blocks):
            if on_gradients is not None and stream.x.requires_grad:
                # Autograd gives leaves their gradients before it goes on to what made the stream.
                stream.x.register_hook(functools.partial(_call_with, on_gradients, number))
            stream = block(stream, rope, keep)
        tokens = stream.total()
        return tokens if self.norm is None else self.norm(tokens)

    def _draw_tokens(self, images: int) -> Tensor:
        """Return the numbers of the tokens to keep, ascending in a row: [images, prefix tokens + kept patches]."""
        prefix = self.config.prefix_tokens
        draws = torch.rand(images, self.config.tokens, device=self.patch_embed.weight.device)
        draws[:, :prefix] = -1
        return draws.argsort(dim=1)[:, : prefix + (self.kept_patches or 0)].sort(dim=1).values

    def _check(self, images: Tensor) -> None:
        size = self.image_size
        layout = (size, size, 3) if images.dtype == torch.uint8 else (3, size, size)
        known_dtype = images.dtype == torch.uint8 or images.is_floating_point()
        if images.ndim != 4 or tuple(images.shape[1:]) != layout or not known_dtype:
            raise ValueError(
                f"images are {str(images.dtype).removeprefix('torch.')} of shape {list(images.shape)}: this tower takes"
                f" uint8 [batch, {size}, {size}, 3], or normalised floating point [batch, 3, {size}, {size}]"
            )


def _call_with(function: Callable[[int], None], number: int, _: Tensor) -> None:
    function(number)


def build_vision_tower(
    name: str,
    *,
    pooling: Pooling = "map",
    weights: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    embed_dim: int | None = None,
    image_size: int | None = None,
    block: Implementation = "fused",
    attention: str = "auto",
    residual: torch.dtype | None = None,
    kept_patches: int | None = None,
) -> VisionTower:
    """Build a tower by name, on the CPU.

    Args:
        name: a key of VISION_CONFIGS.
        pooling: ``cls``, ``mean`` or ``map``.
        weights: None for random ones; or a .safetensors file, a folder with model.safetensors, or a hub name
            "owner/name", with this project's keys, timm's or those of Nomic Embed Vision. A trunk without a head leaves
            head and projection at their random start.
        dtype: type of the parameters. RoPE angles stay in float32.
        embed_dim: width of the embeddings; None: the width of the trunk.
        image_size: side of the images in pixels; None: the one in the name's configuration.
        block: as in `VisionTower`, like attention, residual and kept_patches.
        attention: see there.
        residual: see there.
        kept_patches: see there.

    Raises:
        ValueError: an unknown name or pooling, an impossible size, or weights that do not fit.
        FileNotFoundError: weights that are not there.
    """
    if name not in VISION_CONFIGS:
        raise ValueError(f"vision tower {name!r} is unknown: choose from {', '.join(VISION_CONFIGS)}")
    config = VISION_CONFIGS[name]
    if image_size is not None:
        config = replace(config, image_size=image_size)
    tower = VisionTower(
        config,
        pooling=pooling,
        embed_dim=embed_dim,
        block=block,
        attention=attention,
        residual=residual,
        kept_patches=kept_patches,
    )
    if weights is not None:
        load_weights(tower, weights)
    return tower.to(dtype)
