"""Metrics on the console, in metrics.jsonl and on Weights & Biases."""
