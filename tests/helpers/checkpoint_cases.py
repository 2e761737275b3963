"""Small training tasks, and checkpoints of them saved as training saves them."""

from dataclasses import replace

import torch
from torch import nn

from rae_xla.checkpoint.manager import Checkpoint, checkpoint_path
from rae_xla.checkpoint.provenance import run_facts
from rae_xla.checkpoint.saver import Saver
from rae_xla.checkpoint.train_state import make_state, state_tensors
from rae_xla.config import CheckpointConfig, MeshConfig, RunConfig, RuntimeConfig
from rae_xla.models.pretrained.manifest import Manifest
from rae_xla.runtime import start


def one_process():
    """A torch backend of a single process."""
    return start(RuntimeConfig(backend="torch"), MeshConfig())


class LinearTask:
    """Trains a linear layer; its published names have a prefix."""

    disc = None
    provenance = Manifest()
    first_moment_only: frozenset[str] = frozenset()
    average_widths: tuple[float, ...] = ()

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 3))

    def inputs(self, step):
        return {"lr": torch.tensor(0.5)}

    def to_published_state_dict(self, state):
        return {f"published.{name}": tensor for name, tensor in state.items()}

    def from_published_state_dict(self, state):
        return {name.removeprefix("published."): tensor for name, tensor in state.items()}


class DiscTask(LinearTask):
    """Trains a linear layer and a discriminator, which has buffers."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.disc = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))


def make_saver(folder, task, state, settings=None, step=lambda: 0):
    """A saver of a state; ``step`` returns the step that its manifests record."""
    backend = one_process()

    def gather():
        facts = run_facts(RunConfig(), backend, task, step(), "data")
        return state_tensors(task, state), facts

    settings = settings or replace(CheckpointConfig(), keep_last=100)
    return Saver(str(folder), backend, settings, gather)


def logged(caplog):
    """Messages that ``rae_xla.checkpoint`` has logged."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("rae_xla.checkpoint.")]


def save(folder, step, task=None, state=None, **settings):
    """Save the checkpoint of a step; by default of a newly initialised ``LinearTask``."""
    task = task or LinearTask()
    state = state or make_state(task.model, one_process(), disc=task.disc)
    config = replace(CheckpointConfig(), **({"keep_last": 100} | settings))
    saver = make_saver(folder, task, state, config, step=lambda: step)
    assert saver.finish(step, timeout=0), saver.failure
    return Checkpoint(checkpoint_path(str(folder), step))
