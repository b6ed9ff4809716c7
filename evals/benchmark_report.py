"""Runs a suite of benchmarks task by task, keeps what is measured in a file as it goes, and prints it as a table.

A run that is stopped goes on with the tasks that are not in the file yet. The file says which weights, text tower and
precision its figures are of, and is refused for others; the figures of a set that has changed are measured again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.atomic import write_text_atomically
from ..data.benchmark_sets import SetLayout
from .benchmark_suites import PAPER, Suite, Task
from .benchmarks import Outcome, WinogavilLayout
from .counts import describe_count

_ROW = "{:34s} {:24s} {:>8s} {:>8s} {:>10s}  {}"


@dataclass
class Results:
    """What was measured of a suite, as its file holds it."""

    identity: dict[str, Any]
    """What decides the figures besides the sets: suite, weights, text tower, image size, precision."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the keys of the tasks: ``Outcome`` as a dict, ``folder`` of the set, ``set``, its fingerprint, and
    ``measured``, by what: step, versions, commit, device."""
    averages: dict[str, float] = field(default_factory=dict)
    """Those of which every task is there."""

    def figure(self, task: Task, metric: str) -> float | None:
        """Return a share from 0 to 1, None where it was not measured."""
        return self.tasks[task.key]["figures"].get(metric) if task.key in self.tasks else None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_text_atomically(path, json.dumps(asdict(self), indent=1) + "\n")


def read_results(path: Path, identity: Mapping[str, Any]) -> Results:
    """Return what a file holds of the same identity; nothing yet where there is no file.

    Raises:
        ValueError: it holds figures of another identity, or is no such file.
    """
    results = Results(dict(identity))
    if not path.exists():
        return results
    try:
        stored = json.loads(path.read_bytes())
        there, tasks = dict(stored["identity"]), dict(stored["tasks"])
        for key, task in tasks.items():
            about = {name: task.pop(name) for name in ("folder", "set", "measured")}
            results.tasks[key] = {**asdict(Outcome(**task)), **about}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no figures of a suite: give another --output, or remove it") from error
    different = [key for key in {**identity, **there} if identity.get(key) != there.get(key)]
    if different:
        raise ValueError(
            f"{path} holds figures of another {' and another '.join(different)}, and they are not mixed: give another "
            "--output, or remove it"
        )
    return results


@dataclass
class SuiteRun:
    """A suite on the sets that are under a root."""

    suite: Suite
    layouts: Mapping[str, SetLayout | WinogavilLayout]
    allow_missing: bool
    """Keep figures although an outcome has complaints."""
    without: dict[str, str] = field(default_factory=dict)
    """Why a task that is there has no figure, by key."""

    def still_good(self, results: Results) -> list[str]:
        """Return the keys of the tasks whose stored figures stand.

        Their sets are as they were, or not under the root now, and no complaint about them is refused.
        """
        return [
            key
            for key, task in results.tasks.items()
            if (key not in self.layouts or task["set"] == self.layouts[key].fingerprint())
            and (self.allow_missing or not task["complaints"])
        ]

    def store(self, task: Task, outcome: Outcome, results: Results, measured: Mapping[str, Any]) -> None:
        """Add an outcome to the results; ``measured`` as there."""
        layout = self.layouts[task.key]
        about = {"folder": str(layout.folder), "set": layout.fingerprint(), "measured": dict(measured)}
        results.tasks[task.key] = {**asdict(outcome), **about}
        results.averages = self.averages(results)

    def outcomes(
        self, done: list[str], evaluate: Callable[[Task, SetLayout | WinogavilLayout], Outcome]
    ) -> Iterator[tuple[Task, Outcome]]:
        """Evaluate the tasks that are there and not ``done``, in their order, and yield those that have a figure.

        Where several ranks evaluate, all iterate with the same ``done``. What is wrong with one set stops no other:
        ``without`` says it.
        """
        for task in self.suite.tasks:
            if task.key not in self.layouts or task.key in done:
                continue
            try:
                outcome = evaluate(task, self.layouts[task.key])
            except (ValueError, OSError) as error:
                self.without[task.key] = str(error)
                continue
            if absent := [metric for metric in task.metrics if metric not in outcome.figures]:
                self.without[task.key] = f"{self.layouts[task.key].folder} is too small for {absent[0]}"
            elif outcome.complaints and not self.allow_missing:
                said = "; ".join(outcome.complaints)
                self.without[task.key] = f"{said}: mend it, or take the figure of the rest with --allow-missing"
            else:
                yield task, outcome

    def averages(self, results: Results) -> dict[str, float]:
        """Return the averages of which every task has its figure, shares from 0 to 1."""
        found = {}
        for average in self.suite.averages:
            figures = [results.figure(task, task.metrics[0]) for task in self.suite.tasks_of(average)]
            measured = [figure for figure in figures if figure is not None]
            if len(measured) == len(figures):
                found[average.name] = sum(measured) / len(measured)
        return found

    def table(self, results: Results) -> Iterator[str]:
        """Yield the lines of the table: ours, the paper's and the difference in per cent, and what ours are of."""
        yield _ROW.format("task", "figure", "ours", "paper", "difference", "of")
        notes = []
        for task in self.suite.tasks:
            for metric in task.metrics:
                ours, paper = results.figure(task, metric), task.paper.get(metric, {})
                yield _line(task.name, metric, ours, paper, self._words_of(task, results))
                notes += _peers(task.name, paper)
        for average in self.suite.averages:
            tasks = self.suite.tasks_of(average)
            there = sum(results.figure(task, task.metrics[0]) is not None for task in tasks)
            words = (
                f"{len(tasks)} tasks" if there == len(tasks) else f"no average: {there} of {len(tasks)} tasks are there"
            )
            yield _line(average.name, "average", results.averages.get(average.name), average.paper, words)
            notes += _peers(average.name, average.paper) + [f"{average.name}: {average.note}"] * bool(average.note)
        yield f"paper: {PAPER}, as reported; no figure stands where none was at hand"
        yield from notes

    def _words_of(self, task: Task, results: Results) -> str:
        if task.key in self.without:
            return self.without[task.key]
        if task.key not in results.tasks:
            return "not here"
        stored = results.tasks[task.key]
        words = [describe_count(stored["counts"]), *stored["complaints"]]
        read = stored["counts"].get("instances", stored["counts"]["images"])
        if task.key not in self.layouts:
            words.append(f"measured in {stored['folder']}, which is not under --data now")
        if task.images not in (None, read):
            words.append(f"the whole set has {task.images:,}")
        return "; ".join(words)


def _line(name: str, metric: str, ours: float | None, paper: Mapping[str, float], words: str) -> str:
    reported = paper.get(PAPER)
    mine = None if ours is None else 100 * ours
    shown = ["-" if value is None else f"{value:.2f}" for value in (mine, reported)]
    difference = "-" if mine is None or reported is None else f"{mine - reported:+.2f}"
    return _ROW.format(name, metric, *shown, difference, words)


def _peers(name: str, paper: Mapping[str, float]) -> list[str]:
    others = ", ".join(f"{column} {value:.1f}" for column, value in paper.items() if column != PAPER)
    return [f"{name}, reported of others: {others}"] if others else []
