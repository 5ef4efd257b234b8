"""Fields of a JSON object read one by one, so that the one that nobody read is an error that names it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hmoe_jax.core import ConfigError


class Fields:
    """Hands out fields by name and remembers which, so that `finish` can name those nobody asked for."""

    def __init__(self, fields: Mapping[str, Any], prefix: str = "", *, harmless: frozenset[str] = frozenset()):
        """`prefix` begins every name in an error; `harmless` fields may be there unread."""
        self._fields, self._prefix, self._harmless = fields, prefix, harmless
        self._seen: set[str] = set()

    def value(self, name: str, *default: Any) -> Any:
        self._seen.add(name)
        if name in self._fields:
            return self._fields[name]
        if default:
            return default[0]
        raise ConfigError(f"{self._prefix}{name} is missing")

    def spelling(self, *names: str) -> str:
        """Which of a field's names the file uses (the first if none). Those that are there have to agree."""
        self._seen.update(names)
        used = [name for name in names if self._fields.get(name) is not None]
        for name in used[1:]:
            if self._fields[name] != self._fields[used[0]]:
                raise ConfigError(
                    f"{self._prefix}{used[0]}={self._fields[used[0]]!r} and {name}={self._fields[name]!r} differ, "
                    "but mean the same"
                )
        return (used or names)[0]

    def integer(self, name: str, *default: int) -> int:
        value = self.value(name, *default)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
            raise ConfigError(f"{self._prefix}{name} must be an integer of 32 bits, got {value!r}")
        return value

    def number(self, name: str, *default: float) -> float:
        value = self.value(name, *default)
        # Not `math.isfinite`, which raises for an integer with hundreds of digits; NaN is not below anything.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{self._prefix}{name} must be a finite number, got {value!r}")
        return float(value)

    def boolean(self, name: str, *default: bool) -> bool:
        value = self.value(name, *default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._prefix}{name} must be true or false, got {value!r}")
        return value

    def fixed(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = self.value(name, allowed[0])
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"{self._prefix}{name}={value!r} is not implemented (only {choices})")

    def ignore(self, *names: str) -> None:
        self._seen.update(names)

    def finish(self) -> None:
        unknown = sorted(set(self._fields) - self._seen - self._harmless)
        if unknown:
            raise ConfigError(
                f"unknown field {self._prefix}{unknown[0]}={self._fields[unknown[0]]!r}: it may change the "
                "mathematics, so it is not ignored"
            )

    def nested(self, name: str) -> Fields | None:
        """The fields of an object, or None where there is none."""
        fields = self.value(name, None)
        if fields is None:
            return None
        if not isinstance(fields, dict):
            raise ConfigError(f"{self._prefix}{name} must be an object, got {fields!r}")
        return Fields(fields, f"{self._prefix}{name}.")

    def names(self, name: str) -> list[str]:
        """A list of strings; absent or null is empty."""
        names = self.value(name, None) or []
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            raise ConfigError(f"{self._prefix}{name} must list names, got {names!r}")
        return names

    def unread(self) -> list[str]:
        """Fields that nobody has asked for yet."""
        return [name for name in self._fields if name not in self._seen]

    def path(self, name: str) -> str:
        """The field's full name, as errors have it."""
        return f"{self._prefix}{name}"
