"""Sharded checkpoints: written by one or two processes, read back by us and by torch itself."""

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rae_xla.checkpoint.format import Folder
from rae_xla.checkpoint.reader import load, stored_tensors
from rae_xla.checkpoint.writer import SaveError, save
from rae_xla.runtime.snapshot import HostPart, HostShard, HostTensor

pytestmark = pytest.mark.slow

W = torch.arange(24.0).reshape(6, 4)
SNAPSHOT = {
    "model/w": HostTensor((6, 4), (HostShard(W[4:], (4, 0)), HostShard(W[:4], (0, 0)))),
    "ema/count": HostTensor.full(torch.tensor(3)),
    "ema/b": HostTensor.full(torch.linspace(0, 1, 5).bfloat16()),
}


def write(folder, snapshot=SNAPSHOT):
    committed = {}
    folder.mkdir(exist_ok=True)
    save(snapshot, Folder(str(folder)), begin=lambda: None, commit=committed.update)
    return committed


def test_parts_are_written_and_read_separately(tmp_path):
    files = write(tmp_path)
    assert set(files) == {"model-0.distcp", "ema-0.distcp", ".metadata"}
    assert all((tmp_path / name).stat().st_size == facts.size for name, facts in files.items())
    stored = stored_tensors(Folder(str(tmp_path)))
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "model/w": ((6, 4), torch.float32),
        "ema/count": ((), torch.int64),
        "ema/b": ((5,), torch.bfloat16),
    }
    (tmp_path / "model-0.distcp").unlink()  # reading ema does not need it
    tensors = {k: torch.empty_like(t, device="cpu") for k, t in stored.items() if k[:3] == "ema"}
    load(tensors, Folder(str(tmp_path)))
    assert tensors["ema/count"] == 3
    assert torch.equal(tensors["ema/b"], SNAPSHOT["ema/b"].shards[0].data)


def test_a_process_reads_only_the_shards_that_it_needs(tmp_path, monkeypatch):
    write(tmp_path)
    read, read_range = [], Folder.read_range

    def counted(self, name, start, length):
        content = read_range(self, name, start, length)
        read.append(name)
        return content

    monkeypatch.setattr(Folder, "read_range", counted)
    for part, shards in ((HostPart(0, 4, 6), 1), (HostPart(0, 0, 3), 1), (HostPart(1, 0, 2), 2)):
        read.clear()
        tensors = {"model/w": torch.full((6, 4), torch.nan)}
        load(tensors, Folder(str(tmp_path)), {"model/w": part})
        assert len(read) == shards
        narrow = part.dimension, part.start, part.stop - part.start
        assert torch.equal(tensors["model/w"].narrow(*narrow), W.narrow(*narrow))


def test_only_the_elements_of_a_view_are_written(tmp_path):
    large = torch.zeros(1000, 100)
    write(tmp_path, {"model/w": HostTensor.full(large[7])})
    assert (tmp_path / "model-0.distcp").stat().st_size < 4 * large[7].numel() + 2000


def test_torch_reads_our_files(tmp_path):
    write(tmp_path)
    found = {"model/w": torch.zeros(6, 4), "ema/count": torch.tensor(0)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(str(tmp_path)), no_dist=True)
    assert torch.equal(found["model/w"], W)
    assert found["ema/count"] == 3


def test_shards_must_cover_their_tensor(tmp_path):
    for shards in ((HostShard(W[:4], (0, 0)),), ()):
        with pytest.raises(SaveError, match=r"model/w \(6, 4\)"):
            write(tmp_path, {"model/w": HostTensor((6, 4), shards)})


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("content", [b"", b"half a pick", pickle.dumps(Evil()), pickle.dumps({})])
def test_a_damaged_table_runs_no_code(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata"):
        stored_tensors(Folder(str(tmp_path)))
    assert not (tmp_path / "owned").exists()


class FullDisk(Folder):
    """A disk that is full when one of the files is written."""

    @contextlib.contextmanager
    def create(self, name):
        if name.startswith("ema"):
            raise OSError(28, "No space left on device")
        with super().create(name) as file:
            yield file


def test_a_full_disk_is_reported_and_nothing_is_committed(tmp_path):
    committed = []
    with pytest.raises(SaveError, match="No space left"):
        save(
            SNAPSHOT, FullDisk(str(tmp_path)), begin=lambda: None, commit=committed.append
        )  # fmt: skip
    assert committed == []


PROCESS = """
import json, sys
import torch
from rae_xla.checkpoint.format import Folder
from rae_xla.checkpoint.writer import SaveError, save
from rae_xla.runtime.process_group import join_hosts, leave, new_gloo_group
from rae_xla.runtime.snapshot import HostShard, HostTensor

rank, folder = int(sys.argv[1]), sys.argv[2]
join_hosts(rank, 2)
group = new_gloo_group()
w = torch.arange(24.0).reshape(6, 4)[3 * rank : 3 * rank + 3]
snapshot = {
    "model/w": HostTensor((6, 4), (HostShard(w, (3 * rank, 0)),)),
    "model/same": HostTensor.full(torch.ones(2)),
    "ema/first": HostTensor((2,), (HostShard(torch.ones(2), (0,)),) if rank == 0 else ()),
}
events = []

class Broken(Folder):
    def create(self, name):
        if name.endswith("-1.distcp"):
            raise OSError(5, "Input/output error")
        return super().create(name)

def try_to_save(files):
    try:
        save(
            snapshot, files, begin=lambda: events.append("begin"),
            commit=lambda files: events.append(sorted(files)), group=group,
        )
    except SaveError as error:
        events.append(str(error))

try_to_save(Broken(folder))
try_to_save(Folder(folder))
print(json.dumps(events))
del group
leave()
"""


def test_two_processes_write_their_shards_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port - 1)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    events = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in processes]
    failed = "process 1: [Errno 5] Input/output error"
    files = [".metadata", "ema-0.distcp", "model-0.distcp", "model-1.distcp"]
    assert events == [["begin", failed, "begin", files], [failed]]
    found = {
        "model/w": torch.zeros(6, 4),
        "model/same": torch.zeros(2),
        "ema/first": torch.zeros(2),
    }
    load(found, Folder(str(tmp_path)))
    assert torch.equal(found["model/w"], W)
    assert found["model/same"].tolist() == found["ema/first"].tolist() == [1, 1]


def test_a_snapshot_is_a_copy_of_the_state():
    from rae_xla.config import MeshConfig, RuntimeConfig
    from rae_xla.runtime import start

    settings = RuntimeConfig(backend="torch")
    backend = start(settings, MeshConfig())
    state = torch.zeros(3, device=backend.device)
    snapshot = backend.snapshot({"model/w": state})
    state += 1
    [shard] = snapshot["model/w"].shards
    assert shard.data.tolist() == [0, 0, 0]
    assert backend.checkpoint_group() is None
