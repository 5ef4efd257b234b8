"""What fails, on the device or on the host, harms nobody else, and costs whoever it hits as little as can be."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from hmoe_jax.core import CheckpointError, EngineDeadError
from tests.server_case import STAGES, Case, assert_right, fail_once


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_once_is_computed_again_and_costs_nothing(stage: str, after: int) -> None:
    case = Case()
    requests = [case.submit(9), case.submit(3, n=2), case.submit(17)]
    case.executor.on[stage] = fail_once(after=after)
    case.run()
    assert_right(*requests)
    assert case.server.meters.num_failed_steps == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_that_always_fails_ends_with_the_error_and_harms_nobody(stage: str) -> None:
    case = Case()
    good = [case.submit(9), case.submit(3)]
    bad = case.submit(5)
    more = case.submit(4)

    def fail_with_bad(slots: list[int]) -> None:
        if bad.sequences[0].slot in slots:
            raise RuntimeError("bad to the bone")

    case.executor.on[stage] = fail_with_bad
    case.run()
    assert_right(*good, more)
    assert bad.sequences[0].finish_reason == "error"
    with pytest.raises(RuntimeError, match="bad to the bone"):
        raise bad.error


def test_what_fails_on_the_host_for_one_sequence_is_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    good, bad = case.submit(5), case.submit(6)
    (one,) = bad.sequences
    append = one.append

    def broken(*args: Any) -> None:
        if len(one.token_ids) == 2:
            raise ValueError("no text for this")
        append(*args)

    monkeypatch.setattr(one, "append", broken)
    case.run()
    assert_right(good)
    assert (one.finish_reason, len(one.token_ids)) == ("error", 2)
    assert case.server.meters.num_failed_steps == 0


def test_a_request_whose_input_cannot_be_made_is_its_own_error() -> None:
    case = Case()
    good, bad = case.submit(5), case.submit(6, logit_bias={10**6: 1.0})
    case.run()
    assert_right(good)
    assert isinstance(bad.error, IndexError)


def test_after_one_failed_step_nobody_waits_for_anybody() -> None:
    case = Case()
    old = case.submit(3, 30)
    while len(old.sequences[0].token_ids) < 20:
        case.server.step()
    case.executor.on["decode"] = fail_once()
    case.server.step()
    new, steps = case.submit(3, 4), 0
    while not new.is_finished:
        case.server.step()
        steps += 1
    assert steps < 10  # `old` decodes its 20 tokens again beside it
    case.run()
    assert_right(old, new)


def test_refusals_of_a_lost_engine_leave_nothing_behind() -> None:
    case = Case()
    case.server.close()
    depths = []
    for _ in range(20):
        with pytest.raises(ValueError, match="closed") as refusal:
            case.submit(3)
        depths.append(len(list(traceback.walk_tb(refusal.tb))))
    assert len(set(depths)) == 1


def test_a_lost_device_ends_all_with_one_error_and_accepts_none() -> None:
    case = Case()
    requests = [case.submit(9), case.submit(30), case.submit(3)]
    case.server.step()

    def fail(slots: list[int]) -> None:
        raise RuntimeError("fell off the bus")

    case.executor.on |= {"decode": fail, "reset": fail}
    case.run()
    assert {one.finish_reason for request in requests for one in request.sequences} == {"error"}
    assert len({id(request.error) for request in requests}) == 1
    assert isinstance(requests[0].error, EngineDeadError)
    with pytest.raises(EngineDeadError, match="the device is lost: fell off the bus"):
        case.submit(3)


def test_a_file_that_is_cut_off_is_said_as_such() -> None:
    case = Case()
    request = case.submit(9)

    def fail(slots: list[int]) -> None:
        raise CheckpointError("was cut off")

    case.executor.on["intact"] = fail
    case.run()
    assert isinstance(request.error, CheckpointError)
    with pytest.raises(CheckpointError, match="was cut off"):
        case.submit(3)


def test_a_request_that_cannot_be_queued_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    good, bad = case.submit(3), case.request(3)
    add = case.scheduler.add

    def refusing(sequences: Any) -> None:
        if sequences is bad.sequences:
            raise TypeError("no rank")
        add(sequences)

    monkeypatch.setattr(case.scheduler, "add", refusing)
    case.server.submit(bad)
    other = case.submit(4)
    case.run()
    assert_right(good, other)
    assert isinstance(bad.error, TypeError)


def test_a_prompt_that_fails_while_it_is_given_up_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    other, doomed = case.submit(2, 30), case.submit(20)
    prefill = case.executor.prefill

    def failing(batch: Any, *, scored: bool = False) -> Any:
        try:
            yield from prefill(batch, scored=scored)
        finally:
            if int(batch.slot) == doomed.sequences[0].slot:
                raise RuntimeError("it had failed long ago")

    case.server.step()
    monkeypatch.setattr(case.executor, "prefill", failing)
    case.server.step()
    case.server.abort(doomed.sequences)
    case.run()
    assert doomed.sequences[0].finish_reason == "abort"
    assert_right(other)
