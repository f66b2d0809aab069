"""Commands of any machine with an artifact: run, bench, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitify.cli import complete, show, tables
from exitify.cli.build import ARTIFACT, DATA, JSON, OUTPUT, SKIP, THREADS, require_place
from exitify.cli.verbosity import progress_bar
from exitify.errors import DataError, ModelError, first_line
from exitify.plan import mask_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exitify.artifact.artifact import Artifact
    from exitify.artifact.manifest import InputContract

PROFILE = typer.Option(
    help="Calibrated profile; by default the one called 'default', if there is one; none takes no exit.", autocompletion=complete.profile
)
ENGINE = typer.Option(
    help="auto (onnxruntime), onnxruntime, onnxruntime:cuda, onnxruntime:tensorrt, reference; tvm or tvm:TARGET: the compiled library, native code.",
    autocompletion=complete.engine,
)


def run(
    artifact: Annotated[Path, ARTIFACT],
    inputs: Annotated[list[str], typer.Argument(help="Pictures, or .npy arrays with one or more inputs.", show_default=False)],
    profile: Annotated[str | None, PROFILE] = None,
    skip: Annotated[str | None, SKIP] = None,
    budget_ms: Annotated[float | None, typer.Option(help="Leave out what was measured to fit this time, in place of a profile.")] = None,
    exit_name: Annotated[str | None, typer.Option("--exit", help="Always answer at this exit, or at final.")] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="The best answer within this time of each call.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="The inputs are frames in order: an answer is kept while it still holds.")] = False,
    hold: Annotated[float | None, typer.Option(help="With --stream: least similarity of two frames, 0 to 1, by which an answer holds.")] = None,
    budget_macs: Annotated[float | None, typer.Option(help="With --batch: share of the multiply-adds that its answers may take on average.")] = None,
    engine: Annotated[str, ENGINE] = "auto",
    threads: Annotated[int, THREADS] = 1,
    batch: Annotated[int, typer.Option(min=1, help="How many to answer at once.")] = 1,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Answer for pictures or arrays, stopping as early as the profile allows."""
    from exitify.runtime.session import Session

    if budget_ms is not None and (profile is not None or skip is not None):
        raise DataError("--budget-ms chooses what to leave out", "give it without --profile and --skip")
    if stream and (exit_name, skip, deadline_ms, batch) != (None, None, None, 1):
        raise DataError(
            "--stream answers frames one by one, and stops where an answer holds", "give it without --exit, --skip, --deadline-ms and --batch"
        )
    if hold is not None and not stream:
        raise DataError("--hold says how alike the frames of a stream must be", "give it with --stream")
    if deadline_ms is not None and batch > 1:
        raise DataError("--deadline-ms is for one answer at a time", "give it without --batch")
    if budget_macs is not None and batch == 1:
        raise DataError("--budget-macs is what the answers of a batch take on average", "give it with --batch 256, for instance")
    session = Session.load(artifact, engine=engine, profile=profile, threads=threads)
    if budget_ms is not None:
        session.use(budget_ms=budget_ms)
    in_use, stops_by_itself = session.profile_name, exit_name or deadline_ms or stream or budget_macs
    if exit_name is not None:
        session.use(profile, budget_ms=budget_ms, exit=exit_name)
    named = [pair for name in inputs for pair in read_inputs(name, session.contract)]
    frames = session.stream(hold=hold) if stream else None
    answers = []
    for start in range(0, len(named), batch):
        ready = [x for _, x in named[start : start + batch]]
        if frames is not None:
            answers.append(frames.run(ready[0]))
        elif batch == 1:
            answers.append(session.run(ready[0], skip, deadline_ms=deadline_ms))
        else:
            answers += session.run_batch(_stacked(ready), skip, budget_macs=budget_macs)
    if json:
        rows = [tables.answer_json(name, answer) for (name, _), answer in zip(named, answers)]
        show.as_json(
            {
                "profile": in_use,
                "skip": mask_text(session.artifact.plan.mask(skip)) if skip else session.mask,
                "engine": session.engine.name,
                "answers": rows,
            }
        )
        return
    tables.answers([name for name, _ in named], answers, session.artifact.plan)
    if budget_ms is not None:
        print(f"Left out: {session.mask}.")
    elif in_use is None and session.artifact.plan.exits and not stops_by_itself:
        show.advise("No profile is in use, so no exit was taken: `exitify calibrate` makes one.")
    loading = show.call("exitify.Session.load", repr(str(artifact)), engine=(engine, "auto"), profile=(profile, None), threads=(threads, 1))
    if budget_ms is not None or (exit_name is not None and batch > 1):
        using = show.call("session.use", profile=(profile, None), budget_ms=(budget_ms, None), exit=(exit_name, None))
        loading = f"session = {loading}; {using}; session"
    if stream:
        show.python_call(f"stream = {show.call(f'{loading}.stream', hold=(hold, None))}; stream.run(x)")
    elif batch > 1:
        show.python_call(show.call(f"{loading}.run_batch", "x", skip=(skip, None), budget_macs=(budget_macs, None)))
    else:
        one_exit = exit_name if budget_ms is None else None
        show.python_call(show.call(f"{loading}.run", "x", skip=(skip, None), exit=(one_exit, None), deadline_ms=(deadline_ms, None)))


