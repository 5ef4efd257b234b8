"""hmoe_jax: a JAX/XLA inference engine for Mixture-of-Experts models larger than the accelerator's memory."""

from importlib.metadata import version

from hmoe_jax.async_engine import AsyncEngine
from hmoe_jax.core import CheckpointError, ConfigError, EngineDeadError, HmoeError, QueueFullError
from hmoe_jax.engine import Engine
from hmoe_jax.outputs import CompletionOutput, Logprob, RequestOutput
from hmoe_jax.sampling_params import SamplingParams

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineDeadError",
    "HmoeError",
    "Logprob",
    "QueueFullError",
    "RequestOutput",
    "SamplingParams",
]

__version__ = version("hmoe-jax")
