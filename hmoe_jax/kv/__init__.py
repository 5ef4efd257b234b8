"""The cache of attention latents, in pages."""
