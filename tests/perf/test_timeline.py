from __future__ import annotations

import gzip
import json

from hmoe_jax.perf import timeline
from tests.perf.conftest import NUM_STEPS, Recorded


def test_slices_read_like_the_source_one_inside_the_other(recorded: Recorded) -> None:
    events = json.loads(gzip.decompress(timeline.to_json_gz(recorded.steps, recorded.modules)))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]

    def inside(name: str, outer: dict) -> list[dict]:
        end = outer["ts"] + outer["dur"]
        return [
            each
            for each in slices
            if each["name"] == name and each["tid"] == outer["tid"] and outer["ts"] <= each["ts"] < end
        ]

    layers = [each for each in slices if each["name"] == "layer2"]
    stages = [stage for layer in layers for stage in inside("experts", layer)]
    calls = [call for stage in stages for call in inside("hmoe_moe_experts", stage)]
    assert len({call["ts"] for call in calls}) == NUM_STEPS
    assert all("layer2/experts" in call["args"]["op_name"] for call in calls)


def test_every_step_and_thread_has_its_name_and_the_file_is_reproducible(recorded: Recorded) -> None:
    data = timeline.to_json_gz(recorded.steps, recorded.modules)
    assert data == timeline.to_json_gz(recorded.steps, recorded.modules)
    events = json.loads(gzip.decompress(data))["traceEvents"]
    named = {event["tid"] for event in events if event["ph"] == "M"}
    assert {event["tid"] for event in events} == named
    assert sum(event["name"] == "decode" for event in events) == NUM_STEPS
