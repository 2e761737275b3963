"""Training: the trainer, its tasks (stage 1 and stage 2), callbacks and tracking."""
