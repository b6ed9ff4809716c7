"""The common interface of all benchmarks: options, one JSON line a candidate, one table, exit status.

A benchmark declares a `Benchmark`: the class of its options, what is wrong with them, the columns of its table, and a
generator of `Line`s. Those that time candidates in turns make their lines with `textlock.bench.candidates`.

Every line is printed on stdout as soon as it is known, and `textlock.bench.suite` gathers them:

    part, operation, case   what was measured, on what data
    candidate               who: ours, whose names begin with "ours", or a peer
    ms, quartiles_ms, runs  median and quartiles of so many runs
    floor_ms, percent_of_floor, errors, and further figures of the part
    absent | wrong | failed instead: why there are no figures
    device, versions, commit

The table follows on stderr. Exit status 1 if one of ours is wrong or fails, 2 with one sentence for bad input.
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from textlock.bench.measure import TimeUp, Unavailable, Wrong, release, time_limit
from textlock.bench.records import is_ours, spread_of
from textlock.engine.provenance import commit, device_name, versions

TIME_LIMIT = "time limit"  # why a candidate has no figures
CPU = torch.device("cpu")
NO_LIMIT = 1e6  # seconds: of a benchmark that takes no --limit

Outcome = dict[str, Any]  # figures of a candidate by name, or `absent`, `wrong` or `failed` with the reason


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every benchmark that times candidates."""

    device: Literal["cpu", "cuda"] | None = None
    """What to measure on; left out: the GPU, if there is one."""
    candidates: tuple[str, ...] = ()
    """Names as in the table; left out: all."""
    seconds: float = 2.0
    """Time spent on each figure, at least three runs."""
    limit: float = 300.0
    """Seconds after which nothing more is started."""


@dataclass(frozen=True)
class Column:
    """A column of a table: a figure by its name, or a function of all figures of a candidate; empty for None."""

    title: str
    value: str | Callable[[Outcome], Any]
    form: str = ""
    unit: float = 1.0

    def cell(self, outcome: Outcome) -> str:
        """Return the cell of a candidate that has figures."""
        value = outcome.get(self.value) if isinstance(self.value, str) else self.value(outcome)
        if value is None or isinstance(value, str):
            return value or ""
        return format(value / self.unit, self.form)


TIMING = (Column("ms", "ms", ",.3f"), Column("± %", spread_of))
FLOOR = Column("% floor", "percent_of_floor", ".0f")
PEAK = Column("peak MiB", "peak_bytes", ",.0f", 2**20)
ERROR = Column("error", lambda outcome: max(outcome["errors"].values()), ".0e")


@dataclass(frozen=True)
class Line:
    """What is known of one candidate."""

    part: str
    operation: str
    case: dict[str, Any]
    candidate: str
    outcome: Outcome
    shown: tuple[str, ...] | None = ()  # cells of the table before the candidate's name; None: not in the table

    def told(self) -> dict[str, Any]:
        """Return the JSON object that is printed, without the machine."""
        about = {"part": self.part, "operation": self.operation, "case": self.case, "candidate": self.candidate}
        return about | self.outcome


@dataclass
class Session:
    """One run of a benchmark."""

    device: torch.device
    end: float  # on the monotonic clock
    notes: list[str] = field(default_factory=list)  # sentences to print below the table

    @classmethod
    def lasting(cls, device: torch.device, seconds: float) -> "Session":
        """Return a session that begins now and lasts so long."""
        return cls(device, time.monotonic() + seconds)

    def seconds_left(self) -> float:
        """Return how long the session still has, below zero once it is over."""
        return self.end - time.monotonic()

    def outcome_of(self, work: Callable[[], Outcome]) -> Outcome:
        """Return what ``work`` finds in the time that is left, or why it finds nothing."""
        try:
            with time_limit(self.seconds_left()):
                return work()
        except Unavailable as reason:
            return {"absent": str(reason)}
        except Wrong as wrong:
            return {"wrong": wrong.errors}
        except TimeUp:
            return {"failed": TIME_LIMIT}
        except Exception as error:  # of a compiler, a library, or for want of memory: the others still have figures
            return {"failed": one_line(error)}
        finally:
            release(self.device)


def has_figures(outcome: Outcome) -> bool:
    """Return whether a candidate was measured."""
    return outcome.keys().isdisjoint(("absent", "wrong", "failed"))


