"""What the classes of class folders are called: by their folders, by a file, or by ImageNet's list in another package.

Zero-shot accuracy is decided by names: of ImageNet's folders, n01440764 and its like, every figure would be chance.
"""

import csv
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .captions import read_utf8, unique_keys

IMAGENET = "imagenet"
TEMPLATE_SETS = {"openai-80": "OPENAI_IMAGENET_TEMPLATES", "openai-7": "SIMPLE_IMAGENET_TEMPLATES"}
_FOLDER_COLUMNS = ("folder", "wnid", "synset", "id", "class_id", "directory")
_NAME_COLUMNS = ("name", "class_name", "class", "label", "words")
# WordNet's, numbers, and hashes.
_ID = re.compile(r"n\d{8}|\d+|[0-9a-f]{12,}", re.IGNORECASE)


def names_of_folders(folders: Sequence[str], where: Path | str) -> list[str]:
    """Return the names that class folders have themselves; an underscore reads as a space.

    Raises:
        ValueError: most of them are ids and no words, or two read alike.
    """
    ids = [folder for folder in folders if _ID.fullmatch(folder)]
    if 2 * len(ids) > len(folders):
        raise ValueError(
            f"the class folders in {where} are called {ids[0]} and the like, which no text says: give their names, by "
            "--class-names FILE of evaluate.py or --evals.zero-shot-names FILE of train.py (imagenet for ImageNet's)"
        )
    return _distinct([folder.replace("_", " ") for folder in folders], folders, where)


def read_class_names(names: Path | str, folders: Sequence[str], where: Path | str) -> list[str]:
    """Return the names that a file gives class folders, in the order of the folders.

    Args:
        names: ``imagenet`` for the names in the open_clip package; else a file. JSON: an object {folder: name}, or a
            list with a name for each folder in sorted order. CSV or TSV: a column folder (or wnid, synset, id, ...) and
            a column name (or class, label, words, ...). Any other: a name a line in sorted order of the folders; or a
            folder, a tab or comma and its name; or an id, a space and its name, of which the part before a comma
            counts, as there are synonyms. Folders that are not there may be named too.
        folders: sorted names of the class folders.
        where: the folder they are in.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no such file, leaves a folder without a name, or gives two of them the same.
    """
    if str(names) == IMAGENET:
        return _imagenet_names(folders, where)
    path = Path(names)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a file with the names of the class folders in {where}")
    text = read_utf8(path)
    match path.suffix.lower():
        case ".json":
            found = _of_json(path, text)
        case ".csv" | ".tsv":
            found = _of_table(path, text)
        case _:
            found = _of_lines(path, text, folders)
    if isinstance(found, list):
        if len(found) != len(folders):
            raise ValueError(
                f"{path} has {len(found)} names and {where} {len(folders)} class folders: one for each, in sorted order"
            )
        found = dict(zip(folders, found, strict=True))
    for folder in folders:
        if not isinstance(found.get(folder), str) or not found[folder].strip():
            raise ValueError(f"{path} has no name for class folder {folder} of {where}: add one")
    return _distinct([found[folder].strip() for folder in folders], folders, path)


def _distinct(names: list[str], folders: Sequence[str], where: Path | str) -> list[str]:
    first: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        if name in first:
            raise ValueError(f"{where}: the classes {first[name]} and {folder} are both named {name}: name them apart")
        first[name] = folder
    return names


def _of_json(path: Path, text: str) -> dict[str, Any] | list[Any]:
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
    except KeyError as error:
        raise ValueError(f"{path} names {error.args[0]} more than once") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it must map class folders to class names") from error
    if not isinstance(found, dict | list):
        raise ValueError(f"{path} holds a {type(found).__name__}: it must map class folders to class names")
    return found


def _of_table(path: Path, text: str) -> dict[str, str]:
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    columns = list(rows[0]) if rows else []
    chosen = []
    for what, known in (("folder", _FOLDER_COLUMNS), ("name", _NAME_COLUMNS)):
        found = [column for column in columns if str(column).strip().lower() in known]
        if len(found) != 1:
            raise ValueError(
                f"{path} needs one column of {', '.join(known)} for the {what} of a class; it has "
                f"{', '.join(map(str, columns)) or 'none'}"
            )
        chosen += found
    names: dict[str, str] = {}
    for row in rows:
        folder = str(row[chosen[0]])
        if folder in names:
            raise ValueError(f"{path} names {folder} more than once")
        names[folder] = str(row[chosen[1]] or "")
    return names


def _of_lines(path: Path, text: str, folders: Sequence[str]) -> dict[str, str] | list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A word and a space may begin a name; an id does not.
    of_ids = all(_ID.fullmatch(folder) for folder in folders)
    pairs = [re.split(r"[\s,]+" if of_ids else r"\s*[\t,]\s*", line, maxsplit=1) for line in lines]
    named = [pair for pair in pairs if len(pair) == 2 and pair[0] in folders]
    if not named:
        return lines
    if sorted(folder for folder, _ in named) != list(folders):
        raise ValueError(
            f"{path}: {len(named)} of {len(lines)} lines begin with one of the {len(folders)} class folders: give a "
            "line to each, its folder and its name, or names alone in sorted order"
        )
    return {folder: name.split(",")[0] if of_ids else name for folder, name in named}


def _imagenet_names(folders: Sequence[str], where: Path | str) -> list[str]:
    if len(folders) != 1000 or not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        raise ValueError(
            f"{where} has {len(folders)} class folders and not the 1,000 of ImageNet, n01440764 to n15075141: give the "
            "names of its classes in a file"
        )
    return list(_open_clip("IMAGENET_CLASSNAMES", "the names of ImageNet's classes"))


def _open_clip(name: str, what: str) -> Any:
    try:
        return getattr(importlib.import_module("open_clip"), name)
    except ImportError as error:
        raise ValueError(
            f'{what} are taken from open_clip, which is not installed: pip install "textlock[peers]"'
        ) from error


def resolve_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return prompts with ``{}`` for the name of a class, in place of names of sets and of files.

    Args:
        templates: each a prompt, ``openai-80`` or ``openai-7`` for the sets in open_clip, or a file: a JSON list, or a
            prompt a line.

    Raises:
        ValueError: open_clip is not installed, or a file is no such list.
    """
    prompts: list[str] = []
    for template in templates:
        if template in TEMPLATE_SETS:
            found = _open_clip(TEMPLATE_SETS[template], f"the prompts {template}")
            prompts += [prompt("{}") for prompt in found]
        elif "{}" in template:
            prompts.append(template)
        else:
            prompts += _templates_of_file(Path(template))
    return tuple(prompts)


def _templates_of_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = (
            json.loads(text) if path.suffix.lower() == ".json" else [line for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no prompt with {{}}, none of {', '.join(TEMPLATE_SETS)}, and no file of prompts: {error}"
        ) from error
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(prompt, str) and "{}" in prompt for prompt in found)
    ):
        raise ValueError(f"{path} must hold prompts alone, each with {{}} where the class name goes")
    return found
