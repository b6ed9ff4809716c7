"""Files of figures: what benchmarks print, gathered by `textlock.bench.suite` and read by `textlock.bench.readme`.

A line is one candidate's figures (see `textlock.bench.entry`). A file is an object of what was measured on and how,
with all lines under "figures", one to a line of text. This module imports nothing that has to be installed.
"""

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textlock.data.atomic import write_text_atomically

Line = dict[str, Any]

# Parts of a benchmark that another part of the suite runs.
RUN_BY = {"gemm": "ceilings", "kernels": "block", "profile": "step"}


def is_ours(name: str) -> bool:
    """Return whether a candidate is of this project."""
    return name.startswith("ours")


def read_figures(path: Path) -> list[Line]:
    """Return the lines of a file of figures or of a benchmark's output, each with device, versions and commit.

    Raises ValueError for a file that is neither.
    """
    text = path.read_text()
    try:
        found = json.loads(text) if path.suffix == ".json" else None
        if found is None:
            return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        shared = {"device": found["device"], "versions": found["versions"]}
        commits = {name: part.get("commit") for name, part in found["parts"].items()}
        return [line | shared | {"commit": commits[suite_part(line)]} for line in found["figures"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of figures: {error!r}") from error


def suite_part(line: Line) -> str:
    """Return the part of the suite that a line belongs to."""
    part: str = line["part"]
    return RUN_BY.get(part, part)


@dataclass
class Results:
    """A file of figures that is written after every change."""

    path: Path
    machine: dict[str, Any]  # what was measured on
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: list[Line] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, machine: dict[str, Any], replaced: Sequence[str]) -> "Results":
        """Continue today's file of this machine without the parts that are measured again, or begin one.

        Raises ValueError where something else has the name of that file.
        """
        today = datetime.date.today().isoformat()
        name, number = f"{slug(machine['device'])}-{today}", 1
        while True:
            path = folder / f"{name}{'' if number == 1 else f'-{number}'}.json"
            if not path.exists():
                return cls(path, machine)
            try:
                found = json.loads(path.read_text())
                if all(found[key] == machine[key] for key in ("device", "driver", "versions")):
                    parts = {part: what for part, what in found["parts"].items() if part not in replaced}
                    figures = [line for line in found["figures"] if suite_part(line) not in replaced]
                    return cls(path, machine, parts, figures)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no file of figures, move it away: {error!r}") from error
            number += 1

    def add(self, line: Line) -> None:
        """Add a line; it replaces an older one of the same candidate, unless only the older one has figures."""
        line = {key: value for key, value in line.items() if key not in ("device", "versions", "commit")}
        for number, known in enumerate(self.figures):
            if all(known[key] == line[key] for key in ("part", "operation", "case", "candidate")):
                if "ms" in line or "ms" not in known:
                    self.figures[number] = line
                break
        else:
            self.figures.append(line)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        head = json.dumps(self.machine | {"parts": self.parts}, indent=1).removesuffix("\n}")
        figures = ",\n".join(f"  {json.dumps(line)}" for line in self.figures)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path, f'{head},\n "figures": [\n{figures}\n ]\n}}\n')


def slug(device: str) -> str:
    """Return a device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@dataclass(frozen=True)
class Contest:
    """All that was measured of one operation on the same data."""

    part: str
    operation: str
    case: dict[str, Any]
    lines: tuple[Line, ...]

    @property
    def measured(self) -> dict[str, Line]:
        """Lines with figures by candidate."""
        return {line["candidate"]: line for line in self.lines if "ms" in line}

    @property
    def ours(self) -> Line | None:
        """Our fastest."""
        return min((line for name, line in self.measured.items() if is_ours(name)), key=_ms, default=None)

    @property
    def peer(self) -> Line | None:
        """The fastest of the others."""
        return min((line for name, line in self.measured.items() if not is_ours(name)), key=_ms, default=None)

    @property
    def data(self) -> str:
        """What it was measured on, for people."""
        case = self.case
        match self.part:
            case "loss":
                return f"{case['b']:,} x {case['B']:,} x {case['d']}"
            case "loader":
                return f"{case['width']} x {case['height']} pixels"
            case "step" | "profile":
                jpegs = f", JPEGs of {case['jpeg_short_side']} pixels" if case.get("jpeg_short_side") else ""
                return f"{case['local_batch']:,} of {case['texts']:,}{jpegs}"
            case "large_batch":
                return f"{case['batch']:,} images"
            case "ceilings":
                return ""
            case _:
                return f"{case['micro_batch']} images"


def _ms(line: Line) -> float:
    return float(line["ms"])


def contests(lines: Iterable[Line]) -> Iterator[Contest]:
    """Group lines by what was measured, in the order in which that first appears."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["part"], line["operation"], line["case"]]), []).append(line)
    for group in groups.values():
        yield Contest(group[0]["part"], group[0]["operation"], group[0]["case"], tuple(group))


