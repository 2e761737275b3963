"""Measuring what a model makes, and the latents it makes it from."""
