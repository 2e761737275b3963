"""Prediction of a run on TPUs without a TPU: memory, FLOPs, communication, time and cost."""
