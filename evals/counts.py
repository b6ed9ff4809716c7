"""What figures are of, in words."""

from collections.abc import Mapping
from typing import Any


def describe_count(count: Mapping[str, Any]) -> str:
    """Write one of ``EvaluationSuite.counts`` for people."""
    parts = [f"{count[what]:,} {what}" for what in ("images", "captions", "classes") if what in count]
    for what, words in (("skipped", "that cannot be read"), ("left", "of other kinds in the folders")):
        if counted := count.get(what):
            kinds = ", ".join(f"{number} {name}" for name, number in sorted(counted.items()))
            parts.append(f"without {sum(counted.values()):,} {words} ({kinds})")
    return ", ".join(parts)
