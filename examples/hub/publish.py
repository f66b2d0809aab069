"""A repository of an artifact: the file, and a model card that is written from it. Prints the address that `load` takes. No torch.

python -m examples.hub.publish digits.exitify hub/digits
python -m examples.hub.publish digits.exitify hub/digits --license mit --upload ORG/NAME
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from examples.hub.revisions import FILE, revision_of
from exitify import Artifact, ExitifyError
from exitify.files import NotWritten, written_whole
from exitify.pictures import format_preprocess

TASK = "image-classification"
SHOWN_CLASSES = 20


def write_repository(artifact_path: Path, folder: Path, *, license: str | None = None, repository: str | None = None) -> str:  # noqa: A002
    """Write an artifact and its model card into a folder, which is made where there is none, and return the revision.

    Args:
        artifact_path: Checked before anything is written.
        license: As the Hub names it, `mit` for instance; None says nothing of it.
        repository: `ORG/NAME` on the Hub, for the card; None is a folder alone.

    Raises:
        ArtifactError: it is no whole artifact. NotWritten: the folder cannot be written.
    """
    artifact, revision = Artifact.open(artifact_path), revision_of(artifact_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotWritten(f"cannot make the folder {folder}: {error.strerror}", "choose another place") from error
    card = model_card(artifact, folder.name, revision, license=license, repository=repository)
    for name, data in ((FILE, artifact_path.read_bytes()), ("README.md", str(card).encode())):
        with written_whole(folder / name) as stream:
            stream.write(data)
    return revision


def model_card(artifact: Artifact, name: str, revision: str, *, license: str | None = None, repository: str | None = None) -> ModelCard:  # noqa: A002
    """What the Hub shows of an artifact: metadata that it searches by, and how to use it."""
    data = ModelCardData(
        model_name=name,
        license=license,
        library_name="exitify",
        tags=["early-exit", "adaptive-inference", "onnx"],
        pipeline_tag=TASK if artifact.manifest.input.preprocess is not None else None,
        metrics=["accuracy"] if artifact.profiles else None,
        eval_results=list(results(artifact)) or None,
        exitify={"model_id": artifact.manifest.model_id, "revision": revision, "format": artifact.manifest.format},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text(artifact, name, revision, repository)}")


def results(artifact: Artifact) -> Iterator[EvalResult]:
    """What each profile's promise rests on: estimates on calibration samples that its thresholds were not found on."""
    for name, profile in artifact.profiles.items():
        promise = profile.promise
        for metric, value, called in (
            ("accuracy", promise.accuracy, f"accuracy, profile {name}"),
            ("accuracy", promise.full_accuracy, "accuracy without exits"),
            ("macs_share", promise.mean_macs_share, f"mean share of the network's multiply-adds, profile {name}"),
        ):
            yield EvalResult(
                task_type=TASK,
                dataset_type="calibration",
                dataset_name=f"{promise.samples} calibration samples",
                dataset_revision=profile.data or None,
                metric_type=metric,
                metric_value=round(value, 6),
                metric_name=called,
            )


def text(artifact: Artifact, name: str, revision: str, repository: str | None) -> str:
    """The card's text: how it is used, what it reads, where it stops, what its profiles promise."""
    manifest, plan = artifact.manifest, artifact.plan
    contract, reached = manifest.input, plan.macs_at([point.name for point in plan.exits])
    path = f'hf_hub_download("{repository}", "{FILE}", revision="{revision}")' if repository else f'"{FILE}"'
    imports = "import exitify\nfrom huggingface_hub import hf_hub_download" if repository else "import exitify"
    pixels = "a picture, uint8 (H, W, C)" if contract.preprocess else f"{contract.dtype} {contract.shape}"
    picture = f"`{format_preprocess(contract.preprocess, contract.color)}`" if contract.preprocess else "none: inputs must be ready"
    classes = ", ".join(contract.classes[:SHOWN_CLASSES]) + (", ..." if len(contract.classes) > SHOWN_CLASSES else "")
    profiles = [
        f"| `{called}` | {profile.policy} | {profile.promise.asked}{'' if profile.promise.kept else ' (not kept)'} | {profile.promise.samples} "
        f"| {profile.promise.accuracy:.2%} | {profile.promise.full_accuracy:.2%} | {profile.promise.mean_macs_share:.1%} |"
        for called, profile in artifact.profiles.items()
    ]
    lines = [
        f"# {name}",
        "",
        "A network with early exits, which stops as soon as it is sure, in one file that runs without torch: `pip install 'exitify[ort]'`.",
        "",
        "```python",
        imports,
        "",
        f"session = exitify.Session.load({path})",
        f"answer = session.run(x)  # {pixels}",
        "print(answer.name, answer.probabilities.max(), answer.exit)",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| model | `{manifest.model_id}` |",
        f"| revision | `{revision}` |",
        f"| reads | {contract.dtype} `(N, {', '.join(map(str, contract.shape))})` |",
        f"| a picture becomes that by | {picture} |",
        f"| classes | {plan.classes}{f': {classes}' if classes else ''} |",
        "",
        "| exit | after | of the network's multiply-adds |",
        "|---|---|---|",
        *(f"| `{point.name}` | `{point.place}` | {reached[point.name] / plan.full_macs:.1%} |" for point in plan.exits),
        "",
    ]
    if profiles:
        lines += [
            "What profiles promise, by calibration samples that their thresholds were not found on; it holds for inputs like those.",
            "",
            "| profile | stops by | promise | samples | accuracy | without exits | mean cost |",
            "|---|---|---|---|---|---|---|",
            *profiles,
            "",
        ]
    return "\n".join(lines)


def upload(folder: Path, repository: str, revision: str) -> None:
    """Put a repository's folder on the Hub, under a tag that is its revision. Takes the network, and a token (`hf auth login`)."""
    hub = HfApi()
    hub.create_repo(repository, exist_ok=True)
    commit = hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[FILE, "README.md"], commit_message=f"Publish {revision}")
    hub.create_tag(repository, tag=revision, revision=commit.oid, exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("folder", type=Path, help="the repository's folder; its name is the model's")
    parser.add_argument("--license", help="as the Hub names it: mit, apache-2.0")
    parser.add_argument("--upload", metavar="ORG/NAME", help="put it on the Hub, too")
    options = parser.parse_args()
    try:
        revision = write_repository(options.artifact, options.folder, license=options.license, repository=options.upload)
    except ExitifyError as error:
        raise SystemExit(f"exitify: {error}") from error
    if options.upload:
        upload(options.folder, options.upload, revision)
    print(f"hf://{options.upload}@{revision}" if options.upload else f"{options.folder}@{revision}")


if __name__ == "__main__":
    main()
