"""hmoe_jax: a JAX/XLA inference engine for Mixture-of-Experts models larger than the accelerator's memory."""
