"""One tiny model and one compilation cache for all script tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("scripts") / "model", "plain", with_tokenizer=True))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xla-cache")
