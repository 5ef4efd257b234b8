"""Strict JSON: what Python's parser would take and other readers would read differently is refused."""

import pytest

from hmoe_jax.core import CheckpointError
from hmoe_jax.strict_json import parse_object


def test_an_object_is_read_as_python_reads_it():
    assert parse_object(b' {"a": [1, 2.5, null], "\\u00e9": {"b": true}}\n', file="f") == {
        "a": [1, 2.5, None],
        "é": {"b": True},
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting ',' delimiter"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'{"a": [{"b": {"c": 1, "c": 2}}]}', "duplicate key 'c'"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        ('{"a": 1}'.encode("utf-16"), "'utf-8' codec"),
        (b'{"a": "\n"}', "Invalid control character"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"a": ' + b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 1_000_000, "nested too deeply"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_ambiguous_or_broken_json_is_refused(text, problem):
    with pytest.raises(CheckpointError, match=r"^f: not valid JSON") as caught:
        parse_object(text, file="f")
    assert problem in str(caught.value)
    assert caught.value.file == "f"


@pytest.mark.parametrize("text", [b"[1]", b'"a"', b"1", b"null"])
def test_a_document_that_is_no_object_is_refused(text):
    with pytest.raises(CheckpointError, match=r"f: not a JSON object: expected \{...\}, got"):
        parse_object(text, file="f")
