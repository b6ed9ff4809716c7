"""The benchmark of the loss at a size of no interest: it runs, checks itself, and refuses figures of wrong results."""

import json

import pytest
import torch

from textlock.bench import contrastive as bench

TINY = bench.Options(batch=(24,), width=(16,), seconds=0.001)


def lines_of(options, capsys):
    bench.main(options)
    return {line["loss"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}


@pytest.mark.parametrize("world", [1, 3])
def test_every_candidate_is_checked_and_measured(world, capsys):
    lines = lines_of(bench.replace(TINY, world=world), capsys)
    assert set(lines) >= {"chunked", "open_clip"}
    for line in lines.values():
        assert line["case"]["B"] == 24 * world
        assert line["ms"] > 0 and line["floor_ms"] > 0 and line["peak_bytes"] > 0
        assert max(line["errors"].values()) < 1e-3
        assert line["device"] and line["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_wrong_result_prints_no_figure(capsys, monkeypatch):
    right = bench.contrastive.contrastive_loss

    def wrong(*arguments, mode="auto", **settings):
        loss = right(*arguments, mode=mode, **settings)
        return loss * 1.01 if mode == "chunked" else loss

    monkeypatch.setattr(bench.contrastive, "contrastive_loss", wrong)
    lines = lines_of(TINY, capsys)
    assert "wrong" in lines["chunked"] and "ms" not in lines["chunked"]
    assert "ms" in lines["reference"]
