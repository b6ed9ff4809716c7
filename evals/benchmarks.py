"""Evaluates one task of a suite of benchmarks: classification, multilabel, retrieval, worst group, WinoGAViL.

Figures have the names that clip_benchmark and DataComp give them (``acc1``, ``mean_per_class_recall``, ``acc_wg``),
those of retrieval the names they have everywhere here. Class names and prompts are those of the set.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..data.benchmark_sets import BenchmarkSet, SetLayout, read_layout, read_set
from ..data.evaluation import CaptionedBatch, iterate_files, iterate_set
from .benchmark_metrics import group_accuracies, jaccard, macro_f1, mean_average_precision, mean_per_class_recall
from .benchmark_suites import Suite, Task
from .counts import too_many_skipped
from .retrieval import evaluate_retrieval
from .zero_shot import TILE_ELEMENTS, TextEncoder, class_embeddings, gather_ragged

WINOGAVIL_INSTANCES = "winogavil_dataset.csv"
WINOGAVIL_IMAGES = "winogavil_images"


@dataclass
class Outcome:
    """What was measured on a set."""

    figures: dict[str, float]
    """Shares from 0 to 1."""
    counts: dict[str, Any]
    """What they are of: images, captions or classes, and what was left out."""
    complaints: list[str] = field(default_factory=list)
    """A sentence for each thing that makes them those of another set than asked."""
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each group of images its share and its number of them."""


@dataclass(frozen=True)
class WinogavilLayout:
    """The instances of WinoGAViL: a cue, its candidates among the images, and those that players associate with it."""

    folder: Path
    instances: list[tuple[str, list[str], list[str]]]
    """(cue, candidates, associations), names of images."""

    def names(self) -> list[str]:
        """Return the names of all candidates, sorted."""
        return sorted({name for _, candidates, _ in self.instances for name in candidates})

    def files(self) -> list[Path]:
        """Return their images, in the same order."""
        return [self.folder / WINOGAVIL_IMAGES / f"{name}.jpg" for name in self.names()]

    def fingerprint(self) -> str:
        """Sha256 (hex) of the instances and of the sizes of the images."""
        sizes = [path.stat().st_size for path in self.files()]
        return hashlib.sha256(json.dumps([self.instances, sizes]).encode()).hexdigest()


