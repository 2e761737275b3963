"""Consistency of hosts: before the first step, all of them report which one differs."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rae_xla.checkpoint import provenance
from rae_xla.config import load_config
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import Mixture
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.train.consistency import check_hosts, checked_rows

pytestmark = pytest.mark.slow

HOSTS = 4


@pytest.fixture
def data(tmp_path):
    images = torch.arange(100, dtype=torch.uint8)[:, None, None].expand(100, 8, 8).numpy()
    return Mixture((write_shards(array_source(images, [0] * 100), str(tmp_path / "s")),), (1.0,))


class Pod:
    """A backend of one process; ``others`` are the texts of all processes."""

    def __init__(self, others=None):
        self.text, self.others = None, others

    def all_gather_text(self, text):
        self.text = text
        return [text] if self.others is None else self.others


def host_text(data, number, config=None, step=0):
    """Return the text that process ``number`` contributes."""
    pod = Pod()
    loader = make_loader(data, number)
    with contextlib.suppress(UserError):  # its own text alone is not the whole batch
        check_hosts(pod, config or load_config(), data, loader, step)
    return pod.text


def make_loader(data, number):
    return TrainingLoader(
        data, seed=0, global_batch_size=16, transform=CenterCrop(8), process_index=number,
        process_count=HOSTS,
    )  # fmt: skip


def check(data, texts):
    """Run the check of every process of the pod."""
    for number in range(HOSTS):
        check_hosts(Pod(texts), load_config(), data, make_loader(data, number), 0)


def test_equal_hosts_with_disjoint_rows_pass(data):
    texts = [host_text(data, number) for number in range(HOSTS)]
    samples = [sample for text in texts for sample in json.loads(text)["samples"]]
    assert samples == make_loader(data, 0).global_ids(0)
    assert len(set(samples)) == 16
    check(data, texts)


def renamed(text, host):
    return json.dumps(json.loads(text) | {"host": host})


@pytest.mark.parametrize("what", ["shards", "configuration", "code", "first step", "generation"])
def test_the_differing_host_and_property_are_reported(data, tmp_path, monkeypatch, what):
    texts = [renamed(host_text(data, number), f"tpu-w{number}") for number in range(HOSTS)]
    if what == "shards":
        images = torch.zeros((100, 8, 8), dtype=torch.uint8).numpy()
        other = write_shards(array_source(images, [0] * 100), str(tmp_path / "other"))
        differing = host_text(Mixture((other,), (1.0,)), 2)
    elif what == "generation":
        pinned = replace(data.sources[0], generations={"shard-000000.tar": "17"})
        other = replace(pinned, folder="gs://elsewhere")  # a copy has other generations
        check(data, [*texts[:2], host_text(Mixture((other,), (1.0,)), 2), texts[3]])
        differing = host_text(Mixture((pinned,), (1.0,)), 2)
    elif what == "configuration":
        differing = host_text(data, 2, load_config(overrides=["training.log_every=7"]))
    elif what == "code":
        monkeypatch.setattr(provenance, "_code_hash", lambda: "0" * 12)
        differing = host_text(data, 2)
    else:
        differing = host_text(data, 2, step=40)
    texts[2] = renamed(differing, "tpu-w2")
    name = "objects of .*" if what == "generation" else what
    with pytest.raises(
        UserError, match=rf"do not run the same job: {name} of tpu-w2 \(process 2: .*of the 3 o"
    ):
        check(data, texts)


PROCESS = """
import sys
from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.runtime import process_group
from rae_xla.train.consistency import check_hosts

index, folder, *overrides = sys.argv[1:]
process_group.join_hosts(int(index), 2)
data = open_training_data(folder)
loader = TrainingLoader(
    data, seed=0, global_batch_size=16, transform=CenterCrop(8), process_index=int(index),
    process_count=2,
)
try:
    check_hosts(process_group, load_config(overrides=overrides), data, loader, 0)
    print("same")
except UserError as error:
    print(error)
process_group.leave()
"""


@pytest.mark.parametrize("override", [[], ["training.clip_grad=2"]])
def test_real_processes_fail_together(data, override):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port - 1)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), data.sources[0].folder, *(override * i)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    # gloo prints lines before the result
    texts = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    expected = "the hosts do not run the same job: configuration of" if override else "same"
    assert all(text.startswith(expected) for text in texts)


def test_local_paths_may_differ(data):
    texts = [host_text(data, number) for number in range(HOSTS)]
    texts[1] = host_text(
        data,
        1,
        load_config(overrides=["data.train=gs://a/b", "data.cache_dir=/ssd", "data.num_workers=9"]),
    )
    check(data, texts)


def test_two_hosts_with_the_same_rows(data):
    texts = [host_text(data, number) for number in range(HOSTS)]
    texts[3] = host_text(data, 2)
    with pytest.raises(UserError, match="16 rows of step 0, 12 different samples"):
        check(data, texts)


def test_the_devices_must_hold_every_row_exactly_once():
    config = load_config(overrides=["runtime.backend=torch"])
    backend = start(config.runtime, config.mesh)
    batches = [{"row": torch.arange(8)}, {"row": torch.arange(3)}]
    assert list(checked_rows(backend, iter(batches), 8)) == batches
    with pytest.raises(UserError, match="hold 4 different rows of a batch of 8"):
        next(checked_rows(backend, iter([{"row": torch.arange(4)}]), 8))
    twice = torch.cat([torch.arange(4), torch.arange(4)])
    with pytest.raises(UserError, match="hold 4 different rows of a batch of 8"):
        next(checked_rows(backend, iter([{"row": twice}]), 8))
    assert list(checked_rows(backend, iter([]), 8)) == []
