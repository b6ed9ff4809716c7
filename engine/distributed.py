"""Which process this is, on which device, and with whom it works."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """One process among all of the run. ``group`` is None in a run of one process without a launcher."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def close(self) -> None:
        """Leave the process group."""
        if self.group is not None:
            dist.destroy_process_group()


def join_world(device: str) -> World:
    """Read torchrun's environment, choose the device and join the process group (NCCL on GPUs, gloo on CPUs).

    Without a launcher it is a world of one. Raises ValueError when ``device`` is "cuda" and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and torch sees no GPU; use --device cpu, or fix the driver")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    here = torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        return World(0, 1, here, None)

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=_store_of_this_attempt(),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=here if use_cuda else None,
    )
    return World(rank, world_size, here, dist.group.WORLD)


def why_lost(error: RuntimeError) -> str | None:
    """Return one sentence where a rank gave up because another is gone or silent, None where it is any other error.

    gloo has no exception class for these: its messages begin with the file of its source.
    """
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return None
    reason = str(error).partition("\n")[0].partition(". ")[0]
    return (
        f"rank {os.environ.get('RANK', '0')} lost another rank; the cause is that rank's own message, or its exit code "
        f"among the launcher's lines (-9: killed, often for memory): {reason}. The same command goes on from the last "
        f"checkpoint."
    )


def _store_of_this_attempt() -> Store:
    """Connect to the launcher's store under a prefix of this attempt.

    torchrun keeps one store over restarts; without the prefix, restarted workers read the addresses of the dead ones.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_hosts_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = not launcher_hosts_it and os.environ["RANK"] == "0"
    store = TCPStore(address, port, is_master=is_master, timeout=_TIMEOUT, multi_tenant=True)
    return PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
