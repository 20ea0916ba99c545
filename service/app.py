"""The application: API and page, guarded; every error with a body of the same form."""

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merge_card import VERSION
from merge_recipe import unknown_name
from service import api, schemas, studio
from service.core import RefusedError, Service
from service.safety import Guard
from service.settings import Settings
from service.views import API

SAID = {404: "there is nothing at this address", 405: "this cannot be done at this address"}


def create_app(settings: Settings, *, started: Callable[[], None] = lambda: None) -> ASGIApp:
    """The service as an ASGI application.

    Args:
        settings: how it runs.
        started: called when it is ready to answer.

    Raises:
        OSError: the data folder cannot be used.
    """

    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            started()
            yield

    app = FastAPI(
        title="llama-merge",
        version=VERSION,
        description="Merge fine-tuned LLaMA-family models.",
        openapi_url=f"{API}/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(api.router, dependencies=[Depends(api.TOKEN)] if settings.token else [])
    studio.add(app)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _broken)
    guard = Guard(heads_too(app), settings, settings.token)
    app.state.guard = guard
    return guard


def with_token(settings: Settings) -> Settings:
    """The settings with a new token, if it needs one and none is set."""
    if settings.is_local or settings.token is not None:
        return settings
    return settings.model_copy(update={"token": secrets.token_urlsafe(24)})


def heads_too(app: ASGIApp) -> ASGIApp:
    """An application that answers HEAD as GET, without what follows the head."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await app(scope, receive, send)
            return
        asked = False

        async def receive_once() -> Message:
            nonlocal asked
            if asked:  # whoever watches is told at once that nobody listens
                return {"type": "http.disconnect"}
            asked = True
            return await receive()

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body"})

        await app({**scope, "method": "GET"}, receive_once, send_head)

    return answer


def _failure(status: int, error: str, problems: list[dict[str, str]]) -> dict[str, Any]:
    return {"success": False, "error": error, "problems": problems}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    problems = [problem._asdict() for problem in error.problems]
    if studio.wants_page(request):
        return studio.error_page(request, error.status, str(error))
    content = _failure(error.status, str(error), problems)
    return JSONResponse(content, error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [{"where": _where(each["loc"]), "text": _said(each)} for each in error.errors()[:40]]
    return JSONResponse(_failure(422, problems[0]["text"], problems), 422)


EXPECTED = {
    "missing": "is missing",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list",
    "string_type": "expected a text",
}
"""What is wrong, by the names that Pydantic has for it."""

EXAMPLES = {"models": '{"id": "capitals", "weight": 0.5}', "": '{"method": "linear", "models": []}'}
"""Of entries that are objects, by their last name."""


def _said(error: Mapping[str, Any]) -> str:
    """What is wrong with an entry of a request."""
    kind, location = error["type"], error["loc"]
    names = [each for each in location[1:] if isinstance(each, str)]
    if kind == "json_invalid":
        return f"this is no JSON: {error['ctx']['error']} (character {location[-1]})"
    if kind == "missing" and not names:
        return f"the request has no body. Expected JSON, as {EXAMPLES['']}"
    if kind == "extra_forbidden":
        known = [*schemas.EvaluationRequest.model_fields]  # which alone takes no others
        return unknown_name("entry", location[-1], known)
    text = EXPECTED.get(kind, str(error["msg"]))
    example = EXAMPLES.get(names[-1] if names else "")
    return f"{text}, as {example}" if example and text == "expected an object" else text


def _where(location: tuple[str | int, ...]) -> str:
    """The place of a wrong entry, as `models[1].id`; empty for the whole, as of what is no JSON."""
    if location[:1] in (("body",), ("query",), ("path",)):
        location = location[1:]
    if not location or isinstance(location[0], int):
        return ""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in location)[1:]


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = SAID.get(error.status_code, str(error.detail))
    if studio.wants_page(request):
        return studio.error_page(request, error.status_code, text)
    headers = dict(error.headers or {})
    if error.status_code == 405 and (methods := api.methods_at(request.scope)):
        headers["allow"] = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
    return JSONResponse(_failure(error.status_code, text, []), error.status_code, headers)


async def _broken(_: Request, error: Exception) -> Response:
    text = f"an error of the service itself ({type(error).__name__}); its log has more"
    return JSONResponse(_failure(500, text, []), 500)
