"""An artifact behind HTTP: pictures in, answers out, each as early as its profile allows. No torch.

EXITIFY_ARTIFACT=digits.exitify uvicorn --factory examples.service.app:create_app

Pictures come from strangers: their bytes, pixels and number are limited, formats are those that Pillow decodes by itself, and what is
refused is answered with the problem and the hint that exitify has for it.
"""

from __future__ import annotations

import io
import os
from typing import Annotated, Any

import anyio
import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image
from pydantic import Base64Bytes, BaseModel, Field, ValidationError

from exitify import Artifact, ExitifyError, Session, __version__
from exitify.artifact.artifact import NO_PROFILE
from exitify.artifact.manifest import InputContract
from exitify.errors import DataError, UnknownProfile, one_line
from exitify.pictures import FORMATS, picture_suffixes, picture_to_input
from exitify.runtime.answers import Answer

MOST_BYTES = 8 * 2**20
"""Of a request; in JSON a picture takes 4/3 of its size."""
MOST_PIXELS = 25_000_000
"""Of a picture, before any is decoded: a file of a few kilobytes may hold so many that they fill the memory."""
MOST_PICTURES = 32
"""Of a request."""
WORKERS = os.cpu_count() or 1
"""How many requests compute at the same time; others wait."""


class TooLarge(DataError):
    """More bytes or pixels than the service takes."""


class UnknownMedia(DataError):
    """The body is said to be something else than pictures."""


STATUS: dict[type[ExitifyError], int] = {DataError: 422, TooLarge: 413, UnknownMedia: 415, UnknownProfile: 404}
"""What a stranger's request may be refused for. Any other error is the service's own: it is logged, and answered with 500."""


class Refusal(BaseModel):
    """Why a request has no answer, and what to do about it."""

    problem: str
    hint: str


class Pictures(BaseModel):
    """Several pictures, each a file's bytes in base64."""

    pictures: list[Base64Bytes] = Field(min_length=1, max_length=MOST_PICTURES)


class Answered(BaseModel):
    """What the network says of a picture (`exitify.Answer`)."""

    label: int
    name: str
    probability: float
    exit: str
    macs: int
    ms: float


class Answers(BaseModel):
    """One answer for each picture, in the order of the pictures."""

    profile: str
    answers: list[Answered]


class Health(BaseModel):
    """What answers here."""

    model_id: str
    profile: str
    profiles: list[str]
    engine: str
    exitify: str


BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}, "application/json": {"schema": Pictures.model_json_schema()}},
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = {status: {"model": Refusal} for status in STATUS.values()}


class Service:
    """The sessions of one artifact, one for each profile: which profile a session uses holds for all of its threads.

    Each takes memory of its own. Everything that a first answer makes or measures is made and measured here.
    """

    def __init__(self, artifact: Artifact, engine: str = "auto") -> None:
        self.artifact = artifact
        self.sessions = {name: Session(artifact, engine=engine, profile=name) for name in (*artifact.profiles, NO_PROFILE)}
        self.default = "default" if "default" in self.sessions else NO_PROFILE
        contract = artifact.manifest.input
        for session in self.sessions.values():
            for deadline_ms in (None, 1e6):
                session.run(np.zeros(contract.shape, contract.dtype), deadline_ms=deadline_ms)

    def session(self, profile: str) -> Session:
        """The session of a profile.

        Raises:
            UnknownProfile: there is none of that name; the hint lists those there are.
        """
        if profile not in self.sessions:
            raise UnknownProfile(f"the artifact has no profile {profile!r}", f"it has {', '.join(self.sessions)}")
        return self.sessions[profile]

    def answer(self, session: Session, body: bytes, kind: str, deadline_ms: float | None) -> list[Answered]:
        """Answers for the pictures in a body; those of several without a deadline are computed as one batch.

        Raises:
            DataError: what the body holds is no picture, or too many, or too large a one; the deadline is no time.
        """
        inputs = [read_picture(picture, session.contract) for picture in (pictures_in_json(body) if kind == "application/json" else [body])]
        if len(inputs) == 1 or deadline_ms is not None:
            answers = [session.run(x, deadline_ms=deadline_ms) for x in inputs]
        else:
            answers = session.run_batch(np.stack(inputs))
        return [as_json(answer) for answer in answers]


