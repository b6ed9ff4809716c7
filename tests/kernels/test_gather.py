"""TextGather and gather_rows: four processes over gloo, their slabs in shared memory, kernels in the interpreter.

Run as a script this file is one rank: `python test_gather.py RANK FOLDER NAME`, NAME one of SCRIPTS.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from textlock.kernels import gather as gather_module
from textlock.kernels.contrastive import contrastive_loss
from textlock.kernels.gather import TextGather, gather_rows
from textlock.kernels.tiles import runs_tiles

WORLD = 4
STEPS = 5
POISON = 0x7F  # every byte of a new slab: a flag would be far beyond any step, a float16 is a nan

# Ranks of the group, nodes of the ranks, (b, d), dtype. Blocks are of 128 rows.
LAYOUTS = {
    "two ranks, ragged blocks": ([0, 1], "aa", (300, 96), torch.float16),
    "four ranks": ([0, 1, 2, 3], "aaaa", (130, 6), torch.float32),
    "ids": ([0, 1, 2, 3], "aaaa", (5, 1), torch.int64),
    "rows of one word": ([0, 1], "aa", (3, 2), torch.float16),
    "not the first ranks": ([1, 3], "aa", (4, 8), torch.float32),
    "two nodes": ([0, 1, 2, 3], "aabb", (131, 5), torch.float32),
    "two interleaved nodes": ([0, 1, 2, 3], "abab", (129, 1), torch.int64),
}

# Nodes of four ranks, whether each can read its peers, (b, d), dtype, the choice.
TRANSPORTS = {
    "one node": ("aaaa", [True] * 4, (2, 4), torch.float16, "symmetric"),
    "two nodes": ("abba", [True] * 4, (2, 4), torch.float16, "symmetric"),
    "one rank without peer access": ("aaaa", [True, True, False, True], (2, 4), torch.float16, "collective"),
    "nodes of different sizes": ("aaab", [True] * 4, (2, 4), torch.float16, "collective"),
    "one rank a node": ("abcd", [True] * 4, (2, 4), torch.float16, "collective"),
    "rows of six bytes": ("aaaa", [True] * 4, (2, 3), torch.float16, "collective"),
}


def make_rows(step: int, ranks: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randint(-1000, 1000, (ranks * shape[0], shape[1]), generator=torch.Generator().manual_seed(step))
    return rows.to(dtype)


class SharedSlabs:
    """Stands for symmetric memory: each rank's slab is a file that the others map."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mapped: list[torch.Tensor] = []

    def open(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        self.folder.mkdir(exist_ok=True)
        ranks = dist.get_process_group_ranks(group)
        own = self.map(f"slab{dist.get_rank()}", nbytes, torch.uint8).fill_(POISON)
        dist.barrier(group)
        slabs = [self.map(f"slab{rank}", nbytes, torch.uint8) for rank in ranks]
        return own, torch.tensor([slab.data_ptr() for slab in slabs])

    def map(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        self.mapped.append(torch.from_file(str(self.folder / name), shared=True, size=size, dtype=dtype))
        return self.mapped[-1]


def use_shared_slabs(folder: Path, nodes: str, group_ranks: list[int], can_read: bool = True) -> None:
    """Replace what asks for GPUs: where the ranks are, what they can read, and the slabs."""
    node = nodes[group_ranks.index(dist.get_rank())]
    gather_module._host_key = lambda: ord(node)
    gather_module._can_read = lambda device, peers: can_read
    gather_module._open_peers = SharedSlabs(folder).open


def delay_call(name: str) -> None:
    """Make this rank sleep before its kernels next call a function of gather.py."""
    function = getattr(gather_module, name)

    def late(*args):
        setattr(gather_module, name, function)
        time.sleep(0.1)
        function(*args)

    setattr(gather_module, name, late)


def run_steps(group: dist.ProcessGroup, shape: tuple[int, int], dtype: torch.dtype) -> dict:
    """Gather new rows step after step with late ranks; return what was wrong."""
    rank, ranks = group.rank(), group.size()
    gather = TextGather(group, shape, dtype)
    wrong, buffers = [], set()
    for step in range(STEPS):
        rows = make_rows(step, ranks, shape, dtype)
        # In turn one rank is late to publish and another, which has published, late to pull. The others go on.
        if step % ranks == rank:
            delay_call("_copy_words")
        if (step + 1) % ranks == rank:
            delay_call("_wait_for_step")
        gathered = gather.start(rows.chunk(ranks)[rank]).wait()
        if not torch.equal(gathered, rows):
            wrong.append(step)
        buffers.add(gathered.data_ptr())
        gathered.fill_(-7)  # no row may be left from this step
    return {"wrong": wrong, "buffers": len(buffers), "transport": gather.transport}


def run_without_waiting(group: dist.ProcessGroup) -> bool:
    """Gather with the wait for flags taken out, rank 0 publishing last; return whether the rows were right."""
    gather = TextGather(group, (3, 4), torch.float32)
    gather.start(make_rows(0, WORLD, (3, 4), torch.float32).chunk(WORLD)[group.rank()])
    wait, gather_module._wait_for_step = gather_module._wait_for_step, lambda *_: None
    rows = make_rows(1, WORLD, (3, 4), torch.float32)
    if group.rank() == 0:
        dist.barrier(group)
    gathered = gather.start(rows.chunk(WORLD)[group.rank()]).wait()
    if group.rank() != 0:
        dist.barrier(group)
    gather_module._wait_for_step = wait
    return torch.equal(gathered, rows)


def loss_of(gathered: torch.Tensor, rank: int) -> torch.Tensor:
    """A loss that is another function of the gathered rows on every rank."""
    weights = torch.rand(gathered.shape, dtype=gathered.dtype, generator=torch.Generator().manual_seed(rank))
    return (gathered.sin() * weights).sum()


def run_gather_rows(group: dist.ProcessGroup, gather: Callable) -> dict:
    everyone = torch.randn(group.size() * 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = everyone.clone().requires_grad_()
    torch.stack([loss_of(expected, rank) for rank in range(group.size())]).sum().backward()
    rows = everyone.chunk(group.size())[group.rank()].clone().requires_grad_()
    gathered = gather(rows, group)
    loss_of(gathered, group.rank()).backward()
    return {
        "rows": torch.equal(gathered, everyone),
        "gradient": (rows.grad - expected.grad.chunk(group.size())[group.rank()]).abs().max().item(),
    }


def one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    world = dist.group.WORLD
    groups = {ranks: dist.new_group(list(ranks)) for ranks in [(0, 1), (1, 3)]}
    groups[0, 1, 2, 3] = world
    told: dict = {}

    told["collective"] = run_steps(world, (3, 6), torch.float16)
    # Rows that are not contiguous: every other row of a larger tensor.
    rows = make_rows(0, WORLD, (3, 6), torch.float16)
    spread = rows.chunk(WORLD)[rank].repeat_interleave(2, 0)[::2]
    told["spread"] = torch.equal(TextGather(world, (3, 6), torch.float16).start(spread).wait(), rows)
    try:
        TextGather(world, (3 + rank, 6), torch.float16).start(torch.ones(3 + rank, 6).half())
        told["error"] = "no error"
    except ValueError as problem:
        told["error"] = str(problem)

    told["transports"] = {}
    for name, (nodes, can_read, shape, dtype, _) in TRANSPORTS.items():
        use_shared_slabs(folder / f"transport {name}", nodes, [0, 1, 2, 3], can_read[rank])
        gather = TextGather(world, shape, dtype)
        before = gather.transport
        gather.start(torch.ones(shape, dtype=dtype))
        told["transports"][name] = [before, gather.transport]

    told["layouts"] = {}
    for name, (ranks, nodes, shape, dtype) in LAYOUTS.items():
        if rank in ranks:
            use_shared_slabs(folder / name, nodes, ranks)
            told["layouts"][name] = run_steps(groups[tuple(ranks)], shape, dtype)

    use_shared_slabs(folder / "torn", "aaaa", [0, 1, 2, 3])
    told["right without waiting"] = run_without_waiting(world)

    told["gather_rows"] = {"4": run_gather_rows(world, gather_rows)}
    if rank < 2:
        told["gather_rows"]["2"] = run_gather_rows(groups[0, 1], gather_rows)
        told["compiled"] = run_gather_rows(
            groups[0, 1], torch.compile(gather_rows, fullgraph=True, backend="aot_eager")
        )
        half = gather_rows(torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True), groups[0, 1])
        told["gather_rows"]["dtype"] = str(half.dtype)

    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()  # a rank that is gone may take the connections of others with it
    dist.destroy_process_group()


def run_steps_on_gpu(gathers: dict[int, TextGather], shape: tuple[int, int], dtype: torch.dtype) -> list[int]:
    """Gather in this process for one or both of two ranks, each with a stream; return the steps that went wrong."""
    streams = {rank: torch.cuda.Stream() for rank in gathers}
    torch.cuda._sleep(1)  # CUDA loads a kernel at its first launch, which may wait for one of the other rank that spins
    wrong = []
    for step in range(STEPS):
        late = step % 2
        everyone = make_rows(step, 2, shape, dtype).cuda()
        torch.cuda.synchronize()
        handles = {}
        for rank in sorted(gathers, key=lambda rank: rank == late):
            with torch.cuda.stream(streams[rank]):
                if rank == late:
                    torch.cuda._sleep(20_000_000)
                handles[rank] = gathers[rank].start(everyone.chunk(2)[rank])
        for rank, handle in handles.items():
            with torch.cuda.stream(streams[rank]):
                rows = handle.wait()
                if not torch.equal(rows, everyone):
                    wrong.append(step)
                rows.fill_(-7)
    return wrong


GPU_SHAPES = [((4096, 512), torch.float16), ((300, 64), torch.float32), ((131, 1), torch.int64)]


def one_gpu_rank(rank: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=2, device_id=device)
    told = []
    for shape, dtype in GPU_SHAPES:
        gather = TextGather(dist.group.WORLD, shape, dtype)
        told.append([run_steps_on_gpu({rank: gather}, shape, dtype), gather.transport])
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


LOSS_ROWS, LOSS_WIDTH = 130, 72  # two blocks of a rank, the second of two rows
LOSS_MODES = ("recompute", "store")


def one_rank_of_a_loss(rank: int, folder: Path, device: torch.device) -> None:
    """Gather new texts for every loss, as a step does, each rank late in turn; report errors by mode."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    if device.type == "cpu":
        use_shared_slabs(folder / "slabs", "aa", [0, 1])
    gather = TextGather(group, (LOSS_ROWS, LOSS_WIDTH), torch.float16)
    own = slice(rank * LOSS_ROWS, (rank + 1) * LOSS_ROWS)
    told = {}
    for step, mode in enumerate(LOSS_MODES):
        generator = torch.Generator().manual_seed(step)
        draw = partial(torch.randn, 2 * LOSS_ROWS, LOSS_WIDTH, dtype=torch.float64, generator=generator)
        # What float16 holds exactly, so that what is left is the arithmetic of the loss.
        text = F.normalize(draw()).half()
        images = F.normalize(F.normalize(draw()) + 0.1 * text).half()
        everyone = images.double().requires_grad_()
        truth = contrastive_loss(everyone, text.double(), 30.0, mode="reference")
        truth.backward()
        if device.type == "cuda" and step % 2 == rank:
            torch.cuda._sleep(20_000_000)
        image = images[own].to(device, torch.float32).requires_grad_()
        handle = gather.start(text[own].to(device))
        loss = contrastive_loss(image, handle.wait(), 30.0, first_row=own.start, group=group, mode=mode)
        loss.backward()
        expected = everyone.grad[own]
        told[mode] = {
            "gathered": torch.equal(handle.wait().cpu(), text),
            "loss": abs(loss.item() / truth.item() - 1),
            "image": ((image.grad.double().cpu() - expected).norm() / expected.norm()).item(),
        }
    (folder / f"{rank}.json").write_text(json.dumps({"transport": gather.transport, "modes": told}))
    dist.barrier()  # neither takes its memory and its sockets away while the other is at work
    dist.destroy_process_group()


SCRIPTS = {
    "cpu": one_rank,
    "a gpu each": one_gpu_rank,
    "a loss on a cpu": partial(one_rank_of_a_loss, device=torch.device("cpu")),
    "a loss on one gpu": partial(one_rank_of_a_loss, device=torch.device("cuda", 0)),
}


def run_ranks(world: int, name: str, folder: Path) -> list:
    """Run this file as every rank and return what they wrote."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if "cpu" in name else "0", "OMP_NUM_THREADS": "1"}
    if "one gpu" in name:
        environment["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            command = [sys.executable, __file__, str(rank), str(folder), name]
            processes.append(subprocess.Popen(command, stdout=stream, stderr=stream, env=environment))
    deadline = time.monotonic() + 300
    try:
        # One rank that fails leaves the others waiting for it.
        while time.monotonic() < deadline and not any(process.poll() for process in processes):
            if all(process.poll() == 0 for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), "\n".join(log.read_text() for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(WORLD, "cpu", tmp_path_factory.mktemp("gather"))


def test_every_rank_gets_every_row_in_rank_order(ranks):
    for told in ranks:
        assert told["collective"] == {"wrong": [], "buffers": 1, "transport": "collective"}
        assert told["spread"]


def test_shapes_that_differ_between_ranks_are_an_error_on_all(ranks):
    for told in ranks:
        assert "every rank must gather rows of one shape" in told["error"]
        assert "[[3, 6], [4, 6], [5, 6], [6, 6]]" in told["error"]


@pytest.mark.parametrize("name", TRANSPORTS)
def test_all_ranks_choose_one_transport(ranks, name):
    for told in ranks:
        assert told["transports"][name] == [None, TRANSPORTS[name][-1]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_symmetric_memory_brings_every_row_whoever_is_late(ranks, name):
    for rank in LAYOUTS[name][0]:
        assert ranks[rank]["layouts"][name] == {"wrong": [], "buffers": 1, "transport": "symmetric"}


def test_without_waiting_for_flags_the_rows_would_be_wrong(ranks):
    assert [told["right without waiting"] for told in ranks] == [True, False, False, False]


def test_gathered_rows_take_the_gradients_of_all_ranks(ranks):
    for rank, told in enumerate(ranks):
        for size in ("4", "2") if rank < 2 else ("4",):
            assert told["gather_rows"][size]["rows"]
            assert told["gather_rows"][size]["gradient"] < 1e-14
    assert ranks[0]["gather_rows"]["dtype"] == "torch.bfloat16"


def test_gather_rows_compiles_into_one_graph(ranks):
    for told in ranks[:2]:
        assert told["compiled"]["rows"]
        assert told["compiled"]["gradient"] < 1e-14


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_read_each_other(tmp_path):
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs two GPUs with peer access")
    assert run_ranks(2, "a gpu each", tmp_path) == [[[[], "symmetric"]] * len(GPU_SHAPES)] * 2


@pytest.mark.parametrize(
    "name",
    [
        "a loss on a cpu",
        pytest.param(
            "a loss on one gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not runs_tiles(torch.empty(0, device="cuda" if torch.cuda.is_available() else "meta")),
                    reason="needs a GPU of compute capability 9.0 or later",
                ),
            ],
        ),
    ],
)
def test_two_processes_gather_rows_and_find_the_loss_of_all(tmp_path, name):
    for told in run_ranks(2, name, tmp_path):
        assert told["transport"] == "symmetric"
        assert told["modes"].keys() == set(LOSS_MODES)
        for errors in told["modes"].values():
            assert errors["gathered"]
            assert errors["loss"] <= 30 * LOSS_WIDTH**0.5 * 2**-23 and errors["image"] <= 2**-9


def test_a_gpu_reads_itself_only_if_torch_is_told_to_allow_that(monkeypatch):
    keys, access = [11, 22, 33], {(0, 1): True, (0, 2): False}
    monkeypatch.setattr(gather_module, "_device_key", lambda device: keys[device.index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(keys))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: access[device.index, peer])
    here = torch.device("cuda", 0)

    def can_read(*peers):
        return gather_module._can_read(here, list(peers))

    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", raising=False)
    assert can_read(22) and not can_read(22, 33) and not can_read(44)
    assert not can_read(11)
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    assert can_read(11) and can_read(11, 22) and not can_read(11, 33)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("shape", "dtype"), GPU_SHAPES, ids=str)
def test_two_ranks_on_one_gpu_run_side_by_side(monkeypatch, shape, dtype):
    slabs = []

    def open_peers(nbytes, peers, device):
        if not slabs:
            slabs.extend(torch.full((nbytes,), POISON, dtype=torch.uint8, device=device) for _ in range(2))
        return slabs[rank], torch.tensor([slab.data_ptr() for slab in slabs], device=device)

    monkeypatch.setattr(gather_module, "_open_peers", open_peers)
    monkeypatch.setattr(gather_module, "_ranks_of", lambda part, group: [0, 1])
    monkeypatch.setattr(gather_module, "_exchange", lambda group, numbers, device: [[0], [1]])
    rows = torch.zeros(shape, dtype=dtype, device="cuda")
    gathers = {}
    for rank in range(2):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
        gathers[rank] = gather_module._SymmetricGather(group, [[0, 1]], rows)
    assert run_steps_on_gpu(gathers, shape, dtype) == []


def test_one_process_gets_its_own_tensor_back():
    rows = torch.randn(4, 8)
    gather = TextGather(None, (4, 8), torch.float32)
    assert gather.transport == "none"
    handle = gather.start(rows)
    assert handle.wait() is rows
    assert handle.wait() is rows
    assert gather_rows(rows, None) is rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(5, 8), r"takes torch.float32 rows of shape \[4, 8\], not torch.float32 \[5, 8\]"),
        (torch.ones(4, 8).half(), "not torch.float16"),
        (torch.ones(4, 8, requires_grad=True), "require a gradient"),
    ],
    ids=["shape", "dtype", "gradient"],
)
def test_rows_that_do_not_fit_are_an_error(rows, message):
    with pytest.raises(ValueError, match=message):
        TextGather(None, (4, 8), torch.float32).start(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    SCRIPTS[sys.argv[3]](int(sys.argv[1]), Path(sys.argv[2]))
