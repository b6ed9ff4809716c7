"""A written folder is loaded by the lines of its own model card and compared with the tower, before it is published."""

import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..models.text import TextTower
from ..models.text_folder import first_line
from ..models.vision import ModelConfig, VisionTower

_TOLERANCE = 1e-6
# A deep text encoder in float32, its sums in another order, moves unit rows by a few 1e-6. Another prompt, pooling or
# LayerNorm moves them by over 1e-2, and bfloat16 by 1e-3.
_TEXT_TOLERANCE = 1e-5


def compare_with_tower(snippet: str, folder: Path, tower: VisionTower) -> float:
    """Run a model card's lines on a random image and return the largest difference of its embedding from the tower's.

    Embeddings are of unit length. Allowed are 1e-6, or twice what float32 costs the tower itself on this image.

    Args:
        snippet: names the folder "path/to/this/folder" and the image "photo.jpg", and leaves ``embeddings`` [1, d].
        folder: what was written.
        tower: what it was written from.

    Raises ValueError where the folder does not load or gives another embedding.
    """
    pixels, expected, allowed = _embedded(tower)
    found = _run(snippet, folder, pixels, by="transformers")["embeddings"]
    return _require_near(found, expected, allowed, "transformers", "the tower")


def compare_with_towers(
    snippet: str, texts: Sequence[str], folder: Path, tower: VisionTower, text_tower: TextTower
) -> tuple[float, float]:
    """Do the same for the lines of a sentence-transformers folder; return the differences of images and of texts.

    Args:
        snippet: names the folder and the image as above, and leaves ``images`` [1, d] of the image
            and ``texts`` [n, d].
        texts: those that it embeds.
        folder: what was written.
        tower: whose images these are.
        text_tower: whose texts these are; they may differ by 1e-5.

    Raises ValueError where the folder does not load or gives other embeddings.
    """
    pixels, expected, allowed = _embedded(tower)
    by = "sentence-transformers"
    names = _run(snippet, folder, pixels, by=by, device=', device="cpu"')
    image = _require_near(torch.from_numpy(names["images"]), expected, allowed, by, "the tower")
    expected = text_tower.encode(texts)
    return image, _require_near(torch.from_numpy(names["texts"]), expected, _TEXT_TOLERANCE, by, "the text tower")


def _embedded(tower: VisionTower) -> tuple[Tensor, Tensor, float]:
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
    return pixels, expected, max(_TOLERANCE, 2 * float((expected - exact).abs().max()))


def _require_near(found: Tensor, expected: Tensor, allowed: float, by: str, whose: str) -> float:
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("nan")
    if not difference <= allowed:  # NaN is no number at all
        raise ValueError(
            f"the written folder, loaded by {by}, differs by {difference:.1e} from {whose} where {allowed:.1e} is "
            "allowed; nothing was kept"
        )
    return difference


def _run(snippet: str, folder: Path, pixels: Tensor, *, by: str, device: str = "") -> dict[str, Any]:
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
                f"{by} {importlib.metadata.version(by)} cannot load the folder as it was written, so nothing was kept: "
                f"{first_line(error)}"
            ) from error
    return names
