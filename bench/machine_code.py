"""Compile every Triton kernel of the project for an H100, on a machine without one, and read what the compiler made.

    python -m textlock.bench.machine_code                              # with the installed Triton
    python -m textlock.bench.machine_code --triton .venv/triton-3.6    # with another (make test puts 3.6 there)

Kernels are compiled as their own launchers launch them: the launchers of all cards (`textlock.kernels.card`) run on
tensors without data, and each launch is compiled in place of being run. Registers, stack and instructions are read from
the binary. One JSON line a kernel on stdout, a table on stderr. Exit status 1 and one sentence a fault: registers
spilled to memory, a dot product that is no wgmma, or fewer programs in a multiprocessor than the launcher counts on.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import triton
import tyro
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from textlock.kernels.card import Data, find_cards

# An H100, and what one of its multiprocessors holds (CUDA programming guide, table of compute capability 9.0).
MULTIPROCESSORS = 132
REGISTERS, THREADS, PROGRAMS, SHARED_BYTES = 64 * 1024, 2048, 32, 228 * 1024
RESERVED_BYTES = 1024  # of shared memory, for each program


@dataclass(frozen=True, kw_only=True)
class Options:
    triton: Path | None = None
    """Folder made by `pip install --no-deps --target FOLDER triton==VERSION`; that Triton compiles."""
    sizes: Literal["all", "first"] = "all"
    """Sizes of each card that are compiled. first: those of the recipe alone, in a third of the time."""


@dataclass(frozen=True)
class Case:
    """A call that launches kernels."""

    name: str
    launch: Callable[[], object]
    # By kernel, the programs that its launcher counts on: so many, or as many as it starts for each multiprocessor.
    programs: Mapping[str, int | Literal["grid"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Binary:
    """What the compiler made of one kernel."""

    kernel: str
    case: str
    registers: int  # of a thread
    threads: int
    shared_bytes: int
    stack_bytes: int
    spills: int  # instructions that store registers to the stack or load them back
    dots: int  # in the source, after inlining
    tensor_core: dict[str, int]  # instruction -> occurrences, in the binary
    wgmma: list[str]  # kinds of matrix product, in PTX
    programs: int  # that fit a multiprocessor
    programs_wanted: int  # that the launcher counts on

    def faults(self) -> list[str]:
        """Say what is wrong, a clause each."""
        found = []
        if self.spills or self.stack_bytes:
            found.append(f"keeps {self.stack_bytes} bytes a thread on the stack, with {self.spills} loads and stores")
        others = [name for name in self.tensor_core if not name.startswith("HGMMA")]
        if self.dots and (not self.wgmma or others):
            found.append(f"computes a dot product by {', '.join(others) or 'scalar instructions'}, not by wgmma")
        if self.programs < self.programs_wanted:
            found.append(f"fits a multiprocessor {self.programs} times, its launcher counts on {self.programs_wanted}")
        return found


def cases(which: Literal["all", "first"]) -> Iterator[Case]:
    for card in find_cards():
        for one in card.passes:
            for name, sizes in islice(card.compiled.items(), 1 if which == "first" else None):
                programs = one.programs if one.programs == "grid" else one.programs(sizes)
                launch = partial(one.launch, **one.inputs(sizes, Data("meta")))
                yield Case(name, launch, {one.kernel.__name__: programs})


class H100:
    """Stands for the driver of a GPU: says what to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_launches(case: Case, binaries: dict[Any, Binary]) -> None:
    """Compile the kernels that a case launches, print those that are new and add them to `binaries`."""

    def compiler_of(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_one(*arguments: object, **constants: object) -> None:
            compiled = kernel.warmup(*arguments, grid=grid, **constants)
            if compiled in binaries:
                return
            wanted = case.programs.get(kernel.__name__, 1)
            if wanted == "grid":
                wanted = -(-grid[0] // MULTIPROCESSORS)
            binary = binaries[compiled] = read(compiled, kernel.__name__, case.name, wanted)
            print(json.dumps({"triton": triton.__version__, "target": "sm_90"} | asdict(binary)), flush=True)

        return compile_one

    with mock.patch.object(JITFunction, "__getitem__", compiler_of), ExitStack() as stack:
        for name in [name for name in sys.modules if name.startswith("textlock.kernels.")]:
            if hasattr(sys.modules[name], "multiprocessors_of"):
                stack.enter_context(mock.patch(f"{name}.multiprocessors_of", return_value=MULTIPROCESSORS))
        case.launch()


def read(compiled: Any, kernel: str, case: str, programs_wanted: int) -> Binary:
    """Read the PTX and the binary of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, assembly = cuobjdump("--dump-resource-usage", file.name), cuobjdump("--dump-sass", file.name)
    registers, stack, local = (int(re.findall(rf"\b{name}:(\d+)", resources)[0]) for name in ("REG", "STACK", "LOCAL"))
    opcodes = Counter(re.findall(r"^ +/\*[0-9a-f]+\*/ +(?:@!?U?P\w+ +)?(\w[\w.]*)", assembly, re.MULTILINE))
    ptx = compiled.asm["ptx"]
    threads = int(re.findall(r"\.reqntid (\d+)", ptx)[0])
    shared = compiled.metadata.shared
    return Binary(
        kernel=kernel,
        case=case,
        registers=registers,
        threads=threads,
        shared_bytes=shared,
        stack_bytes=stack + local,
        spills=sum(count for name, count in opcodes.items() if name.startswith(("STL", "LDL"))),
        dots=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
        tensor_core={name: count for name, count in sorted(opcodes.items()) if name.split(".")[0].endswith("MMA")},
        wgmma=sorted(set(re.findall(r"wgmma\.mma_async\S*\.(m\d+n\d+k\d+\S*)", ptx))),
        programs=programs_that_fit(registers, threads, shared),
        programs_wanted=programs_wanted,
    )


def programs_that_fit(registers: int, threads: int, shared_bytes: int) -> int:
    """Return how many programs a multiprocessor holds; a warp takes registers by 256."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared_memory = SHARED_BYTES // (shared_bytes + RESERVED_BYTES)
    return min(by_registers, by_shared_memory, THREADS // threads, PROGRAMS)


def cuobjdump(*arguments: str) -> str:
    """Run the disassembler that comes with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not program.exists():
        raise FileNotFoundError(f"Triton {triton.__version__} comes without {program}; install its wheel from PyPI")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def show(binaries: Iterable[Binary]) -> None:
    table = Table(title=f"Triton {triton.__version__}, sm_90")
    for column in ("kernel", "case", "registers", "shared KiB", "stack", "spills", "tensor core", "wgmma", "programs"):
        table.add_column(column, justify="left" if column in ("kernel", "case") else "right")
    for binary in binaries:
        table.add_row(
            binary.kernel,
            binary.case,
            str(binary.registers),
            f"{binary.shared_bytes / 1024:.0f}",
            str(binary.stack_bytes),
            str(binary.spills),
            "\n".join(f"{count} {name}" for name, count in binary.tensor_core.items()),
            "\n".join(binary.wgmma),
            f"{binary.programs} of {binary.programs_wanted}",
        )
    Console(stderr=True, width=160).print(table)


def main(options: Options) -> None:
    if options.triton is not None:
        if not (options.triton / "triton" / "__init__.py").is_file():
            raise FileNotFoundError(
                f"{options.triton} holds no Triton; make it with pip install --no-deps --target {options.triton} triton"
            )
        paths = [str(options.triton.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "textlock.bench.machine_code", "--sizes", options.sizes]
        os.execve(sys.executable, command, environment)
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    triton.runtime.driver.set_active(H100())
    binaries: dict[Any, Binary] = {}  # by what Triton compiled: cases share kernels
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        for case in cases(options.sizes):
            compile_launches(case, binaries)
    show(binaries.values())
    faults = [f"{binary.kernel} ({binary.case}) {fault}" for binary in binaries.values() for fault in binary.faults()]
    if faults:
        print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
