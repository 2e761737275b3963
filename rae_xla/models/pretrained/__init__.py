"""Model files: ``from_pretrained``, ``save_pretrained``, folders, weight files and the hub."""
