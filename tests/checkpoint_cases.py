"""Small real states, saved as a training saves them."""

from dataclasses import replace

import torch
from torch import nn

from rae_xla.config import CheckpointConfig, MeshConfig, RunConfig, RuntimeConfig
from rae_xla.interop.checkpoint_folder import Checkpoint, checkpoint_path
from rae_xla.interop.manifest import Manifest
from rae_xla.runtime import start
from rae_xla.train.checkpoint import run_facts, state_tensors
from rae_xla.train.saver import Saver
from rae_xla.train.state import make_state


def one_process():
    """A runtime on this machine."""
    settings = RuntimeConfig(backend="torch")
    return start(settings, MeshConfig())


class LinearStage:
    """Trains a linear layer."""

    disc = None
    ties = Manifest()

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 3))

    def inputs(self, step):
        return {"lr": torch.tensor(0.5)}

    def publish(self, state):
        return {f"published.{name}": tensor for name, tensor in state.items()}

    def unpublish(self, state):
        return {name.removeprefix("published."): tensor for name, tensor in state.items()}


class DiscStage(LinearStage):
    """With a discriminator, which has buffers."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.disc = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))


def make_saver(folder, stage, state, say=print, settings=None, step=lambda: 0):
    """A saver of that state, as it is at the time."""
    runtime = one_process()

    def gather():
        facts = run_facts(RunConfig(), runtime, stage, step(), "data")
        return state_tensors(stage, state), facts

    settings = settings or replace(CheckpointConfig(), keep_last=100)
    return Saver(str(folder), runtime, settings, say, gather)


def save(folder, step, stage=None, state=None, **settings):
    """Save a state, a fresh one if none is given, as the checkpoint of a step."""
    stage = stage or LinearStage()
    state = state or make_state(stage.model, one_process(), disc=stage.disc)
    config = replace(CheckpointConfig(), **({"keep_last": 100} | settings))
    saver = make_saver(folder, stage, state, settings=config, step=lambda: step)
    assert saver.finish(step, patience=0), saver.failure
    return Checkpoint(checkpoint_path(str(folder), step))
