"""Benchmark sets for tests, in the layout of clip_benchmark's webdatasets."""

import io
import json

import numpy as np

from .tars import write_tar
from .zoo import encode, photo

TEMPLATES = ("a photo of a {c}.", "{c}, drawn")


def png(seed):
    return encode(photo(9 + seed % 5, 8, seed=seed), "PNG")


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


def write_set(folder, samples, *, kind=None, classes=(), templates=TEMPLATES, shards=1):
    """Write samples, each a dict of contents by extension, in turn to shards. Return the folder."""
    (folder / "test").mkdir(parents=True)
    for shard in range(shards):
        members = [
            (f"s{number:07d}.{extension}", content)
            for number, sample in enumerate(samples)
            if number * shards // len(samples) == shard
            for extension, content in sample.items()
        ]
        write_tar(folder / "test" / f"{shard}.tar", members)
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    if kind is not None:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{text}\n" for text in templates))
    return folder


def labelled(count, classes, *, groups=None):
    """Return samples of random classes; with ``groups`` each has a row of numbers, the first of them its group."""
    draw = np.random.default_rng(count)
    labels = draw.integers(0, classes, count)
    samples = [{"png": png(seed), "cls": str(label).encode()} for seed, label in enumerate(labels)]
    if groups is not None:
        for sample, group in zip(samples, draw.choice(groups, count), strict=True):
            sample["npy"] = npy([group, 7])
    return samples


def multilabelled(count, classes):
    """Return samples of several classes each."""
    rows = np.random.default_rng(count).integers(0, 2, (count, classes))
    return [{"webp": encode(photo(9, 8, seed=seed), "WEBP"), "npy": npy(row)} for seed, row in enumerate(rows)]


def captioned(count):
    """Return samples of one to six captions, which repeat those of others."""
    captions = [[f"caption {number * 7 % 20 + line}" for line in range(1 + number % 6)] for number in range(count)]
    return [{"png": png(seed), "txt": "\n".join(lines).encode()} for seed, lines in enumerate(captions)]


def write_winogavil(folder, instances):
    """Write instances (cue, candidates, associations), names of images being ``image NUMBER``."""
    (folder / "winogavil_images").mkdir(parents=True)
    rows = ["ID,candidates,cue,associations"]
    for number, (cue, candidates, right) in enumerate(instances):
        cells = [json.dumps(names).replace('"', '""') for names in (candidates, right)]
        rows.append(f'{number},"{cells[0]}",{cue},"{cells[1]}"')
        for name in candidates:
            path = folder / "winogavil_images" / f"{name}.jpg"
            path.write_bytes(encode(photo(10, 8, seed=int(name.split()[1])), quality=95))
    (folder / "winogavil_dataset.csv").write_text("\n".join(rows) + "\n")
    return folder
