"""The description of a text tower that is not there."""

from typing import Any

from textlock.models.text import TextTowerDescription
from textlock.models.text_recipe import Recipe


def describe(name: str = "owner/text", fingerprint: str = "abc", **changes: Any) -> TextTowerDescription:
    """Return the description of a tower with the recipe of Nomic Embed Text v1.5, but for what is named."""
    recipe = {
        "prefix": "search_query: ",
        "pool_prefix": True,
        "lower_case": False,
        "max_length": 77,
        "pooling": ("mean",),
        "layers": (),
        "layer_norm": True,
        "dimensions": 64,
    } | changes
    return TextTowerDescription(name, None, Recipe(**recipe), recipe["dimensions"], fingerprint)
