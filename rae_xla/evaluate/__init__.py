"""Evaluation: metrics of generated images, of reconstructions, and of latents."""
