"""The plan: as many activations as fit, and the count of what autograd saves."""

import pytest
import torch

from textlock.engine.plan import available_bytes, choose_plan, measure_activation_bytes
from textlock.models.vision import build_vision_tower

MEBI = 2**20


def plan(**changes):
    settings = {"local_batch": 64, "micro_batch": 8, "bytes_per_image": MEBI, "keep": "auto", "memory_bytes": 10**12}
    return choose_plan(**{**settings, **changes})


@pytest.mark.parametrize(
    ("memory_mib", "kept"),
    [(1000, 8), (64, 8), (63, 6), (32, 3), (16, 1), (8, 0)],
    ids=["plenty", "just enough", "one short", "half", "two", "one"],
)
def test_auto_keeps_what_fits_beside_the_one_that_runs_again(memory_mib, kept):
    chosen = plan(memory_bytes=memory_mib * MEBI)
    assert chosen.tiers == ("all",) * kept + ("none",) * (8 - kept)
    assert chosen.kept_bytes == kept * 8 * MEBI
    alive = chosen.kept_bytes + (8 * MEBI if kept < 8 else 0)
    assert alive <= memory_mib * MEBI


def test_settings_overrule_the_memory():
    assert plan(keep="all", memory_bytes=0).second_forwards == 0
    assert plan(keep="none").second_forwards == 1


def test_a_micro_batch_larger_than_the_batch_is_the_batch():
    assert plan(micro_batch=512).micro_batch == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"micro_batch": 7}, "does not divide the 64 images"), ({"memory_bytes": MEBI}, "smaller --step.micro-batch")],
    ids=["ragged", "nothing fits"],
)
def test_impossible_plans_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_activation_bytes_scale_with_the_depth_and_ignore_the_weights():
    torch.manual_seed(0)
    off = torch.autocast("cpu", torch.bfloat16, enabled=False)
    tower = build_vision_tower("eva02_micro_patch8_32")
    counted = measure_activation_bytes(tower, off)
    tokens, width, hidden = tower.config.tokens, tower.config.width, tower.config.hidden
    # A block needs at least its two inputs, its packed qkv and attention output, and gate, up and product.
    least = tower.config.depth * tokens * (2 * width + 4 * width + 3 * hidden) * 4
    assert least < counted < 3 * least
    assert measure_activation_bytes(tower, torch.autocast("cpu", torch.bfloat16)) < 0.8 * counted


def test_memory_is_the_setting_or_a_share_of_what_is_free():
    assert available_bytes(torch.device("cpu"), 1.5) == int(1.5 * 2**30)
    assert 0 < available_bytes(torch.device("cpu"), None) < 2**50
