"""Commands of the build machine: transform, train, calibrate, compile, export."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from exitify.artifact.manifest import Policy
from exitify.cli import complete, show, tables
from exitify.cli.verbosity import progress_bar, tuning_bar
from exitify.errors import ExitifyError
from exitify.files import NotWritten
from exitify.plan import PATHS, mask_text
from exitify.progress import silent

log = logging.getLogger(__name__)

ARTIFACT = typer.Argument(help="An artifact, net.exitify.", show_default=False)
DATA = typer.Option(help="A folder with one sub-folder a class, a .npz with x and y (file.npz#test: x_test and y_test), or package.module:loader.")
OUTPUT = typer.Option("-o", "--output", help="Where to write; by default the artifact itself is replaced.")
JSON = typer.Option("--json", help="Print JSON, for machines.")
SKIP = typer.Option(help="Skip paths to leave out, one 0 or 1 each in order: 0110; all or none.")
THREADS = typer.Option(help="CPU threads.", min=1)
LARGEST_SEED = 2**32 - 1
METHODS = ("distillation", "jei", "class-means", "joint", "ramp", "equilibrium", "one-for-all", "sample-weights", "skip-distillation")
POLICIES = tuple(name for name in get_args(Policy) if name != "temporal")  # which is for streams


def transform(
    model: Annotated[
        str, typer.Argument(help="model.pt2, model.pt (with --trust), package.module:factory, torchvision:NAME or timm:NAME.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The artifact to write.")],
    exits: Annotated[
        str, typer.Option(help="auto, none, how many, or names of modules separated by commas, each with its head if wanted: layer2.3:conv.")
    ] = "auto",
    skips: Annotated[
        str,
        typer.Option(
            help="Blocks that may be left out: auto, none, how many of each stage, or names of modules.",
            autocompletion=complete.one_of("auto", "none"),
        ),
    ] = "none",
    head: Annotated[
        str,
        typer.Option(
            help="auto, linear, conv, deep, mlp (conv128: of that width), or own: as the network's own head.",
            autocompletion=complete.one_of("auto", "linear", "conv", "deep", "mlp", "own"),
        ),
    ] = "auto",
    cascade: Annotated[
        str,
        typer.Option(
            help="How heads use the logits of the exit before: none, identity, learned, layer_norm, boosted or ensemble.",
            autocompletion=complete.one_of("none", *PATHS),
        ),
    ] = "none",
    data: Annotated[str | None, typer.Option(help="Labelled pictures: exits auto are then searched, with probes trained on these.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Pictures that the network has not seen, to choose by; by default a part of --data.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="With --data: accuracy may fall by this much; 0.005 unless a time is given.")] = None,
    budget_ms: Annotated[float | None, typer.Option(help="With --data: mean milliseconds an answer, here and with this engine.")] = None,
    cost: Annotated[
        str, typer.Option(help="With --data: what exits are to save, time or macs.", autocompletion=complete.one_of("time", "macs"))
    ] = "time",
    engine: Annotated[str, typer.Option(help="With --data: what is timed.")] = "auto",
    threads: Annotated[int, THREADS] = 1,
    work: Annotated[Path | None, typer.Option(help="With --data: folder for what is recorded.")] = None,
    scores: Annotated[str | None, typer.Option(help="Where the class scores are in what the model returns: a key, or a number in a tuple.")] = None,
    weights: Annotated[Path | None, typer.Option(help=".safetensors, or .pth read without running code.")] = None,
    input_shape: Annotated[str | None, typer.Option(help="Without the batch: 3x224x224.")] = None,
    preprocess: Annotated[str | None, typer.Option(help="imagenet, or 'mean=…;std=…;resize=256;crop=224'.")] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load a pickled module: this runs the code in it.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the fresh heads' weights.")] = 0,
    why: Annotated[
        bool, typer.Option("--why", help="List every place and block that was considered, and why it is no exit or cannot be left out.")
    ] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Place early exits and skip paths in a trained model and write it as an artifact."""
    import torch

    import exitify
    from exitify.data import load_samples
    from exitify.models import load_model, parse_shape
    from exitify.passes.choose_exits import ChooseExits
    from exitify.passes.choose_skips import ChooseSkips
    from exitify.pipeline import place

    require_place(output)
    shape = parse_shape(input_shape) if input_shape else None
    names = tuple(classes.split(",")) if classes else ()
    loaded = load_model(model, weights=weights, input_shape=shape, preprocess=preprocess, classes=names, trust=trust)
    if loaded.has_random_weights:
        log.warning("%s has random weights; give its trained ones with --weights", model)
    torch.manual_seed(seed)
    captured = exitify.capture(loaded.module, loaded.example, source=loaded.source, scores=scores)
    placement = None
    if data is None:
        _refuse_without_data(
            held_out=(held_out, None), max_drop=(max_drop, None), budget_ms=(budget_ms, None), work=(work, None), cost=(cost, "time"),
            engine=(engine, "auto"), threads=(threads, 1),
        )  # fmt: skip
        program = place(captured, exits=exits, skips=skips, head=head, cascade=cascade)
        artifact = exitify.export(program, contract=loaded.contract, heads_trained=False)
    else:
        if exits != "auto":
            raise ExitifyError(f"--data serves the search for exits, and --exits {exits} says where they are", "leave one of them out")
        if cascade != "none":
            raise ExitifyError("--data tries heads by themselves, and --cascade ties them", "give the places that it finds: --exits NAME:KIND,…")
        _one_of("cost", cost, ("time", "macs"))
        with_skips = ChooseSkips(skips=skips)(captured) if skips != "none" else captured
        samples = load_samples(data, loaded.contract, classes=captured.plan.classes)
        others = load_samples(held_out, loaded.contract, classes=captured.plan.classes) if held_out else None
        with progress_bar() as progress:
            placement = exitify.place_by_data(
                with_skips, samples, contract=loaded.contract, held_out=others, max_drop=max_drop, budget_ms=budget_ms, head=head,
                unit="ms" if cost == "time" else "macs", engine=engine, threads=threads, work=work, seed=seed, progress=progress,
            )  # fmt: skip
        program, artifact = placement.program, placement.artifact
    artifact.save(output)
    chooser = ChooseSkips(skips=skips)
    blocks = chooser.decide(captured)[1] if skips != "none" and (why or not program.plan.skips) else []
    if placement is not None:
        considered = list(placement.turned_down)
    else:
        with_skips = chooser(captured) if skips != "none" else captured
        considered = ChooseExits(exits=exits, head=head).decide(with_skips)[1] if why or not program.plan.exits else []
    if json:
        said = {} if placement is None else tables.placement_json(placement)
        show.as_json(
            {
                "output": str(output),
                "model_id": artifact.manifest.model_id,
                "plan": artifact.plan,
                "considered": [vars(c) for c in considered],
                "blocks": [vars(block) for block in blocks],
                **said,
            }
        )
        return
    tables.exits(artifact.plan)
    if placement is not None:
        tables.placement(placement, with_all=why)
    if considered and (why or placement is None):
        tables.considered(considered)
    if program.plan.skips:
        tables.skips(artifact.plan)
    if blocks:
        tables.blocks(blocks)
    if skips != "none" and not artifact.plan.skips:
        print("It has no skip paths: no residual block can be left out.")
    next_step = "It has no exits."
    if artifact.plan.exits and placement is None:
        next_step = f"Heads are untrained: `exitify train {output} --data DIR`"
    elif artifact.plan.exits:
        next_step = f"Heads are trained as probes; longer: `exitify train {output} --data {data}`. Then `exitify calibrate`"
    show.done(f"Wrote {output}, {output.stat().st_size / 2**20:.1f} MiB.", next_step)
    loading = show.call("exitify.load_model", repr(model), weights=(weights and str(weights), None), input_shape=(shape, None),
                        preprocess=(preprocess, None), classes=(names, ()), trust=(trust, False))  # fmt: skip
    show.python_call(f"torch.manual_seed({seed}); model = {loading}")
    if placement is not None:
        capturing = show.call("exitify.capture", "model.module", "model.example", source=(loaded.source, ""), scores=(scores, None))
        if skips != "none":
            capturing = f"ChooseSkips({skips!r})({capturing})"
        placing = show.call(
            "exitify.place_by_data", capturing, "samples", "contract=model.contract", *(["held_out=others"] if held_out else []),
            max_drop=(max_drop, None), budget_ms=(budget_ms, None), head=(head, "auto"), unit=("ms" if cost == "time" else "macs", "ms"),
            engine=(engine, "auto"), threads=(threads, 1), seed=(seed, 0),
        )  # fmt: skip
        show.python_call(f"{placing}.artifact.save({str(output)!r})")
        return
    placing = show.call(
        "exitify.transform",
        "model.module",
        "model.example",
        exits=(exits, "auto"),
        skips=(skips, "none"),
        head=(head, "auto"),
        cascade=(cascade, "none"),
        source=(loaded.source, ""),
        scores=(scores, None),
    )
    show.python_call(f"exitify.export({placing}, contract=model.contract, heads_trained=False).save({str(output)!r})")


