"""A short run of the fuzzer, in a separate process: a crash of a decoder is an outcome too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzz.py")


def fuzz(*flags):
    return subprocess.run([sys.executable, str(FUZZER), *flags], capture_output=True, text=True, timeout=240)


def test_damaged_input_is_used_or_refused():
    outcome = fuzz("--inputs", "6000", "--seed", "1")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert re.findall(r"^([\w ]+): 2000 inputs", outcome.stdout, re.MULTILINE) == ["images", "captions", "stored rows"]
    for kind in ("used", "truncated", "damaged", "header", "format", "refused"):
        assert f"'{kind}'" in outcome.stdout, f"no input was {kind}: the fuzzer reaches too little"


def test_jpegs_that_pass_the_check_do_not_crash_dali():
    pytest.importorskip("nvidia.dali")
    outcome = fuzz("--dali", "--inputs", "1500", "--seed", "1")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "'batches refused'" in outcome.stdout and "'decoded'" in outcome.stdout
