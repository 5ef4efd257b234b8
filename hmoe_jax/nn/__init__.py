"""Building blocks of the models: pure functions over arrays, each in its own file."""
