"""Checkpoints: whole or absent, verified before use, bit for bit."""

import contextlib
import errno
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from textlock.engine import checkpoint as module
from textlock.engine.checkpoint import (
    CorruptCheckpoint,
    Progress,
    list_checkpoints,
    read_checkpoint,
    read_latest,
    restore,
)
from textlock.engine.objective import LossConfig
from textlock.engine.optim import FlatGradients, build_optimizer
from textlock.engine.trained import load_tower
from textlock.models.vision import make_vision_tower

from .. import text_tower
from .training import config_of, objective_of, save

CONFIG = config_of("--checkpoint.keep", "2")
FILES = ["model.safetensors", "trainer.safetensors", "state.json", "config.yaml", "MANIFEST.json"]


class Trained:
    """A tower with an optimiser that has taken a step."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.tower = make_vision_tower(CONFIG.model, image_size=32)
        loss = LossConfig(objective="sigmoid", initial_logit_scale=11.0 + seed, initial_logit_bias=-3.0, text_bank=5)
        self.objective = objective_of(loss)
        for buffer in self.objective.buffers():
            buffer.random_(100)
        self.optimizer = build_optimizer(self.tower, self.objective, CONFIG.optim)
        gradients = FlatGradients([*self.tower.parameters(), *self.objective.parameters()])
        gradients._buffer.normal_()
        self.optimizer.step()

    def save(self, root: Path, step: int) -> Path:
        progress = Progress(step=step, samples_seen=8 * step, loader={"position": 8 * step})
        return save(root, self, CONFIG, progress)

    def tensors(self) -> list[torch.Tensor]:
        parameters = [*self.tower.parameters(), *self.objective.parameters()]
        moments = [self.optimizer.state[parameter][name] for parameter in parameters for name in module._MOMENTS]
        return [*self.tower.state_dict().values(), *self.objective.state_dict().values(), *moments]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained(1)


def test_restoring_is_bit_for_bit(trained, tmp_path):
    folder = trained.save(tmp_path, 3)
    other = Trained(2)
    restore(read_checkpoint(folder), other.tower, other.objective, other.optimizer)
    mine, theirs = trained.tensors(), other.tensors()
    # The tower and its moments, two scalars with theirs, and two buffers of the bank.
    assert len(mine) == len(theirs) == 4 * len(trained.tower.state_dict()) + 2 * 4 + 2
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    progress = read_checkpoint(folder).progress
    assert (progress.step, progress.samples_seen, progress.loader) == (3, 24, {"position": 24})


def test_a_tower_is_read_from_a_step_or_a_run_folder(trained, tmp_path):
    folder = trained.save(tmp_path / "checkpoints", 3)
    for place in (folder, tmp_path):
        loaded = load_tower(place)
        assert loaded.step == 3
        assert loaded.logit_scale == pytest.approx(trained.objective.logit_scale().item(), rel=1e-6)
        pairs = zip(loaded.tower.parameters(), trained.tower.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_tower(tmp_path / "elsewhere")


def test_only_the_newest_are_kept(trained, tmp_path):
    for step in (1, 2, 3):
        trained.save(tmp_path, step)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_damage_is_refused_by_name_and_the_older_checkpoint_taken(trained, tmp_path, file, damage):
    good = trained.save(tmp_path, 1)
    bad = trained.save(tmp_path, 2) / file
    content = bytearray(bad.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 0x10
        bad.write_bytes(content)
    elif damage == "truncated":
        bad.write_bytes(content[: len(content) // 2])
    else:
        bad.unlink()
    with pytest.raises(CorruptCheckpoint, match="MANIFEST.json|" + file):
        read_checkpoint(bad.parent)
    found, complaints = read_latest(tmp_path)
    assert found is not None and found.folder == good
    assert len(complaints) == 1 and "step_00000002" in complaints[0]


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_over(trained, tmp_path):
    (trained.save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint under .* is whole"):
        read_latest(tmp_path)
    assert read_latest(tmp_path / "new run") == (None, [])


@pytest.mark.parametrize("kill_at", range(14))
def test_a_kill_at_any_instant_of_a_save_leaves_the_previous_one(trained, tmp_path, monkeypatch, kill_at):
    """Every write, sync and rename of a save is a place to die; after each the newest whole checkpoint loads."""
    trained.save(tmp_path, 1)
    calls = itertools.count()

    class Killed(BaseException):
        pass

    def dying(function):
        def wrapped(*arguments, **keywords):
            if next(calls) >= kill_at:
                raise Killed
            return function(*arguments, **keywords)

        return wrapped

    places = ((module, "save_file"), (os, "fsync"), (Path, "rename"), (Path, "write_text"), (shutil, "rmtree"))
    with monkeypatch.context() as patch:
        for place, name in places:
            patch.setattr(place, name, dying(getattr(place, name)))
        with contextlib.suppress(Killed):
            trained.save(tmp_path, 2)
    survived = next(calls) <= kill_at

    found, complaints = read_latest(tmp_path)
    assert found is not None and not complaints
    assert found.progress.step in ((2,) if survived else (1, 2))
    trained.save(tmp_path, 3)  # and the next save is not hindered by what was left
    assert read_latest(tmp_path)[0].progress.step == 3


def test_a_full_disk_keeps_what_was_there(trained, tmp_path, monkeypatch):
    trained.save(tmp_path, 1)
    monkeypatch.setattr(module, "save_file", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        trained.save(tmp_path, 2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert not list(tmp_path.glob(".*"))


def test_another_architecture_is_named_and_nothing_changed(trained, tmp_path):
    found = read_checkpoint(trained.save(tmp_path, 1))
    torch.manual_seed(0)
    other = make_vision_tower(replace(CONFIG.model, pooling="mean"), image_size=32)
    objective = objective_of(LossConfig())
    before = [parameter.detach().clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match=r"another architecture .* unexpected pool\."):
        restore(found, other, objective, build_optimizer(other, objective, CONFIG.optim))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_another_text_tower_is_refused(trained, tmp_path):
    found = read_checkpoint(trained.save(tmp_path, 1))
    found.require_text_tower(text_tower.describe("the/same/elsewhere"))
    with pytest.raises(ValueError, match="than other/tower: the weights or the tokenizer of owner/text are other ones"):
        found.require_text_tower(text_tower.describe("other/tower", fingerprint="abd"))
    with pytest.raises(ValueError, match=r"than owner/text: pooling is \['mean'\] there and \['cls'\] here"):
        found.require_text_tower(text_tower.describe(fingerprint="abd", pooling=("cls",)))


def test_the_checkpoint_just_saved_survives_damaged_ones_of_later_steps(trained, tmp_path):
    """A run that fell back to step 1 must not lose what it saves next to folders that sort after it."""
    trained.save(tmp_path, 1)
    for step in (8, 9):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / f"step_{step:08d}")
        (tmp_path / f"step_{step:08d}" / "model.safetensors").write_bytes(b"damaged")
    trained.save(tmp_path, 2)
    found, complaints = read_latest(tmp_path)
    assert found is not None and found.progress.step == 2 and complaints == []


def test_folders_of_other_names_are_left_alone_and_never_taken(trained, tmp_path):
    trained.save(tmp_path, 1)
    best = tmp_path / "step_best"
    shutil.copytree(tmp_path / "step_00000001", best)
    trained.save(tmp_path, 2)
    trained.save(tmp_path, 3)
    assert read_latest(tmp_path)[0].progress.step == 3
    assert best.is_dir()
    assert load_tower(best).step == 1


def test_a_second_process_is_kept_out_of_a_run_folder_with_locks_and_without(tmp_path, monkeypatch, caplog):
    first, second = module.RunLock(tmp_path), module.RunLock(tmp_path)
    first.take()
    first.take()
    with pytest.raises(ValueError, match="another process is training in"):
        second.take()
    del first
    for number in (errno.ENOSYS, errno.ENOLCK):

        def refuse(file, flags, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module.fcntl, "flock", refuse)
        holder = tmp_path / ".lock.holder"
        first, second = module.RunLock(tmp_path), module.RunLock(tmp_path)
        first.take()
        first.take()
        assert holder.is_file() and "without locks" in caplog.text
        with pytest.raises(ValueError, match=f"another process is training in .*delete {holder}$"):
            second.take()
        first._soft.release()
    monkeypatch.undo()
    module.RunLock(tmp_path / "not there yet").take()
    assert not (tmp_path / "not there yet").exists()
