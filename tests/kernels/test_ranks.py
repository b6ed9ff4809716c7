"""The losses of several ranks against one process in float64, alone and under DistributedDataParallel.

Run as a module this file is one rank: `python -m tests.kernels.test_ranks RANK FOLDER`.
"""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from textlock.kernels import contrastive
from textlock.kernels.contrastive import contrastive_loss
from textlock.kernels.gather import gather_rows
from textlock.kernels.sigmoid import sigmoid_loss

from .pairs import DEVICE, LOSSES, assert_close, make_rows, relative_error, run, truth_of

ROOT = Path(__file__).parents[2]
WORLD = 3


@dataclass(frozen=True)
class Split:
    """A batch that the ranks share, and `bank` texts more; rank r holds part r, or the r-th from the end."""

    loss: str
    modes: tuple[str, ...]
    sizes: tuple[int, ...] = (20, 1, 9)
    d: int = 24
    scale: float = 50.0
    duplicates: bool = False
    dtype: torch.dtype = torch.float64
    reverse: bool = False
    bank: int = 0

    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        B = sum(self.sizes) + self.bank
        return *make_rows(sum(self.sizes), B, self.d), torch.arange(B) % 17 if self.duplicates else None

    def part(self, rank: int) -> slice:
        index = WORLD - 1 - rank if self.reverse else rank
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def options(self) -> dict:
        return {"bank": self.bank} if self.bank else {}


DENSE, TILED = ("reference", "chunked"), ("store", "recompute")
SPLITS = {
    "even": Split("contrastive", DENSE, (8, 8, 8)),
    "uneven, reversed": Split("contrastive", DENSE, scale=300.0, reverse=True),
    "duplicates": Split("contrastive", DENSE, duplicates=True, scale=100.0),
    "bank": Split("contrastive", DENSE, bank=13, duplicates=True),
    "bank larger than the batch, float32": Split("contrastive", DENSE, bank=91, dtype=torch.float32, scale=14.3),
    "tiles": Split("contrastive", TILED, (33, 1, 6), 64, dtype=torch.float32),
    "tiles, bank": Split("contrastive", TILED, (33, 1, 6), 64, dtype=torch.float32, duplicates=True, bank=31),
    "sigmoid": Split("sigmoid", DENSE, (8, 8, 8)),
    "sigmoid, uneven, reversed": Split("sigmoid", DENSE, duplicates=True, reverse=True),
    "sigmoid, tiles": Split("sigmoid", ("chunked", "fused"), (33, 1, 6), 64, dtype=torch.float32),
}
CASES = [(name, mode) for name, split in SPLITS.items() for mode in split.modes]

# What README shows for somebody's own trainer, under DistributedDataParallel; here in float64.
README = (ROOT / "README.md").read_text().replace("torch.float16", "torch.float64").replace(".half()", "")
TRAINED_TEXT, FROZEN_TEXT, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BEFORE_THE_LOOP, IN_THE_LOOP = FROZEN_TEXT.split("for images, text in batches:\n")


