"""Bytes to batches: storage, shards, order, decoding."""
