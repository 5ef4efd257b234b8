"""One of two processes that stream a prompt together: `python -m tests.exec.two_processes FOLDER PORT RANK OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from hmoe_jax.exec.batch import prefill_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.step import prefill_logits
from tests.tiny import random_ids


def main(folder: str, port: str, rank: str, out: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(rank))
    wishes = EngineOptions(prefill="stream", prefill_devices=2, max_num_seqs=1, max_model_len=200, num_threads=1)
    executor, plan = open_executor(folder, wishes)
    assert [device.process_index for device in plan.stream.devices] == [0, 1]
    ids = random_ids("deepseek", 90).tolist()
    logits = executor.run(prefill_logits, prefill_batch(ids, executor.layout, size=90, pages=[1, 2]))
    np.save(Path(out) / f"{rank}.npy", np.asarray(logits))
    executor.close()
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
