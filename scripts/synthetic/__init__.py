"""What `write_synthetic.py` is made of: fields of a config, random weights, a skewed router, and shards on disk."""
