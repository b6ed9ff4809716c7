"""A short run of the fuzzer, in a separate process: a crash of a decoder is an outcome too."""

import re
from importlib.util import find_spec

from ..conftest import run


def test_damaged_input_is_used_or_refused_and_crashes_no_decoder():
    dali = ["--dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else []
    outcome = run("-m", "textlock.tests.data.fuzz", "--seed", "1", "--inputs", "6000", *dali)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    said = dict(re.findall(r"^([\w ]+): (.*)$", outcome.stdout, re.MULTILINE))
    reached = {
        "images": ("used", "truncated", "damaged", "header", "format"),
        "captions": ("used", "refused"),
        "stored embeddings": ("used", "refused"),
        **({"dali": ("batches refused", "decoded", "good")} if dali else {}),
    }
    assert said.keys() == reached.keys()
    for name, kinds in reached.items():
        assert all(f"'{kind}'" in said[name] for kind in kinds), f"{name}: the fuzzer reaches too little"
