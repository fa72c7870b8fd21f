"""A dataset at an address gives the same rows as on disk, fetched once per node, despite server and network faults."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import cli, counting_dataset
from fsspec import AbstractFileSystem

from data_tools.tokenizers import load_tokenizer
from fusiontree.bench import loader
from fusiontree.data import remote
from fusiontree.data import sources as sources_module
from fusiontree.data.format import Dataset, tokenizer_fingerprint
from fusiontree.data.remote import AccessDeniedError, Cache, UnreachableError
from fusiontree.data.sources import Sources
from fusiontree.data.stream import TrainStream, single_source_recipe
from fusiontree.errors import UserError

pytest.importorskip("aiohttp")

SMALL = ["train/000000.idx", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]


class Server(ThreadingHTTPServer):
    """A server of a folder, with byte ranges and configurable faults."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[str] = []  # one for each of the next GET requests; "always ..." applies to all
        self.requests: list[tuple[str, str | None]] = []  # path and range of each GET
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def permanent_fault(self) -> str | None:
        return self.faults[0].removeprefix("always ") if self.faults and self.faults[0].startswith("always ") else None

    def next_fault(self) -> str | None:
        return self.permanent_fault() or (self.faults.pop(0) if self.faults else None)

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect, as some tests make them do."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        if not self.failed(self.server.permanent_fault()):
            self.answer(body=False)

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        fault = self.server.next_fault()
        if not self.failed(fault):
            self.answer(body=True, cut=fault == "drop", ranges=fault != "whole")

    def failed(self, fault: str | None) -> bool:
        if fault in ("stall", "late"):
            time.sleep(1.0 if fault == "stall" else 0.1)
        elif fault and fault.isdecimal():
            self.send_error(int(fault))
        return fault is not None and (fault == "stall" or fault.isdecimal())

    def answer(self, body: bool, cut: bool = False, ranges: bool = True) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, span = path.read_bytes(), self.headers.get("Range") if ranges else None
        size, status = len(content), 200
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            if int(first) >= size:
                self.send_error(416)
                return
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {span.removeprefix('bytes=')}/{size}")
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    server = Server(shards)
    yield server
    server.shutdown()
    server.server_close()


def same_rows(one: Dataset, other: Dataset) -> bool:
    return one.num_rows == other.num_rows and all(
        np.array_equal(a, b) for row in range(one.num_rows) for a, b in zip(one.row(row), other.row(row), strict=True)
    )


def shard_requests(server: Server) -> list[tuple[str, str | None]]:
    return [request for request in server.requests if request[0].endswith(".tar")]


def test_rows_equal_those_on_disk_and_are_fetched_once(server: Server, shards: Path, tmp_path: Path) -> None:
    dataset = Dataset(server.address, "train", Cache(tmp_path))
    assert same_rows(dataset, Dataset(shards))
    fetched = shard_requests(server)
    assert len(fetched) == 2 * dataset.num_rows == len(set(fetched))
    again = Dataset(server.address, "train", Cache(tmp_path))
    assert same_rows(again, Dataset(shards))
    assert shard_requests(server) == fetched
    assert again.fingerprint == Dataset(shards).fingerprint
    assert dataset.spans(3) == Dataset(shards).spans(3)


@pytest.mark.parametrize("fault", ["500", "429", "drop", "stall", "whole"])
def test_request_is_retried_after_a_fault(server: Server, shards: Path, tmp_path: Path, fault: str) -> None:
    dataset = Dataset(server.address, "train", Cache(tmp_path))
    server.requests.clear()
    server.faults = [fault, fault]
    for one, other in zip(dataset.row(2), Dataset(shards).row(2), strict=True):
        assert np.array_equal(one, other)
    assert Counter(shard_requests(server)).most_common()[0][1] == 3


@pytest.mark.parametrize("fault", ["500", "429", "stall", "drop"])
def test_unreachable_address_stops_the_run_in_one_line_and_masks_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})
    server.requests.clear()
    server.faults = [f"always {fault}"]
    stream = TrainStream(sources, single_source_recipe(0, 1024, 512), 1, workers=1)
    with pytest.raises(UnreachableError, match=r"http.*\.tar does not respond after 3 attempts") as caught:
        next(stream)
    stream.close()
    assert "\n" not in str(caught.value)
    assert Counter(request for request in shard_requests(server) if request[1]).most_common()[0][1] == 3


