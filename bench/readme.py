"""Writes the figures of README.md and bench/RESULTS.md from the files of figures, so that none is typed, and plots.

    python -m textlock.bench.readme             # both pages and bench/results/*.svg
    python -m textlock.bench.readme --check     # exit status 1 if a page disagrees with the files

Between `<!-- NAME figures -->` and `<!-- /NAME figures -->` stands what the function of that name below makes of the
newest file of a GPU, of the newest of a CPU (`make gpu-check` and `make bench` write them), of demo.json, which is the
results.json of a `make demo`, and of demo_random_text.json, which is that of the run that configs/demo.yaml compares
with. The plots show times as multiples of the floor, ours next to every peer.
"""

import difflib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro

from textlock.bench.records import (
    Contest,
    Line,
    ceilings_table,
    comparison_table,
    contests,
    is_ours,
    markdown,
    number,
    profile_table,
    read_figures,
    spread_of,
    time_of,
)
from textlock.data.atomic import atomic_file, write_text_atomically
from textlock.settings import exit_with

ROOT = Path(__file__).resolve().parents[1]
TOWER = "eva02_base_patch16_224"

# Candidates as the README calls them.
NAMES = {
    "ours_chunked": "**textlock, `chunked`**",
    "open_clip": "open_clip `ClipLoss`",
    "open_clip_compiled": "the same, compiled",
    "linear_cross_entropy": "`F.linear_cross_entropy` twice",
    "ours_sigmoid_chunked": "**textlock, sigmoid**",
    "open_clip_sigmoid": "open_clip `SigLipLoss`",
    "open_clip_sigmoid_256": "the same, 256 at a time",
    "ours_all": "**textlock, `all`**",
    "eager": "the same in plain torch",
    "timm": "timm",
    "ours_cpu": "**textlock, `cpu`**",
    "ours_dali": "**textlock, `dali`** on its CPU operators",
    "webdataset_pil": "webdataset and PIL, as in open_clip",
    "webdataset_torchvision": "webdataset and torchvision, uint8",
}
RECOMPUTED = {
    "all": "LayerNorms, SwiGLU product",
    "no-mlp": "and the first MLP projection",
    "lean": "and the qkv projection",
    "block": "the block, but for its last projection",
    "none": "the whole forward pass (GradCache)",
}


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    check: bool = False
    """Write nothing; exit status 1 and a diff if a page is out of date."""
    root: Path = ROOT
    """Folder of README.md, bench/RESULTS.md and bench/results."""


@dataclass(frozen=True)
class Source:
    """A file of figures."""

    path: Path
    head: Mapping[str, Any]

    @cached_property
    def lines(self) -> list[Line]:
        """Every line of the file."""
        return read_figures(self.path)

    def contest(self, part: str, operation: str, **case: Any) -> Contest:
        """Return the measurements of an operation on data like this; raises ValueError if there are none."""
        for contest in contests(self.lines):
            if contest.part == part and contest.operation == operation and case.items() <= contest.case.items():
                return contest
        raise ValueError(f"{self.path} has nothing of {operation} in {part} with {case}: measure it again")

    @property
    def origin(self) -> str:
        """Where the figures come from, for people."""
        return f"`bench/results/{self.path.name}`"

    @property
    def device(self) -> str:
        """What was measured on, for people."""
        name: str = self.head["device"]
        return name


def newest(folder: Path, *, gpu: bool) -> Source | None:
    """Return the newest file of a GPU, or of a CPU."""
    found = []
    for path in folder.glob("*.json"):
        head = json.loads(path.read_text())
        if "figures" in head and (head["driver"] is not None) == gpu:
            dates = [part["date"] for part in head["parts"].values() if "date" in part]
            found.append((max(dates, default=""), path.name, Source(path, head)))
    return max(found, key=lambda entry: entry[:2], default=(None, None, None))[2]


