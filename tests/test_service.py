"""The example of a service answers what a session answers, refuses what strangers should not send, and needs no torch."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="pip install -e '.[service]'")
pytest.importorskip("httpx", reason="FastAPI's client for tests needs it: pip install httpx")

from fastapi.testclient import TestClient

from examples.service import app as service
from exitify import Artifact, ExitifyError, Session
from exitify.errors import ArtifactError
from exitify.pictures import picture_to_input
from tests.digits import pictures
from tests.example_artifact import example_artifact

ROOT = Path(__file__).parent.parent
README = (ROOT / "examples" / "service" / "README.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_artifact().save(tmp_path_factory.mktemp("service") / "digits.exitify")


@pytest.fixture
def client(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("EXITIFY_ARTIFACT", str(artifact))
    with TestClient(service.create_app()) as client:
        yield client


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def digits(count: int) -> list[bytes]:
    return [png(picture[..., 0]) for picture in pictures()["test"][0][:count]]


def post(client: TestClient, body: bytes, kind: str = "image/png", **query: object):
    return client.post("/answers", content=body, headers={"content-type": kind}, params=query)


def several(bodies: list[bytes]) -> bytes:
    return json.dumps({"pictures": [base64.b64encode(body).decode() for body in bodies]}).encode()


def without_time(answers: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(answer["label"], answer["name"], pytest.approx(answer["probability"], abs=1e-5), answer["exit"], answer["macs"]) for answer in answers]


def expected(artifact: Path, bodies: list[bytes], profile: str | None = None) -> list[tuple[object, ...]]:
    session = Session.load(artifact, profile=profile)
    answers = [session.run(picture_to_input(Image.open(io.BytesIO(body)), session.contract)) for body in bodies]
    return [(answer.label, answer.name, float(answer.probabilities.max()), answer.exit, answer.macs) for answer in answers]


# --- answers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["default", "thrifty", "none"])
def test_answers_are_those_of_a_session_under_that_profile_one_by_one_and_together(client: TestClient, artifact: Path, profile: str) -> None:
    bodies = digits(20)
    one_by_one = [post(client, body, profile=profile).json() for body in bodies]
    assert {said["profile"] for said in one_by_one} == {profile}
    together = post(client, several(bodies), "application/json", profile=profile).json()
    found = expected(artifact, bodies, profile)
    assert without_time([answer for said in one_by_one for answer in said["answers"]]) == found
    assert without_time(together["answers"]) == found


def test_profiles_differ_and_the_one_called_default_is_the_default(client: TestClient) -> None:
    """The test above would hold of profiles that all do the same."""
    body = several(digits(20))
    by_profile = {profile: post(client, body, "application/json", profile=profile).json()["answers"] for profile in ("default", "thrifty", "none")}
    macs = {profile: sum(answer["macs"] for answer in answers) for profile, answers in by_profile.items()}
    assert macs["thrifty"] < macs["default"] < macs["none"]
    unsaid = post(client, body, "application/json").json()
    assert unsaid["profile"] == "default"
    assert without_time(unsaid["answers"]) == without_time(by_profile["default"])


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg; charset=x", "application/octet-stream", "IMAGE/PNG"])
def test_a_picture_is_what_its_bytes_say(client: TestClient, kind: str) -> None:
    body = png(pictures()["test"][0][0][..., 0], "JPEG" if "jpeg" in kind else "PNG")
    assert post(client, body, kind).json()["answers"][0]["name"].startswith("digit ")


def test_a_deadline_that_cannot_be_kept_is_answered_at_the_first_exit_and_a_long_one_as_without(client: TestClient) -> None:
    bodies = digits(3)
    for profile in ("default", "none"):
        soon = post(client, several(bodies), "application/json", profile=profile, deadline_ms=1e-6).json()["answers"]
        assert [answer["exit"] for answer in soon] == ["exit1"] * 3
        late = post(client, several(bodies), "application/json", profile=profile, deadline_ms=1e6).json()["answers"]
        without = post(client, several(bodies), "application/json", profile=profile).json()["answers"]
        assert [answer["label"] for answer in late] == [answer["label"] for answer in without]
    assert {answer["exit"] for answer in late} == {"final"}


def test_requests_at_once_get_each_its_own_answer(client: TestClient, artifact: Path) -> None:
    bodies = digits(64)
    profiles = ["default", "thrifty", "none", "default"] * 16
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda body, profile: post(client, body, profile=profile).json()["answers"][0], bodies, profiles))
    by_profile = {profile: expected(artifact, bodies, profile) for profile in set(profiles)}
    assert without_time(found) == [by_profile[profile][n] for n, profile in enumerate(profiles)]


def test_the_loop_goes_on_reading_while_answers_are_computed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that computes until the other has been answered would wait for ever if one held up the other."""
    from threading import Event

    answered, run = Event(), Session.run

    def waiting(*arguments: object, **options: object):
        assert answered.wait(60)
        return run(*arguments, **options)

    monkeypatch.setattr(Session, "run", waiting)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post, client, digits(1)[0])
        assert client.get("/health").status_code == 200
        answered.set()
        assert slow.result().status_code == 200


