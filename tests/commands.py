"""The project's commands, run in this process: a process of its own would first import torch and transformers."""

import contextlib
import io
import runpy
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_here(name, *arguments):
    """Run ``python name.py`` or ``python -m name``; return the exit status and what went to stdout and to stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()
