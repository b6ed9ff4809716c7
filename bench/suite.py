"""Runs the benchmarks one after another under time limits and gathers what they print into one file of figures.

    make gpu-check                                # on a machine with a GPU: its tests, then every benchmark
    make gpu-check ARGS='--only loss tower'       # parts of it; all that follow --help
    make gpu-check ARGS=--sanitize                # the small tests under compute-sanitizer too
    make bench                                    # on a CPU: what can be run there

Every benchmark is a separate process, so that one that crashes or hangs does not end the others. The ceilings of the
device come first, and all floors from them. Tests come before the figures of their part: where one fails, the part has
none. `--minutes` bounds all of it: each part gets its share of the remaining time, starts nothing more near its end,
and is killed after it.

The file, bench/results/DEVICE-DATE.json, is rewritten with every figure, so that a run that is cut off keeps those
before. A run of some parts on the same day, device and versions replaces these and keeps the others. It holds

    device, driver, processor, versions, missing     what was measured on; packages and programs that were not there
    parts    by name: commit, date, command, seconds, status, clocks seen (lowest, median, highest), tests
    figures  what the benchmarks printed (textlock.bench.entry)

Nothing but torch has to be installed for this program itself: what a part lacks is named, and it is left out. Exit
status 1 where a test fails, ours is wrong or fails, or there is no device to run on.
"""

import argparse  # and no library: this must also run where nothing is installed
import contextlib
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from textlock.bench.measure import importable
from textlock.bench.records import Line, Results, ceilings_table, comparison_table, is_ours, profile_table
from textlock.engine.provenance import commit, device_name, processor_name, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

# What a package or program is for, so that a reader of "missing" knows what the figures lack.
WANTED = {
    "gpu": {
        "tyro": "every benchmark",
        "simplejpeg": "step and loader",
        "nvidia.dali": "decoding on the GPU",
        "open_clip": "the peers of the losses and steps",
        "webdataset": "the peers of the loader",
        "timm": "the peers of the tower",
        "flash_attn": "a peer of attention",
        "flash_attn.cute": "a peer of attention (flash-attn-4)",
        "pytest": "the tests",
        "xdist": "tests side by side (pytest-xdist)",
    },
    "cpu": {
        "tyro": "every benchmark",
        "simplejpeg": "large_batch and loader",
        "open_clip": "the peers of the losses",
        "webdataset": "the peers of the loader",
        "timm": "the peers of the tower",
    },
}
PROGRAMS = {"gpu": {"nvidia-smi": "driver and clocks", "g++": "compiled peers"}, "cpu": {"g++": "compiled peers"}}


@dataclass(frozen=True)
class Command:
    """A benchmark to run, and the options it is given: device, file of ceilings, time limit, file of a trace."""

    module: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("tyro",)
    takes: tuple[str, ...] = ("device", "ceilings", "limit")
    share: float = 1.0  # of the part's time, in relation to its other commands


@dataclass(frozen=True)
class Part:
    """What is measured together, the tests that must pass before, and how much time it gets next to the others."""

    seconds: float
    commands: tuple[Command, ...] = ()
    tests: tuple[str, ...] = ()


def command(line: str, **settings: Any) -> Command:
    """Make a command of what follows `python -m textlock.bench.`."""
    module, *arguments = line.split()
    return Command(f"textlock.bench.{module}", tuple(arguments), **settings)


