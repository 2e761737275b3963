"""Trained models to pictures."""

GENERATED_FILE = "generated.json"
"""What `rae-xla generate` lists its pictures in, beside them."""
