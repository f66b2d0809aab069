"""Shared objects as bytes: whole, and for which architecture. The system's loader ends the process over one that is cut off."""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<4sBBB9xHHIQQQIHHHHHH")
"""Elf64_Ehdr: magic, class, byte order, version; then type, machine, version, entry, and where its two tables stand (man 5 elf)."""
_SEGMENT = struct.Struct("<IIQQQQQQ")
"""Elf64_Phdr; offset and size in the file are the third and the sixth."""
_SHARED_OBJECT = 3
_ARCHITECTURES = {62: "x86_64", 183: "aarch64"}


def architecture_of(library: bytes) -> str:
    """The architecture of a whole 64-bit shared object.

    Raises:
        ValueError: it is none, or lacks bytes that it says it has.
    """
    if len(library) < _HEADER.size:
        raise ValueError(f"it has {len(library)} bytes")
    magic, size_class, order, _, kind, machine, _, _, segments_at, sections_at, *rest = _HEADER.unpack_from(library)
    if (magic, size_class, order, kind) != (b"\x7fELF", 2, 1, _SHARED_OBJECT):
        raise ValueError("it is no 64-bit shared object")
    _, _, segment_size, segments, section_size, sections, _ = rest
    ends = [segments_at + segment_size * segments, sections_at + section_size * sections]
    if segment_size == _SEGMENT.size and ends[0] <= len(library):
        for i in range(segments):
            _, _, offset, _, _, size, _, _ = _SEGMENT.unpack_from(library, segments_at + i * segment_size)
            ends.append(offset + size)
    if max(ends) > len(library):
        raise ValueError(f"it has {len(library)} bytes of {max(ends)}")
    return _ARCHITECTURES.get(machine, f"ELF machine {machine}")