DECODES = ("tyro", "simplejpeg")
# In the order in which they run: what decides most comes first.
PARTS = {
    "gpu": {
        "ceilings": Part(
            25,
            (
                command("ceilings --seconds 0.3", takes=("device",)),
                command("operations --only gemm --micro-batch 512 --seconds 0.2"),
            ),
        ),
        "loss": Part(
            65,
            (
                command(
                    "losses --batch 4096 --world 16 --seconds 0.4 --candidates ours_recompute ours_store"
                    " ours_sigmoid_fused open_clip open_clip_sigmoid open_clip_sigmoid_256 linear_cross_entropy"
                    " open_clip_compiled"
                ),
                command(
                    "losses --batch 16384 65536 --seconds 0.4 --candidates ours_recompute ours_store"
                    " ours_sigmoid_fused open_clip open_clip_sigmoid_256 linear_cross_entropy"
                ),
            ),
            (
                *("tests/kernels/test_pairs.py", "tests/kernels/test_contrastive_tiles.py"),
                *("tests/kernels/test_sigmoid.py", "tests/kernels/test_image_to_text.py"),
            ),
        ),
        "block": Part(
            90,
            (
                command(
                    "operations --only kernels block --micro-batch 512 --seconds 0.2 --candidates ours ours_all"
                    " ours_lean eager sdpa_flash sdpa_cudnn flash_attn flash_attn_4 timm"
                ),
                command(
                    "operations --only block kernels --micro-batch 512 --seconds 0.2"
                    " --candidates ours ours_all compiled"
                ),
            ),
            (
                *("tests/kernels/test_cards.py", "tests/kernels/test_attention.py"),
                *("tests/kernels/test_norm.py", "tests/kernels/test_swiglu.py"),
                *("tests/kernels/test_gelu.py", "tests/kernels/test_patchify.py", "tests/kernels/test_latent_pool.py"),
            ),
        ),
        "tower": Part(
            80,
            (
                command(
                    "operations --only tower --micro-batch 512 --seconds 1 --candidates ours_all ours_no-mlp ours_lean"
                    " ours_block eager timm timm_compiled compiled"
                ),
            ),
            ("tests/models",),
        ),
        "step": Part(
            120,
            (
                command(
                    "step --local-batches 4096 --candidates ours --jpegs 256 512 --workers 14 --seconds 8",
                    needs=DECODES,
                    takes=("device", "ceilings", "limit", "profile"),
                    share=1.5,
                ),
                command(
                    "step --local-batches 1024 4096 --seconds 3"
                    " --candidates ours gradcache_fused checkpoints_eager open_clip_eager",
                    needs=DECODES,
                ),
            ),
            ("tests/engine", "tests/test_train.py"),
        ),
        "loader": Part(
            40,
            (
                command(
                    "loader --sizes 256 512 --samples 4000 --batch 512 --seconds 2"
                    " --candidates ours_dali ours_cpu webdataset_nvjpeg webdataset_torchvision",
                    needs=DECODES,
                    takes=("device", "limit"),
                ),
            ),
            ("tests/data",),
        ),
        "gather": Part(0, (), ("tests/kernels/test_gather.py",)),
    },
    "cpu": {
        "ceilings": Part(10, (command("ceilings --seconds 2", takes=("device",)),)),
        "loss": Part(
            130,
            (
                command(
                    "losses --batch 4096 --world 2 --width 768 --seconds 5 --candidates ours_chunked open_clip"
                    " open_clip_compiled linear_cross_entropy ours_sigmoid_chunked open_clip_sigmoid"
                    " open_clip_sigmoid_256"
                ),
            ),
        ),
        "tower": Part(
            190, (command("operations --only tower --micro-batch 8 --seconds 20 --candidates ours_all eager timm"),)
        ),
        "loader": Part(120, (command("loader --seconds 8", needs=DECODES, takes=("device", "limit")),)),
        "plan": Part(20, (command("plan --gpus h100", takes=()),)),
        "large_batch": Part(120, (command("large_batch --check 4096", needs=DECODES, takes=()),)),
    },
}
MINUTES = {"gpu": 9.0, "cpu": 10.0}

SECONDS_OF_TESTS = 110.0
SECONDS_OF_SANITIZER = 240.0
TEST_PROCESSES = 8  # at the same time on one GPU
LONG = ("tests/test_train.py", "tests/kernels/test_gather.py")  # begun first: what starts processes takes longest
# At its limit a benchmark stops the running candidate, prints its table and exits; so many seconds later it is killed.
GRACE = 8.0
LEAST_SECONDS = 5.0  # for a benchmark; with less it is not begun
LAST_SECONDS = 10.0  # of all: for the table and for what ends late


