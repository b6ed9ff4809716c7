"""The words of the demo: those of its captions, and other words for the same that no caption holds.

An image tower trained into the space of a frozen text tower that has read much more than these captions should
understand the other words too, without ever having met one. ``OTHER_WORDS`` were fixed before anything was trained:
each is a common synonym, or what a dictionary names next to the word.
"""

import json
from pathlib import Path

COLOUR_WORDS = {
    "red": "crimson",
    "yellow": "golden",
    "green": "emerald",
    "blue": "azure",
    "purple": "violet",
    "pink": "rosy",
    "brown": "chestnut",
    "black": "ebony",
}
THING_WORDS = {
    "house": "home",
    "car": "automobile",
    "boat": "ship",
    "cup": "mug",
    "plate": "dish",
    "chair": "seat",
    "umbrella": "parasol",
    "mushroom": "toadstool",
    "moon": "crescent",
    "flower": "blossom",
    "hat": "cap",
    "plane": "aircraft",
    "bicycle": "bike",
    "lamp": "lantern",
    "bottle": "flask",
    "cat": "kitten",
    "rabbit": "bunny",
    "snake": "serpent",
    "present": "gift",
    "crown": "tiara",
    "dress": "gown",
    "rocket": "spaceship",
    "ghost": "phantom",
    "flag": "banner",
}
SIZE_WORDS = {"small": "tiny", "large": "huge"}
COUNT_WORDS = {"two": "couple", "three": "trio", "four": "quartet"}

# Every word that no training caption may hold.
OTHER_WORDS = frozenset(
    other for words in (COLOUR_WORDS, THING_WORDS, SIZE_WORDS, COUNT_WORDS) for other in words.values()
)


def write_other_names(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Write the names of the classes <colour>_<thing> in other words, as ``evals.zero_shot_renamed`` reads them."""
    names = {f"{colour}_{thing}": f"{COLOUR_WORDS[colour]} {THING_WORDS[thing]}" for colour, thing in pairs}
    path.write_text(json.dumps(names, indent=1) + "\n")
