"""Datasets at an address (s3://, gs://, http(s)://): ranged reads of single rows into a cache that a node shares.

A row is the unit, because the order of training draws rows from anywhere: whole shards would be fetched for one row
each wherever the cache is smaller than the dataset. The cache lies in files that appear whole; a lock makes one of the
node's processes fetch what several want; what was used longest ago goes first. A process may be killed at any time:
what it leaves half-written is never read, and of rows it is removed later.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontree.errors import RunError, UserError

ATTEMPTS = 6
FIRST_DELAY = 0.5  # seconds before the second attempt; doubled for each further one, and drawn from half of it to all
TIMEOUT = 45.0  # seconds for one request: gcsfs asks again by itself for 36, and then says what it was told
PIECE = 8 << 20  # bytes of one request for a whole file: what a lost connection costs at most
PARALLEL = 16  # requests for whole files at once
LOCKS = 256
_TOLD = 200  # characters of a server's own words; some send a page
EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


class UnreachableError(RunError):
    """An address does not answer, or the cache takes nothing in: no damage, so nothing stands in for a missing row."""


class RefusedError(UserError):
    """An address does not let us read: no damage of the data either, and nobody but the user can change it."""


class CutShortError(OSError):
    """A file at an address ends before what is asked of it."""


_FINAL = (FileNotFoundError, PermissionError, CutShortError)  # no further attempt can change them
_REFUSALS = (401, 403, 407)
_NO_CREDENTIALS = ("CredentialsError", "RefreshError", "SSOTokenLoadError", "UnauthorizedSSOTokenError")


@dataclass(frozen=True)
class Cache:
    """Where fetched rows are kept on this node, and how many bytes of them."""

    folder: Path = Path("~/.cache/fusiontree")
    limit: int = 100 << 30  # bytes, whatever the number of processes


def is_address(location: Path | str) -> bool:
    """Whether a dataset's location is an address rather than a folder."""
    return "://" in str(location)


