"""Files that are either the old one or the new one, never half of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from exitify.errors import ExitifyError


class NotWritten(ExitifyError):
    """The file could not be written; what stood there before is whole."""


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream to a temporary file in the same folder, renamed to `path` when everything has reached the disk.

    Raises:
        NotWritten: no space, no permission, no such folder.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise NotWritten(
            f"cannot write {target}: {error.strerror or error}", "nothing was changed; free some space or choose another place"
        ) from error
    finally:
        with suppress(OSError):  # renamed already, or never made
            temporary.unlink()
