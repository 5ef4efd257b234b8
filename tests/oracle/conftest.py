"""The models on disk, and their plain FP32 runs: made once, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.oracle.models import write_model
from tests.oracle.parity import load_truth
from tests.oracle.plain import Plain


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model by name; one of them is sharded."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: write_model(root, name))


@pytest.fixture(scope="session")
def truth_of(folder_of: Callable[[str], Path]) -> Callable[[str], Plain]:
    return cache(lambda name: load_truth(folder_of(name)))
