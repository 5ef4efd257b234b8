"""Reading a JSON object field by field: what nobody read, and what is not of the kind that was asked for, is named."""

from __future__ import annotations

import pytest

from hmoe_jax.config_fields import Fields
from hmoe_jax.core import ConfigError


def test_a_field_that_nobody_read_is_an_error_unless_it_is_harmless() -> None:
    fields = Fields({"a": 1, "b": 2, "note": ""}, "outer.", harmless=frozenset({"note"}))
    assert fields.integer("a") == 1
    assert fields.unread() == ["b", "note"]
    with pytest.raises(ConfigError, match=r"unknown field outer\.b=2"):
        fields.finish()
    fields.ignore("b")
    fields.finish()


def test_nested_objects_carry_their_path() -> None:
    fields = Fields({"inner": {"x": 1}, "none": None, "list": []}, "outer.")
    inner = fields.nested("inner")
    assert inner is not None
    with pytest.raises(ConfigError, match=r"unknown field outer\.inner\.x=1"):
        inner.finish()
    assert inner.path("x") == "outer.inner.x"
    assert fields.nested("none") is None
    assert fields.nested("absent") is None
    with pytest.raises(ConfigError, match=r"outer\.list must be an object, got \[\]"):
        fields.nested("list")


def test_names_are_lists_of_strings_or_nothing() -> None:
    fields = Fields({"some": ["a", "b"], "none": None, "text": "a", "numbers": [1]})
    assert fields.names("some") == ["a", "b"]
    assert fields.names("none") == fields.names("absent") == []
    for wrong in ("text", "numbers"):
        with pytest.raises(ConfigError, match=f"{wrong} must list names"):
            fields.names(wrong)


def test_a_fixed_field_may_be_absent_and_is_not_taken_for_a_number() -> None:
    fields = Fields({"flag": 1, "size": [1, 128], "null": None})
    fields.fixed("absent", (True,))
    fields.fixed("size", ([128, 128], [1, 128]))
    fields.fixed("null", (None, {}))
    with pytest.raises(ConfigError, match=r"flag=1 is not implemented \(only True\)"):
        fields.fixed("flag", (True,))