class Clocks:
    """Looks at the GPU's clocks and power twice a second."""

    COLUMNS = ("sm_mhz", "memory_mhz", "watts", "celsius")
    QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"

    def __init__(self) -> None:
        self._seen: list[tuple[float, ...]] = []
        flags = [f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits", "--loop-ms=500", "--id=0"]
        reader, writer = os.openpty()  # a terminal, for which programs print every line at once
        try:
            self._process = subprocess.Popen(["nvidia-smi", *flags], stdout=writer, stderr=subprocess.DEVNULL)
        except OSError:  # it is named among what is missing
            os.close(reader)
        else:
            threading.Thread(target=self._read, args=(reader,), daemon=True).start()
        finally:
            os.close(writer)

    def _read(self, reader: int) -> None:
        with open(reader) as lines, contextlib.suppress(OSError):  # which is how a terminal ends
            for line in lines:
                with contextlib.suppress(ValueError):  # "[N/A]", or the last, cut line
                    self._seen.append(tuple(map(float, line.split(","))))

    def since(self, first: int) -> dict[str, list[float]]:
        """Return lowest, median and highest of what was seen since look number ``first``."""
        looks = self._seen[first:]
        columns = zip(self.COLUMNS, zip(*looks, strict=True), strict=False)
        return {name: [min(values), statistics.median(values), max(values)] for name, values in columns}

    def looks(self) -> int:
        return len(self._seen)

    def close(self) -> None:
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    late: bool  # it was killed for being late

    def __str__(self) -> str:
        """Return it for people."""
        if self.late:
            return "cut off by the time limit"
        return "complete" if self.status == 0 else f"exit status {self.status}"


def run_process(arguments: Sequence[str], limit: float, take: Callable[[Line], object], **environment: str) -> Ended:
    """Run a program and hand on the lines of JSON that it prints; its other output goes to stderr.

    It is killed, with all that it started, after ``limit`` seconds.
    """
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
    )
    late = threading.Event()

    def kill() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    timer.start()
    try:
        assert process.stdout is not None
        for text in process.stdout:
            line = as_line(text)
            if line is None:
                print(text, end="", file=sys.stderr, flush=True)
            else:
                take(line)
        return Ended(process.wait(), late.is_set())
    finally:
        timer.cancel()
        if process.poll() is None:
            kill()
            process.wait()


def as_line(text: str) -> Line | None:
    """Return the object that a line of output holds, if it is one of ours."""
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "part" in found else None


