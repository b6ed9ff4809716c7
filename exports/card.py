"""The model card of an exported folder: what a stranger needs to use it and to judge its figures.

Nothing in it leads to the machine of the run: a local path is named by its last part, a text tower from a local folder
by its fingerprint.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeGuard
from urllib.parse import urlsplit

import yaml

from ..data.sources import Source, parse_sources
from ..engine.trained import LoadedTower
from ..evals.benchmark_report import SuiteRun, read_results
from ..evals.benchmark_suites import SUITES
from ..evals.counts import describe_count
from ..models.vision import IMAGE_MEAN, IMAGE_STD
from .folder import Exported
from .loaded import image_fingerprint

_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FIGURE: Final = re.compile(r"(?:zero_shot\w*_top|\w*recall@)\d+")
_KINDS: Final = ("zero_shot_unseen", "zero_shot_renamed", "zero_shot")

_CARD: Final = """\
---
{metadata}---

# Image encoder in the space of {text_title}

`{architecture}` with {parameters:.1f} M parameters embeds images of {size} x {size} pixels as {dimensions} numbers,
compared by cosine with each other and with the embeddings of the text encoder below, against which textlock trained it
(Locked Text Tuning).

```python
{snippet}```

These lines need {loaders}. {checked}

## Text embeddings

The images were trained against these, and others are not in their space:

| text encoder | {text_name} |
| --- | --- |
| prefix, in front of every text | {prefix} |
| longest text | {max_length} tokens, prefix included{lower_case} |
| pooling | {pooling} |
| after pooling | {after} |
| dimensions | {dimensions} |
| fingerprint (SHA-256) of its files and all of the above | `{fingerprint}` |

{text_code}## Images

The short side is resized to {size} pixels (bicubic, antialiased), the central square cut out, and values from 0 to 1
normalised with mean {mean} and standard deviation {std}.
Where the margins of the square are uneven, transformers may place it a pixel aside from textlock's evaluation.

| tower | |
| --- | --- |
| patches | {patch} x {patch} pixels, {grid} x {grid} of them |
| trunk | {depth} blocks of width {width}, {heads} heads, {hidden} inner channels |
| pooling | {image_pooling}{projection} |

## Training

| | |
| --- | --- |
| shards | {shards} |
| samples seen | {samples:,}, in {steps:,} steps of {batch:,} |
| starting weights | {start} |
| logit scale at the end | {logit_scale:.4f} |

## Figures