def as_json(answer: Answer) -> Answered:
    probability = float(answer.probabilities[answer.label])
    return Answered(label=answer.label, name=answer.name, probability=probability, exit=answer.exit, macs=answer.macs, ms=answer.ms)


def pictures_in_json(body: bytes) -> list[bytes]:
    """The pictures of a JSON body, each a file's bytes.

    Raises:
        DataError: it is no JSON, or not of that form.
    """
    try:
        return Pictures.model_validate_json(body).pictures
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        hint = f'send {{"pictures": ["..."]}} with 1 to {MOST_PICTURES} pictures in base64, or one picture as image/*'
        raise DataError(f"{place}: {first['msg']}", hint) from error


def read_picture(body: bytes, contract: InputContract) -> NDArray[np.float32]:
    """A picture as the network reads it, float32 of shape `contract.shape`.

    Raises:
        TooLarge: it has more than `MOST_PIXELS`. DataError: it is none, damaged, of more than 8 bits, or none that the network reads.
    """
    try:
        image = Image.open(io.BytesIO(body), formats=sorted(set(picture_suffixes().values())))
    except Image.DecompressionBombError as error:
        raise TooLarge("the picture has more pixels than Pillow opens", "make it smaller first") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise DataError(f"the body is no picture: {one_line(error)}", f"send one of {', '.join(sorted(FORMATS))}") from error
    with image:
        if image.width * image.height > MOST_PIXELS:
            raise TooLarge(f"the picture has {image.width}x{image.height} pixels, and {MOST_PIXELS} are taken", "make it smaller first")
        return picture_to_input(image, contract)


async def read_body(request: Request) -> tuple[bytes, str]:
    """The body and its media type; what is too long is refused before it is there.

    Raises:
        UnknownMedia: neither a picture nor JSON. TooLarge: more than `MOST_BYTES`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "application/octet-stream") and not kind.startswith("image/"):
        raise UnknownMedia(f"the content type is {kind or 'not given'}", "send one picture as image/*, or several as application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise TooLarge(f"the body has more than {MOST_BYTES} bytes", "send fewer pictures, or smaller ones")
    return bytes(body), kind


def create_app() -> FastAPI:
    """The service for the artifact at `$EXITIFY_ARTIFACT`, ready to answer.

    Raises:
        ExitifyError: the variable is not set. ArtifactError: the file is no whole artifact. EngineError: ONNX Runtime is missing.
    """
    if "EXITIFY_ARTIFACT" not in os.environ:
        raise ExitifyError("EXITIFY_ARTIFACT does not say which artifact to serve", "EXITIFY_ARTIFACT=net.exitify uvicorn --factory …")
    service = Service(Artifact.open(os.environ["EXITIFY_ARTIFACT"]))
    workers = anyio.CapacityLimiter(WORKERS)
    app = FastAPI(title="exitify", version=__version__)

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ExitifyError)
        return JSONResponse({"problem": error.problem, "hint": error.hint}, STATUS[type(error)])

    async def refuse_query(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return JSONResponse({"problem": f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "hint": "see /docs"}, 422)

    for kind in STATUS:
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(RequestValidationError, refuse_query)

    @app.post("/answers", responses=REFUSALS, openapi_extra=BODY)
    async def answers(
        request: Request,
        profile: Annotated[str, Query(description="One of the artifact's profiles; none takes no exit.")] = service.default,
        deadline_ms: Annotated[float | None, Query(description="The best answer in this time, for each picture; reading it not counted.")] = None,
    ) -> Answers:
        """What the network says of one picture (`image/*`), or of several (JSON, in base64)."""
        session = service.session(profile)
        body, kind = await read_body(request)
        found = await anyio.to_thread.run_sync(service.answer, session, body, kind, deadline_ms, limiter=workers)
        return Answers(profile=profile, answers=found)

    @app.get("/health")
    async def health() -> Health:
        """What answers here."""
        return Health(
            model_id=service.artifact.manifest.model_id,
            profile=service.default,
            profiles=list(service.sessions),
            engine=service.sessions[service.default].engine.full_name,
            exitify=__version__,
        )

    return app