def paragraph(text: str) -> str:
    """Return text as lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def of_candidates(contest: Contest, figure: str, columns: tuple[str, ...], cells: Callable[[Line], list[str]]) -> str:
    """Return a table with a row for each candidate that has figures and a name."""
    rows = [[NAMES[name], *cells(line)] for name, line in contest.measured.items() if name in NAMES]
    return markdown((figure, *columns), rows)


def times_and_memory(contest: Contest, figure: str) -> str:
    """Return a table of times, spread, floor and memory."""

    def cells(line: Line) -> list[str]:
        floor = f"{line['percent_of_floor']:.0f}"
        return [time_of(line), spread_of(line), floor, f"{line['peak_bytes'] / 2**20:,.0f}"]

    return of_candidates(contest, figure, ("ms", "± %", "% of floor", "peak MiB"), cells)


def demo(results: Path) -> str:
    """Return the results of `make demo`, next to those of the same run against a text tower of random weights."""
    found, blind = (json.loads((results / name).read_text()) for name in ("demo.json", "demo_random_text.json"))
    classes, choices = (round(1 / found["chance"][f"zero_shot{kind}_top1"]) for kind in ("", "_unseen"))

    def percent(name: str, figures: Mapping[str, Any] = found) -> str:
        return f"{100 * figures[name]:.1f} %"

    return paragraph(
        f"""
        From nothing, on {found["device"]}, `make demo` trains a small image tower against a frozen sentence encoder,
        all-MiniLM-L6-v2, and reaches **{percent("zero_shot_top1")} zero-shot top-1 over {classes} classes** of drawn
        images never seen, {percent("zero_shot_unseen_top1")} on the {choices - classes} pairs of colour and thing that
        no training caption holds (among all {choices}), and {percent("mean_recall@1")} mean recall@1 among 500 held-out
        pairs with distinct captions. **With every class named in words that no training caption holds**, such as
        "azure automobile" for a blue car, it still finds {percent("zero_shot_renamed_top1")} top-1 and
        {percent("zero_shot_renamed_top5")} top-5 (chance: {percent("zero_shot_renamed_top1", found["chance"])} and
        {percent("zero_shot_renamed_top5", found["chance"])}; the same run against a text tower of random weights:
        {percent("zero_shot_renamed_top1", blind)} and {percent("zero_shot_renamed_top5", blind)}): this language comes
        from the locked text tower. Training and evaluation took {found["wall_seconds"] / 60:.1f} minutes. The run wrote
        these figures, with versions and commit, to `bench/results/demo.json`.
        """
    )


def claim(source: Source) -> str:
    """Return the loss next to open_clip's, in one sentence."""
    contest = source.contest("loss", "contrastive", B=8192)
    case, ours, theirs = contest.case, contest.measured["ours_chunked"], contest.measured["open_clip"]
    (ms, their_ms), (mib, their_mib) = (
        (number(line["ms"]) for line in (ours, theirs)),
        (f"{line['peak_bytes'] / 2**20:,.0f}" for line in (ours, theirs)),
    )
    return paragraph(
        f"""
        **Loss and gradient of {case["b"]:,} images against {case["B"]:,} texts of width {case["d"]} take {ms} ms and
        {mib} MiB, where open_clip's `ClipLoss` takes {their_ms} ms and {their_mib} MiB** ({source.device}; both exact,
        each first checked against float64). [bench/RESULTS.md](bench/RESULTS.md) has every figure.
        """
    )


def loss(source: Source) -> str:
    """Return every loss next to the floor."""
    contest = source.contest("loss", "contrastive", B=8192)
    sigmoid = source.contest("loss", "sigmoid", B=8192)
    case, (floor,) = contest.case, {line["floor_ms"] for line in contest.measured.values()}
    above = f"""
        The loss on {source.device}, one rank of two, {case["b"]:,} images against {case["B"]:,} texts of width
        {case["d"]}, in float32, each first checked against float64; the two matrix products that any exact method needs
        take {number(floor)} ms at the rate of large ones:
        """
    both = Contest("loss", "", case, contest.lines + sigmoid.lines)
    return f"{paragraph(above)}\n\n{times_and_memory(both, 'loss and gradient')}"


def tower(source: Source) -> str:
    """Return our tower next to others."""
    contest = source.contest("tower", "tower", tower=TOWER)
    above = (
        f"Forward and backward of {contest.case['micro_batch']} images of EVA02-B/16 on {source.device}, in float32:"
    )
    return f"{above}\n\n{times_and_memory(contest, 'tower')}"


