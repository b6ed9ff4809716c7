# SPDX-License-Identifier: Apache-2.0
"""Configuration of an image encoder that textlock trained: every number that its shape and its embeddings depend on."""

from typing import Any

from transformers import PretrainedConfig


class TextlockVisionConfig(PretrainedConfig):
    """Shape of the trunk, pooling and width of the embeddings; the defaults are the tower of Nomic Embed Vision.

    Args:
        image_size: side of the square images in pixels, a multiple of ``patch_size``.
        patch_size: side of a patch in pixels.
        hidden_size: channels of a token.
        num_hidden_layers: transformer blocks.
        num_attention_heads: heads of the attention in blocks and pooling.
        intermediate_size: inner channels of the MLPs.
        gated_mlp: SwiGLU MLPs; False: GELU.
        mlp_norm: LayerNorm inside the blocks' MLPs.
        layer_norm_eps: of the blocks' two LayerNorms, of the final one and of the pooling's.
        class_token: whether a learned class token comes first.
        num_register_tokens: learned tokens between the class token and the patches.
        absolute_position: whether a learned position is added to every token.
        rotary_grid: side of the patch grid that positions are scaled to for 2-D RoPE; None: no RoPE.
        layer_scale: whether a learned factor per channel scales both branches of a block.
        final_norm: LayerNorm after the last block.
        pooling: ``cls`` takes the class token, ``mean`` averages the patches, ``map`` is attention pooling.
        embedding_size: width of the embeddings; a projection without bias leads there from another ``hidden_size``.
        logit_scale: factor on the cosines at the end of training; the encoder does not use it.
        text_tower: the text encoder that the images were trained against, and how it makes embeddings; not used either.
    """

    model_type = "textlock_vision"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 2048,
        gated_mlp: bool = True,
        mlp_norm: bool = True,
        layer_norm_eps: float = 1e-6,
        class_token: bool = True,
        num_register_tokens: int = 0,
        absolute_position: bool = True,
        rotary_grid: int | None = 14,
        layer_scale: bool = False,
        final_norm: bool = False,
        pooling: str = "map",
        embedding_size: int = 768,
        logit_scale: float | None = None,
        text_tower: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.gated_mlp = gated_mlp
        self.mlp_norm = mlp_norm
        self.layer_norm_eps = layer_norm_eps
        self.class_token = class_token
        self.num_register_tokens = num_register_tokens
        self.absolute_position = absolute_position
        self.rotary_grid = rotary_grid
        self.layer_scale = layer_scale
        self.final_norm = final_norm
        self.pooling = pooling
        self.embedding_size = embedding_size
        self.logit_scale = logit_scale
        self.text_tower = text_tower
