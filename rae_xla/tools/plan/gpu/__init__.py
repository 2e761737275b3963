"""Prediction of a run on GPUs without a GPU: memory, communication, time and the largest batch."""
