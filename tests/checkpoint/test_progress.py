"""The progress bar: counts every thread's bytes, shows a rate, and is silent where there is no terminal."""

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr

import pytest

from hmoe_jax.checkpoint.progress import byte_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_label_total_and_rate():
    with redirect_stderr(Terminal()) as terminal, byte_progress(3_000_000_000, label="loading") as advance:
        advance(3_000_000_000)
    last = terminal.getvalue().rsplit("\r", maxsplit=1)[-1]
    assert "loading: 100%" in last
    assert "3.00G/3.00G" in last
    assert "B/s]" in last


def test_bytes_from_many_threads_add_up():
    with (
        redirect_stderr(Terminal()) as terminal,
        byte_progress(20_000, label="loading") as advance,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(advance, [1] * 20_000))
    assert "20.0k/20.0k" in terminal.getvalue()


def test_nothing_is_written_where_there_is_no_terminal():
    with redirect_stderr(io.StringIO()) as stream, byte_progress(10, label="loading") as advance:
        advance(10)
    assert stream.getvalue() == ""


def fail_at(num_bytes):
    with byte_progress(10, label="loading") as advance:
        advance(num_bytes)
        raise KeyError


def test_an_error_passes_through_and_ends_the_bar():
    with redirect_stderr(Terminal()) as terminal, pytest.raises(KeyError):
        fail_at(4)
    assert terminal.getvalue().endswith("\n")
