"""The report of a run: one self-contained HTML page, made from the files of the run folder.

`page/` has its template, style sheet and script; all are written into the page. Images are inline PNG or JPEG. Captions
come from the open web: every text passes through autoescaping, and the page's content security policy allows no
request anywhere and no script but its own, by its hash.

    python -m textlock.engine.report runs/mine
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..data.atomic import write_text_atomically
from ..evals.counts import describe_count
from ..settings import exit_with
from .charts import ABSENT, AREA, Floats, Record, column, count, evaluation_charts, figure, number, training_charts
from .gallery import read_answers, read_gallery

MAX_CAPTION_LETTERS = 160
PAGE = Path(__file__).with_name("page")

METRIC_LABELS = {
    "zero_shot_top1": "Zero-shot top-1",
    "zero_shot_top5": "Zero-shot top-5",
    "zero_shot_unseen_top1": "Zero-shot top-1, unseen",
    "zero_shot_renamed_top1": "Zero-shot top-1, renamed",
    **{f"image_to_text_recall@{k}": f"Image to text, recall@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_recall@{k}": f"Text to image, recall@{k}" for k in (1, 5, 10)},
    "mean_recall@1": "Mean recall@1",
    "zero_shot_unseen_top5": "Zero-shot top-5, unseen",
    "zero_shot_renamed_top5": "Zero-shot top-5, renamed",
}
UNSEEN_BARS = {"zero_shot_top1": "Seen", "zero_shot_unseen_top1": "Unseen"}
RENAMED_BARS = {"zero_shot_renamed_top1": "Top-1", "zero_shot_renamed_top5": "Top-5"}
# Numbers logged with the metrics that are facts of the run, not scores of the model.
RUN_KEYS = {"step", "samples_seen", "images_per_second", "wall_seconds", "world_size"}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files of a finished, running or killed run, and return its path.

    Needs `metrics.jsonl`. A section whose input (`evaluations.jsonl`, `results.json`, `config.yaml`, the gallery) is
    not there is replaced by a sentence. Lines that cannot be read, such as the half-written last line of a killed run,
    are left out and counted on the page. Of two records of one step, which a resumed run writes, the later counts.

    Raises FileNotFoundError without `metrics.jsonl`, ValueError when that file has no record or another is damaged.
    """
    metrics_path = run_dir / "metrics.jsonl"
    if not metrics_path.is_file():
        raise FileNotFoundError(f"{metrics_path} does not exist: give the --run-dir of a training run")
    metrics, unreadable = _read_records(metrics_path)
    if not metrics:
        raise ValueError(f"{metrics_path} holds no logged step yet: wait for the first one and try again")
    evaluations_path = run_dir / "evaluations.jsonl"
    evaluations, unreadable_evaluations = _read_records(evaluations_path) if evaluations_path.is_file() else ([], 0)
    results = _read_results(run_dir / "results.json")
    config_path = run_dir / "config.yaml"

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shorten"] = _shorten
    script = (PAGE / "script.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html").render(
        run=run_dir.resolve().name,
        finished=bool(results),
        headlines=_headlines(metrics, evaluations, results),
        training_charts=training_charts(metrics),
        evaluation_charts=evaluation_charts(metrics, evaluations),
        scores=_scores(evaluations, results),
        counts=_counts(evaluations, results),
        unseen=_bars("zero_shot_unseen", UNSEEN_BARS, evaluations, results),
        renamed=_bars("zero_shot_renamed", RENAMED_BARS, evaluations, results),
        answers=read_answers(run_dir),
        gallery=read_gallery(run_dir),
        facts=_facts(metrics, results),
        versions=versions if isinstance(versions := results.get("versions"), dict) else {},
        commit=results.get("commit"),
        command=results.get("command"),
        config=config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else None,
        unreadable=unreadable + unreadable_evaluations,
        area=AREA,
        style=Markup((PAGE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    report_path = run_dir / "report.html"
    write_text_atomically(report_path, page)
    return report_path


def _read_records(path: Path) -> tuple[list[Record], int]:
    """Return the records of a JSON-lines file in the order of their steps, and how many lines could not be read."""
    by_step: dict[float, Record] = {}
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                unreadable += bool(line.strip())
                continue
            if isinstance(record, dict) and math.isfinite(step := number(record.get("step"))):
                by_step[step] = record
            else:
                unreadable += 1
    return [by_step[step] for step in sorted(by_step)], unreadable


def _read_results(path: Path) -> Record:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it or evaluate the run again") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} must hold one JSON object, not a {type(results).__name__}: evaluate the run again")
    return results


def _headlines(metrics: list[Record], evaluations: list[Record], results: Record) -> list[Record]:
    """Return the four figures at the top; one that no file holds yet is a dash."""

    def share(key: str) -> str:
        return figure(_final(key, evaluations, results), percent=True)

    speed = number(results.get("images_per_second"))
    if not math.isfinite(speed):
        speed = _of_finite(np.median, metrics, "images_per_second")
    tiles = [
        ("Zero-shot top-1", share("zero_shot_top1"), "top-5 {}", share("zero_shot_top5")),
        ("Mean recall@1", share("mean_recall@1"), "image to text, recall@5 {}", share("image_to_text_recall@5")),
        ("Images per second", count(speed), "{} on each device", count(_last(metrics, "images_per_second_per_device"))),
        (
            "Wall time",
            _duration(_final("wall_seconds", evaluations, results)),
            "{} samples seen",
            count(_last([*metrics, results], "samples_seen")),
        ),
    ]
    return [
        {"label": label, "value": value, "note": sentence.format(note) if note != ABSENT else "not measured"}
        for label, value, sentence, note in tiles
    ]


def _facts(metrics: list[Record], results: Record) -> dict[str, str]:
    """Return the facts of a run next to its scores; those that were not logged are left out."""
    device, devices = results.get("device"), number(results.get("world_size"))
    memory = _of_finite(np.max, metrics, "peak_memory_bytes")
    facts = {
        "Device": f"{count(devices)} x {device}" if devices > 1 else device or ABSENT,
        "Steps": count(_last(metrics, "step")),
        "Samples seen": count(_last([*metrics, results], "samples_seen")),
        "Epoch": count(_last(metrics, "epoch")),
        "Last loss": figure(_last(metrics, "loss")),
        "Model FLOPs utilisation, median": figure(_of_finite(np.median, metrics, "mfu"), percent=True),
        "Waiting for data, median": figure(_of_finite(np.median, metrics, "data_wait_fraction"), percent=True),
        "Peak memory": f"{memory / 2**30:.2f} GiB" if math.isfinite(memory) else ABSENT,
        "Skipped samples": count(_last(metrics, "skipped_samples")),
    }
    return {label: value for label, value in facts.items() if value != ABSENT}


def _scores(evaluations: list[Record], results: Record) -> list[Record]:
    """Return one row for each metric of any name: its final value and, where it was once better, the best."""
    keys = [key for record in (results, *evaluations) for key in record if math.isfinite(number(record[key]))]
    known = [key for key in METRIC_LABELS if key in keys]
    rows = []
    for key in dict.fromkeys([*known, *keys]):
        if key in RUN_KEYS:
            continue
        percent = key in METRIC_LABELS or any(word in key for word in ("top1", "top5", "recall@", "accuracy"))
        final, values = _final(key, evaluations, results), column(evaluations, key)
        best = int(np.nanargmax(values)) if key in METRIC_LABELS and np.isfinite(values).any() else None
        rows.append(
            {
                "label": METRIC_LABELS.get(key, key),
                "final": figure(final, percent=percent),
                "best": f"best {figure(values[best], percent=percent)} at step {count(evaluations[best]['step'])}"
                if best is not None and values[best] > final
                else "",
            }
        )
    return rows


def _counts(evaluations: list[Record], results: Record) -> list[str]:
    """Return a sentence of each evaluation: what its figures are of."""
    for record in (results, *reversed(evaluations)):
        if isinstance(counts := record.get("counts"), dict):
            return [
                f"{kind.replace('_', '-')} of {describe_count(count)}"
                for kind, count in counts.items()
                if isinstance(count, dict)
            ]
    return []


def _bars(kind: str, labels: dict[str, str], evaluations: list[Record], results: Record) -> list[Record]:
    """Return a bar for each of the ``labels`` {metric: label} that has a value; none unless one of ``kind`` has."""
    chance = results["chance"] if isinstance(results.get("chance"), dict) else {}
    values = {key: _final(key, evaluations, results) for key in labels}
    if not any(math.isfinite(value) and key.startswith(kind) for key, value in values.items()):
        return []
    return [
        {
            "label": labels[key],
            "value": figure(value, percent=True),
            "share": _width(value),
            "chance": figure(blind, percent=True) if math.isfinite(blind := number(chance.get(key))) else None,
            "chance_share": _width(blind),
        }
        for key, value in values.items()
        if math.isfinite(value)
    ]


def _width(share: float) -> str:
    """Write a share as the width of a bar in percent."""
    return f"{100 * min(max(share, 0), 1):.1f}" if math.isfinite(share) else "0"


def _of_finite(reduce: Callable[[Floats], float], records: Sequence[Record], key: str) -> float:
    """Reduce the finite values of a key over all records to one; not-a-number where there are none."""
    values = column(records, key)
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if len(finite) else math.nan


def _last(records: Sequence[Record], key: str) -> float:
    return _of_finite(lambda values: float(values[-1]), records, key)


def _final(key: str, evaluations: list[Record], results: Record) -> float:
    """Return a metric from results.json or, before the run has finished, from the last evaluation that has it."""
    value = number(results.get(key))
    return value if math.isfinite(value) else _last(evaluations, key)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CAPTION_LETTERS else text[: MAX_CAPTION_LETTERS - 1].rstrip() + "…"


def main(run_dir: tyro.conf.Positional[Path]) -> None:
    """Write report.html for a run folder, also for a run that is still going or was killed."""
    print(write_report(run_dir))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        exit_with(error)
