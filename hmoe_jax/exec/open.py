"""From a model folder and the user's wishes to an executor that is ready to run."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import jax

from hmoe_jax.checkpoint import integrity
from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.checkpoint.progress import byte_progress
from hmoe_jax.config import read_config
from hmoe_jax.exec import fused, graph
from hmoe_jax.exec.guard import FileGuard
from hmoe_jax.exec.load import bytes_to_read, check_checkpoint, load_weights
from hmoe_jax.exec.plan import EngineOptions, Plan, find_hardware, resolve
from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.kernels.pool import ThreadPool

logger = logging.getLogger(__name__)


def open_executor(
    folder: str | Path, options: EngineOptions, *, verify: bool | Literal["auto"] = "auto"
) -> tuple[Executor, Plan]:
    """Reads config and weights strictly, and places them as the plan says. Nothing is compiled yet.

    `verify` checks the folder's `SHA256SUMS` first; "auto" does where that is quick. Raises `ConfigError`,
    `CheckpointError`, or `ValueError` for options that cannot be met; then nothing is left open.
    """
    config = read_config(folder)
    plan = resolve(options, config, find_hardware(options.device))
    for line in plan.describe():
        logger.info("%s", line)
    if integrity.should_verify(folder, verify):
        with byte_progress(integrity.covered_bytes(folder), label="verifying") as advance:
            integrity.verify(folder, on_bytes=advance)
    with ExitStack() as owned, open_checkpoint(folder) as checkpoint, jax.default_device(plan.device):
        check_checkpoint(config, checkpoint)
        guard = FileGuard(checkpoint)
        pool, device_pool = _pools(plan, owned, platform=plan.device.platform)
        is_mapped = pool is not None and fused.maps_experts(plan.residency, pool)
        num_bytes = bytes_to_read(config, checkpoint, maps_experts=is_mapped)
        with byte_progress(num_bytes, label="loading") as advance:
            if pool is None:
                backend = graph.load_experts(config, checkpoint, dtype=plan.dtype, advance=advance)
            else:
                placed: dict[str, Any] = {"residency": plan.residency, "has_lane": plan.executor == "overlap"}
                backend = fused.load_experts(config, checkpoint, pool=pool, **placed, advance=advance)
            owned.callback(backend.close)
            pool_id = None if device_pool is None else device_pool.id
            kernels: dict[str, Any] = {"pool": pool_id, "attention": plan.attention, "products": plan.products}
            weights = load_weights(config, checkpoint, dtype=plan.dtype, **kernels, advance=advance)
        if plan.residency == "pinned" and backend.store is not None:
            fused.pin_experts(backend.store)
        guard.check()  # what is not mapped was read now
        kept = ExitStack()
        kind = Executor if plan.stream is None else StreamExecutor
        executor = kind(config, weights, backend, plan=plan, guard=guard, on_close=kept.close)
        kept.push(owned.pop_all())  # only now: the executor's cache may not have fitted
    return executor, plan


def _pools(plan: Plan, owned: ExitStack, *, platform: str) -> tuple[ThreadPool | None, ThreadPool | None]:
    """The threads that compute routed experts, and those that compute for the CPU platform's device: one and the same,
    unless both compute at once. No others compute for a GPU."""
    if plan.executor == "graph":
        return None, None
    experts = owned.enter_context(ThreadPool(plan.num_threads, isa=plan.isa, topology=plan.expert_cpus))
    if platform != "cpu":
        return experts, None
    if plan.executor == "fused":
        return experts, experts
    return experts, owned.enter_context(ThreadPool(1, isa=plan.isa))
