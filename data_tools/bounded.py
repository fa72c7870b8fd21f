"""Reading within bounded memory: compressed files, lines, parts between separators, members of a tar.

A record is a line, a part, a member or a complete file. A record of more than `limit` bytes is read to its end without
being kept, and given as None. So neither a few compressed bytes nor a size stated in a header can exhaust the memory.
"""

import bz2
import gzip
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK_BYTES = 1 << 20  # per read
_LARGEST_BLOCK = 1 << 24  # bytes per read while a part between separators grows
_LARGEST_WINDOW = 31  # log2 of zstd's largest window in bytes, that of `zstd --long=31`
_LARGEST_DICTIONARY = (1 << 31) + (1 << 26)  # bytes of memory for an xz stream; its largest dictionary is below 2 GiB
_LARGEST_EXTENSION = 1 << 20  # bytes of a long name or of PAX records in a tar
_WITH_DATA = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}  # and unknown types; links and folders have none
_LONG_NAMES, _PAX = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}, {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}

DAMAGED = (
    *(EOFError, OSError, ValueError, NotImplementedError),
    *(zlib.error, zstd.ZstdError, lzma.LZMAError, tarfile.TarError),
)  # errors of damaged content


# --- compressed files ------------------------------------------------------------------------------------------------


def open_compressed(raw: BinaryIO, kind: str) -> IO[bytes]:
    """Return the decompressed stream of a file: all of its gzip members, zstd frames, or xz or bz2 streams.

    Args:
        raw: the file.
        kind: "gz", "zst", "xz" or "bz2".
    """
    if kind == "gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if kind == "zst":
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW}
        return zstd.open(raw, options=options)  # type: ignore[return-value]
    if kind == "xz":
        blocks = _streams(raw, lambda: lzma.LZMADecompressor(memlimit=_LARGEST_DICTIONARY), padding=4)
    else:
        blocks = _streams(raw, bz2.BZ2Decompressor, padding=0)
    return io.BufferedReader(_Blocks(blocks), BLOCK_BYTES)


def _streams(raw: BinaryIO, start: Callable[[], Any], padding: int) -> Iterator[bytes]:
    """Yield the decompressed blocks of concatenated xz or bz2 streams.

    `lzma.open` and `bz2.open` take anything after a stream that does not begin another one for the end of the file, and
    so lose the rest without an error. Here only `padding` is allowed there: zeros in multiples of that many bytes.

    Raises:
        EOFError, OSError, ValueError, lzma.LZMAError: the file is damaged.
    """
    content = raw.read(BLOCK_BYTES)
    while content:
        stream = start()
        while not stream.eof:
            if stream.needs_input:
                content = content or raw.read(BLOCK_BYTES)
                if not content:
                    raise EOFError("the compressed data ends before its end mark")
            yield stream.decompress(content, BLOCK_BYTES)
            content = b""  # the stream has taken it
        content = stream.unused_data or raw.read(BLOCK_BYTES)
        zeros = 0
        while padding and content[:1] == b"\0":
            stripped = content.lstrip(b"\0")
            zeros += len(content) - len(stripped)
            content = stripped or raw.read(BLOCK_BYTES)
        if padding and zeros % padding:
            raise ValueError(f"{zeros} zeros between compressed streams")


