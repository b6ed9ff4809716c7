"""The README's figures: they are those of the newest files, nothing else is touched, and what is missing is named."""

import json
import re
import shutil
from pathlib import Path

import pytest

from textlock.bench import report
from textlock.bench.records import Results
from textlock.bench.report import Options

ROOT = Path(__file__).parents[2]
TORCH = {"torch": "2.15.0", "triton": "3.9.0"}


def line(part, operation, case, candidate, ms, **more):
    figures = {"ms": ms, "quartiles_ms": [0.99 * ms, 1.01 * ms], "floor_ms": 0.5, "percent_of_floor": 50 / ms}
    return {"part": part, "operation": operation, "case": case, "candidate": candidate} | figures | more


LOSS = {"b": 4096, "B": 8192, "d": 768}
TOWER = {"tower": report.TOWER, "micro_batch": 8}


def lines_of_a_cpu():
    yield line("ceilings", "copy", {}, "torch", 1.0, gigabytes_per_second=20.0)
    for name, ms in (("ours_chunked", 900.0), ("open_clip", 1600.0)):
        yield line("loss", "contrastive", LOSS, name, ms, peak_bytes=53 * 2**20)
    yield line("loss", "sigmoid", LOSS, "ours_sigmoid_chunked", 700.0, peak_bytes=2**20)
    yield {
        "part": "loss",
        "operation": "sigmoid",
        "case": LOSS,
        "candidate": "open_clip_sigmoid",
        "failed": "time limit",
    }
    for name, ms in (("ours_all", 4696.0), ("timm", 4742.0)):
        yield line("tower", "tower", TOWER, name, ms, peak_bytes=2**30)
    for width, height in ((320, 256), (512, 384)):
        case = {"width": width, "height": height, "tower": None}
        rates = {"images_per_second": 3426.0, "images_per_cpu_second": 1910.0}
        yield line("loader", "loader", case, "ours_cpu", 18.0, **rates)
    for tier, extra in (("all", 0.0), ("no-mlp", 0.09), ("lean", 0.15), ("block", 0.22), ("none", 0.34)):
        case = {"tower": report.TOWER, "tier": tier}
        figures = {"kept_bytes": 0 if tier == "none" else 11_700_000, "extra_time": extra}
        yield {"part": "plan", "operation": "tier", "case": case, "candidate": "ours"} | figures
    case = {"gpu": "h100", "tower": report.TOWER, "local_batch": 4096}
    figures = {"tiers": {"no-mlp": 3, "lean": 5}, "extra_time": 0.122}
    yield {"part": "plan", "operation": "plan", "case": case, "candidate": "ours"} | figures
    memory = {"peak_resident_bytes": 3 * 2**30, "resident_bytes_before": 2**30}
    case = {"batch": 65536, "tower": "small"}
    yield line("large_batch", "one_step", case, "ours", 42e3, **memory)


def lines_of_a_gpu():
    yield line("ceilings", "matrix_bfloat16", {}, "torch", 1.4, tflops=790.0)
    for name, ms in (("ours_store", 2.2), ("open_clip", 11.0)):
        yield line("loss", "contrastive", LOSS | {"B": 65536}, name, ms)
    step = {"local_batch": 4096, "texts": 65536}
    yield line("profile", "nvjet_gemm", step, "ours", 20.0, share=0.4, launches=96)


def write(folder, lines, *, device, driver, date):
    names = ("ceilings", "loss", "step", "tower", "loader", "large_batch", "plan")
    parts = {name: {"commit": "abcdef0123456789", "date": date} for name in names}
    parts["gather"] = {"tests": {"passed": 7, "failed": []}}
    results = Results(folder / f"{device}-{date}.json", {"device": device, "driver": driver, "versions": TORCH}, parts)
    for one in lines:
        results.add(one)


@pytest.fixture
def world(tmp_path):
    """Make a folder of files and a page with every block, empty."""
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(ROOT / "bench" / "results" / "demo.json", results)
    write(results, lines_of_a_cpu(), device="cpu", driver=None, date="2026-11-02")
    blocks = report.blocks(results)
    page = "# Title\n\nthese words stay\n\n"
    page += "\n".join(f"<!-- {name} figures -->\nold\n<!-- /{name} figures -->\nbetween" for name in blocks)
    readme = tmp_path / "README.md"
    readme.write_text(page + "\n\nthe end\n")
    return Options(results=results, readme=readme)


