"""TVM's tracker of boards, asked.

The protocol is that of TVM 0.27 (`tvm/rpc/tracker.py`): a magic number each way, then JSON texts, the length before each, one answer a request.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
from typing import Any

from exitify.errors import ExitifyError

MAGIC = 0x2F271
PUT, REQUEST, UPDATE_INFO, SUMMARY, GET_PENDING = 3, 4, 5, 6, 7
_LARGEST = 2**24
"""Bytes of an answer; a summary of a thousand boards takes a hundredth of it."""

PORT = 9190
"""Where a tracker listens unless told otherwise."""


def say_at_once(text: str) -> None:
    """Print a line that is seen at once, in a log file too."""
    print(text, flush=True)


def receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or an OSError."""
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        found += piece
    return found


class Tracker:
    """A connection to a tracker, on which no wait is endless."""

    def __init__(self, host: str, port: int, patience: float = 10.0) -> None:
        """Connect.

        Args:
            patience: Seconds to wait for each answer.

        Raises:
            OSError: nobody answers there, or somebody who is no tracker.
        """
        self.host, self.port, self.patience = host, port, patience
        self._connection = socket.create_connection((host, port), timeout=patience)
        try:
            self._connection.sendall(struct.pack("<i", MAGIC))
            if receive(self._connection, 4) != struct.pack("<i", MAGIC):
                raise OSError(errno.EPROTO, "what answers there is no tracker")
        except BaseException:
            self._connection.close()
            raise

    @property
    def own_address(self) -> str:
        """This machine's address, as seen on the way to the tracker."""
        return str(self._connection.getsockname()[0])

    def ask(self, code: int, *arguments: Any, patience: float | None = None) -> Any:
        """The answer to a request.

        Raises:
            OSError: it did not come in time (TimeoutError: the connection is then of no more use), or is none.
        """
        text = json.dumps([code, *arguments]).encode()
        self._connection.settimeout(self.patience if patience is None else patience)
        self._connection.sendall(struct.pack("<i", len(text)) + text)
        (length,) = struct.unpack("<i", receive(self._connection, 4))
        if not 0 < length <= _LARGEST:
            raise OSError(errno.EPROTO, "what answers there is no tracker")
        try:
            return json.loads(receive(self._connection, length))
        except ValueError as error:
            raise OSError(errno.EPROTO, "what answers there is no tracker") from error

    def boards(self, key: str) -> tuple[int, int]:
        """How many boards are registered under a key, and how many of them are free.

        Raises:
            OSError: as `ask`.
        """
        _, found = self.ask(SUMMARY)
        registered = sum(one.get("key") == f"server:{key}" for one in found["server_info"])
        return registered, int(found["queue_info"].get(key, {}).get("free", 0))

    def close(self) -> None:
        """End the connection, and with it what was asked for or registered on it."""
        self._connection.close()


def parse_place(text: str) -> tuple[str, int, str]:
    """`HOST:PORT/KEY` as its parts: where a tracker is, and what boards register under there.

    Raises:
        ExitifyError: it has another form.
    """
    address, _, key = text.partition("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535 or not key:
        raise ExitifyError(f"{text!r} is no HOST:PORT/KEY", "127.0.0.1:9190/orin: a tracker, and the key that the board registered under")
    return host, int(port), key


def listen(host: str, port: int, hint: str) -> socket.socket:
    """A socket that listens.

    Raises:
        ExitifyError: it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ExitifyError(f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}", hint) from error
