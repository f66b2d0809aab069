"""An artifact from a repository of the Hub or a folder that looks like one, checked; and its answers to pictures. No torch.

python -m examples.hub.load hub/digits
python -m examples.hub.load hf://ORG/NAME@sha256-0123... --model-id ID picture.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from examples.hub.revisions import BY_CONTENT, FILE, check_revision
from exitify import Artifact, ExitifyError, Session
from exitify.errors import AlteredFile, ArtifactError, one_line
from exitify.pictures import picture_to_input

ON_THE_HUB = "hf://"


def fetch(source: str) -> Path:
    """The artifact's file, downloaded where it is on the Hub and not in its cache, and held against a revision by content.

    Args:
        source: `hf://ORG/NAME`, or a folder; behind it `@` and a revision: `sha256-...`, or, on the Hub, a branch, tag or commit.

    Raises:
        AlteredFile: it is not what the revision says. ArtifactError: there is none, or the Hub cannot be asked.
    """
    if source.startswith(ON_THE_HUB):
        repository, _, revision = source.removeprefix(ON_THE_HUB).partition("@")
        try:
            path = Path(hf_hub_download(repository, FILE, revision=revision or None))
        except (OSError, HFValidationError) as error:
            hint = "check name and revision, the network, and for a private repository the token (`hf auth login`)"
            raise ArtifactError(f"cannot get {FILE} from {source}: {one_line(error)}", hint) from error
    else:
        folder, _, revision = source.rpartition("@")
        if not BY_CONTENT.fullmatch(revision):
            folder, revision = source, ""
        path = Path(folder, FILE)
        if not path.is_file():
            raise ArtifactError(f"there is no {FILE} in {folder}", f"give a folder that has one, or {ON_THE_HUB}ORG/NAME")
    check_revision(path, revision, source)
    return path


def load(source: str, *, model_id: str = "") -> Artifact:
    """An artifact, all of its hashes checked.

    Args:
        source: See `fetch`.
        model_id: The network it must be, as `exitify inspect` and the model card say, or how that begins; empty is any.

    Raises:
        AlteredFile: it is another network, or not what the revision says. ArtifactError: there is none, or it is not whole.
    """
    artifact = Artifact.open(fetch(source))
    found = artifact.manifest.model_id
    if not found.startswith(model_id):
        raise AlteredFile(
            f"{source} holds the model {found[:16]}, not {model_id[:16]}", "ask for it at the revision that was published with that model"
        )
    return artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="hf://ORG/NAME or a folder, with @REVISION behind it or without")
    parser.add_argument("pictures", nargs="*")
    parser.add_argument("--model-id", default="", help="refuse any other network")
    options = parser.parse_args()
    try:
        artifact = load(options.source, model_id=options.model_id)
        print(f"model {artifact.manifest.model_id}; exits {', '.join(artifact.plan.exit_names)}; profiles {', '.join(artifact.profiles) or 'none'}")
        session = Session(artifact)
        for picture in options.pictures:
            answer = session.run(picture_to_input(picture, session.contract))
            print(f"{picture}: {answer.name}, {answer.probabilities.max():.3f}, at {answer.exit}")
    except ExitifyError as error:
        raise SystemExit(f"exitify: {error}") from error


if __name__ == "__main__":
    main()
