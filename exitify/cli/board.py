"""Commands of a board: what it has, its CUDA runtime, and its side of remote tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitify.cli import show, tables
from exitify.cli.build import JSON
from exitify.cli.verbosity import progress_bar
from exitify.errors import ExitifyError


def doctor(
    artifact: Annotated[Path | None, typer.Argument(help="Say of each of its libraries whether it runs here.", show_default=False)] = None,
    root: Annotated[Path, typer.Option(help="Where /proc, /sys, /etc and /var of the board are.")] = Path("/"),
    json: Annotated[bool, JSON] = False,
) -> None:
    """Say what this machine has for running artifacts, and what helps where something is wrong. Loads no library of an artifact."""
    from exitify.artifact.artifact import Artifact
    from exitify.board.doctor import examine

    findings = examine(Artifact.open(artifact) if artifact else None, root)
    if json:
        show.as_json(findings)
    else:
        tables.findings(findings)
    wrong = [found.topic for found in findings if found.state == "wrong"]
    if wrong:
        raise ExitifyError(f"{len(wrong)} of {len(findings)} are wrong: {', '.join(wrong)}", "each says what helps")


def sidecar(
    source: Annotated[Path | None, typer.Option(help="TVM's source of the installed version: its release archive, or a folder.")] = None,
    cuda: Annotated[Path | None, typer.Option(help="The CUDA toolkit; by default $CUDA_HOME, or what is in /usr/local.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to write; by default where the engine looks for it.")] = None,
) -> None:
    """Build TVM's CUDA runtime for the CUDA of this board: JetPack 6 needs it, since PyPI's is for CUDA 13."""
    from exitify.board.sidecar import build_sidecar

    with progress_bar() as progress:
        made = build_sidecar(source, cuda=cuda, to=output, progress=progress)
    show.done(f"Wrote {made.path}: TVM {made.tvm}'s CUDA runtime for CUDA {made.cuda}, with {made.cudart}.", "Next: `exitify doctor`")


def serve(
    place: Annotated[str, typer.Argument(metavar="HOST:PORT/KEY", help="The tracker, and the key to register under.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[int, typer.Option(help="Port to listen at; 0: one that is free.", min=0, max=65535)] = 0,
    address: Annotated[str, typer.Option(help="How the machine that compiles reaches this board, where it is not as the tracker sees it.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads that a kernel may use.", min=1)] = 1,
) -> None:
    """Measure kernels for whoever the tracker sends, until Ctrl-C: only in a network of your own, a client runs any code here."""
    from exitify.board.serve import serve as run
    from exitify.board.tracker import parse_place

    tracker_host, tracker_port, key = parse_place(place)
    run((tracker_host, tracker_port), key, host=host, port=port, address=address, threads=threads)


def tracker(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 9190,
) -> None:
    """Be where boards register and `exitify compile --rpc` finds them, until Ctrl-C: only in a network of your own."""
    from exitify.lower.tuning.tracker import serve_tracker

    serve_tracker(host, port)
