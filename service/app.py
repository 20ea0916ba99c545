"""The application: API and page, guarded; every error with a body of the same form."""

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merge_card import VERSION
from service import api, studio
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
    problems = [
        {"where": _where(each["loc"]), "text": str(each["msg"])} for each in error.errors()[:40]
    ]
    return JSONResponse(_failure(422, problems[0]["text"], problems), 422)


def _where(location: tuple[str | int, ...]) -> str:
    """The place of a wrong entry, as `models[1].id`."""
    parts = location[1:] if location[:1] in (("body",), ("query",), ("path",)) else location
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in parts)[
        0 if parts and isinstance(parts[0], int) else 1 :
    ]


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
