"""Hosts that differ are named by every one of them, before the first step."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rae_xla.config import load_config
from rae_xla.data.mixture import Mixture
from rae_xla.data.shards import write_shards
from rae_xla.data.sources import array_source
from rae_xla.data.stream import SampleStream
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.train import same_run
from rae_xla.train.same_run import check_hosts, checked_rows

pytestmark = pytest.mark.unhurried

HOSTS = 4


@pytest.fixture
def data(tmp_path):
    images = torch.arange(100, dtype=torch.uint8)[:, None, None].expand(100, 8, 8).numpy()
    return Mixture((write_shards(array_source(images, [0] * 100), str(tmp_path / "s")),), (1.0,))


class Pod:
    """A process of several, which hears what the others would have said."""

    def __init__(self, others=None):
        self.words, self.others = None, others

    def exchange(self, text):
        self.words = text
        return [text] if self.others is None else self.others


def words(data, number, config=None, step=0):
    """What process ``number`` says of itself."""
    pod = Pod()
    stream = make_stream(data, number)
    with contextlib.suppress(UserError):  # it hears itself alone
        check_hosts(pod, config or load_config(), data, stream, step)
    return pod.words


def make_stream(data, number):
    return SampleStream(
        data, seed=0, global_batch_size=16, transform=CenterCrop(8), process_index=number,
        process_count=HOSTS,
    )  # fmt: skip


def check(data, everything):
    """As every process of the pod does."""
    for number in range(HOSTS):
        check_hosts(Pod(everything), load_config(), data, make_stream(data, number), 0)


def test_equal_hosts_with_their_own_rows_pass(data):
    said = [words(data, number) for number in range(HOSTS)]
    samples = [sample for text in said for sample in json.loads(text)["samples"]]
    assert samples == make_stream(data, 0).global_ids(0)
    assert len(set(samples)) == 16
    check(data, said)


def renamed(text, host):
    return json.dumps(json.loads(text) | {"host": host})


@pytest.mark.parametrize("what", ["shards", "configuration", "code", "first step", "generation"])
def test_the_host_that_differs_is_named_with_what_differs(data, tmp_path, monkeypatch, what):
    said = [renamed(words(data, number), f"tpu-w{number}") for number in range(HOSTS)]
    if what == "shards":
        images = torch.zeros((100, 8, 8), dtype=torch.uint8).numpy()
        other = write_shards(array_source(images, [0] * 100), str(tmp_path / "other"))
        odd = words(Mixture((other,), (1.0,)), 2)
    elif what == "generation":
        pinned = replace(data.sources[0], generations={"shard-000000.tar": "17"})
        other = replace(pinned, folder="gs://elsewhere")  # a copy has generations of its own
        check(data, [*said[:2], words(Mixture((other,), (1.0,)), 2), said[3]])
        odd = words(Mixture((pinned,), (1.0,)), 2)
    elif what == "configuration":
        odd = words(data, 2, load_config(overrides=["training.log_every=7"]))
    elif what == "code":
        monkeypatch.setattr(same_run, "_code_hash", lambda: "0" * 12)
        odd = words(data, 2)
    else:
        odd = words(data, 2, step=40)
    said[2] = renamed(odd, "tpu-w2")
    name = "objects of .*" if what == "generation" else what
    with pytest.raises(
        UserError, match=rf"do not run the same: {name} of tpu-w2 \(process 2: .*3 o"
    ):
        check(data, said)


PROCESS = """
import sys
from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.data.stream import SampleStream
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.runtime.hosts import Hosts
from rae_xla.train.same_run import check_hosts

index, folder, *overrides = sys.argv[1:]
data = open_training_data(folder)
stream = SampleStream(
    data, seed=0, global_batch_size=16, transform=CenterCrop(8), process_index=int(index),
    process_count=2,
)
try:
    check_hosts(Hosts(int(index), 2), load_config(overrides=overrides), data, stream, 0)
    print("same")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("override", [[], ["training.clip_grad=2"]])
def test_real_processes_stop_together(data, override):
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
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    expected = "the hosts do not run the same: configuration of" if override else "same"
    assert all(text.startswith(expected) for text in said)


def test_where_data_lies_may_differ(data):
    said = [words(data, number) for number in range(HOSTS)]
    said[1] = words(
        data,
        1,
        load_config(overrides=["data.train=gs://a/b", "data.cache_dir=/ssd", "data.num_workers=9"]),
    )
    check(data, said)


def test_two_hosts_with_the_same_rows(data):
    said = [words(data, number) for number in range(HOSTS)]
    said[3] = words(data, 2)
    with pytest.raises(UserError, match="16 rows of step 0, 12 different samples"):
        check(data, said)


def test_the_devices_must_hold_every_row_once():
    config = load_config(overrides=["runtime.backend=torch"])
    runtime = start(config.runtime, config.mesh)
    batches = [{"row": torch.arange(8)}, {"row": torch.arange(3)}]
    assert list(checked_rows(runtime, iter(batches), 8)) == batches
    with pytest.raises(UserError, match="hold 4 different rows of a batch of 8"):
        next(checked_rows(runtime, iter([{"row": torch.arange(4)}]), 8))
    twice = torch.cat([torch.arange(4), torch.arange(4)])
    with pytest.raises(UserError, match="hold 4 different rows of a batch of 8"):
        next(checked_rows(runtime, iter([{"row": twice}]), 8))
    assert list(checked_rows(runtime, iter([]), 8)) == []
