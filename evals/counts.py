"""What figures are of, in words."""

from collections.abc import Mapping
from typing import Any


def list_kinds(counted: Mapping[str, int]) -> str:
    """Write how many there are of each kind."""
    return ", ".join(f"{number} {name}" for name, number in sorted(counted.items()))


def describe_count(count: Mapping[str, Any]) -> str:
    """Write one of ``EvaluationSuite.counts`` for people."""
    parts = [f"{count[what]:,} {what}" for what in ("images", "captions", "classes") if what in count]
    for what, words in (("skipped", "that cannot be read"), ("left", "of other kinds in the folders")):
        if counted := count.get(what):
            parts.append(f"without {sum(counted.values()):,} {words} ({list_kinds(counted)})")
    return ", ".join(parts)
