"""A dataset at an address gives the same rows as on disk, through every fault of the way, fetched once per node."""

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
from fusiontree.data.remote import Cache, RefusedError, UnreachableError
from fusiontree.data.sources import Sources
from fusiontree.data.stream import TrainStream, single_source_recipe
from fusiontree.errors import UserError

pytest.importorskip("aiohttp")

SMALL = ["train/000000.idx", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]


class Server(ThreadingHTTPServer):
    """Serves a folder with byte ranges, and fails as told."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[str] = []  # of the next GET requests, one each; the last stays if it is "always ..."
        self.asked: list[tuple[str, str | None]] = []  # path and range of each GET
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def lasting(self) -> str | None:
        return self.faults[0].removeprefix("always ") if self.faults and self.faults[0].startswith("always ") else None

    def fault(self) -> str | None:
        return self.lasting() or (self.faults.pop(0) if self.faults else None)

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        if not self.failed(self.server.lasting()):
            self.answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        fault = self.server.fault()
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


def rows_asked(server: Server) -> list[tuple[str, str | None]]:
    return [asked for asked in server.asked if asked[0].endswith(".tar")]


def test_rows_are_those_on_disk_and_are_fetched_once(server: Server, shards: Path, tmp_path: Path) -> None:
    dataset = Dataset(server.address, "train", Cache(tmp_path))
    assert same_rows(dataset, Dataset(shards))
    fetched = rows_asked(server)
    assert len(fetched) == 2 * dataset.num_rows == len(set(fetched))
    again = Dataset(server.address, "train", Cache(tmp_path))
    assert same_rows(again, Dataset(shards))
    assert rows_asked(server) == fetched
    assert again.fingerprint == Dataset(shards).fingerprint
    assert dataset.spans(3) == Dataset(shards).spans(3)


@pytest.mark.parametrize("fault", ["500", "429", "drop", "stall", "whole"])
def test_a_fault_is_tried_again(server: Server, shards: Path, tmp_path: Path, fault: str) -> None:
    dataset = Dataset(server.address, "train", Cache(tmp_path))
    server.asked.clear()
    server.faults = [fault, fault]
    for one, other in zip(dataset.row(2), Dataset(shards).row(2), strict=True):
        assert np.array_equal(one, other)
    assert Counter(rows_asked(server)).most_common()[0][1] == 3


@pytest.mark.parametrize("fault", ["500", "429", "stall", "drop"])
def test_an_address_that_stays_silent_stops_the_run_in_one_line_and_masks_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})
    server.asked.clear()
    server.faults = [f"always {fault}"]
    stream = TrainStream(sources, single_source_recipe(0, 1024, 512), 1, workers=1)
    with pytest.raises(UnreachableError, match=r"http.*\.tar does not answer after 3 attempts") as caught:
        next(stream)
    stream.close()
    assert "\n" not in str(caught.value)
    assert Counter(asked for asked in rows_asked(server) if asked[1]).most_common()[0][1] == 3


@pytest.mark.parametrize("status", ["401", "403"])
def test_an_address_that_refuses_stops_the_run_in_one_line_and_masks_nothing(
    server: Server, tmp_path: Path, status: str
) -> None:
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})
    server.asked.clear()
    server.faults = [f"always {status}"]
    stream = TrainStream(sources, single_source_recipe(0, 512, 512), 1)
    with pytest.raises(
        RefusedError, match=rf"http.*\.tar may not be read \(.*{status}.*\); check .* credentials"
    ) as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1  # nobody but the user can change it
    with pytest.raises(RefusedError, match="manifest.json may not be read"):
        Dataset(server.address, "train", Cache(tmp_path / "empty"))


def test_a_start_finds_the_address_busy_and_not_files_missing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    server.faults = ["always 429"]
    with pytest.raises(UnreachableError, match="manifest.json does not answer after 2 attempts .*429"):
        Dataset(server.address, "train", Cache(tmp_path))


def test_a_whole_file_goes_on_where_it_was_cut(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 10_000)
    store = Dataset(server.address, "train", Cache(tmp_path)).shards[0].store
    server.asked.clear()
    server.faults = ["ok", "ok", "drop"]
    store.files(["train/000000.tar"], lambda name: False)
    asked = Counter(span for _, span in server.asked)
    assert asked["bytes=20000-29999"] == 2
    assert {count for span, count in asked.items() if span != "bytes=20000-29999"} == {1}
    assert (store.folder / "train/000000.tar").read_bytes() == (shards / "train/000000.tar").read_bytes()


def test_documents_are_told_of_shards_larger_than_the_cache(server: Server, shards: Path, tmp_path: Path) -> None:
    dataset = Dataset(server.address, "train", Cache(tmp_path, limit=1000))
    server.asked.clear()
    assert [dataset.spans(row) for row in (0, 3)] == [Dataset(shards).spans(row) for row in (0, 3)]
    asked = [[int(at) for at in (span or "").removeprefix("bytes=").split("-")] for _, span in rows_asked(server)]
    tokens = int(dataset.shards[0].index["tokens"][0])
    assert [last < tokens for _, last in asked] == [True, True]  # the tokens of the sample are left where they are
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
    fetched = Counter(rows_asked(server))
    assert len(fetched) == 2 * Dataset(shards).num_rows
    assert set(fetched.values()) == {1}


def test_processes_of_a_node_that_start_together_fetch_each_small_file_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for processes: a lock is held by an open file, of which each of them has its own."""
    monkeypatch.setattr(remote, "TIMEOUT", 30)
    server.faults = ["always late"]  # so that all of them miss the files before one has them
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Dataset(server.address, "train", Cache(tmp_path)), range(4)))
    fetched = Counter(path.lstrip("/") for path, _ in server.asked)
    assert fetched == {"manifest.json": 4} | dict.fromkeys(SMALL, 1)


