"""WebDataset shards: write, index, verify and describe them; sources of images to write."""

from __future__ import annotations

from rae_xla.moved import moved_names

__getattr__ = moved_names(  # of the module that this package once was
    __name__,
    {
        "Fault": f"{__name__}.verify.Fault",
        "ShardIndex": f"{__name__}.index.ShardIndex",
        "ShardSample": f"{__name__}.encoding.ShardSample",
        "make_shards": f"{__name__}.writer.make_shards",
        "open_index": f"{__name__}.index.open_index",
        "write_shards": f"{__name__}.writer.write_shards",
    },
)
