"""Shared by every test: one thread, so that numbers and timings do not depend on the machine."""

import torch

torch.set_num_threads(1)
