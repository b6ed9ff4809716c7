"""train.py as its users run it: whole runs, interrupted ones, several processes, and bad input."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from operator import itemgetter
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import textlock.train
from textlock.data import embeddings
from textlock.data.index import index_shards
from textlock.data.loader import open_loader
from textlock.engine.config import parse_config
from textlock.engine.distributed import World
from textlock.engine.optim import require_optimizer

from .conftest import ONE_THREAD, ROOT, losses, records, run, torchrun

METRICS = {
    "step", "samples_seen", "epoch", "loss", "logit_scale", "learning_rate", "grad_norm", "images_per_second",
    "images_per_second_per_device", "mfu", "data_wait_fraction", "peak_memory_bytes", "skipped_samples",
    "skipped_by_kind", "duplicate_captions",
}  # fmt: skip
RESULTS = {
    "zero_shot_top1", "zero_shot_top5", "image_to_text_recall@1", "image_to_text_recall@5", "image_to_text_recall@10",
    "text_to_image_recall@1", "text_to_image_recall@5", "text_to_image_recall@10", "mean_recall@1", "images_per_second",
    "wall_seconds", "samples_seen", "config", "versions", "commit",
}  # fmt: skip


def train(*arguments: str) -> str:
    """Run train.py in a process of its own, which ends well; return all that it said."""
    outcome = run("train.py", *arguments)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout + outcome.stderr


def train_here(*arguments: str) -> None:
    """Run train.py in this process, on one thread as in one of its own; put signals and threads back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(sys, "argv", ["train.py", *arguments]):
            textlock.train.main()
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refusal(capsys, arguments: list[str]) -> str:
    """Return what train.py says on stderr, in one line, before it ends with exit status 2."""
    with pytest.raises(SystemExit) as caught:
        train_here(*arguments)
    assert caught.value.code == 2
    return " ".join(line.strip("│ ") for line in capsys.readouterr().err.splitlines())  # a parser's box, or one line


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(folder.name[-8:]) for folder in (run_dir / "checkpoints").iterdir() if folder.suffix == "")


def weights(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / "step_00000012"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "trainer.safetensors")}


def copy_until(step: int, run_dir: Path, copy: Path) -> Path:
    """Copy a run as it would be if it had been killed after a checkpoint."""
    shutil.copytree(run_dir, copy)
    for later in (later for later in saved_steps(copy) if later > step):
        shutil.rmtree(copy / "checkpoints" / f"step_{later:08d}")
    return copy


def assert_same_losses(run_dir: Path, expected: Path, *, loss: float, norm: float) -> None:
    """Compare losses and gradient norms of all steps, to these relative differences."""
    pairs = zip(losses(run_dir), losses(expected), strict=True)
    for (step, found_loss, found_norm), (_, expected_loss, expected_norm) in pairs:
        assert found_loss == pytest.approx(expected_loss, rel=loss), step
        assert found_norm == pytest.approx(expected_norm, rel=norm), step


