"""Commands of a device that learns: adapt, and what is in a state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from exitify.cli import show, tables
from exitify.cli.build import ARTIFACT, DATA, JSON, THREADS
from exitify.cli.use import ENGINE, PROFILE
from exitify.cli.verbosity import progress_bar
from exitify.errors import DataError, StateError
from exitify.files import NotWritten

STATE = typer.Argument(help="A state, device.state.", show_default=False)


def adapt(
    artifact: Annotated[Path, ARTIFACT],
    stream: Annotated[str, typer.Option(help="Inputs without labels: a folder with pictures, a .npy, or a .npz with x (file.npz#test: x_test).")],
    state: Annotated[Path | None, typer.Option(help="Go on with this state if it is there, and write it.")] = None,
    judge: Annotated[str | None, typer.Option(help=f"Labelled samples to judge before and after: {DATA.help}")] = None,
    profile: Annotated[str | None, PROFILE] = None,
    engine: Annotated[str, ENGINE] = "auto",
    threads: Annotated[int, THREADS] = 1,
    passes: Annotated[int, typer.Option(min=1, help="Over the stream.")] = 1,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Take the stream in a random order, each pass anew.")] = False,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of SGD.")] = 1e-4,
    momentum: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of SGD.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Answers a step.")] = 1,
    targets: Annotated[str, typer.Option(help="What a deeper exit teaches: hard, its class; soft, its probabilities.")] = "hard",
    audit: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of inputs that go on to the network's end.")] = 0.05,
    guards: Annotated[bool, typer.Option(help="Without them what is learnt is in use at once, whatever it is.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of audited inputs, and of the order.")] = 0,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Answer for a stream and let the heads learn from it, within what the profile promises."""
    from exitify.adapt.report import adapt as learn
    from exitify.adapt.session import LearningSession
    from exitify.adapt.settings import Guards, Learning
    from exitify.adapt.stream import open_stream
    from exitify.adapt.update import Sgd
    from exitify.data import load_samples

    if targets not in ("hard", "soft"):
        raise DataError(f"--targets {targets} is neither", "give hard or soft")
    if state is not None and not state.resolve().parent.is_dir():
        raise NotWritten(f"there is no folder for {state}", "make it, or choose another place")
    sgd = Sgd(learning_rate, momentum)
    how = Learning(sgd, cast(Literal["hard", "soft"], targets), batch, guards=Guards(audit=audit) if guards else None)
    session = LearningSession.load(artifact, state=state, engine=engine, profile=profile, threads=threads, how=how, seed=seed, in_background=False)
    samples = load_samples(judge, session.contract, classes=session.artifact.plan.classes) if judge else None
    with progress_bar() as progress:
        report = learn(
            session,
            open_stream(stream, session.contract),
            judge_on=samples,
            passes=passes,
            seed=seed if shuffle else None,
            save_to=state,
            progress=progress,
        )
    if json:
        show.as_json(report)
        return
    tables.adapted(report, session.contract.classes)
    if state is not None:
        loading = f"LearningSession.load({str(artifact)!r}, state={str(state)!r})"
        show.done(f"Wrote {state}.", f"Next: `exitify state log {artifact} {state}`; in a service: {loading}")
    else:
        show.done("Nothing was written.", "Give --state to keep what was learnt.")
    show.python_call(
        show.call("exitify.LearningSession.load", repr(str(artifact)), state=(str(state) if state else None, None), engine=(engine, "auto"),
                  profile=(profile, None), threads=(threads, 1)) + ".run(x)"
    )  # fmt: skip


def log(artifact: Annotated[Path, ARTIFACT], state: Annotated[Path, STATE], json: Annotated[bool, JSON] = False) -> None:
    """Say what was decided while it learnt, and why."""
    from exitify.adapt.state import State
    from exitify.artifact.artifact import Artifact

    opened = State.open(state, Artifact.open(artifact))
    if json:
        show.as_json(opened.record)
        return
    tables.state_log(opened)


def diff(
    artifact: Annotated[Path, ARTIFACT],
    state: Annotated[Path, STATE],
    other: Annotated[Path | None, typer.Argument(help="Another state; by default the artifact itself.", show_default=False)] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Say how far heads and thresholds are from the artifact's, or from another state's."""
    from exitify.adapt.compare import compare
    from exitify.adapt.state import State
    from exitify.artifact.artifact import Artifact

    opened = Artifact.open(artifact)
    found = compare(State.open(state, opened), State.open(other, opened) if other else State.fresh(opened))
    if json:
        show.as_json(found)
        return
    tables.state_diff(found, str(other or "the artifact"))


def reset(
    artifact: Annotated[Path, ARTIFACT],
    state: Annotated[Path, STATE],
    to: Annotated[int, typer.Option(min=0, help="A snapshot to go back to; 0 forgets everything.")] = 0,
) -> None:
    """Go back to a snapshot, or begin again with the artifact's own heads. Also mends a state that cannot be read."""
    from dataclasses import replace

    from exitify.adapt.state import FACTORY, State, looks_like_state
    from exitify.artifact.artifact import Artifact

    opened = Artifact.open(artifact)
    if to == FACTORY:
        if not state.exists():
            raise StateError(f"there is no state {state}", "nothing is to be reset")
        try:
            trials = State.open(state, opened).record.trials
        except StateError:
            if not looks_like_state(state):
                raise  # no state, or another artifact's: not ours to overwrite
            trials = 0
        fresh = State.fresh(opened)
        replace(fresh, record=replace(fresh.record, trials=trials)).note("reset", "asked for").save(state)
        print(f"Wrote {state}: the artifact's own heads, nothing learnt.")
        return
    State.open(state, opened).back_to(to, "asked for").save(state)
    print(f"Wrote {state}: snapshot {to} is in use.")


def merge(
    artifact: Annotated[Path, ARTIFACT],
    states: Annotated[list[Path], typer.Argument(help="States of devices with this artifact.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The state to write.")],
) -> None:
    """Put together what several devices have learnt: the mean of their heads, weighed by their updates. A device proves it before it is in use."""
    from exitify.adapt.state import State, merged
    from exitify.artifact.artifact import Artifact

    opened = Artifact.open(artifact)
    together = merged([State.open(path, opened) for path in states])
    together.save(output)
    next_step = f"Next: `exitify adapt {artifact} --stream DATA --state {output}`"
    show.done(f"Wrote {output}: {len(states)} states, {together.record.updates} updates.", next_step)
