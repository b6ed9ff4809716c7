"""The figures of the pages are those of the newest files, nothing else is touched, and what is missing is named."""

import json
import re
import shutil
from pathlib import Path

import pytest

from textlock.bench import readme
from textlock.bench.readme import PageOptions
from textlock.bench.records import Results

ROOT = Path(__file__).parents[2]
LOSS = {"b": 4096, "B": 8192, "d": 768}


def line(part, operation, case, candidate, ms, **more):
    figures = {"ms": ms, "quartiles_ms": [0.99 * ms, 1.01 * ms], "floor_ms": 0.5, "percent_of_floor": 50 / ms}
    return {"part": part, "operation": operation, "case": case, "candidate": candidate} | figures | more


def lines_of_a_cpu(loss_ms=900.0):
    yield line("loss", "contrastive", LOSS, "ours_chunked", loss_ms, peak_bytes=53 * 2**20)
    yield line("loss", "contrastive", LOSS, "open_clip", 1600.0, peak_bytes=548 * 2**20)
    yield line("loss", "sigmoid", LOSS, "ours_sigmoid_chunked", 700.0, peak_bytes=2**20)
    failed = {"part": "loss", "operation": "sigmoid", "case": LOSS, "candidate": "open_clip_sigmoid"}
    yield failed | {"failed": "time limit"}
    for name, ms in (("ours_all", 4696.0), ("timm", 4742.0)):
        yield line("tower", "tower", {"tower": readme.TOWER, "micro_batch": 8}, name, ms, peak_bytes=2**30)
    for width, height in ((320, 256), (512, 384)):
        rates = {"images_per_second": 3426.0, "images_per_cpu_second": 1910.0}
        yield line("loader", "loader", {"width": width, "height": height, "tower": None}, "ours_cpu", 18.0, **rates)
    for tier, extra in (("all", 0.0), ("no-mlp", 0.09), ("lean", 0.15), ("block", 0.22), ("none", 0.34)):
        figures = {"kept_bytes": 0 if tier == "none" else 11_700_000, "extra_time": extra}
        yield line("plan", "tier", {"tower": readme.TOWER, "tier": tier}, "ours", 1.0, **figures)
    case = {"gpu": "h100", "tower": readme.TOWER, "local_batch": 4096}
    yield line("plan", "plan", case, "ours", 1.0, tiers={"no-mlp": 3, "lean": 5}, extra_time=0.122)
    memory = {"peak_resident_bytes": 3 * 2**30, "resident_bytes_before": 2**30}
    yield line("large_batch", "one_step", {"batch": 65536, "tower": "small"}, "ours", 42e3, **memory)


def lines_of_a_gpu():
    yield line("ceilings", "matrix_bfloat16", {}, "torch", 1.4, tflops=790.0)
    for name, ms in (("ours_store", 2.2), ("open_clip", 11.0)):
        yield line("loss", "contrastive", LOSS | {"B": 65536}, name, ms)
    step = {"local_batch": 4096, "texts": 65536}
    yield line("profile", "nvjet_gemm", step, "ours", 20.0, share=0.4, launches=96)


def write(root, lines, *, device, date, driver=None):
    names = ("ceilings", "loss", "step", "tower", "loader", "large_batch", "plan")
    parts = {name: {"commit": "abcdef0123456789", "date": date} for name in names}
    parts["gather"] = {"tests": {"passed": 7, "failed": []}}
    versions = {"torch": "2.15.0", "triton": "3.9.0"}
    machine = {"device": device, "driver": driver, "versions": versions}
    results = Results(root / "bench" / "results" / f"{device}-{date}.json", machine, parts)
    for one in lines:
        results.add(one)


