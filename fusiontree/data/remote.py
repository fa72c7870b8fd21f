"""Cache of single rows of remote datasets, because fsspec caches whole files or blocks, not rows shared by ranks.

Datasets are at an address (s3://, gs://, http(s)://) and are read by range.

The unit is a row, because the order of training draws rows from anywhere: with a cache smaller than the dataset, every
row would fetch a complete shard. Cached files are written atomically. A lock makes one process of the node fetch a row
that several request. The least recently used rows are evicted first. A process may be killed at any time: a partly
written file is never read, and the next write overwrites it.
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

from fusiontree.errors import RunError, UserError, short_cause, typed_cause
from fusiontree.paths import local_path

DEFAULT_CACHE = "~/.cache/fusiontree"
ATTEMPTS = 6
FIRST_DELAY = 0.5  # seconds before the second attempt; doubled for each further one, times a random factor of 0.5 to 1
TIMEOUT = 45.0  # seconds per request; gcsfs retries for 36 s before it reports the server's error
PIECE = 8 << 20  # bytes per request of a complete file, which limits the loss when a connection breaks
PARALLEL = 16  # simultaneous requests for complete files
LOCKS = 256
EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


class UnreachableError(RunError):
    """An address that does not respond, or an unusable cache: the data is not damaged, so no row is masked."""


class AccessDeniedError(UserError):
    """An address that denies access: the data is not damaged, and only the user can grant access."""


class TruncatedError(OSError):
    """A file at an address that ends before the requested bytes."""


_FINAL = (FileNotFoundError, PermissionError, TruncatedError)  # errors that a retry cannot change
_DENIALS = (401, 403, 407)
_NO_CREDENTIALS = ("CredentialsError", "RefreshError", "SSOTokenLoadError", "UnauthorizedSSOTokenError")


@dataclass(frozen=True)
class Cache:
    """The folder and size limit of this node's cache of fetched rows."""

    folder: Path | None = None  # None: DEFAULT_CACHE
    limit: int = 100 << 30  # bytes, over all processes


