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

from ..models.text import TextTower, TextTowerDescription, make_text_tower
from ..models.text_folder import local_folder, read_json, weight_files
from ..models.text_recipe import load_layers, read_recipe
from . import transformers_format
from .card import last_part, public_name
from .folder import IMAGE_FOLDER, TEXT_FOLDER, WEIGHTS, Exported, write_json

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


def find_text_tower(described: Mapping[str, Any], *, text_name: str | None, copy: bool) -> TextTower:
    """Load the text tower that a run was trained against, from the hub at its commit, its cache, or a local folder.

    Args:
        described: the `TextTowerDescription` of the run, stored as ``asdict``.
        text_name: the hub name of a tower that the run named by a local folder.
        copy: whether the tower is copied, so that a local folder will do.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: nothing says where others find it, it is another one now, or sentence-transformers is missing.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(
            "--format sentence-transformers runs the folder before it keeps it and needs sentence-transformers: "
            "pip install sentence-transformers"
        )
    hub = public_name(described) or (None if copy else text_name)
    if hub is None and not copy:
        raise ValueError(
            f"the run named the folder {last_part(described['name'])} as its text tower, which nobody else has: give "
            "--text-name with its name on the hub, or --copy-text"
        )
    folder = local_folder(described["name"]) if hub is None else local_folder(hub, revision=described["revision"])
    # By the name it was trained with: that of Nomic Embed Text says how it makes embeddings.
    config = TextTowerDescription.config_of({**described, "name": str(folder)})
    tower = make_text_tower(config, torch.device("cpu"))
    where = hub or last_part(described["name"])
    if hub is not None and tower.revision is None:
        raise ValueError(f"{hub} is a folder here: run this where it is none, so that the hub's is taken")
    if difference := tower.describe().difference_from(described):
        raise ValueError(f"{where} is not the text tower that the run was trained against: {difference}")
    return tower


def require(tower: Any) -> None:
    """Accept every tower."""


def write(exported: Exported, folder: Path, text_tower: TextTower, *, copy: bool) -> None:
    """Write image tower, text tower or reference to it, and code into an existing folder.

    Args:
        exported: what is written of the checkpoint.
        folder: where.
        text_tower: from `find_text_tower`.
        copy: whether the files of the text tower are copied.

    Raises OSError when a file cannot be written.
    """
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
    texts = list(types)
    types[IMAGE_FOLDER] = f"{_OURS}.ImageEncoder"
    router = {
        "types": types,
        "structure": {"text": texts, "image": [IMAGE_FOLDER]},
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
