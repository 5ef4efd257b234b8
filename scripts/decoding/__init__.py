"""What `bench_decode.py` is made of: timed steps, their bounds, and the report."""
