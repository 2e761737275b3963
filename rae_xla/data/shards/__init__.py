"""WebDataset shards: write, index, verify and describe them; sources of images to write."""
