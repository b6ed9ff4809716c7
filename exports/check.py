"""A written folder is loaded by the lines of its model card and compared with the towers, before it is published."""

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..models.text import TextTower
from ..models.text_folder import first_line
from ..models.vision import ModelConfig, VisionTower

# A deep text encoder in float32, its sums in another order, moves unit rows by a few 1e-6. Another prompt, pooling or
# LayerNorm moves them by over 1e-2, and bfloat16 by 1e-3.
_TEXT_TOLERANCE = 1e-5


def compare_with_tower(snippet: str, folder: Path, tower: VisionTower, *, package: str, tolerance: float) -> str:
    """Run a model card's lines on a random image and say by how much its embedding differs from the tower's.

    Embeddings are of unit length. Allowed are ``tolerance``, or twice what float32 costs the tower itself here.

    Args:
        snippet: names the folder "path/to/this/folder" and the image "photo.jpg", and leaves ``embeddings`` [1, d].
        folder: what was written.
        tower: what it was written from.
        package: what the lines load the folder with.
        tolerance: of each number of the embedding.

    Raises ValueError where the folder does not load or gives another embedding.
    """
    pixels, expected, allowed = _embedded(tower, tolerance)
    found = _run(snippet, folder, pixels, package)["embeddings"]
    difference = require_near(found, expected, allowed, package, "the trained tower")
    return (
        f"The export ran these lines with {package} {version(package)} on a random image: the embedding differed from "
        f"that of the trained tower by {difference:.0e} at most."
    )


def compare_with_towers(
    snippet: str, texts: Sequence[str], folder: Path, tower: VisionTower, text_tower: TextTower, *, package: str
) -> str:
    """Do the same for lines that embed images and texts.

    Args:
        snippet: names the folder and the image as above, and leaves ``images`` [1, d] of the image and ``texts``
            [n, d].
        texts: those that it embeds.
        folder: what was written.
        tower: whose images these are; they may differ by 1e-6.
        text_tower: whose texts these are; they may differ by 1e-5.
        package: what the lines load the folder with.

    Raises ValueError where the folder does not load or gives other embeddings.
    """
    pixels, expected, allowed = _embedded(tower, 1e-6)
    names = _run(snippet, folder, pixels, package, device=', device="cpu"')
    image = require_near(names["images"], expected, allowed, package, "the trained tower")
    text = require_near(names["texts"], text_tower.encode(texts), _TEXT_TOLERANCE, package, "the text tower")
    return (
        f"The export ran these lines with {package} {version(package)} on the CPU and a random image: its embedding "
        f"differed from that of the trained tower by {image:.0e} at most, those of the texts from the text tower's by "
        f"{text:.0e}."
    )


def require_near(found: Any, expected: Tensor, allowed: float, package: str, whose: str) -> float:
    """Return the largest difference of embeddings from the expected ones, both [n, d].

    Raises ValueError where it is more than allowed.
    """
    rows = torch.as_tensor(found)
    difference = float((rows - expected).abs().max()) if rows.shape == expected.shape else float("nan")
    if not difference <= allowed:  # NaN is no number at all
        raise ValueError(
            f"the written folder, loaded by {package}, differs by {difference:.1e} from {whose} where {allowed:.1e} is "
            "allowed; nothing was kept"
        )
    return difference


def _embedded(tower: VisionTower, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """Return a random image, uint8 [1, S, S, 3], its unit embedding, and by how much another float32 may differ."""
    size = tower.image_size
    pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # Its own copy, for plain torch: the blocks of a run may be compiled or bound to a kind of GPU.
    plain = VisionTower(tower.config, ModelConfig(pooling=tower.pooling, block="plain"), embed_dim=tower.embed_dim)
    plain.load_state_dict(tower.state_dict())
    plain.eval()
    with torch.no_grad():
        expected = F.normalize(plain(pixels), dim=-1)
        exact = F.normalize(plain.double()(pixels), dim=-1)
    return pixels, expected, max(tolerance, 2 * float((expected - exact).abs().max()))


def _run(snippet: str, folder: Path, pixels: Tensor, package: str, *, device: str = "") -> dict[str, Any]:
    """Run the lines and return their names; ``device`` is added behind the name of the folder."""
    from ..models.text_encoder import quiet_transformers  # not above: it takes seconds

    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        photo = Path(scratch) / "photo.png"  # without loss
        Image.fromarray(pixels[0].numpy()).save(photo)
        lines = snippet.replace('"path/to/this/folder"', repr(str(folder)) + device)
        lines = lines.replace('"photo.jpg"', repr(str(photo)))
        try:
            with quiet_transformers():
                exec(compile(lines, "README.md", "exec"), names)
        except Exception as error:  # whatever these libraries and the file system raise
            raise ValueError(
                f"{package} {version(package)} cannot load the folder as it was written, so nothing was kept: "
                f"{first_line(error)}"
            ) from error
    return names
