# SPDX-License-Identifier: Apache-2.0
"""Parts of a sentence-transformers model of texts and images that textlock trained.

This file travels with the weights and needs sentence-transformers 6.2 or later. The image tower is the transformers
folder image/. The parts of the text encoder are those of a model on the hub, at one commit, or a copy in text/:
reference.json of each part says where. No code of the text encoder's own folder is run.
"""

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Dense, InputModule, Module, Router, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image


class TextImageRouter(Router):
    """Texts through the text encoder, images through the image tower."""

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save as a Router does, the classes of this file by its name and not by where this process has a copy."""
        super().save(output_path, *args, **kwargs)
        path = Path(output_path) / self.config_file_name
        config = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in config["types"].items():
            if kind.startswith("transformers_modules."):
                config["types"][name] = ".".join(kind.split(".")[-2:])
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


class ImageEncoder(InputModule):
    """PIL images, or paths and URLs of images, to embeddings [b, d]."""

    save_in_root = False

    def __init__(self, tower: Any, processor: Any) -> None:
        super().__init__()
        self.tower = tower
        self.processor = processor

    @property
    def modalities(self) -> list[str]:
        """What it reads."""
        return ["image"]

    def preprocess(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Return ``pixel_values`` [b, 3, S, S]; a prompt is for texts and does nothing here."""
        images = [load_image(it["image"] if isinstance(it, dict) else it) for it in inputs]
        return {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` [b, d] to the features."""
        features["sentence_embedding"] = self.tower(features["pixel_values"]).pooler_output
        return features

    def get_embedding_dimension(self) -> int:
        """Return d."""
        return self.tower.config.embedding_size

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write a transformers folder."""
        self.tower.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "ImageEncoder":
        """Load a transformers folder, in float32 unless ``model_kwargs`` name another ``dtype``."""
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        dtype = (model_kwargs or {}).get("dtype", torch.float32)
        tower = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(tower, AutoImageProcessor.from_pretrained(folder))


class Referenced(Module):
    """A part whose files are where reference.json says: its ``name`` on the hub, None for this model's own folder."""

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "Referenced":
        """Load the part, with the settings of the reference where the caller has no others."""
        hub = {"token": token, "cache_folder": cache_folder, "local_files_only": local_files_only}
        path = cls.load_file_path(model_name_or_path, "reference.json", subfolder=subfolder, revision=revision, **hub)
        if path is not None:  # else saved by sentence-transformers, in its own place
            reference = json.loads(Path(path).read_text(encoding="utf-8"))
            subfolder = reference["subfolder"]
            if reference["name"] is not None:
                model_name_or_path, revision = reference["name"], reference["revision"]
            for name, settings in reference["settings"].items():
                kwargs[name] = settings | (kwargs.get(name) or {})
        return super().load(
            model_name_or_path, subfolder=subfolder, revision=revision, trust_remote_code=False, **hub, **kwargs
        )


class TextEncoder(Referenced, Transformer):
    """The encoder of texts."""


class TextDense(Referenced, Dense):
    """A Dense layer of the text encoder."""


class TextLayerNorm(Referenced, LayerNorm):
    """A LayerNorm of the text encoder, with its weights."""


class Truncation(Module):
    """The leading numbers of an embedding, for text encoders that were trained to be cut (Matryoshka)."""

    config_keys = ["dimensions"]  # noqa: RUF012 (sentence-transformers' own form)

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Cut ``sentence_embedding`` [b, d] to [b, dimensions]."""
        features["sentence_embedding"] = features["sentence_embedding"][:, : self.dimensions]
        return features

    def get_embedding_dimension(self) -> int:
        """Return the width of what comes out."""
        return self.dimensions

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write config.json."""
        self.save_config(output_path)