@pytest.fixture
def world(tmp_path):
    """Make a folder of files of figures and the project's pages with every block empty."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("demo.json", "demo_random_text.json"):
        shutil.copy(ROOT / "bench" / "results" / name, tmp_path / "bench" / "results")
    write(tmp_path, lines_of_a_cpu(), device="some cpu", date="2026-11-02")
    for name in ("README.md", "bench/RESULTS.md"):
        (tmp_path / name).write_text(emptied((ROOT / name).read_text()))
    return tmp_path


def emptied(page):
    return re.sub(r"(<!-- [\w ]+ figures -->\n).*?(<!-- /)", r"\1old\n\2", page, flags=re.DOTALL)


def block_of(root, name):
    page = (root / "README.md").read_text() + (root / "bench" / "RESULTS.md").read_text()
    return " ".join(page.split(f"<!-- {name} figures -->\n")[1].split(f"<!-- /{name} figures -->")[0].split())


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_block_of_both_pages_is_written_and_nothing_else(world):
    readme.main(PageOptions(root=world))
    for name in ("README.md", "bench/RESULTS.md"):
        page = (world / name).read_text()
        assert emptied(page) == emptied((ROOT / name).read_text()) and "\nold\n" not in page
        blocks = "".join(re.findall(r"<!-- [\w ]+ figures -->\n.*?<!-- /", page, re.DOTALL))
        assert all(len(row) <= 120 for row in blocks.splitlines() if not row.startswith("|"))
    claim = block_of(world, "claim")
    assert "take 900 ms and 53 MiB, where open_clip's `ClipLoss` takes 1,600 ms and 548 MiB** (some cpu;" in claim
    assert "4,096 images against 8,192 texts of width 768" in claim
    assert "some cpu" in block_of(world, "loss") and "SigLipLoss" not in block_of(world, "loss")
    assert "| **textlock, `chunked`** | 900 | 1.0 | 0 | 53 |" in block_of(world, "loss")
    assert "4,696" in block_of(world, "tower") and "3,426" in block_of(world, "loader")
    assert "| `lean` | 11.7 MB | and the qkv projection | 15 % |" in block_of(world, "tier")
    assert "mixes `no-mlp` and `lean`: 12 %" in block_of(world, "tier")
    assert "3.00 GiB resident at the peak, of which 1.00" in block_of(world, "large batch")
    assert "No GPU figure yet" in block_of(world, "gpu claim")
    assert (world / "bench" / "results" / "some cpu-2026-11-02.svg").read_text().count("<svg") == 1

    before = contents(world)
    readme.main(PageOptions(root=world))
    assert contents(world) == before
    readme.main(PageOptions(root=world, check=True))


def test_a_figure_that_was_typed_is_found(world, capsys):
    readme.main(PageOptions(root=world))
    for name, typed in (("README.md", "901 ms"), ("bench/RESULTS.md", "901 ")):
        path, right = world / name, (world / name).read_text()
        path.write_text(right.replace("900 ms" if "ms" in typed else "900 ", typed))
        before = contents(world)
        with pytest.raises(SystemExit, match=r"^1$"):
            readme.main(PageOptions(root=world, check=True))
        assert f"error: {path} disagrees with the files of figures" in capsys.readouterr().err
        assert contents(world) == before
        path.write_text(right)


def test_the_newest_file_counts(world):
    write(world, lines_of_a_cpu(loss_ms=1.0), device="another", date="2026-11-03")
    readme.main(PageOptions(root=world))
    assert "| 900 " not in block_of(world, "loss") and "another-2026-11-03.json" in block_of(world, "cpu")


def test_what_was_measured_on_a_gpu_is_shown_with_everything_that_made_it(world):
    write(world, lines_of_a_gpu(), device="NVIDIA H100", driver="580.1", date="2026-11-01")
    readme.main(PageOptions(root=world))
    block = block_of(world, "gpu")
    assert "NVIDIA H100 (driver 580.1, torch 2.15.0, Triton 3.9.0, commit abcdef012345)" in block
    assert "7 GPU tests passed and 0 failed" in block
    assert "790 TFLOP/s" in block and "nvjet_gemm" in block and "| 5.00 " in block
    assert (world / "bench" / re.search(r"\((results/.+\.svg)\)", block)[1]).exists()
    assert "Measured on one NVIDIA H100" in block_of(world, "gpu claim")


def test_missing_figures_and_blocks_are_named(world):
    page = (world / "bench" / "RESULTS.md").read_text()
    for wrong, message in (
        (page.replace("tower figures", "tour figures"), "RESULTS.md has blocks of figures"),
        (page.replace("<!-- /tower figures -->", ""), "RESULTS.md: the block of tower figures has no end"),
    ):
        (world / "bench" / "RESULTS.md").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            readme.main(PageOptions(root=world))
    (path,) = (world / "bench" / "results").glob("some cpu*.json")
    found = json.loads(path.read_text())
    found["figures"] = [line for line in found["figures"] if line["part"] != "tower"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"has nothing of tower in tower with .*: measure it again"):
        readme.main(PageOptions(root=world))
    path.unlink()
    with pytest.raises(ValueError, match="no file of figures of a CPU: make bench writes one"):
        readme.main(PageOptions(root=world))