{figures}
"""


def model_card(
    loaded: LoadedTower,
    exported: Exported,
    *,
    snippet: str,
    loaders: str,
    text_snippet: str | None,
    checked: str,
    library: str,
    license_name: str | None,
) -> str:
    """Return the text of README.md.

    Args:
        loaded: the checkpoint.
        exported: what is written of it.
        snippet: Python that embeds an image.
        loaders: the software that the snippet needs.
        text_snippet: Python that embeds texts and goes on from ``snippet``; empty where that embeds texts, too; None:
            lines for transformers, where a public name and transformers are enough.
        checked: a sentence: whether the snippet was run, and what it gave.
        library: what loads the folder, as the hub names it.
        license_name: the identifier of a licence for the card's metadata; None leaves it out.

    Raises:
        ValueError: a file of figures next to the checkpoint is damaged.
    """
    config, shape, described = loaded.config, loaded.tower.config, exported.text_tower
    assert described is not None  # every checkpoint has one
    recipe, name = described["recipe"], described["name"]
    texts_too = library == "sentence-transformers"
    pipeline = "sentence-similarity" if texts_too else "image-feature-extraction"
    metadata = {"library_name": library, "pipeline_tag": pipeline, "license": license_name}
    after = [*recipe["layers"], *(["LayerNorm without weights, eps 1e-5"] if recipe["layer_norm"] else [])]
    return _CARD.format(
        metadata=yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False),
        text_title="a text encoder" if name is None else _code(name),
        architecture=config.model.name,
        parameters=sum(parameter.numel() for parameter in loaded.tower.parameters()) / 1e6,
        size=shape.image_size,
        dimensions=loaded.tower.embed_dim,
        snippet=snippet,
        loaders=loaders,
        checked=checked,
        text_name=(
            ("in the folder text/" if texts_too else "a local folder of whoever trained this")
            + ", with the fingerprint below"
            if name is None
            else _code(name) + (f", commit `{described['revision']}`" if described["revision"] else "")
        ),
        prefix=(_code(recipe["prefix"]) if recipe["prefix"] else "none")
        + ("" if recipe["pool_prefix"] else ", whose tokens are left out of pooling"),
        max_length=recipe["max_length"],
        lower_case="; lower-cased" if recipe["lower_case"] else "",
        pooling=" and ".join(recipe["pooling"]),
        after=", ".join([*after, "unit length"]),
        fingerprint=described["fingerprint"],
        text_code=_text_code(described) if text_snippet is None else _fenced(text_snippet),
        mean=_numbers(IMAGE_MEAN),
        std=_numbers(IMAGE_STD),
        patch=shape.patch_size,
        grid=shape.grid,
        depth=shape.depth,
        width=shape.width,
        heads=shape.heads,
        hidden=shape.hidden,
        image_pooling=loaded.tower.pooling,
        projection="" if loaded.tower.projection is None else f", projected to {loaded.tower.embed_dim}",
        shards=", ".join(map(_source, parse_sources(config.data.shards))),
        samples=loaded.samples_seen,
        steps=loaded.step,
        batch=config.data.batch_size,
        start=_starting_weights(config.model.weights),
        logit_scale=loaded.logit_scale,
        figures=_figures(loaded),
    )


def public_name(described: Mapping[str, Any]) -> str | None:
    """Return the hub name of a stored `TextTowerDescription`; None of a local folder, which has no commit."""
    if described["revision"] is None:
        return None
    name = str(described["name"])
    for part in Path(name).parts:  # a folder of the hub's cache
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return name


def last_part(place: str) -> str:
    """Return the last part of a path or URL: what comes before it is nobody else's business."""
    return PurePosixPath(urlsplit(place).path if "://" in place else place).name or "local"


def _source(source: Source) -> str:
    weight = "" if source.weight == 1 else f", each sample {float(source.weight):g} times an epoch"
    return _code(last_part(source.address)) + weight


def _starting_weights(source: str | None) -> str:
    if source is None:
        return "random"
    is_public = _HUB_NAME.fullmatch(source) and not Path(source).exists()
    return _code(source) if is_public else "a local file"


def _text_code(described: Mapping[str, Any]) -> str:
    """Return Python that makes the text embeddings, where a public name and transformers alone are enough for it."""
    recipe, name = described["recipe"], described["name"]
    [*others, pooling] = recipe["pooling"]
    pooled = {
        "mean": "(hidden * mask).sum(dim=1) / mask.sum(dim=1)",
        "cls": "hidden[:, 0]",
        "lasttoken": "hidden[torch.arange(len(hidden)), mask.sum(dim=(1, 2)).long() - 1]",
    }.get(pooling)
    needs_more = others or recipe["layers"] or recipe["lower_case"] or not recipe["pool_prefix"]
    if name is None or pooled is None or needs_more:
        return ""
    where = json.dumps(name, ensure_ascii=False)
    if described["revision"]:
        where += f', revision="{described["revision"]}"'
    norm = "text = F.layer_norm(text, text.shape[-1:], eps=1e-5)\n" if recipe["layer_norm"] else ""
    return f"""\
With transformers 5, after the lines above:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({where})
encoder = AutoModel.from_pretrained({where}).eval()
texts = [{json.dumps(recipe["prefix"], ensure_ascii=False)} + text for text in ("a red bicycle", "a bowl of soup")]
tokens = tokenizer(
    texts, padding=True, truncation=True, max_length={recipe["max_length"]}, padding_side="right", return_tensors="pt"
)
mask = tokens["attention_mask"].unsqueeze(-1)
with torch.no_grad():
    hidden = encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state.float()
text = {pooled}
{norm}text = F.normalize(text[:, :{described["embed_dim"]}], dim=-1)
print(embeddings @ text.T)
```

"""


