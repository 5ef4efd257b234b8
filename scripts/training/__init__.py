"""What `train_embedded.py` is made of: text, the differentiable model, and the checkpoint writer."""
