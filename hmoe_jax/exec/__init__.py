"""Executors: ways to run a step, which differ only in who computes the routed experts."""
