"""Files of figures: one line a candidate, later ones in place of earlier ones, contests and tables."""

import json

import pytest

from textlock.bench import records
from textlock.bench.records import Results, comparison_table, contests, number, profile_table, read_figures, slug

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "versions": {"torch": "2.11.0"}}
CASE = {"b": 4096, "B": 65536, "d": 768, "scale": 50.0}


def line(candidate, ms=None, *, part="loss", operation="contrastive", case=CASE, **more):
    times = {} if ms is None else {"ms": ms, "quartiles_ms": [0.98 * ms, 1.02 * ms], "runs": 9}
    return {"part": part, "operation": operation, "case": case, "candidate": candidate} | times | more


def cells_of(table):
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def test_a_figure_replaces_an_older_one_but_nothing_does_not(tmp_path):
    results = Results(tmp_path / "a.json", MACHINE, {"loss": {"commit": "abc"}})
    results.add(line("ours", 3.0, device="dropped", versions={}, commit="dropped"))
    results.add(line("open_clip", failed="out of memory"))
    results.add(line("ours", 2.0))
    results.add(line("ours", failed="time limit"))
    results.add(line("open_clip", 9.0))
    results.add(line("ours", 5.0, case=CASE | {"b": 16384}))
    found = read_figures(results.path)
    assert [(entry["candidate"], entry["ms"]) for entry in found] == [("ours", 2.0), ("open_clip", 9.0), ("ours", 5.0)]
    assert all(entry["device"] == MACHINE["device"] and entry["commit"] == "abc" for entry in found)
    assert all(
        json.loads(text.strip().rstrip(",")) for text in results.path.read_text().splitlines() if '"part"' in text
    )


def test_a_run_of_some_parts_on_the_same_day_keeps_the_others(tmp_path):
    first = Results.open(tmp_path, MACHINE, ())
    for part in ("loss", "tower", "gemm"):
        first.parts[records.suite_part({"part": part})] = {"commit": "abc"}
        first.add(line("ours", 3.0, part=part))
    second = Results.open(tmp_path, MACHINE, ("loss", "ceilings"))
    assert second.path == first.path and [entry["part"] for entry in second.figures] == ["tower"]
    assert second.parts.keys() == {"tower"}
    other = Results.open(tmp_path, MACHINE | {"versions": {"torch": "2.15.0"}}, ())
    assert other.path.name == first.path.name.replace(".json", "-2.json") and other.figures == []


def test_what_a_benchmark_printed_is_read_as_it_is(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("some text\n" + json.dumps(line("ours", 1.0, commit="abc")) + "\n")
    assert read_figures(path) == [line("ours", 1.0, commit="abc")]
    broken = tmp_path / "broken.json"
    broken.write_text('{"device": "x"}')
    with pytest.raises(ValueError, match="is no file of figures"):
        read_figures(broken)


def test_a_contest_is_won_by_the_fastest_of_each_side():
    lines = [line("ours_store", 2.0), line("open_clip", 8.0), line("ours_recompute", 3.0), line("compiled", 6.0)]
    lines += [line("slow", failed="out of memory"), line("ours_store", 1.0, case=CASE | {"b": 1})]
    first, second = contests(lines)
    assert first.ours["candidate"] == "ours_store" and first.peer["candidate"] == "compiled"
    assert first.data == "4,096 x 65,536 x 768" and len(first.lines) == 5
    assert second.peer is None


def test_the_table_says_how_much_faster_and_why_there_is_nothing():
    lines = [line("ours_store", 2.0, floor_ms=1.0, percent_of_floor=50.0), line("open_clip", 8.0)]
    lines += [
        line("ours_sigmoid", operation="sigmoid", wrong={"loss": 0.5}),
        line("open_clip", 4.0, operation="sigmoid"),
    ]
    lines += [line("torch", 1.0, part="ceilings", operation="copy", case={})]
    first, second = cells_of(comparison_table(lines))
    assert first[:5] == ["contrastive", "4,096 x 65,536 x 768", "ours_store", "2", "2.0"]
    assert first[6:] == ["1", "50", "open_clip", "8", "4.00"]
    assert second[2] == "none: ours_sigmoid is wrong" and second[-3:] == ["open_clip", "4", ""]
    assert comparison_table([]) == ""


def test_the_profile_leaves_out_floors_that_are_not_known():
    case = {"local_batch": 4096, "texts": 65536}
    lines = [
        line("ours", 10.0, part="profile", operation="gemm", case=case, share=0.5, floor_ms=8.0, launches=12),
        line("ours", 2.0, part="profile", operation="idle", case=case, share=0.1),
    ]
    rows = cells_of(profile_table(lines))
    assert rows == [["gemm", "12", "10", "50.0", "8", "80"], ["idle", "", "2", "10.0", "", ""]]


@pytest.mark.parametrize(
    ("value", "shown"), [(None, ""), (1234.5, "1,234"), (99.96, "100"), (12.34, "12.3"), (0.01234, "0.0123")]
)
def test_numbers_have_three_digits(value, shown):
    assert number(value) == shown


def test_a_device_is_part_of_a_name():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
