# SPDX-License-Identifier: Apache-2.0
"""Image encoder that textlock trained, in plain PyTorch for transformers: patches, transformer blocks, pooling.

This file and configuration_textlock.py travel with the weights and need torch and transformers 4.57 or later. Nothing
is a buffer: what is not a weight is computed in the forward pass, so a model may be made on the meta device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_textlock import TextlockVisionConfig


class FeedForward(nn.Module):
    """MLP: GELU, or SwiGLU whose gate and value are the two halves of one projection; [..., D] to [..., D]."""

    def __init__(self, config: TextlockVisionConfig, *, norm: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gated = config.gated_mlp
        if self.gated:
            self.gate_up = nn.Linear(width, 2 * inner)
        else:
            self.fc1 = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner, eps=1e-5) if norm else None
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(self.fc1(x))
        return self.fc2(x if self.norm is None else self.norm(x))


class Block(nn.Module):
    """Pre-norm transformer block on tokens [b, T, D]."""

    def __init__(self, config: TextlockVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config, norm=config.mlp_norm)
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # [b, heads, T, head_dim] each
        if rope is not None:
            query, key = rotate(query, *rope), rotate(key, *rope)
        attended = F.scaled_dot_product_attention(query, key, value)
        branch = self.out_proj(attended.transpose(1, 2).flatten(2))
        x = x + (branch if self.scale1 is None else self.scale1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + (branch if self.scale2 is None else self.scale2 * branch)


class AttentionPooling(nn.Module):
    """One learned query reads all tokens: [b, T, D] to first token + MLP(LayerNorm(attention)), [b, D]."""

    def __init__(self, config: TextlockVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config, norm=False)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query(self.latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [1, heads, 1, head_dim]
        key_value = self.key_value(tokens).unflatten(-1, (2, self.heads, -1))
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind()  # [b, heads, T, head_dim] each
        attended = F.scaled_dot_product_attention(query.expand(tokens.shape[0], -1, -1, -1), key, value)
        return tokens[:, 0] + self.mlp(self.norm(self.out_proj(attended.transpose(1, 2).flatten(1))))


class TextlockVisionModel(PreTrainedModel):
    """The image encoder. Its embeddings live in the space of the text encoder that ``config.text_tower`` describes."""

    config_class = TextlockVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["Block", "AttentionPooling"]  # noqa: RUF012 (transformers' own form)
    _supports_sdpa = True

    def __init__(self, config: TextlockVisionConfig) -> None:
        super().__init__(config)
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.prefix_tokens = int(config.class_token) + config.num_register_tokens

        def learned_tokens(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, count, width)) if count else None

        self.patch_embed = nn.Linear(3 * config.patch_size**2, width)
        self.class_token = learned_tokens(int(config.class_token))
        self.register_tokens = learned_tokens(config.num_register_tokens)
        self.position = learned_tokens(self.prefix_tokens + patches if config.absolute_position else 0)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.final_norm else None
        self.pool = AttentionPooling(config) if config.pooling == "map" else None
        projects = config.embedding_size != width
        self.projection = nn.Linear(width, config.embedding_size, bias=False) if projects else None
        self.post_init()

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Embed images.

        Args:
            pixel_values: [b, 3, S, S] floating point, as the folder's image processor gives it.
            return_dict: False returns the two tensors as a tuple.

        Returns:
            ``pooler_output`` [b, embedding_size]: the embeddings, not of unit length: divide by the norm to compare
            by cosine. ``last_hidden_state`` [b, T, hidden_size]: class token, registers, patches row by row.

        Raises:
            ValueError: images of another type or size.
        """
        size, patch = self.config.image_size, self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size) or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} of shape {list(pixel_values.shape)}: this model takes floating "
                f"point [batch, 3, {size}, {size}], which the image processor of its folder gives"
            )
        batch, grid = pixel_values.shape[0], size // patch
        # In row order, each patch flattened as channel, row, column.
        patches = pixel_values.to(self.patch_embed.weight.dtype).reshape(batch, 3, grid, patch, grid, patch)
        x = self.patch_embed(patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid**2, 3 * patch**2))
        prefix = [t.expand(batch, -1, -1) for t in (self.class_token, self.register_tokens) if t is not None]
        x = torch.cat((*prefix, x), dim=1)
        if self.position is not None:
            x = x + self.position
        rope = None if self.config.rotary_grid is None else self.rotary_table(x.device)
        for block in self.blocks:
            x = block(x, rope)
        if self.norm is not None:
            x = self.norm(x)
        embeddings = self.pooled(x)
        if self.projection is not None:
            embeddings = self.projection(embeddings)
        if return_dict is False:
            return x, embeddings
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=embeddings)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Reduce tokens [b, T, D] to one vector an image, [b, D]."""
        if self.pool is not None:
            return self.pool(tokens)
        return tokens[:, self.prefix_tokens :].mean(dim=1) if self.config.pooling == "mean" else tokens[:, 0]

    def rotary_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the RoPE angles, [T, head_dim / 2] float32 each.

        The first half of the pairs of a head turns with the row of a patch, the second with its column, at frequencies
        10000^(-i / (head_dim / 4)). Tokens in front of the patches have angle 0. Float64 on the CPU: not every
        accelerator has it.
        """
        config = self.config
        bands, grid = config.hidden_size // config.num_attention_heads // 4, config.image_size // config.patch_size
        frequencies = 10000.0 ** (-torch.arange(bands, dtype=torch.float64, device="cpu") / bands)
        positions = torch.arange(grid, dtype=torch.float64, device="cpu") * (config.rotary_grid / grid)
        angles = positions[:, None] * frequencies  # [grid, bands]
        rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
        angles = F.pad(torch.cat((rows, columns), dim=-1).flatten(0, 1), (0, 0, self.prefix_tokens, 0))
        return angles.cos().float().to(device), angles.sin().float().to(device)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of a model that is made without trained ones, as DeiT and EVA draw theirs."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, AttentionPooling):
            nn.init.zeros_(module.latent)
        elif isinstance(module, Block):
            for scale in (module.scale1, module.scale2):
                if scale is not None:
                    nn.init.ones_(scale)
        elif isinstance(module, TextlockVisionModel):
            for tokens in (module.class_token, module.register_tokens, module.position):
                if tokens is not None:
                    nn.init.trunc_normal_(tokens, std=0.02)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels of [b, heads, T, head_dim] by the angle of their token, in float32."""
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)
