"""Checkpoints: a folder a step, safetensors and JSON only, complete or absent, and verified before use.

    checkpoints/step_00001000/
      model.safetensors      the image tower, float32 masters
      trainer.safetensors    log logit scale, logit bias and text bank where there are, AdamW moments and step counts
      state.json             progress (step, samples seen, position of the loader), the text tower and its recipe
      config.yaml            the resolved config
      MANIFEST.json          size and SHA-256 of every file above

A folder is written under a temporary name, every file and the folder are synced to disk, and one rename publishes it:
a kill at any instant leaves either no such checkpoint or a whole one. Formats do not notice a flipped bit; the manifest
does.
"""

import errno
import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
from filelock import SoftFileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.atomic import atomic_folder
from ..models.text import TextTowerDescription
from ..models.vision import VisionTower
from ..settings import Settings, at_least
from .objective import Objective
from .provenance import versions
from .sharding import full_tensor, shard_like

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings, section="checkpoint"):
    """Checkpoints: a folder each, written aside and renamed, with a checksum of every file."""

    every: Annotated[int, at_least(0)] = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: Annotated[int, at_least(1)] = 3
    """Checkpoints kept, the newest ones."""


class CorruptCheckpoint(ValueError):
    """A checkpoint with a file that is missing, or whose checksum does not match its manifest; the message names it."""


@dataclass(kw_only=True)
class Progress:
    """How far a run is. Times add up over resumes."""

    step: int = 0  # finished optimiser steps
    samples_seen: int = 0
    skipped_by_kind: dict[str, int] = field(default_factory=dict)  # bad samples that were replaced
    train_seconds: float = 0.0  # in steps, waiting for data included
    wall_seconds: float = 0.0  # in all, evaluations and checkpoints included
    loader: dict[str, Any] | None = None  # state of the loader; None: from the start


@dataclass(frozen=True)
class Checkpoint:
    """What a verified checkpoint holds, on the CPU."""

    folder: Path
    model: dict[str, Tensor]
    trainer: dict[str, Tensor]
    progress: Progress
    embed_dim: int
    text_tower: dict[str, Any]
    """The `TextTowerDescription` of the text tower that the run was trained against."""

    def require_text_tower(self, tower: TextTowerDescription) -> None:
        """Raise ValueError, saying what differs, unless ``tower`` is the one that the run was trained against."""
        if difference := tower.difference_from(self.text_tower):
            raise ValueError(
                f"{self.folder} was trained against another text tower than {tower.name}: {difference}. Give the same "
                "one with --text.name and the other flags of --text, or use another --run-dir."
            )