def _fenced(snippet: str) -> str:
    return f"After the lines above:\n\n```python\n{snippet}```\n\n" if snippet else ""


def _figures(loaded: LoadedTower) -> str:
    """Return a table of the figures that were measured with this very checkpoint."""
    # A checkpoint that was copied out of its run has no other place than its own.
    places = [loaded.folder.parent.parent] * (loaded.folder.parent.name == "checkpoints") + [loaded.folder]
    results = _read_object(places[0] / "results.json")
    measured = []
    if results.get("samples_seen") == loaded.samples_seen:
        measured.append((results, loaded.config.evals.zero_shot, loaded.config.evals.retrieval))
    for place in places:
        evaluation = _read_object(place / "evaluation.json")
        data = evaluation.get("data")
        if evaluation.get("step") == loaded.step and isinstance(data, str):
            measured.append((evaluation, data, data))
    rows = [row for figures, classes, pairs in measured for row in _rows(figures, classes, pairs)]
    rows += [row for place in places for name in SUITES for row in _suite_rows(name, place, loaded)]
    if not rows:
        return "None was measured with this checkpoint."
    return "\n".join(["| figure | value | chance | measured on |", "| --- | --- | --- | --- |", *dict.fromkeys(rows)])


def _rows(figures: Mapping[str, Any], classes: str | None, pairs: str | None) -> Iterator[str]:
    chance, counts = (it if isinstance(it := figures.get(key), dict) else {} for key in ("chance", "counts"))
    for name, value in figures.items():
        if not _FIGURE.fullmatch(name) or not _is_share(value):
            continue
        kind = next((kind for kind in _KINDS if name.startswith(kind)), "retrieval")
        place = pairs if kind == "retrieval" else classes if kind != "zero_shot_unseen" else None
        counted = [] if place is None else [_code(last_part(place))]
        counted += [describe_count(counts[kind])] if kind in counts else []
        blind = chance.get(name)
        chance_text = f"{100 * blind:.2f} %" if _is_share(blind) else ""
        yield f"| {name} | {100 * value:.2f} % | {chance_text} | {', '.join(counted) or 'not recorded'} |"


def _suite_rows(name: str, place: Path, loaded: LoadedTower) -> Iterator[str]:
    """Yield the main figures that evaluate.py measured of a suite with this very tower, and averages of all tasks."""
    path = place / f"evaluation-{name}.json"
    identity = _read_object(path).get("identity")
    if not isinstance(identity, dict) or identity.get("image tower") != image_fingerprint(loaded.tower):
        return
    results = read_results(path, identity)
    for task in SUITES[name].tasks:
        for metric in task.metrics:
            value = results.figure(task, metric)
            if value is not None:
                counted = describe_count(results.tasks[task.key]["counts"])
                yield f"| {name}, {task.name}: {metric} | {100 * value:.2f} % |  | {counted} |"
    for average, value in SuiteRun(SUITES[name], {}, False).averages(results).items():
        yield f"| {name}, average: {average} | {100 * value:.2f} % |  | all of its tasks |"


def _is_share(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 <= value <= 1


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}, whose figures go into the model card, is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}, whose figures go into the model card, holds no JSON object")
    return found


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.8g}" for value in values)


def _code(text: str) -> str:
    """Return text as code that may stand in a table: on one line, with no bar and no backtick to end it."""
    visible = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("\\\\", "\\").replace("|", "\\|")
    fence = "``" if "`" in visible else "`"
    padding = " " if "`" in visible else ""
    return f"{fence}{padding}{visible}{padding}{fence}"