def read_inputs(name: str, contract: InputContract) -> list[tuple[str, NDArray[Any]]]:
    """The inputs in a file, each with the name to show: a picture, or the rows of a .npy array.

    Raises:
        DataError: no such file, neither a picture nor an array, or of another shape than the network's input.
    """
    import numpy as np

    from exitify.pictures import picture_to_input

    if not Path(name).is_file():
        raise DataError(f"there is no file {name}", "give pictures or .npy arrays")
    if not name.endswith(".npy"):
        return [(name, picture_to_input(name, contract))]
    try:
        array = np.load(name, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{name} is not a .npy array: {first_line(error)}", "write it with numpy.save, without objects") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{name} holds several arrays (it is a .npz)", "write the one with the inputs with numpy.save")
    one = len(contract.shape)
    if array.ndim == one:
        return [(name, array)]
    if array.ndim != one + 1:
        raise DataError(f"{name} has shape {array.shape}, and the network reads (N, {', '.join(map(str, contract.shape))})", "see `exitify inspect`")
    return [(f"{name}[{i}]", row) for i, row in enumerate(array)]


def _stacked(arrays: list[NDArray[Any]]) -> NDArray[np.generic]:
    import numpy as np

    if len({array.shape for array in arrays}) > 1:
        raise DataError(f"inputs of the shapes {sorted({array.shape for array in arrays})} cannot be answered as one batch", "use --batch 1")
    return np.stack(arrays)


