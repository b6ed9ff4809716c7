"""What a figure was measured with: versions, commit, device."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = (
    "textlock",
    "torch",
    "triton",
    "transformers",
    "timm",
    "nvidia-dali-cuda130",
    "flash-attn",
    "open-clip-torch",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the checkout this runs from, "-dirty" after it if files differ.

    A copy without history is what TEXTLOCK_COMMIT says it is, or None.
    """
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TEXTLOCK_COMMIT")
    return answer.stdout.strip()


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """Return the processor's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or sys.platform
