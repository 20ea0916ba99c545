"""The studio: choose models and a method, see what it costs, watch it, judge it, download it."""

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from service.core import API


def add(app: FastAPI) -> None:
    """Add the pages to the application."""


def wants_page(request: Request) -> bool:
    """Whether a person asks, not a program."""
    is_api = request.url.path.startswith(API)
    return not is_api and "text/html" in request.headers.get("accept", "")


def error_page(request: Request, status: int, text: str) -> Response:
    """What went wrong, as a page."""
    return HTMLResponse(text, status)