def test_health_says_what_answers(client: TestClient, artifact: Path) -> None:
    said = client.get("/health").json()
    assert said["model_id"] == Artifact.open(artifact).manifest.model_id
    assert (said["profile"], said["profiles"], said["engine"]) == ("default", ["default", "thrifty", "none"], "onnxruntime")


def test_an_artifact_without_profiles_answers_by_the_whole_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.digits import trained_artifact

    monkeypatch.setenv("EXITIFY_ARTIFACT", str(trained_artifact().save(tmp_path / "net.exitify")))
    said = post(TestClient(service.create_app()), digits(1)[0]).json()
    assert (said["profile"], said["answers"][0]["exit"]) == ("none", "final")


def test_what_the_documents_say_of_answers_and_refusals_is_what_comes(client: TestClient) -> None:
    said = client.get("/openapi.json").json()["paths"]["/answers"]["post"]
    assert set(said["requestBody"]["content"]) == {"image/*", "application/json"}
    assert set(said["responses"]) == {"200", "404", "413", "415", "422"}
    assert {parameter["name"] for parameter in said["parameters"]} == {"profile", "deadline_ms"}


# --- refusals --------------------------------------------------------------------------------------------------------------


def huge() -> bytes:
    """36 million pixels in a few kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (6000, 6000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 10_000
    return stream.getvalue()


def bomb() -> bytes:
    """More pixels than Pillow opens."""
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    return stream.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("body", "kind", "query", "status", "problem"),
    [
        (b"", "image/png", {}, 422, r"the body is no picture: UnidentifiedImageError"),
        (b"not a picture", "image/png", {}, 422, r"the body is no picture"),
        (EPS, "image/eps", {}, 422, r"the body is no picture"),
        (lambda: digits(1)[0][:60], "image/png", {}, 422, r"picture"),
        (lambda: png(np.zeros((16, 16), np.uint16)), "image/png", {}, 422, r"more than 8 bits a channel"),
        (huge, "image/png", {}, 413, r"the picture has 6000x6000 pixels, and 25000000 are taken"),
        (bomb, "image/png", {}, 413, r"more pixels than Pillow opens"),
        (bytes(service.MOST_BYTES + 1), "image/png", {}, 413, r"more than 8388608 bytes"),
        (b"x", "text/plain", {}, 415, r"the content type is text/plain"),
        (b"x", "", {}, 415, r"the content type is not given"),
        (b"{", "application/json", {}, 422, r"the body: Invalid JSON"),
        (b"[]", "application/json", {}, 422, r"the body: Input should be an object"),
        (b'{"pictures": []}', "application/json", {}, 422, r"pictures: List should have at least 1 item"),
        (b'{"pictures": ["%"]}', "application/json", {}, 422, r"."),
        (lambda: several(digits(1) * 33), "application/json", {}, 422, r"pictures: List should have at most 32 items"),
        (lambda: several([*digits(1), b"no"]), "application/json", {}, 422, r"the body is no picture"),
        (lambda: digits(1)[0], "image/png", {"profile": "fast"}, 404, r"the artifact has no profile 'fast'"),
        (lambda: digits(1)[0], "image/png", {"deadline_ms": "soon"}, 422, r"query.deadline_ms: Input should be a valid number"),
        (lambda: digits(1)[0], "image/png", {"deadline_ms": -1}, 422, r"a deadline of -1.0 ms is no time"),
        (lambda: digits(1)[0], "image/png", {"deadline_ms": "nan"}, 422, r"a deadline of nan ms is no time"),
        (lambda: digits(1)[0], "image/png", {"deadline_ms": "inf"}, 422, r"a deadline of inf ms is no time"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_request_is_refused_with_problem_and_hint_and_the_next_is_answered(client: TestClient, body, kind, query, status, problem) -> None:
    refused = post(client, body() if callable(body) else body, kind, **query)
    assert refused.status_code == status, refused.text
    said = refused.json()
    assert set(said) == {"problem", "hint"}
    assert re.search(problem, said["problem"]), said
    assert said["hint"]
    assert post(client, digits(1)[0]).status_code == 200


def test_what_is_too_long_is_refused_before_it_has_all_come(client: TestClient) -> None:
    sent = []

    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            sent.append(2**20)
            yield bytes(2**20)

    assert client.post("/answers", content=chunks(), headers={"content-type": "image/png"}).status_code == 413


def test_an_error_that_no_request_caused_is_not_a_refusal(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from exitify.errors import EngineError

    def failing(*arguments: object, **options: object) -> None:
        raise EngineError("the engine is gone")

    monkeypatch.setattr(Session, "run", failing)
    with pytest.raises(EngineError):  # what uvicorn logs, and answers with 500
        post(client, digits(1)[0])


def test_without_an_artifact_or_with_a_damaged_one_nothing_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXITIFY_ARTIFACT", raising=False)
    with pytest.raises(ExitifyError, match="EXITIFY_ARTIFACT does not say which artifact to serve"):
        service.create_app()
    whole = example_artifact().save(tmp_path / "net.exitify").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    (tmp_path / "net.exitify").write_bytes(damaged)
    monkeypatch.setenv("EXITIFY_ARTIFACT", str(tmp_path / "net.exitify"))
    with pytest.raises(ArtifactError):
        service.create_app()


# --- the process -----------------------------------------------------------------------------------------------------------

ALONE = """
import sys
for name in ("torch", "tvm", "onnx", "multipart"):
    sys.modules[name] = None  # importing it raises
