import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clvr_train.data import jsonstream
from clvr_train.data.jsonstream import elements, is_array, lines, parse_line
from clvr_train.data.records import FieldError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def read(text: str | bytes, chunk: int = 7) -> list[object]:
    """What `elements` finds when a chunk is so small that every record is cut."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonstream, "_CHUNK", chunk)
        file = Path(folder, "x.json")
        file.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
        found = list(elements(file))
        assert [number for number, _, _ in found] == list(range(1, len(found) + 1))
        return [item for _, _, item in found]


@settings(max_examples=60, deadline=None)
@given(st.lists(values, max_size=5), st.integers(1, 40), st.booleans(), st.sampled_from([None, 2]))
def test_an_array_is_read_whatever_the_chunk(records: list, chunk: int, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    assert read(f" {text}\n", chunk) == records


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=3), st.data())
def test_an_array_that_is_cut_off_gives_what_is_whole(records: list, data: st.DataObject) -> None:
    text = json.dumps(records)
    found = read(text[: data.draw(st.integers(1, len(text) - 1))])
    whole = [item for item in found if not isinstance(item, FieldError)]
    assert isinstance(found[-1], FieldError) and found[-1].rule in ("truncated_json", "bad_json")
    assert len(whole) == len(found) - 1
    # A number may lose its last digits without a trace; everything else is what it was.
    assert whole[:-1] == records[: len(whole)][:-1]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("[1, 2 3]", ["", "", "bad_json"]),
        ("[1, oops, 3]" + " " * 40, ["", "bad_json"]),
        ("[1, ]", ["", "bad_json"]),
        ("[1, [2", ["", "truncated_json"]),
        ('[{"a": "b', ["truncated_json"]),
        ("[1", ["", "truncated_json"]),
        ("[", ["truncated_json"]),
        ("[]", []),
        ("[" + "[" * 100_000, ["bad_json"]),
        (b'["\xff\xfe", 2]', ["bad_utf8", ""]),
        ("[1]\n[2, 3]", ["", "bad_json"]),
        ("[1] hello", ["", "bad_json"]),
        ("[1]\0\0", ["", "bad_json"]),
        ("[1]]", ["", "bad_json"]),
        ("[][1]", ["bad_json"]),
        ("[1] \r\n\t ", [""]),
        (b"[1]\n\xff", ["", "bad_json"]),
    ],
)
def test_damaged_arrays(text: str | bytes, rules: list[str]) -> None:
    for chunk in (1 << 20, 7):
        found = read(text, chunk)
        assert [item.rule if isinstance(item, FieldError) else "" for item in found] == rules


def test_a_record_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonstream, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(jsonstream, "_CHUNK", 16)
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'"a"\n"' + b"x" * 500 + b'"\n"b"\n')
    found = [item for _, _, item in lines(file)]
    assert (found[0], found[1].rule, found[2]) == (b'"a"\n', "too_long", b'"b"\n')
    file.write_bytes(b'["a", "' + b"x" * 500 + b'", "b"]')
    assert [getattr(item, "rule", item) for _, _, item in elements(file)] == ["a", "too_long"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [(b'{"a": "b', "truncated_json"), (b'{"a": [1', "truncated_json"), (b"\n", "bad_json"), (b"{'a': 1}", "bad_json"),
     (b'{"a": "\xff"}', "bad_utf8"), (b"[" * 100_000, "bad_json"), (b"1" * 5000, "bad_json")],
)  # fmt: skip
def test_damaged_lines(line: bytes, rule: str) -> None:
    with pytest.raises(FieldError) as error:
        parse_line(line)
    assert error.value.rule == rule


def test_array_or_lines(tmp_path: Path) -> None:
    for text, expected in (("[1]", True), ("\ufeff\n [1]", True), ('{"a": 1}', False), ("", False)):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        assert is_array(tmp_path / "x.json") is expected
