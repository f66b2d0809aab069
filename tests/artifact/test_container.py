"""The container: one form, every byte of it checked, and nothing but ArtifactError for anything else."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zipfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.artifact import container
from exitify.artifact.container import ALIGNMENT, LONGEST_NAME, MOST_BYTES, MOST_FILES
from exitify.errors import AlteredFile, ArtifactError, NotAnArtifact, TruncatedArtifact, UnsafePath
from tests.artifact.clauses import refused

FILES = {"a.json": b"{}\n", "model/b.bin": b"\x00\x01\x02"}
GOLDEN = bytes.fromhex(
    # a.json: header, name, 24 bytes of extra field (4 + 20 zeros), data at 64
    "504b0304 1400 0000 0000 0000 2100 06b0a1dd 03000000 03000000 0600 1c00 612e6a736f6e"
    "65781800 000000000000000000000000000000000000000000000000 7b7d0a"
    # model/b.bin: the same, data at 128
    "504b0304 1400 0000 0000 0000 2100 7f895408 03000000 03000000 0b00 1400 6d6f64656c2f622e62696e"
    "65781000 00000000000000000000000000000000 000102"
    # the directory
    "504b0102 1e03 1400 0000 0000 0000 2100 06b0a1dd 03000000 03000000 0600 0000 0000 0000 0000 0000a481 00000000 612e6a736f6e"
    "504b0102 1e03 1400 0000 0000 0000 2100 7f895408 03000000 03000000 0b00 0000 0000 0000 0000 0000a481 43000000 6d6f64656c2f622e62696e"
    # its end
    "504b0506 0000 0000 0200 0200 6d000000 83000000 0000"
)

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,12}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,12}){0,3}", fullmatch=True)
contents = st.dictionaries(names, st.binary(max_size=300), min_size=1, max_size=6)
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")


def written(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    container.write(stream, files)
    return stream.getvalue()


def read(data: bytes) -> dict[str, bytes]:
    return {name: bytes(view) for name, view in container.read(data).items()}


def with_record(data: bytes, index: int, **fields: object) -> bytes:
    """The container with fields of one directory record set."""
    positions = {"signature": 0, "crc": 7, "stored": 8, "size": 9, "name_length": 10, "start": 16}
    start = END.unpack(data[-END.size :])[6]
    for _ in range(index):
        start += CENTRAL.size + CENTRAL.unpack(data[start : start + CENTRAL.size])[10]
    values = list(CENTRAL.unpack(data[start : start + CENTRAL.size]))
    for field, value in fields.items():
        values[positions[field]] = value
    return data[:start] + CENTRAL.pack(*values) + data[start + CENTRAL.size :]


def with_end(data: bytes, **fields: int) -> bytes:
    positions = {"disk": 1, "here": 3, "count": 4, "size": 5, "start": 6, "comment": 7}
    values = list(END.unpack(data[-END.size :]))
    for field, value in fields.items():
        values[positions[field]] = value
    return data[: -END.size] + END.pack(*values)


def zipped(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    """What Python's zipfile makes of it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
        archive.comment = comment
    return stream.getvalue()


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_bytes_are_these():
    assert written(FILES) == GOLDEN
    assert read(GOLDEN) == FILES


