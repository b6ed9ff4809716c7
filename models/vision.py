"""Image towers: patches, a trunk of transformer blocks, pooling, one embedding per image.

``eva02_base_patch16_224`` is the tower of Nomic Embed Vision: learned positions and 2-D RoPE together, no LayerNorm
after the last block. The ViTs are the other backbones of that report; the small EVA02 towers are for demos and tests.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn

from ..kernels.patchify import patchify
from ..settings import FREE_ON_RESUME, Settings, at_least
from .block import Block, BlockShape, Implementation, Keep, Stream, product_dtype
from .pooling import AttentionPooling
from .weights import load_weights

# OpenAI CLIP's channel statistics, for pixels scaled to [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

Pooling = Literal["cls", "mean", "map"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockShape):
    """Shape of a tower's trunk; the MAP head takes its MLP, heads and epsilon from it."""

    image_size: int
    patch_size: int
    depth: int  # blocks
    class_token: bool
    register_tokens: int
    absolute_position: bool  # learned, prefix tokens included
    rotary_grid: int | None  # side of the patch grid that positions are scaled to for RoPE; None: no RoPE
    final_norm: bool

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        if self.image_size <= 0 or self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size} is not a positive multiple of the patch size {self.patch_size}"
            )
        super().__post_init__()
        if self.rotary_grid is not None and self.head_dim % 4:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads of a multiple of 4 channels")
        if self.prefix_tokens == 0:
            raise ValueError("a tower needs a class token or a register token: pooling reads the first token")

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

    def embedding_flops(self, patches: int) -> int:
        """Return the FLOPs of embedding so many patches."""
        return 2 * patches * 3 * self.patch_size**2 * self.width

    def block_flops(self, tokens: int) -> dict[str, int]:
        """Return the FLOPs of a block's forward pass for one image of ``tokens`` tokens, by product.

        A multiplication and an addition are two. ``attention`` is queries with keys and weights with values; the other
        keys are the block's linear layers, ``first`` being the one to the hidden channels.
        """
        channels = {"qkv": 3 * self.width, "out_proj": self.width, "first": self.first_width, "fc2": self.hidden}
        products = {name: 2 * tokens * self.width * width for name, width in channels.items()}
        return products | {"attention": 4 * tokens**2 * self.width}

    def pooling_flops(self, tokens: int) -> int:
        """Return the FLOPs of attention pooling's forward pass for one image, with absorbed projections."""
        mlp = (3 if self.gated else 2) * self.width * self.hidden
        return 4 * tokens * self.heads * self.width + 2 * (2 * self.width**2 + mlp)

    def training_flops(self, *, patches: int | None = None, pooling: Pooling = "map") -> int:
        """Return the FLOPs that training on one image needs, forward and backward: what MFU is counted in.

        Counted are the matrix products that the computation cannot do without, a multiply-add as two: linear layers,
        attention, the pooling head with its absorbed key and value projections (models/pooling.py). A backward pass is
        two products for each of the forward, and one for the patch embedding: images have no gradient. Not counted:
        norms, activations, what is recomputed, and the projection of a tower of another width.

        Args:
            patches: of an image that go through the trunk; None: all.
            pooling: only ``map`` has products.
        """
        patches = self.grid**2 if patches is None else patches
        tokens = self.prefix_tokens + patches
        head = self.pooling_flops(tokens) if pooling == "map" else 0
        blocks = self.depth * sum(self.block_flops(tokens).values())
        return 3 * (blocks + head) + 2 * self.embedding_flops(patches)


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


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings, section="model"):
    """The image tower."""

    name: str = "eva02_base_patch16_224"
    """Architecture; models/vision.py lists them."""
    pooling: Pooling = "map"
    """How tokens become one embedding: the class token, the mean of the patches, or attention pooling."""
    weights: str | None = None
    """Starting weights: a .safetensors file, a folder, a hub name, or None for random ones. Other files, patches and
    resolutions: python -m textlock.engine.starting_weights."""
    block: Annotated[Implementation, FREE_ON_RESUME] = "fused"
    """How the transformer blocks run: with this project's kernels (on a CPU, their references in torch); with torch's
    own operations; or with these under torch.compile, for GPUs that the kernels do not run on."""
    attention: Annotated[
        Literal["auto", "triton", "sdpa", "flash-attn", "flash-attn-4", "reference"], FREE_ON_RESUME
    ] = "auto"
    """Kernel of the fused blocks' attention; auto goes by GPU and sequence length."""
    residual: Literal["auto", "fp32"] = "auto"
    """Type of the tokens between the blocks. auto: that of the arithmetic, as in the released code. fp32 with bf16
    arithmetic rounds less, and takes more memory and time."""
    kept_patches: Annotated[int | None, at_least(1)] = None
    """Patches of an image that go through the tower while training, drawn at random (FLIP). None: all, as published."""

    def __post_init__(self) -> None:
        """Also refuse an unknown name."""
        super().__post_init__()
        if self.name not in VISION_CONFIGS:
            self.refuse("name", f"be one of {', '.join(VISION_CONFIGS)}")

    def shape(self, image_size: int | None = None) -> VisionConfig:
        """Return the shape of the trunk for images of this size; None: the size that the architecture has.

        Raises ValueError, naming the flag, where size, patches and pooling do not go together.
        """
        shape = VISION_CONFIGS[self.name]
        if image_size is not None:
            if image_size % shape.patch_size:
                raise ValueError(
                    f"--data.image-size is {image_size}, must be a multiple of {shape.patch_size}, the patch size of "
                    f"{self.name}"
                )
            shape = replace(shape, image_size=image_size)
        self.require_shape(shape)
        return shape

    def require_shape(self, shape: VisionConfig) -> None:
        """Raise ValueError where a trunk of this shape lacks what the settings ask for."""
        if self.pooling == "cls" and not shape.class_token:
            self.refuse("pooling", "be mean or map: this tower has no class token")
        if self.kept_patches is not None and self.kept_patches > shape.grid**2:
            self.refuse("kept_patches", f"be at most {shape.grid**2}, the patches of an image")


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
    """An image encoder with random weights; `make_vision_tower` loads given ones.

    Args:
        config: shape of the trunk.
        model: how tokens become one embedding and how the blocks are computed; its name and weights are not read.
            With ``kept_patches`` other patches are drawn for each image and forward in training mode
            (https://arxiv.org/abs/2212.00794); they keep their positions.
        embed_dim: width d of the embeddings; a projection without bias is added only where it differs from the trunk's
            width. None: the trunk's width.

    Raises ValueError where the trunk lacks what ``model`` asks for.

    The trunk's weights are drawn as DeiT and EVA draw them (https://arxiv.org/abs/2012.12877): truncated normal with
    standard deviation 0.02, biases zero. The head keeps PyTorch's defaults.
    """

    rope: Tensor | None

    def __init__(self, config: VisionConfig, model: ModelConfig, *, embed_dim: int | None = None) -> None:
        super().__init__()
        model.require_shape(config)
        self.config = config
        self.pooling = model.pooling
        self.embed_dim = config.width if embed_dim is None else embed_dim
        self.image_size = config.image_size
        self.residual = torch.float32 if model.residual == "fp32" else None  # None: the type of the blocks' products
        self.kept_patches = model.kept_patches

        def learned_tokens(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(1, count, config.width)) if count else None

        self.patch_embed = nn.Linear(3 * config.patch_size**2, config.width)
        self.class_token = learned_tokens(int(config.class_token))
        self.register_tokens = learned_tokens(config.register_tokens)
        self.position = learned_tokens(config.tokens if config.absolute_position else 0)
        self.register_buffer("rope", None if config.rotary_grid is None else rotary_table(config), persistent=False)
        self.blocks = nn.ModuleList(
            Block(config, implementation=model.block, attention=model.attention) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else None
        self._initialise_trunk()

        self.pool = AttentionPooling(config) if model.pooling == "map" else None
        self.projection = (
            nn.Linear(config.width, self.embed_dim, bias=False) if self.embed_dim != config.width else None
        )

    @property
    def tokens_in_training(self) -> int:
        """Length of the sequence in training mode."""
        return self.config.prefix_tokens + (self.kept_patches or self.config.grid**2)

    @property
    def training_flops(self) -> int:
        """FLOPs that training on one image needs, as `VisionConfig.training_flops` counts them."""
        return self.config.training_flops(patches=self.kept_patches, pooling=self.pooling)

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
        """Embed images; the embeddings are not normalised.

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


def make_vision_tower(
    model: ModelConfig, *, image_size: int | None = None, embed_dim: int | None = None, pretrained: bool = True
) -> VisionTower:
    """Make the image tower that a config asks for, in float32 on the CPU.

    Args:
        model: its weights may have this project's keys, timm's or those of Nomic Embed Vision. A trunk without a head
            leaves head and projection at their random start.
        image_size: side of the images in pixels; None: the size that the architecture has.
        embed_dim: width of the embeddings; None: the width of the trunk.
        pretrained: False leaves ``model.weights`` unread, for a checkpoint that will overwrite them.

    Raises:
        ValueError: an image size or pooling that the architecture does not have, or weights that do not fit.
        FileNotFoundError: weights that are not there.
    """
    shape = model.shape(image_size)
    tower = VisionTower(shape, model, embed_dim=embed_dim)
    if pretrained and model.weights is not None:
        load_weights(tower, model.weights)
    return tower


def build_vision_tower(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    embed_dim: int | None = None,
    **settings: Any,
) -> VisionTower:
    """Make an image tower by name: `make_vision_tower` for those who have no config.

    Args:
        name: a key of VISION_CONFIGS.
        dtype: type of the parameters. RoPE angles stay in float32.
        image_size: see `make_vision_tower`.
        embed_dim: see there.
        settings: other fields of `ModelConfig`, such as ``pooling`` and ``weights``.

    Raises:
        ValueError: a setting that is impossible, or weights that do not fit.
        FileNotFoundError: weights that are not there.
    """
    return make_vision_tower(ModelConfig(name=name, **settings), image_size=image_size, embed_dim=embed_dim).to(dtype)