@pytest.fixture(scope="module")
def whole_run(small_world, tmp_path_factory) -> Path:
    """A run of twelve steps that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(*small_world.command(run_dir))
    return run_dir


def test_a_run_writes_what_is_promised(whole_run):
    lines = records(whole_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(set(line) == METRICS for line in lines)
    assert lines[-1]["samples_seen"] == 12 * 16
    assert lines[0]["images_per_second"] is None, "the first step pays for warming up and has no rate"
    assert all(line["images_per_second"] > 0 for line in lines[1:])

    results = json.loads((whole_run / "results.json").read_text())
    assert set(results) >= RESULTS
    assert results["samples_seen"] == 192 and results["versions"]["torch"] and results["config"]["seed"] == 42
    assert 0 <= results["zero_shot_top1"] <= results["zero_shot_top5"] <= 1
    (evaluation,) = records(whole_run / "evaluations.jsonl")
    assert evaluation["step"] == 12 and evaluation["mean_recall@1"] == results["mean_recall@1"]

    assert saved_steps(whole_run) == [4, 8, 12]
    page = (whole_run / "report.html").read_text()
    assert "<svg" in page and "zero" in page.lower()


def test_the_text_tower_is_in_no_checkpoint(whole_run):
    names = load_file(whole_run / "checkpoints" / "step_00000012" / "model.safetensors").keys()
    assert not [name for name in names if "text" in name or "word_embeddings" in name]


def test_running_a_finished_run_again_changes_nothing(small_world, whole_run, tmp_path):
    again = copy_until(12, whole_run, tmp_path / "again")
    train_here(*small_world.command(again))
    assert losses(again) == losses(whole_run) and weights(again) == weights(whole_run)


def interrupt(command: list[str], line: str, number: signal.Signals) -> tuple[int, str]:
    """Send train.py a signal after its first line of that beginning; return exit status and the rest it said."""
    process = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(said for said in process.stdout if said.startswith(line))
    process.send_signal(number)
    said = process.stdout.read()
    return process.wait(timeout=60), said


def test_a_killed_and_a_stopped_run_go_on_bit_for_bit(small_world, whole_run, tmp_path):
    run_dir = tmp_path / "run"
    command = small_world.command(run_dir)
    code, _ = interrupt([sys.executable, "train.py", *command], "step 5/", signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed_after = saved_steps(run_dir)[-1]
    code, said = interrupt([sys.executable, "train.py", *command], "step ", signal.SIGTERM)
    assert code == 0 and "the same command goes on from there" in said
    stopped_after = saved_steps(run_dir)[-1]
    assert 4 <= killed_after < stopped_after, "SIGTERM saves the step under way"
    assert stopped_after < 12, "the run was over before the signal came: nothing was tested"
    assert f"going on after step {stopped_after}" in train(*command)
    assert losses(run_dir) == losses(whole_run) and weights(run_dir) == weights(whole_run)


def test_stored_text_embeddings_give_the_losses_of_the_text_tower(small_world, whole_run, tmp_path):
    """To half precision: rounding a row moves the first loss by 2e-5 of it, and the steps after it learn from that."""
    text = embeddings.Tower(name=str(small_world.root / "text"))
    shards, output = small_world.root / "data" / "train", tmp_path / "embeddings"
    embeddings.main(embeddings.Options(shards=shards, text=text, output=output, device="cpu"))
    train_here(*small_world.command(tmp_path / "run", "--data.text-embeddings", str(output)))
    assert losses(tmp_path / "run") != losses(whole_run), "the stored embeddings were not read"
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(whole_run)[0], rel=3e-4)
    assert_same_losses(tmp_path / "run", whole_run, loss=2e-3, norm=1e-2)


def test_a_run_learns_on_every_device_and_goes_on_bit_for_bit_without_a_damaged_checkpoint(
    small_world, tmp_path, device, request
):
    flags = ("--device", device.type)
    if device.type == "cpu":
        whole = request.getfixturevalue("whole_run")
    else:
        whole = tmp_path / "whole"
        train(*small_world.command(whole, *flags))
        outcome = run("evaluate.py", "--checkpoint", str(whole), "--data", str(small_world.root / "data" / "heldout"))
        assert outcome.returncode == 0, outcome.stderr
        (during,) = records(whole / "evaluations.jsonl")
        evaluated = json.loads((whole / "evaluation.json").read_text())
        assert evaluated["mean_recall@1"] == pytest.approx(during["mean_recall@1"], abs=1e-9)
    found = losses(whole)
    assert sum(loss for _, loss, _ in found[-4:]) < sum(loss for _, loss, _ in found[:4])

    part = copy_until(12, whole, tmp_path / "part")
    damaged = part / "checkpoints" / "step_00000012" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = train(*small_world.command(part, *flags))
    assert "model.safetensors is damaged" in said and "going on after step 8" in said
    assert losses(part) == found and weights(part) == weights(whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and NCCL, which runs there alone")
def test_a_sharded_run_of_one_rank_on_a_gpu_is_the_whole_one(small_world, tmp_path):
    """FSDP keeps no main gradient, so weights' gradients are summed in another order."""
    for sharding in ("replicated", "fsdp"):
        flags = ("--device", "cuda", "--step.sharding", sharding)
        outcome = torchrun(1, *small_world.command(tmp_path / sharding, *flags))
        assert outcome.returncode == 0, outcome.stderr
    assert_same_losses(tmp_path / "fsdp", tmp_path / "replicated", loss=2e-2, norm=0.1)


def test_repeated_captions_are_counted(small_world, whole_run):
    config = parse_config(small_world.command(Path("unused")))
    with open_loader(config.data, rank=0, world_size=1) as loader:
        expected = [16 - len(set(next(loader).ids.tolist())) for _ in range(12)]
    assert sum(expected) > 0
    assert [line["duplicate_captions"] for line in records(whole_run / "metrics.jsonl")] == expected


