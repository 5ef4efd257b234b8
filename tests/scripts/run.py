"""Runs the scripts as a user does: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def start(script: str, *args: str, cache: Path) -> subprocess.Popen[str]:
    """Starts `scripts/<script>.py`; compiled programs are cached below `cache`."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )


def finish(script: str, *args: str, cache: Path) -> tuple[int, str, str]:
    """Runs it to its end: (exit status, standard output, standard error)."""
    process = start(script, *args, cache=cache)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