def test_a_killed_process_leaves_nothing_that_is_read_and_no_lock(server: Server, shards: Path, tmp_path: Path) -> None:
    process = reader(server, tmp_path)
    server.faults = ["always stall"]
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not rows_asked(server) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    server.faults = []
    dataset = Dataset(server.address, "train", Cache(tmp_path))
    (tmp_path / "partial").write_bytes(b"half of a row, or of an index")
    assert same_rows(dataset, Dataset(shards))
    assert not (tmp_path / "partial").exists()


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    size = 512 * 2 + 64  # bytes of a row, about
    dataset = Dataset(server.address, "train", Cache(tmp_path, limit=10 * size))
    rows = [*range(min(30, dataset.num_rows))]
    for row in rows:
        dataset.row(0)
        dataset.row(row)
        kept = [path.stat().st_size for path in tmp_path.glob("*/*/*.rows/*")]
        assert sum(kept) <= 10 * size
    names = {int(path.name) for path in tmp_path.glob("*/*/*.rows/*")}
    first = dataset.shards[0]._ranges(0)[0][0]
    assert sum(span.startswith(f"bytes={first}-") for _, span in rows_asked(server)) == 1  # row 0 was always in use
    assert 0 in names
    assert names >= {*rows[-5:]}
    assert 1 not in names


def test_all_processes_together_keep_to_the_limit(server: Server, tokenizer_folder: Path, tmp_path: Path) -> None:
    server.folder = tmp_path
    counting_dataset(tmp_path / "set", 300, 2)
    shutil.copytree(tokenizer_folder, tmp_path / "set/tokenizer")
    cache = Cache(tmp_path / "c", limit=100 * (2 * 32 + 4 * 2))  # bytes of a hundred rows
    one, *others = [Dataset(f"{server.address}/set", "train", cache) for _ in range(9)]
    for row in range(100):
        one.row(row)
    assert len([*tmp_path.glob("c/*/*/*.rows/*")]) == 100
    for number, other in enumerate(others):
        for row in range(3):  # so few that none of them would pass the limit by itself
            other.row(100 + 3 * number + row)
            assert len([*tmp_path.glob("c/*/*/*.rows/*")]) <= 100
    shutil.rmtree(next(tmp_path.glob("c/*/train")))
    for row in range(200):  # somebody has made room, or lost the count
        one.row(row)
        assert len([*tmp_path.glob("c/*/*/*.rows/*")]) <= 100
        if row == 150:
            (tmp_path / "c/size").unlink()