BAD_SAMPLES = {
    "html": (b"<html>", b"x", "format"),
    "cut": (b"\xff\xd8\xff\xe0", b"x", "truncated"),
    "no image": (b"", b"x", "empty"),
    "no text": (b"", b" ", "no-caption"),
}


@pytest.fixture(scope="module")
def shards_with_bad_samples(small_world, tmp_path_factory) -> str:
    """The shards of the small world and one more, of eight bad samples."""
    shards = tmp_path_factory.mktemp("bad") / "shards"
    shutil.copytree(small_world.root / "data" / "train", shards)
    with tarfile.open(shards / "zzzzz.tar", "w") as tar:
        for number, (image, caption, _) in enumerate([*BAD_SAMPLES.values()] * 2):
            for suffix, content in (("jpg", image), ("txt", caption)):
                member = tarfile.TarInfo(f"bad{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_shards(shards)
    return str(shards)


@pytest.mark.slow
def test_bad_samples_are_counted_by_kind_over_ranks_and_resumes(small_world, shards_with_bad_samples, tmp_path):
    """One process goes all the way; two go on from its fourth step and see and count the same."""
    flags = ["--data.shards", shards_with_bad_samples, "--data.max-skipped-fraction", "1", "--step.micro-batch", "4"]
    train_here(*small_world.command(tmp_path / "one", *flags))
    whole, skipped = (records(tmp_path / "one" / name) for name in ("metrics.jsonl", "skipped.jsonl"))
    assert whole[-1]["skipped_by_kind"] == Counter(line["kind"] for line in skipped)
    assert whole[-1]["skipped_samples"] == len(skipped) >= 6
    assert {line["shard"] for line in skipped} == {"zzzzz.tar"}
    kinds = [kind for *_, kind in BAD_SAMPLES.values()] * 2
    assert {(line["key"], line["kind"]) for line in skipped} <= {(f"bad{at}", kind) for at, kind in enumerate(kinds)}
    assert {line["position"] % 16 // 8 for line in skipped if line["position"] >= 4 * 16} == {0, 1}, (
        "each rank has some"
    )

    two = copy_until(4, tmp_path / "one", tmp_path / "two")
    outcome = torchrun(2, *small_world.command(two, *flags))
    assert outcome.returncode == 0 and "going on after step 4" in outcome.stdout, outcome.stderr
    for found, expected in zip(records(two / "metrics.jsonl"), whole, strict=True):
        assert found["skipped_by_kind"] == expected["skipped_by_kind"], found["step"]
    assert_same_losses(two, tmp_path / "one", loss=2e-5, norm=2e-3)
    key = itemgetter("position")
    assert sorted(records(two / "skipped.jsonl"), key=key) == sorted(skipped, key=key)


@pytest.mark.slow
def test_too_many_bad_samples_stop_every_rank(small_world, shards_with_bad_samples, tmp_path):
    """Judged from 1,000 samples on, over all ranks: each alone has seen too few."""
    flags = ["--data.shards", shards_with_bad_samples, "--data.batch-size", "104", "--step.micro-batch", "52"]
    outcome = torchrun(2, *small_world.command(tmp_path / "run", *flags))
    assert outcome.returncode != 0
    assert outcome.stderr.count("of 1040 samples are bad (") == 2
    assert "more than --data.max-skipped-fraction 0.01" in outcome.stderr
    assert records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 9


@pytest.mark.slow
def test_two_processes_train_as_one(whole_run, two_ranks):
    assert_same_losses(two_ranks, whole_run, loss=2e-5, norm=2e-3)
    one, two = (json.loads((run_dir / "results.json").read_text()) for run_dir in (whole_run, two_ranks))
    assert one["samples_seen"] == two["samples_seen"] and two["world_size"] == 2


@pytest.mark.slow
def test_a_sharded_run_is_the_replicated_one_and_goes_on_as_such(small_world, two_ranks, tmp_path, capsys):
    flags = ("--step.micro-batch", "4", "--step.sharding", "fsdp")
    outcome = torchrun(2, *small_world.command(tmp_path / "fsdp", *flags))
    assert outcome.returncode == 0, outcome.stderr
    resumed = copy_until(8, tmp_path / "fsdp", tmp_path / "resumed")
    train_here(*small_world.command(resumed))
    assert "going on after step 8" in capsys.readouterr().out

    def figures(run_dir: Path) -> dict[str, float]:
        return records(run_dir / "evaluations.jsonl")[-1] | {"wall_seconds": 0}

    for found in (tmp_path / "fsdp", resumed):
        assert_same_losses(found, two_ranks, loss=1e-5, norm=1e-4)
        ours, theirs = figures(found), figures(two_ranks)
        assert ours.pop("counts") == theirs.pop("counts")
        assert ours == pytest.approx(theirs, rel=1e-5)
        for name in ("model.safetensors", "trainer.safetensors"):
            own, expected = (load_file(run_dir / "checkpoints/step_00000012" / name) for run_dir in (found, two_ranks))
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5)