class Suite:
    """One run of the parts that were chosen."""

    def __init__(self, kind: str, options: argparse.Namespace, results: Results, missing: dict[str, str]) -> None:
        self.kind, self.options, self.results, self.missing = kind, options, results, missing
        self.parts = parts_of(kind, options.only)
        self.end = time.monotonic() + 60 * options.minutes - LAST_SECONDS
        self.clocks = Clocks() if kind == "gpu" else None
        self.faults: list[str] = []
        self.outcomes: dict[str, list[Line]] = {}  # of tests, by part

    def run(self, ceilings: Path) -> None:
        """Run everything; the remaining time is divided again before every part."""
        names = list(self.parts)
        weights = {name: part.seconds for name, part in self.parts.items()}
        if self.kind == "gpu":
            self.run_tests(self.time_for(SECONDS_OF_TESTS, sum(weights.values())))
            if self.options.sanitize:
                self.run_sanitizer(self.time_for(SECONDS_OF_SANITIZER, sum(weights.values())))
        for number, name in enumerate(names):
            rest = sum(weights[later] for later in names[number + 1 :])
            self.run_part(name, self.time_for(weights[name], rest), ceilings)

    def time_for(self, weight: float, rest: float) -> float:
        """Return the seconds for what weighs so much next to the rest."""
        left = max(0.0, self.end - time.monotonic())
        return left * weight / (weight + rest) if weight else 0.0

    def run_tests(self, limit: float) -> None:
        """Run the GPU tests of the parts, and note what fails."""
        paths = sorted((path for part in self.parts.values() for path in part.tests), key=lambda path: path not in LONG)
        if not paths:
            return
        if "pytest" in self.missing:
            say("tests: left out, pytest is missing")
            return
        say(f"tests of {', '.join(name for name, part in self.parts.items() if part.tests)}: {limit:.0f} s at most")
        side_by_side = () if "xdist" in self.missing else ("-n", str(TEST_PROCESSES), "--dist", "loadgroup")
        flags = ["-m", "gpu", "-q", "--continue-on-collection-errors", *side_by_side]
        flags += ["-p", "textlock.bench.pytest_lines", "-p", "no:cacheprovider"]
        ended = run_process([sys.executable, "-m", "pytest", *flags, *paths], limit, self.take_test)
        for name, part in self.parts.items():
            if part.tests:
                self.results.parts[name] = {"tests": self.summary(name, ended)}
        self.results.write()
        if ended.status not in (0, 1, 5) and not ended.late:  # 1: tests failed, 5: there were none
            self.faults.append(f"the tests ended with {ended}")

    def take_test(self, line: Line) -> None:
        """Note how a test ended, for its part."""
        owner = next(
            (name for name, part in self.parts.items() for path in part.tests if line["test"].startswith(path)), None
        )
        if owner is not None:
            self.outcomes.setdefault(owner, []).append(line)
        if line["outcome"] == "failed":
            self.faults.append(f"{line['test']} failed: {line['reason']}")
            say(f"failed: {line['test']}: {line['reason']}")

    def summary(self, part: str, ended: Ended) -> dict[str, Any]:
        """Return the entry of a part's tests in the file."""
        found = self.outcomes.get(part, [])
        return {
            "passed": sum(line["outcome"] == "passed" for line in found),
            "failed": [line["test"] for line in found if line["outcome"] == "failed"],
            "skipped": Counter(line["reason"] for line in found if line["outcome"] == "skipped"),
            "seconds": round(sum(line["seconds"] for line in found), 1),
            "status": str(ended) if ended.late else "complete",
        }

    def run_sanitizer(self, limit: float) -> None:
        """Run the smallest tests with every access to memory checked; each allocation is one of CUDA's own then."""
        program = shutil.which("compute-sanitizer")
        if program is None or "pytest" in self.missing:
            say("compute-sanitizer: left out, it or pytest is missing")
            self.results.parts["sanitizer"] = {"status": "left out: compute-sanitizer or pytest is missing"}
            return
        say(f"compute-sanitizer: {limit:.0f} s at most")
        tests = ("-m", "pytest", "-m", "gpu and memcheck", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels")
        arguments = [program, "--tool", "memcheck", "--error-exitcode", "66", sys.executable, *tests]
        start = time.monotonic()
        ended = run_process(arguments, limit, lambda line: None, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        seconds = round(time.monotonic() - start, 1)
        self.results.parts["sanitizer"] = {"status": str(ended), "seconds": seconds, "commit": commit()}
        self.results.write()
        if ended.status != 0 and not ended.late:
            self.faults.append(f"compute-sanitizer: {ended}")

    def run_part(self, name: str, limit: float, ceilings: Path) -> None:
        """Run the commands of a part, if its tests have not failed."""
        part = self.parts[name]
        record = self.results.parts.setdefault(name, {})
        if record.get("tests", {}).get("failed"):
            record["status"] = "left out: its tests failed"
            say(f"{name}: {record['status']}")
        if not part.commands or "status" in record:
            self.results.write()
            return
        say(f"{name}: {limit:.0f} s at most")
        record |= {"commit": commit(), "date": now(), "commands": []}
        start, looked = time.monotonic(), 0 if self.clocks is None else self.clocks.looks()
        states = []
        for number, command in enumerate(part.commands):
            rest = sum(later.share for later in part.commands[number:])
            share = (start + limit - time.monotonic()) * command.share / rest
            states.append(self.run_command(name, command, share, ceilings))
            record["commands"].append(" ".join((command.module, *command.arguments)))
            record["seconds"] = round(time.monotonic() - start, 1)
            record["status"] = "; ".join(dict.fromkeys(states))
            if self.clocks is not None:
                record["clocks"] = self.clocks.since(looked)
            self.results.write()

    def run_command(self, part: str, command: Command, limit: float, ceilings: Path) -> str:
        """Run one benchmark and return how it ended."""
        if lacking := [package for package in command.needs if package in self.missing]:
            return noted(f"left out: {', '.join(lacking)} is missing")
        if limit < LEAST_SECONDS:
            return noted("left out: no time was left")
        if "ceilings" in command.takes and not ceilings.exists():
            return noted("left out: there are no ceilings")
        told = {
            "device": "cuda" if self.kind == "gpu" else "cpu",
            "ceilings": str(ceilings),
            "limit": f"{max(1.0, limit - GRACE):.0f}",
            "profile": str(self.results.path.with_suffix(".trace.json.gz")),
        }
        flags = [word for name in command.takes for word in (f"--{name}", told[name])]
        arguments = [sys.executable, "-m", command.module, *command.arguments, *flags]

        def take(line: Line) -> None:
            if line["part"] == "ceilings":
                with ceilings.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            self.results.add(line)
            if is_ours(line["candidate"]) and "wrong" in line:
                self.faults.append(f"{part}: {line['operation']}, {line['candidate']} is wrong: {line['wrong']}")

        ended = run_process(arguments, limit, take)
        if ended.status != 0 and not ended.late:
            self.faults.append(f"{part}: {' '.join(arguments[2:])} ended with {ended}")
        return str(ended)

    def close(self) -> None:
        """Print the table and everything that went wrong."""
        if self.clocks is not None:
            self.clocks.close()
        for table in (ceilings_table, comparison_table, profile_table):
            if rows := table(self.results.figures):
                print(rows, end="\n\n")
        for name, record in self.results.parts.items():
            tests = record.get("tests")
            told = f", {tests['passed']} tests passed, {len(tests['failed'])} failed" if tests else ""
            print(f"{name}: {record.get('status', 'tests alone')}{told}")
        for package, use in self.missing.items():
            print(f"missing: {package} ({use})")
        for fault in self.faults:
            print(f"fault: {fault}")
        print(self.results.path)


def parts_of(kind: str, names: Sequence[str]) -> dict[str, Part]:
    """Return the parts of these names, and the ceilings if one of them takes these."""
    parts = {name: part for name, part in PARTS[kind].items() if name in names}
    if any("ceilings" in command.takes for part in parts.values() for command in part.commands):
        return {"ceilings": PARTS[kind]["ceilings"]} | parts
    return parts


def say(what: str) -> None:
    print(f"--- {what}", file=sys.stderr, flush=True)


def noted(state: str) -> str:
    """Print a state and return it."""
    say(state)
    return state


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def missing(kind: str) -> dict[str, str]:
    """Return the packages and programs that are not there, and what for."""
    packages = {name: use for name, use in WANTED[kind].items() if not importable(name)}
    return packages | {name: use for name, use in PROGRAMS[kind].items() if shutil.which(name) is None}


def driver_version() -> str:
    """Return the version of the GPU's driver, "unknown" where nvidia-smi is missing."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextlib.contextmanager
def ceilings_file(folder: Path) -> Iterator[Path]:
    """Yield a path for the ceilings of this run, deleted afterwards."""
    path = folder / f".ceilings-{os.getpid()}.jsonl"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exit status 2 for a part that the device does not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=tuple(PARTS), required=True, help="what to measure on")
    names = [name for kind in PARTS.values() for name in kind if name != "ceilings"]
    parser.add_argument("--only", nargs="+", choices=tuple(dict.fromkeys(names)), help="parts; left out: all")
    parser.add_argument("--minutes", type=float, help="for all of it; left out: 9 on a GPU, 10 on a CPU")
    parser.add_argument("--sanitize", action="store_true", help="run the small tests under compute-sanitizer too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the file")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = MINUTES[options.on]
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    if unknown := set(options.only or ()) - PARTS[options.on].keys():
        known = ", ".join(name for name in PARTS[options.on] if name != "ceilings")
        parser.error(f"there is no {', '.join(sorted(unknown))} on a {options.on}; choose from {known}")
    options.only = options.only or list(PARTS[options.on])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return its exit status."""
    options = parse(arguments)
    if options.on == "gpu" and not torch.cuda.is_available():
        print("error: torch sees no NVIDIA GPU on this machine; make bench measures what a CPU can", file=sys.stderr)
        return 1
    device = torch.device("cuda" if options.on == "gpu" else "cpu")
    lacking = missing(options.on)
    machine = {
        "device": device_name(device),
        "driver": driver_version() if options.on == "gpu" else None,
        "processor": f"{processor_name()}, {os.cpu_count()} threads",
        "versions": versions(),
        "missing": lacking,
    }
    try:
        results = Results.open(options.output, machine, tuple(parts_of(options.on, options.only)))
        results.write()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"{machine['device']}, {options.minutes:g} minutes at most, into {results.path}")
    suite = Suite(options.on, options, results, lacking)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children are killed and results so far printed
    try:
        with ceilings_file(options.output) as ceilings:
            suite.run(ceilings)
    except KeyboardInterrupt:
        suite.faults.append("interrupted")
    finally:
        suite.close()
    return 1 if suite.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