COMPARED = (
    *("measured", "on", "ours", "ms", "± %", "images/s", "floor ms", "% of floor"),
    *("best peer", "its ms", "times faster"),
)


def comparison_table(lines: Iterable[Line]) -> str:
    """Return a table of our fastest next to the floor and the fastest peer, in Markdown."""
    rows = []
    for contest in contests(lines):
        if contest.part in ("ceilings", "profile", "plan"):
            continue
        ours, peer = contest.ours, contest.peer
        if ours is None:
            reasons = [why_none(line) for line in contest.lines if is_ours(line["candidate"])]
            if not reasons:
                continue
            cells = [f"none: {'; '.join(dict.fromkeys(reasons))}", "", "", "", "", ""]
        else:
            cells = [ours["candidate"], time_of(ours), spread_of(ours)]
            cells += [number(ours.get("images_per_second")), number(ours.get("floor_ms"))]
            cells += [number(ours.get("percent_of_floor"))]
        cells += ["", "", ""] if peer is None else [peer["candidate"], time_of(peer), ""]
        if ours is not None and peer is not None:
            cells[-1] = f"{peer['ms'] / ours['ms']:.2f}"
        rows.append([contest.operation, contest.data, *cells])
    return markdown(COMPARED, rows)


def ceilings_table(lines: Iterable[Line]) -> str:
    """Return the highest rates that the device reached, in Markdown."""
    rows = []
    for contest in contests(lines):
        if contest.part == "ceilings":
            (line,) = contest.lines
            rate = f"{line['tflops']:.4g} TFLOP/s" if "tflops" in line else f"{line['gigabytes_per_second']:,.0f} GB/s"
            rows.append([contest.operation, rate, time_of(line), spread_of(line)])
    return markdown(("ceiling", "rate", "ms", "± %"), rows)


def profile_table(lines: Iterable[Line]) -> str:
    """Return where the time of a step goes, in Markdown."""
    rows = []
    for contest in contests(lines):
        for line in contest.lines:
            if contest.part != "profile" or "ms" not in line:
                continue
            floor = line.get("floor_ms")
            percent = None if floor is None else 100 * floor / line["ms"]
            cells = [number(line.get("launches")), time_of(line), f"{100 * line['share']:.1f}"]
            rows.append([contest.operation, *cells, number(floor), number(percent)])
    return markdown(("kernel", "launches", "ms", "% of the step", "floor ms", "% of floor"), rows)


def why_none(line: Line) -> str:
    """Return why a candidate has no figures, for people."""
    if "wrong" in line:
        return f"{line['candidate']} is wrong"
    return f"{line['candidate']}: {line.get('failed') or line.get('absent')}"


def time_of(line: Line) -> str:
    """Return the median in milliseconds, for people."""
    return number(line["ms"])


def spread_of(line: Line) -> str:
    """Return half the distance of the quartiles in percent of the median."""
    if "quartiles_ms" not in line:
        return ""
    low, high = line["quartiles_ms"]
    return f"{50 * (high - low) / line['ms']:.1f}"


def number(value: float | None) -> str:
    """Return a number with three digits that say something, all of them before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its columns aligned so that it reads in a terminal too; nothing without rows."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