# A run whose inputs are nowhere: what is wrong with its settings is said before they are looked for.
NOWHERE = "--data.shards x --data.batch-size 16 --data.image-size 32 --data.workers 1 --optim.steps 9 --device cpu"
NOWHERE += " --model.name eva02_micro_patch8_32 --step.micro-batch 8"
IMPOSSIBLE = [
    ("--optim.lr 1", "--optim.lr"),
    ("--optim.learning-rate nan", "--optim.learning-rate is nan, must be a finite number"),
    ("--optim.betas 0.9 1", "--optim.betas is (0.9, 1.0), must be below 1"),
    ("--optim.head-weight-decay -1", "--optim.head-weight-decay is -1.0, must be at least 0"),
    ("--optim.steps 0", "--optim.steps is 0, must be at least 1"),
    ("--optim.epochs 1", "give exactly one of --optim.steps and --optim.epochs"),
    ("--optim.optimizer apex", "--optim.optimizer is 'apex', must be torch where there is no GPU"),
    ("--data.batch-size 1", "--data.batch-size is 1, must be at least 2"),
    ("--data.crop-scale 2 3", "--data.crop-scale is (2.0, 3.0), must be at most 1"),
    ("--data.crop-ratio 2 1", "--data.crop-ratio is (2.0, 1.0), must be two numbers, the smaller one first"),
    ("--data.image-size 30", "--data.image-size is 30, must be a multiple of 8, the patch size of eva02_micro"),
    ("--data.workers 0", "--data.workers is 0, must be at least 1"),
    ("--data.decoder dali", "--data.decoder dali needs DALI, which is not installed: pip install"),
    ("--model.name resnet50", "--model.name is 'resnet50', must be one of eva02_base_patch16_224"),
    ("--data.image-size 40 --model.kept-patches 26", "--model.kept-patches is 26, must be at most 25, the patches"),
    ("--model.kept-patches 17", "--model.kept-patches is 17, must be at most 16, the patches of an image"),
    ("--model.name vit_base_patch16_rope_reg1_gap_256 --model.pooling cls", "--model.pooling is 'cls', must be mean"),
    ("--model.block plain --step.keep lean", "--step.keep is 'lean', must be one of auto, all, block, none"),
    ("--step.micro-batch 0", "--step.micro-batch is 0, must be at least 1"),
    ("--step.micro-batch 5", "--step.micro-batch is 5, must divide the 16 images of one process"),
    ("--step.memory-gib inf", "--step.memory-gib is inf, must be a finite number"),
    ("--step.memory-gib -1", "--step.memory-gib is -1.0, must be at least 0"),
    ("--step.sharding fsdp", "--step.sharding is 'fsdp', must be replicated in a single process: start with torchrun"),
    ("--loss.initial-logit-scale 0", "--loss.initial-logit-scale is 0.0, must be above 0"),
    ("--loss.objective sigmoid --loss.mode store", "--loss.mode is 'store', must be auto"),
    ("--checkpoint.keep 0", "--checkpoint.keep is 0, must be at least 1"),
    ("--evals.templates a", "must hold {} where the class name goes"),
    ("--evals.batch-size 0", "--evals.batch-size is 0, must be at least 1"),
    ("--log.trackers wandb", "--log.trackers wandb needs the package wandb: pip install 'textlock[wandb]'"),
    ("--text.max-length 0", "--text.max-length is 0, must be at least 1"),
    ("--text.name=", "--text.name is '', must not be empty"),
    ("--seed 99999999999999999999999", "--seed is 99999999999999999999999, must be less than 2^63"),
]


