"""TextGather: two processes over gloo, one process without a copy.

Run as a script this file is one rank: `python test_gather.py RANK WORLD FOLDER`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from textlock.kernels.gather import TextGather

B, D, WORLD = 10, 6, 2


def make_step(step: int) -> torch.Tensor:
    return torch.arange(B * D, dtype=torch.float16).view(B, D) + 100 * step


def one_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    own = slice(rank * B // world, (rank + 1) * B // world)
    gather = TextGather(dist.group.WORLD, (B // world, D), torch.float16)
    handle = gather.start(make_step(0)[own])
    first = handle.wait()
    again = handle.wait()
    copies = {"first": first.clone()}
    # The second step's rows are not contiguous: every other row of a larger tensor.
    spread = make_step(1)[own].repeat_interleave(2, 0)[::2]
    second = gather.start(spread).wait()
    copies["second"] = second.clone()
    try:
        TextGather(dist.group.WORLD, (3 + rank, D), torch.float16).start(torch.ones(3 + rank, D).half())
        error = "no error"
    except ValueError as problem:
        error = str(problem)
    one_buffer = first.data_ptr() == second.data_ptr() == again.data_ptr()
    save_file(copies, folder / f"{rank}", {"error": error, "one_buffer": str(one_buffer)})
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(WORLD), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        failures = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(failures)
    return [safe_open(folder / f"{rank}", "pt") for rank in range(WORLD)]


def test_every_rank_gets_every_row_in_rank_order(ranks):
    for tensors in ranks:
        assert torch.equal(tensors.get_tensor("first"), make_step(0))
        assert torch.equal(tensors.get_tensor("second"), make_step(1))


def test_the_buffer_is_reused(ranks):
    assert all(tensors.metadata()["one_buffer"] == "True" for tensors in ranks)


def test_shapes_that_differ_between_ranks_are_an_error_on_all(ranks):
    for tensors in ranks:
        assert "every rank must gather rows of one shape" in tensors.metadata()["error"]
        assert "[[3, 6], [4, 6]]" in tensors.metadata()["error"]


def test_one_process_gets_its_own_tensor_back():
    rows = torch.randn(4, 8)
    handle = TextGather(None, (4, 8), torch.float32).start(rows)
    assert handle.wait() is rows
    assert handle.wait() is rows


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
    one_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