@pytest.mark.parametrize("status", ["401", "403"])
def test_denied_access_stops_the_run_in_one_line_and_masks_nothing(server: Server, tmp_path: Path, status: str) -> None:
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})
    server.requests.clear()
    server.faults = [f"always {status}"]
    stream = TrainStream(sources, single_source_recipe(0, 512, 512), 1)
    with pytest.raises(
        AccessDeniedError, match=rf"http.*\.tar: access denied \(.*{status}.*\); check .* credentials"
    ) as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1  # only the user can grant access, so there is no retry
    with pytest.raises(AccessDeniedError, match="manifest.json: access denied"):
        Dataset(server.address, "train", Cache(tmp_path / "empty"))


def test_busy_address_is_not_reported_as_missing_files(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    server.faults = ["always 429"]
    with pytest.raises(UnreachableError, match="manifest.json does not respond after 2 attempts .*429"):
        Dataset(server.address, "train", Cache(tmp_path))


def test_file_download_resumes_at_the_broken_piece(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 10_000)
    store = Dataset(server.address, "train", Cache(tmp_path)).shards[0].store
    server.requests.clear()
    server.faults = ["ok", "ok", "drop"]
    store.mirror(["train/000000.tar"], lambda name: False)
    requests = Counter(span for _, span in server.requests)
    assert requests["bytes=20000-29999"] == 2
    assert {count for span, count in requests.items() if span != "bytes=20000-29999"} == {1}
    assert (store.folder / "train/000000.tar").read_bytes() == (shards / "train/000000.tar").read_bytes()


def test_documents_of_shards_larger_than_the_cache_are_returned(server: Server, shards: Path, tmp_path: Path) -> None:
    dataset = Dataset(server.address, "train", Cache(tmp_path, limit=1000))
    server.requests.clear()
    assert [dataset.spans(row) for row in (0, 3)] == [Dataset(shards).spans(row) for row in (0, 3)]
    spans = [[int(at) for at in (span or "").removeprefix("bytes=").split("-")] for _, span in shard_requests(server)]
    tokens = int(dataset.shards[0].index["tokens"][0])
    assert [last < tokens for _, last in spans] == [True, True]  # the tokens of the sample are not fetched
    assert list(tmp_path.glob("*/*/*.tar")) == []


READER = """
import sys
from pathlib import Path
from fusiontree.data.format import Dataset
from fusiontree.data.remote import Cache
dataset = Dataset(sys.argv[1], "train", Cache(Path(sys.argv[2])))
print("open", flush=True)
sys.stdin.readline()
for row in range(dataset.num_rows):
    dataset.row(row)
"""


def reader(server: Server, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", READER, server.address, str(cache)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def test_two_processes_of_a_node_fetch_each_row_once(server: Server, shards: Path, tmp_path: Path) -> None:
    readers = [reader(server, tmp_path) for _ in range(2)]
    for process in readers:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in readers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    fetched = Counter(shard_requests(server))
    assert len(fetched) == 2 * Dataset(shards).num_rows
    assert set(fetched.values()) == {1}


def test_a_server_without_ranges_is_refused_before_any_shard_is_read(server: Server, tmp_path: Path) -> None:
    server.faults = ["always whole"]
    with pytest.raises(UserError, match=f"^{server.address}: the server ignores HTTP ranges and sends complete files"):
        Dataset(server.address, "train", Cache(tmp_path))
    assert [path for path, _ in server.requests] == ["/manifest.json"] * 3  # the file, and two requests for one byte


def test_processes_that_start_together_fetch_each_small_file_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads simulate processes: flock locks an open file, and each thread opens its own."""
    monkeypatch.setattr(remote, "TIMEOUT", 30)
    server.faults = ["always late"]  # all of them miss the files before one has fetched them
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Dataset(server.address, "train", Cache(tmp_path)), range(4)))
    fetched = Counter(path.lstrip("/") for path, _ in server.requests)
    assert fetched == {"manifest.json": 4 + 1} | dict.fromkeys(SMALL, 1)


def test_killed_process_leaves_no_lock_and_no_readable_partial_file(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    process = reader(server, tmp_path)
    server.faults = ["always stall"]
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not shard_requests(server) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    server.faults = []
    dataset = Dataset(server.address, "train", Cache(tmp_path))
    (tmp_path / "partial").write_bytes(b"half of a row, or of an index")
    assert same_rows(dataset, Dataset(shards))
    assert not (tmp_path / "partial").exists()


def test_cache_stays_within_its_limit_and_evicts_least_recently_used_rows(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    size = 512 * 2 + 64  # approximate bytes of a row
    dataset = Dataset(server.address, "train", Cache(tmp_path, limit=10 * size))
    rows = [*range(min(30, dataset.num_rows))]
    for row in rows:
        dataset.row(0)
        dataset.row(row)
        kept = [path.stat().st_size for path in tmp_path.glob("*/*/*.rows/*")]
        assert sum(kept) <= 10 * size
    names = {int(path.name) for path in tmp_path.glob("*/*/*.rows/*")}
    first = dataset.shards[0]._ranges(0)[0][0]
    assert sum(span.startswith(f"bytes={first}-") for _, span in shard_requests(server)) == 1  # row 0 was always in use
    assert 0 in names
    assert names >= {*rows[-5:]}
    assert 1 not in names


def test_all_processes_together_stay_within_the_cache_limit(
    server: Server, tokenizer_folder: Path, tmp_path: Path
) -> None:
    server.folder = tmp_path
    counting_dataset(tmp_path / "set", 300, 2)
    shutil.copytree(tokenizer_folder, tmp_path / "set/tokenizer")
    cache = Cache(tmp_path / "c", limit=100 * (2 * 32 + 4 * 2))  # bytes of a hundred rows
    one, *others = [Dataset(f"{server.address}/set", "train", cache) for _ in range(9)]
    for row in range(100):
        one.row(row)
    assert len([*tmp_path.glob("c/*/*/*.rows/*")]) == 100
    for number, other in enumerate(others):
        for row in range(3):  # so few that no process alone would exceed the limit
            other.row(100 + 3 * number + row)
            assert len([*tmp_path.glob("c/*/*/*.rows/*")]) <= 100
    shutil.rmtree(next(tmp_path.glob("c/*/train")))
    for row in range(200):  # rows were deleted by someone else; later the counter is, too
        one.row(row)
        assert len([*tmp_path.glob("c/*/*/*.rows/*")]) <= 100
        if row == 150:
            (tmp_path / "c/size").unlink()


def test_unwritable_cache_stops_the_run_in_one_line_and_masks_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(remote.os, "replace", full)
    with pytest.raises(UnreachableError, match=f"data.cache: {tmp_path} cannot be written .No space left on device.; "):
        sources.read(0, 1)
    monkeypatch.undo()
    assert sources.read(0, 1)[2] is None
    shutil.rmtree(tmp_path / "locks")
    (tmp_path / "locks").touch()
    with pytest.raises(UnreachableError, match=r"cannot be written \(File exists\)"):
        sources.read(0, 2)


def test_read_only_cached_row_masks_nothing(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})
    sources.read(0, 4)
    (cached,) = tmp_path.glob("*/*/*.rows/*")
    monkeypatch.setattr(remote.os, "utime", refuse)
    tokens, _, bad = sources.read(0, 4)
    assert bad is None
    assert np.array_equal(tokens, Dataset(shards).row(4)[0])
    content = cached.read_bytes()
    cached.write_bytes(content[:-3] + b"xyz")
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UnreachableError, match=f"data.cache: {cached} cannot be removed .Read-only file system.; "):
        sources.read(0, 4)
    monkeypatch.undo()
    cached.unlink()
    cached.mkdir()  # unreadable even for root
    with pytest.raises(UnreachableError, match=f"data.cache: {cached} cannot be read .Is a directory.; "):
        sources.read(0, 4)


def test_row_damaged_in_the_cache_is_fetched_again(server: Server, shards: Path, tmp_path: Path) -> None:
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})
    sources.read(0, 4)
    (cached,) = tmp_path.glob("*/*/*.rows/*")
    cached.write_bytes(cached.read_bytes()[:-3] + b"xyz")
    tokens, _, bad = sources.read(0, 4)
    assert bad is None
    assert np.array_equal(tokens, Dataset(shards).row(4)[0])


def test_row_damaged_at_its_address_is_masked_and_named(server: Server, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    server.folder = tmp_path / "copy"
    shard = Dataset(server.folder).shards[0]
    with open(shard.path, "r+b") as stream:
        stream.seek(int(shard.index["tokens"][1]))
        stream.write(b"\xff\xff")
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path / "cache"))})
    assert str(sources.read(0, 1)[2]) == f"{server.address}/{shard.info.name}: row 1 is damaged (checksum differs)"
    assert sources.read(0, 2)[2] is None
    shard.path.unlink()
    assert "row 3 cannot be read" in str(sources.read(0, 3)[2])


@pytest.fixture
def copy(server: Server, shards: Path, tmp_path: Path) -> Path:
    """Return a copy of the dataset, served by the server, for tests to damage."""
    server.folder = shutil.copytree(shards, tmp_path / "copy")
    return server.folder


@pytest.mark.parametrize("name", SMALL)
def test_small_file_repaired_at_its_address_is_fetched_again(
    server: Server, copy: Path, tmp_path: Path, name: str
) -> None:
    def started() -> None:
        dataset = Dataset(server.address, "train", Cache(tmp_path / "cache"))
        load_tokenizer(tokenizer := dataset.folder / "tokenizer")
        dataset.manifest.require_tokenizer(tokenizer_fingerprint(tokenizer), tokenizer)

    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-3] + b"}}}")
    for _ in range(2):
        with pytest.raises(UserError, match=Path(name).stem):
            started()
    (copy / name).write_bytes(content)
    started()
    (cached,) = tmp_path.glob(f"cache/*/{name}")
    cached.write_bytes(b"")  # as after a power failure
    started()
    server.requests.clear()
    started()
    assert [path for path, _ in server.requests] == ["/manifest.json"]


def test_shard_truncated_at_its_address_is_refused_at_the_start_and_masked_later(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "RETRY_DELAYS", (0.0, 0.0))
    shutil.copytree(shards, tmp_path / "copy")
    server.folder = tmp_path / "copy"
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path / "cache"))})
    shard = Dataset(server.folder).shards[0]
    size = int(shard.index["tokens"][2]) + 100  # row 2 is cut, later rows are missing
    os.truncate(shard.path, size)
    server.faults = ["drop"]
    assert sources.read(0, 1)[2] is None
    server.requests.clear()
    for row in (2, 5):
        tokens, ends, bad = sources.read(0, row)
        assert str(bad) == f"{server.address}/{shard.info.name}: row {row} cannot be read (cut short at byte {size})"
        assert set(tokens.tolist()) == {sources.pad_id}
        assert ends.tolist() == [-sources.row_len]
    assert len(shard_requests(server)) == 6  # each as often as a row on disk, without network retries
    words = rf"shard {server.address}/{shard.info.name} has {size} bytes, not {shard.info.bytes}; copy it again"
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            Dataset(server.address, "train", Cache(tmp_path / "empty"))
    shard.path.unlink()
    with pytest.raises(UserError, match=r"lacks files of the dataset \(.*000000\.tar\); copy the dataset again"):
        Dataset(server.address, "train", Cache(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("ftp://host/books", "unknown protocol ftp; use one of s3, gs"),
        ("{server}/nowhere", "nowhere has no readable manifest.json"),
    ],
)
def test_address_without_a_dataset_is_refused_in_one_line(
    server: Server, location: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Dataset(location.format(server=server.address), "train", Cache(tmp_path))
    assert "\n" not in str(caught.value)


def test_loader_benchmark_runs_at_an_address(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("REPEATS", 1), ("SECONDS", 0.05), ("MEMORY_BATCHES", 20)):
        monkeypatch.setattr(loader, name, value)
    figures = loader.bench_loader(server.address, 128)
    assert figures["rows_tokens_per_s"] > 0
    assert figures["first_batch_at_step_0_seconds"] > 0
    assert [name for name in figures if "webdataset" in name] == []


# --- an object store -------------------------------------------------------------------------------------------------


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[AbstractFileSystem]:
    moto_server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.makedirs("bucket", exist_ok=True)  # the store keeps its content between tests
    yield files
    store.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def gs_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[AbstractFileSystem]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # requires bucket types that the emulator lacks
    gcsfs = pytest.importorskip("gcsfs")
    store = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    store.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{store._api._httpd.server_port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield gcsfs.GCSFileSystem()
    store.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_dataset_in_an_object_store_trains_as_on_disk(
    protocol: str, request: pytest.FixtureRequest, shards: Path, tmp_path: Path
) -> None:
    def batches(location: str) -> list:
        sources = Sources({"": Dataset(location, "train", Cache(tmp_path))})
        stream = TrainStream(sources, single_source_recipe(0, 2048, 128), 4, workers=3)
        found = [batch.input_ids.tolist() for _ in range(6) for batch in next(stream)]
        stream.close()
        return found

    files: AbstractFileSystem = request.getfixturevalue(f"{protocol}_bucket")
    files.put(str(shards) + "/", "bucket/books/", recursive=True)
    address = f"{protocol}://bucket/books"
    assert batches(address) == batches(str(shards))
    words = [f"data.path={address}", f"data.cache={tmp_path}", "data.seq_len=128", "model.vocab_size=512"]
    assert "padding" in cli("data", "plan", "tiny", *words).stdout
    shown = cli("data", "at", "tiny", *words, "--step", 3).stdout
    assert f"{address}/train/" in shown
    assert ".txt from" in shown
    small = cli("data", "plan", "tiny", *words[:-1], "model.vocab_size=100", code=2).stderr
    assert "more than model.vocab_size 100" in small
    with pytest.raises(UserError, match=f"{protocol}://bucket/nowhere has no readable manifest.json"):
        Dataset(f"{protocol}://bucket/nowhere", "train", Cache(tmp_path))


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_shard_truncated_in_an_object_store_is_masked_and_named(
    protocol: str, request: pytest.FixtureRequest, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "RETRY_DELAYS", (0.0, 0.0))
    files: AbstractFileSystem = request.getfixturevalue(f"{protocol}_bucket")
    files.put(str(shards) + "/", "bucket/books/", recursive=True)
    sources = Sources({"": Dataset(f"{protocol}://bucket/books", "train", Cache(tmp_path))})
    shard = sources.datasets[0].shards[0]
    content = files.cat_file(f"bucket/books/{shard.info.name}")
    size = int(shard.index["tokens"][2]) + 100
    files.pipe_file(f"bucket/books/{shard.info.name}", content[:size])
    assert sources.read(0, 1)[2] is None
    for row in (2, 5):
        assert str(sources.read(0, row)[2]) == f"{shard.where}: row {row} cannot be read (cut short at byte {size})"


@dataclass
class FaultInjector:
    """Injects (HTTP status, code) into the responses to the next requests.

    Status 0 is silence. If `permanent`, the last fault applies to all further requests.
    """

    faults: list[tuple[int, str]] = field(default_factory=list)
    permanent: bool = False
    injected: int = 0  # requests that got a fault

    def next_fault(self) -> tuple[int, str] | None:
        if not self.faults:
            return None
        self.injected += 1
        fault = self.faults[0] if self.permanent and len(self.faults) == 1 else self.faults.pop(0)
        if fault[0] == 0:
            threading.Event().wait(1.2)
        return fault


@pytest.fixture
def injector(monkeypatch: pytest.MonkeyPatch) -> FaultInjector:
    """Inject faults into both stores; set up before the stores, because it also disables their clients' retries."""
    app = pytest.importorskip("moto.moto_server.werkzeug_app").DomainDispatcherApplication
    router = pytest.importorskip("gcp_storage_emulator.server").Router
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.9)  # shorter than gcsfs's delay before its own retry, a second or more
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # for botocore
    injector, answer, handle = FaultInjector(), app.__call__, router.handle

    def s3(self: Any, environ: Any, start_response: Any) -> Any:
        if (fault := injector.next_fault()) is None:
            return answer(self, environ, start_response)
        content = f"<Error><Code>{fault[1]}</Code><Message>no: {fault[1]}</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
        start_response(f"{fault[0] or 500} no", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    def gs(self: Any, method: str) -> None:
        if (fault := injector.next_fault()) is None:
            handle(self, method)
        else:
            self._request_handler.send_error(fault[0] or 500, fault[1])

    monkeypatch.setattr(app, "__call__", s3)
    monkeypatch.setattr(router, "handle", gs)
    return injector


@pytest.fixture
def books(shards: Path, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return a function that puts `shards` into a store and returns the address."""

    def put(protocol: str) -> str:
        files: AbstractFileSystem = request.getfixturevalue(f"{protocol}_bucket")
        files.put(str(shards) + "/", "bucket/books/", recursive=True)
        return f"{protocol}://bucket/books"

    return put


BUSY = {
    "s3": [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests"), (0, "")],
    "gs": [(500, "backendError"), (503, "backendError"), (429, "rateLimitExceeded"), (0, "")],
}
EVERY_BUSY = [(protocol, fault) for protocol, faults in BUSY.items() for fault in faults]


@pytest.mark.parametrize(("protocol", "fault"), EVERY_BUSY)
def test_busy_store_is_retried(
    injector: FaultInjector,
    books: Callable[[str], str],
    shards: Path,
    tmp_path: Path,
    protocol: str,
    fault: tuple[int, str],
) -> None:
    dataset = Dataset(books(protocol), "train", Cache(tmp_path))
    injector.faults = [fault] * (6 if fault[1] == "SlowDown" else 2)  # s3fs itself retries SlowDown several times
    for one, other in zip(dataset.row(2), Dataset(shards).row(2), strict=True):
        assert np.array_equal(one, other)
    assert not injector.faults


def assert_read_raises(sources: Sources, kind: type[Exception], words: str) -> None:
    """Check that reading a row raises a one-line error instead of masking the row."""
    with pytest.raises(kind, match=words) as caught:
        sources.read(0, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("protocol", "fault"), EVERY_BUSY)
def test_permanently_busy_store_stops_the_run_and_masks_nothing(
    injector: FaultInjector,
    books: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    fault: tuple[int, str],
) -> None:
    sources = Sources({"": Dataset(books(protocol), "train", Cache(tmp_path))})
    delays: list[float] = []
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    monkeypatch.setattr(remote.time, "sleep", delays.append)
    injector.faults, injector.permanent = [fault], True
    assert_read_raises(sources, UnreachableError, rf"{protocol}://.*\.tar does not respond after 3 attempts \(.*\)")
    assert [0.5 <= delay / (0.01 * 2**number) <= 1 for number, delay in enumerate(delays)] == [True, True]


DENIALS = [("s3", (403, "AccessDenied")), ("s3", (400, "ExpiredToken")), ("s3", (403, "InvalidAccessKeyId"))]
DENIALS += [("gs", (403, "forbidden")), ("gs", (401, "required"))]


@pytest.mark.parametrize(("protocol", "fault"), DENIALS)
def test_store_that_denies_access_stops_the_run_at_once_and_masks_nothing(
    injector: FaultInjector,
    books: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    fault: tuple[int, str],
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 30)  # after a 400 to a HEAD request botocore tries several regions
    address = books(protocol)
    sources = Sources({"": Dataset(address, "train", Cache(tmp_path))})
    injector.faults, injector.permanent = [fault], True
    assert_read_raises(sources, AccessDeniedError, rf"{address}/.*\.tar: access denied \(.*\); check .* credentials")
    assert injector.injected == 1
    with pytest.raises(AccessDeniedError, match=r"manifest\.json: access denied"):
        Dataset(address, "train", Cache(tmp_path / "empty"))


def test_missing_credentials_are_reported_at_once(
    injector: FaultInjector, books: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = books("s3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    type(fsspec.filesystem("s3")).clear_instance_cache()
    monkeypatch.setattr(remote, "TIMEOUT", 30)  # creating a client takes long on a busy machine
    monkeypatch.setattr(remote.time, "sleep", lambda _: pytest.fail("there must be no retry"))
    with pytest.raises(AccessDeniedError, match=r"manifest\.json: access denied \(NoCredentialsError: .*credentials"):
        Dataset(address, "train", Cache(tmp_path / "cache"))
