"""Towers and images of a few numbers, for evaluations whose result is known."""

import torch
import torch.nn.functional as F

WIDTH = 8


def unit_rows(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def toy_text(texts):
    """Return unit embeddings that depend on the text alone."""
    rows = [unit_rows(WIDTH, seed=sum(i * b for i, b in enumerate(text.encode(), 1))) for text in texts]
    return torch.stack(rows) if rows else torch.empty(0, WIDTH)


class ToyTower:
    def encode(self, texts):
        return toy_text(texts)


def toy_encoder(images):
    """Return embeddings of images, not normalised."""
    projection = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(2))
    return (images.float() - 127.5).flatten(1) @ projection / 50


def random_images(count):
    return torch.randint(0, 256, (count, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def see_colours(images):
    """Return the mean colour of each image as its unit embedding."""
    return F.normalize(images.float().mean(dim=(1, 2)) + 1e-3, dim=-1)
