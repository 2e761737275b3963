"""Checkpoints: how a run saves its state, and how it is found, verified and read again.

- ``manager``: the checkpoints of a run; listing, verification, commit, deletion
- ``resume``: which checkpoint the processes of a run resume from
- ``saver``: asynchronous saving with retries and retention
- ``format``, ``writer``, ``reader``: files in the layout of ``torch.distributed.checkpoint``
- ``tensors``: the tensors of a checkpoint or of a file of weights
- ``train_state``: the state of a run on the devices, to and from a checkpoint
- ``provenance``: what a manifest records about the run, and checks of weights against it
"""
