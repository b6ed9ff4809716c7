"""The model of a step on many GPUs: its formulas by hand, its files, and a check on two real processes."""

import json
import math
from dataclasses import replace

import pytest

from textlock.bench import scaling as bench
from textlock.bench import scaling_check as check

INSTANT = bench.Link(0.0, math.inf)
PARTS = bench.Parts(
    source="made up",
    tower={8: 1.0, 16: 1.5},
    loss_pair=1e-3,
    loss_fixed=0.01,
    optimizer=0.1,
    deviation=0.0,
    gradient_bytes=4000,
    exposed_bytes=1000,
    row_bytes=8,
    micro_batch=4,
    node=INSTANT,
    network=INSTANT,
    ranks_per_node=8,
    overlap=1.0,
)
MEASURED = check.CheckOptions(ranks=(1, 2), local_batch=8, micro_batch=4, rounds=2)


@pytest.mark.parametrize(
    ("draws", "expected"), [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (4, 1.029375), (10, 1.538753), (4096, 3.6278)]
)
def test_expected_maximum_of_normal_draws(draws, expected):
    """Order statistics of the normal distribution; the last one by simulation."""
    assert bench.expected_maximum(draws) == pytest.approx(expected, abs=5e-3 if draws > 10 else 1e-5)


def test_a_collective_sends_its_bytes_and_waits_for_its_hops():
    link = bench.Link(latency=1.0, bandwidth=100.0)
    assert link.all_gather(800, 1) == link.all_reduce(800, 1) == 0
    assert link.all_gather(800, 8) == 7 + 3
    assert link.all_reduce(800, 8) == 2 * (7 + 3)
    assert link.all_gather(800, 5) == pytest.approx(6.4 + 3)


def test_without_others_to_wait_for_a_step_is_what_was_measured():
    prediction = bench.predict(PARTS, 4, 16)
    assert prediction.seconds.keys() == set(bench.COSTS)
    assert prediction.step == pytest.approx(1.5 + 0.01 + 1e-3 * 16 * 64 + 0.1)
    assert prediction.images_per_second == pytest.approx(16 / prediction.step)


@pytest.mark.parametrize(("images", "seconds"), [(4, 0.5), (8, 1.0), (12, 1.25), (16, 1.5), (64, 6.0)])
def test_the_tower_lies_on_the_line_between_measured_sizes(images, seconds):
    assert PARTS.tower_seconds(images) == pytest.approx(seconds)


def test_everybody_waits_for_the_slowest():
    prediction = bench.predict(replace(PARTS, deviation=0.1), 4, 16)
    compute = sum(prediction.seconds[part] for part in ("tower", "loss", "optimizer"))
    assert prediction.seconds["stragglers"] == pytest.approx(0.1 * 1.029375 * compute, rel=1e-4)
    assert bench.predict(replace(PARTS, deviation=0.1), 1, 16).seconds["stragglers"] == pytest.approx(0)


@pytest.mark.parametrize("ranks", [8, 16])
def test_what_is_hidden_by_computing_and_what_is_not(ranks):
    """Beyond a node the network counts."""
    slow = bench.Link(0.0, 1000.0)
    parts = replace(PARTS, node=slow, network=replace(slow, bandwidth=500.0))
    wire = (ranks - 1) / ranks / (1000 if ranks == 8 else 500)
    tower, texts = 1.5, 16 * ranks
    found = bench.predict(parts, ranks, 16).seconds
    assert found["coupling"] == pytest.approx(2 * wire * 8 * texts)
    assert found["gather"] == pytest.approx(max(0, wire * 8 * texts - tower / 3))
    assert found["reduction"] == pytest.approx(max(2 * wire * 1000, 2 * wire * 4000 - tower * 2 / 3 / 4))
    bare = bench.predict(replace(parts, overlap=0.0), ranks, 16).seconds
    assert bare["gather"] == pytest.approx(wire * 8 * texts)
    assert bare["reduction"] == pytest.approx(2 * wire * 4000)
    fast = bench.predict(replace(parts, node=bench.Link(0, 3e4), network=bench.Link(0, 3e4)), ranks, 16).seconds
    assert fast["gather"] == 0 and fast["reduction"] == pytest.approx(2 * (ranks - 1) / ranks * 1000 / 3e4)


def test_a_slow_loader_is_waited_for_and_a_fast_one_is_not():
    assert bench.predict(replace(PARTS, loader=1e6), 4, 16).seconds["data wait"] == 0
    slow = bench.predict(replace(PARTS, loader=4.0), 4, 16)
    assert slow.step == pytest.approx(4.0) and slow.seconds["data wait"] > 0


def test_processes_that_share_cores_compute_more_slowly():
    alone, shared = (bench.predict(replace(PARTS, slowdown=slow), 4, 16) for slow in (None, {4: 2.0}))
    assert shared.step == pytest.approx(2 * alone.step)


