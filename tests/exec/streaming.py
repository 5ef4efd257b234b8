"""Streaming executors that compute in FP32: there no rounding turns a near tie, and every token can be compared.

Served models stream in BF16 (executor `fused` decodes in nothing else), by the same programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.config import read_config
from hmoe_jax.exec import fused
from hmoe_jax.exec.load import load_weights
from hmoe_jax.exec.passes import TileShape
from hmoe_jax.exec.plan import EngineOptions, find_hardware, resolve
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.kernels.pool import ThreadPool


@contextmanager
def streaming(
    folder: Path,
    *,
    num_devices: int = 1,
    residency: Literal["auto", "pinned"] = "auto",
    options: dict[str, Any] | None = None,
    **sizes: Any,
) -> Iterator[StreamExecutor]:
    """`sizes` replace those of the `StreamPlan`. Few tiles, as each is a program to compile."""
    config = read_config(folder)
    wishes = EngineOptions(prefill="stream", prefill_devices=num_devices, max_num_seqs=2, **(options or {}))
    plan = resolve(replace(wishes, executor="fused", dtype="bfloat16"), config, find_hardware("cpu"))
    assert plan.stream is not None
    group_size = sizes.get("group_size", plan.stream.group_size)
    tiles = tuple(TileShape(rows, group_size) for rows in (16, 128))
    plan = replace(plan, dtype=jnp.dtype(jnp.float32), stream=replace(plan.stream, **{"tiles": tiles, **sizes}))
    with ExitStack() as owned, open_checkpoint(folder) as checkpoint, jax.default_device(plan.device):
        pool = owned.enter_context(ThreadPool(1))
        backend = fused.load_experts(config, checkpoint, pool=pool, residency=residency, advance=lambda _: None)
        owned.callback(backend.close)
        if residency == "pinned":
            assert backend.store is not None
            backend.store.pin()
        weights = load_weights(config, checkpoint, dtype=plan.dtype, pool=None, advance=lambda _: None)
        executor = StreamExecutor(config, weights, backend, plan=plan, guard=None, on_close=lambda: None)
        owned.callback(executor.close)
        yield executor
