"""Number formats of stored weights: what they are, what they mean, how they are made, how checkpoints announce them."""
