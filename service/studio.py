"""The studio: choose models and a method, see what it costs, watch it, judge it, download it.

The pages hold what the service knows when they are asked for; `static/studio.js` keeps them up to
date by the API. They load nothing from elsewhere, and run no script but that file.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from merge_card import VERSION
from merge_methods import METHODS
from model_utils import format_bytes
from service.core import Service
from service.safety import COOKIE, Guard, RefusalError, cookie_of
from service.store import Experiment
from service.studio_methods import FIRST, shown_methods
from service.views import API, entries_view, file_name, view

HERE = Path(__file__).resolve().parent

NEWEST = 8
"""Experiments that the studio shows below the form."""

PER_PAGE = 25
"""Experiments of a page of the list."""

COOKIE_DAYS = 30

DTYPES = ("float16", "bfloat16", "float32")

STATES = {
    "queued": "waiting",
    "running": "running",
    "completed": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}

STEPS = {
    "": "Getting ready",
    "starting": "Getting ready",
    "download": "Downloading the models",
    "checksums": "Checking what was written",
    "stopping": "Stopping",
    **dict.fromkeys(METHODS, "Merging the weights"),
}
"""What is being done, in words; evaluations say it in words of their own."""

SAME_ORIGIN = {"referrer-policy": "same-origin"}
"""Without a referrer a browser sends no origin with a form either, and the guard wants one."""

EXAMPLE = "capital: france ="
"""What the tiny LLaMAs know an answer to."""

PAGES = re.compile(
    r"/(\?from=[\w-]{1,100})?|/experiments(/[\w-]{1,100}|\?before=\d{1,15})?", re.ASCII
)
"""Of this service; what a link could lead elsewhere by is none of them."""

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


def add(app: FastAPI) -> None:
    """Add the pages to the application."""
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")


def wants_page(request: Request) -> bool:
    """Whether a person asks, not a program."""
    is_api = request.url.path.startswith(API)
    return not is_api and "text/html" in request.headers.get("accept", "")


def error_page(
    request: Request, status: int, text: str, headers: Mapping[str, str] | None = None
) -> Response:
    """What went wrong, as a page."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Error"
    return _page("error.html", status, headers=headers, code=status, phrase=phrase, text=text)


# Pages


@router.get("/")
async def studio_page(request: Request) -> Response:
    """The form for a merge, and the newest experiments; `?from=ID` fills it in as that one."""
    service = _service(request)
    key = request.query_params.get("from")
    start = None if not key else filled_in(await service.experiment(key))
    found = await service.experiments(NEWEST + 1, None)
    models = [{**each, "reason": _reason(each)} for each in entries_view(await service.models())]
    return _page(
        "studio.html",
        models=models,
        bases=[each for each in models if each["kind"] == "model" and each["available"]],
        methods=shown_methods(),
        first=len(FIRST),
        dtypes=DTYPES,
        start=start,
        memory=service.runner.memory_bytes,
        newest=NEWEST,
        experiments=[_listed(service, each) for each in found[:NEWEST]],
        older=found[NEWEST - 1].number if len(found) > NEWEST else None,
    )


@router.get("/experiments")
async def list_page(request: Request) -> Response:
    """Experiments, `?before=` a number."""
    service = _service(request)
    given = request.query_params.get("before", "")
    before = int(given) if given.isascii() and given.isdecimal() and len(given) < 16 else None
    found = await service.experiments(PER_PAGE + 1, before)
    return _page(
        "experiments.html",
        experiments=[_listed(service, each) for each in found[:PER_PAGE]],
        per_page=PER_PAGE,
        before=before,
        older=found[PER_PAGE - 1].number if len(found) > PER_PAGE else None,
    )


@router.get("/experiments/{key}")
async def experiment_page(request: Request, key: str) -> Response:
    """An experiment: how far it is, what came out."""
    service = _service(request)
    found = await service.experiment(key)
    shown = view(found, service.results.kept_until(found), whole=True)
    return _page(
        "experiment.html",
        experiment=shown,
        is_open=found.is_open,
        file_name=file_name(found.name),
        steps=STEPS,
        evaluation=_evaluation(shown),
    )


