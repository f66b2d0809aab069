"""The container: a stored zip with one possible form, so that every byte of it can be checked.

Any zip tool reads it. Reading accepts just the bytes that writing would produce for the same names and contents
(FORMAT.md, Container), which leaves no room for a second directory, hidden data or a changed header.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import BinaryIO

from exitify.errors import AlteredFile, ExtraFile, NotAnArtifact, OversizedArtifact, TruncatedArtifact, UnsafePath

Buffer = bytes | bytearray | memoryview | mmap

ALIGNMENT = 64
"""Each file's data starts at a multiple of this, so that tensors can be mapped and read in place."""

MOST_BYTES = 4 * 2**30 - 2**20
MOST_FILES = 4096
LONGEST_NAME = 255

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_MARK = b"PK\x05\x06"
_DATE_1980 = 0x21
_PADDING_ID = 0x7865
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class Entry:
    """A file's name, size and CRC-32."""

    name: str
    size: int
    crc: int


def check_name(name: str) -> None:
    """Refuse a name that is not plain.

    Raises:
        UnsafePath: it is absolute, holds `..`, an empty part, or a character other than letters, digits, `_`, `.`, `-`, `/`.
    """
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UnsafePath(f"the file name {name[:80]!r} in the artifact is not a plain relative path", "do not use this file")


def write(stream: BinaryIO, files: Mapping[str, Buffer]) -> None:
    """Write the container: the files in the order given, then the directory. The same files give the same bytes.

    Raises:
        UnsafePath, OversizedArtifact: what could not be read again.
    """
    contents = {name: memoryview(data).cast("B") for name, data in files.items()}
    entries = [Entry(name, len(data), zlib.crc32(data)) for name, data in contents.items()]
    headers, directory = _layout(entries)
    for header, data in zip(headers, contents.values()):
        stream.write(header)
        stream.write(data)
    stream.write(directory)


def read(buffer: Buffer) -> dict[str, memoryview]:
    """Return the files in a container, in order, as views into `buffer`.

    Raises:
        NotAnArtifact, TruncatedArtifact, UnsafePath, OversizedArtifact, ExtraFile, AlteredFile: see FORMAT.md.
    """
    whole = memoryview(buffer).cast("B")
    entries = list(_directory(whole))
    headers, directory = _layout(entries)
    files: dict[str, memoryview] = {}
    at = 0
    for entry, header in zip(entries, headers):
        _require_same(whole, at, header)
        at += len(header)
        data = whole[at : at + entry.size]
        if zlib.crc32(data) != entry.crc:
            raise AlteredFile(f"the file {entry.name!r} in the artifact was altered: its CRC-32 does not fit", "get the artifact again")
        files[entry.name] = data
        at += entry.size
    _require_same(whole, at, directory)
    if at + len(directory) != len(whole):
        raise _appended(len(whole) - at - len(directory))
    return files


def _layout(entries: Sequence[Entry]) -> tuple[list[bytes], bytes]:
    """Each file's header with its padding, and the directory that ends the container."""
    if len(entries) > MOST_FILES:
        raise _oversized(f"{len(entries)} files")
    headers, records, at = [], [], 0
    for entry in entries:
        check_name(entry.name)
        if at + entry.size > MOST_BYTES:
            raise _oversized(f"{entry.name!r} with {entry.size} bytes at {at}")
        name = entry.name.encode("ascii")
        padding = -(at + _LOCAL.size + len(name) + 4) % ALIGNMENT
        extra = struct.pack("<2H", _PADDING_ID, padding) + bytes(padding)
        common = (20, 0, 0, 0, _DATE_1980, entry.crc, entry.size, entry.size, len(name))
        header = _LOCAL.pack(b"PK\x03\x04", *common, len(extra)) + name + extra
        headers.append(header)
        records.append(_CENTRAL.pack(b"PK\x01\x02", 0x031E, *common, 0, 0, 0, 0, 0o100644 << 16, at) + name)
        at += len(header) + entry.size
    directory = b"".join(records)
    if at + len(directory) + _END.size > MOST_BYTES:
        raise _oversized(f"{at + len(directory) + _END.size} bytes")
    end = _END.pack(_END_MARK, 0, 0, len(entries), len(entries), len(directory), at, 0)
    return headers, directory + end


def _oversized(what: str) -> OversizedArtifact:
    return OversizedArtifact(f"the artifact has {what}; it may have {MOST_FILES} files and {MOST_BYTES} bytes", "store a smaller network")


def _appended(count: int) -> NotAnArtifact:
    return NotAnArtifact(f"the artifact has {count} bytes after its end", "get the artifact again; do not change it with a zip tool")


def _directory(whole: memoryview) -> Iterator[Entry]:
    """The entries that the directory lists. Everything else it says is held against `_layout` later."""
    if len(whole) > MOST_BYTES:
        raise _oversized(f"{len(whole)} bytes")
    if bytes(whole[:4]) != b"PK\x03\x04":
        raise NotAnArtifact("the file is not an exitify artifact: it does not start as one", "`exitify transform MODEL -o net.exitify` writes one")
    tail = bytes(whole[-_END.size - 0xFFFF :])
    behind = len(tail) - tail.rfind(_END_MARK) - _END.size if _END_MARK in tail else -1
    if behind < 0:
        raise TruncatedArtifact("the artifact is cut off: its directory is missing", "get the artifact again")
    if behind > 0:
        raise _appended(behind)
    *_, count, size, start, _ = _END.unpack(whole[-_END.size :])
    if count > MOST_FILES:
        raise _oversized(f"{count} files")
    if start + size + _END.size != len(whole):
        raise TruncatedArtifact("the artifact is cut off: its directory is not where it should be", "get the artifact again")
    seen: set[str] = set()
    total = 0
    for _ in range(count):
        if start + _CENTRAL.size > len(whole):
            raise TruncatedArtifact("the artifact is cut off inside its directory", "get the artifact again")
        record = _CENTRAL.unpack(whole[start : start + _CENTRAL.size])
        crc, size, name_length = record[7], record[8], record[10]
        raw = bytes(whole[start + _CENTRAL.size : start + _CENTRAL.size + name_length])
        name = raw.decode("ascii", errors="replace")
        check_name(name)
        if name in seen:
            raise ExtraFile(f"the artifact holds {name!r} twice", "do not use this file")
        seen.add(name)
        total += size
        if total > len(whole):
            raise OversizedArtifact(f"the artifact lists more bytes than it has ({name!r} should have {size})", "get the artifact again")
        yield Entry(name, size, crc)
        start += _CENTRAL.size + name_length


def _require_same(whole: memoryview, at: int, expected: bytes) -> None:
    found = whole[at : at + len(expected)]
    if found == expected:
        return
    place = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), len(found))
    raise NotAnArtifact(f"the artifact's container was altered at byte {at + place}", "get the artifact again; do not change it with a zip tool")