class Store:
    """A dataset at an address, its small files mirrored in `folder`.

    Every method that sends requests raises UnreachableError if the address does not respond, and AccessDeniedError if
    it denies access.

    Args:
        address: address of the dataset's folder, e.g. s3://bucket/books.
        cache: cache of the fetched files.

    Raises:
        UserError: the address has no dataset, its server ignores ranges, or its protocol needs a package that is
            missing.
    """

    def __init__(self, address: str, cache: Cache):
        self.address, self.cache = address.rstrip("/"), cache
        self.fs, self.root = _open(self.address)
        try:
            manifest = self._fetch_file("manifest.json")
        except OSError as error:
            raise UserError(
                f"{self.address} has no readable manifest.json ({short_cause(error)}); check the address"
            ) from None
        digest = hashlib.sha256(self.address.encode() + b"\0" + manifest).hexdigest()[:32]
        self.cached = cache.folder or local_path(DEFAULT_CACHE)
        self.folder = self.cached / digest
        with self._lock("manifest.json"):
            if not self.folder.is_dir():  # the node opens this dataset for the first time
                self._require_ranges(len(manifest))
            self._write(self.folder / "manifest.json", manifest)

    def mirror(self, names: Sequence[str], is_valid: Callable[[str], bool]) -> None:
        """Fetch complete files into `folder`, except those whose mirrored copy `is_valid` accepts by name.

        Raises:
            OSError: a file is not at the address.
        """

        def mirror_one(name: str) -> None:
            with self._lock(name):
                if not is_valid(name):
                    self._write(self.folder / name, self._fetch_file(name))

        with ThreadPoolExecutor(PARALLEL) as pool:
            for _ in pool.map(mirror_one, names):
                pass

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Return the sizes of files at the address, in bytes; None: the server does not report it.

        Raises:
            OSError: a file is not at the address.
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            return [*pool.map(self._size, names)]

    def row(self, shard: str, row: int, ranges: Sequence[tuple[int, int]]) -> bytes:
        """Return the concatenated bytes of a row at `ranges`, (offset, length) each; from the cache if present.

        Raises:
            OSError: the shard is not at the address, or is cut short.
        """
        path = self._row_path(shard, row)
        with contextlib.suppress(FileNotFoundError):
            return _read_cached(path)
        with self._lock(str(path)):
            with contextlib.suppress(FileNotFoundError):  # another process may have fetched it meanwhile
                return _read_cached(path)
            content = b"".join(self.read_range(shard, offset, length) for offset, length in ranges)
            self._write(path, content, self._make_room)
        return content

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Fetch a byte range of a file at the address, without caching it.

        Raises:
            OSError: the file is not at the address, or ends before the range does.
        """
        content: bytes = self._retry(name, lambda timeout: self._range_once(name, offset, length, timeout))
        return content

    def drop_row(self, shard: str, row: int) -> None:
        """Remove a row that failed its checksum from the cache.

        Raises:
            UnreachableError: it cannot be removed.
        """
        path = self._row_path(shard, row)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _cache_error(path, "removed", error) from None

    def _row_path(self, shard: str, row: int) -> Path:
        return self.folder / f"{shard}.rows" / str(row)

    def _fetch_file(self, name: str) -> bytes:
        """Fetch a complete file in pieces; a broken connection costs only one of them."""
        size = self._size(name)
        if size is None:
            path = f"{self.root}/{name}"
            return self._retry(name, lambda timeout: self._call(self.fs._cat_file, path, timeout=timeout))
        pieces = [(at, min(PIECE, size - at)) for at in range(0, size, PIECE)]
        return b"".join(self.read_range(name, offset, length) for offset, length in pieces)

    def _size(self, name: str) -> int | None:
        return self._retry(name, lambda timeout: self._size_once(name, timeout))

    def _size_once(self, name: str, timeout: float) -> int | None:
        return self._call(self.fs._info, f"{self.root}/{name}", timeout=timeout)["size"]

    def _range_once(self, name: str, offset: int, length: int, timeout: float) -> bytes:
        path = f"{self.root}/{name}"
        try:
            content = self._call(self.fs._cat_file, path, start=offset, end=offset + length, timeout=timeout)
            if len(content) != length:
                raise ConnectionError(f"received {len(content)} bytes instead of the range of {length}")
        except (*_FINAL, TimeoutError):
            raise
        except Exception:  # each protocol has its own error for a range past the end, so compare with the size
            size = self._size_once(name, timeout)
            if size is not None and size < offset + length:
                raise TruncatedError(f"cut short at byte {size}") from None
            raise
        return content

    def _require_ranges(self, size: int) -> None:
        """Check with one byte of the manifest of `size` bytes that the server answers requests for a range with it.

        A server without ranges sends the complete file, for shards thousands of times the row. A proxy may do so once,
        hence the second request.

        Raises:
            UserError: it does not.
        """

        def first_byte(timeout: float) -> bytes:
            content: bytes = self._call(
                self.fs._cat_file, f"{self.root}/manifest.json", start=0, end=1, timeout=timeout
            )
            return content

        for _ in range(2):
            if len(self._retry("manifest.json", first_byte)) < size:
                return
        raise UserError(
            f"{self.address}: the server ignores HTTP ranges and sends complete files (`python -m http.server` does); "
            "use a server with range requests, such as nginx, or copy the dataset to a folder"
        )

    def _call(self, function: Callable[..., Any], *args: Any, timeout: float, **options: Any) -> Any:
        """Run a protocol's coroutine; raise an error of `_FINAL` exactly if a retry cannot change it."""
        from fsspec.asyn import sync

        try:
            return sync(self.fs.loop, function, *args, timeout=timeout, **options)
        except Exception as error:
            cause = error.__cause__
            if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and _status(cause) != 404:
                error = cause  # over HTTP, fsspec reports every failure to get a size as FileNotFoundError
            if _is_denial(error):
                raise PermissionError(typed_cause(error)) from error
            raise error from None

    def _retry(self, name: str, request: Callable[[float], Any]) -> Any:
        """Return the result of a request, which is retried with growing delays.

        Raises:
            OSError: the file is missing or cut short. AccessDeniedError: it may not be read. UnreachableError: every
                attempt failed.
        """
        for attempt in range(ATTEMPTS):
            try:
                return request(TIMEOUT)
            except PermissionError as error:
                raise AccessDeniedError(
                    f"{self.address}/{name}: access denied ({short_cause(error)}); check that the file exists, and "
                    "that the credentials are set, have not expired and grant access to it"
                ) from None
            except _FINAL:
                raise
            except Exception as error:  # each protocol has its own errors for lost connections and busy servers
                last = typed_cause(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.0))
        raise UnreachableError(
            f"{self.address}/{name} does not respond after {ATTEMPTS} attempts ({last}); check the server and network"
        )

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Acquire one of the node's locks, selected by `name`."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % LOCKS
        with _locked(self.cached / "locks" / str(number)):
            yield

    def _write(self, path: Path, content: bytes, make_room: Callable[[int, int], None] | None = None) -> None:
        """Write a cached file atomically; it need not be durable, because rows are verified on every read.

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
            raise _cache_error(self.cached, "written", error) from None

    def _make_room(self, counter: int, size: int) -> None:
        """Add `size` bytes to the total in the file `counter`, shared by all processes; evict rows at the limit.

        A process killed before it writes leaves the total too high. This is harmless: at the limit the rows themselves
        are measured.
        """
        counted = os.pread(counter, 8, 0)
        total = int.from_bytes(counted, "little")
        if len(counted) < 8 or total + size > self.cache.limit:
            total = self._evict(self.cache.limit - size)
        os.pwrite(counter, (total + size).to_bytes(8, "little"), 0)

    def _evict(self, limit: int) -> int:
        """Evict the least recently used rows, to 90% of `limit`, if they exceed it; return the bytes that remain."""
        rows = []
        for path in self.cached.glob("*/*/*.rows/*"):
            with contextlib.suppress(FileNotFoundError):  # another process may have dropped it as damaged
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
    """Lock a file of the node and yield its descriptor; the system releases the lock when the process dies.

    Raises:
        UnreachableError: the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cache_error(path, "written", error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _cache_error(path: Path, action: str, error: OSError) -> UnreachableError:
    """Return the error for an unusable cache, which is not damage of the data."""
    return UnreachableError(
        f"data.cache: {path} cannot be {action} ({short_cause(error)}); repair it, free space, or set another folder"
    )


def _is_denial(error: Exception) -> bool:
    """Return whether an error means that access is denied or that credentials are missing."""
    if isinstance(error, TimeoutError):
        return False
    return (
        isinstance(error, PermissionError)
        or (type(error) is OSError and str(error).startswith("Forbidden: "))  # gcsfs's form of a 403
        or type(error).__name__.endswith(_NO_CREDENTIALS)
        or _s3_status(error) == 400  # an expired token; the answer to a HEAD request has no further details
        or _status(error) in _DENIALS
    )


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, wherever its protocol stores it."""
    status = _s3_status(error) or getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp's, gcsfs's
    return int(str(status)) if str(status).isdecimal() else None


def _s3_status(error: BaseException) -> int | None:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status
    return None


def _read_cached(path: Path) -> bytes:
    """Read a cached row and mark it as just used.

    Raises:
        FileNotFoundError: it is not cached. UnreachableError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _cache_error(path, "read", error) from None
    with contextlib.suppress(OSError):  # the time only orders evictions, and another user's file cannot be touched
        os.utime(path)
    return content


def _open(address: str) -> tuple[Any, str]:
    """Open the file system of an address; return it with the path within it."""
    protocol = address.partition("://")[0]
    if protocol not in EXTRAS:
        raise UserError(
            f"{address}: unknown protocol {protocol}; use one of {', '.join(EXTRAS)}, or copy the dataset to a folder"
        )
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # otherwise it prints a traceback of each retry
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)
    except ImportError as error:
        raise UserError(
            f"{address} needs {EXTRAS[protocol]} ({short_cause(error)}); install it: pip install 'fusiontree[remote]'"
        ) from None
