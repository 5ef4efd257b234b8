"""Rates that are kept, and those that are expected where nobody has measured."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from hmoe_jax.perf import machines
from hmoe_jax.perf.machines import (
    UNMEASURED_CPU,
    expected_rates,
    load_rates,
    machine_name,
    save_rates,
    sheet_rates,
)

CPU = jax.devices("cpu")[0]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_rates_are_kept() -> None:
    rates = sheet_rates("h100", num_gpus=2, dram_gbps=300.0, link_gbps=None)
    assert save_rates(rates) == machines.rates_file()
    assert load_rates() == rates
    machines.rates_file().write_text('{"name": "half"}')
    with pytest.raises(ValueError, match=r"run scripts/calibrate\.py again"):
        load_rates()


def test_measured_rates_are_expected_on_the_machine_where_they_were_measured(caplog: pytest.LogCaptureFixture) -> None:
    assert expected_rates(CPU) == UNMEASURED_CPU
    measured = replace(UNMEASURED_CPU, name=machine_name(CPU), link_gbps=3.0)
    save_rates(measured)
    assert expected_rates(CPU) == measured
    save_rates(replace(measured, name="another"))
    assert expected_rates(CPU) == UNMEASURED_CPU
    assert caplog.messages == []
    machines.rates_file().write_text("{")
    with caplog.at_level(logging.WARNING):
        assert expected_rates(CPU) == UNMEASURED_CPU
    assert "run scripts/calibrate.py again" in caplog.text


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 5090", "rtx5090"), ("NVIDIA Unheard-of", "rtx4090")],
)
def test_a_gpu_that_nobody_measured_has_the_rates_of_its_data_sheet(
    kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = expected_rates(Mock(spec=jax.Device, platform="gpu", device_kind=kind))
    assert found == replace(sheet_rates(name), name=f"data sheet of {name}")
    assert ("unheard-of are unknown, those of rtx4090 are taken" in caplog.text) is ("Unheard-of" in kind)
