"""What is written in shards is read, by us and by torch itself; and by several processes."""

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

from rae_xla.interop.checkpoint_folder import Folder
from rae_xla.runtime import checkpoint as sharded
from rae_xla.runtime.snapshot import HostShard, HostTensor

pytestmark = pytest.mark.unhurried

W = torch.arange(24.0).reshape(6, 4)
SNAPSHOT = {
    "model/w": HostTensor((6, 4), (HostShard(W[4:], (4, 0)), HostShard(W[:4], (0, 0)))),
    "ema/count": HostTensor.whole(torch.tensor(3)),
    "ema/b": HostTensor.whole(torch.linspace(0, 1, 5).bfloat16()),
}


def write(folder, snapshot=SNAPSHOT):
    committed = {}
    folder.mkdir(exist_ok=True)
    sharded.save(snapshot, Folder(str(folder)), begin=lambda: None, commit=committed.update)
    return committed


def test_written_and_read_back_part_by_part(tmp_path):
    files = write(tmp_path)
    assert set(files) == {"model-0.distcp", "ema-0.distcp", ".metadata"}
    assert all((tmp_path / name).stat().st_size == facts.size for name, facts in files.items())
    stored = sharded.stored_tensors(Folder(str(tmp_path)))
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "model/w": ((6, 4), torch.float32),
        "ema/count": ((), torch.int64),
        "ema/b": ((5,), torch.bfloat16),
    }
    (tmp_path / "model-0.distcp").unlink()  # of no concern to who wants the average
    tensors = {k: torch.empty_like(t, device="cpu") for k, t in stored.items() if k[:3] == "ema"}
    sharded.load(tensors, Folder(str(tmp_path)))
    assert tensors["ema/count"] == 3
    assert torch.equal(tensors["ema/b"], SNAPSHOT["ema/b"].shards[0].data)


def test_of_a_view_only_what_is_seen_is_written(tmp_path):
    large = torch.zeros(1000, 100)
    write(tmp_path, {"model/w": HostTensor.whole(large[7])})
    assert (tmp_path / "model-0.distcp").stat().st_size < 4 * large[7].numel() + 2000


def test_torch_reads_what_we_write(tmp_path):
    write(tmp_path)
    found = {"model/w": torch.zeros(6, 4), "ema/count": torch.tensor(0)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(str(tmp_path)), no_dist=True)
    assert torch.equal(found["model/w"], W)
    assert found["ema/count"] == 3


def test_a_tensor_that_is_not_covered_is_not_saved(tmp_path):
    for shards in ((HostShard(W[:4], (0, 0)),), ()):
        with pytest.raises(sharded.SaveError, match=r"do not make up model/w \(6, 4\)"):
            write(tmp_path, {"model/w": HostTensor((6, 4), shards)})


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("content", [b"", b"half a pick", pickle.dumps(Evil()), pickle.dumps({})])
def test_a_table_that_is_none_runs_no_code(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata"):
        sharded.stored_tensors(Folder(str(tmp_path)))
    assert not (tmp_path / "owned").exists()


class Full(Folder):
    """A disk on which there is no room for one of the files."""

    @contextlib.contextmanager
    def create(self, name):
        if name.startswith("ema"):
            raise OSError(28, "No space left on device")
        with super().create(name) as file:
            yield file


def test_a_full_disk_is_told_and_nothing_is_committed(tmp_path):
    committed = []
    with pytest.raises(sharded.SaveError, match="No space left"):
        sharded.save(
            SNAPSHOT, Full(str(tmp_path)), begin=lambda: None, commit=committed.append
        )  # fmt: skip
    assert committed == []


PROCESS = """
import json, sys
import torch
from rae_xla.interop.checkpoint_folder import Folder
from rae_xla.runtime import checkpoint as sharded
from rae_xla.runtime.hosts import Hosts
from rae_xla.runtime.snapshot import HostShard, HostTensor

rank, folder = int(sys.argv[1]), sys.argv[2]
group = Hosts(rank, 2).new_group()
w = torch.arange(24.0).reshape(6, 4)[3 * rank : 3 * rank + 3]
snapshot = {
    "model/w": HostTensor((6, 4), (HostShard(w, (3 * rank, 0)),)),
    "model/same": HostTensor.whole(torch.ones(2)),
    "ema/first": HostTensor((2,), (HostShard(torch.ones(2), (0,)),) if rank == 0 else ()),
}
said = []

class Broken(Folder):
    def create(self, name):
        if name.endswith("-1.distcp"):
            raise OSError(5, "Input/output error")
        return super().create(name)

def save(files):
    try:
        sharded.save(
            snapshot, files, begin=lambda: said.append("begin"),
            commit=lambda files: said.append(sorted(files)), group=group,
        )
    except sharded.SaveError as error:
        said.append(str(error))

save(Broken(folder))
save(Folder(folder))
print(json.dumps(said))
"""


def test_two_processes_write_a_part_each_and_fail_together(tmp_path):
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
    said = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in processes]
    failed = "process 1: [Errno 5] Input/output error"
    files = [".metadata", "ema-0.distcp", "model-0.distcp", "model-1.distcp"]
    assert said == [["begin", failed, "begin", files], [failed]]
    found = {
        "model/w": torch.zeros(6, 4),
        "model/same": torch.zeros(2),
        "ema/first": torch.zeros(2),
    }
    sharded.load(found, Folder(str(tmp_path)))
    assert torch.equal(found["model/w"], W)
    assert found["model/same"].tolist() == found["ema/first"].tolist() == [1, 1]


def test_a_snapshot_does_not_change_with_the_state():
    from rae_xla.config import MeshConfig, RuntimeConfig
    from rae_xla.runtime import start

    settings = RuntimeConfig(backend="torch")
    runtime = start(settings, MeshConfig())
    state = torch.zeros(3, device=runtime.device)
    snapshot = runtime.snapshot({"model/w": state})
    state += 1
    [shard] = snapshot["model/w"].shards
    assert shard.data.tolist() == [0, 0, 0]
    assert runtime.saving_group() is None