def loader(source: Source) -> str:
    """Return our loader next to others, at two sizes of images."""

    def cells(line: Line) -> list[str]:
        rates = (line["images_per_second"], line["images_per_cpu_second"])
        return [f"{rates[0]:,.0f}", spread_of(line), f"{line['percent_of_floor']:.0f}", f"{rates[1]:,.0f}"]

    def table(width: int, height: int) -> str:
        contest = source.contest("loader", "loader", width=width)
        columns = ("images/s", "± %", "% of floor", "images/CPU-s")
        return of_candidates(contest, f"{width} x {height}", columns, cells)

    above = f"""
        The loader next to webdataset in DataLoader processes on {source.device}, the same crops of 224 pixels, 1 % of
        the JPEGs cut short; the floor is decoding alone:
        """
    return "\n\n".join((paragraph(above), table(320, 256), table(512, 384)))


def large_batch(source: Source) -> str:
    """Return time and memory of one very large step."""
    line = source.contest("large_batch", "one_step").measured["ours"]
    peak, before = (line[key] / 2**30 for key in ("peak_resident_bytes", "resident_bytes_before"))
    return paragraph(
        f"""
        `python -m textlock.bench.large_batch` runs one exact step of {line["case"]["batch"]:,} images through a small
        tower on {source.device}: {peak:.2f} GiB resident at the peak, of which {before:.2f} were there before, in
        {line["ms"] / 1e3:.0f} seconds.
        """
    )


def tiers(source: Source) -> str:
    """Return a table of the bytes and costs of the tiers, and a plan of them."""
    rows = []
    for tier, recomputed in RECOMPUTED.items():
        (cost,) = source.contest("plan", "tier", tower=TOWER, tier=tier).lines
        kept = f"{cost['kept_bytes'] / 1e6:.1f} MB" if cost["kept_bytes"] else "nothing"
        extra = f"{100 * cost['extra_time']:.0f} %" if cost["extra_time"] else ""
        rows.append([f"`{tier}`", kept, recomputed, extra])
    (plan,) = source.contest("plan", "plan", tower=TOWER, gpu="h100", local_batch=4096).lines
    below = f"""
        At 4,096 images a GPU of 80 GB the plan mixes {" and ".join(f"`{tier}`" for tier in plan["tiers"])}:
        {100 * plan["extra_time"]:.0f} % (`python -m textlock.bench.plan` prints it from 1,024 to 65,536 images).
        """
    return f"{markdown(('tier', 'kept', 'recomputed', 'more time'), rows)}\n\n{paragraph(below)}"


def cpu(source: Source) -> str:
    """Return where the figures of a CPU come from, and their plot."""
    above = f"""
        Written by `make bench` to {source.origin}, on {source.device}, with versions and commit. Times as multiples of
        the floor, ours next to its peers:
        """
    return f"{paragraph(above)}\n\n{plot_of(source)}"


def gpu(source: Source | None) -> str:
    """Return everything that was measured on a GPU."""
    if source is None:
        return "`make gpu-check` fills this section."
    head = source.head
    commits = {part["commit"][:12] for part in head["parts"].values() if part.get("commit")}
    tests = [part["tests"] for part in head["parts"].values() if "tests" in part]
    passed, failed = sum(test["passed"] for test in tests), sum(len(test["failed"]) for test in tests)
    above = f"""
        On one {source.device} (driver {head["driver"]}, torch {head["versions"]["torch"]}, Triton
        {head["versions"]["triton"]}, commit {", ".join(sorted(commits))}), {passed:,} GPU tests passed and {failed}
        failed. Written by `make gpu-check` to {source.origin}.
        """
    tables = (table(source.lines) for table in (ceilings_table, comparison_table, profile_table))
    return "\n\n".join((paragraph(above), plot_of(source), *filter(None, tables)))


def gpu_claim(source: Source | None) -> str:
    """Return in one sentence whether there are figures of a GPU."""
    if source is None:
        return "No GPU figure yet: `make gpu-check` measures them."
    return f"Measured on one {source.device}: [bench/RESULTS.md](bench/RESULTS.md)."


def plot_of(source: Source) -> str:
    """Return the plot of a file, as bench/RESULTS.md shows it."""
    return f"![times as multiples of the floor on {source.device}](results/{source.path.stem}.svg)"


