"""The JSON API, under /api/model-merger."""

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from model_hashes import REPORT_FILE
from service.archive import LAYOUT
from service.core import RefusedError, Service
from service.downloads import part_of
from service.schemas import (
    EvaluationRequest,
    ExperimentRequest,
    Experiments,
    Failure,
    Health,
    Models,
    OneExperiment,
    PlanResult,
    Success,
)
from service.views import API, entries_view

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "what is wrong, and what to do"},
    "5XX": {"model": Failure, "description": "an error of the service, or too many connections"},
}

TOKEN = HTTPBearer(auto_error=False, description="the service's token; the guard looks at it")
"""How clients of the API say who they are, for its description."""

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'self'"
"""Of pages that hold texts of models: no script runs in them."""

PAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}}
}

router = APIRouter(prefix=API, responses=ERRORS, tags=["model-merger"])


async def service_of(request: Request) -> Service:
    """The service that a request is for. (What is not `async` would be called in a thread.)"""
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(service_of)]
Key = Annotated[
    str,
    PathParameter(
        description="of an experiment", max_length=100, examples=["exp-0123456789abcdef"]
    ),
]


def methods_at(scope: Scope) -> list[str]:
    """What can be done at an address by routes, of which there may be several."""
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    path = next((each.path for each in routes if each.matches(scope)[0] is not Match.NONE), None)
    return sorted({method for each in routes if each.path == path for method in each.methods or ()})


@router.get("/models", response_model=Models)
async def list_models(service: Here) -> Any:
    """The models that can be merged."""
    return {"success": True, "models": entries_view(await service.models())}


@router.post(
    "/experiments",
    response_model=OneExperiment,
    status_code=201,
    responses={
        201: {"headers": {"Location": {"description": "of it", "schema": {"type": "string"}}}}
    },
)
async def create_experiment(service: Here, request: ExperimentRequest, response: Response) -> Any:
    """Start a merge. What is wrong with it is said at once, before anything is begun."""
    found = await service.create(request)
    response.headers["location"] = f"{API}/experiments/{found.id}"
    return service.described(found)


@router.post("/experiments/plan", response_model=PlanResult)
async def plan_experiment(service: Here, request: ExperimentRequest) -> Any:
    """What a merge would do and take, without starting it."""
    found = await service.plan(request)
    return {"success": True, "plan": found["plan"], "recipe": found["recipe"]}


@router.get("/experiments", response_model=Experiments)
async def list_experiments(
    service: Here,
    limit: Annotated[int, Query(ge=1, le=200, description="at most")] = 50,
    before: Annotated[
        int | None, Query(ge=0, le=2**53, description="as `next` of a list says it")
    ] = None,
) -> Response:
    """All experiments with status and progress, the newest first."""
    return Response(await service.listing(limit, before), media_type="application/json")


@router.get("/experiments/{key}", response_model=OneExperiment)
async def get_experiment(service: Here, key: Key) -> Response:
    """An experiment: how far it is, what it will do or has done, what went wrong."""
    return Response(await service.description(key), media_type="application/json")


@router.delete("/experiments/{key}", response_model=Success)
async def delete_experiment(service: Here, key: Key) -> Any:
    """Remove an experiment and its result."""
    await service.remove(key)
    return {"success": True}


@router.post("/experiments/{key}/cancel", response_model=OneExperiment)
async def cancel_experiment(service: Here, key: Key) -> Any:
    """Stop what waits or runs of an experiment."""
    return service.described(await service.cancel(key))


@router.post("/experiments/{key}/evaluation", response_model=OneExperiment, status_code=202)
async def evaluate_experiment(service: Here, key: Key, request: EvaluationRequest) -> Any:
    """Have base, sources and merge answer prompts and read a text."""
    return service.described(await service.evaluate(key, request))


@router.get(
    "/experiments/{key}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def watch_experiment(service: Here, key: Key) -> StreamingResponse:
    """Server-sent events: `progress` whenever something changes, `end` when all is over."""
    await service.experiment(key)
    if service.watchers >= service.settings.watchers:
        raise RefusedError(429, "as many clients watch as may. Ask for the experiment now and then")
    service.watchers += 1
    return Watching(service, key)


class Watching(StreamingResponse):
    """Events of an experiment for a watcher, who is counted until this has ended."""

    def __init__(self, service: Service, key: str) -> None:
        headers = {"x-accel-buffering": "no"}
        super().__init__(service.watch(key), media_type="text/event-stream", headers=headers)
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.watchers -= 1


@router.get(
    "/experiments/{key}/download",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/zip": {}}},
        206: {"description": "a part of it", "content": {"application/zip": {}}},
    },
)
async def download_experiment(service: Here, key: Key, request: Request) -> Response:
    """The merged model as a ZIP; a download that broke off can go on (Range)."""
    name, archive = await service.archive(key)
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return part_of(request, archive, f"{key}-{LAYOUT}", "application/zip", headers)


@router.get(
    "/experiments/{key}/files/{name}",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "a part of it", "content": {"application/octet-stream": {}}},
    },
)
async def get_file(
    service: Here, key: Key, name: Annotated[str, PathParameter(max_length=300)], request: Request
) -> Response:
    """A file of the merged model; parts of it can be asked for (Range)."""
    file = await service.file(key, name)
    headers = {"content-disposition": f'attachment; filename="{quote(name)}"'}
    kind = "application/octet-stream"
    return part_of(request, file, file.sha256 or key, kind, headers)


@router.get(
    "/experiments/{key}/report",
    response_model=dict[str, Any],
    responses={206: {"description": "a part of it", "content": {"application/json": {}}}},
)
async def get_report(service: Here, key: Key, request: Request) -> Response:
    """The report of a finished merge, as it lies beside the weights (JSON)."""
    file = await service.file(key, REPORT_FILE)
    return part_of(request, file, file.sha256 or key, "application/json")


@router.get("/experiments/{key}/findings", response_class=Response, responses=PAGE)
async def get_findings(service: Here, key: Key) -> HTMLResponse:
    """Where the models disagree: a page with heat maps."""
    return await _page(service, key, "findings.html")


@router.get("/experiments/{key}/comparison", response_class=Response, responses=PAGE)
async def get_comparison(service: Here, key: Key) -> HTMLResponse:
    """What was found out by an evaluation: a page with charts and answers."""
    return await _page(service, key, "comparison.html")


async def _page(service: Service, key: str, name: str) -> HTMLResponse:
    policy = {"content-security-policy": PAGE_POLICY}
    return HTMLResponse(await service.page(key, name), headers=policy)


@router.get("/health", response_model=Health)
async def get_health(service: Here) -> Any:
    """Whether the service is well: jobs, room on the disk, memory."""
    return {"success": True, **await service.health()}
