"""Models: plain ``torch.nn`` modules, and the reading and writing of their files."""
