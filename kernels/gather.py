"""All-gather of the text embeddings [b, d] of P ranks into [P·b, d], started early and waited for late.

`TextGather` is for a frozen text tower: nothing travels back, and the embeddings are known when the batch arrives,
before the image tower runs. `gather_rows` is for a trained one: its backward is the SUM reduce-scatter.

Received: (P - 1)·b·d elements a rank (94 MB in float16 at 65,536 × 768 on 16 ranks: 0.21 ms at 450 GB/s of NVLink),
behind the image tower.

`TextGather` among GPUs that can read each other's memory goes through it. Every rank has a slab that its peers see:

    half 0 [nodes·b, d] | half 1 [nodes·b, d] | ready flags int32 [L peers, blocks]       (block: 128 rows of one rank)

Step n uses half n % 2. Across nodes the ranks of the same place on each node first all-gather their rows into their
halves; on one node the kernel copies them there. Then for every block the kernel
- publishes: once the block lies in the slab, writes n into its flag in the slab of every peer (release, system scope);
- pulls: waits for n in its own slab's flag of each peer's block (acquire, system scope) and copies the block from the
  peer to its place in the gathered buffer.
Flags are pushed and rows are pulled: a program that waits reads local memory, and no atomic crosses to a peer more than
once a block. Peers are visited from the own rank on, so that not all ranks read one peer at once.

Two halves need no barrier. A rank publishes step n + 1 only after its own pull of step n has ended (stream order), and
its pull of n + 1 ends only after all its peers have published n + 1. So when it writes half n % 2 again, at step n + 2,
every peer has ended its pull of step n. The gathered buffer is single: its readers of step n are queued on the stream
that `start` of step n + 1 waits for.

A program waits only for blocks that the same program of a peer publishes, and it publishes before it waits. So the
ranks get on even if only one program at a time finds room on each GPU, or if the interpreter runs them in turn.
"""

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, Data, Inputs, Pass
from .device import AMPERE, capability_of

Transport = Literal["none", "collective", "symmetric"]

_PULL_PROGRAMS = 16  # few, so that the image tower keeps its multiprocessors; they still fill NVLink
_PULL_WARPS = 8
_ROWS_PER_BLOCK = 128
_WORDS_PER_COPY = 8192  # eight loads of 16 bytes in flight for each of 256 threads


@triton.jit
def _wait_for_step(flag, step):
    """Spin until a flag is at `step`; the whole program then sees what was written before the flag was."""
    while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < step:
        pass
    tl.debug_barrier()


@triton.jit
def _copy_words(source, target, words, WORDS_PER_COPY: tl.constexpr):
    for start in range(0, words, WORDS_PER_COPY):
        word = start + tl.arange(0, WORDS_PER_COPY)
        tl.store(target + word, tl.load(source + word, mask=word < words), mask=word < words)