def save_checkpoint(
    root: Path,
    *,
    tower: VisionTower,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    text_tower: TextTowerDescription,
    run_config: str,
    keep: int,
    writes: bool = True,
) -> Path:
    """Write ``root/step_XXXXXXXX``, with ``run_config`` as its config.yaml, and delete all but the newest ``keep``.

    Of a sharded tower the files hold whole tensors, as of any other: all ranks must call, and one ``writes``.

    Returns the folder. A folder of that step that is already there and whole is left as it is. Folders of later steps
    are deleted: they were found damaged when the run went on from an earlier one, and their steps are being repeated.
    Raises OSError when the disk refuses; what was there before is untouched then.
    """
    final = root / f"step_{progress.step:08d}"
    model = _gather(tower.state_dict(), keep=writes)
    trainer = _gather(_trainer_tensors(tower, objective, optimizer), keep=writes)
    if not writes:
        return final
    if final.exists():
        try:
            verify_checkpoint(final)
            return final
        except CorruptCheckpoint:
            _delete(final)
    for leftover in root.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with atomic_folder(final) as draft:
        _save_tensors(model, draft / "model.safetensors")
        _save_tensors(trainer, draft / "trainer.safetensors")
        state = {
            "progress": asdict(progress),
            "embed_dim": tower.embed_dim,
            "text_tower": asdict(text_tower),
            "logit_scale": objective.logit_scale().item(),
            "versions": versions(),
        }
        (draft / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        (draft / "config.yaml").write_text(run_config)
        manifest = {file.name: _describe(file) for file in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    steps = {_step_of(folder): folder for folder in list_checkpoints(root)}
    for later in [step for step in steps if step > progress.step]:
        _delete(steps.pop(later))
    for old in sorted(steps)[:-keep]:
        _delete(steps[old])
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders under ``root``, oldest first, unverified; a folder of another name is none."""
    return sorted((path for path in root.glob("step_*") if _step_of(path) >= 0 and path.is_dir()), key=_step_of)


def _step_of(folder: Path) -> int:
    match = _STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def verify_checkpoint(folder: Path) -> None:
    """Raise CorruptCheckpoint, naming the file, unless every file is what the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptCheckpoint(f"{folder / MANIFEST} is missing or damaged") from error
    for name, description in expected.items():
        file = folder / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{file} is missing")
        found = _describe(file)
        if (found["bytes"], found["sha256"]) != description:
            raise CorruptCheckpoint(f"{file} is damaged: its checksum is not the one in {MANIFEST}")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify and read one checkpoint folder."""
    verify_checkpoint(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        return Checkpoint(
            folder,
            model=load_file(folder / "model.safetensors"),
            trainer=load_file(folder / "trainer.safetensors"),
            progress=Progress(**state["progress"]),
            embed_dim=state["embed_dim"],
            text_tower=state["text_tower"],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{folder} cannot be read: {error}") from error


def read_latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest good checkpoint under ``root`` and say what was wrong with newer ones.

    Returns (None, []) when there is none. Raises CorruptCheckpoint when there are some and every one is damaged:
    starting over silently would throw the run away.
    """
    complaints: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        try:
            return read_checkpoint(folder), complaints
        except CorruptCheckpoint as error:
            complaints.append(str(error))
    if complaints:
        raise CorruptCheckpoint(
            f"no checkpoint under {root} is whole: {'; '.join(complaints)}. Restore one, or use another --run-dir."
        )
    return None, []


def restore(checkpoint: Checkpoint, tower: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint into live objects, bit for bit.

    Raises ValueError, naming keys, when it belongs to another architecture or objective; nothing is changed then.
    """
    require_same_keys(checkpoint.model, tower.state_dict(), checkpoint.folder / "model.safetensors")
    named = _trained(tower, objective)
    of_objective = objective.state_dict()
    wanted = {f"{moment}.{name}": value for name, value in named.items() for moment in _MOMENTS} | of_objective
    require_same_keys(checkpoint.trainer, wanted, checkpoint.folder / "trainer.safetensors", ignore_shape_of="step.")

    live = tower.state_dict()
    tower.load_state_dict({name: shard_like(value, live[name]) for name, value in checkpoint.model.items()})
    objective.load_state_dict({name: checkpoint.trainer[name] for name in of_objective})
    for name, parameter in named.items():
        moments = {moment: checkpoint.trainer[f"{moment}.{name}"] for moment in _MOMENTS}
        # Step counts included: the fused optimiser keeps them next to the parameters.
        optimizer.state[parameter] = {key: shard_like(value, parameter).clone() for key, value in moments.items()}


class RunLock:
    """Keeps a second process out of a run folder for as long as this one lives.

    Where the file system has no locks (Lustre without ``flock``), a file that names the process and its machine stands
    for the lock. A process killed on this machine is noticed then, one on another is not.

    The folder need not exist yet: :meth:`take` does nothing then and is called again when it has been made.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ".lock"
        self._file: TextIO | None = None
        self._soft = SoftFileLock(run_dir / ".lock.holder", blocking=False)

    def take(self) -> None:
        """Lock the folder; raises ValueError when another process holds it. Locking twice is locking once."""
        if self._file is not None or self._soft.is_locked or not self._path.parent.is_dir():
            return
        taken = f"another process is training in {self._path.parent}: wait for it, or choose another --run-dir"
        file = self._path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(taken) from error
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning("%s is on a file system without locks: a file keeps other processes out", self._path.parent)
            try:
                self._soft.acquire()
            except Timeout:
                raise ValueError(f"{taken}; after a kill on another machine delete {self._soft.lock_file}") from error
            return
        self._file = file


def _trained(tower: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    return {**dict(tower.named_parameters()), **dict(objective.named_parameters())}


def _trainer_tensors(tower: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in _trained(tower, objective).items()
        for moment in _MOMENTS
    }
    return {**objective.state_dict(), **moments}


def require_same_keys(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path, ignore_shape_of: str | None = None
) -> None:
    """Raise ValueError, naming keys, unless a file holds what is wanted of it, in the wanted shapes."""
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & found.keys())
        if found[key].shape != wanted[key].shape and not (ignore_shape_of and key.startswith(ignore_shape_of))
    ]
    complaints = [
        f"{what} {_shortened(keys)}" for what, keys in (("lacks", missing), ("has unexpected", unexpected)) if keys
    ]
    if reshaped:
        complaints.append(_shortened(reshaped))
    if complaints:
        raise ValueError(f"{file} belongs to another architecture than the config: it {'; '.join(complaints)}")


def _shortened(items: list[str], most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the CPU; a rank that does not keep them takes part in gathering one after the other."""
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = full_tensor(tensor.detach())
        if keep:
            gathered[name] = complete.cpu().contiguous()
    return gathered


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _delete(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
