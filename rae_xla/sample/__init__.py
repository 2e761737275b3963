"""Trained models to pictures."""