def _refuse_without_data(**options: tuple[object, object]) -> None:
    for name, (value, default) in options.items():
        if value != default:
            raise ExitifyError(
                f"--{name.replace('_', '-')} serves the search for exits, which needs labelled pictures", "give --data, or leave it out"
            )


def train(
    artifact: Annotated[Path, ARTIFACT],
    data: Annotated[str, DATA],
    output: Annotated[Path | None, OUTPUT] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that the artifact was made from, as for `transform`: the whole network is then trained.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Of the heads: distillation (by default), jei (with gates), class-means. With --model: joint (by default), ramp, equilibrium, "
            "one-for-all, sample-weights, or skip-distillation.",
            autocompletion=complete.one_of(*METHODS),
        ),
    ] = None,
    cost_weight: Annotated[float, typer.Option(min=0, help="With --method jei: what the network's cost is worth, in nats of cross-entropy.")] = 1.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training samples.")] = 20,
    copies: Annotated[int, typer.Option(min=1, help="Heads only: how often each picture is augmented and recorded.")] = 4,
    augment: Annotated[str, typer.Option(help="none, crop, crop+flip, or auto: crop, and flip where pictures are in colour.")] = "auto",
    distillation: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Weight of what the network answers now against the label; 0.9, and 0 with --model, by default."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak of the schedule.")] = 0.05,
    batch: Annotated[int, typer.Option(min=2, help="With --model: samples a step, of all processes together.")] = 128,
    schedule: Annotated[str, typer.Option(help="With --model: cosine, or step (a tenth at 1/2, a hundredth at 3/4).")] = "cosine",
    weight_decay: Annotated[float, typer.Option(min=0, help="With --model: on weights, not on norms and biases.")] = 5e-4,
    weights: Annotated[Path | None, typer.Option(help="With --model: its weights, which must be the artifact's; not needed.")] = None,
    scores: Annotated[str | None, typer.Option(help="With --model: where the class scores are in what it returns.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="With --model: load a pickled module, which runs the code in it.")] = False,
    device: Annotated[str, typer.Option(help="With --model: cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="With --model: fp32, or bf16 in products and convolutions.")] = "fp32",
    work: Annotated[Path | None, typer.Option(help="Folder for recorded features and checkpoints.")] = None,
    threads: Annotated[int | None, THREADS] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Train the heads, from the artifact and labelled pictures alone; or, with --model, the whole network with its exits."""
    require_place(output or artifact)
    if model is not None:
        _require_defaults(
            "serves training of the heads alone, and --model trains the whole network", copies=(copies, 4), cost_weight=(cost_weight, 1.0)
        )
        _train_network(
            artifact, data, output or artifact, model, method or "joint", weights=weights, scores=scores, trust=trust, device=device, work=work,
            threads=threads, json=json, epochs=epochs, batch=batch, learning_rate=learning_rate, weight_decay=weight_decay, schedule=schedule,
            augmentation=augment, distillation=distillation or 0.0, precision=precision, seed=seed,
        )  # fmt: skip
        return
    _require_defaults(
        "serves training of the whole network, which needs its model", "give --model, or leave it out", batch=(batch, 128),
        schedule=(schedule, "cosine"), weight_decay=(weight_decay, 5e-4), weights=(weights, None), scores=(scores, None), trust=(trust, False),
        device=(device, "cpu"), precision=(precision, "fp32"),
    )  # fmt: skip
    from exitify.artifact.artifact import Artifact
    from exitify.artifact.sources import source_hashes
    from exitify.data import load_samples
    from exitify.train.heads import METHODS, HeadTraining, train_heads

    if method is not None and method not in METHODS:
        raise ExitifyError(
            f"--method {method} is no way to train heads alone, which are {', '.join(METHODS)}", "give --model to train the whole network"
        )
    if method in ("jei", "class-means"):
        _require_defaults(f"is no part of --method {method}", distillation=(distillation, None))
    if method != "jei":
        _require_defaults("weighs the network's cost for gates", "give --method jei, or leave it out", cost_weight=(cost_weight, 1.0))
    opened = Artifact.open(artifact)
    samples = load_samples(data, opened.manifest.input, classes=opened.plan.classes)
    distillation = 0.9 if distillation is None else distillation
    options = HeadTraining(
        epochs,
        copies,
        augment,
        distillation,
        learning_rate=learning_rate,
        seed=seed,
        method=cast(Any, method or "distillation"),
        cost_weight=cost_weight,
    )
    folder = work or artifact.with_name(f"{artifact.stem}.train")
    with progress_bar() as progress:
        trained, reports = train_heads(opened, samples, options, save_to=output or artifact, work=folder, threads=threads, progress=progress)
    if work is None:
        with contextlib.suppress(OSError):  # not empty: a training with other options was interrupted
            folder.rmdir()
    if json:
        show.as_json({"output": str(output or artifact), "model_id": trained.manifest.model_id, "heads": [vars(report) for report in reports]})
        return
    tables.heads(reports)
    if opened.profiles:
        print(f"Dropped the profiles {', '.join(opened.profiles)}: they were calibrated for other heads.")
    if opened.masks is not None:
        show.done("Dropped what was measured of masks.", "`exitify calibrate --budget-ms` measures it again.")
    for name, library in trained.targets.items():
        if source_hashes(trained, library.segments) != library.sources:
            show.done(f"The library for {name} was compiled from other heads.", f"Again: `exitify compile {output or artifact} --target {name}`")
    show.done(f"Wrote {output or artifact}.", f"Next: `exitify calibrate {output or artifact} --data DIR --max-drop 0.005`")
    how = show.call("HeadTraining", epochs=(epochs, 20), copies=(copies, 4), augmentation=(augment, "auto"), distillation=(distillation, 0.9),
                    learning_rate=(learning_rate, 0.05), seed=(seed, 0), method=(method or "distillation", "distillation"),
                    cost_weight=(cost_weight, 1.0))  # fmt: skip
    opening = show.call("exitify.Artifact.open", repr(str(artifact)))
    show.python_call(show.call("exitify.train_heads", opening, "samples", how, save_to=(str(output or artifact), None), threads=(threads, None)))


def _require_defaults(why: str, hint: str = "leave it out", **options: tuple[object, object]) -> None:
    """Refuse options that the chosen way does not read, rather than ignore them."""
    for name, (value, default) in options.items():
        if value != default:
            raise ExitifyError(f"--{name.replace('_', '-')} {why}", hint)


def _train_network(
    artifact: Path,
    data: str,
    output: Path,
    model: str,
    method: str,
    *,
    weights: Path | None,
    scores: str | None,
    trust: bool,
    device: str,
    work: Path | None,
    threads: int | None,
    json: bool,
    **given: Any,
) -> None:
    """The whole network with its exits; under torchrun in each of its processes, of which the first one speaks."""
    from exitify.artifact.artifact import Artifact
    from exitify.data import load_samples
    from exitify.models import load_model
    from exitify.pictures import format_preprocess
    from exitify.train.end_to_end import EpochReport, TrainingOptions, other_weight, train_network

    opened = Artifact.open(artifact)
    contract = opened.manifest.input
    samples = load_samples(data, contract, classes=opened.plan.classes)
    preprocess = format_preprocess(contract.preprocess, contract.color) if contract.preprocess is not None else None
    loaded = load_model(model, weights=weights, input_shape=contract.shape, preprocess=preprocess, classes=contract.classes, trust=trust)
    different = other_weight(loaded.module, opened) if weights is not None else ""
    if different:
        raise ExitifyError(
            f"{weights} has another {different!r} than the artifact, whose weights training begins with",
            "leave --weights out; to begin with others, transform the model again",
        )
    speaks = int(os.environ.get("RANK", "0")) == 0
    options = TrainingOptions(method, **given)
    folder = work or artifact.with_name(f"{artifact.stem}.train")

    def say(report: EpochReport) -> None:
        if not json:
            show.say(str(report))

    with progress_bar() if speaks else contextlib.nullcontext(silent) as progress:
        trained, reports = train_network(
            opened, samples, loaded.module, options, scores=scores, save_to=output, work=folder, threads=threads, device=device, progress=progress,
            each_epoch=say,
        )  # fmt: skip
    if not speaks:
        return
    if work is None:
        with contextlib.suppress(OSError):  # not empty: a training with other options was interrupted
            folder.rmdir()
    if json:
        show.as_json({"output": str(output), "model_id": trained.manifest.model_id, "epochs": reports})
        return
    last = reports[-1]
    rows = [(name, show.percent(last.accuracy[name]), f"{last.losses[name]:.4f}") for name in last.accuracy]
    show.table("Exits, on training samples set aside (not trained on)", ("exit", "accuracy", "loss"), rows)
    dropped = [f"the profile{'s' * (len(opened.profiles) > 1)} {', '.join(opened.profiles)}"] if opened.profiles else []
    dropped += [f"the {'libraries' if len(opened.targets) > 1 else 'library'} for {', '.join(opened.targets)}"] if opened.targets else []
    dropped += ["what was measured"] if opened.times or opened.masks is not None else []
    if dropped:
        print(f"Dropped {', '.join(dropped)}: made for the network as it was; this one has another model_id.")
    next_step = f"`exitify calibrate {output} --data DIR --max-drop 0.005`"
    if not trained.manifest.heads_trained:
        next_step = f"heads, which this method leaves as they were: `exitify train {output} --data {data}`"
    show.done(f"Wrote {output}.", f"Next: {next_step}")
    how = show.call("TrainingOptions", repr(method), **{name: (value, getattr(TrainingOptions(), name)) for name, value in given.items()})
    loading = show.call("exitify.load_model", repr(model), input_shape=(contract.shape, None), trust=(trust, False))
    opening = show.call("exitify.Artifact.open", repr(str(artifact)))
    training = show.call(
        "exitify.train.end_to_end.train_network", opening, "samples", f"{loading}.module", how, scores=(scores, None),
        save_to=(str(output), None), threads=(threads, None), device=(device, "cpu"),
    )  # fmt: skip
    show.python_call(training)


def calibrate(
    artifact: Annotated[Path, ARTIFACT],
    data: Annotated[str, DATA],
    max_drop: Annotated[float | None, typer.Option(help="Accuracy may fall by this much: 0.005 is half a point.")] = None,
    budget_macs: Annotated[float | None, typer.Option(help="Mean cost as a share of the network's multiply-adds: 0.6.")] = None,
    budget_ms: Annotated[
        float | None, typer.Option(help="Mean milliseconds an answer, here and with this engine: 12. Chooses what to leave out too.")
    ] = None,
    times: Annotated[
        str, typer.Option(help="With --budget-ms: for the machine where `exitify measure` took these times.", autocompletion=complete.times)
    ] = "",
    risk: Annotated[str | None, typer.Option(help="RATE@CONFIDENCE: at most this share of other answers, 0.02@0.95.")] = None,
    risk_of: Annotated[
        str,
        typer.Option(
            help="With --risk: disagreement, or accuracy: at most this much of it is lost.",
            autocompletion=complete.one_of("disagreement", "accuracy"),
        ),
    ] = "disagreement",
    bound: Annotated[
        str | None,
        typer.Option(
            help="With --risk: what proves it, clopper-pearson, bentkus or betting; by default the one that stops earliest.",
            autocompletion=complete.one_of("clopper-pearson", "bentkus", "betting"),
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="With --budget-macs: coordinate, one threshold at a time, or quotas, in a geometric row.",
            autocompletion=complete.one_of("coordinate", "quotas"),
        ),
    ] = "coordinate",
    profile: Annotated[str, typer.Option(help="Name to store the settings under.")] = "default",
    skip: Annotated[str | None, SKIP] = None,
    policy: Annotated[
        str,
        typer.Option(help="What decides: top1, entropy, margin, renyi_entropy, patience, gates or jei.", autocompletion=complete.one_of(*POLICIES)),
    ] = "top1",
    prediction_sets: Annotated[
        float | None, typer.Option(help="Add sets of classes that miss the true one in at most this share of answers: 0.05. Takes 3 in 10 samples.")
    ] = None,
    conformal: Annotated[
        str,
        typer.Option(
            help="With --prediction-sets: what each exit's rest on, gated, strict, general or per_exit.",
            autocompletion=complete.one_of("gated", "strict", "general", "per_exit"),
        ),
    ] = "gated",
    output: Annotated[Path | None, OUTPUT] = None,
    engine: Annotated[str, typer.Option(help="What records the outputs.")] = "auto",
    threads: Annotated[int, THREADS] = 1,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Find thresholds that keep a promise, on labelled pictures that the network was not trained on."""
    from exitify.artifact.artifact import Artifact
    from exitify.calibration.calibrate import calibrate as find
    from exitify.data import load_samples

    require_place(output or artifact)
    opened = Artifact.open(artifact)
    samples = load_samples(data, opened.manifest.input, classes=opened.plan.classes)
    with progress_bar() as progress:
        calibrated = find(
            opened, samples, max_drop=max_drop, budget_macs=budget_macs, budget_ms=budget_ms, times=times, risk=parse_risk(risk),
            risk_of=risk_of, bound=bound, search=search, policy=policy, conformal=conformal,  # type: ignore[arg-type]
            alpha=prediction_sets, skip=skip, name=profile, engine=engine, threads=threads, seed=seed, progress=progress,
        )  # fmt: skip
    calibrated.save(output or artifact)
    made = calibrated.profile(profile)
    if json:
        measured = {} if budget_ms is None else {"masks": calibrated.masks}
        show.as_json({"output": str(output or artifact), "profile": profile, **vars(made), **measured})
        return
    tables.profile(profile, made)
    if budget_ms is not None and calibrated.masks is not None:
        tables.masks(calibrated.masks)
    show.done(f"Wrote {output or artifact}.", f"Next: `exitify run {output or artifact} PICTURE`")
    opening = show.call("exitify.Artifact.open", repr(str(artifact)))
    finding = show.call("exitify.calibrate", opening, "samples", max_drop=(max_drop, None), budget_macs=(budget_macs, None),
                        budget_ms=(budget_ms, None), times=(times, ""), risk=(parse_risk(risk), None), risk_of=(risk_of, "disagreement"),
                        bound=(bound, None), search=(search, "coordinate"), skip=(skip, None), name=(profile, "default"), policy=(policy, "top1"),
                        alpha=(prediction_sets, None), conformal=(conformal, "gated"), engine=(engine, "auto"), threads=(threads, 1),
                        seed=(seed, 0))  # fmt: skip
    show.python_call(f"{finding}.save({str(output or artifact)!r})")


def compile(  # noqa: A001
    artifact: Annotated[Path, ARTIFACT],
    target: Annotated[
        str, typer.Option(help="A board's name (`exitify targets`), host, cuda, or your own ./my-board.toml.", autocompletion=complete.target)
    ] = "host",
    device: Annotated[
        str | None, typer.Option(help="cpu, gpu or both; by default all that the board has.", autocompletion=complete.one_of("cpu", "gpu", "both"))
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, or fp16: what is multiplied with known weights in float16, the rest in float32.",
            autocompletion=complete.one_of("fp32", "fp16"),
        ),
    ] = "fp32",
    arch: Annotated[str, typer.Option(help="Of the target cuda's GPU, sm_90; by default that of the one here.")] = "",
    jetpack: Annotated[str, typer.Option(help="Release on the board; by default its oldest, whose code newer ones load too.")] = "",
    output: Annotated[Path | None, OUTPUT] = None,
    trials: Annotated[int, typer.Option(min=0, help="Schedules to measure, over all kernels; what was measured before costs none.")] = 0,
    rpc: Annotated[
        str | None, typer.Option(help="Measure on every board registered there, HOST:PORT/KEY of a tracker: one kind of board a key.")
    ] = None,
    db: Annotated[Path | None, typer.Option(help="Folder of measurements; by default the user's cache.")] = None,
    batch: Annotated[str, typer.Option(help="Sizes of batches beside 1 that get code of their own over the same weights: 4,16.")] = "",
    fallback: Annotated[str, typer.Option(help="onnxruntime: what TVM cannot take is left to it. By default it is refused.")] = "",
    json: Annotated[bool, JSON] = False,
) -> None:
    """Compile every segment for a target into a library, one for its processor and one for its GPU; needs the artifact alone."""
    from exitify.artifact.artifact import Artifact, check_name
    from exitify.artifact.manifest import target_name
    from exitify.lower.pipeline import compile_artifact, tools_for
    from exitify.lower.tuning.database import Database
    from exitify.lower.tuning.measure import RpcRunner, parse_rpc
    from exitify.targets import ALIASES, load_target
    from exitify.targets.board import board_at_hand

    require_place(output or artifact)
    _one_of("fallback", fallback, ("", "onnxruntime"))
    _one_of("precision", precision, ("fp32", "fp16"))
    _one_of("device", device or "both", ("cpu", "gpu", "both"))
    batches = _sizes(batch)
    here = board_at_hand() if target in ALIASES else None
    own = here.target if here is not None else ""
    board = load_target(own or target)
    check_name("target", board.name)
    if target in ALIASES and not own:
        log.warning("%s is %s here: code is the same for every board of that family, tuning and power are not; name yours", target, board.name)
    devices = {None: ["cpu", *(["gpu"] if board.gpu else [])], "both": ["cpu", "gpu"]}.get(device, [device])
    if device is None and target == "cuda":
        devices = ["gpu"]
    compiled = Artifact.open(artifact)
    database = Database(db) if db else None
    place = parse_rpc(rpc) if rpc else None
    if place and not trials:
        raise ExitifyError("--rpc measures nothing without --trials", "say how many schedules to measure: --trials 500")
    # What is missing for the second is said before hours are spent on the first.
    machines = [tools_for(board, on, arch if on == "gpu" else "", jetpack)[0] for on in devices]  # type: ignore[arg-type]
    for on, machine in zip(devices, machines):
        with contextlib.ExitStack() as stack:
            progress, report = stack.enter_context(progress_bar()), stack.enter_context(tuning_bar())
            runner = stack.enter_context(contextlib.closing(RpcRunner(machine, *place))) if place else None
            compiled = compile_artifact(
                compiled, board, device=on, precision=precision, architecture=arch if on == "gpu" else "", jetpack=jetpack,  # type: ignore[arg-type]
                batches=batches, trials=trials, database=database, runner=runner, fallback=fallback, progress=progress, report=report,  # type: ignore[arg-type]
            )  # fmt: skip
    compiled.save(output or artifact)
    made = [compiled.targets[target_name(board.name, on_gpu=on == "gpu", precision=precision)] for on in devices]  # type: ignore[arg-type]
    if json:
        show.as_json({"output": str(output or artifact), "libraries": made})
        return
    for library in made:
        tables.compiled(compiled, library)
    show.done(f"Wrote {output or artifact}.", f"Next: `exitify run {output or artifact} PICTURE --engine tvm`")
    board_name = board.name if target in ALIASES else target
    for on in devices:
        opening = show.call("exitify.Artifact.open", repr(str(artifact if on == devices[0] else output or artifact)))
        compiling = show.call(
            "exitify.compile_artifact", opening, f"exitify.targets.load_target({board_name!r})", device=(on, "cpu"), precision=(precision, "fp32"),
            architecture=(arch if on == "gpu" else "", ""), jetpack=(jetpack, ""), batches=(batches, ()), trials=(trials, 0), fallback=(fallback, ""),
        )  # fmt: skip
        show.python_call(f"{compiling}.save({str(output or artifact)!r})")


def _sizes(text: str) -> tuple[int, ...]:
    """`4,16` as numbers."""
    try:
        return tuple(int(size) for size in text.split(",")) if text else ()
    except ValueError:
        raise ExitifyError(f"--batch {text!r} is no list of sizes", "numbers with commas between: --batch 4,16") from None


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ExitifyError(f"there is no {option} {value!r}", f"there are {', '.join(filter(None, known))}")


def require_place(output: Path) -> None:
    """Refuse at once what could not be written at the end of long work."""
    if not output.parent.is_dir():
        raise NotWritten(f"cannot write {output}: there is no folder {output.parent}", "make the folder first, or choose another place")
    if output.is_dir():
        raise NotWritten(f"cannot write {output}: it is a folder", "give the name of a file in it")


def parse_risk(text: str | None) -> tuple[float, float] | None:
    """`0.02@0.95` as a rate and a confidence."""
    if text is None:
        return None
    rate, _, confidence = text.partition("@")
    try:
        return float(rate), float(confidence or "0.95")
    except ValueError:
        raise ExitifyError(f"--risk {text!r} is no RATE@CONFIDENCE", "0.02@0.95: at most 2 % other answers at 95 % confidence") from None


def export(
    artifact: Annotated[Path, ARTIFACT],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .onnx to write.")],
    exit: Annotated[str, typer.Option(help="The exit to stop at always: exit2, or 2; final for the whole network.")] = "final",  # noqa: A002
    skip: Annotated[str | None, SKIP] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Write one static ONNX network: the whole one, or up to one exit, or with skip paths left out."""
    from exitify.artifact.artifact import Artifact
    from exitify.files import written_whole
    from exitify.onnx_export.static import export_static, static_stretch

    require_place(output)
    opened = Artifact.open(artifact)
    name = f"exit{exit}" if exit.isdigit() else exit
    model = export_static(opened, exit=name, skip=skip)
    with written_whole(output) as stream:
        stream.write(model.SerializeToString(deterministic=True))
    macs = static_stretch(opened, name, skip).cost.macs
    if json:
        show.as_json(
            {
                "output": str(output),
                "exit": name,
                "skip": mask_text(opened.plan.mask(skip)),
                "macs": macs,
                "inputs": [i.name for i in model.graph.input],
                "outputs": [o.name for o in model.graph.output],
            }
        )
        return
    print(f"Wrote {output}: {show.millions(macs)} multiply-adds, {macs / opened.plan.full_macs:.3f} of the whole network.")
    opening = show.call("exitify.Artifact.open", repr(str(artifact)))
    show.python_call(show.call("exitify.export_static", opening, exit=(name, "final"), skip=(skip, None)))
