"""Private names of torch that the layout of checkpoints requires.

``StorageInfo`` is ``torch.distributed.checkpoint.filesystem._StorageInfo`` of torch 2.9: the class
of the file ranges in DCP's table ``.metadata``. torch's own reader expects it, and it has no public
name.
"""

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

__all__ = ["StorageInfo"]