def block_of(readme, name):
    return readme.read_text().split(f"<!-- {name} figures -->\n")[1].split(f"<!-- /{name} figures -->")[0]


def test_every_block_is_written_and_nothing_else(world):
    before = world.readme.read_text()
    report.main(world)
    page = world.readme.read_text()
    blocks = r"(<!-- [\w ]+ figures -->\n).*?(<!-- /)"
    assert re.sub(blocks, r"\1\2", page, flags=re.DOTALL) == re.sub(blocks, r"\1\2", before, flags=re.DOTALL)
    assert "\nold\n" not in page
    losses = [[cell.strip() for cell in row.split("|")[1:-1]] for row in block_of(world.readme, "loss").splitlines()]
    assert ["**textlock, `chunked`**", "900", "1.0", "0", "53"] in losses and "SigLipLoss" not in page
    assert "4,696" in block_of(world.readme, "tower") and "3,426" in block_of(world.readme, "loader")
    tiers = " ".join(block_of(world.readme, "tier").split())
    assert "| `lean` | 11.7 MB | and the qkv projection | 15 % |" in tiers
    assert "mixes `no-mlp` and `lean`: 12 %" in tiers
    assert "3.00 GiB resident at the peak, of which 1.00" in " ".join(block_of(world.readme, "large batch").split())
    assert "no GPU figure is claimed" in block_of(world.readme, "gpu")
    assert all(len(row) <= 120 for row in page.splitlines() if not row.startswith("|"))
    assert (world.results / "cpu-2026-11-02.svg").read_text().count("<svg") == 1


def test_the_same_files_give_the_same_page_and_picture(world):
    report.main(world)
    page, picture = world.readme.read_text(), (world.results / "cpu-2026-11-02.svg").read_bytes()
    report.main(world)
    assert (world.readme.read_text(), (world.results / "cpu-2026-11-02.svg").read_bytes()) == (page, picture)
    report.main(Options(check=True, results=world.results, readme=world.readme))


def test_a_figure_that_was_typed_is_found(world, capsys):
    report.main(world)
    world.readme.write_text(world.readme.read_text().replace("| 900 ", "| 899 "))
    with pytest.raises(ValueError, match="does not say what the files of figures say"):
        report.main(Options(check=True, results=world.results, readme=world.readme))
    assert "-| **textlock, `chunked`**" in capsys.readouterr().err and "| 899 " in world.readme.read_text()


def test_the_newest_file_counts(world):
    newer = [one | {"ms": 1.0} if one["part"] == "loss" and "ms" in one else one for one in lines_of_a_cpu()]
    write(world.results, newer, device="another", driver=None, date="2026-11-03")
    report.main(world)
    assert "| 900 " not in block_of(world.readme, "loss") and "another-2026-11-03.json" in block_of(
        world.readme, "loss"
    )


def test_what_was_measured_on_a_gpu_is_shown_with_everything_that_made_it(world):
    write(world.results, lines_of_a_gpu(), device="NVIDIA H100", driver="580.1", date="2026-11-01")
    report.main(world)
    block = block_of(world.readme, "gpu")
    assert "NVIDIA H100 (driver 580.1, torch 2.15.0, Triton 3.9.0, commit abcdef012345)" in " ".join(block.split())
    assert "7 GPU tests passed and 0 failed" in " ".join(block.split())
    assert "790 TFLOP/s" in block and "nvjet_gemm" in block and "| 5.00 " in block
    picture = re.search(r"\((bench/results/.+\.svg)\)", block)[1]
    assert (world.results / Path(picture).name).exists()


def test_missing_figures_are_named(world):
    (path,) = world.results.glob("cpu*.json")
    found = json.loads(path.read_text())
    found["figures"] = [line for line in found["figures"] if line["part"] != "tower"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"has nothing of tower in tower with .*: measure it again"):
        report.main(world)
    path.unlink()
    with pytest.raises(ValueError, match="no file of figures of a CPU: make bench writes one"):
        report.main(world)


def test_a_page_without_one_of_the_blocks_is_an_error(world):
    world.readme.write_text(world.readme.read_text().replace("tower figures", "tour figures"))
    with pytest.raises(ValueError, match="the page has blocks of figures"):
        report.main(world)
    world.readme.write_text(world.readme.read_text().replace("<!-- /tour figures -->", "").replace("tour", "tower"))
    with pytest.raises(ValueError, match="the block of tower figures has no end"):
        report.main(world)