def test_any_zip_tool_reads_it():
    with zipfile.ZipFile(io.BytesIO(written({**FILES, "empty": b"", "big": bytes(range(256)) * 1000}))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a.json", "model/b.bin", "empty", "big"]
        assert archive.read("model/b.bin") == FILES["model/b.bin"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


@given(contents)
def test_what_was_written_is_read_in_the_same_order(files):
    assert list(read(written(files)).items()) == list(files.items())


@given(contents)
def test_the_same_files_give_the_same_bytes(files):
    copies = {name: bytearray(data) for name, data in files.items()}
    assert written(files) == written({name: memoryview(data) for name, data in copies.items()})


@given(contents)
def test_data_stands_at_multiples_of_64(files):
    data = written(files)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            name_length, extra_length = struct.unpack_from("<2H", data, entry.header_offset + 26)
            start = entry.header_offset + 30 + name_length + extra_length
            assert start % ALIGNMENT == 0
            assert data[start : start + entry.file_size] == files[entry.filename]


def test_reading_copies_nothing():
    whole = memoryview(bytearray(GOLDEN))
    view = container.read(whole)["a.json"]
    whole[64:67] = b"[]\n"
    assert bytes(view) == b"[]\n"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused():
    for position in range(len(GOLDEN)):
        for bit in range(8):
            altered = bytearray(GOLDEN)
            altered[position] ^= 1 << bit
            with pytest.raises(ArtifactError):
                container.read(bytes(altered))


def test_a_flipped_bit_of_the_data_is_an_altered_file():
    for position in (64, 66, 128, 130):
        altered = bytearray(GOLDEN)
        altered[position] ^= 1
        with refused("each file's CRC-32 fits", match=r"the file '(a\.json|model/b\.bin)' in the artifact was altered"):
            container.read(bytes(altered))


def test_a_flipped_bit_of_the_padding_is_named_with_its_place():
    altered = bytearray(GOLDEN)
    altered[50] ^= 1
    with refused("headers, padding and directory are those that writing would give", match="container was altered at byte 50"):
        container.read(bytes(altered))


def test_every_truncation_is_refused():
    for length in range(len(GOLDEN)):
        with pytest.raises(TruncatedArtifact if length >= 4 else NotAnArtifact):
            container.read(GOLDEN[:length])


def test_a_file_cut_off_is_called_that():
    with refused("an end record is there", match="cut off: its directory is missing"):
        container.read(GOLDEN[:-1])


@pytest.mark.parametrize("extra", [b"\x00", b"x" * 1000, b"\x00" * 65535, GOLDEN[:64]], ids=["zero", "text", "most that is searched", "a file"])
def test_appended_bytes_are_refused(extra):
    with refused("nothing follows the end record", match=f"{len(extra)} bytes after its end"):
        container.read(GOLDEN + extra)


def test_a_second_directory_behind_the_first_is_refused():
    start = END.unpack(GOLDEN[-END.size :])[6]
    second = with_end(GOLDEN[start:], start=len(GOLDEN))
    with refused("nothing follows the end record", match=f"{len(second)} bytes after its end"):
        container.read(GOLDEN + second)


def test_bytes_before_the_first_file_are_refused():
    with refused("the file begins with a file's header", match="does not start as one"):
        container.read(b"#!/bin/sh\n" + GOLDEN)


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip at all", b"PK\x05\x06" + bytes(18)], ids=["empty", "short", "text", "an empty zip"])
def test_what_is_no_artifact_at_all_is_called_that(data):
    with refused("the file begins with a file's header", match="not an exitify artifact: it does not start as one"):
        container.read(data)


def test_a_gap_before_the_end_record_is_refused():
    with refused("the directory ends where the end record begins", match="not where it should be"):
        container.read(GOLDEN[: -END.size] + b"gap" + GOLDEN[-END.size :])


def test_a_directory_that_ends_inside_a_record_is_refused():
    with refused("every record of the directory is whole", match="cut off inside its directory"):
        container.read(with_end(GOLDEN, count=4, here=4))


def test_a_count_that_is_too_small_is_refused():
    with refused("headers, padding and directory are those that writing would give", match="altered at byte"):
        container.read(with_end(GOLDEN, count=1, here=1))


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/passwd", "a\\b", "C:/x", ".hidden", "a//b", "a/", "a b", "ä", "a/./b", "a\nb", "-x"]
)
def test_a_zip_with_a_name_that_is_not_plain_is_refused(name):
    with refused("names are plain relative paths of at most 255 characters", match="is not a plain relative path"):
        container.read(zipped(("manifest.json", b"{}"), (name, b"x")))


def test_a_name_that_is_too_long_is_refused_and_the_longest_is_not():
    longest = "n" * LONGEST_NAME
    assert read(written({longest: b"x"})) == {longest: b"x"}
    with refused("names are plain relative paths of at most 255 characters", match="is not a plain relative path"):
        container.read(zipped((longest + "n", b"x")))


def test_a_zip_with_a_name_twice_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own
        doubled = zipped(("manifest.json", b"{}"), ("manifest.json", b"[]"))
    with refused("no name comes twice", match="holds 'manifest.json' twice"):
        container.read(doubled)


@pytest.mark.parametrize(
    "data",
    [
        zipped(("manifest.json", b"{}" * 100), compression=zipfile.ZIP_DEFLATED),
        zipped(("manifest.json", b"{}")),
        with_end(GOLDEN, disk=1),
        with_record(GOLDEN, 1, start=0),
        with_record(GOLDEN, 0, size=4),
        with_record(GOLDEN, 0, stored=2, size=2),
    ],
    ids=["compressed", "another tool's", "many disks", "two records of one file", "a size that two fields tell differently", "a smaller size"],
)
def test_any_other_form_is_refused(data):
    with refused("headers, padding and directory are those that writing would give", match="container was altered at byte"):
        container.read(data)


def test_a_comment_is_refused():
    with refused("nothing follows the end record", match="5 bytes after its end"):
        container.read(zipped(("manifest.json", b"{}"), comment=b"hello"))


def test_more_files_than_allowed_are_refused_by_reader_and_writer():
    files = {f"f{i}": b"" for i in range(MOST_FILES + 1)}
    with refused("there are at most 4096 files", match="has 4097 files"):
        written(files)
    with refused("there are at most 4096 files", match="has 4097 files"):
        container.read(zipped(*files.items()))
    files.popitem()
    assert len(read(written(files))) == MOST_FILES


def test_more_bytes_than_allowed_are_refused_by_reader_and_writer(monkeypatch):
    assert MOST_BYTES == 4293918720
    whole = written({"a": bytes(100), "b": bytes(100)})
    monkeypatch.setattr(container, "MOST_BYTES", len(whole) - 1)
    with refused("the whole has at most 4293918720 bytes (4 GiB less 1 MiB)", match=f"has {len(whole)} bytes"):
        container.read(whole)
    with refused("the whole has at most 4293918720 bytes (4 GiB less 1 MiB)", match=f"has {len(whole)} bytes"):
        written({"a": bytes(100), "b": bytes(100)})
    monkeypatch.setattr(container, "MOST_BYTES", 250)
    with refused("the whole has at most 4293918720 bytes (4 GiB less 1 MiB)", match="has 'b' with 100 bytes at 164"):
        written({"a": bytes(100), "b": bytes(100)})


def test_the_writer_refuses_what_could_not_be_read_again():
    for name in ("../a", "/a", "a/", "", "ü"):
        with pytest.raises(UnsafePath, match="is not a plain relative path"):
            written({name: b""})


def test_huge_numbers_in_the_directory_are_refused_before_anything_is_allocated():
    greatest = 0xFFFFFFFF
    cases = {
        with_record(GOLDEN, 0, stored=greatest, size=greatest): "the files have no more bytes than the whole",
        with_record(GOLDEN, 1, stored=len(GOLDEN) - 2, size=len(GOLDEN) - 2): "the files have no more bytes than the whole",
        with_end(GOLDEN, count=MOST_FILES, here=MOST_FILES): "every record of the directory is whole",
        with_end(GOLDEN, count=0xFFFF, here=0xFFFF): "there are at most 4096 files",
        with_end(GOLDEN, size=greatest): "the directory ends where the end record begins",
        with_end(GOLDEN, start=greatest): "the directory ends where the end record begins",
        with_record(GOLDEN, 0, name_length=0xFFFF): "names are plain relative paths of at most 255 characters",
    }
    for data, clause in cases.items():
        tracemalloc.start()
        with refused(clause, match="artifact"):
            container.read(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, clause


# --- fuzz -----------------------------------------------------------------------------------------------------------

edits = st.lists(st.tuples(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255)), max_size=6)


@given(edits, st.integers(0, len(GOLDEN)), st.integers(0, len(GOLDEN)), st.binary(max_size=40))
def test_mutated_bytes_are_refused_or_are_the_container_itself(changes, start, end, inserted):
    data = bytearray(GOLDEN)
    for position, byte in changes:
        data[position] = byte
    data[min(start, end) : max(start, end)] = inserted
    try:
        files = read(bytes(data))
    except ArtifactError:
        return
    assert written(files) == bytes(data)


@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_raise_nothing_else(data, as_zip):
    with pytest.raises(ArtifactError):
        container.read(b"PK\x03\x04" + data + GOLDEN[-END.size :] if as_zip else data)


def test_a_forger_who_mends_the_checksums_gets_another_container_not_a_broken_one():
    """CRC-32 is no signature: FORMAT.md, Trust. The manifest's sha256 stands above it."""
    forged = bytearray(GOLDEN)
    forged[64:67] = b"[]\n"
    crc = zlib.crc32(b"[]\n")
    forged[14:18] = crc.to_bytes(4, "little")
    with pytest.raises(NotAnArtifact):
        container.read(bytes(forged))
    assert read(with_record(bytes(forged), 0, crc=crc)) == {**FILES, "a.json": b"[]\n"}
    forged[65] ^= 1
    with pytest.raises(AlteredFile):
        container.read(with_record(bytes(forged), 0, crc=crc))
