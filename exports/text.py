"""The text tower of a run, found again for a folder that holds or names it."""

from collections.abc import Mapping
from typing import Any

import torch

from ..models.text import TextTower, TextTowerDescription, make_text_tower
from ..models.text_folder import local_folder
from .card import last_part


def find_text_tower(described: Mapping[str, Any], hub: str | None) -> TextTower:
    """Load the text tower that a run was trained against.

    Args:
        described: the `TextTowerDescription` of the run, stored as ``asdict``.
        hub: its name on the hub, where or in whose cache it is looked for at the run's commit; None: the folder that
            the run names.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another one now.
    """
    folder = local_folder(described["name"]) if hub is None else local_folder(hub, revision=described["revision"])
    # By the name it was trained with: that of Nomic Embed Text says how it makes embeddings.
    tower = make_text_tower(TextTowerDescription.config_of({**described, "name": str(folder)}), torch.device("cpu"))
    if hub is not None and tower.revision is None:
        raise ValueError(f"{hub} is a folder here: run this where it is none, so that the hub's is taken")
    if difference := tower.describe().difference_from(described):
        where = hub or last_part(described["name"])
        raise ValueError(f"{where} is not the text tower that the run was trained against: {difference}")
    return tower
