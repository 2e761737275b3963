"""Weights in and out: published files, training checkpoints, other tools."""
