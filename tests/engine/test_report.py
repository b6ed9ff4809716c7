import base64
import hashlib
import io
import json
import math
import os
import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from textlock.engine.charts import BOTTOM, LEFT, MAX_CURVE_POINTS, RIGHT, TOP, downsample
from textlock.engine.gallery import MAX_IMAGES, save_gallery
from textlock.engine.report import write_report

VOID_ELEMENTS = {"meta", "img", "br"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & a ‮cat"
RESULTS = {
    "zero_shot_top1": 0.8125,
    "zero_shot_top5": 0.97,
    "zero_shot_unseen_top1": 0.531,
    "image_to_text_recall@5": 0.861,
    "mean_recall@1": 0.574,
    "images_per_second": 2296.4,
    "wall_seconds": 253.2,
    "samples_seen": 5120,
    "commit": "4be1d0c",
    "versions": {"torch": "2.15.0"},
    "command": "python train.py --config configs/demo.yaml",
}


class Page(HTMLParser):
    """A parsed report: fails on tags that do not nest; keeps elements as (tag, attributes, text) in document order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {[self.elements[i][0] for i in self._open]}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"attribute given twice in {self.get_starttag_text()}"
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID_ELEMENTS:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        assert tag == "path", f"<{tag}/> closes itself only inside SVG"
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open and self.elements[self._open[-1]][0] == tag, f"unexpected </{tag}>"
        self._open.pop()

    def handle_data(self, data):
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, tag: str, css_class: str = "") -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, " ".join("".join(texts).split()))
            for name, attributes, texts in self.elements
            if name == tag and (not css_class or css_class in (attributes.get("class") or "").split())
        ]

    def texts(self, tag: str, css_class: str = "") -> list[str]:
        return [text for _, text in self.all(tag, css_class)]

    def chart(self, title: str) -> "Page":
        figures = re.findall(r"<figure.*?</figure>", self.html, flags=re.DOTALL)
        return next(Page(figure) for figure in figures if f"<h3>{title}\n" in figure)

    @property
    def text(self) -> str:
        return self.texts("body")[0]


def metric(step: int, **values: Any) -> dict[str, Any]:
    record = {
        "step": step,
        "samples_seen": step * 512,
        "epoch": step // 4,
        "loss": 5.0 - 0.1 * step,
        "logit_scale": 14.3,
        "learning_rate": 1e-4 * step,
        "grad_norm": 1.5,
        "images_per_second": 2000.0 + step,
        "images_per_second_per_device": 1000.0,
        "mfu": None,
        "data_wait_fraction": 0.02,
        "peak_memory_bytes": 2**30,
        "skipped_samples": 3,
    }
    return record | values


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_metrics(run_dir: Path, steps: Sequence[int] = range(1, 11), **curves: Sequence[Any]) -> None:
    """Log metrics of these steps, of which ``curves`` gives some by name."""
    values = [dict(zip(curves, row, strict=True)) for row in zip(*curves.values(), strict=True)] or [{}] * len(steps)
    write_lines(run_dir / "metrics.jsonl", [metric(step, **row) for step, row in zip(steps, values, strict=True)])


def write_results(run_dir: Path, results: dict[str, Any] = RESULTS, **more: Any) -> None:
    (run_dir / "results.json").write_text(json.dumps(results | more))


def write_gallery(run_dir: Path, captions: list[str], nearest: list[list[tuple[str, float]]]) -> None:
    images = torch.zeros(len(captions), 8, 8, 3, dtype=torch.uint8)
    images[:, :4] = torch.tensor([200, 30, 90], dtype=torch.uint8)
    save_gallery(run_dir, images, captions, nearest)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Make a finished run of ten logged steps with every optional input."""
    run = tmp_path / "first run"
    run.mkdir()
    write_metrics(run)
    evaluations = [
        {"step": step, "wall_seconds": 7.0 * step, "zero_shot_top1": top1, "mean_recall@1": 0.3}
        for step, top1 in ((2, 0.25), (6, 0.75), (10, 0.5))
    ]
    write_lines(run / "evaluations.jsonl", evaluations)
    write_gallery(run, ["a red dog"], [[("a red dog", 0.5), ("a blue dog", 0.25), ("a cat", -0.1)]])
    write_results(run)
    (run / "config.yaml").write_text("data:\n  batch_size: 512\n")
    return run


@contextmanager
def full_disk() -> Iterator[None]:
    """Let every write end in the error of a full disk, which is expected."""
    full = mock.patch.object(os, "fsync", side_effect=OSError("no space left"))
    with full, pytest.raises(OSError, match="no space left"):
        yield


def report(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def draw(run_dir: Path, title: str, steps: Sequence[int] = range(1, 11), **curves: Sequence[Any]) -> Page:
    """Return the chart of that title in the report of a run that logged these curves."""
    write_metrics(run_dir, steps, **curves)
    return report(run_dir).chart(title)


def points(page: Page, css_class: str = "line") -> list[tuple[float, float]]:
    """Return the points of the one drawn curve of a chart; legend swatches hold an H command and are not curves."""
    (path,) = [attributes["d"] for attributes, _ in page.all("path", css_class) if "H" not in attributes["d"]]
    return [tuple(map(float, point.split(","))) for point in path.removeprefix("M").split("L")]


def y_labels(chart: Page) -> list[str]:
    return [label for attributes, label in chart.all("text") if attributes.get("dy")]


def facts(page: Page) -> dict[str, str]:
    return dict(zip(page.texts("th"), page.texts("td"), strict=True))


def test_page_is_well_formed_and_loads_nothing(run_dir):
    page = report(run_dir)
    assert page.html.startswith("<!doctype html>")
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert sorted(ids) == sorted(attributes["aria-labelledby"] for attributes, _ in page.all("section"))
    assert len(ids) == len(set(ids))
    assert not re.search(r"//|@import|\burl\(", re.sub(r"base64,[\w+/=]*", "", page.html))
    assert not [tag for tag, _, _ in page.elements if tag in ("link", "iframe", "object", "embed", "base", "form")]
    for _, attributes, _ in page.elements:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert not {"href", "xlink:href", "srcset", "action"} & set(attributes)


def test_content_security_policy_allows_the_one_script_and_no_request(run_dir):
    page = report(run_dir)
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_text_from_outside_is_escaped(tmp_path):
    run = tmp_path / "run <b>&amp; 'x'"
    run.mkdir()
    write_metrics(run, [1])
    write_results(run, **{HOSTILE: 1.5, "versions": {HOSTILE: HOSTILE}, "commit": HOSTILE, "command": HOSTILE})
    (run / "config.yaml").write_text(f"name: {HOSTILE}</pre>")
    write_gallery(run, [HOSTILE], [[(HOSTILE, 0.5), ("</li></ol>", 0.25)]])
    page = report(run)
    assert len(page.all("script")) == len(page.all("img")) == 1
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert page.texts("h1") == ["run <b>&amp; 'x'"]
    assert page.texts("bdi") == [HOSTILE, HOSTILE, "</li></ol>"]
    assert page.texts("pre") == [f"name: {HOSTILE}</pre>"]
    assert page.texts("code") == [HOSTILE, HOSTILE]
    assert HOSTILE in page.texts("dt") and facts(page)[HOSTILE] == HOSTILE


def test_long_and_unencodable_captions_do_not_break_the_page(run_dir):
    write_gallery(run_dir, ["word " * 500], [[("half a pair \ud800", 0.5)]])
    truth, near = report(run_dir).texts("bdi")
    assert truth.endswith("…") and len(truth) <= 160
    assert near == "half a pair ?"


def test_metrics_are_required(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(ValueError, match="no logged step"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("missing", "sentence", "gone"),
    [
        ("evaluations.jsonl", "No evaluations.jsonl", "Zero-shot accuracy"),
        ("results.json", "No results.json", "2.15.0"),
        ("config.yaml", "No config.yaml", "batch_size: 512"),
        ("gallery.safetensors", "No gallery was saved", "a red dog"),
        ("gallery.json", "No gallery was saved", "a red dog"),
    ],
)
def test_a_missing_input_leaves_its_section_out_with_a_sentence(run_dir, missing, sentence, gone):
    whole = report(run_dir).text
    assert sentence not in whole and gone in whole
    (run_dir / missing).unlink()
    part = report(run_dir).text
    assert sentence in part and gone not in part


def test_unreadable_lines_are_left_out_and_counted(run_dir):
    clean = report(run_dir)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 11, "loss": 4\n[]\n\n{"loss": 1.0}\n{"step": 11, "name": "\xc3')
    page = report(run_dir)
    assert points(page.chart("Loss")) == points(clean.chart("Loss"))
    assert "left out: 4." in page.text and "left out:" not in clean.text


def test_later_records_of_a_step_win_after_a_resume(run_dir):
    drawn = points(draw(run_dir, "Loss", [1, 3, 2, 3, 4], loss=[1, 3, 3, 4, 5]))
    wanted = [LEFT + (RIGHT - LEFT) * share for share in (0, 1 / 3, 2 / 3, 1)]
    assert [x for x, _ in drawn] == pytest.approx(wanted, abs=0.1)
    heights = [y for _, y in drawn]
    assert heights[0] - heights[1] == pytest.approx(2 * (heights[1] - heights[2]), abs=0.2)  # 1, 3, 4, 5


def test_a_curve_is_drawn_to_scale(run_dir):
    chart = draw(run_dir, "Loss", [0, 75, 100], loss=[0.0, 3.0, 4.0])
    middle = LEFT + 0.75 * (RIGHT - LEFT), BOTTOM - 0.75 * (BOTTOM - TOP)
    assert points(chart) == [pytest.approx(point, abs=0.06) for point in ((LEFT, BOTTOM), middle, (RIGHT, TOP))]
    assert chart.texts("text") == ["0", "1", "2", "3", "4", "0", "20", "40", "60", "80", "100", "step"]


def test_values_that_are_no_finite_number_are_left_out(run_dir):
    holes = [math.nan, math.inf, -math.inf, None, "NaN", True]
    write_metrics(run_dir, loss=[2.0, *holes[:3], 2.0, 2.0, 2.0, *holes[3:]], grad_norm=[math.nan] * 10)
    page = report(run_dir)
    chart = page.chart("Loss")
    assert len(points(chart)) == 4
    assert "6 not finite, left out" in chart.texts("h3")[0]
    assert not re.search(r"\bnan\b|\binf", "".join(str(a) for _, a, _ in page.elements), flags=re.IGNORECASE)
    assert "Gradient norm" not in page.texts("h3"), "a metric without any finite value has no chart"


def test_figures_of_the_run_ignore_values_that_are_not_finite(run_dir):
    (run_dir / "results.json").unlink()
    hole = dict.fromkeys(("images_per_second", "peak_memory_bytes", "data_wait_fraction", "loss"), math.inf)
    write_lines(run_dir / "metrics.jsonl", [metric(1), metric(2), metric(3), metric(4, **hole)])
    page = report(run_dir)
    assert page.texts("dd", "value")[2] == "2,002"
    found = facts(page)
    assert (found["Last loss"], found["Peak memory"], found["Waiting for data, median"]) == ("4.7", "1.00 GiB", "2.0%")
    assert "Model FLOPs utilisation, median" not in found


@pytest.mark.parametrize(
    ("top", "labels", "figure"),
    [
        (8e-4, ["0", "2e-4", "4e-4", "6e-4", "8e-4"], "8e-4"),
        (0.4, ["0", "0.1", "0.2", "0.3", "0.4"], "0.4"),
        (4321.0, ["0", "2k", "4k", "6k"], "4,321"),
        (4.4e9, ["0", "2G", "4G", "6G"], "4,400,000,000"),
    ],
)
def test_numbers_of_any_size_are_readable(run_dir, top, labels, figure):
    chart = draw(run_dir, "Loss", range(11), loss=[top * step / 10 for step in range(11)])
    assert y_labels(chart) == labels and chart.texts("b") == [figure]


@pytest.mark.parametrize("value", [3.0, 0.0, -2.5, 1e-12, 1e12])
def test_a_single_point_is_marked_in_the_middle(run_dir, value):
    (run_dir / "evaluations.jsonl").unlink()
    chart = draw(run_dir, "Loss", [7], loss=[value])
    ((x, y),) = points(chart)
    assert x == (LEFT + RIGHT) / 2 and TOP < y < BOTTOM
    assert [attributes["d"].startswith(f"M{x},{y}m") for attributes, _ in chart.all("path", "m0")] == [True]


def test_tick_labels_of_a_constant_curve_differ(run_dir):
    labels = y_labels(draw(run_dir, "Logit scale", logit_scale=[100, 100 + 1e-6] * 5))
    assert len(labels) == len(set(labels)) >= 3


def test_a_spike_makes_the_axis_logarithmic(run_dir):
    chart = draw(run_dir, "Gradient norm", grad_norm=[1.0] * 4 + [1e4] + [1.0] * 5)
    assert "logarithmic" in chart.texts("h3")[0]
    assert y_labels(chart) == ["1", "10", "100", "1k", "10k"]
    assert sorted({y for _, y in points(chart)}) == [TOP, BOTTOM]


def test_downsampling_keeps_ends_spikes_and_order():
    steps = np.arange(10_000, dtype=np.float64)
    values = np.sin(steps)  # several waves in each bucket, so that neither end is an extreme
    values[1234], values[8765] = 9.0, -9.0
    kept_steps, kept_values = downsample(steps, values, 100)
    assert len(kept_steps) <= 100
    assert {0.0, 1234.0, 8765.0, 9999.0} <= set(kept_steps)
    assert (np.diff(kept_steps) > 0).all()
    np.testing.assert_array_equal(kept_values, values[kept_steps.astype(int)])
    np.testing.assert_array_equal(downsample(steps[:100], values[:100], 100), (steps[:100], values[:100]))


def test_a_long_run_stays_small_and_noise_gets_a_trend(run_dir):
    noise = np.random.default_rng(0).normal(size=5000).tolist()
    write_metrics(run_dir, range(5000), loss=[4 + n for n in noise], grad_norm=[2 + abs(n) for n in noise])
    page = report(run_dir)
    loss = page.chart("Loss")
    assert 900 <= len(points(loss, "faint")) <= MAX_CURVE_POINTS
    trend = points(loss)
    assert len(trend) < 100
    assert np.ptp([y for _, y in trend]) < 0.2 * np.ptp([y for _, y in points(loss, "faint")])
    assert not page.chart("Learning rate").all("path", "faint")  # a schedule is smooth: a median would bend its corners
    assert len(page.html) < 200_000


def test_headlines_come_from_the_results_or_of_an_unfinished_run_from_the_logs(run_dir):
    page = report(run_dir)
    assert page.texts("dd", "value") == ["81.2%", "57.4%", "2,296", "4 min 13 s"]
    notes = ["top-5 97.0%", "image to text, recall@5 86.1%", "1,000 on each device", "5,120 samples seen"]
    assert page.texts("dd", "note") == notes
    (run_dir / "results.json").unlink()
    assert report(run_dir).texts("dd", "value") == ["50.0%", "30.0%", "2,006", "1 min 10 s"]
    (run_dir / "evaluations.jsonl").unlink()
    assert report(run_dir).texts("dd", "value") == ["—", "—", "2,006", "—"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (59.97, "60.0 s"), (3599.6, "1 h 00 min"), (90061, "25 h 01 min")]
)
def test_wall_time_reads_as_a_duration(run_dir, seconds, text):
    write_results(run_dir, wall_seconds=seconds)
    assert report(run_dir).texts("dd", "value")[3] == text


def test_scores_show_the_best_evaluation_and_any_extra_number(run_dir):
    extra = {"pairs_held_out": 12, "my_recall@3": 0.25, "note": "text", "diverged": False, "world_size": 2}
    write_results(run_dir, zero_shot_top1=0.5, **extra)
    page = report(run_dir)
    scores = dict(zip(page.texts("dt")[4:], page.texts("dd")[8:], strict=True))
    shown = {"Zero-shot top-1": "50.0%best 75.0% at step 6", "Mean recall@1": "57.4%"}
    assert scores.items() >= (shown | {"pairs_held_out": "12", "my_recall@3": "25.0%"}).items()
    assert not {"note", "diverged", "wall_seconds", "images_per_second", "samples_seen", "world_size"} & set(scores)


def test_unseen_pairs_have_a_section_only_when_measured(run_dir):
    assert report(run_dir).texts("div", "bar") == ["Seen 81.2%", "Unseen 53.1%"]
    write_results(run_dir, zero_shot_unseen_top1=None)
    assert "Unseen" not in report(run_dir).text


def test_evaluation_curves_share_the_steps_of_training(run_dir):
    drawn = points(draw(run_dir, "Zero-shot accuracy", range(1, 12)))
    shares = [(x - LEFT) / (RIGHT - LEFT) for x, _ in drawn]
    assert shares == pytest.approx([0.1, 0.5, 0.9], abs=0.01)


def test_right_and_wrong_captions_are_told_apart_without_colour(run_dir):
    nearest = [
        [("A  red DOG", 0.5), ("a blue dog", 0.25), ("a cat", -0.1)],
        [("a cat", 0.4), ("a fox", 0.3), ("an owl", math.nan)],
        [("a cat", 0.4), ("a fox", 0.3), ("an owl", 0.2)],
    ]
    write_gallery(run_dir, ["a red dog", "a fox", "a hen"], nearest)
    page = report(run_dir)
    assert page.texts("p", "verdict") == ["✓ rank 1", "✓ rank 2", "✗ not in top 3"]
    rows = [text for attributes, text in page.all("li") if "class" not in attributes]
    assert rows[:6] == [
        "✓ right: A red DOG0.500",
        "✗ wrong: a blue dog0.250",
        "✗ wrong: a cat-0.100",
        "✗ wrong: a cat0.400",
        "✓ right: a fox0.300",
        "✗ wrong: an owlnot finite",
    ]
    assert [a["style"] for a, _ in page.all("i") if "style" in a][2:5] == ["width:100%", "width:50%", "width:0%"]
    assert "comes first for 1 of these 3 images and is among the nearest shown for 2." in page.text


def test_drawings_arrive_as_they_were_saved_and_photographs_as_jpeg(run_dir):
    ((attributes, _),) = report(run_dir).all("img")
    kind, payload = attributes["src"].split(";base64,")
    drawing = np.asarray(Image.open(io.BytesIO(base64.b64decode(payload))))
    assert kind == "data:image/png" and drawing.shape == (8, 8, 3)
    assert (drawing[:4] == [200, 30, 90]).all() and not drawing[4:].any()
    grain = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    save_gallery(run_dir, torch.from_numpy(grain), ["grain"], [[]])
    ((attributes, _),) = report(run_dir).all("img")
    assert attributes["src"].startswith("data:image/jpeg;base64,")


def test_the_gallery_is_cut_to_a_screenful_and_an_empty_one_is_none(run_dir):
    count = MAX_IMAGES + 6
    write_gallery(run_dir, [f"caption {i}" for i in range(count)], [[("x", 0.1)]] * count)
    page = report(run_dir)
    assert len(page.all("img")) == MAX_IMAGES
    assert f"The gallery holds {count} images." in page.text
    write_gallery(run_dir, [], [])
    assert "No gallery was saved" in report(run_dir).text


@pytest.mark.parametrize(
    ("images", "captions", "nearest", "message"),
    [
        (torch.zeros(1, 8, 8, 3), ["a"], [[]], "uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], [[]], r"\[1, 3, 8, 8\]"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ["a"], [[], []], "2 images, 1 captions"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["a"], [], "0 lists"),
    ],
    ids=["dtype", "channels-first", "captions", "nearest"],
)
def test_save_gallery_refuses_what_does_not_fit(tmp_path, images, captions, nearest, message):
    with pytest.raises(ValueError, match=message):
        save_gallery(tmp_path, images, captions, nearest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", b'{"zero_shot_top1": 0.', r"results\.json is not valid JSON"),
        ("results.json", b"[1]", "one JSON object, not a list"),
        ("gallery.json", b"[{]", "gallery .* is damaged"),
        ("gallery.json", b'[{"caption": "x"}]', "gallery .* is damaged"),
        ("gallery.json", b"[]", r"images \[0, S, S, 3\]"),
        ("gallery.safetensors", b"not tensors", "gallery .* is damaged"),
    ],
)
def test_a_damaged_input_is_named(run_dir, name, content, message):
    (run_dir / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_report(run_dir)


def test_a_failed_write_leaves_the_old_report(run_dir):
    old = write_report(run_dir).read_bytes()
    files = sorted(path.name for path in run_dir.iterdir())
    write_metrics(run_dir, [1])
    with full_disk():
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == old
    assert sorted(path.name for path in run_dir.iterdir()) == files


def test_an_interrupted_gallery_never_mixes_old_captions_with_new_images(run_dir):
    with full_disk():
        write_gallery(run_dir, ["new"], [[("new", 1.0)]])
    assert "No gallery was saved" in report(run_dir).text


@pytest.mark.parametrize(
    ("device", "shown"),
    [({"device": "H100", "world_size": 8}, "8 x H100"), ({"device": "H100", "world_size": 1}, "H100"), ({}, None)],
)
def test_the_device_is_named(run_dir, device, shown):
    write_results(run_dir, **device)
    assert facts(report(run_dir)).get("Device") == shown


def test_command_line(run_dir, monkeypatch, capsys):
    def command(folder: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["report", str(folder)])
        monkeypatch.delitem(sys.modules, "textlock.engine.report")  # run_module warns about a module it runs again
        runpy.run_module("textlock.engine.report", run_name="__main__")

    command(run_dir)
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        command(run_dir / "absent")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
