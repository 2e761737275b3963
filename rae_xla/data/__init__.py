"""Training and evaluation data: shards, sampling order, transforms and batches."""
