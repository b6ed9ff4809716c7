"""The configuration: one parser for file and command line, one sentence for every mistake."""

from dataclasses import replace
from pathlib import Path

import pytest

from textlock.engine.config import dump_config, load_config, parse_config, require_same_run

from .training import FLAGS

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


def write(folder: Path, text: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(text)
    return ["--config", str(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_survives_a_round_trip(path, tmp_path):
    config = parse_config(["--config", str(path), "--run-dir", "runs/x"])
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_papers_recipe_is_what_the_report_says():
    (path,) = (path for path in CONFIGS if path.stem == "nomic_embed_vision_v1_5")
    config = parse_config(["--config", str(path), "--run-dir", "runs/x"])
    optim = config.optim
    assert (config.data.batch_size, optim.betas, optim.learning_rate) == (65536, (0.9, 0.95), 1e-3)
    assert optim.warmup_steps == 2000
    assert config.loss.initial_logit_scale == pytest.approx(1 / 0.07)
    assert config.text.layer_norm and config.text.max_length == 77 and config.text.prefix == "search_query: "
    # 1,547,277,668 samples, 3 epochs
    assert optim.total_steps(1_547_277_668 // config.data.batch_size) == 70_827


def test_flags_after_the_file_win(tmp_path):
    text = "optim: {steps: 5, learning_rate: 1e-4, betas: [0.9, 0.98]}\nlog: {trackers: [tensorboard]}\n"
    config = parse_config([*write(tmp_path, text), *FLAGS[:-2], "--optim.learning-rate", "3e-4"])
    assert (config.optim.steps, config.optim.learning_rate, config.optim.betas) == (5, 3e-4, (0.9, 0.98))
    assert config.log.trackers == ("tensorboard",)


def test_null_is_the_default_and_odd_strings_stay_strings(tmp_path):
    text = "model: {weights: null}\ntext: {layer_norm: false, prefix: null, name: --odd}\n"
    config = parse_config([*write(tmp_path, text), *FLAGS])
    assert config.model.weights is None and config.text.layer_norm is False
    assert config.text.prefix is None and config.text.name == "--odd"
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "saved.yaml") == config
    assert parse_config([f"--config={tmp_path / 'saved.yaml'}"]) == config


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("optim: {learning_rat: 1}", "learning-rat"),
        ("optim: {learning_rat: null}", "learning-rat"),
        ("optim: {lr: 1}", "lr"),
        ("optimizer: {steps: 1}", "optimizer"),
        ("data: {shards: photos:2,web:0.5}", "web:0.5"),  # which YAML reads as a key without a value
    ],
)
def test_an_unknown_key_is_named(text, key, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config([*write(tmp_path, text), *FLAGS])
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("optim: {steps: 1}\noptim: {steps: 2}", "key 'optim' is there twice"),
        ("- 1\n", "must hold sections"),
        (
            "data: {shards: [photos: 2]}",
            r"--data.shards has \{'photos': 2\} .*: write it without a space after the colon",
        ),
        (None, "does not exist"),
    ],
    ids=["broken", "a key twice", "a list", "a space too much", "missing"],
)
def test_bad_files_are_one_sentence(text, message, tmp_path):
    arguments = ["--config", str(tmp_path / "none.yaml")] if text is None else write(tmp_path, text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        parse_config(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("photos", ("photos",)),
        ("'photos:2,web:0.5'", ("photos:2,web:0.5",)),
        ("[photos:2, web:0.5]", ("photos:2", "web:0.5")),
        ("['photos: 2', 2024]", ("photos: 2", "2024")),
    ],
)
def test_shards_of_a_file_are_one_text_or_a_list(written, read, tmp_path):
    config = parse_config([*write(tmp_path, f"data: {{shards: {written}}}"), *FLAGS[:2], *FLAGS[4:]])
    assert config.data.shards == read
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "saved.yaml") == config
    assert parse_config(["--config", str(tmp_path / "saved.yaml"), "--data.shards", "a:2"]).data.shards == ("a:2",)


FREE_ON_RESUME = {
    *("run_dir", "device", "loss.mode", "model.block", "model.attention", "optim.optimizer", "text.name"),
    *("data.shards", "data.text_embeddings", "data.workers", "data.prefetch_batches", "data.max_skipped_fraction"),
    *("data.image_fields", "data.caption_fields"),
    *("data.cache_dir", "data.cache_gb", "data.fetchers"),
}


def test_resuming_asks_for_the_same_result_and_nothing_else():
    config = parse_config(FLAGS)
    names, fixed = (dict(config.leaves(resume=resume)) for resume in (False, True))
    sections = ("step.", "evals.", "checkpoint.", "log.")
    assert names.keys() - fixed.keys() == FREE_ON_RESUME | {name for name in names if name.startswith(sections)}
    free = replace(config, run_dir="elsewhere", device="cpu", log=replace(config.log, every=3))
    free = replace(free, step=replace(free.step, micro_batch=2), data=replace(free.data, shards=("moved",), workers=2))
    require_same_run(config, free, Path("runs/x"))

    other = replace(config, optim=replace(config.optim, learning_rate=5.0), seed=1)
    changes = r"optim.learning_rate is 0.001 there and 5.0 here; seed is 42 there and 1 here"
    with pytest.raises(ValueError, match=changes):
        require_same_run(config, other, Path("runs/x"))
