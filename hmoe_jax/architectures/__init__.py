"""Model families: for each a pytree of weights, pure functions around the experts' seam, and its checkpoint's names."""