class _Blocks(io.RawIOBase):
    """A stream of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current block; return the number of bytes, 0 at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


# --- records ---------------------------------------------------------------------------------------------------------


def read_all(stream: IO[bytes], limit: int) -> bytes | None:
    """Return the rest of a stream; None if it has more than `limit` bytes, of which some remain unread."""
    blocks, size = [], 0
    while block := stream.read(BLOCK_BYTES):
        size += len(block)
        if size > limit:
            return None
        blocks.append(block)
    return b"".join(blocks)


def read_lines(stream: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Yield the lines of a stream, with their newlines; None for a line of more than `limit` bytes."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(BLOCK_BYTES)
        yield None


def read_parts(stream: IO[bytes], separator: bytes, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield the parts between the separators, None for one of more than `limit` bytes, with the newlines in each."""
    rest, too_long, newlines = b"", False, 0  # of the part that is not complete, its end; lines before that end
    # a read at least doubles `rest`: with small blocks, searching one long part would take quadratic time
    while block := stream.read(min(max(BLOCK_BYTES, len(rest)), _LARGEST_BLOCK)):
        *complete, rest = (rest + block).split(separator)
        for part in complete:
            yield None if too_long or len(part) > limit else part, newlines + part.count(b"\n")
            too_long, newlines = False, 0
        end = len(rest) - len(separator) + 1  # a separator may begin in the bytes after it
        if end > limit:
            too_long, newlines = True, newlines + rest.count(b"\n", 0, end)
            rest = rest[end:]
    yield None if too_long or len(rest) > limit else rest, newlines + rest.count(b"\n")


# --- tar -------------------------------------------------------------------------------------------------------------


class Member:
    """A regular file in a tar; its content can be read until the next member is requested."""

    def __init__(self, name: str, stream: IO[bytes], size: int):
        self.name, self._stream, self._left = name, stream, size

    def read(self, limit: int) -> bytes | None:
        """Return the content; None if it has more than `limit` bytes.

        Raises:
            EOFError: the archive ends before it.
        """
        return None if self._left > limit else b"".join(self.blocks())

    def blocks(self) -> Iterator[bytes]:
        """Yield the content that has not been read; errors as in `read`."""
        while self._left:
            block = self._stream.read(min(self._left, BLOCK_BYTES))
            if not block:
                raise EOFError("truncated inside a member")
            self._left -= len(block)
            yield block


def read_tar(stream: IO[bytes]) -> Iterator[Member]:
    """Yield the regular files of a tar (USTAR, GNU or PAX) in one sequential pass to its end mark.

    `tarfile` takes a damaged header, or a cut between two members, for the end of the archive. It reads extended
    headers of any size, and goes back in the file by a negative size. Here each of these is an error, and everything
    after the end mark must be zero.

    Raises:
        ValueError, EOFError: the archive is damaged.
    """
    at, name, records = 0, None, dict[str, str]()  # of the next member: its long name, its PAX records
    while (block := stream.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise ValueError(f"damaged header at byte {at}") from None
        extends = header.type in _LONG_NAMES | _PAX
        size = int(records.get("size", header.size)) if not extends else header.size
        if size < 0 or (extends and size > _LARGEST_EXTENSION):
            raise ValueError(f"header at byte {at} states a size of {size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in records):
            raise ValueError(f"sparse member at byte {at}")
        has_data = header.type in _WITH_DATA or header.type not in tarfile.SUPPORTED_TYPES
        size = size if has_data or extends else 0
        member = Member(records.get("path") or name or header.name, stream, size)
        if extends:
            content = b"".join(member.blocks())
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type in _PAX:
                records = _pax_records(content)
        else:
            if header.type in _WITH_DATA:
                yield member
            for _ in member.blocks():  # what the caller did not read
                pass
            name, records = None, {}
        padding = -size % tarfile.BLOCKSIZE
        if len(stream.read(padding)) < padding:
            raise EOFError("truncated after a member")
        at += tarfile.BLOCKSIZE + size + padding
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError("truncated: no end mark")
    while block := stream.read(BLOCK_BYTES):
        if block.strip(b"\0"):
            raise ValueError(f"damaged header at byte {at}")


def _pax_records(content: bytes) -> dict[str, str]:
    """Parse PAX records, ``LENGTH KEY=VALUE\\n`` each; raise ValueError if they are damaged."""
    records = {}
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits)
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if length <= len(digits) or not equals or not value.endswith(b"\n"):
            raise ValueError("damaged PAX records")
        records[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[length:]
    return records