class TwoTowers(nn.Module):
    """As open_clip's CLIP: both towers and the logarithm of the scale in one module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24)) for _ in range(2))
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))
        self.double()

    def forward(self, images, texts):
        features = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return *features, self.logit_scale.exp(), self.logit_bias


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(6 * WORLD, 16, dtype=torch.float64, generator=generator) for _ in range(2))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_one_process(kind: str) -> dict[str, Tensor]:
    """Return the loss and the gradients of the whole batch, from dense float64."""
    model = TwoTowers()
    image, text, scale, bias = model(*samples())
    text = text.detach() if kind == "frozen" else text
    if kind == "sigmoid":
        loss = sigmoid_loss(image, text, scale, bias, mode="reference")
    else:
        loss = contrastive_loss(image, text, scale, mode="reference")
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def in_parallel(kind: str, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Do the same with a part of the batch, the towers in DistributedDataParallel; two steps, the second returned."""
    rank, own = group.rank(), slice(6 * group.rank(), 6 * group.rank() + 6)
    images, texts = (x[own] for x in samples())
    model = TwoTowers()
    unused = {"frozen": ["text", "logit_bias"], "sigmoid": []}.get(kind, ["logit_bias"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in unused)
    text_tower = model.text
    if kind == "towers apart":  # each tower in a module of its own, the scale with the image tower's
        text_tower, model.text = DistributedDataParallel(model.text), nn.Identity()
    parallel = DistributedDataParallel(model)
    scope = {
        "contrastive_loss": contrastive_loss,
        "torch": torch,
        "F": F,
        "rank": rank,
        "group": group,
        "b": 6,
        "d": 24,
    }
    for step in range(2):
        for parameter in (*model.parameters(), *text_tower.parameters()):
            parameter.grad = None
        image, text, scale, bias = parallel(images, text_tower(texts) if kind == "towers apart" else texts)
        scope |= {"images": images, "image": image, "text": text, "logit_scale": scale}
        scope["tower"] = lambda images, image=image: image
        if kind == "frozen":
            if step == 0:
                exec(BEFORE_THE_LOOP, scope)
            exec(textwrap.dedent(IN_THE_LOOP), scope)
        elif kind == "sigmoid":
            everyone = gather_rows(text, group)
            settings = {"first_row": own.start, "group": group, "gradient_reduction": "mean"}
            scope["loss"] = sigmoid_loss(image, everyone, scale, bias, **settings)
        else:
            exec(TRAINED_TEXT, scope)
        scope["loss"].backward()
    found = {"loss": scope["loss"].detach(), **gradients(model)}
    if kind == "towers apart":
        found |= {f"text.{name}": value for name, value in gradients(text_tower.module).items()}
    return found


PARALLEL = ("trained", "towers apart", "frozen", "sigmoid")


def open_clip_losses(rank: int) -> dict[str, nn.Module]:
    """Load open_clip's losses from their file alone: importing the package takes seconds in every process."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return {}
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).parent / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {"rank": rank, "world_size": WORLD}
    return {
        "contrastive": module.ClipLoss(local_loss=True, gather_with_grad=True, **settings),
        "sigmoid": module.SigLipLoss(dist_impl="gather", **settings),
        "sigmoid bidir": module.SigLipLoss(dist_impl="bidir", **settings),
    }


def evaluate(function, split: Split, rank: int, text: Tensor) -> dict[str, Tensor]:
    """Return what a loss of own rows gives, with texts of which this rank's are gathered by the function itself."""
    own = split.part(rank)
    image, scale = split.rows()[0][own].clone().requires_grad_(), torch.tensor(split.scale).double().requires_grad_()
    bias = (torch.tensor(-10.0).double().requires_grad_(),) if split.loss == "sigmoid" else ()
    text = text[own].clone().requires_grad_()
    loss = function(image, text, scale, *bias)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "logit_scale": scale.grad}


def one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    found: dict[str, Tensor] = {}
    for name, mode in CASES:
        split = SPLITS[name]
        image, text, ids = split.rows()
        own = split.part(rank)
        options = {
            "dtype": split.dtype,
            "device": "cpu",
            "chunk": 4,
            "first_row": own.start,
            "ids": ids,
            "group": group,
        }
        result = run(LOSSES[split.loss], mode, image[own], text, split.scale, **options, **split.options())
        found |= {f"{name}/{mode}/{key}": value for key, value in result.items()}
    for kind in PARALLEL:
        found |= {f"DDP {kind}/{key}": value for key, value in in_parallel(kind, group).items()}
    for kind, clip_loss in open_clip_losses(rank).items():
        split = SPLITS["sigmoid" if "sigmoid" in kind else "even"]
        own, ours = split.part(rank), LOSSES[split.loss].function

        def our_loss(image, text, *scalars, ours=ours, own=own):
            return ours(image, gather_rows(text, group), *scalars, first_row=own.start, group=group)

        for who, function in (("open_clip", clip_loss), ("ours", our_loss)):
            values = evaluate(function, split, rank, split.rows()[1])
            found |= {f"{who} {kind}/{key}": value for key, value in values.items()}

    messages = {}
    for bank in (0, 2):  # every rank claims the first rows of a batch one row too long
        try:
            contrastive_loss(torch.ones(8, 16), torch.ones(25 + bank, 16), 1.0, group=group, bank=bank)
        except ValueError as error:
            messages[f"error {bank}"] = str(error)
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{rank}", messages)
    dist.barrier()  # a rank that is gone may take the connections of others with it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Start the ranks once, for all tests, and open what each computed."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.kernels.test_ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        failures = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(failures)
    return [safe_open(folder / f"{rank}", "pt") for rank in range(WORLD)]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name}, {mode}" for name, mode in CASES])