@dataclass(frozen=True)
class Evaluator:
    """What evaluates sets: both towers, and the ranks that share the images."""

    encode_images: Callable[[Tensor], Tensor]
    """uint8 [b, S, S, 3] -> rows [b, d], unit or not."""
    text_tower: TextEncoder
    image_size: int
    batch_size: int
    group: dist.ProcessGroup | None = None

    def evaluate(self, task: Task, layout: SetLayout | WinogavilLayout) -> Outcome:
        """Measure a task on a set whose layout was read. All ranks must call, and get the same.

        Raises:
            ValueError: on all ranks alike: a shard cannot be read, the set lacks what the figure of the task is
                computed from, a label is outside the classes, no image can be read, or an embedding is not finite.
        """
        if isinstance(layout, WinogavilLayout):
            return self._winogavil(layout)
        found = self._read(layout)
        if task.group is not None and (found.metadata is None or found.metadata.shape[1] <= task.group.column):
            raise ValueError(
                f"{layout.folder} does not say the {task.group.name} of every image (a row of numbers in .npy), which "
                f"{task.group.figure} goes by"
            )
        if layout.kind == "retrieval":
            return self._retrieval(found)
        class_rows = class_embeddings(self.text_tower, layout.classes, layout.templates, group=self.group)
        return (
            self._multilabel(found, class_rows) if layout.kind == "multilabel" else self._class(task, found, class_rows)
        )

    def _read(self, layout: SetLayout) -> BenchmarkSet:
        """List the samples of a set; where a rank cannot, or finds others, all raise the same ValueError.

        A rank that went on alone would give its numbers to the figures of another set.
        """
        found, answer = None, ("", 0)
        try:
            found = read_set(layout)
            answer = "", len(found.images)
        except (ValueError, OSError) as error:
            answer = str(error), 0
        answers: list[Any] = [answer]
        if self.group is not None:
            answers = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(answers, answer, group=self.group)
        for fault, _ in answers:
            if fault:
                raise ValueError(fault)
        if len({*answers}) > 1 or found is None:
            raise ValueError(f"{layout.folder} has other images on another rank: give all ranks the same files")
        return found

    def _share(self) -> dict[str, int]:
        rank, ranks = (0, 1) if self.group is None else (dist.get_rank(self.group), dist.get_world_size(self.group))
        return {"batch_size": self.batch_size, "rank": rank, "world_size": ranks}

    def _scores(
        self, found: BenchmarkSet, class_rows: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Counter[str]]:
        """Return (places, what ``reduce`` makes of the similarities, what was skipped) of the images of all ranks.

        ``reduce`` takes [n, C], a tile of which is in memory at a time. Both tensors are on the CPU.
        """
        skipped: Counter[str] = Counter()
        places: list[int] = []
        parts = [reduce(class_rows[:0] @ class_rows.T)]
        step = max(1, TILE_ELEMENTS // len(class_rows))
        bad = torch.zeros(1, dtype=torch.int64, device=class_rows.device)
        with torch.no_grad():
            for batch in iterate_set(found, self.image_size, **self._share()):
                skipped.update(batch.skipped_by_kind)
                places += batch.places
                if not batch.places:
                    continue
                rows = F.normalize(self.encode_images(batch.images).to(class_rows.device, torch.float32), dim=-1)
                bad += (~rows.isfinite().all(dim=1)).sum()
                parts += [reduce(rows[start : start + step] @ class_rows.T) for start in range(0, len(rows), step)]
        bad = gather_ragged(bad, self.group)
        if bad.any():
            raise ValueError(f"{int(bad.sum())} image embeddings are not finite; the image encoder has diverged")
        all_places = gather_ragged(torch.tensor(places, dtype=torch.int64, device=class_rows.device), self.group)
        if not len(all_places):
            raise ValueError(f"no image of {found.layout.folder} can be read")
        return all_places.cpu(), gather_ragged(torch.cat(parts), self.group).cpu(), self._sum(skipped)

    def _sum(self, counter: Counter[str]) -> Counter[str]:
        """Return the sum of the counters of all ranks."""
        if self.group is None:
            return counter
        parts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, counter, group=self.group)
        return sum(parts, Counter())

    def _class(self, task: Task, found: BenchmarkSet, class_rows: Tensor) -> Outcome:
        nearest = min(5, len(class_rows))

        def best(similarity: Tensor) -> Tensor:
            # topk for accuracy and argmax for all else, as there: they may order ties differently.
            return torch.cat([similarity.argmax(dim=1, keepdim=True), similarity.topk(nearest).indices], dim=1)

        places, chosen, skipped = self._scores(found, class_rows, best)
        labels, predicted, top = found.labels[places], chosen[:, 0], chosen[:, 1:]
        hits = top == labels[:, None]
        figures = {"acc1": hits[:, 0].double().mean().item()}
        if len(class_rows) >= 5:
            figures["acc5"] = hits.any(dim=1).double().mean().item()
        figures["mean_per_class_recall"] = mean_per_class_recall(labels, predicted)
        if "F1-macro_all" in task.metrics:
            figures["F1-macro_all"] = macro_f1(labels, predicted)
        outcome = self._outcome(found, figures, skipped, classes=len(class_rows), images=len(places))
        if task.group is not None and found.metadata is not None:
            correct = predicted == labels if task.group.top == 1 else hits[:, : task.group.top].any(dim=1)
            by_group = group_accuracies(correct, found.metadata[places, task.group.column])
            figures[task.group.figure] = min(share for share, _ in by_group.values())
            outcome.groups = {
                f"{task.group.name} {number}": {"share": share, "images": images}
                for number, (share, images) in by_group.items()
            }
        there, read = found.labels.unique(), labels.unique()
        unread = [found.layout.classes[label] for label in there.tolist() if label not in set(read.tolist())]
        if unread:
            more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
            outcome.complaints.append(f"no image of class {', '.join(unread[:3])}{more} can be read")
        return outcome

    def _multilabel(self, found: BenchmarkSet, class_rows: Tensor) -> Outcome:
        places, scores, skipped = self._scores(found, class_rows, lambda similarity: similarity)
        figures = {"mean_average_precision": mean_average_precision(scores, found.labels[places])}
        return self._outcome(found, figures, skipped, classes=len(class_rows), images=len(places))

    def _retrieval(self, found: BenchmarkSet) -> Outcome:
        skipped: Counter[str] = Counter()
        counted: Counter[str] = Counter()

        def batches() -> Iterator[CaptionedBatch]:
            for batch in iterate_set(found, self.image_size, **self._share()):
                skipped.update(batch.skipped_by_kind)
                if batch.places:
                    captions = [found.captions[place] for place in batch.places]
                    counted.update(images=len(captions), captions=sum(map(len, captions)))
                    keys = [found.images[place].key for place in batch.places]
                    yield CaptionedBatch(batch.images, captions, keys, batch.places[-1] + 1, {})

        figures, _ = evaluate_retrieval(self.encode_images, self.text_tower.encode, batches(), group=self.group)
        return self._outcome(found, figures, self._sum(skipped), **self._sum(counted))

    def _outcome(
        self, found: BenchmarkSet, figures: dict[str, float], skipped: Counter[str], **counted: int
    ) -> Outcome:
        counts: dict[str, Any] = {**counted, "skipped": dict(found.skipped + skipped)}
        return Outcome(figures, counts, [*found.damages, *too_many_skipped(counts)])

    def _winogavil(self, layout: WinogavilLayout) -> Outcome:
        names = layout.names()
        skipped: Counter[str] = Counter()
        places: list[int] = []
        cues = list(dict.fromkeys(cue for cue, _, _ in layout.instances))
        cue_rows = self.text_tower.encode([_prompt(cue) for cue in cues])
        parts = [cue_rows[:0]]
        with torch.no_grad():
            for batch in iterate_files(layout.files(), self.image_size, **self._share()):
                skipped.update(batch.skipped_by_kind)
                places += batch.places
                if batch.places:
                    rows = self.encode_images(batch.images).to(cue_rows.device, torch.float32)
                    parts.append(F.normalize(rows, dim=-1))
        rows = gather_ragged(torch.cat(parts), self.group)
        if not len(rows):
            raise ValueError(f"no image of {layout.folder} can be read")
        if not rows.isfinite().all():
            raise ValueError("an image embedding is not finite; the image encoder has diverged")
        all_places = gather_ragged(torch.tensor(places, dtype=torch.int64, device=cue_rows.device), self.group)
        row_of = {names[place]: row for row, place in enumerate(all_places.tolist())}
        cue_place = {cue: place for place, cue in enumerate(cues)}
        scores: dict[int, list[float]] = {}
        unread = 0
        for cue, candidates, right in layout.instances:
            if not all(name in row_of for name in candidates):
                unread += 1
                continue
            similarity = rows[[row_of[name] for name in candidates]] @ cue_rows[cue_place[cue]]
            # By places: a name that comes twice is two candidates, as there.
            associated = [place for place, name in enumerate(candidates) if name in right]
            nearest = similarity.topk(len(associated)).indices.tolist()
            scores.setdefault(len(candidates), []).append(jaccard(nearest, associated))
        figures = {"avg_jaccard_score": _mean([score for some in scores.values() for score in some])}
        few = [score for size, some in scores.items() if size <= 6 for score in some]
        many = [score for size, some in scores.items() if size >= 10 for score in some]
        for name, of_size in (("5-6", few), ("10-12", many)):
            if of_size:
                figures[f"jaccard_score_{name}"] = _mean(of_size)
        counts: dict[str, Any] = {"images": len(rows), "skipped": dict(self._sum(skipped))}
        complaints = too_many_skipped(counts)
        if unread:
            complaints.append(f"{unread} of {len(layout.instances)} instances have an image that cannot be read")
        counts["instances"] = sum(map(len, scores.values()))
        return Outcome(figures, counts, complaints)


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("no instance has all of its images")
    return sum(values) / len(values)