@pytest.fixture
def parts_file(tmp_path):
    path = tmp_path / "parts.json"
    path.write_text(json.dumps(bench.asdict(replace(PARTS, node=bench.Link(1e-6, 1e9), network=bench.Link(1e-5, 1e8)))))
    return path


def test_a_forecast_from_a_file_of_parts(parts_file, measure):
    options = bench.ForecastOptions(parts=parts_file, global_batch=128, local_batch=16, ranks=(8, 16))
    lines, table = measure(bench.BENCHMARK, options)
    cases = [(line["case"]["ranks"], line["case"]["local_batch"]) for line in lines]
    assert cases == [(8, 16), (16, 8), (8, 16), (16, 16)]
    for line in lines:
        assert line["step_ms"] == pytest.approx(1e3 * sum(line["seconds"].values()))
        assert 0 < line["efficiency"] < 1 and line["tower_is_measured"]
        assert line["text_bytes"] == 8 * line["case"]["ranks"] * line["case"]["local_batch"]
    assert lines[0]["step_ms"] == pytest.approx(1e3 * bench.predict(bench.read_parts(parts_file), 8, 16).step)
    assert "tower measured at 8 to 16 images" in table and "128 in all" in table


def step_line(local_batch, tower, **changes):
    case = {"tower": "eva02_micro_patch8_32", "local_batch": local_batch, "texts": 256, "micro_batch": 8}
    seconds = {"tower": tower, "loss": local_batch * 256 * 1e-6, "optimizer": 0.002}
    line = {"candidate": "ours", "case": case, "ms": 1e3 * tower, "quartiles_ms": [99, 101], "seconds": seconds}
    return json.dumps(line | {"device": "a GPU"} | changes)


def test_parts_come_from_lines_of_the_benchmark_of_steps(tmp_path, measure):
    path = tmp_path / "steps.jsonl"
    lines = [step_line(16, 0.1), step_line(64, 0.5), step_line(32, 0.1, candidate="gradcache_eager")]
    path.write_text("\n".join(lines) + "\n")
    options = bench.ForecastOptions(steps=path, loader=5000.0, global_batch=512, local_batch=64, ranks=(8, 64))
    lines, table = measure(bench.BENCHMARK, options)
    found = lines[0]["parts"]
    assert found["tower"] == {"16": 0.1, "64": 0.5}
    assert found["loss_pair"] == pytest.approx(1e-6) and found["optimizer"] == 0.002
    assert found["loader"] == 5000 and found["deviation"] == pytest.approx(2 / 1.349 / 100)
    tower = bench.build_vision_tower("eva02_micro_patch8_32")
    assert found["gradient_bytes"] == 4 * sum(parameter.numel() for parameter in tower.parameters())
    assert 0 < found["exposed_bytes"] < found["gradient_bytes"] and found["row_bytes"] == 2 * 64
    assert "assumed: between nodes a hop takes 25 µs and 200 GB/s" in table
    assert "8*" in table  # 512 / 64 images were not measured


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", step_line(16, 0.1) + "\n" + step_line(32, 0.2, device="another GPU"), "mixes towers or devices"),
        ("steps", step_line(16, 0.1, candidate="open_clip_eager"), "has no figures of ours"),
        *(
            ("parts", text, r"holds no JSON object of measured parts \(source, tower, ")
            for text in ('{"tower": 3}', "{")
        ),
        ("parts", "[]", "holds no JSON object of measured parts"),
    ],
)
def test_a_file_that_gives_no_parts_is_an_error(name, text, message, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        bench.BENCHMARK.run(bench.ForecastOptions(**{name: path}))


@pytest.mark.slow
def test_a_prediction_is_checked_on_real_processes(tmp_path, measure):
    saved = tmp_path / "parts.json"
    lines, _ = measure(check.BENCHMARK, replace(MEASURED, save_parts=saved, limit=200))
    assert [line["case"]["ranks"] for line in lines] == [1, 2]
    for line in lines:
        assert line["predicted_ms"] > 0 and line["true_ms"] > 0
        assert line["ratio"] == pytest.approx(line["predicted_ms"] / line["true_ms"])
    alone, two = (line["seconds"] for line in lines)
    assert alone["coupling"] == alone["reduction"] == alone["stragglers"] == 0
    assert two["coupling"] > 0 and two["reduction"] > 0
    assert bench.read_parts(saved).slowdown.keys() == {1, 2} and bench.read_parts(saved).slowdown[1] == 1


def test_processes_that_fail_are_an_error_and_none_is_left(capfd):
    with pytest.raises(ChildProcessError, match="ended with status"):
        check.start_processes(replace(MEASURED, ranks=(1,), tower="vit_huge", limit=100))
    assert "vit_huge" in capfd.readouterr().err
