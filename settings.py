"""Settings: frozen dataclasses whose fields say, next to their type, what they may hold.

    @dataclass(frozen=True, kw_only=True)
    class DataConfig(Settings, section="data"):
        workers: Annotated[int, at_least(1)]

Each class lives next to what it configures. Its fields are checked when an object is made, so an impossible one does
not exist, and every message names the command-line flag: ``--data.workers is 0, must be at least 1``.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Final, Literal, NoReturn, get_args, get_origin, get_type_hints

# A field so marked may differ when a run is resumed: it decides memory, speed or where things lie, not the result. The
# shards and the text tower may have moved: their fingerprints, kept in the checkpoint, say whether they are the same.
FREE_ON_RESUME: Final = "free on resume"


@dataclass(frozen=True)
class Bound:
    """What the value of a field must be; of a tuple, each of its values unless ``of_all``. None is never checked."""

    holds: Callable[[Any], bool]
    must: str
    of_all: bool = False

    def __call__(self, value: Any) -> bool:
        """Whether ``value`` may be."""
        if value is None:
            return True
        return all(map(self.holds, value)) if isinstance(value, tuple) and not self.of_all else self.holds(value)


def at_least(least: float) -> Bound:
    """No less than ``least``."""
    return Bound(lambda value: value >= least, f"be at least {least}")


def at_most(most: float) -> Bound:
    """No more than ``most``."""
    return Bound(lambda value: value <= most, f"be at most {most}")


def above(limit: float) -> Bound:
    """Greater than ``limit``."""
    return Bound(lambda value: value > limit, f"be above {limit}")


def below(limit: float) -> Bound:
    """Less than ``limit``."""
    return Bound(lambda value: value < limit, f"be below {limit}")


NOT_EMPTY: Final = Bound(lambda text: bool(text.strip()), "not be empty")
RISING: Final = Bound(lambda pair: pair[0] <= pair[1], "be two numbers, the smaller one first", of_all=True)
# Of every number.
_FINITE: Final = Bound(lambda value: isinstance(value, int) or math.isfinite(value), "be a finite number")
_STORABLE: Final = Bound(lambda value: isinstance(value, float) or value < 2**63, "be less than 2^63")


class Settings:
    """Base of every configuration dataclass. ``section`` is what comes before the field in its flag."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None) -> None:
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        """Raise ValueError, naming the flag, for the first value that its field may not hold."""
        for name, bounds in _bounds(type(self)).items():  # type: ignore[arg-type]  # a class is hashable
            value = getattr(self, name)
            for bound in bounds:
                if not bound(value):
                    self.refuse(name, bound.must)

    @classmethod
    def flag(cls, name: str) -> str:
        """Return the command-line flag of a field."""
        return f"--{cls.section and cls.section + '.'}{name}".replace("_", "-")

    def refuse(self, name: str, must: str) -> NoReturn:
        """Raise the ValueError of a field whose value must be another."""
        value = getattr(self, name)
        raise ValueError(f"{self.flag(name)} is {repr(value) if isinstance(value, str) else value}, must {must}")

    def leaves(self, *, resume: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield name and value of every field, those of sections as ``section.field``.

        With ``resume`` only those that must be the same when a run is resumed.
        """
        marks = get_type_hints(type(self), include_extras=True)
        for entry in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if resume and FREE_ON_RESUME in _marks(marks[entry.name]):
                continue
            value = getattr(self, entry.name)
            if isinstance(value, Settings):
                yield from value.leaves(resume=resume, prefix=f"{prefix}{entry.name}.")
            else:
                yield prefix + entry.name, value


def _marks(hint: Any) -> Sequence[Any]:
    return getattr(hint, "__metadata__", ())


@cache
def _bounds(kind: type[Settings]) -> dict[str, list[Bound]]:
    """Return what each field must be: its marks, and what follows from its type."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        marks = [mark for mark in _marks(hints[entry.name]) if isinstance(mark, Bound)]
        found[entry.name] = [*_of_type(hints[entry.name]), *marks]
    return found


def _of_type(hint: Any) -> Iterator[Bound]:
    if _marks(hint):
        hint = get_args(hint)[0]
    inner = {hint, *get_args(hint)}
    for choice in inner:
        if get_origin(choice) is Literal:
            names = get_args(choice)
            yield Bound(names.__contains__, f"be one of {', '.join(names)}")
    if inner & {int, float}:
        yield _FINITE
        yield _STORABLE


def exit_with(error: Exception) -> NoReturn:
    """End a command line on bad input: one sentence on stderr, exit status 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