from fastapi.testclient import TestClient
from examples.service.app import create_app
with TestClient(create_app()) as client:
    said = client.post("/answers", content=open(sys.argv[1], "rb").read(), headers={"content-type": "image/png"})
print(said.status_code, said.json()["answers"][0]["name"])
"""


def test_it_answers_where_torch_cannot_be_imported(artifact: Path, tmp_path: Path) -> None:
    picture = tmp_path / "digit.png"
    picture.write_bytes(digits(1)[0])
    environment = {**os.environ, "EXITIFY_ARTIFACT": str(artifact), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(picture)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"200 digit \d\n", done.stdout)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_the_commands_of_the_readme_run_as_they_stand(artifact: Path, tmp_path: Path) -> None:
    """The first, which tests/test_examples.py runs, is spared: its artifact stands there; and the port is one that is free."""
    pytest.importorskip("uvicorn", reason="pip install -e '.[service]'")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (making, drawing), (serving,), asking = BLOCKS
    assert making == "python -m examples.digits.run"
    shutil.copy(artifact, tmp_path / "digits.exitify")
    port = free_port()
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "UVICORN_PORT": str(port), "no_proxy": "*"}

    def shell(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)

    drawn = shell(drawing)
    assert drawn.returncode == 0, drawn.stderr
    picture = (tmp_path / "digit.png").read_bytes()
    assert Image.open(io.BytesIO(picture)).size == (32, 32)
    with subprocess.Popen(["bash", "-c", f"exec env {serving}"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            said = [shell(command.replace("localhost:8000", f"127.0.0.1:{port}")) for command in asking]
        finally:
            server.terminate()
    assert [done.returncode for done in said] == [0] * len(asking), said
    health, *answers = (json.loads(done.stdout) for done in said)
    assert health["profile"] == "default"
    plain, whole, soon, together = (answer["answers"] for answer in answers)
    assert without_time(plain) == expected(artifact, [picture])
    assert without_time(whole) == expected(artifact, [picture], "none")
    assert soon[0]["name"].startswith("digit ")
    assert without_time(together) == expected(artifact, [picture] * 2)


def wait_for(address: str, server: subprocess.Popen[str]) -> None:
    for _ in range(300):
        if server.poll() is not None:
            pytest.fail(f"the server ended: {server.stderr.read() if server.stderr else ''}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server did not answer within its time")