def test_ranks_together_equal_one_process(ranks, name, mode):
    split = SPLITS[name]
    loss = LOSSES[split.loss]
    image, text, ids = split.rows()
    truth = truth_of(loss, image, text, split.scale, ids=ids)
    parts = [{key: rank.get_tensor(f"{name}/{mode}/{key}") for key in ("loss", *loss.learnt)} for rank in ranks]
    assert all(part["loss"] == parts[0]["loss"] for part in parts), "one value on all ranks, to the bit"
    whole = {key: sum(part[key] for part in parts) for key in loss.learnt if key != "image"}
    whole |= {"loss": parts[0]["loss"], "image": torch.zeros_like(truth["image"])}
    for rank, part in enumerate(parts):
        whole["image"][split.part(rank)] = part["image"]
    if split.dtype == torch.float64:
        assert all(relative_error(whole[key], truth[key]) <= 1e-10 for key in whole)
    else:
        assert_close(loss, mode, whole, truth, image, text, split.scale)


@pytest.mark.parametrize("kind", PARALLEL)
def test_averaged_gradients_are_those_of_the_loss(ranks, kind):
    """Weights of both towers, scale and bias, as DistributedDataParallel leaves them on every rank."""
    truth = in_one_process(kind)
    for rank in ranks:
        found = {
            key.removeprefix(f"DDP {kind}/"): rank.get_tensor(key)
            for key in rank.keys()  # noqa: SIM118  a safetensors file is no dict
            if key.startswith(f"DDP {kind}/")
        }
        assert {"loss", "image.0.weight", "logit_scale"} <= found.keys()
        assert ("text.0.weight" in found) == (kind != "frozen") and ("logit_bias" in found) == (kind == "sigmoid")
        for name, value in found.items():
            assert relative_error(value, truth[name]) <= 1e-12, name


@pytest.mark.parametrize("kind", ["contrastive", "sigmoid", "sigmoid bidir"])
def test_open_clip_agrees(ranks, kind):
    """Its value is the mean over its own rows, its gradients are those of the sum over ranks."""
    if f"open_clip {kind}/loss" not in ranks[0].keys():  # noqa: SIM118  a safetensors file is no dict
        pytest.skip("open_clip is not installed")
    values = {
        who: {
            key: [rank.get_tensor(f"{who} {kind}/{key}") for rank in ranks]
            for key in ("loss", *LOSSES["contrastive"].learnt)
        }
        for who in ("ours", "open_clip")
    }
    ours, theirs = values["ours"], values["open_clip"]
    torch.testing.assert_close(ours["loss"][0], sum(theirs["loss"]) / WORLD)
    torch.testing.assert_close(sum(ours["logit_scale"]), sum(theirs["logit_scale"]) / WORLD)
    for name in ("image", "text"):
        torch.testing.assert_close(torch.cat(ours[name]), torch.cat(theirs[name]) / WORLD)


def test_ranks_that_do_not_make_up_the_batch_are_told_so(ranks):
    for rank in ranks:
        told = rank.metadata()
        assert "must hold every image row once" in told["error 0"]
        assert "0:8 of 25; pass" in told["error 0"]
        assert "0:8 of 25 before a bank of 2; pass" in told["error 2"]


def test_message_between_ranks_leaves_the_bank_out(monkeypatch):
    """It holds one number for each image of the batch and one more, whatever the bank."""
    sizes = []
    monkeypatch.setattr(contrastive, "check_layout", lambda *_: None)
    monkeypatch.setattr("textlock.kernels.pairs.group_of", lambda name: name)
    monkeypatch.setattr(contrastive, "_all_reduce", lambda values, group: sizes.append((group, len(values))))
    image, text = make_rows(6, 35, 8)
    contrastive_loss(image, text, 9.0, group=SimpleNamespace(group_name="all"), bank=15)
    assert sizes == [("all", 20 + 1)]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a group of gloo is for a CPU")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_group_compiles_whole_and_a_group_of_one_changes_nothing(tmp_path, reduction):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        image, text = make_rows(6, 6, 8)
        function = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
        found = []
        for loss, group in ((contrastive_loss, None), (function, dist.group.WORLD)):
            rows = image.clone().requires_grad_()
            value = loss(rows, text, torch.tensor(9.0), group=group, gradient_reduction=reduction)
            value.backward()
            found.append((value, rows.grad))
        torch.testing.assert_close(*found)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
