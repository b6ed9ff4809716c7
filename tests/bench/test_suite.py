"""The suite: time, what is cut off, crashes, lacks or fails, and every benchmark of it at a tiny size."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import tyro

from textlock.bench import suite
from textlock.bench.suite import Command, Part

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# Stands for a benchmark: prints figures, then does what its first argument says.
FAKE = """
import json, subprocess, sys, time
what, *names = sys.argv[1:]
names, flags = [name for name in names if len(name) == 1 or name == "copy"], names[1:]
print("told", *flags, file=sys.stderr)
times = {"ms": 1.0, "quartiles_ms": [1.0, 1.0], "tflops": 1.0}
for name in names:
    part = "ceilings" if what == "ceilings" else "loss"
    line = {"part": part, "operation": name, "case": {"b": 1, "B": 1, "d": 1}, "candidate": "ours"} | times
    print(json.dumps(line | {"device": "d", "versions": {}, "commit": "c"}))
    print("{not of ours}")
if what == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("child", child.pid)
    sys.stdout.flush()
    time.sleep(60)
if what == "crash":
    sys.exit(7)
if what == "wrong":
    print(json.dumps(line | {"operation": "o", "wrong": {"loss": 1.0}}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return what makes a command of the stand-in."""
    (tmp_path / "fake_benchmark.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def command(*arguments, **settings):
        return Command("fake_benchmark", arguments, takes=(), **settings)

    return command


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Return what runs a table of parts on the CPU, and gives exit status, file and output."""

    def run(parts, *flags):
        monkeypatch.setitem(suite.PARTS, "cpu", parts)
        status = suite.main(["--on", "cpu", "--output", str(tmp_path / "out"), *flags])
        (path,) = (tmp_path / "out").glob("*.json")
        assert not list((tmp_path / "out").glob(".*"))
        return status, json.loads(path.read_text()), capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("parts", "status", "states", "operations", "told"),
    [
        ({"loss": [("print", "a", "b")]}, 0, {"loss": "complete"}, ["a", "b"], "| a "),
        (
            {"loss": [("crash", "a"), ("print", "b")], "tower": [("print", "c")]},
            1,
            {"loss": "exit status 7; complete", "tower": "complete"},
            ["a", "b", "c"],
            "fault: loss: fake_benchmark crash a ended with exit status 7",
        ),
        (
            {"loss": [("wrong", "a")]},
            1,
            {"loss": "complete"},
            ["a", "o"],
            "fault: loss: o, ours is wrong: {'loss': 1.0}",
        ),
    ],
    ids=["right", "a crash, and the rest goes on", "ours wrong"],
)
def test_lines_are_gathered_and_faults_told(parts, status, states, operations, told, fake, run):
    parts = {name: Part(1, tuple(fake(*arguments) for arguments in commands)) for name, commands in parts.items()}
    found_status, found, printed = run(parts)
    assert found_status == status and told in printed.out
    assert [line["operation"] for line in found["figures"]] == operations
    assert {name: part["status"] for name, part in found["parts"].items()} == states
    assert "device" not in found["figures"][0] and found["device"] and found["versions"]["torch"]
    assert found["parts"]["loss"]["commit"] and "{not of ours}" in printed.err


def is_gone(child):
    """Whether a process has ended, though nobody may have waited for it."""
    status = Path(f"/proc/{child}/stat")
    return not status.exists() or "Z" in status.read_text().split()[2]


def test_what_hangs_is_killed_with_its_children_and_keeps_what_it_had(fake, run, monkeypatch):
    monkeypatch.setattr(suite, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(suite, "LEAST_SECONDS", 0.1)
    start = time.monotonic()
    parts = {"loss": Part(1, (fake("hang", "a"),)), "tower": Part(1, (fake("print", "b"),))}
    status, found, printed = run(parts, "--minutes", "0.15")
    assert time.monotonic() - start < 30 and status == 0
    assert [line["operation"] for line in found["figures"]] == ["a", "b"]
    assert found["parts"]["loss"]["status"] == "cut off by the time limit"
    assert found["parts"]["tower"]["status"] == "complete"
    assert is_gone(int(printed.err.split("child ")[1].split()[0]))


def test_a_signal_to_end_kills_what_runs_and_keeps_what_it_had(fake, tmp_path):
    script = (
        "import sys; from textlock.bench import suite; from textlock.bench.suite import Command, Part;"
        "suite.PARTS['cpu'] = {'loss': Part(1, (Command('fake_benchmark', ('hang', 'a'), takes=()),))};"
        f"sys.exit(suite.main(['--on', 'cpu', '--output', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True, start_new_session=True)
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("child "):
            break
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "fault: interrupted" in out
    (path,) = (tmp_path / "out").glob("*.json")
    assert [line["operation"] for line in json.loads(path.read_text())["figures"]] == ["a"]
    assert is_gone(said.split("child ")[1].strip())


def test_what_is_no_file_of_figures_is_not_overwritten(fake, run, tmp_path, capfd):
    run({"loss": Part(1, (fake("print", "a"),))})
    (path,) = (tmp_path / "out").glob("*.json")
    path.write_text("a note")
    assert suite.main(["--on", "cpu", "--output", str(tmp_path / "out")]) == 2
    assert f"error: {path} is no file of figures, move it away" in capfd.readouterr().err
    assert path.read_text() == "a note"


def test_what_is_missing_is_named_and_its_part_left_out(fake, run, monkeypatch):
    monkeypatch.setitem(suite.WANTED, "cpu", {"no_such_package.inside": "the peers", "json": "everything"})
    monkeypatch.setitem(suite.PROGRAMS, "cpu", {"no-such-program": "the clocks"})
    parts = {"loss": Part(1, (fake("print", "a", needs=("no_such_package.inside",)),)), "tower": Part(1, ())}
    status, found, printed = run(parts)
    assert status == 0 and found["figures"] == []
    assert found["missing"] == {"no_such_package.inside": "the peers", "no-such-program": "the clocks"}
    assert found["parts"]["loss"]["status"] == "left out: no_such_package.inside is missing"
    assert "missing: no-such-program (the clocks)" in printed.out


def test_one_part_is_run_without_the_others_but_for_the_ceilings_that_it_takes(fake, run):
    parts = {"ceilings": Part(1, (fake("ceilings", "copy"),)), "loss": Part(1, (fake("print", "b"),))}
    assert [line["operation"] for line in run(parts, "--only", "loss")[1]["figures"]] == ["b"]
    parts["loss"] = Part(1, (Command("fake_benchmark", ("print", "b"), takes=("device", "ceilings", "limit")),))
    _, found, printed = run(parts, "--only", "loss")
    assert {line["part"] for line in found["figures"]} == {"ceilings", "loss"}
    assert "told --device cpu --ceilings " in printed.err and " --limit " in printed.err
    parts["ceilings"] = Part(1, (fake("crash"),))
    status, found, _ = run(parts, "--only", "loss")
    assert status == 1 and found["parts"]["loss"]["status"] == "left out: there are no ceilings"


def test_time_that_is_left_over_is_shared_out_again(monkeypatch):
    options = suite.parse(["--on", "cpu", "--minutes", "2"])
    options.only = []
    clock = [1000.0]
    monkeypatch.setattr(suite.time, "monotonic", lambda: clock[0])
    found = suite.Suite("cpu", options, None, {})
    total = sum(part.seconds for part in suite.PARTS["gpu"].values()) + suite.SECONDS_OF_TESTS
    assert total + suite.LAST_SECONDS <= 60 * suite.MINUTES["gpu"]
    assert found.time_for(10, 90) == pytest.approx((120 - suite.LAST_SECONDS) / 10)
    clock[0] += 10
    assert found.time_for(90, 0) == pytest.approx(110 - suite.LAST_SECONDS)
    clock[0] += 1000
    assert found.time_for(1, 1) == 0


TESTS = {
    "loss": "def test_wrong(): assert 1 == 2, 'one is\\nnot two'\ndef test_right(): print('not seen')\n",
    "tower": "@pytest.mark.parametrize('name', ['a b', 'c'])\ndef test_right(name): pass\n"
    "@pytest.mark.skip(reason='needs two GPUs')\ndef test_left_out(): pass\n",
    "step": "import no_such_module\n",
}


@pytest.fixture
def world_of_tests(tmp_path, monkeypatch):
    """Make a folder of tests, and a suite whose parts they are of."""
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: x", "memcheck: x"]\n')
    (tmp_path / "tests").mkdir()
    for name, text in TESTS.items():
        path = tmp_path / "tests" / f"test_{name}.py"
        path.write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{text}")
    (tmp_path / "tests" / "test_loader.py").write_text("def test_of_the_cpu(): assert False\n")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    results = suite.Results(tmp_path / "out.json", {"device": "d", "driver": "1", "versions": {}})
    found = suite.Suite("cpu", suite.parse(["--on", "cpu"]), results, {"xdist": ""})
    found.parts = {name: Part(1, (), (f"tests/test_{name}.py",)) for name in (*TESTS, "loader")}
    return found


def test_a_part_whose_tests_fail_has_no_figures(world_of_tests, fake, tmp_path):
    world = world_of_tests
    world.parts = {name: replace(part, commands=(fake("print", name[0]),)) for name, part in world.parts.items()}
    world.run_tests(120)
    for name in world.parts:
        world.run_part(name, 60, tmp_path / "none")
    found = world.results.parts
    assert (
        found["loss"]["tests"]["failed"] == ["tests/test_loss.py::test_wrong"] and found["loss"]["tests"]["passed"] == 1
    )
    assert found["step"]["tests"]["failed"] == ["tests/test_step.py"]
    assert found["tower"]["tests"]["passed"] == 2 and found["tower"]["tests"]["skipped"] == {"needs two GPUs": 1}
    left_out = "left out: its tests failed"
    states = {"loss": left_out, "tower": "complete", "step": left_out, "loader": "complete"}
    assert {name: part["status"] for name, part in found.items()} == states
    assert [line["operation"] for line in world.results.figures] == ["t", "l"]
    assert "tests/test_loss.py::test_wrong failed: AssertionError: one is" in world.faults
    assert any("no_such_module" in fault for fault in world.faults) and len(world.faults) == 2


def test_tests_that_take_too_long_are_cut_off(world_of_tests, tmp_path):
    (tmp_path / "tests" / "test_loss.py").write_text("import time\ntime.sleep(60)\n")
    world_of_tests.run_tests(3)
    assert world_of_tests.results.parts["loss"]["tests"]["status"] == "cut off by the time limit"


@pytest.mark.parametrize(("status", "faults"), [(0, 0), (66, 1), (None, 0)], ids=["right", "wrong", "missing"])
def test_the_sanitizer_runs_the_small_tests(status, faults, world_of_tests, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING > {tmp_path}/said\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "" if status is None else f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    world_of_tests.run_sanitizer(60)
    assert len(world_of_tests.faults) == faults and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
    if status is None:
        assert "left out" in world_of_tests.results.parts["sanitizer"]["status"]
    else:
        said = (tmp_path / "said").read_text()
        assert said.startswith("--tool memcheck --error-exitcode 66") and "gpu and memcheck" in said
        assert said.endswith(" 1\n")


def test_clocks_are_lowest_median_and_highest(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\nfor mhz in 1980 345 1755; do echo $mhz, 2619, 300.5, 41; done\necho [N/A], 1\nexec sleep 60\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    clocks = suite.Clocks()
    end = time.monotonic() + 20
    while clocks.looks() < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert clocks.since(0)["sm_mhz"] == [345, 1755, 1980] and clocks.since(1)["sm_mhz"] == [345, 1050, 1755]
    assert clocks.since(3) == {}
    clocks.close()
    monkeypatch.setenv("PATH", "")
    suite.Clocks().close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert suite.main(["--on", "gpu", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: torch sees no NVIDIA GPU on this machine") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--on", "cpu", "--only", "gather"], "there is no gather on a cpu; choose from loss, tower, loader, plan, "),
        (["--on", "gpu", "--only", "los"], "invalid choice"),
        (["--on", "gpu", "--minutes", "0"], "--minutes must be positive"),
    ],
)
def test_bad_options(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.parse(flags)
    assert message in capsys.readouterr().err


COMMANDS = [command for parts in suite.PARTS.values() for part in parts.values() for command in part.commands]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join((command.module, *command.arguments))[14:60])
def test_every_command_is_one_that_its_benchmark_takes(command):
    module = importlib.import_module(command.module)
    told = {"device": "cpu", "ceilings": "c.jsonl", "limit": "9", "profile": "trace.json.gz"}
    flags = [*command.arguments, *(word for name in command.takes for word in (f"--{name}", told[name]))]
    texts = ["--texts", "65536"] if command.module.endswith(".step") else []
    module.BENCHMARK.check(tyro.cli(module.BENCHMARK.options, args=[*flags, *texts]))


@pytest.mark.slow
def test_every_test_of_a_gpu_belongs_to_a_part():
    class Collected:
        tests: ClassVar[list[str]] = []

        def pytest_collection_finish(self, session):
            self.tests += [item.nodeid for item in session.items]

    collect = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / "tests")]
    assert pytest.main([*collect, "--rootdir", str(ROOT)], plugins=[Collected()]) == 0
    tests = Collected.tests
    paths = tuple(path for part in suite.PARTS["gpu"].values() for path in part.tests)
    assert len(set(paths)) == len(paths) and all((ROOT / path).exists() for path in paths)
    assert len(tests) > 300 and all(test.startswith(paths) for test in tests)


# What makes each benchmark of the GPU small enough for a CPU; everything else of its command stays as it is.
TINY = {
    "ceilings": "--seconds 0.001",
    "losses": "--batch 24 --width 16 --seconds 0.001",
    "operations": "--tower eva02_micro_patch8_32 --micro-batch 2 --seconds 0.001",
    "step": "--tower eva02_micro_patch8_32 --local-batches 4 --texts 8 --micro-batch 2 --workers 1 --seconds 0.001",
    "loader": "--samples 200 --batch 16 --workers 1 --seconds 0.1 --sizes 256",
}


def tiny(command):
    flags = {}
    for text in f"{' '.join(command.arguments)} {TINY[command.module.rpartition('.')[2]]}".split("--")[1:]:
        name, *values = text.split()
        flags[name] = values
    return replace(command, arguments=tuple(word for name, values in flags.items() for word in (f"--{name}", *values)))


@pytest.mark.slow
def test_every_benchmark_of_a_gpu_runs_from_end_to_end(run, monkeypatch, tmp_path):
    """At tiny sizes on a CPU, where kernels are their references: only the device is new when it first meets one."""
    monkeypatch.setenv("CXX", "no-such-compiler")  # compiling peers for a CPU takes minutes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parts = {name: replace(part, commands=tuple(map(tiny, part.commands))) for name, part in suite.PARTS["gpu"].items()}
    parts.pop("gather")
    status, found, printed = run(parts, "--minutes", "60")  # however busy the machine is
    assert status == 0, printed
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(parts, "complete")
    measured = {}
    for line in found["figures"]:
        if "ms" in line:
            measured.setdefault(line["part"], set()).add((line["operation"], line["candidate"]))
            assert line["part"] in ("ceilings", "profile", "loader") or max(line["errors"].values()) < 1e-3
    assert measured.keys() == {"ceilings", "gemm", "loss", "kernels", "block", "tower", "step", "loader", "profile"}
    assert measured["tower"] >= {("tower", name) for name in ("ours_all", "ours_no-mlp", "ours_lean", "eager", "timm")}
    assert measured["step"] == {
        ("step", name) for name in ("ours", "gradcache_fused", "checkpoints_eager", "open_clip_eager")
    }
    assert len(measured["profile"]) > 5
    assert {line["case"]["jpeg_short_side"] for line in found["figures"] if line["part"] == "step"} == {None, 256, 512}
    assert [path.name.endswith(".trace.json.gz") for path in (tmp_path / "out").iterdir()].count(True) == 1
    assert "times faster" in printed.out and "% of the step" in printed.out