def pages(root: Path) -> dict[Path, str]:
    """Return what every page should be; raises ValueError where figures or the places for them are missing."""
    results = root / "bench" / "results"
    on_gpu, on_cpu = newest(results, gpu=True), newest(results, gpu=False)
    if on_cpu is None:
        raise ValueError(f"{results} has no file of figures of a CPU: make bench writes one")
    texts = {
        root / "README.md": {"claim": claim(on_cpu), "demo": demo(results), "gpu claim": gpu_claim(on_gpu)},
        root / "bench" / "RESULTS.md": {
            "loss": loss(on_cpu),
            "tier": tiers(on_cpu),
            "large batch": large_batch(on_cpu),
            "tower": tower(on_cpu),
            "loader": loader(on_cpu),
            "cpu": cpu(on_cpu),
            "gpu": gpu(on_gpu),
        },
    }
    return {path: written(path, blocks) for path, blocks in texts.items()}


def written(path: Path, texts: Mapping[str, str]) -> str:
    """Return a page with the text of every block; raises ValueError where page and texts differ in their blocks."""
    page = path.read_text()
    found = re.findall(r"<!-- ([\w ]+) figures -->", page)
    if sorted(found) != sorted(texts):
        raise ValueError(f"{path} has blocks of figures {sorted(found)} and there are texts of {sorted(texts)}")
    for name, text in texts.items():
        first, last = f"<!-- {name} figures -->\n", f"<!-- /{name} figures -->"
        before, _, rest = page.partition(first)
        _, end, after = rest.partition(last)
        if not end:
            raise ValueError(f"{path}: the block of {name} figures has no end: write {last} below it")
        page = f"{before}{first}{text}\n{last}{after}"
    return page


def draw(source: Source, path: Path) -> None:
    """Draw the times of a file's contests as multiples of their floors, ours next to every peer."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [c for c in contests(source.lines) if c.part in ("loss", "kernels", "block", "tower", "step", "loader")]
    shown = [c for c in shown if c.ours is not None and "floor_ms" in c.ours]
    bars = sum(len(contest.measured) for contest in shown)
    matplotlib.rcParams["svg.hashsalt"] = "textlock"  # the same file from the same figures
    figure = Figure(figsize=(9, 0.6 + 0.21 * (bars + 1.6 * len(shown))), layout="constrained")
    axes = figure.add_subplot()
    ticks, labels, at = [], [], 0.0
    for contest in shown:
        title = f"{contest.operation.replace('_', ' ')}, {contest.data}"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(
            0.006, at, title, transform=axes.get_yaxis_transform(), fontsize=8, weight="bold", va="center", bbox=behind
        )
        at += 1
        for line in sorted(contest.measured.values(), key=lambda r: r["ms"]):
            assert contest.ours is not None
            floor = contest.ours["floor_ms"]
            ours = is_ours(line["candidate"])
            axes.barh(at, line["ms"] / floor, height=0.8, color="#1f5fa8" if ours else "#c3c9d1")
            axes.text(line["ms"] / floor * 1.02, at, number(line["ms"]) + " ms", fontsize=7, va="center")
            ticks.append(at)
            labels.append(line["candidate"])
            at += 1
        at += 0.6
    axes.axvline(1, color="#c0392b", linewidth=1)
    axes.text(1, at - 0.3, " floor", color="#c0392b", fontsize=7, va="center")
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(at, -0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.8, None)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda multiple, _: f"{multiple:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)
    axes.set_xlabel("time, as a multiple of the floor measured in the same run", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(source.head["device"], fontsize=9, loc="left")
    with atomic_file(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def main(options: PageOptions) -> None:
    """Write the pages and plots, or compare the pages; raises ValueError for what is missing, SystemExit(1)."""
    wanted = pages(options.root)
    if options.check:
        for path, text in wanted.items():
            if (page := path.read_text()) != text:
                lines = difflib.unified_diff(page.splitlines(True), text.splitlines(True), "is", "should be")
                sys.stderr.writelines(lines)
                print(f"error: {path} disagrees with the files of figures; make report rewrites it", file=sys.stderr)
                raise SystemExit(1)
        return
    for path, text in wanted.items():
        write_text_atomically(path, text)
    for on_gpu in (True, False):
        if (source := newest(options.root / "bench" / "results", gpu=on_gpu)) is not None:
            draw(source, source.path.with_suffix(".svg"))


if __name__ == "__main__":
    try:
        main(tyro.cli(PageOptions, description=__doc__))
    except (ValueError, OSError) as error:
        exit_with(error)
