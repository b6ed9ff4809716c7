"""A written folder is loaded by the lines of its own model card and compared with the tower, before it is published."""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..models.text_folder import first_line
from ..models.vision import ModelConfig, VisionTower


def compare_with_tower(snippet: str, folder: Path, tower: VisionTower, *, package: str, tolerance: float) -> float:
    """Run a model card's lines on a random image and return the largest difference of its embedding from the tower's.

    Embeddings are of unit length. Allowed are ``tolerance``, or twice what float32 costs the tower itself here.

    Args:
        snippet: names the folder "path/to/this/folder" and the image "photo.jpg", and leaves ``embeddings`` [1, d].
        folder: what was written.
        tower: what it was written from.
        package: what the lines load the folder with, for the message.
        tolerance: of each number of the embedding.

    Raises ValueError where the folder does not load or gives another embedding.
    """
    size = tower.image_size
    pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Its own copy, for plain torch: the blocks of a run may be compiled or bound to a kind of GPU.
    plain = VisionTower(tower.config, ModelConfig(pooling=tower.pooling, block="plain"), embed_dim=tower.embed_dim)
    plain.load_state_dict(tower.state_dict())
    plain.eval()
    with torch.no_grad():
        expected = F.normalize(plain(pixels), dim=-1)
        exact = F.normalize(plain.double()(pixels), dim=-1)
    found = _run(snippet, folder, pixels[0], package)
    difference = float((found - expected).abs().max())
    allowed = max(tolerance, 2 * float((expected - exact).abs().max()))
    if not difference <= allowed:  # NaN is no number at all
        raise ValueError(
            f"the written folder, loaded by {package}, differs by {difference:.1e} from the tower where "
            f"{allowed:.1e} is allowed; nothing was kept"
        )
    return difference


def _run(snippet: str, folder: Path, pixels: Tensor, package: str) -> Tensor:
    from ..models.text_encoder import quiet_transformers  # not above: it takes seconds

    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        photo = Path(scratch) / "photo.png"  # without loss
        Image.fromarray(pixels.numpy()).save(photo)
        lines = snippet.replace('"path/to/this/folder"', repr(str(folder))).replace('"photo.jpg"', repr(str(photo)))
        try:
            with quiet_transformers():
                exec(compile(lines, "README.md", "exec"), names)
        except Exception as error:  # whatever transformers and the file system raise
            raise ValueError(
                f"{package} {version(package)} cannot load the folder as it was written, so nothing was kept: "
                f"{first_line(error)}"
            ) from error
    return torch.as_tensor(names["embeddings"])
