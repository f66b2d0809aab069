"""The commands together, what each says beside its result, and what becomes of errors."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from exitify.cli import adapt, board, build, guide, show, use, verbosity
from exitify.errors import ExitifyError

EXTRAS = {
    "torch": "transform",
    "onnx": "transform",
    "onnxscript": "transform",
    "networkx": "transform",
    "onnxruntime": "ort",
    "tvm": "compile",
    "jinja2": "report",
    "matplotlib": "report",
    "openvino": "openvino",
}
"""Which extra brings a package that a command may need and a device may lack."""


def _with_plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with -v and -q, for which Ctrl-C, a missing extra and the system's refusals are errors like others: two lines."""

    @functools.wraps(command)
    def run(*arguments: Any, verbose: int = 0, quiet: bool = False, **options: Any) -> None:
        verbosity.choose(verbose, quiet)
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise ExitifyError(
                "interrupted; nothing was changed", "give the same command again; `train` and `compile --trials` go on where they were"
            ) from None
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            raise ExitifyError(f"this command needs {error.name}, which is not installed", f"pip install 'exitify[{EXTRAS[error.name]}]'") from error
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise ExitifyError(
                f"{place}{error.strerror or error}", "nothing was changed; check the path, its permissions and the space left"
            ) from error
        except MemoryError as error:
            raise ExitifyError(f"the memory is full: {error}", "give less at once") from error

    own = inspect.signature(command, eval_str=True)
    more = {"verbose": (verbosity.VERBOSE, 0), "quiet": (verbosity.QUIET, False)}
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind) for name, (kind, default) in more.items()]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own.parameters.values(), *added)}
    return run


app = typer.Typer(
    name="exitify",
    help="Early exits for a trained PyTorch model, in one artifact that runs without torch.",
    epilog="\n\n".join(guide.FIRST_STEPS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    build.transform,
    build.train,
    build.calibrate,
    build.compile,
    build.export,
    use.inspect,
    use.bench,
    use.measure,
    use.run,
    adapt.adapt,
    board.doctor,
    use.targets,
):
    app.command(epilog=guide.epilog(command.__name__), rich_help_panel=guide.panel_of(command.__name__))(_with_plain_errors(command))
boards = typer.Typer(help="A board's own software, and its side of remote tuning.", no_args_is_help=True)
for of_board in (board.serve, board.tracker, board.sidecar):
    boards.command(epilog=guide.epilog(f"board {of_board.__name__}"))(_with_plain_errors(of_board))
app.add_typer(boards, name="board", rich_help_panel=guide.panel_of("board"))
states = typer.Typer(help="What a device has learnt: why, how far it is from the artifact, back, and several together.", no_args_is_help=True)
for of_state in (adapt.log, adapt.diff, adapt.reset, adapt.merge):
    states.command(epilog=guide.epilog(f"state {of_state.__name__}"))(_with_plain_errors(of_state))
app.add_typer(states, name="state", rich_help_panel=guide.panel_of("state"))


def main() -> None:
    """Run a command. Exit 0, 1 for what the user can mend (two lines, no traceback), 2 for a wrong usage."""
    handler = logging.StreamHandler()
    handler.setFormatter(verbosity.Formatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        try:
            app(prog_name="exitify")
        finally:
            sys.stdout.flush()
    except ExitifyError as error:
        if verbosity.chosen().verbose > 1:
            traceback.print_exception(error)
        print(show.printable(f"exitify: {error.problem}"), file=sys.stderr)
        if error.hint:
            print(show.printable(f"  hint: {error.hint}"), file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # whoever read the output has gone (`| head -1`); what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
