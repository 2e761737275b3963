"""The TorchXLA SPMD backend."""
