"""Format ``onnx``: the folder of ``transformers`` with graphs beside its weights, for programs without torch.

onnx/model.onnx takes ``pixel_values`` float32 [batch, 3, S, S], as preprocessor_config.json says, and gives
``embeddings`` float32 [batch, d] of unit length. onnx/text_model.onnx, written on request, takes ``input_ids`` and
``attention_mask`` int64 [batch, tokens], padded on the right, and gives those of texts: its tokenizer.json lies beside
it, and config.json names the prefix that every text gets. Opset 18. Read back by its weights, as ``transformers`` is.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.text import TextTower
from ..models.text_folder import first_line
from ..models.vision import VisionTower
from . import transformers_format
from .check import compare_with_tower
from .folder import Exported, Texts

GRAPH: Final = "onnx/model.onnx"
TEXT_GRAPH: Final = "onnx/text_model.onnx"
TOKENIZER: Final = "onnx/tokenizer.json"
OPSET: Final = 18
_TOLERANCE: Final = 1e-5

SNIPPET: Final = """\
import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

folder = "path/to/this/folder"
with open(folder + "/preprocessor_config.json") as file:
    settings = json.load(file)
side = settings["crop_size"]["height"]
image = ImageOps.fit(Image.open("photo.jpg").convert("RGB"), (side, side), Image.Resampling.BICUBIC)
pixels = (np.asarray(image, np.float32) / 255 - settings["image_mean"]) / settings["image_std"]
session = onnxruntime.InferenceSession(folder + "/onnx/model.onnx")
(embeddings,) = session.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
"""
TEXT_SNIPPET: Final = """\
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(folder + "/onnx/tokenizer.json")
with open(folder + "/config.json") as file:
    prefix = json.load(file)["text_tower"]["recipe"]["prefix"]
encodings = tokenizer.encode_batch([prefix + text for text in ("a red bicycle", "a bowl of soup")])
tokens = {
    "input_ids": np.array([encoding.ids for encoding in encodings]),
    "attention_mask": np.array([encoding.attention_mask for encoding in encodings]),
}
(texts,) = onnxruntime.InferenceSession(folder + "/onnx/text_model.onnx").run(None, tokens)
print(embeddings @ texts.T)
"""
LIBRARY: Final = "transformers"  # of the hub's names, the one for the folder that the graphs are in
LOADERS: Final = "onnxruntime, numpy and pillow"


# Of several lengths: the longest is cut, one word has the fewest tokens.
_TEXTS: Final = ("a bowl of soup " * 200, "two dogs on a beach at dusk, one of them wet", "a red bicycle", "", "soup")


class _Images(nn.Module):
    """Pixels to unit embeddings."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = transformers_format.build(tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.tower(pixel_values, return_dict=False)[1], dim=-1)


class _Texts(nn.Module):
    """Right-padded tokens to unit embeddings."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower
        self.encoder = tower.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.tower.embeddings_of(hidden, attention_mask.sum(dim=1))


def require(exported: Exported) -> None:
    """Raise ValueError where what writes and checks the graphs is not installed. Every tower is accepted."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install --editable '.[onnx]'")


def write(exported: Exported, folder: Path, texts: Texts | None = None) -> None:
    """Write the folder of ``transformers`` and the graphs into an existing folder; of texts where there are any.

    Raises:
        OSError: a file cannot be written.
        ValueError: the graph cannot be made, or gives other embeddings than the tower.
    """
    transformers_format.write(exported, folder)
    (folder / GRAPH).parent.mkdir()
    size = exported.tower.image_size
    pixels = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    _write_graph(
        folder / GRAPH, _Images(exported.tower), {"pixel_values": pixels}, {"pixel_values": pixels[:1]}, {0: "batch"}
    )
    if texts is not None:
        _write_texts(texts.tower, folder)


def check(exported: Exported, folder: Path, texts: Texts | None = None) -> str:
    """Run the card's lines on the folder and say what they gave; raises ValueError where that is something else."""
    return compare_with_tower(SNIPPET, folder, exported.tower, package="onnxruntime", tolerance=_TOLERANCE)


def snippets(exported: Exported, texts: Texts | None = None) -> tuple[str, str | None]:
    """Return the lines of the model card for images, and for texts where the folder has their graph."""
    return SNIPPET, "" if texts is None else TEXT_SNIPPET


def _write_texts(tower: TextTower, folder: Path) -> None:
    """Write the graph of the texts and its tokenizer next to that of the images."""
    tokenizer = tower.padding_tokenizer()
    tokenizer.save(str(folder / TOKENIZER))
    encodings = tokenizer.encode_batch([tower.recipe.prefix + text for text in _TEXTS])
    tokens = {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
    }
    longest = int(tokens["attention_mask"][-1].sum())
    shorter = {name: values[-1:, :longest] for name, values in tokens.items()}
    _write_graph(folder / TEXT_GRAPH, _Texts(tower), tokens, shorter, {0: "batch", 1: "tokens"})


def _write_graph(
    path: Path, module: nn.Module, inputs: dict[str, Tensor], others: dict[str, Tensor], dynamic: dict[int, str]
) -> None:
    """Write the graph of a module on these inputs, and compare both on them and on others of another shape."""
    import onnxruntime

    module = module.eval()
    dimensions = {at: torch.export.Dim(name) for at, name in dynamic.items()}
    try:
        # The exporter warns of its own progress.
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            program = torch.onnx.export(
                module,
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(inputs, dimensions),
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["embeddings"],
                verbose=False,
            )
        assert program is not None
        program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:  # whatever torch's exporter and onnxruntime raise of a module that they cannot express
        raise ValueError(f"{path.name} cannot be made of this tower: {first_line(error)}") from error
    for some in (inputs, others):
        with torch.no_grad():
            expected = module(**some).numpy()
        (found,) = session.run(None, {name: values.numpy() for name, values in some.items()})
        difference = float(np.abs(found - expected).max())
        if not difference <= _TOLERANCE:  # NaN is no number at all
            raise ValueError(
                f"{path.name} gives embeddings that differ by {difference:.1e} from the tower's where {_TOLERANCE:.0e} "
                "is allowed"
            )
