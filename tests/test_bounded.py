"""Every variant of a container is read; none of them can exhaust the memory, stop a scan or lose its end in silence."""

import base64
import bz2
import gzip
import io
import itertools
import json
import lzma
import struct
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_data_inputs import LINES, TEXTS, read, write_tar

from data_tools import options as options_module
from data_tools.bounded import read_all, read_lines, read_parts, read_tar
from data_tools.build import build_shards
from data_tools.options import MAX_CHARS, BuildOptions, InputOptions

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def frame(content: bytes, **options: int) -> bytes:
    """Return a zstd frame written as a stream, without the size of its content."""
    compressor = zstd.ZstdCompressor(options={getattr(zstd.CompressionParameter, k): v for k, v in options.items()})
    return compressor.compress(content) + compressor.flush()


def skippable(content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A57, len(content)) + content


# --- compressed files ------------------------------------------------------------------------------------------------

HALVES = LINES[:90], LINES[90:]
VARIANTS = {
    "long-window.jsonl.zst": frame(LINES, window_log=31, enable_long_distance_matching=1),
    "checksum.jsonl.zst": frame(LINES, checksum_flag=1),
    "frames.jsonl.zst": b"".join(frame(part, window_log=log) for part, log in zip(HALVES, (10, 30), strict=True)),
    "skippable.jsonl.zst": skippable(b"index") + frame(HALVES[0]) + skippable(b"") + frame(HALVES[1]) + skippable(b"x"),
    "sized.jsonl.zst": zstd.compress(LINES),
    "empty-frame.jsonl.zst": frame(b"") + frame(LINES),
    "members.jsonl.gz": b"".join(map(gzip.compress, (HALVES[0], b"", HALVES[1]))),
    "padded.jsonl.gz": gzip.compress(LINES) + bytes(512),
    "streams.jsonl.xz": b"".join(map(lzma.compress, HALVES)),
    "padded.jsonl.xz": lzma.compress(HALVES[0]) + bytes(8) + lzma.compress(HALVES[1]) + bytes(1 << 21),
    "crc32.jsonl.xz": lzma.compress(LINES, check=lzma.CHECK_CRC32),
    "alone.jsonl.xz": lzma.compress(LINES, format=lzma.FORMAT_ALONE),
    "streams.jsonl.bz2": b"".join(map(bz2.compress, HALVES)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_a_compressed_file_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(VARIANTS[name])
    texts, rejected = read(tmp_path)
    assert [*texts.values()] == TEXTS
    assert rejected == []


@pytest.mark.parametrize("name", ["frames.jsonl.zst", "members.jsonl.gz", "streams.jsonl.xz", "streams.jsonl.bz2"])
@pytest.mark.parametrize("damage", ["head", "cut", "garbage", "padding"])
def test_damage_after_the_first_stream_is_not_taken_for_the_end(tmp_path: Path, name: str, damage: str) -> None:
    content = bytearray(VARIANTS[name])
    firsts = {
        "zst": frame(HALVES[0], window_log=10),
        "gz": gzip.compress(HALVES[0]),
        "xz": lzma.compress(HALVES[0]),
        "bz2": bz2.compress(HALVES[0]),
    }
    second = len(firsts[name.rpartition(".")[2]])
    if damage == "head":
        content[second + 1] ^= 0xFF
    elif damage == "cut":
        del content[second + 5 :]
    else:
        content += b"garbage" if damage == "garbage" else bytes(6)
    (tmp_path / name).write_bytes(content)
    texts, rejected = read(tmp_path)
    if damage == "padding" and name.endswith("gz"):  # gzip allows any number of zeros
        assert [*texts.values()] == TEXTS
        return
    assert texts == {}
    assert [(where, reason[:11]) for where, _, reason in rejected] == [(name, "unreadable ")]


# --- Parquet ---------------------------------------------------------------------------------------------------------

TYPES = [
    *(pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()),
    *(pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()),
    *(
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.uint32(), pyarrow.large_string()),
    ),
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_text_like_type_of_arrow_is_text(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array([*TEXTS, None, TEXTS[0]])
    column = column.dictionary_encode().cast(kind) if pyarrow.types.is_dictionary(kind) else column.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    stored = pyarrow.parquet.read_schema(tmp_path / "in.parquet").field("text").type
    assert stored == kind or pyarrow.types.is_dictionary(stored)  # a dictionary's large strings become strings
    texts, rejected = read(tmp_path)
    assert [*texts.values()] == [*TEXTS, TEXTS[0]]
    assert rejected == [("in.parquet", "row 3", "null")]


def test_an_extension_of_text_is_text(tmp_path: Path) -> None:
    column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['{"a": 1}', None]))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    assert read(tmp_path)[0] == {"in.parquet:0": '{"a": 1}'}


@pytest.mark.parametrize("kind", [pyarrow.string_view(), pyarrow.dictionary(pyarrow.int64(), pyarrow.large_string())])
def test_the_arrow_schema_of_another_engine_is_accepted(tmp_path: Path, kind: pyarrow.DataType) -> None:
    """Write the text as plain strings, with the type that the engine had in memory: arrow-rs and DuckDB do so."""
    schema = pyarrow.schema([("text", kind)]).serialize().to_pybytes()
    table = pyarrow.table({"text": TEXTS}).replace_schema_metadata({"ARROW:schema": base64.b64encode(schema)})
    with pyarrow.parquet.ParquetWriter(tmp_path / "in.parquet", table.schema, store_schema=False) as writer:
        writer.write_table(table)
    assert [*read(tmp_path)[0].values()] == TEXTS


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"x", b"\xff\xfe", b"y"]}), tmp_path / "in.parquet")
    texts, rejected = read(tmp_path)
    assert texts == {"in.parquet:0": "x", "in.parquet:2": "y"}
    assert rejected == [("in.parquet", "row 1", "not UTF-8")]