@pytest.mark.parametrize(("flags", "sentence"), IMPOSSIBLE, ids=[flags for flags, _ in IMPOSSIBLE])
def test_an_impossible_setting_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys, flags, sentence):
    loaded = []
    for name in ("make_text_tower", "make_vision_tower", "open_loader", "read_latest"):
        monkeypatch.setattr(textlock.train, name, lambda *_, name=name, **__: loaded.append(name))
    monkeypatch.setitem(sys.modules, "textlock.data.dali", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert sentence in refusal(capsys, f"--run-dir {tmp_path}/run {NOWHERE} {flags}".split())
    assert not loaded and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("world_size", "sentence"),
    [(3, "--data.batch-size is 16, must be divisible by the number of processes, 3"), (4, "must divide the 4 images")],
)
def test_what_does_not_divide_among_the_processes_is_named(world_size, sentence):
    config = parse_config(f"--run-dir x {NOWHERE} --step.micro-batch 3".split())
    with pytest.raises(ValueError, match=sentence):
        config.require_world(World(0, world_size, torch.device("cpu"), None))


def test_fused_optimisers_know_whole_parameters_only():
    config = parse_config(f"--run-dir x {NOWHERE} --optim.optimizer apex".split())
    with pytest.raises(ValueError, match=r"--optim\.optimizer is 'apex', must be torch with --step.sharding fsdp"):
        require_optimizer(config.optim, torch.device("cuda"), sharded=True)
    require_optimizer(config.optim, torch.device("cuda"), sharded=False)


@pytest.fixture
def refused(small_world, tmp_path, capsys):
    """Return a function that starts a run which is refused with a sentence, and leaves its folder as it was."""

    def start(message: str, *flags: str, run_dir: Path = tmp_path / "run") -> None:
        before = sorted(run_dir.rglob("*"))
        said = refusal(capsys, small_world.command(run_dir, *flags))
        assert said.startswith("error: ") and message in said
        assert sorted(run_dir.rglob("*")) == before

    return start


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--data.shards", "/nowhere", "/nowhere"),
        ("--config", "configs/none.yaml", "configs/none.yaml does not exist"),
        ("--model.weights", "/nowhere/model.safetensors", "/nowhere/model.safetensors"),
        ("--text.name", "/nowhere/text", "/nowhere/text"),
        ("--evals.zero-shot", "/nowhere/classes", "/nowhere/classes"),
        ("--evals.retrieval", "/nowhere/heldout", "/nowhere/heldout"),
        ("--data.text-embeddings", "/nowhere/embeddings", "/nowhere/embeddings"),
        ("--data.batch-size", "4096", "4096"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(refused, tmp_path, flag, value, message):
    refused(message, flag, value)
    assert not (tmp_path / "run").exists()


def test_an_empty_shard_is_named(refused, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(bytes(10240))
    refused(str(tmp_path / "shards"), "--data.shards", str(tmp_path / "shards"))


@pytest.fixture
def text(small_world, tmp_path) -> Path:
    """A copy of the text tower, to be changed."""
    return shutil.copytree(small_world.root / "text", tmp_path / "text")


def test_a_text_folder_without_a_tokenizer_is_named(refused, text):
    for file in text.glob("*token*"):
        file.unlink()
    refused("tokenizer", "--text.name", str(text))


def test_a_run_against_another_text_tower_is_refused(refused, whole_run, text, tmp_path):
    state = load_file(text / "model.safetensors")
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, text / "model.safetensors", metadata={"format": "pt"})
    again = copy_until(12, whole_run, tmp_path / "again")
    refused("another text tower", "--text.name", str(text), run_dir=again)


def test_a_run_folder_of_another_config_is_refused(refused, whole_run, tmp_path):
    message = "optim.learning_rate is 0.001 there and 0.5 here"
    refused(message, "--optim.learning-rate", "0.5", run_dir=copy_until(12, whole_run, tmp_path / "again"))


def test_a_diverging_run_stops_before_the_weights_are_touched(small_world, tmp_path):
    run_dir = tmp_path / "run"
    flags = ("--optim.learning-rate", "1e30", "--checkpoint.every", "1")
    outcome = run("train.py", *small_world.command(run_dir, *flags))
    assert outcome.returncode == 2
    assert "has diverged, and a lower learning rate" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_here("--help")
    said = capsys.readouterr().out
    for flag in ("--run-dir", "--data.shards", "--optim.learning-rate", "--step.keep", "--loss.mask-duplicates"):
        assert flag in said


def test_a_run_without_evaluations_says_and_writes_none(small_world, tmp_path, capsys):
    config = yaml.safe_load(small_world.config.read_text()) | {"evals": {"every": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run_dir = tmp_path / "run"
    train_here("--config", str(tmp_path / "config.yaml"), "--run-dir", str(run_dir), "--optim.steps", "2")
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step 1:", "step 2:"))]
    assert not (run_dir / "evaluations.jsonl").exists()
    assert json.loads((run_dir / "results.json").read_text())["samples_seen"] == 32
