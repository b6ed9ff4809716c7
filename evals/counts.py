"""What figures are of, in words."""

from collections.abc import Mapping
from typing import Any, Final

# More of an evaluation may not be left out without a word.
MAX_SKIPPED_FRACTION: Final = 0.01


def list_kinds(counted: Mapping[str, int]) -> str:
    """Write how many there are of each kind."""
    return ", ".join(f"{number} {name}" for name, number in sorted(counted.items()))


def describe_count(count: Mapping[str, Any]) -> str:
    """Write one of ``EvaluationSuite.counts`` for people."""
    parts = [f"{count[what]:,} {what}" for what in ("instances", "images", "captions", "classes") if what in count]
    for what, words in (("skipped", "that cannot be read"), ("left", "of other kinds in the folders")):
        if counted := count.get(what):
            parts.append(f"without {sum(counted.values()):,} {words} ({list_kinds(counted)})")
    return ", ".join(parts)


def too_many_skipped(count: Mapping[str, Any]) -> list[str]:
    """Return a sentence where more than ``MAX_SKIPPED_FRACTION`` of the images of a count were left out, else none."""
    skipped = sum(count["skipped"].values())
    if skipped <= MAX_SKIPPED_FRACTION * (count["images"] + skipped):
        return []
    kinds = list_kinds(count["skipped"])
    return [f"{skipped} of {count['images'] + skipped} images cannot be read ({kinds})"]
