"""What a request may ask: its JSON or its form, read into plain values, with a status and a sentence for all else."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator, Mapping
from email.message import Message
from typing import Any, Literal, TypeVar

from pydantic import Field

from clipdistill.config import Config, build
from clipdistill.data.captions import require_legible
from clipdistill.data.templates import check_templates
from clipdistill.errors import InputError
from clipdistill.runtime.files import parse_json
from clipdistill.serve.limits import LARGEST_VALUES, LONGEST_TEXT, ServiceLimits


class RequestRefused(Exception):
    """A request that is answered with a status, one sentence and no more. again: seconds after which to come back."""

    def __init__(self, status: int, text: str, again: int | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.again = status, text, again


class EmbedPictures(Config):
    """Pictures to embed."""

    images: list[str] = Field(max_length=10_000)
    """Encoded pictures in base64, or as data: URLs."""
    format: Literal["numbers", "base64"] = "numbers"
    """Embeddings as lists of numbers, or all as one base64 text of float32, little-endian, row after row."""


class EmbedTexts(Config):
    """Texts to embed."""

    texts: list[str] = Field(max_length=100_000)
    """The texts."""
    format: Literal["numbers", "base64"] = "numbers"
    """As for pictures."""


class ClassifyPictures(Config):
    """Pictures to sort by labels."""

    images: list[str] = Field(max_length=10_000)
    """Encoded pictures in base64, or as data: URLs."""
    labels: list[str] = Field(max_length=100_000)
    """The classes, in words."""
    templates: list[str] = Field(default=["a photo of a {}."], max_length=1000)
    """Sentences with one {} for the label; a class is the mean over them."""
    top: int = Field(default=5, ge=1)
    """How many labels to return for each picture."""


F = TypeVar("F", bound=Config)


def read_json_body(body: bytes, form: type[F]) -> tuple[F, list[bytes]]:
    """The values of a JSON body and its decoded pictures. Raises RequestRefused."""
    if body.count(b",") + body.count(b"[") + body.count(b"{") > LARGEST_VALUES:
        raise RequestRefused(413, f"the JSON holds more than {LARGEST_VALUES} values")
    try:
        values = parse_json(body, "the body")
    except InputError as error:
        raise RequestRefused(400, str(error)) from error
    asked = _built(form, values)
    return asked, [_picture(text, i) for i, text in enumerate(getattr(asked, "images", ()))]


async def read_form_body(body: bytes, kind: str, form: type[F], limits: ServiceLimits) -> tuple[F, list[bytes]]:
    """The same of a multipart form: each file is a picture, a field that stands several times is a list."""
    from starlette.datastructures import Headers, UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    class InMemory(MultiPartParser):
        spool_max_size = limits.bytes + 1  # nothing is written to a disk

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 18):
            yield body[start : start + (1 << 18)]

    headers, most = Headers({"content-type": kind}), limits.texts + 100
    try:
        parser = InMemory(headers, pieces(), max_files=limits.pictures, max_fields=most)  # type: ignore[arg-type]
        found = await parser.parse()
    except MultiPartException as error:
        raise RequestRefused(
            413 if error.message.startswith("Too many") else 400, f"the form: {error.message}"
        ) from error
    except (KeyError, ValueError, LookupError, AttributeError) as error:
        raise RequestRefused(400, "the form is no multipart/form-data with a boundary, names and values") from error
    values: dict[str, Any] = {}
    pictures: list[bytes] = []
    lists = {name for name, field in form.model_fields.items() if "list" in str(field.annotation)}
    for name, value in found.multi_items():
        if isinstance(value, UploadFile):
            if name != "images":
                raise RequestRefused(400, f"the form: a file in the field '{name:.80}': files belong in 'images'")
            pictures.append(await value.read())
        elif name == "images":
            raise RequestRefused(
                400, "the form: 'images' without a file name: send pictures as files (curl -F images=@FILE)"
            )
        elif name in lists:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise RequestRefused(400, f"the form: the field '{name:.80}' stands twice")
        else:
            values[name] = value
    if "images" in form.model_fields:
        values["images"] = ["" for _ in pictures]
    elif pictures:
        raise RequestRefused(400, "the form: files, where texts are asked for")
    return _built(form, values), pictures


def _built(form: type[F], values: Any) -> F:
    if not isinstance(values, Mapping):
        raise RequestRefused(400, f"the body must be a JSON object with the keys {', '.join(form.model_fields)}")
    try:
        return build(form, values, "the request")
    except InputError as error:
        raise RequestRefused(400, _shown(str(error))) from error


def _shown(text: str) -> str:
    """A sentence about what somebody sent, as valid Unicode of a bounded length."""
    return text.encode("utf-8", "backslashreplace").decode()[:500]


def _picture(text: str, number: int) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestRefused(400, f"picture {number} (from 0) is not in base64") from error


def check_texts(texts: list[str], what: str, most: int) -> None:
    """Raise RequestRefused for too many texts, and for one that is empty, too long or no Unicode."""
    if not texts:
        raise RequestRefused(400, f"there is no {what} in the request")
    if len(texts) > most:
        raise RequestRefused(413, f"{len(texts)} {what}s, at most {most} a request")
    for number, text in enumerate(texts):
        if not text.strip():
            raise RequestRefused(400, f"{what} {number} (from 0) is empty")
        if len(text) > LONGEST_TEXT:
            raise RequestRefused(413, f"{what} {number} (from 0) has {len(text)} characters, at most {LONGEST_TEXT}")
        try:
            require_legible(text, f"{what} {number} (from 0)")
        except InputError as error:
            raise RequestRefused(400, str(error)) from error


def check_classes(asked: ClassifyPictures, limits: ServiceLimits) -> tuple[str, ...]:
    """The templates of a classification. Raises RequestRefused, also for what is no template."""
    check_texts(asked.labels, "label", limits.texts)
    check_texts(asked.templates, "template", limits.texts)
    if len(set(asked.labels)) < len(asked.labels):
        again = next(label for i, label in enumerate(asked.labels) if label in asked.labels[:i])
        raise RequestRefused(400, f"the label {_shown(repr(again)):.80} stands twice")
    try:
        found = check_templates(asked.templates, "the request")
    except InputError as error:
        raise RequestRefused(400, _shown(str(error))) from error
    if len(found) * len(asked.labels) > limits.texts:
        times = f"{len(asked.labels)} labels times {len(found)} templates"
        raise RequestRefused(413, f"{times}: at most {limits.texts} texts a request")
    return found


def media_type(header: str) -> str:
    """'image/jpeg' of a Content-Type with parameters."""
    message = Message()
    message["content-type"] = header
    return message.get_content_type() if header else ""


def openapi(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 description of the service, from the forms above."""
    errors = {
        "400": "not understood", "408": "the body took too long", "413": "too large or too many",
        "415": "no such kind of body", "422": "a picture that is none, or labels that the model cannot tell apart",
        "429": "busy: come again (Retry-After)", "503": "took too long, or stopping",
    }  # fmt: skip
    sentence = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    paths: dict[str, Any] = {}
    for path, form in FORMS.items():
        schema = json.loads(json.dumps(form.model_json_schema()))
        content = {kind: {"schema": schema} for kind in ("application/json", "multipart/form-data")}
        answers: dict[str, Any] = {"200": {"description": "done", "content": {"application/json": {}}}}
        answers |= {
            status: {"description": text, "content": {"application/json": {"schema": sentence}}}
            for status, text in errors.items()
        }
        paths[path] = {"post": {"summary": form.__doc__, "requestBody": {"content": content}, "responses": answers}}
    for path, text in (("/health", "whether it answers"), ("/model", "the model"), ("/metrics", "Prometheus")):
        paths[path] = {"get": {"summary": text, "responses": {"200": {"description": "done"}}}}
    return {"openapi": "3.1.0", "info": {"title": "clipdistill serve", "version": version}, "paths": paths}


FORMS: dict[str, type[Config]] = {
    "/embed/images": EmbedPictures,
    "/embed/texts": EmbedTexts,
    "/classify": ClassifyPictures,
}
"""What each path takes."""