def _prompt(cue: str) -> str:
    """Return the prompt of a cue as WinoGAViL's authors write it for CLIP."""
    cue = cue.lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def read_winogavil(folder: Path) -> WinogavilLayout:
    """Read the instances of WinoGAViL from the files of its data set, the archive of images being unpacked.

    ``winogavil_dataset.csv`` has the columns cue, candidates and associations, the latter two lists of names in JSON;
    ``winogavil_images`` holds NAME.jpg.

    Raises:
        FileNotFoundError: the file, the folder or an image is missing.
        ValueError: the file is no such table.
    """
    table, images = folder / WINOGAVIL_INSTANCES, folder / WINOGAVIL_IMAGES
    if not table.is_file():
        raise FileNotFoundError(f"{table} is missing: WinoGAViL's data set has it")
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is missing: unpack {WINOGAVIL_IMAGES}.zip of WinoGAViL's data set there")
    instances = []
    with open(table, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                cue, candidates, right = row["cue"], json.loads(row["candidates"]), json.loads(row["associations"])
                if not (cue and candidates and right and {*right} <= {*candidates}):
                    raise ValueError("an instance needs a cue, candidates, and associations among them")
                if not all(_is_name(name) for name in candidates):
                    raise ValueError("candidates must be names of images")
                instances.append((cue, candidates, right))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            why = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{table} line {rows.line_num}: {why}") from error
    if not instances:
        raise ValueError(f"{table} holds no instance")
    layout = WinogavilLayout(folder, instances)
    for path in layout.files():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {table} names it")
    return layout


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def find_sets(suite: Suite, root: Path) -> dict[str, SetLayout | WinogavilLayout]:
    """Read the layouts of the sets of a suite that are under a root, by the keys of their tasks; no image is read.

    Raises:
        FileNotFoundError: none is there, or a file of one is missing.
        ValueError: a set is there twice, of another kind, or one of its files is not as it must be.
    """
    found: dict[str, SetLayout | WinogavilLayout] = {}
    for task in suite.tasks:
        there = [root / name for name in task.folders if (root / name).is_dir()]
        if len(there) > 1:
            raise ValueError(f"{there[0]} and {there[1]} are both {task.key}: keep one of them under {root}")
        if not there:
            continue
        if task.kind == "winogavil":
            found[task.key] = read_winogavil(there[0])
            continue
        layout = read_layout(there[0])
        if layout.kind != task.kind:
            raise ValueError(
                f"{there[0]} is a set of {layout.kind} by its dataset_type.txt, and {task.key} of {task.kind}"
            )
        found[task.key] = layout
    if not found:
        names = ", ".join(task.folders[0] for task in suite.tasks[:3])
        raise FileNotFoundError(f"{root} holds no set of the suite: their folders are called {names}, and the like")
    return found
