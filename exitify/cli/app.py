"""The commands together, and what becomes of errors."""

from __future__ import annotations

import logging
import sys

import typer

from exitify.cli import build, use
from exitify.errors import ExitifyError

app = typer.Typer(
    name="exitify",
    help="Early exits for a trained PyTorch model, in one artifact that runs without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (build.transform, build.train, build.calibrate, use.run, use.bench, use.inspect, build.export):
    app.command()(command)


def main() -> None:
    """Run a command. Exit 0, 1 for what the user can mend (two lines, no traceback), 2 for a wrong usage."""
    logging.basicConfig(format="exitify: warning: %(message)s", level=logging.WARNING)
    try:
        app()
    except ExitifyError as error:
        print(f"exitify: {error.problem}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("exitify: interrupted; nothing was changed\n  hint: the same command goes on where it was", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
