"""The example of a hub: what is published is what is loaded, the card says what the artifact says, and what is not what was asked for is refused."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from examples.hub import load as loading
from examples.hub import publish as publishing
from examples.hub.load import load
from examples.hub.publish import write_repository
from exitify import Artifact, Session
from exitify.errors import AlteredFile, ArtifactError
from tests.artifacts import with_contract
from tests.digits import fresh_artifact, pictures
from tests.example_artifact import example_artifact

ROOT = Path(__file__).parent.parent
README = (ROOT / "examples" / "hub" / "README.md").read_text()
FENCES = re.findall(r"(<!-- not run: needs the network -->\n)?```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for mark, block in FENCES if not mark for line in block.splitlines()]
ON_THE_NETWORK = [line for mark, block in FENCES if mark for line in block.splitlines()]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return example_artifact().save(tmp_path / "digits.exitify")


@pytest.fixture
def published(artifact: Path, tmp_path: Path) -> tuple[Path, str]:
    """A repository's folder and its revision."""
    folder = tmp_path / "hub" / "digits"
    return folder, write_repository(artifact, folder, license="mit")


def with_another_byte(path: Path) -> None:
    """Damage that the container does not hide: a byte of the weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- the folder ------------------------------------------------------------------------------------------------------------


def test_what_is_loaded_answers_as_what_was_published(artifact: Path, published: tuple[Path, str]) -> None:
    folder, revision = published
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "net.exitify"]
    assert (folder / "net.exitify").read_bytes() == artifact.read_bytes()
    picture = pictures()["test"][0][0]
    answers = [Session(each).run(picture) for each in (Artifact.open(artifact), load(str(folder)), load(f"{folder}@{revision}"))]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer.logits, answers[0].logits)


def test_a_revision_follows_from_the_bytes_and_from_nothing_else(artifact: Path, published: tuple[Path, str], tmp_path: Path) -> None:
    _, revision = published
    again = write_repository(artifact, tmp_path / "elsewhere", license="apache-2.0", repository="org/other")
    assert again == revision
    assert re.fullmatch(r"sha256-[0-9a-f]{64}", revision)
    other = fresh_artifact().save(tmp_path / "other.exitify")
    assert write_repository(other, tmp_path / "other") != revision


def test_the_card_has_the_metadata_that_the_hub_reads_and_the_promises_figures(published: tuple[Path, str]) -> None:
    folder, revision = published
    card, made = ModelCard.load(folder / "README.md"), example_artifact()
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("exitify", "image-classification", "mit")
    assert "early-exit" in card.data.tags
    assert card.data.to_dict()["exitify"] == {"model_id": made.manifest.model_id, "revision": revision, "format": made.manifest.format}
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    for name in ("default", "thrifty"):
        promise = made.profile(name).promise
        assert found[f"accuracy, profile {name}"] == pytest.approx(promise.accuracy, abs=1e-6)
        assert found[f"mean share of the network's multiply-adds, profile {name}"] == pytest.approx(promise.mean_macs_share, abs=1e-6)
        assert re.search(rf"\| `{name}` \|.*{re.escape(promise.asked)}.*\| {promise.accuracy:.2%} \|", card.text)
    assert {result.dataset_revision for result in card.data.eval_results} == {made.profile("default").data}
    assert all(point.place in card.text for point in made.plan.exits)


def test_the_cards_python_runs_beside_the_artifact(published: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder, _ = published
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {"x": pictures()["test"][0][0]})
    assert re.match(r"digit \d [01]\.\d+ (exit1|exit2|final)\n", capsys.readouterr().out)


def test_a_card_claims_nothing_that_the_artifact_does_not_say(tmp_path: Path) -> None:
    """Without profiles no figures; without a preprocess no pictures."""
    bare = with_contract(fresh_artifact(), preprocess=None, classes=()).save(tmp_path / "bare.exitify")
    write_repository(bare, tmp_path / "bare")
    card = ModelCard.load(tmp_path / "bare" / "README.md")
    assert (card.data.pipeline_tag, card.data.license, card.data.eval_results, card.data.metrics) == (None, None, None, None)
    assert "promise" not in card.text
    assert "inputs must be ready" in card.text


def test_what_is_no_whole_artifact_is_not_published(artifact: Path, tmp_path: Path) -> None:
    with_another_byte(artifact)
    with pytest.raises(ArtifactError):
        write_repository(artifact, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


# --- what is refused -------------------------------------------------------------------------------------------------------


def test_a_folder_with_another_artifact_than_the_revision_says_is_refused(published: tuple[Path, str]) -> None:
    folder, revision = published
    fresh_artifact().save(folder / "net.exitify")
    load(str(folder))
    with pytest.raises(AlteredFile, match=rf"holds sha256-[0-9a-f]{{64}}, not {revision}"):
        load(f"{folder}@{revision}")


def test_a_damaged_artifact_is_refused_with_and_without_a_revision(published: tuple[Path, str]) -> None:
    folder, revision = published
    with_another_byte(folder / "net.exitify")
    with pytest.raises(ArtifactError):
        load(str(folder))
    with pytest.raises(AlteredFile, match=f"not {revision}"):
        load(f"{folder}@{revision}")


def test_another_model_than_the_one_expected_is_refused(published: tuple[Path, str]) -> None:
    folder, _ = published
    own = example_artifact().manifest.model_id
    assert load(str(folder), model_id=own).manifest.model_id == load(str(folder), model_id=own[:12]).manifest.model_id == own
    with pytest.raises(AlteredFile, match=rf"holds the model {own[:16]}, not {'0' * 16}"):
        load(str(folder), model_id="0" * 64)


def test_a_folder_without_an_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no net\.exitify in .*\n  hint: .*hf://ORG/NAME"):
        load(str(tmp_path))


def test_a_folders_name_may_hold_an_at_sign(artifact: Path, tmp_path: Path) -> None:
    revision = write_repository(artifact, tmp_path / "me@home")
    load(str(tmp_path / "me@home"))
    load(f"{tmp_path / 'me@home'}@{revision}")


# --- the Hub ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("revision", "asked"), [("", None), ("@main", "main"), ("@v1.0", "v1.0"), ("@{own}", "{own}")])
def test_the_hub_is_asked_for_that_file_of_that_repository_at_that_revision(revision, asked, published, monkeypatch) -> None:
    folder, own = published
    calls = []

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        calls.append((repo_id, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    made = load(f"hf://org/digits{revision.format(own=own)}")
    assert calls == [("org/digits", "net.exitify", asked and asked.format(own=own))]
    assert made.manifest.model_id == example_artifact().manifest.model_id


def test_what_comes_from_the_hub_is_held_against_the_revision(published: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = published
    monkeypatch.setattr(loading, "hf_hub_download", lambda *arguments, **options: str(folder / "net.exitify"))
    with pytest.raises(AlteredFile, match=f"hf://org/digits@sha256-{'0' * 64} holds sha256-"):
        load(f"hf://org/digits@sha256-{'0' * 64}")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network"), HFValidationError("no such name"), OSError("no space")])
def test_what_the_hub_refuses_is_said_in_two_lines(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(loading, "hf_hub_download", refusing)
    with pytest.raises(ArtifactError, match=rf"cannot get net\.exitify from hf://org/digits: .*{error}\n  hint: check name and revision"):
        load("hf://org/digits")


class Repository(BaseHTTPRequestHandler):
    """As the Hub answers for one file at one revision."""

    data: bytes = b""
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(200 if self.path == "/org/digits/resolve/v1.0/net.exitify" else 404)
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "c0ff")
        self.send_header("ETag", f'"{hashlib.sha256(self.data).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.data)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def test_the_real_client_brings_what_a_hub_has_once_and_what_it_has_not_is_refused(artifact: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Repository, "data", artifact.read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def loaded(address: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "examples.hub.load", address]
        settings = {**environment, "no_proxy": "*", **more}
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=120, check=False)

    try:
        brought, missing = loaded("hf://org/digits@v1.0"), loaded("hf://org/digits@v2.0")
        asked = list(Repository.asked)
    finally:
        server.shutdown()
        server.server_close()
    again = loaded("hf://org/digits@v1.0", HF_HUB_OFFLINE="1")
    assert brought.returncode == again.returncode == 0, brought.stderr + again.stderr
    assert brought.stdout == again.stdout
    assert f"model {example_artifact().manifest.model_id}" in brought.stdout
    assert {"/org/digits/resolve/v1.0/net.exitify", "/org/digits/resolve/v2.0/net.exitify"} == {path for path in asked if "/org/" in path}
    assert missing.returncode == 1
    assert re.search(r"exitify: cannot get net\.exitify from hf://org/digits@v2\.0: .+\n  hint: check name and revision", missing.stderr), (
        missing.stderr
    )


def test_an_upload_is_one_commit_of_the_two_files_under_the_revisions_tag(artifact: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The first of the README's commands that need the network, with the Hub's client replaced by one that notes what it is asked."""
    calls = []

    class Hub:
        def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
            calls.append(("create_repo", repo_id, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> SimpleNamespace:
            calls.append(("upload_folder", repo_id, folder_path, allow_patterns, commit_message))
            return SimpleNamespace(oid="c0ffee")

        def create_tag(self, repo_id: str, *, tag: str, revision: str, exist_ok: bool) -> None:
            calls.append(("create_tag", repo_id, tag, revision, exist_ok))

    monkeypatch.setattr(publishing, "HfApi", Hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["publish", *ON_THE_NETWORK[0].split()[3:]])
    publishing.main()
    address = capsys.readouterr().out.strip()
    revision = address.removeprefix("hf://ORG/digits@")
    assert calls == [
        ("create_repo", "ORG/digits", True),
        ("upload_folder", "ORG/digits", Path("hub/digits"), ["net.exitify", "README.md"], f"Publish {revision}"),
        ("create_tag", "ORG/digits", revision, "c0ffee", True),
    ]
    card = Path("hub/digits/README.md").read_text()
    assert f'hf_hub_download("ORG/digits", "net.exitify", revision="{revision}")' in card
    load(f"hub/digits@{revision}")


def test_the_client_has_what_an_upload_asks_of_it() -> None:
    from inspect import signature

    asked = {"create_repo": ["exist_ok"], "upload_folder": ["folder_path", "allow_patterns", "commit_message"], "create_tag": ["tag", "exist_ok"]}
    for name, arguments in asked.items():
        assert {"repo_id", *arguments} <= set(signature(getattr(HfApi, name)).parameters)


# --- the commands ----------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_readme_run_as_they_stand_without_torch(artifact: Path, tmp_path: Path) -> None:
    """The first, which tests/test_examples.py runs, is spared: its artifact stands there. A module called torch would end any that imports it."""
    pytest.importorskip("sklearn", reason="pip install -e '.[demo]'")
    assert COMMANDS[0] == "python -m examples.digits.run"
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    printed = []
    for command in COMMANDS[1:]:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    address, plain, by_revision, _, answered = printed
    assert re.fullmatch(r"hub/digits@sha256-[0-9a-f]{64}\n", address)
    assert plain == by_revision
    assert f"model {example_artifact().manifest.model_id}; exits exit1, exit2, final; profiles default, thrifty\n" == plain
    assert re.fullmatch(rf"{re.escape(plain)}digit\.png: digit \d, [01]\.\d{{3}}, at (exit1|exit2|final)\n", answered)


def test_what_cannot_be_is_said_in_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, arguments in ((loading, [str(tmp_path)]), (publishing, [str(tmp_path / "nowhere.exitify"), str(tmp_path / "hub")])):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        with pytest.raises(SystemExit, match=r"^exitify: .*\n  hint: "):
            module.main()
    assert not (tmp_path / "hub").exists()
