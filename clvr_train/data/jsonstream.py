"""JSON records out of a file of any size: a record at a time, and on to the next after a bad one.

`datasets` and pyarrow read JSON by blocks: they end at the first bad record, which they name by its place in a block.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from clvr_train.data.records import FieldError

MAX_RECORD_BYTES = 64 << 20
_CHUNK = 1 << 20
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of other bytes
_MARGIN = 16  # the longest token that is no string: this close to the end of a chunk nothing is certain
_SPACE = re.compile(r"[ \t\n\r]*")
_TOO_LONG = FieldError("record", f"longer than {MAX_RECORD_BYTES} bytes", "too_long")


def is_array(file: Path) -> bool:
    """Whether a JSON file is one array of records; otherwise a record is a line."""
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def lines(file: Path) -> Iterator[tuple[int, int, bytes | FieldError]]:
    """(number from 1, bytes of the file, line) of a file with a record a line."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) <= MAX_RECORD_BYTES:
                yield number, len(line), line
                continue
            yield number, len(line), _TOO_LONG
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK)


def parse_line(line: bytes) -> object:
    """The record of a line.

    Raises:
        FieldError: if it is no JSON, or no UTF-8.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _no_line(error, "bad_utf8") from error
    except (ValueError, RecursionError) as error:
        text = line.decode("utf-8-sig").rstrip()
        rule = "truncated_json" if text and _at_end(error, len(text)) else "bad_json"
        raise _no_line(error, rule) from error


def elements(file: Path) -> Iterator[tuple[int, int, object]]:
    """(number from 1, characters, record or FieldError) of a file that is one array; holds a record and a MiB of text.

    After a record that is no JSON the next one cannot be found: its error is the last item. So is that of what follows
    the array.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        text = _Text(stream)
        number = 1
        text.skip("[")
        closed = text.skip("]")
        while not closed:
            record, size = text.record()
            yield number, size, record
            number += 1
            if isinstance(record, FieldError) and record.rule != "bad_utf8":
                return
            closed = text.skip("]")
            if not closed and not text.skip(","):
                rule = "bad_json" if text.peek() else "truncated_json"
                yield number, 0, FieldError("record", "not JSON: ',' or ']' must follow a record", rule)
                return
        if text.peek():
            message = "not JSON: only white space may follow the ']' that ends the array"
            yield number, 0, FieldError("record", message, "bad_json")


class _Text:
    """A text file from a place on; more of it is read when a record does not end in what is there."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.at, self.ended = stream, "", 0, False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def skip(self, character: str) -> bool:
        """Go over the next character if it is this one."""
        found = self.peek() == character
        self.at += found
        return found

    def record(self) -> tuple[object, int]:
        """The next JSON value, or the FieldError that says why there is none, and its length."""
        self.peek()
        while True:
            start, error = self.at, None
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, start)
            except (ValueError, RecursionError) as caught:
                error = caught
            margin = 0 if self.ended else _MARGIN
            if error is None and end + margin <= len(self.text):
                self.at = end
                if _NOT_UTF8.search(self.text, start, end):
                    value = FieldError("record", "not JSON in UTF-8", "bad_utf8")
                return value, end - start
            size = len(self.text) - start
            cut = error is None or _at_end(error, len(self.text.rstrip()) - margin)
            if self.ended or not cut:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error  # places are those of a chunk
                rule = "truncated_json" if cut else "bad_json"
                return FieldError("record", f"not JSON ({reason})", rule), size
            if size > MAX_RECORD_BYTES:
                return _TOO_LONG, size
            self._more()

    def _more(self) -> None:
        rest = self.text[self.at :]
        part = self.stream.read(max(_CHUNK, len(rest)))  # twice as much each time: the work stays linear
        self.text, self.at, self.ended = rest + part, 0, not part


def _at_end(error: BaseException, end: int) -> bool:
    """Whether JSON only lacks its end."""
    unfinished = isinstance(error, json.JSONDecodeError)
    return unfinished and (error.msg.startswith("Unterminated string") or error.pos >= end)


def _no_line(error: BaseException, rule: str) -> FieldError:
    return FieldError("record", f"not a line of JSON in UTF-8 ({' '.join(str(error).split())})", rule)
