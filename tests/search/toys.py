"""Images on disk, and towers of random weights that embed them."""

import hashlib
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from textlock.exports.loaded import Loaded, Towers
from textlock.models.text import TextConfig

from ..exports.towers import random_tower


def jpeg(seed, height=40, width=30):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


class Text:
    """A text tower whose embedding of a text is drawn from its hash."""

    device = torch.device("cpu")
    embed_dim = 64

    def __init__(self, name="one"):
        self.name = name
        self.encoded = []

    def fingerprint(self):
        return self.name

    def encode(self, texts):
        self.encoded += texts
        seeds = [int.from_bytes(hashlib.sha256(f"{self.name} {text}".encode()).digest()[:7], "big") for text in texts]
        rows = [torch.randn(self.embed_dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return F.normalize(torch.stack(rows), dim=-1)


class Counting:
    """Both towers, counting what goes through them."""

    def __init__(self, text=None, change=0.0):
        tower = random_tower()
        with torch.no_grad():
            tower.patch_embed.bias += change
        self.text = text or Text()
        self.images = 0

        @torch.no_grad()
        def encode_images(images):
            self.images += len(images)
            return F.normalize(tower(images), dim=-1)

        loaded = Loaded(tower, TextConfig(name="text"), None, (), None)
        self.towers = Towers(loaded, self.text, encode_images)