def test_a_cache_that_takes_nothing_in_stops_the_run_in_one_line_and_masks_nothing(
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


def test_a_cached_row_that_may_not_be_touched_masks_nothing(
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
    cached.mkdir()  # nobody can read it, root neither
    with pytest.raises(UnreachableError, match=f"data.cache: {cached} cannot be read .Is a directory.; "):
        sources.read(0, 4)


def test_a_row_that_was_damaged_in_the_cache_is_fetched_again(server: Server, shards: Path, tmp_path: Path) -> None:
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path))})
    sources.read(0, 4)
    (cached,) = tmp_path.glob("*/*/*.rows/*")
    cached.write_bytes(cached.read_bytes()[:-3] + b"xyz")
    tokens, _, bad = sources.read(0, 4)
    assert bad is None
    assert np.array_equal(tokens, Dataset(shards).row(4)[0])


def test_a_shard_damaged_at_its_address_is_masked_and_named(server: Server, shards: Path, tmp_path: Path) -> None:
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
    """What the server serves, to be damaged."""
    server.folder = shutil.copytree(shards, tmp_path / "copy")
    return server.folder


@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_that_was_mended_at_its_address_is_fetched_again(
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
    cached.write_bytes(b"")  # as after a loss of power
    started()
    server.asked.clear()
    started()
    assert [path for path, _ in server.asked] == ["/manifest.json"]


def test_a_shard_cut_at_its_address_is_refused_at_the_start_and_masked_later(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "RETRY_DELAYS", (0.0, 0.0))
    shutil.copytree(shards, tmp_path / "copy")
    server.folder = tmp_path / "copy"
    sources = Sources({"": Dataset(server.address, "train", Cache(tmp_path / "cache"))})
    shard = Dataset(server.folder).shards[0]
    size = int(shard.index["tokens"][2]) + 100  # so that row 2 is cut, and what lies behind is gone
    os.truncate(shard.path, size)
    server.faults = ["drop"]
    assert sources.read(0, 1)[2] is None
    server.asked.clear()
    for row in (2, 5):
        tokens, ends, bad = sources.read(0, row)
        assert str(bad) == f"{server.address}/{shard.info.name}: row {row} cannot be read (cut short at byte {size})"
        assert set(tokens.tolist()) == {sources.pad_id}
        assert ends.tolist() == [-sources.row_len]
    assert len(rows_asked(server)) == 6  # each as often as a row on disk, without any delays of the way
    words = rf"shard {server.address}/{shard.info.name} has {size} bytes, not {shard.info.bytes}; copy it again"
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            Dataset(server.address, "train", Cache(tmp_path / "empty"))
    shard.path.unlink()
    with pytest.raises(UserError, match=r"lacks files of the dataset \(.*000000\.tar\); copy it again"):
        Dataset(server.address, "train", Cache(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("location", "words"),
    [("ftp://host/books", "protocol ftp is none of s3, gs"), ("{server}/nowhere", "nowhere holds no manifest.json")],
)
def test_an_address_without_a_dataset_is_one_line(server: Server, location: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Dataset(location.format(server=server.address), "train", Cache(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_loader_is_measured_at_an_address_too(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("REPEATS", 1), ("SECONDS", 0.05), ("MANY_BATCHES", 20)):
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
    files.makedirs("bucket", exist_ok=True)  # the store forgets nothing between two tests
    yield files
    store.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def gs_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[AbstractFileSystem]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for kinds of buckets that it does not know
    gcsfs = pytest.importorskip("gcsfs")
    store = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    store.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{store._api._httpd.server_port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield gcsfs.GCSFileSystem()
    store.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_dataset_in_an_object_store_trains_as_on_disk(
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
    with pytest.raises(UserError, match=f"{protocol}://bucket/nowhere holds no manifest.json"):
        Dataset(f"{protocol}://bucket/nowhere", "train", Cache(tmp_path))


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_shard_cut_in_an_object_store_is_masked_and_named(
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
class Doors:
    """What stands before the stores: its faults are HTTP status and code of the answers to the next requests.

    Status 0 is silence; if it is `shut`, the last fault lasts.
    """

    faults: list[tuple[int, str]] = field(default_factory=list)
    shut: bool = False
    asked: int = 0  # requests that met a fault

    def fault(self) -> tuple[int, str] | None:
        if not self.faults:
            return None
        self.asked += 1
        fault = self.faults[0] if self.shut and len(self.faults) == 1 else self.faults.pop(0)
        if fault[0] == 0:
            threading.Event().wait(1.2)
        return fault


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Doors:
    """Between both stores and who asks them; there before the stores, whose clients must not ask again themselves."""
    app = pytest.importorskip("moto.moto_server.werkzeug_app").DomainDispatcherApplication
    router = pytest.importorskip("gcp_storage_emulator.server").Router
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.9)  # before gcsfs, which waits a second or more, asks again itself
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's
    doors, answer, handle = Doors(), app.__call__, router.handle

    def s3(self: Any, environ: Any, start_response: Any) -> Any:
        if (fault := doors.fault()) is None:
            return answer(self, environ, start_response)
        content = f"<Error><Code>{fault[1]}</Code><Message>no: {fault[1]}</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
        start_response(f"{fault[0] or 500} no", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    def gs(self: Any, method: str) -> None:
        if (fault := doors.fault()) is None:
            handle(self, method)
        else:
            self._request_handler.send_error(fault[0] or 500, fault[1])

    monkeypatch.setattr(app, "__call__", s3)
    monkeypatch.setattr(router, "handle", gs)
    return doors


@pytest.fixture
def books(shards: Path, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Puts `shards` into a store; returns the address."""

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
def test_a_store_that_is_busy_for_a_while_is_asked_again(
    doors: Doors, books: Callable[[str], str], shards: Path, tmp_path: Path, protocol: str, fault: tuple[int, str]
) -> None:
    dataset = Dataset(books(protocol), "train", Cache(tmp_path))
    doors.faults = [fault] * (6 if fault[1] == "SlowDown" else 2)  # s3fs asks again itself of this one, for a while
    for one, other in zip(dataset.row(2), Dataset(shards).row(2), strict=True):
        assert np.array_equal(one, other)
    assert not doors.faults


def stops_in_one_line(sources: Sources, kind: type[Exception], words: str) -> None:
    """Asked for a row, `sources` mask nothing."""
    with pytest.raises(kind, match=words) as caught:
        sources.read(0, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("protocol", "fault"), EVERY_BUSY)
def test_a_store_that_stays_busy_is_given_up_and_masks_nothing(
    doors: Doors,
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
    doors.faults, doors.shut = [fault], True
    stops_in_one_line(sources, UnreachableError, rf"{protocol}://.*\.tar does not answer after 3 attempts \(.*\)")
    assert [0.5 <= delay / (0.01 * 2**number) <= 1 for number, delay in enumerate(delays)] == [True, True]


REFUSED = [("s3", (403, "AccessDenied")), ("s3", (400, "ExpiredToken")), ("s3", (403, "InvalidAccessKeyId"))]
REFUSED += [("gs", (403, "forbidden")), ("gs", (401, "required"))]


@pytest.mark.parametrize(("protocol", "fault"), REFUSED)
def test_a_store_that_refuses_stops_the_run_at_once_and_masks_nothing(
    doors: Doors,
    books: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    fault: tuple[int, str],
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 30)  # of a HEAD answered with 400 botocore tries several regions
    address = books(protocol)
    sources = Sources({"": Dataset(address, "train", Cache(tmp_path))})
    doors.faults, doors.shut = [fault], True
    stops_in_one_line(sources, RefusedError, rf"{address}/.*\.tar may not be read \(.*\); check .* credentials")
    assert doors.asked == 1
    with pytest.raises(RefusedError, match=r"manifest\.json may not be read"):
        Dataset(address, "train", Cache(tmp_path / "empty"))


def test_missing_credentials_are_told_at_once(
    doors: Doors, books: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = books("s3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    type(fsspec.filesystem("s3")).clear_instance_cache()
    monkeypatch.setattr(remote, "TIMEOUT", 30)  # a client is made anew, which takes its time on a busy machine
    monkeypatch.setattr(remote.time, "sleep", lambda _: pytest.fail("nothing is waited for"))
    with pytest.raises(RefusedError, match=r"manifest\.json may not be read \(NoCredentialsError: .*credentials"):
        Dataset(address, "train", Cache(tmp_path / "cache"))