def one_line(error: Exception) -> str:
    """Return type and first line of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


class Report:
    """Prints every outcome as a JSON line on stdout at once, and a table on stderr at the end."""

    def __init__(self, device: torch.device, before: Sequence[str], columns: Sequence[Column], title: str) -> None:
        """``before`` name what comes before the candidate in the table."""
        self.machine = {"device": device_name(device), "versions": versions(), "commit": commit()}
        self._columns = columns
        self._table = Table(title=", ".join(filter(None, [title, device_name(device)])))
        for name in (*before, "candidate", *(column.title for column in columns)):
            self._table.add_column(name, justify="right")
        self._absent: dict[str, set[str]] = {}  # reason -> names
        self._faults: list[str] = []

    def add(self, line: Line) -> None:
        """Print a candidate's JSON line and add it to the table."""
        name, outcome, shown = line.candidate, line.outcome, line.shown
        print(json.dumps(line.told() | self.machine), flush=True)
        if "absent" in outcome:
            self._absent.setdefault(outcome["absent"], set()).add(name)
            return
        if is_ours(name) and ("wrong" in outcome or outcome.get("failed", TIME_LIMIT) != TIME_LIMIT):
            why = outcome.get("failed", f"wrong, its relative errors are {outcome.get('wrong')}")
            self._faults.append(f"{', '.join(dict.fromkeys([line.operation, *(shown or ()), name]))}: {why}")
        if shown is None:
            return
        if has_figures(outcome):
            cells = [column.cell(outcome) for column in self._columns]
        elif "wrong" in outcome:
            cells = [f"wrong: {max(outcome['wrong'].values()):.0e}"]
        else:
            cells = [outcome["failed"]]
        self._table.add_row(*map(escape, (*shown, name, *cells)))

    def close(self, notes: Iterable[str] = ()) -> None:
        """Print the table, ``notes``, what was left out and faults of ours; exit status 1 if there are any."""
        Console(stderr=True, width=200).print(self._table)
        for note in notes:
            print(note, file=sys.stderr)
        for why, names in self._absent.items():
            print(f"left out {', '.join(sorted(names))}: {why}", file=sys.stderr)
        for fault in self._faults:
            print(f"fault: {fault}", file=sys.stderr)
        if self._faults:
            raise SystemExit(1)


O = TypeVar("O")  # noqa: E741  # of options


@dataclass(frozen=True)
class Benchmark(Generic[O]):
    """What a benchmark declares; `command` reads the command line, `run` takes options that are already parsed."""

    about: str | None  # the docstring of its module: the text above --help
    options: type[O]
    check: Callable[[O], object]  # raises ValueError for what cannot be, before anything slow
    lines: Callable[[O, Session], Iterator[Line]]
    before: tuple[str, ...]  # names of the columns before the candidate's, filled by `Line.shown`
    columns: tuple[Column, ...]
    title: Callable[[O], str] = lambda options: ""

    def run(self, options: O) -> None:
        """Measure and print; raises ValueError for bad options, SystemExit(1) where one of ours is wrong or fails."""
        self.check(options)
        device = device_of(getattr(options, "device", "cpu"))
        session = Session.lasting(device, getattr(options, "limit", NO_LIMIT))
        report = Report(device, self.before, self.columns, self.title(options))
        for line in self.lines(options, session):
            report.add(line)
        report.close(session.notes)

    def command(self) -> None:
        """Run with the options of the command line; exit status 2 with one sentence for bad ones."""
        try:
            self.run(tyro.cli(self.options, description=self.about))
        except (ValueError, OSError, Wrong) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1 if isinstance(error, Wrong) else 2) from error


def device_of(name: Literal["cpu", "cuda"] | None) -> torch.device:
    """Return a device by its name, None being the GPU if there is one; raises ValueError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no NVIDIA GPU on this machine")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def require_positive(options: Any, *names: str) -> None:
    """Raise ValueError for an option, or a value of one that takes several, that is not positive."""
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not number > 0:
                raise ValueError(f"{flag(name)} is {number:g}, must be positive")


def require_known(name: str, values: Iterable[Any], known: Collection[Any]) -> None:
    """Raise ValueError for an option's value that is not among the known ones."""
    for value in values:
        if value not in known:
            raise ValueError(f"{flag(name)} {value} is unknown: choose from {', '.join(map(str, known))}")


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"