@router.get("/login")
async def login_page(request: Request) -> Response:
    """Asks for the token."""
    return _page("login.html", headers=SAME_ORIGIN, wrong=False, after=_after(request))


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Takes the token, and gives a cookie for it."""
    guard: Guard = request.app.state.guard
    body = (await request.body()).decode("utf-8", "replace")
    try:
        token = parse_qs(body, max_num_fields=10).get("token", [""])[0].strip()
    except ValueError:
        token = ""
    if not guard.is_token(token):
        try:
            guard.count_guess(request.scope)
        except RefusalError as error:
            return error_page(request, error.status, f"{error}. Try again later", error.headers)
        return _page("login.html", 401, headers=SAME_ORIGIN, wrong=True, after=_after(request))
    is_secret = "https" in (request.url.scheme, request.headers.get("origin", "").split(":")[0])
    answer = RedirectResponse(_after(request), HTTPStatus.SEE_OTHER)
    answer.set_cookie(
        COOKIE,
        cookie_of(token),
        max_age=COOKIE_DAYS * 86400,
        httponly=True,
        samesite="lax",  # links from elsewhere lead to pages; what changes something checks origins
        secure=is_secret,
    )
    return answer


def _after(request: Request) -> str:
    """Where one wanted to go before the login (`?next=`): a page of ours, or the first one."""
    wanted = request.query_params.get("next", "")
    return wanted if PAGES.fullmatch(wanted) else "/"


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# What they hold


def _reason(model: Mapping[str, Any]) -> str:
    """Why a model cannot be chosen; empty if it can."""
    if model["kind"] == "adapter" and not (model["note"] or model["base_model"]):
        return f"its base is not among the models. A recipe can name one, as BASE+{model['id']}"
    return str(model["note"])


def _listed(service: Service, experiment: Experiment) -> dict[str, Any]:
    return view(experiment, service.results.kept_until(experiment), whole=False)


def filled_in(experiment: Experiment) -> dict[str, Any]:
    """What the form of the studio holds to ask for an experiment again.

    Returns:
        "way": "form" or "recipe", and the fields of the request. What the form has no field for
        is given as a recipe.
    """
    request = experiment.request
    kept = {key: request[key] for key in ("name", "evaluation") if request.get(key)}
    if request.get("recipe") is not None:
        return {"way": "recipe", "recipe": request["recipe"], **kept}
    parameters = dict(request.get("parameters", {}))
    base = request.get("base_model") or parameters.pop("base_model", None)
    if "alpha" in parameters and request["method"] == "slerp":
        parameters["t"] = parameters.pop("alpha")
    if "drop_rate" in parameters:
        parameters["density"] = round(1 - parameters.pop("drop_rate"), 12)
    form = {
        "way": "form",
        "method": request["method"],
        "models": request["models"],
        "base_model": base,
        "parameters": parameters,
        "dtype": request.get("dtype"),
    }
    if _has_fields_for(request, parameters):
        return form | kept
    return {"way": "recipe", "recipe": experiment.recipe, **kept}


def _has_fields_for(request: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    fields = {"name", "method", "models", "base_model", "parameters", "evaluation", "dtype"}
    method = METHODS.get(request["method"])
    if method is None or not request.keys() <= fields | {"recipe", "findings"}:
        return False
    keys = {each.key for each in method.parameters}
    of_models = {"id", "weight"} if "weight" in keys else {"id"}
    return (
        request.get("findings") is None
        and parameters.keys() <= keys - {"weight"}
        and all(isinstance(each, int | float | str | bool) for each in parameters.values())
        and all(each.keys() <= of_models for each in request["models"])
        and all(isinstance(each.get("weight", 1), int | float) for each in request["models"])
    )


def _evaluation(experiment: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was found out by an evaluation, as tables: "numbers" and "answers"."""
    evaluation = experiment["evaluation"]
    result = None if evaluation is None else evaluation["result"]
    if result is None:
        return None
    models = result["models"]
    columns = list(models[0]["numbers"])
    asked = [answer["prompt"] for answer in models[0]["answers"]]
    return {
        "columns": columns,
        "models": models,
        "definitions": result["definitions"],
        "notes": result["notes"],
        "answers": [
            (prompt, [(each["name"], each["role"], each["answers"][at]) for each in models])
            for at, prompt in enumerate(asked)
        ],
    }


# How they are made


def _page(
    template: str, status: int = 200, *, headers: Mapping[str, str] | None = None, **content: Any
) -> HTMLResponse:
    return HTMLResponse(TEMPLATES.get_template(template).render(content), status, headers)


def _duration(seconds: float) -> str:
    """A time that something takes.

    >>> _duration(0.4), _duration(17.2), _duration(252), _duration(7380)
    ('0.4 s', '17 s', '4 min 12 s', '2 h 3 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(value: float | None) -> str:
    """A number of a table.

    >>> _number(None), _number(12.34567), _number(190090.55), _number(0.5)
    ('-', '12.35', '190,091', '0.5')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _sentence(text: str) -> str:
    """A text as a sentence; names that it begins with stay as they are.

    >>> _sentence("the queue is full"), _sentence("capitals: is not there")
    ('The queue is full.', 'capitals: is not there.')
    """
    whole = text[0].upper() + text[1:] if re.match("[a-z]+[ ,]", text) else text
    return whole if whole.endswith((".", "?", "!", ":")) else f"{whole}."


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        bytes=format_bytes,
        duration=_duration,
        number=_number,
        plain=lambda value: "" if value is None else f"{value:g}",
        sentence=_sentence,
        moment=lambda text: f"{text[:16].replace('T', ' ')} UTC",
    )
    found.globals.update(version=VERSION, states=STATES, api=API, example=EXAMPLE)
    return found


TEMPLATES = _environment()
