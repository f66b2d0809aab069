"""Where boards register and searches find them: TVM's own tracker, on the machine that compiles."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from exitify.board.tracker import PORT, listen, say_at_once
from exitify.errors import ExitifyError


def serve_tracker(host: str = "0.0.0.0", port: int = PORT, *, say: Callable[[str], None] = say_at_once) -> None:  # noqa: S104
    """Be the tracker, until Ctrl-C. It trusts whoever reaches its port: only for a network of your own.

    Args:
        host: The address to listen at; by default every one that this machine has, since boards are elsewhere.
        port: 0: one that is free.
        say: Called with each line for people.

    Raises:
        ExitifyError: the address cannot be listened at, or TVM's tracker is not installed.
    """
    try:
        from tvm.rpc.tracker import TrackerServerHandler
    except ImportError as error:
        raise ExitifyError(f"TVM's tracker does not start here: {error}", "pip install 'exitify[compile]'") from error
    listener = listen(host, port, "choose another port, or end what listens there")
    port = listener.getsockname()[1]
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    tracker = TrackerServerHandler(listener, secrets.token_hex())
    say(f"tracker: boards register at port {port} of this machine; Ctrl-C ends it")
    try:
        tracker.run()
    except KeyboardInterrupt:
        say("tracker: ended")
    finally:
        tracker.stop()
        asyncio.set_event_loop(None)
        loop.close()
