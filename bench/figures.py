"""What is published of a candidate: a line as soon as it is known, a table at the end, and why there is nothing.

Every benchmark prints lines of one form, and `textlock.bench.suite` gathers them:

    part, operation, case   what was measured, on what data
    candidate               who: ours, whose names begin with "ours", or a peer
    ms, quartiles_ms, runs  median and quartiles of so many runs
    floor_ms, percent_of_floor, errors, and what else the part tells
    absent | wrong | failed instead: why there are no figures
    device, versions, commit
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from textlock.bench.measure import TimeUp, Unavailable, Wrong, release, time_limit
from textlock.bench.records import is_ours
from textlock.engine.provenance import commit, device_name, versions

TIME_LIMIT = "time limit"  # why a candidate has no figures

Outcome = dict[str, Any]


def has_figures(outcome: Outcome) -> bool:
    return outcome.keys().isdisjoint(("absent", "wrong", "failed"))


def outcome_of(work: Callable[[], Outcome], device: torch.device, limit: float) -> Outcome:
    """Return what ``work`` finds within ``limit`` seconds, or why it finds nothing."""
    try:
        with time_limit(limit):
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
        release(device)


def one_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


class Report:
    """Prints every outcome as a JSON line on stdout at once, and a table on stderr at the end."""

    def __init__(
        self, device: torch.device, columns: Sequence[str], cells: Callable[[Outcome], list[str]], *, title: str = ""
    ) -> None:
        """``columns`` name what comes before the candidate, then it, then what ``cells`` makes of its figures."""
        self.machine = {"device": device_name(device), "versions": versions(), "commit": commit()}
        self._cells = cells
        self._table = Table(title=", ".join(filter(None, [title, device_name(device)])))
        for column in columns:
            self._table.add_column(column, justify="right")
        self._absent: dict[str, set[str]] = {}  # reason -> names
        self._faults: list[str] = []

    def add(self, part: str, operation: str, case: dict[str, Any], name: str, outcome: Outcome, *before: str) -> None:
        """Print what is known of a candidate; ``before`` are the cells of the table in front of its name."""
        line = {"part": part, "operation": operation, "case": case, "candidate": name}
        print(json.dumps(line | outcome | self.machine), flush=True)
        if "absent" in outcome:
            self._absent.setdefault(outcome["absent"], set()).add(name)
            return
        if is_ours(name) and ("wrong" in outcome or outcome.get("failed", TIME_LIMIT) != TIME_LIMIT):
            why = outcome.get("failed", f"wrong, its relative errors are {outcome.get('wrong')}")
            self._faults.append(f"{', '.join([operation, *before[1:], name])}: {why}")
        if has_figures(outcome):
            cells = self._cells(outcome)
        elif "wrong" in outcome:
            cells = [f"wrong: {max(outcome['wrong'].values()):.0e}"]
        else:
            cells = [outcome["failed"]]
        self._table.add_row(*before, name, *cells)

    def close(self, notes: Sequence[str] = ()) -> None:
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


def timing_cells(outcome: Outcome) -> list[str]:
    """Return the median in milliseconds and half the distance of the quartiles in percent of it."""
    low, high = outcome["quartiles_ms"]
    return [f"{outcome['ms']:.3f}", f"{50 * (high - low) / outcome['ms']:.1f}"]


def cell(outcome: Outcome, name: str, form: str, unit: float = 1) -> str:
    """Return a figure in a unit, or nothing where there is none."""
    value = outcome.get(name)
    return "" if not value else format(value / unit, form)
