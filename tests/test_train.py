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

import pytest
import torch
import yaml
from safetensors.torch import load_file

from textlock.data.index import index_shards
from textlock.data.loader import open_loader
from textlock.engine.config import parse_config
from textlock.engine.distributed import World
from textlock.engine.optim import require_optimizer

from .conftest import ONE_THREAD, ROOT, records, run

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


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("train.py", *arguments)


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "train.py"]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in records(run_dir / "metrics.jsonl")]


def weights(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / "step_00000012"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "trainer.safetensors")}


@pytest.fixture(scope="module")
def whole_run(small_world, tmp_path_factory) -> Path:
    """A run of twelve steps that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    outcome = train(*small_world.command(run_dir))
    assert outcome.returncode == 0, outcome.stderr
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

    assert [folder.name for folder in sorted((whole_run / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    page = (whole_run / "report.html").read_text()
    assert "<svg" in page and "zero" in page.lower()


def test_the_text_tower_is_in_no_checkpoint(whole_run):
    names = load_file(whole_run / "checkpoints" / "step_00000012" / "model.safetensors").keys()
    assert not [name for name in names if "text" in name or "word_embeddings" in name]


def test_running_a_finished_run_again_changes_nothing(small_world, whole_run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(whole_run, again)
    outcome = train(*small_world.command(again))
    assert outcome.returncode == 0, outcome.stderr
    assert losses(again) == losses(whole_run) and weights(again) == weights(whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_an_interrupted_run_goes_on_bit_for_bit(small_world, whole_run, tmp_path, number):
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", *small_world.command(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 6/"):
            process.send_signal(number)
            break
    said = process.stdout.read()
    code = process.wait(timeout=60)
    saved = sorted(int(folder.name[-8:]) for folder in (run_dir / "checkpoints").iterdir() if folder.suffix == "")
    if number == signal.SIGTERM:
        assert code == 0 and "the same command goes on from there" in said
        assert saved[-1] >= 6, "SIGTERM saves the step under way"
    else:
        assert code == -signal.SIGKILL
    if saved[-1] == 12:
        pytest.fail("the run was over before the signal came: nothing was tested")

    outcome = train(*small_world.command(run_dir))
    assert outcome.returncode == 0, outcome.stderr
    assert f"going on after step {saved[-1]}" in outcome.stdout
    assert losses(run_dir) == losses(whole_run)
    assert weights(run_dir) == weights(whole_run)


def test_stored_text_embeddings_give_the_losses_of_the_text_tower(small_world, whole_run, tmp_path):
    """To half precision: rounding a row moves the first loss by 2e-5 of it, and the steps after it learn from that."""
    rows = str(tmp_path / "rows")
    shards, text = str(small_world.root / "data" / "train"), str(small_world.root / "text")
    made = run("-m", "textlock.data.embeddings", shards, "--tower", text, "--output", rows, "--device", "cpu")
    assert made.returncode == 0, made.stderr
    outcome = train(*small_world.command(tmp_path / "run", "--data.text-embeddings", rows))
    assert outcome.returncode == 0, outcome.stderr
    one, other = losses(whole_run), losses(tmp_path / "run")
    assert len(one) == len(other) == 12
    assert one != other, "the stored rows were not read"
    assert other[0][1:] == pytest.approx(one[0][1:], rel=3e-4)
    for (step, loss, norm), (_, other_loss, other_norm) in zip(one, other, strict=True):
        assert other_loss == pytest.approx(loss, rel=2e-3), step
        assert other_norm == pytest.approx(norm, rel=1e-2), step


def go_on_without_the_last_checkpoint(run_dir: Path, copy: Path) -> None:
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000012")


def test_a_run_learns_on_every_device_and_goes_on_bit_for_bit(small_world, tmp_path, device, request):
    part, flags = tmp_path / "part", ("--device", device.type)
    if device.type == "cpu":
        whole = request.getfixturevalue("whole_run")
    else:
        whole = tmp_path / "whole"
        outcome = train(*small_world.command(whole, *flags))
        assert outcome.returncode == 0, outcome.stderr
        outcome = run("evaluate.py", "--checkpoint", str(whole), "--data", str(small_world.root / "data" / "heldout"))
        assert outcome.returncode == 0, outcome.stderr
        (during,) = records(whole / "evaluations.jsonl")
        evaluated = json.loads((whole / "evaluation.json").read_text())
        assert evaluated["mean_recall@1"] == pytest.approx(during["mean_recall@1"], abs=1e-9)
    found = losses(whole)
    assert sum(loss for _, loss, _ in found[-4:]) < sum(loss for _, loss, _ in found[:4])
    go_on_without_the_last_checkpoint(whole, part)
    outcome = train(*small_world.command(part, *flags))
    assert outcome.returncode == 0, outcome.stderr
    assert "going on after step 8" in outcome.stdout
    assert losses(part) == found and weights(part) == weights(whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and NCCL, which runs there alone")
def test_a_sharded_run_of_one_rank_on_a_gpu_is_the_whole_one(small_world, tmp_path):
    """FSDP keeps no main gradient, so weights' gradients are summed in another order."""
    for sharding in ("replicated", "fsdp"):
        flags = ("--device", "cuda", "--step.sharding", sharding)
        outcome = run(*torchrun(1), *small_world.command(tmp_path / sharding, *flags))
        assert outcome.returncode == 0, outcome.stderr
    for (step, loss, norm), (_, other_loss, other_norm) in zip(
        *(losses(tmp_path / sharding) for sharding in ("replicated", "fsdp")), strict=True
    ):
        assert other_loss == pytest.approx(loss, rel=2e-2), step
        assert other_norm == pytest.approx(norm, rel=0.1), step


