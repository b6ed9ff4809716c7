"""Reads captions files: which image has which caption, a row each, in .tsv, .csv or .jsonl.

A .tsv has no quotation marks unless asked: each line is a row and a ``"`` is a character like any other. With them, one
caption that opens with a mark would swallow all rows up to the next. A .csv has them (RFC 4180), so that a cell may
hold commas and line breaks; what looks like a row inside a cell is refused.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .captions import unique_keys

FILE_COLUMNS = ("file", "filepath", "filename")
CAPTION_COLUMNS = ("caption", "title", "text")


class CaptionRows(Protocol):
    """What says which image has which caption."""

    @property
    def path(self) -> Path:
        """The file it is read from, for messages."""

    def rows(self, is_image: Callable[[str], bool]) -> Iterator[tuple[int, str, str]]:
        """Yield (number, file, caption) of every caption; ``where`` says what the number counts."""

    def where(self, number: int) -> str:
        """Return the place of a caption in the file, for messages."""


@dataclass(frozen=True, kw_only=True)
class CaptionsFile:
    """A captions file and how it is read."""

    path: Path
    quoting: bool = False
    """A .tsv has quotation marks around cells, as a .csv has."""
    file_column: str | None = None
    """Column of the image files; None for the one of FILE_COLUMNS that is there."""
    caption_column: str | None = None
    """Column of the captions; None for the one of CAPTION_COLUMNS that is there."""

    def where(self, number: int) -> str:
        """Return the place of a line in words."""
        return f"{self.path} line {number}"

    def rows(self, is_image: Callable[[str], bool]) -> Iterator[tuple[int, str, str]]:
        """Yield (line number, file, caption) of every row.

        ``is_image`` says of a name whether it is that of an image. Where a cell with line breaks names one, it is
        no caption but rows that a quotation mark has joined.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another extension, no such columns or more than one of a kind, or a line that cannot be read.
        """
        if not self.path.is_file():
            raise FileNotFoundError(f"no captions file {self.path}")
        suffix = self.path.suffix.lower()
        if suffix not in (".tsv", ".csv", ".jsonl"):
            raise ValueError(f"{self.path}: the captions file must be .tsv, .csv or .jsonl")
        try:
            for line, row in _json_lines(self.path) if suffix == ".jsonl" else self._table(suffix, is_image):
                where = self.where(line)
                file = _column(row, self.file_column, FILE_COLUMNS, "--file-column", where)
                column = _column(row, self.caption_column, CAPTION_COLUMNS, "--caption-column", where)
                name, caption = row[file], row[column]
                if not isinstance(name, str) or not isinstance(caption, str) or not name:
                    raise ValueError(f"{where}: {file} and {column} must both hold text")
                yield line, name, caption
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from error

    def _table(self, suffix: str, is_image: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        quoted = suffix == ".csv" or self.quoting
        delimiter = "\t" if suffix == ".tsv" else ","
        with open(self.path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(
                file, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            )
            try:
                header = next(reader, [])
                if not quoted and any(len(name) > 1 and name[0] == name[-1] == '"' for name in header):
                    raise ValueError(f"{self.path} line 1: the cells stand in quotation marks: say so by --quoting")
                twice = [name for name, count in Counter(header).items() if count > 1]
                if twice:
                    raise ValueError(f"{self.path} line 1: the header names {', '.join(twice)} more than once")
                before = 1
                for cells in reader:
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        raise ValueError(
                            f"{self.path} line {reader.line_num}: it has {len(cells)} columns and not the "
                            f"{len(header)} of the header line"
                        )
                    if quoted:
                        self._require_no_row_inside(cells, delimiter, before, reader.line_num, is_image)
                    before = reader.line_num
                    yield reader.line_num, dict(zip(header, cells, strict=True))
            except csv.Error as error:
                # The line after the last good row: an open quotation mark is only noticed at the end of the file.
                raise ValueError(f"{self.path} line {before + 1}: {error}; quote the caption, or use .jsonl") from error

    def _require_no_row_inside(
        self, cells: list[str], delimiter: str, before: int, last: int, is_image: Callable[[str], bool]
    ) -> None:
        """Raise ValueError where a cell of several lines holds what reads as a part of a row: it names an image too."""
        for cell in cells if last - before > 1 else ():
            parts = [part.strip().strip('"') for line in cell.splitlines() for part in line.split(delimiter)]
            named = next((part for part in parts if part and is_image(part)), None)
            if len(parts) > 1 and named is not None:
                raise ValueError(
                    f"{self.path} lines {before + 1} to {last}: a quotation mark makes one row of them, and a cell of "
                    f"several lines names {named}; double the marks inside a caption, or use .jsonl"
                )


def _column(row: dict[str, Any], asked: str | None, accepted: tuple[str, ...], flag: str, where: str) -> str:
    found = [column for column in accepted if column in row] if asked is None else [asked] if asked in row else []
    if len(found) == 1:
        return found[0]
    seen = ", ".join(map(str, row))
    if found:
        raise ValueError(f"{where}: {' and '.join(found)} are both columns; say by {flag} which one is meant")
    wanted = asked or f"{', '.join(accepted[:-1])} or {accepted[-1]}"
    raise ValueError(f"{where}: no column {wanted}; the columns are: {seen}")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=unique_keys)
            except KeyError as error:
                raise ValueError(f"{path} line {number} names {error.args[0]} more than once") from error
            except (ValueError, RecursionError) as error:
                why = (
                    error if isinstance(error, json.JSONDecodeError) else "it is nested too deeply or has a huge number"
                )
                raise ValueError(f"{path} line {number} is not JSON: {why}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is not a JSON object")
            yield number, row
