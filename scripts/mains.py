"""What every main needs whatever it is about: how it starts, refuses, writes and ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from hmoe_jax.core import HmoeError

JSON = flags.DEFINE_bool("json", False, "End with one line of JSON on standard output, for machines.")
_QUIET = flags.DEFINE_bool("quiet", False, "Do not tell the automatic choices and their reasons.")


def run_main(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; a refusal is one line on standard error and exit status 1.

    Ctrl-C ends the process as the operating system does by default: at once, also inside a compiler or a kernel, where
    Python would only notice at the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        _log_to_stderr(logging.WARNING if _QUIET.value else logging.INFO)
        try:
            main()
        except (HmoeError, ValueError, OSError) as error:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(checked)


def _log_to_stderr(level: int) -> None:
    """Shows what the package logs, and nothing of what others do."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(message)s]"))
    logging.getLogger().setLevel(logging.WARNING)
    logger = logging.getLogger("hmoe_jax")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def read_text(path: str) -> str:
    """A UTF-8 file. Raises `ValueError` naming it if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def print_json(record: Mapping[str, Any]) -> None:
    """One line, if `--json` was given."""
    if JSON.value:
        print(json.dumps(record))


def titled_table(setting: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: the setting in a line, then cells by the names of their columns, which are the first row's."""
    title = ", ".join(f"{name} {value}" for name, value in setting.items())
    head, *body = [f"| {' | '.join(cells)} |" for cells in (rows[0].keys(), *(row.values() for row in rows))]
    return "\n".join([title, "", head, f"|{'---:|' * len(rows[0])}", *body, ""])


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole file or none of it, whenever the process ends."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        partial.write_bytes(data)
        os.replace(partial, path)


def make_folder(out: Path, *, flag: str = "--out") -> Path:
    """Makes the folder, and finds out now whether it can be written, not after the measurement."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {out} cannot be written: {error.strerror}") from None
    return out
