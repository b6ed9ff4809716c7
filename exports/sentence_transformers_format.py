"""Format ``sentence-transformers``: texts and images into one space by ``SentenceTransformer(folder).encode``.

A Router leads texts through the text encoder that the images were trained against, with its prompt, and images through
the folder of the transformers format in image/. The text encoder is that of the hub at one commit, or a copy in text/.
The code of the parts that sentence-transformers does not have is sentence_textlock.py next to this file, copied as it
is; it imports nothing of this project.
"""

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from ..models.text import TextTower
from ..models.text_folder import read_json, weight_files
from ..models.text_recipe import load_layers, read_recipe
from . import transformers_format
from .card import public_name
from .check import compare_with_towers
from .folder import IMAGE_FOLDER, TEXT_FOLDER, WEIGHTS, Exported, Texts, write_json

_CODE: Final = "sentence_textlock.py"
_OURS: Final = "sentence_textlock"
_THEIRS: Final = "sentence_transformers.sentence_transformer.modules"
_NORMALIZE: Final = "sentence_transformers.base.modules.normalize.Normalize"

# Beside its weights, all that is read of a text encoder's folder, and under which terms it may be copied.
_COPIED: Final = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
# Fields of a configuration that say nothing of what is computed.
_BOOKKEEPING: Final = ("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype")

TEXTS: Final = ("a red bicycle", "a bowl of soup on the table by the window")
SNIPPET: Final = f"""\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder", trust_remote_code=True)
images = model.encode([Image.open("photo.jpg")])
texts = model.encode({json.dumps(TEXTS)})
similarities = model.similarity(images, texts)
"""
LIBRARY: Final = "sentence-transformers"
LOADERS: Final = "sentence-transformers 6.2 or later"


def require(exported: Exported) -> None:
    """Raise ValueError where sentence-transformers is not installed. Every tower is accepted."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(
            "--format sentence-transformers runs the folder before it keeps it and needs sentence-transformers: "
            "pip install sentence-transformers"
        )


def write(exported: Exported, folder: Path, texts: Texts | None) -> None:
    """Write image tower, text tower or reference to it, and code into an existing folder.

    Raises OSError when a file cannot be written.
    """
    assert texts is not None  # export.py gives them to this format
    text_tower, copy = texts.tower, texts.copied
    image = folder / IMAGE_FOLDER
    image.mkdir()
    transformers_format.write(exported, image)
    shutil.copyfile(Path(__file__).with_name(_CODE), folder / _CODE)

    root = Path(text_tower.config.name)
    if copy:
        _copy_text(root, folder / TEXT_FOLDER)
    source = {
        "name": None if copy else public_name({"name": str(root), "revision": text_tower.revision}),
        "revision": None if copy else text_tower.revision,
    }
    types = dict(_write_text(text_tower, folder, source))
    of_texts = list(types)
    types[IMAGE_FOLDER] = f"{_OURS}.ImageEncoder"
    router = {
        "types": types,
        "structure": {"text": of_texts, "image": [IMAGE_FOLDER]},
        "parameters": {
            "default_route": "text",
            "allow_empty_key": True,
            "route_mappings": {"(None, 'text')": "text", "(None, 'image')": "image"},
        },
    }
    write_json(folder / "router_config.json", router)
    (folder / "1_Normalize").mkdir()
    write_json(folder / "1_Normalize" / "config.json", {})
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{_OURS}.TextImageRouter"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": _NORMALIZE},
    ]
    write_json(folder / "modules.json", modules)
    # Queries and documents alike: the images were trained against texts with this prefix.
    prefix = text_tower.recipe.prefix
    settings = {
        "default_prompt_name": "query" if prefix else None,
        "model_type": "SentenceTransformer",
        "prompts": {"query": prefix, "document": prefix},
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", settings)


def check(exported: Exported, folder: Path, texts: Texts | None) -> str:
    """Run the card's lines on the folder and say what they gave; raises ValueError where that is something else."""
    assert texts is not None
    return compare_with_towers(SNIPPET, TEXTS, folder, exported.tower, texts.tower, package="sentence-transformers")


def snippets(exported: Exported, texts: Texts | None) -> tuple[str, str | None]:
    """Return the lines of the model card, which embed images and texts."""
    return SNIPPET, ""


def _write_text(tower: TextTower, folder: Path, source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Write the parts that texts go through; yield the folder and the class of each, in order."""
    from transformers import AutoConfig  # not above: these take seconds

    from ..models.text_encoder import read_config

    root, recipe = Path(tower.config.name), tower.recipe
    said = read_recipe(root, tower.config.name)
    inside = Path(TEXT_FOLDER) if source["name"] is None else Path()

    def refer(name: str, place: Path, **settings: Any) -> None:
        (folder / name).mkdir()
        subfolder = (inside / place.relative_to(root)).as_posix()
        reference = {**source, "subfolder": "" if subfolder == "." else subfolder, "settings": settings}
        write_json(folder / name / "reference.json", reference)

    config = read_config(said.encoder)
    ours, theirs = (it.to_dict() for it in (config, AutoConfig.from_pretrained(said.encoder, trust_remote_code=False)))
    refer(
        "text_encoder",
        said.encoder,
        # Fields that transformers does not know by the names that Nomic's own code gives them.
        config_kwargs={k: v for k, v in ours.items() if k not in _BOOKKEEPING and theirs.get(k) != v},
        model_kwargs={"dtype": "float32"},
        processor_kwargs={"model_max_length": recipe.max_length, "padding_side": "right"},
    )
    yield "text_encoder", f"{_OURS}.TextEncoder"

    width = config.get_text_config().hidden_size
    pooling = {"embedding_dimension": width, "pooling_mode": recipe.pooling, "include_prompt": recipe.pool_prefix}
    yield _write_part(folder, "text_pooling", pooling), f"{_THEIRS}.Pooling"

    for number, (kind, place) in enumerate(said.layers, 1):
        name = f"text_layer_{number}"
        if kind == "Normalize":
            yield _write_part(folder, name, {}), _NORMALIZE
        else:
            refer(name, place)
            yield name, f"{_OURS}.Text{kind}"
    width = load_layers(said, width * len(recipe.pooling))[2]
    if recipe.layer_norm:
        yield _write_part(folder, "text_norm", {"dimension": width}), f"{_THEIRS}.LayerNorm"
        # A LayerNorm without weights is one whose weights do nothing; its eps is 1e-5, too.
        weights = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        save_file(weights, folder / "text_norm" / WEIGHTS, metadata={"format": "pt"})
    if recipe.dimensions < width:
        yield _write_part(folder, "text_dimensions", {"dimensions": recipe.dimensions}), f"{_OURS}.Truncation"


def _write_part(folder: Path, name: str, config: Mapping[str, Any]) -> str:
    (folder / name).mkdir()
    write_json(folder / name / "config.json", config)
    return name


def _copy_text(root: Path, target: Path) -> None:
    """Copy what makes the embeddings of a text encoder, byte for byte, so that its fingerprint stays."""
    parts = {path for path in root.glob("[0-9]_*") if path.is_dir()}
    if (root / "modules.json").is_file():
        parts |= {root / module["path"] for module in read_json(root / "modules.json", list)}
    for part in sorted({root, *parts}):
        (target / part.relative_to(root)).mkdir(parents=True, exist_ok=True)
        found = [path for pattern in _COPIED for path in part.glob(pattern) if path.is_file()]
        if any(part.glob("*.safetensors")):
            found += [*weight_files(part), *part.glob("model.safetensors.index.json")]
        for path in found:
            shutil.copyfile(path, target / path.relative_to(root))