@triton.jit(do_not_specialize=["step", "here"])
def _publish_and_pull(
    rows,  # [ROWS, ROW_WORDS] int32, this rank's; read unless IN_SLAB
    slabs,  # [PEERS] int64, addresses of the slabs of this node's ranks
    owners,  # [PEERS, NODES] int32, the rank in the group whose rows lie n-th in a slab
    gathered,  # [P * ROWS, ROW_WORDS] int32
    step,
    here,  # this rank's place among the peers
    PEERS: tl.constexpr,
    PEERS_CEILED: tl.constexpr,  # to a power of two
    NODES: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    HALF_WORDS: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    WORDS_PER_COPY: tl.constexpr,
    IN_SLAB: tl.constexpr,
):
    blocks_per_rank: tl.constexpr = (ROWS + ROWS_PER_BLOCK - 1) // ROWS_PER_BLOCK
    blocks: tl.constexpr = NODES * blocks_per_rank
    half = (step % 2).to(tl.int64) * HALF_WORDS
    program = tl.program_id(0).to(tl.int64)

    own_slab = tl.multiple_of(tl.load(slabs + here).to(tl.pointer_type(tl.int32)), 16)
    peers = tl.arange(0, PEERS_CEILED)
    peer_slabs = tl.load(slabs + peers, mask=peers < PEERS, other=0).to(tl.pointer_type(tl.int32))
    for block in range(program, blocks, tl.num_programs(0)):
        if not IN_SLAB:
            first = block * ROWS_PER_BLOCK
            words = tl.minimum(ROWS - first, ROWS_PER_BLOCK) * ROW_WORDS
            first_word = first * ROW_WORDS
            _copy_words(rows + first_word, own_slab + half + first_word, words, WORDS_PER_COPY)
            tl.debug_barrier()
        ready = peer_slabs + 2 * HALF_WORDS + here * blocks + block
        tl.atomic_xchg(ready, step, mask=peers < PEERS, sem="release", scope="sys")

    for turn in range(0, PEERS):
        peer = (here + turn) % PEERS
        slab = tl.multiple_of(tl.load(slabs + peer).to(tl.pointer_type(tl.int32)), 16)
        for block in range(program, blocks, tl.num_programs(0)):
            node = block // blocks_per_rank
            first = block % blocks_per_rank * ROWS_PER_BLOCK
            words = tl.minimum(ROWS - first, ROWS_PER_BLOCK) * ROW_WORDS
            owner = tl.load(owners + peer * NODES + node).to(tl.int64)

            _wait_for_step(own_slab + 2 * HALF_WORDS + peer * blocks + block, step)
            source = slab + half + (node * ROWS + first) * ROW_WORDS
            target = gathered + (owner * ROWS + first) * ROW_WORDS
            _copy_words(source, target, words, WORDS_PER_COPY)