# --- limits ----------------------------------------------------------------------------------------------------------

LIMIT = 4000  # bytes of a record


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> InputOptions:
    monkeypatch.setattr(options_module, "_LEAST_RECORD_BYTES", LIMIT)
    return InputOptions(max_chars=LIMIT // 4, separator="<end>")


@pytest.mark.slow
@pytest.mark.parametrize("size", [LIMIT - 5, LIMIT + 1, 3 << 20, 40 << 20])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "txt", "txt.gz", "tar", "tar.xz"])
def test_a_record_above_the_limit_is_skipped_by_name_in_constant_memory(
    tmp_path: Path, limited: InputOptions, kind: str, size: int
) -> None:
    path = tmp_path / f"in.{kind}"
    long = b"\n" * (size - 9)
    if kind.startswith("tar"):
        write_tar(path, {"a.txt": b"x", "b.json": long + bytes(9), "c.txt": b"z"}, "w" if kind == "tar" else "w:xz")
        place = "member b.json"
    else:
        jsonl = kind.startswith("jsonl")
        line = b'{"a": "' + long.replace(b"\n", b" ") + b'"}\n'
        content = b'{"text": "x"}\n' + line + b'{"text": "z"}\n' if jsonl else b"x<end>" + long + b".........<end>z"
        compress: Callable[[bytes], bytes] = {"zst": zstd.compress, "gz": gzip.compress}.get(path.suffix[1:], bytes)
        path.write_bytes(compress(content))
        place = "line 2" if jsonl else "document 2, line 1"
        del content, line
    del long
    tracemalloc.start()
    texts, rejected = read(path, limited)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [*texts.values()] == ["x", "z"]
    reason = {True: "more than 4,000 bytes"}.get(size > LIMIT)
    [(name, where, found)] = rejected
    assert (name, where) == (f"in.{kind}", place)
    assert (
        found == reason if reason else found in ("no key 'text' (keys: a)", "longer than --max-chars", "not valid JSON")
    )
    assert peak < 20 << 20  # xz alone needs 9 MiB