def test_repeated_captions_are_counted(small_world, whole_run):
    config = parse_config(small_world.command(Path("unused")))
    with open_loader(config.data, rank=0, world_size=1) as loader:
        expected = [16 - len(set(next(loader).ids.tolist())) for _ in range(12)]
    assert sum(expected) > 0
    assert [line["duplicate_captions"] for line in records(whole_run / "metrics.jsonl")] == expected


BAD_SAMPLES = {
    "html": (b"<html>", b"x", "format"),
    "cut": (b"\xff\xd8\xff\xe0", b"x", "truncated"),
    "no picture": (b"", b"x", "empty"),
    "no text": (b"", b" ", "no-caption"),
}


@pytest.fixture(scope="module")
def world_with_bad_samples(small_world, tmp_path_factory) -> Path:
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
    return shards


def launch(processes: int) -> list[str]:
    return ["train.py"] if processes == 1 else torchrun(processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_bad_samples_are_counted_by_kind_over_ranks_and_resumes(
    small_world, world_with_bad_samples, tmp_path, processes
):
    flags = [
        "--data.shards",
        str(world_with_bad_samples),
        "--data.max-skipped-fraction",
        "1",
        "--step.micro-batch",
        "4",
    ]
    command = [*launch(processes), *small_world.command(tmp_path / "run", *flags)]
    assert run(*command).returncode == 0
    whole = records(tmp_path / "run" / "metrics.jsonl")[-1]
    skipped = records(tmp_path / "run" / "skipped.jsonl")
    assert whole["skipped_by_kind"] == Counter(line["kind"] for line in skipped)
    assert whole["skipped_samples"] == len(skipped) >= 6
    assert {line["shard"] for line in skipped} == {"zzzzz.tar"}
    kinds = [kind for *_, kind in BAD_SAMPLES.values()] * 2
    assert {(line["key"], line["kind"]) for line in skipped} <= {(f"bad{at}", kind) for at, kind in enumerate(kinds)}

    for folder in (tmp_path / "run" / "checkpoints").glob("step_0000001*"):
        shutil.rmtree(folder)  # killed after step 8
    outcome = run(*command)
    assert outcome.returncode == 0 and "going on after step 8" in outcome.stdout
    again = records(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (again["skipped_by_kind"], again["loss"]) == (whole["skipped_by_kind"], whole["loss"])
    key = itemgetter("position")
    assert sorted(records(tmp_path / "run" / "skipped.jsonl"), key=key) == sorted(skipped, key=key)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_bad_samples_stop_every_rank(small_world, world_with_bad_samples, tmp_path, processes):
    """Judged from 1,000 samples on, over all ranks: each alone has seen too few."""
    flags = ["--data.shards", str(world_with_bad_samples), "--data.batch-size", "104", "--step.micro-batch", "52"]
    outcome = run(*launch(processes), *small_world.command(tmp_path / "run", *flags))
    assert outcome.returncode != 0
    assert outcome.stderr.count("of 1040 samples are bad (") == processes
    assert "more than --data.max-skipped-fraction 0.01" in outcome.stderr
    assert records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 9


@pytest.mark.slow
def test_two_processes_train_as_one(small_world, whole_run, tmp_path):
    outcome = run(*launch(2), *small_world.command(tmp_path / "two", "--step.micro-batch", "4"))
    assert outcome.returncode == 0, outcome.stderr
    one, two = losses(whole_run), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    for (step, loss, norm), (_, other_loss, other_norm) in zip(one, two, strict=True):
        assert other_loss == pytest.approx(loss, rel=2e-5), step
        assert other_norm == pytest.approx(norm, rel=2e-3), step
    results = [json.loads((path / "results.json").read_text()) for path in (whole_run, tmp_path / "two")]
    assert results[0]["samples_seen"] == results[1]["samples_seen"]
    assert results[1]["world_size"] == 2


@pytest.mark.slow
def test_a_sharded_run_is_the_replicated_one_and_goes_on_as_such(small_world, tmp_path):
    replicated, sharded, resumed = (tmp_path / name for name in ("replicated", "fsdp", "resumed"))
    for run_dir in (replicated, sharded):
        flags = ["--step.micro-batch", "4", "--step.sharding", run_dir.name]
        outcome = run(*torchrun(2), *small_world.command(run_dir, *flags))
        assert outcome.returncode == 0, outcome.stderr
    go_on_without_the_last_checkpoint(sharded, resumed)
    outcome = train(*small_world.command(resumed))
    assert outcome.returncode == 0, outcome.stderr
    assert "going on after step 8" in outcome.stdout

    for found in (sharded, resumed):
        for (step, loss, norm), (_, other_loss, other_norm) in zip(losses(replicated), losses(found), strict=True):
            assert other_loss == pytest.approx(loss, rel=1e-5), step
            assert other_norm == pytest.approx(norm, rel=1e-4), step
        figures = [records(run_dir / "evaluations.jsonl")[-1] for run_dir in (replicated, found)]
        for evaluation in figures:
            del evaluation["wall_seconds"]
        assert figures[1] == pytest.approx(figures[0], rel=1e-5)
        for name in ("model.safetensors", "trainer.safetensors"):
            expected = load_file(replicated / "checkpoints" / "step_00000012" / name)
            torch.testing.assert_close(
                load_file(found / "checkpoints" / "step_00000012" / name), expected, rtol=1e-3, atol=1e-5
            )


def refusal(capsys, arguments: list[str]) -> str:
    """Run main() in this process; return what it says on stderr, in one line, before it ends with exit status 2."""
    from textlock.train import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = sys.argv
    sys.argv = ["train.py", *arguments]
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert caught.value.code == 2
    return " ".join(line.strip("│ ") for line in capsys.readouterr().err.splitlines())  # a parser's box, or one line


def expect_refusal(capsys, message: str, arguments: list[str]) -> None:
    said = refusal(capsys, arguments)
    assert said.startswith("error: ") and message in said


# A run whose inputs are nowhere: what is wrong with its settings is said before they are looked for.
NOWHERE = "--data.shards x --data.batch-size 16 --data.image-size 32 --data.workers 1 --optim.steps 9 --device cpu"
NOWHERE += " --model.name eva02_micro_patch8_32 --step.micro-batch 8"
IMPOSSIBLE = [
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
    (
        "--model.name vit_base_patch16_rope_reg1_gap_256 --model.pooling cls",
        "--model.pooling is 'cls', must be mean or",
    ),
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
    import textlock.train

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


BAD_INPUT = {
    "missing shards": (["--data.shards", "/nowhere"], "/nowhere"),
    "missing config file": (["--config", "configs/none.yaml"], "configs/none.yaml does not exist"),
    "missing weights": (["--model.weights", "/nowhere/model.safetensors"], "/nowhere/model.safetensors"),
    "missing text tower": (["--text.name", "/nowhere/text"], "/nowhere/text"),
    "missing class folder": (["--evals.zero-shot", "/nowhere/classes"], "/nowhere/classes"),
    "missing retrieval shards": (["--evals.retrieval", "/nowhere/heldout"], "/nowhere/heldout"),
    "missing text embeddings": (["--data.text-embeddings", "/nowhere/rows"], "/nowhere/rows"),
    "batch larger than the data": (["--data.batch-size", "4096"], "4096"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(small_world, tmp_path, capsys, case):
    flags, message = BAD_INPUT[case]
    expect_refusal(capsys, message, small_world.command(tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_is_named(small_world, tmp_path):
    outcome = train(*small_world.command(tmp_path / "run", "--optim.lr", "1"))
    assert outcome.returncode == 2 and "--optim.lr" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_an_empty_shard_is_named(small_world, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "00000.tar").write_bytes(bytes(10240))
    expect_refusal(capsys, str(shards), small_world.command(tmp_path / "run", "--data.shards", str(shards)))


def test_a_text_folder_without_a_tokenizer_is_named(small_world, tmp_path, capsys):
    text = tmp_path / "text"
    shutil.copytree(small_world.root / "text", text)
    for file in text.glob("*token*"):
        file.unlink()
    (text / "vocab.txt").unlink(missing_ok=True)
    expect_refusal(capsys, "tokenizer", small_world.command(tmp_path / "run", "--text.name", str(text)))


def test_a_run_folder_of_another_config_is_refused(small_world, whole_run, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(whole_run, again)
    expect_refusal(
        capsys,
        "optim.learning_rate is 0.001 there and 0.5 here",
        small_world.command(again, "--optim.learning-rate", "0.5"),
    )
    assert losses(again) == losses(whole_run)


def test_a_run_against_another_text_tower_is_refused(small_world, whole_run, tmp_path, capsys):
    again, text = tmp_path / "again", tmp_path / "text"
    shutil.copytree(whole_run, again)
    captions = str(small_world.root / "data" / "captions.txt")
    made = run(
        "-m",
        "textlock.demo.text_tower",
        "--captions",
        captions,
        "--output",
        str(text),
        "--width",
        "64",
        "--heads",
        "1",
        "--seed",
        "7",
    )
    assert made.returncode == 0, made.stderr
    expect_refusal(capsys, "another text tower", small_world.command(again, "--text.name", str(text)))


def test_a_damaged_checkpoint_is_passed_over_aloud(small_world, whole_run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(whole_run, again)
    damaged = again / "checkpoints" / "step_00000012" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    outcome = train(*small_world.command(again))
    assert outcome.returncode == 0, outcome.stderr
    assert "model.safetensors is damaged" in outcome.stderr and "going on after step 8" in outcome.stdout
    assert losses(again) == losses(whole_run) and weights(again) == weights(whole_run)


def test_a_diverging_run_stops_before_the_weights_are_touched(small_world, tmp_path):
    run_dir = tmp_path / "run"
    outcome = train(*small_world.command(run_dir, "--optim.learning-rate", "1e30", "--checkpoint.every", "1"))
    assert outcome.returncode == 2
    assert "has diverged, and a lower learning rate" in outcome.stderr and len(outcome.stderr.splitlines()) == 1
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_help_explains_every_setting():
    outcome = run("train.py", "--help")
    assert outcome.returncode == 0
    for flag in ("--run-dir", "--data.shards", "--optim.learning-rate", "--step.keep", "--loss.mask-duplicates"):
        assert flag in outcome.stdout


def test_a_run_without_evaluations_says_and_writes_none(small_world, tmp_path):
    config = yaml.safe_load(small_world.config.read_text())
    config["evals"] = {"every": 1}
    config["optim"]["steps"] = 2
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    outcome = train("--config", str(path), "--run-dir", str(tmp_path / "run"))
    assert outcome.returncode == 0, outcome.stderr
    assert not [line for line in outcome.stdout.splitlines() if line.startswith(("step 1:", "step 2:"))]
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["samples_seen"] == 32
