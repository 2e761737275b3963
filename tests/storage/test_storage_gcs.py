"""Storage in a bucket: what test_storage.py does not cover, and network faults."""

from __future__ import annotations

import gc
import http.client
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from gcs_emulator import GcsEmulator

from rae_xla import storage
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow

MIB = 1 << 20
FAILING = [
    {"kind": "503"},
    {"kind": "429"},
    {"kind": "500"},
    {"kind": "disconnect"},
    {"kind": "disconnect", "after_bytes": 5},
    {"kind": "truncate", "after_bytes": 5},
    {"kind": "stall"},
    {"kind": "stall", "after_bytes": 5},
]


def fault_id(fault: dict[str, object]) -> str:
    return "-".join(str(part) for part in fault.values())


def bytes_of(size: int) -> bytes:
    """Return random bytes that end with line ends, which a mail parser of uploads would lose."""
    return random.Random(size).randbytes(max(size - 2, 0)) + b"\n\r"[-size:] * (size > 0)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A timeout that suffices on a busy machine; shorter for stalls, which last that long."""
    stalls = "stall" in request.node.name
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "0.6" if stalls else "2")


@pytest.fixture
def shortest_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout for permanent failures; too short to succeed on a busy machine."""
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "0.1")


@pytest.fixture
def file(bucket: str) -> str:
    storage.write_bytes(f"{bucket}/file.bin", b"0123456789")
    return f"{bucket}/file.bin"


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 8 * MIB - 1, 8 * MIB, 16 * MIB + 1])
def test_every_byte_is_stored(bucket, size):
    content = bytes_of(size)
    storage.write_bytes(f"{bucket}/file", content)
    assert storage.read_bytes(f"{bucket}/file") == content
    assert storage.read_range(f"{bucket}/file", 0, size + 5) == content
    assert storage.read_range(f"{bucket}/file", size // 2, size) == content[size // 2 :]
    assert storage.read_range(f"{bucket}/file", size, 5) == b""
    assert storage.size(f"{bucket}/file") == size


def test_many_small_reads_are_few_requests(bucket, gcs):
    content = bytes_of(20 * MIB)
    storage.write_bytes(f"{bucket}/file", content)
    gcs.reset()
    with storage.open_read(f"{bucket}/file") as file:
        assert b"".join(iter(lambda: file.read(100_003), b"")) == content
    assert gcs.stats()["media_gets"] == 2


def test_sequential_reads_are_of_one_generation(bucket):
    storage.write_bytes(f"{bucket}/file", bytes(20 * MIB))
    with storage.open_read(f"{bucket}/file") as file:
        file.read(10)
        storage.write_bytes(f"{bucket}/file", bytes(20 * MIB))
        with pytest.raises(FileNotFoundError):
            file.read()


def test_an_overwritten_object_is_not_found(bucket, file, gcs):
    generation = storage.list_files(bucket)["file.bin"].generation
    assert storage.read_range(file, 2, 3, generation) == b"234"
    storage.write_bytes(file, b"abcdefghij")
    gcs.reset()
    with pytest.raises(FileNotFoundError, match=r"file\.bin"):
        storage.read_range(file, 2, 3, generation)
    assert gcs.stats()["media_gets"] == 0
    assert gcs.stats()["requests"] == {"GET": 1}


@pytest.mark.parametrize("fault", FAILING, ids=fault_id)
def test_reads_survive_transient_faults(file, gcs, short_timeout, fault):
    gcs.inject("GET .*alt=media", times=2, **fault)
    assert storage.read_range(file, 2, 7) == b"2345678"
    gcs.clear_faults()
    gcs.inject("GET .*alt=media", times=2, **fault)
    assert storage.read_bytes(file) == b"0123456789"
    assert gcs.stats()["faults"] == {fault["kind"]: 4}


def test_slow_responses_are_not_failures(file, bucket, gcs, short_timeout):
    """As long as bytes arrive, a request may take longer than the timeout."""
    storage.write_bytes(f"{bucket}/large", bytes_of(MIB))
    gcs.inject("GET .*alt=media", kind="latency", seconds=0.1)
    gcs.inject("GET .*large.*alt=media", kind="bandwidth", bytes_per_second=MIB / 2.5)
    begin = time.monotonic()
    assert storage.read_range(file, 2, 7) == b"2345678"
    assert storage.read_bytes(f"{bucket}/large") == bytes_of(MIB)
    assert time.monotonic() - begin > 2.5
    assert gcs.stats()["faults"] == {"latency": 2, "bandwidth": 1}


@pytest.mark.parametrize("fault", FAILING, ids=fault_id)
def test_permanent_faults_are_one_error_in_limited_time(file, gcs, shortest_timeout, fault):
    gcs.inject("GET .*alt=media", **fault)
    begin = time.monotonic()
    with pytest.raises(OSError, match=f"{file}.*tried"):
        storage.read_range(file, 2, 7)
    assert time.monotonic() - begin < 3
    assert 3 <= gcs.stats()["faults"][fault["kind"]] < 20


@pytest.mark.parametrize("kind", ["503", "stall"])
@pytest.mark.parametrize(
    "use",
    [
        storage.exists,
        storage.is_folder,
        storage.size,
        storage.list_files,
        storage.remove,
        storage.open_read,
        lambda path: storage.write_bytes(path, b"x"),
        lambda path: storage.write_bytes(path, bytes(17 * MIB)),
    ],
    ids=["exists", "is_folder", "size", "list", "remove", "open", "write", "write_parts"],
)
def test_nothing_hangs_and_every_error_names_the_path(
    file, gcs, shortest_timeout, use: Callable[[str], object], kind
):
    gcs.inject(kind=kind)
    begin = time.monotonic()
    with pytest.raises(OSError, match=file):
        use(file)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("fault", [f for f in FAILING if f["kind"] != "truncate"], ids=fault_id)
def test_uploads_survive_transient_faults(bucket, gcs, short_timeout, fault):
    """Any request may fail, and any response be lost after the server has acted."""
    content = bytes_of(33 * MIB)
    gcs.inject("POST ", times=1, **fault)
    gcs.inject("PUT ", times=2, probability=0.7, **fault)
    storage.write_bytes(f"{bucket}/file", content)
    gcs.clear_faults()
    assert storage.read_bytes(f"{bucket}/file") == content


def test_a_part_that_cannot_be_sent_leaves_no_object(bucket, gcs, shortest_timeout):
    gcs.inject("PUT .*upload_id", kind="503")
    with pytest.raises(OSError, match=f"{bucket}/file"):
        storage.write_bytes(f"{bucket}/file", bytes(17 * MIB))
    gc.collect()  # the writer of gcsfs crashes here in Python 3.12.1
    gcs.clear_faults()
    assert storage.list_files(bucket) == {}
    assert not storage.exists(f"{bucket}/file")


def test_a_server_that_does_not_read_is_an_error(monkeypatch, shortest_timeout):
    """The timeout of aiohttp starts after everything was sent, hence never."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, but does not read
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(OSError, match="gs://shards/file: nothing could be sent"):
            storage.write_bytes("gs://shards/file", bytes(16 * MIB))
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize("ending", ["exception", "kill"])
def test_an_interrupted_upload_creates_no_object(bucket, gcs, ending):
    child = f"""
import os, signal
from rae_xla import storage
with storage.create("{bucket}/file") as file:
    for _ in range(5):
        file.write(bytes(8 << 20))
    if {ending!r} == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("power cut")
"""
    environment = os.environ | gcs.environment()
    done = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True)
    assert done.returncode == (-signal.SIGKILL if ending == "kill" else 1)
    assert gcs.stats()["requests"]["PUT"] == 2
    assert storage.list_files(bucket) == {}


def test_a_refused_connection_is_an_error_in_limited_time(monkeypatch, shortest_timeout):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(OSError, match="gs://shards/file"):
        storage.read_range("gs://shards/file", 0, 1)
    assert time.monotonic() - begin < 3


def test_an_invalid_timeout_is_an_error(monkeypatch):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "soon")
    with pytest.raises(UserError, match="RAE_XLA_GCS_TIMEOUT=soon"):
        storage.exists("gs://shards/file")


def test_sixteen_threads_read_concurrently(bucket, gcs):
    content = bytes_of(4 * MIB)
    storage.write_bytes(f"{bucket}/file", content)
    gcs.set_latency(0.02)
    starts = range(0, 4 * MIB, 40_001)
    with ThreadPoolExecutor(16) as threads:
        begin = time.monotonic()
        pieces = threads.map(
            lambda start: storage.read_range(f"{bucket}/file", start, 40_001), starts
        )
        assert b"".join(pieces) == content
    assert time.monotonic() - begin < 0.5 * 0.02 * len(starts)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_other_processes_read(file, method):
    storage.read_bytes(file)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(storage.read_bytes, [file] * 4).get(60) == [b"0123456789"] * 4


def test_a_long_listing(bucket, gcs):
    with ThreadPoolExecutor(8) as threads:
        paths = [f"{bucket}/{number:04d}" for number in range(3000)]
        list(threads.map(lambda path: storage.write_bytes(path, path[-4:].encode()), paths))
    gcs.reset()
    listed = storage.list_files(bucket)
    assert list(listed) == [f"{number:04d}" for number in range(3000)]
    assert gcs.stats()["requests"] == {"GET": 3}
    info = listed["0000"]
    assert (info.size, info.md5) == (4, "4a7d1ed414474e4033ac29ccb8653d9b")
    assert storage.read_range(paths[0], 0, 4, info.generation) == b"0000"


def test_files_of_other_processes_are_seen(bucket, gcs):
    """Listings are not cached."""
    assert storage.list_files(bucket) == {}
    write = f"from rae_xla import storage; storage.write_bytes('{bucket}/new', b'abc')"
    subprocess.run([sys.executable, "-c", write], env=os.environ | gcs.environment(), check=True)
    assert storage.exists(f"{bucket}/new")
    assert storage.size(f"{bucket}/new") == 3


def test_two_servers_in_one_process(file, monkeypatch):
    with GcsEmulator() as other:
        other.create_bucket("shards")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", other.url.removeprefix("http://"))
        assert not storage.exists(file)
        storage.write_bytes(file, b"other")
        monkeypatch.undo()
        assert storage.read_bytes(file) == b"0123456789"


def test_requests_are_counted(file, gcs):
    gcs.reset()
    storage.read_range(file, 2, 7)
    storage.write_bytes(file, b"abc")
    stats = gcs.stats()
    assert stats["requests"] == {"GET": 1, "POST": 1}
    assert (stats["media_gets"], stats["bytes_in"], stats["faults"]) == (1, 3, {})
    assert stats["bytes_out"] >= 7
    assert gcs.cpu_seconds() > 0


def test_the_emulator_responds_like_the_real_server(file, gcs):
    """Requests that only other clients send."""
    name = file.removeprefix("gs://shards/")

    def request(method, path, body=None, **headers):
        connection = http.client.HTTPConnection(gcs.url.removeprefix("http://"))
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    path = f"/download/storage/v1/b/shards/o/{name.replace('/', '%2F')}?alt=media"
    status, body, headers = request("GET", path, Range="bytes=-3")
    assert (status, body, headers["Content-Range"]) == (206, b"789", "bytes 7-9/10")
    assert request("GET", path, Range="bytes=10-12")[0] == 416
    assert request("GET", f"{path}&generation=1")[0] == 404
    upload = "/upload/storage/v1/b/shards/o?uploadType"
    assert request("POST", f"{upload}=media&name={name}&ifGenerationMatch=0", b"x")[0] == 412
    for end in ("\n", "\r\n"):
        parts = [
            "--=",
            "Content-Type: a/json",
            "",
            "{}",
            "--=",
            "Content-Type: a/b",
            "",
            "\r--\n\r",
            "--=--",
        ]
        kind = {"Content-Type": 'multipart/related; boundary="="'}
        body = end.join(parts).encode()
        assert request("POST", f"{upload}=multipart&name={name}", body, **kind)[0] == 200
        assert storage.read_bytes(file) == b"\r--\n\r"
    moved = path.split("?")[0].removeprefix("/download")
    assert request("POST", f"{moved}/moveTo/o/{name.replace('/', '%2F')}2")[0] == 200
    assert storage.read_bytes(f"{file}2") == b"\r--\n\r"
    assert not storage.exists(file)


def test_importing_storage_imports_no_client_library():
    code = (
        "import sys, rae_xla.storage;"
        "print(*{'fsspec', 'gcsfs', 'aiohttp', 'google.auth'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_server_ends_with_its_parent():
    start = "import sys; sys.path.insert(0, 'tests/helpers'); from gcs_emulator import GcsEmulator;"
    start += "import os; e = GcsEmulator().start(); print(e._process.pid, flush=True); os.abort()"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True)
    server = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the server still runs")