def _half_words(nodes: int, rows: Tensor) -> int:
    """Return the words of half a slab, a multiple of 16 bytes."""
    return triton.cdiv(nodes * rows.nbytes // 4, 4) * 4


def _pull(rows: Tensor, slabs: Tensor, owners: Tensor, gathered: Tensor, step: int, here: int) -> None:
    """Publish a rank's embeddings and pull those of all ranks; arguments as the kernel's, in any type.

    On several nodes the rank's half of its slab has been filled.
    """
    peers, nodes = owners.shape
    b, d = rows.shape
    blocks = nodes * triton.cdiv(b, _ROWS_PER_BLOCK)
    _publish_and_pull[(min(_PULL_PROGRAMS, blocks),)](
        rows.view(torch.int32),
        slabs,
        owners,
        gathered.view(torch.int32),
        step,
        here,
        PEERS=peers,
        PEERS_CEILED=triton.next_power_of_2(peers),
        NODES=nodes,
        ROWS=b,
        ROW_WORDS=d * rows.itemsize // 4,
        HALF_WORDS=_half_words(nodes, rows),
        ROWS_PER_BLOCK=_ROWS_PER_BLOCK,
        WORDS_PER_COPY=_WORDS_PER_COPY,
        IN_SLAB=nodes > 1,
        num_warps=_PULL_WARPS,
        num_stages=1,
    )


@dataclass(frozen=True)
class GatherHandle:
    """A gather under way."""

    rows: Tensor  # the inputs, held until the gather has read them
    gathered: Tensor
    work: dist.Work | torch.cuda.Event | None  # None where nothing is left to wait for

    def wait(self) -> Tensor:
        """Return the gathered embeddings [P·b, d] in rank order; later work on the current stream sees them complete.

        On CUDA the current stream waits, not the host. The tensor is the gather's own buffer: it holds until the next
        `start`. Calling again returns the same tensor.
        """
        if self.work is not None:
            self.work.wait()
        return self.gathered


class _CollectiveGather:
    """One all_gather_into_tensor a step."""

    def __init__(self, group: dist.ProcessGroup, rows: Tensor) -> None:
        self._group = group
        self._gathered = rows.new_empty(group.size() * rows.shape[0], rows.shape[1])

    def start(self, rows: Tensor) -> GatherHandle:
        work = dist.all_gather_into_tensor(self._gathered, rows, group=self._group, async_op=True)
        return GatherHandle(rows, self._gathered, work)


class _SymmetricGather:
    """Slab, flags and stream of one rank; the protocol is at the top of this file.

    Args:
        group: all ranks.
        nodes: ranks of the group by node, as many on each.
        rows: [b, d] as every step will bring.
    """

    def __init__(self, group: dist.ProcessGroup, nodes: list[list[int]], rows: Tensor) -> None:
        b, d = rows.shape
        device = rows.device
        node = next(ranks for ranks in nodes if group.rank() in ranks)
        peers = _part_of(group, nodes)
        places = [list(ranks) for ranks in zip(*nodes, strict=True)]
        self._across = _part_of(group, places) if len(nodes) > 1 else None  # ranks of this place on every node

        half_words = _half_words(len(nodes), rows)
        flag_words = len(node) * len(nodes) * triton.cdiv(b, _ROWS_PER_BLOCK)
        slab, self._slabs = _open_peers(4 * (2 * half_words + flag_words), peers, device)
        words = slab.view(torch.int32)
        words[2 * half_words :].zero_()
        self._halves = [
            words[half * half_words :][: len(nodes) * rows.nbytes // 4].view(rows.dtype).view(-1, d)
            for half in range(2)
        ]
        # Whose rows lie n-th in whose slab. No peer is past this exchange before all flags are zero.
        owners_here = [group.rank()] if self._across is None else _ranks_of(self._across, group)
        owners = _exchange(group, owners_here, device)
        members = _ranks_of(peers, group)
        self._owners = torch.tensor([owners[rank] for rank in members], dtype=torch.int32, device=device)

        self._gathered = rows.new_empty(group.size() * b, d)
        self._step = 0
        self._stream = torch.cuda.Stream(device, priority=-1) if rows.is_cuda else None
        self._here = members.index(group.rank())

    def start(self, rows: Tensor) -> GatherHandle:
        if rows.data_ptr() % 16 != 0:
            rows = rows.clone()
        self._step += 1
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(rows.device))
            rows.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            if self._across is not None:
                # async_op: on the communicator's own stream, which keeps the gathers that share it in order.
                half = self._halves[self._step % 2]
                work = dist.all_gather_into_tensor(half, rows, group=self._across, async_op=True)
                assert work is not None
                work.wait()
            _pull(rows, self._slabs, self._owners, self._gathered, self._step, self._here)
        # In the interpreter the launch is the work.
        return GatherHandle(rows, self._gathered, None if self._stream is None else self._stream.record_event())


class TextGather:
    """Gathers the text embeddings of every rank of a group, of one shape, step after step into one buffer.

    Make one before the loop and start it in every step: its first `start` asks all ranks what they can do, which waits
    for them, and takes the memory that all later steps use.

        gather = TextGather(group, (b, d), torch.float16)
        for images, text in batches:
            gathering = gather.start(text)  # before the image tower, so that they run at the same time
            image = tower(images)
            loss = contrastive_loss(image, gathering.wait(), scale, first_row=rank * b, group=group)

    Args:
        group: the process group, or None for a single process.
        shape: (b, d) of this rank's embeddings; all ranks must have the same.
        dtype: of the embeddings.

    With one rank or no group nothing is copied: `wait` returns the very tensor given to `start`.

    The gather is asynchronous; on CUDA it runs on a stream of its own, behind what is queued on the current stream
    when `start` is called, so call it before the image tower. That order also keeps the buffer safe: a reader of the
    last step's embeddings that is queued on that stream has finished before they are overwritten. An autograd graph
    that saved them (the loss in its `reference` mode) must have run its backward before the next `start`.
    """

    def __init__(self, group: dist.ProcessGroup | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.group = group if group is not None and group.size() > 1 else None
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._gather: _CollectiveGather | _SymmetricGather | None = None  # made by the first start
        self._device: torch.device | None = None

    @property
    def transport(self) -> Transport | None:
        """How the embeddings travel, the same on all ranks; None until the first `start` has asked all of them.

        `none`: there is one rank. `symmetric`: a Triton kernel reads the peers' memory. That takes rows on
        Ampere or later, hosts with as many ranks each and more than one, on each host GPUs that have direct access to
        one another and are visible to one another's processes, rows of a multiple of 4 bytes and, on several hosts, a
        group of all processes. Ranks that share a GPU (to try things out: NCCL refuses that, gloo does not) have it if
        TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 is set. `collective`: all_gather_into_tensor of the group's backend,
        in every other case.
        """
        if self.group is None:
            return "none"
        if self._gather is None:
            return None
        return "symmetric" if isinstance(self._gather, _SymmetricGather) else "collective"

    def start(self, rows: Tensor) -> GatherHandle:
        """Start gathering embeddings [b, d]; every rank must call.

        Raises:
            ValueError: another shape, dtype or device than before, embeddings that require a gradient, or (at the
                first call, on all ranks) ranks whose shapes differ.
        """
        if rows.shape != self.shape or rows.dtype != self.dtype:
            raise ValueError(
                f"this gather takes {self.dtype} rows of shape {list(self.shape)}, "
                f"not {rows.dtype} {list(rows.shape)}; make a new TextGather for another shape"
            )
        if rows.requires_grad:
            raise ValueError("the rows require a gradient, but text rows are constants; pass rows.detach()")
        if self.group is None:
            return GatherHandle(rows, rows, None)
        if self._gather is None:
            self._gather = _open_gather(self.group, rows)
            self._device = rows.device
        if self._device != rows.device:
            raise ValueError(f"the rows are on {rows.device} but earlier ones were on {self._device}; keep to one")
        return self._gather.start(rows.contiguous())


def _open_gather(group: dist.ProcessGroup, rows: Tensor) -> _CollectiveGather | _SymmetricGather:
    """Choose a transport by facts of all ranks, so that all choose the same."""
    facts = _exchange(group, [*rows.shape, _host_key(), _device_key(rows.device)], rows.device)
    shapes = [fact[:2] for fact in facts]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"every rank must gather rows of one shape, but the ranks have {shapes}; pad or drop rows")
    hosts = [host for _, _, host, _ in facts]
    nodes = [[rank for rank, host in enumerate(hosts) if host == this] for this in dict.fromkeys(hosts)]
    peers = [rank for rank in range(group.size()) if hosts[rank] == hosts[group.rank()] and rank != group.rank()]
    can_pull = (
        rows.shape[1] * rows.dtype.itemsize % 4 == 0
        and (len(nodes) == 1 or group.size() == dist.get_world_size())
        and len(nodes[0]) > 1
        and all(len(node) == len(nodes[0]) for node in nodes)
        and _can_read(rows.device, [facts[peer][3] for peer in peers])
    )
    if all(can for (can,) in _exchange(group, [int(can_pull)], rows.device)):
        return _SymmetricGather(group, nodes, rows)
    return _CollectiveGather(group, rows)


def _exchange(group: dist.ProcessGroup, numbers: list[int], device: torch.device) -> list[list[int]]:
    """Return the numbers of every rank in rank order."""
    mine = torch.tensor(numbers, device=device)
    everyone = mine.new_empty(group.size() * len(numbers))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return everyone.view(group.size(), -1).tolist()


def _host_key() -> int:
    """Return a number that processes share if and only if they run on one machine and may meet there."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # host names repeat between containers of different machines
    return _key_of(socket.gethostname() + (boot.read_text() if boot.exists() else ""))


def _device_key(device: torch.device) -> int:
    """Return a number that names a GPU in every process that sees it."""
    return _key_of(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else 0


def _key_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _can_read(device: torch.device, peers: list[int]) -> bool:
    """Whether a kernel on this device can read the memory of all peers, which are given by `_device_key`."""
    if capability_of(device) < AMPERE:
        return False
    visible = {_device_key(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    own = _device_key(device)

    def can_read(peer: int) -> bool:
        if peer == own:  # CUDA has no peer access of a GPU to itself, and torch maps no memory unless it is told to
            return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
        return peer in visible and torch.cuda.can_device_access_peer(device, visible[peer])

    return all(can_read(peer) for peer in peers)


def _open_peers(nbytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate a slab on every rank of a group that its kernels can all reach.

    Returns:
        This rank's slab, uint8 [nbytes], aligned to 16 bytes, which keeps the mapping of the others' alive; and the
        addresses of all ranks' slabs in this process, int64 [size of the group].
    """
    slab = symm_mem.empty(nbytes, dtype=torch.uint8, device=device)
    mapping = symm_mem.rendezvous(slab, group)
    addresses = [base + mapping.offset for base in mapping.buffer_ptrs]
    return slab, torch.tensor(addresses, dtype=torch.int64, device=device)


# A communicator costs memory on the GPU, so the gathers of a group share theirs.
_PARTS: WeakKeyDictionary[dist.ProcessGroup, dict[str, dist.ProcessGroup]] = WeakKeyDictionary()


def _part_of(group: dist.ProcessGroup, parts: list[list[int]]) -> dist.ProcessGroup:
    """Return the group of this rank's part. All processes call: NCCL splits off, and torch names, groups in step."""
    if len(parts) == 1:
        return group
    known = _PARTS.setdefault(group, {})
    if str(parts) not in known:
        members = dist.get_process_group_ranks(group)
        groups = [dist.new_group([members[rank] for rank in part]) for part in parts]
        own = next(own for part, own in zip(parts, groups, strict=True) if group.rank() in part)
        assert isinstance(own, dist.ProcessGroup)
        known[str(parts)] = own
    return known[str(parts)]


def _ranks_of(subgroup: dist.ProcessGroup, group: dist.ProcessGroup) -> list[int]:
    """Return the ranks that the members of a subgroup, in its order, have in the group."""
    return [dist.get_group_rank(group, rank) for rank in dist.get_process_group_ranks(subgroup)]


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather embeddings [b, d] of every rank into [P·b, d] in rank order, differentiable.

    The gradient of `rows` is the SUM of all ranks' gradients for them, by one reduce-scatter in their dtype. It is
    complete, not this rank's share: it has crossed the ranks once and goes on into the text tower. The ranks combine
    the gradients of that tower's weights as they do those of the image tower (`gradient_reduction` of the losses).
    Every rank must call with the same b, and run the backward if one does. Without a group the embeddings themselves
    are returned.
    """
    return rows if group is None else _all_gather_rows(rows, group.group_name)


@torch.library.custom_op("textlock::all_gather_rows", mutates_args=())
def _all_gather_rows(rows: Tensor, group_name: str) -> Tensor:
    group = group_of(group_name)
    gathered = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


@_all_gather_rows.register_fake
def _(rows: Tensor, group_name: str) -> Tensor:
    return rows.new_empty(group_of(group_name).size() * rows.shape[0], *rows.shape[1:])


@torch.library.custom_op("textlock::sum_scatter_rows", mutates_args=())
def _sum_scatter_rows(gathered: Tensor, group_name: str) -> Tensor:
    group = group_of(group_name)
    rows = gathered.new_empty(gathered.shape[0] // group.size(), *gathered.shape[1:])
    dist.reduce_scatter_tensor(rows, gathered.contiguous(), group=group)
    return rows


@_sum_scatter_rows.register_fake
def _(gathered: Tensor, group_name: str) -> Tensor:
    return gathered.new_empty(gathered.shape[0] // group_of(group_name).size(), *gathered.shape[1:])


def _save_group(ctx, inputs, output) -> None:
    _, ctx.group_name = inputs


def _scatter_gradient(ctx, gathered_grad: Tensor) -> tuple[Tensor, None]:
    return _sum_scatter_rows(gathered_grad, ctx.group_name), None


_all_gather_rows.register_autograd(_scatter_gradient, setup_context=_save_group)


def group_of(group_name: str) -> dist.ProcessGroup:
    """Return the group that an operator was given by name."""
    return dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]


class Pulled(NamedTuple):
    """What one rank's pull leaves, as the card compares it."""

    gathered: Tensor  # [P·b, d]
    published: Tensor  # [peers, blocks] int32: this rank's flags in the slabs of all peers


def _pull_reference(rows: Tensor, peers: int, here: int) -> Pulled:
    blocks = len(rows) // peers * triton.cdiv(rows.shape[1], _ROWS_PER_BLOCK)
    return Pulled(rows.flatten(0, 1), torch.ones(peers, blocks, dtype=torch.int32, device=rows.device))


def _launch_pull(rows: Tensor, peers: int, here: int) -> Pulled:
    """Pull as one rank, in step 1, where all others have published: the slabs are parts of one tensor.

    Args:
        rows: [P, b, d], embeddings of all ranks; those of a node follow one another.
        peers: ranks of a node.
        here: place of the rank on its node, which is the first.
    """
    P, b, d = rows.shape
    nodes, step = P // peers, 1
    own = rows[here]
    half, blocks = _half_words(nodes, own), nodes * triton.cdiv(b, _ROWS_PER_BLOCK)
    slabs = torch.empty(peers, 2 * half + triton.cdiv(peers * blocks, 4) * 4, dtype=torch.int32, device=rows.device)
    flags = slabs[:, 2 * half :][:, : peers * blocks].view(peers, peers, blocks)
    flags.zero_()
    flags[here] = step
    flags[here, here] = 0
    words = rows.view(torch.int32).unflatten(0, (nodes, peers)).transpose(0, 1).flatten(1)
    others = [peer for peer in range(peers) if nodes > 1 or peer != here]  # on one node the kernel fills its own
    slabs[others, step % 2 * half : step % 2 * half + words.shape[1]] = words[others]
    addresses = slabs.data_ptr() + 4 * slabs.shape[1] * torch.arange(peers, device=rows.device)
    owners = torch.arange(P, dtype=torch.int32, device=rows.device).view(nodes, peers).T.contiguous()
    gathered = rows.new_empty(P * b, d)
    _pull(own, addresses, owners, gathered, step, here)
    return Pulled(gathered, flags[:, here].clone())


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    nodes: int = 1
    peers: int = 8
    here: int = 0
    rows: int = 4096  # of one rank
    width: int = 768


def _inputs(sizes: _Sizes, data: Data) -> Inputs:
    rows = data.normal(sizes.nodes * sizes.peers, sizes.rows, sizes.width, dtype=torch.float16)
    return {"rows": rows, "peers": sizes.peers, "here": sizes.here}


CARDS = (
    Card(
        (
            Pass[_Sizes](
                "gather",
                _publish_and_pull,
                _launch_pull,
                _pull_reference,
                _inputs,
                traffic=lambda s: 2 * 2 * s.nodes * s.peers * s.rows * s.width,
            ),
        ),
        _Sizes,
        odd={
            "three peers, 5x6": _Sizes(peers=3, here=1, rows=5, width=6),
            "two nodes, 131x10": _Sizes(nodes=2, peers=2, here=1, rows=131, width=10),
        },
        compiled={"": _Sizes(), "across nodes": _Sizes(nodes=2)},
        empty=False,
    ),
)
