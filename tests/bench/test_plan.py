"""The table of plans: what it promises of the published tower, and that its columns follow from the same costs."""

from dataclasses import replace

import pytest

from textlock.bench import plan as bench

MICRO = bench.PlanOptions(tower="eva02_micro_patch8_32", local_batches=(1024, 4096), texts=4096, gpus=("h100",))


@pytest.fixture(scope="module")
def costs():
    return bench.Costs.of("eva02_base_patch16_224")


def plan(costs, gpu, local_batch, **changes):
    return bench.plan_on(costs, gpu, replace(bench.PlanOptions(), **changes), local_batch)


def test_4096_images_on_80_gb_cost_at_most_13_percent_and_the_usual_ways_a_third(costs):
    outcome = plan(costs, "h100", 4096)
    assert 0 < outcome["extra_time"] <= 0.13
    for peer in outcome["peers"].values():
        assert peer["fits"] and peer["extra_time"] == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("gpu", bench.USABLE_GIB)
@pytest.mark.parametrize("local_batch", bench.PlanOptions().local_batches)
def test_every_plan_fits_its_gpu_and_is_faster_than_gradcache(costs, gpu, local_batch):
    outcome = plan(costs, gpu, local_batch)
    assert sum(outcome["tiers"].values()) == local_batch // 512
    assert outcome["fits"] and outcome["peak_bytes"] <= (bench.USABLE_GIB[gpu] - bench.CONTEXT_GIB) * 2**30
    assert outcome["extra_time"] < outcome["peers"]["gradcache"]["extra_time"]
    assert outcome["peers"]["gradcache"]["tiers"] == {"none": local_batch // 512}


def test_more_memory_costs_less_time_and_more_images_more(costs):
    times = {
        gpu: [plan(costs, gpu, local_batch)["extra_time"] for local_batch in (1024, 4096, 16384, 65536)]
        for gpu in ("h100", "h200")
    }
    assert times["h100"] == sorted(times["h100"]) and times["h200"] == sorted(times["h200"])
    assert times["h100"][0] == times["h200"][0] == 0
    assert all(small > large for small, large in zip(times["h100"][1:], times["h200"][1:], strict=True))


def test_checkpoints_keep_the_input_of_every_block_of_the_whole_local_batch(costs):
    outcome = plan(costs, "h100", 1024)["peers"]["checkpoints"]
    block_inputs = 1024 * 12 * 197 * 768 * 2
    assert block_inputs <= outcome["kept_bytes"] <= 1.25 * block_inputs
    assert not plan(costs, "h100", 16384)["peers"]["checkpoints"]["fits"]


def test_lines_and_table_say_the_same(measure):
    lines, table = measure(bench.BENCHMARK, MICRO)
    tiers = {line["case"]["tier"]: line for line in lines if line["operation"] == "tier"}
    assert list(tiers) == ["all", "no-mlp", "lean", "block", "none"]
    assert tiers["none"]["kept_bytes"] == tiers["all"]["extra_time"] == 0 < tiers["lean"]["extra_time"]
    lines = [line for line in lines if line["operation"] == "plan"]
    assert [line["case"]["local_batch"] for line in lines] == [1024, 4096] and lines[0]["case"]["micro_batch"] == 512
    for line in lines:
        assert line["extra_time"] == 0 and line["tiers"] == {"all": line["case"]["local_batch"] // 512}
        assert f"{line['kept_bytes'] / 2**30:.1f}" in table
    assert "8 all" in table


def test_where_nothing_fits_the_reason_is_told(monkeypatch, measure):
    monkeypatch.setitem(bench.USABLE_GIB, "h100", bench.CONTEXT_GIB + 0.01)
    lines, table = measure(bench.BENCHMARK, replace(MICRO, local_batches=(512,), texts=512))
    assert lines[-1]["absent"].startswith("512 images on h100: ") and lines[-1]["absent"] in table