def bench(
    artifact: Annotated[Path, ARTIFACT],
    data: Annotated[str, DATA],
    against: Annotated[
        str,
        typer.Option(
            help="onnxruntime, tvm, torch, inductor, openvino, separated by commas; the one that runs the artifact is there anyhow.",
            autocompletion=complete.some_of("onnxruntime", "tvm", "torch", "inductor", "openvino"),
        ),
    ] = "onnxruntime",
    smaller: Annotated[Path | None, typer.Option(help="An ONNX file of a smaller network with the same input and classes.")] = None,
    profile: Annotated[str | None, PROFILE] = None,
    engine: Annotated[str, ENGINE] = "auto",
    threads: Annotated[int, THREADS] = 1,
    samples: Annotated[int, typer.Option(min=2, help="How many to time, in each round.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="How often to load and time everything: more make the stated noise smaller.")] = 5,
    model: Annotated[str | None, typer.Option(help="The original, for torch and inductor; its weights are taken from the artifact.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load a pickled module: this runs the code in it.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure what a process with each contender alone holds in memory.")] = True,
    energy: Annotated[bool, typer.Option("--energy", help="Measure what an answer takes from a Jetson's supply, above idle.")] = False,
    markdown: Annotated[str | None, typer.Option(help="Write the table as Markdown to this file, or to - for stdout in place of all else.")] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Time the artifact against the same network without exits: same process, same threads, in turn; and say how sure that is."""
    from exitify.artifact.artifact import Artifact
    from exitify.benchmark import bench as time_all
    from exitify.benchmark import markdown as as_markdown
    from exitify.data import load_samples
    from exitify.files import written_whole

    if json and markdown == "-":
        raise DataError("--json and --markdown - both want stdout", "give --markdown a file")
    if markdown not in (None, "-"):
        require_place(Path(markdown))
    opened = Artifact.open(artifact)
    loaded = load_samples(data, opened.manifest.input, classes=opened.plan.classes)
    contenders = against.split(",") if against else []
    needs_model = bool({"torch", "inductor"} & set(contenders))
    if model is not None and not needs_model:
        raise DataError("--model is for timing against torch and inductor", "give --against torch with it, or leave it out")
    module = original_module(opened, model, trust) if needs_model else None
    with progress_bar() as progress:
        report = time_all(
            opened, loaded, against=contenders, smaller=smaller, profile=profile, engine=engine, threads=threads, most=samples, rounds=rounds,
            model=module, memory=memory, energy=energy, progress=progress,
        )  # fmt: skip
    if markdown == "-":
        print(as_markdown(report), end="")
        return
    if markdown is not None:
        with written_whole(markdown) as stream:
            stream.write(as_markdown(report).encode())
    if json:
        show.as_json(report)
        return
    tables.timings(report)
    if markdown is not None:
        show.say(f"Wrote {markdown}.")
    opening = show.call("exitify.Artifact.open", repr(str(artifact)))
    given = [opening, "samples", *(["model=module"] if needs_model else [])]
    timing = show.call("exitify.bench", *given, against=(tuple(contenders), ("onnxruntime",)), smaller=(smaller and str(smaller), None),
                       profile=(profile, None), engine=(engine, "auto"), threads=(threads, 1), most=(samples, 500), rounds=(rounds, 5),
                       memory=(memory, True), energy=(energy, False))  # fmt: skip
    show.python_call(timing)


def measure(
    artifact: Annotated[Path, ARTIFACT],
    engine: Annotated[str, ENGINE] = "auto",
    threads: Annotated[int, THREADS] = 1,
    name: Annotated[str, typer.Option(help="Name to store the times under; by default the board, its power mode and the engine.")] = "",
    output: Annotated[Path | None, OUTPUT] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Time every segment here and write the times into the artifact, so that `calibrate --budget-ms --times` can serve this machine from another."""
    from exitify.artifact.artifact import Artifact
    from exitify.calibration.segment_times import measure_segments, name_of

    opened = Artifact.open(artifact)
    with progress_bar() as progress:
        times = measure_segments(opened, engine=engine, threads=threads, progress=progress)
    called = name or name_of(times)
    opened.with_times(called, times).save(output or artifact)
    if json:
        show.as_json({"output": str(output or artifact), "name": called, **vars(times)})
        return
    tables.times(called, times, opened.plan)
    show.done(f"Wrote {output or artifact}.", f"Next: `exitify calibrate {output or artifact} --data DIR --budget-ms MS --times {called}`")
    opening = show.call("exitify.Artifact.open", repr(str(artifact)))
    timing = show.call("exitify.measure_segments", opening, engine=(engine, "auto"), threads=(threads, 1))
    show.python_call(f"{opening}.with_times({called!r}, {timing}).save({str(output or artifact)!r})")


def original_module(artifact: Artifact, model: str | None, trust: bool) -> Any:
    """The model that the artifact came from, as the user names it, with the artifact's weights.

    The name that stands in the artifact is not used: opening a stranger's file must not choose what is imported here.
    """
    import numpy as np
    import torch

    from exitify.artifact.artifact import WEIGHTS_FILE
    from exitify.models import load_model

    if model is None:
        raise ModelError("timing against torch needs the original model", f"give --model {artifact.manifest.model.source or 'MODEL'}")
    module = load_model(model, input_shape=artifact.manifest.input.shape, trust=trust).module
    tensors = artifact.tensors(WEIGHTS_FILE)
    own = {name: torch.from_numpy(np.array(tensors[name])) for name in module.state_dict() if name in tensors}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ModelError(f"{model} is not the model of this artifact", "give the one that was transformed: --model MODEL") from error
    return module


def inspect(
    artifact: Annotated[Path, ARTIFACT],
    html: Annotated[Path | None, typer.Option(help="Write a report to look at: one page that needs nothing beside it.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for its figures as .svg and .png, for papers.")] = None,
    data: Annotated[
        str | None, typer.Option(help="With --html or --plots: labelled pictures to answer, as for `calibrate`; without, those that it remembers.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="With --html or --plots: the profile to show; by default 'default', else the newest.", autocompletion=complete.stored_profile
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="With --data: what answers, and is timed where no times are stored; as for `run`.")] = "auto",
    threads: Annotated[int, THREADS] = 1,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Say what an artifact holds; with --html, show what it does. Checks every hash, executes nothing unless --data is given."""
    from exitify.artifact.artifact import Artifact

    opened = Artifact.open(artifact)
    if html is not None or plots is not None:
        _report(opened, artifact, html, plots, data, profile, engine, threads, json)
        return
    if (data, profile, engine, threads) != (None, None, "auto", 1):
        raise DataError("--data, --profile, --engine and --threads are for the report", "give --html report.html with them")
    manifest = opened.manifest
    if json:
        show.as_json({**vars(manifest), "profiles": opened.profiles, "masks": opened.masks, "targets": opened.targets})
        return
    print(f"{artifact}, {artifact.stat().st_size / 2**20:.1f} MiB")
    tables.artifact(opened)


def _report(
    opened: Artifact, artifact: Path, html: Path | None, plots: Path | None, data: str | None, profile: str | None, engine: str, threads: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Write the report's page, its figures, or both."""
    from exitify.data import load_samples
    from exitify.report.report import inspect as gather

    if html is not None:
        require_place(html)
    if data is None and (engine, threads) != ("auto", 1):
        raise DataError("--engine and --threads are for answering samples", "give --data with them")
    samples = load_samples(data, opened.manifest.input, classes=opened.plan.classes) if data is not None else None
    with progress_bar() as progress:
        report = gather(opened, samples, profile=profile, engine=engine, threads=threads, progress=progress)
        written = [report.save(html, artifact.name)] if html is not None else []
        written += report.save_plots(plots) if plots is not None else []
    if as_json:
        show.as_json({"written": [str(path) for path in written], "profile": report.profile_name})
        return
    for path in written:
        show.say(f"Wrote {path}, {path.stat().st_size / 1024:.0f} KiB.")
    if plots is not None and not list(plots.iterdir()):
        show.say(f"There is nothing to draw in {plots}.")
    if report.evidence is None:
        show.advise("It shows what the network is, and not what it does: give --data.")
    gathering = show.call("exitify.inspect", show.call("exitify.Artifact.open", repr(str(artifact))), *(["samples"] if data else []),
                          profile=(profile, None), engine=(engine, "auto"), threads=(threads, 1))  # fmt: skip
    saving = [
        *([f"save({str(html)!r}, {artifact.name!r})"] if html is not None else []),
        *([f"save_plots({str(plots)!r})"] if plots is not None else []),
    ]
    show.python_call(f"{gathering}.{saving[0]}" if len(saving) == 1 else f"report = {gathering}; " + "; ".join(f"report.{step}" for step in saving))


def targets(json: Annotated[bool, JSON] = False) -> None:
    """List the boards that exitify knows, and where each figure comes from."""
    from exitify.targets import load_target, target_names

    boards = [load_target(name) for name in target_names()]
    if json:
        show.as_json(boards)
        return
    tables.targets(boards)
    show.python_call("[exitify.targets.load_target(name) for name in exitify.targets.target_names()]")
