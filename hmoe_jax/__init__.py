"""hmoe_jax: a JAX/XLA inference engine for Mixture-of-Experts models larger than the accelerator's memory."""

from importlib.metadata import version

from hmoe_jax.core import CheckpointError, ConfigError, HmoeError
from hmoe_jax.engine import Engine
from hmoe_jax.outputs import CompletionOutput, Logprob, RequestOutput
from hmoe_jax.sampling_params import SamplingParams

__all__ = [
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "HmoeError",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
]

__version__ = version("hmoe-jax")