def test_a_file_above_the_limit_is_skipped_by_name(tmp_path: Path, limited: InputOptions) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * (LIMIT + 1))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"b" * 30_000_000))
    (tmp_path / "c.txt").write_bytes(b"c" * (LIMIT // 4))
    texts, rejected = read(tmp_path, InputOptions(max_chars=LIMIT // 4))
    assert [*texts] == ["c.txt"]
    assert rejected == [("a.txt", "", "more than 4,000 bytes"), ("b.txt.gz", "", "more than 4,000 bytes")]


def test_a_build_names_the_records_above_the_limit(
    tmp_path: Path, tokenizer_folder: Path, limited: InputOptions
) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINES + json.dumps({"text": "x" * LIMIT}).encode() + b"\n" + LINES)
    figures = build_shards(
        [tmp_path / "in.jsonl"], tokenizer_folder, tmp_path / "set", BuildOptions(row_len=512, input=limited)
    )
    assert figures["skipped"] == [
        {"path": "in.jsonl", "reason": "more than 4,000 bytes", "count": 1, "places": ["line 4"]}
    ]


def test_the_default_limit_bounds_a_record() -> None:
    assert InputOptions().record_bytes == 4 * MAX_CHARS == 1 << 28
    assert InputOptions(max_chars=1000).record_bytes == 1 << 26
    assert InputOptions(max_chars=1 << 30).record_bytes == 1 << 32


def test_parts_and_lines_equal_those_of_the_complete_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"".join(b"ab<e<end><<en\n" * n + b"<end>" for n in (0, 1, 7, 300, 2, 90)) + b"tail"
    for block, limit in itertools.product((1, 3, 7, 64, 1 << 20), (0, 20, 300, 10_000)):
        monkeypatch.setattr("data_tools.bounded.BLOCK_BYTES", block)
        expected = [(part if len(part) <= limit else None, part.count(b"\n")) for part in text.split(b"<end>")]
        assert list(read_parts(io.BytesIO(text), b"<end>", limit)) == expected
        lines = [line if len(line) <= limit else None for line in io.BytesIO(text)]
        assert list(read_lines(io.BytesIO(text), limit)) == lines
        assert read_all(io.BytesIO(text), limit) == (text if len(text) <= limit else None)


# --- tar -------------------------------------------------------------------------------------------------------------


def archive(*infos: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """Return an archive whose headers may contradict the contents."""
    parts = []
    for info, content in infos:
        parts += [info.tobuf(kind), content, bytes(-len(content) % 512)]
    return b"".join(parts) + bytes(1024)


def info(name: str, size: int, kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size, found.type, found.pax_headers = size, kind, pax or {}
    return found


def members(content: bytes) -> Iterator[tuple[str, bytes | None]]:
    for member in read_tar(io.BytesIO(content)):
        yield member.name, member.read(100)


def test_every_kind_of_tar_is_read(tmp_path: Path) -> None:
    long = "folder/" * 40 + "name.txt"
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
            for name in ("a.txt", "ü.txt", "x" * 90 + "/y.txt", *([long] if kind != tarfile.USTAR_FORMAT else [])):
                tar.addfile(info(name, 3), io.BytesIO(b"abc"))
            tar.addfile(info("folder", 0, tarfile.DIRTYPE))
            link = info("link", 0, tarfile.SYMTYPE)
            link.linkname = "a.txt"
            tar.addfile(link)
            tar.addfile(info("long", 101), io.BytesIO(b"l" * 101))
            tar.addfile(info("empty", 0))
        with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
            expected = [(m.name, None if m.size > 100 else tar.extractfile(m).read()) for m in tar if m.isfile()]
        assert list(members(stream.getvalue())) == expected
        assert len(expected) in (5, 6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive((info("a", 1), b"x"), (info("b", -513), b"")), "header at byte 1024 states a size of -513 bytes"),
        (archive((info("a", -(2**62)), b"")), "header at byte 0 states a size of"),
        (
            archive((info("a", 3, pax={"size": "-1024"}), b"abc"), kind=tarfile.PAX_FORMAT),
            "a size of -1024 bytes",
        ),
        (
            archive((info("a", 3 << 30, tarfile.GNUTYPE_LONGNAME), b"abc")),
            "header at byte 0 states a size of 3221225472",
        ),
        (archive((info("a", 3 << 30, tarfile.XHDTYPE), b"abc")), "header at byte 0 states a size of 3221225472"),
        (archive((info("a", 3, tarfile.XHDTYPE), b"5 x")), "damaged PAX records"),
        (archive((info("a", 12, tarfile.XHDTYPE), b"-1 path=abc\n")), "damaged PAX records"),
        (archive((info("a", 3, tarfile.GNUTYPE_SPARSE), b"abc")), "sparse member at byte 0"),
        (archive((info("a", 3 << 40), b"abc")), "truncated inside a member"),
        (archive((info("a", 3), b"abc"))[:1024], "truncated: no end mark"),
        (archive((info("a", 3), b"abc"))[:700], "truncated after a member"),
        (archive((info("a", 3), b"abc")) + b"x", "damaged header at byte 1024"),
    ],
)
def test_a_hostile_tar_ends_with_its_fault(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "in.tar").write_bytes(content)
    (tmp_path / "in.tar.gz").write_bytes(gzip.compress(content))
    tracemalloc.start()
    texts, rejected = read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert texts == {}
    assert [name for name, _, _ in rejected] == ["in.tar", "in.tar.gz"]
    assert all(words in reason for _, _, reason in rejected), rejected