class Store:
    """A dataset at an address, its small files mirrored in `folder`.

    All that asks the address raises UnreachableError if it does not answer, and RefusedError if it may not be read.

    Args:
        address: of the dataset's folder, e.g. s3://bucket/books.
        cache: where to keep what is fetched.

    Raises:
        UserError: the address has no dataset, or its protocol needs a package that is missing.
    """

    def __init__(self, address: str, cache: Cache):
        self.address, self.cache = address.rstrip("/"), cache
        self.fs, self.root = _open(self.address)
        try:
            manifest = self._whole("manifest.json")
        except OSError as error:
            raise UserError(f"{self.address} holds no manifest.json that can be read ({error}); check it") from None
        digest = hashlib.sha256(self.address.encode() + b"\0" + manifest).hexdigest()[:32]
        self.cached = cache.folder.expanduser()
        self.folder = self.cached / digest
        self._put(self.folder / "manifest.json", manifest)

    def files(self, names: Sequence[str], sound: Callable[[str], bool]) -> None:
        """Fetch whole files into `folder`, unless `sound` says of their names that they are there as they should be.

        Raises:
            OSError: one is not at the address.
        """

        def mirror(name: str) -> None:
            with self._lock(name):
                if not sound(name):
                    self._put(self.folder / name, self._whole(name))

        with ThreadPoolExecutor(PARALLEL) as pool:
            for _ in pool.map(mirror, names):
                pass

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of whole files at the address; None: the server does not tell.

        Raises:
            OSError: one is not there.
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            return [*pool.map(self._size, names)]

    def row(self, shard: str, row: int, ranges: Sequence[tuple[int, int]]) -> bytes:
        """The bytes at `ranges`, (offset, length) each, of a row, one after the other; from the cache if it is there.

        Raises:
            OSError: the shard is not at the address, or cut short.
        """
        path = self._row_path(shard, row)
        with contextlib.suppress(FileNotFoundError):
            return _use(path)
        with self._lock(str(path)):
            with contextlib.suppress(FileNotFoundError):  # another process has fetched it meanwhile
                return _use(path)
            content = b"".join(self.part(shard, offset, length) for offset, length in ranges)
            self._put(path, content, self._make_room)
        return content

    def part(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file at the address, which are not kept.

        Raises:
            OSError: the file is not there, or ends before.
        """
        content: bytes = self._ask(name, lambda timeout: self._part_now(name, offset, length, timeout))
        return content

    def forget(self, shard: str, row: int) -> None:
        """Take a row out of the cache: it did not match its checksum.

        Raises:
            UnreachableError: it cannot be removed.
        """
        path = self._row_path(shard, row)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _unusable(path, "removed", error) from None

    def _row_path(self, shard: str, row: int) -> Path:
        return self.folder / f"{shard}.rows" / str(row)

    def _whole(self, name: str) -> bytes:
        """A whole file, in pieces, so that a connection that is lost costs one of them only."""
        size = self._size(name)
        if size is None:
            path = f"{self.root}/{name}"
            return self._ask(name, lambda timeout: self._call(self.fs._cat_file, path, timeout=timeout))
        pieces = [(at, min(PIECE, size - at)) for at in range(0, size, PIECE)]
        return b"".join(self.part(name, offset, length) for offset, length in pieces)

    def _size(self, name: str) -> int | None:
        return self._ask(name, lambda timeout: self._size_now(name, timeout))

    def _size_now(self, name: str, timeout: float) -> int | None:
        return self._call(self.fs._info, f"{self.root}/{name}", timeout=timeout)["size"]

    def _part_now(self, name: str, offset: int, length: int, timeout: float) -> bytes:
        path = f"{self.root}/{name}"
        try:
            content = self._call(self.fs._cat_file, path, start=offset, end=offset + length, timeout=timeout)
            if len(content) != length:
                raise ConnectionError(f"{len(content)} bytes came instead of {length}")
        except (*_FINAL, TimeoutError):
            raise
        except Exception:  # each protocol has its own errors for a range that lies behind the end
            size = self._size_now(name, timeout)
            if size is not None and size < offset + length:
                raise CutShortError(f"cut short at byte {size}") from None
            raise
        return content

    def _call(self, function: Callable[..., Any], *args: Any, timeout: float, **options: Any) -> Any:
        """What a protocol answers; of its errors, those that are final are `_FINAL` and nothing else is."""
        from fsspec.asyn import sync

        try:
            return sync(self.fs.loop, function, *args, timeout=timeout, **options)
        except Exception as error:
            cause = error.__cause__
            if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and _status(cause) != 404:
                error = cause  # over HTTP whatever keeps a size from being told is a file that is not found
            if _refuses(error):
                raise PermissionError(_words(error)) from error
            raise error from None

    def _ask(self, name: str, request: Callable[[float], Any]) -> Any:
        """The answer to a request, tried again with growing delays.

        Raises:
            OSError: no such file, or one that is cut short. RefusedError: it may not be read. UnreachableError: every
                attempt failed.
        """
        for attempt in range(ATTEMPTS):
            try:
                return request(TIMEOUT)
            except PermissionError as error:
                raise RefusedError(
                    f"{self.address}/{name} may not be read ({error}); check that it is there, and that the "
                    "credentials are given, have not expired and allow it"
                ) from None
            except _FINAL:
                raise
            except Exception as error:  # each protocol has its own errors for lost connections and busy servers
                last = _words(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.0))
        raise UnreachableError(f"{self.address}/{name} does not answer after {ATTEMPTS} attempts ({last}); check it")

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold one of the node's locks, chosen by `name`."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % LOCKS
        with _locked(self.cached / "locks" / str(number)):
            yield

    def _put(self, path: Path, content: bytes, make_room: Callable[[int, int], None] | None = None) -> None:
        """Write a cached file, whole or not at all; rows are checked when they are read, so it need not be durable.

        Raises:
            UnreachableError: it cannot be written.
        """
        try:
            with _locked(self.cached / "size") as size:
                if make_room:
                    make_room(size, len(content))
                partial = self.cached / "partial"
                partial.write_bytes(content)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, path)
        except OSError as error:
            raise _unusable(self.cached, "written", error) from None

    def _make_room(self, counter: int, size: int) -> None:
        """Let `size` bytes more be rows of this node, which the file `counter` counts for all processes.

        One that is killed before it writes leaves the count too high: it only says when to look at the rows themselves.
        """
        counted = os.pread(counter, 8, 0)
        total = int.from_bytes(counted, "little")
        if len(counted) < 8 or total + size > self.cache.limit:
            total = self._evict(self.cache.limit - size)
        os.pwrite(counter, (total + size).to_bytes(8, "little"), 0)

    def _evict(self, limit: int) -> int:
        """Bring the rows on this node, if they pass `limit`, below nine tenths of it; returns the bytes that stay.

        The longest unused go first.
        """
        rows = []
        for path in self.cached.glob("*/*/*.rows/*"):
            with contextlib.suppress(FileNotFoundError):  # another process has found it damaged
                status = path.stat()
                rows.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in rows)
        enough = total if total <= limit else limit * 0.9
        for _, size, path in sorted(rows):
            if total <= enough:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a lock of the node, and the descriptor of its file; the system releases it when a process dies.

    Raises:
        UnreachableError: there can be no such file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unusable(path, "written", error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _unusable(path: Path, what: str, error: OSError) -> UnreachableError:
    """Trouble of the cache, which is no damage of the data."""
    return UnreachableError(
        f"data.cache: {path} cannot be {what} ({error.strerror}); mend it, make room, or give another folder"
    )


def _refuses(error: Exception) -> bool:
    """Whether an error means that we may not read, or have nothing to show that we may."""
    if isinstance(error, TimeoutError):
        return False
    return (
        isinstance(error, PermissionError)
        or (type(error) is OSError and str(error).startswith("Forbidden: "))  # gcsfs makes it of a 403
        or type(error).__name__.endswith(_NO_CREDENTIALS)
        or _s3_status(error) == 400  # of an expired token, where the request is a HEAD and the answer says no more
        or _status(error) in _REFUSALS
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error is made of, wherever its protocol keeps it."""
    told = _s3_status(error) or getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp's, gcsfs's
    return int(str(told)) if str(told).isdecimal() else None


def _s3_status(error: BaseException) -> int | None:
    for made in (error, error.__cause__):
        answer = getattr(made, "response", None)
        if isinstance(answer, dict):
            status: int | None = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status
    return None


def _words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_TOLD]}"


def _use(path: Path) -> bytes:
    """The content of a cached row, marked as used now.

    Raises:
        FileNotFoundError: it is not there. UnreachableError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unusable(path, "read", error) from None
    with contextlib.suppress(OSError):  # the mark only orders evictions, and not every row is ours to mark
        os.utime(path)
    return content


def _open(address: str) -> tuple[Any, str]:
    """The file system of an address and the path in it."""
    protocol = address.partition("://")[0]
    if protocol not in EXTRAS:
        raise UserError(f"{address}: protocol {protocol} is none of {', '.join(EXTRAS)}; copy the dataset, or use one")
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # or it prints tracebacks of what is asked for again
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)
    except ImportError as error:
        raise UserError(f"{address} needs {EXTRAS[protocol]} ({error}); pip install 'fusiontree[remote]'") from None
