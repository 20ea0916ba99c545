"""The JSON API, under /api/model-merger."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse

from model_hashes import REPORT_FILE
from service.archive import Archive
from service.core import API, RefusedError, Service, entries_view, view
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
from service.store import Experiment

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "what is wrong, and what to do"}
}

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'self'"
"""Of pages that hold texts of models: no script runs in them."""

router = APIRouter(prefix=API, responses=ERRORS, tags=["model-merger"])


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(service_of)]
Key = Annotated[
    str,
    PathParameter(
        description="of an experiment", max_length=100, examples=["exp-0123456789abcdef"]
    ),
]


def one(service: Service, found: Experiment) -> dict[str, Any]:
    """An experiment as the body of an answer."""
    shown = view(found, service.kept_until(found), whole=True)
    return {"success": True, "experiment_id": found.id, "experiment": shown}


@router.get("/models", response_model=Models)
async def list_models(service: Here) -> Any:
    """The models that can be merged."""
    return {"success": True, "models": entries_view(await service.models())}


@router.post("/experiments", response_model=OneExperiment, status_code=201)
async def create_experiment(service: Here, request: ExperimentRequest, response: Response) -> Any:
    """Start a merge. What is wrong with it is said at once, before anything is begun."""
    found = await service.create(request)
    response.headers["location"] = f"{API}/experiments/{found.id}"
    return one(service, found)


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
async def get_experiment(service: Here, key: Key) -> Any:
    """An experiment: how far it is, what it will do or has done, what went wrong."""
    return one(service, await service.experiment(key))


@router.delete("/experiments/{key}", response_model=Success)
async def delete_experiment(service: Here, key: Key) -> Any:
    """Remove an experiment and its result."""
    await service.remove(key)
    return {"success": True}


@router.post("/experiments/{key}/cancel", response_model=OneExperiment)
async def cancel_experiment(service: Here, key: Key) -> Any:
    """Stop what waits or runs of an experiment."""
    return one(service, await service.cancel(key))


@router.post("/experiments/{key}/evaluation", response_model=OneExperiment, status_code=202)
async def evaluate_experiment(service: Here, key: Key, request: EvaluationRequest) -> Any:
    """Have base, sources and merge answer prompts and read a text."""
    return one(service, await service.evaluate(key, request))


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

    async def events() -> AsyncIterator[str]:
        service.watchers += 1
        try:
            async for event in service.watch(key):
                yield event
        finally:
            service.watchers -= 1

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )


@router.get(
    "/experiments/{key}/download",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {}}}, 206: {"description": "a part of it"}},
)
async def download_experiment(service: Here, key: Key, request: Request) -> Response:
    """The merged model as a ZIP; a download that broke off can go on (Range)."""
    name, archive = await service.archive(key)
    tag = f'"{key}"'  # a result never changes
    headers = {
        "content-disposition": f'attachment; filename="{name}"',
        "accept-ranges": "bytes",
        "etag": tag,
    }
    wanted = request.headers.get("range") if request.headers.get("if-range", tag) == tag else None
    span = byte_range(wanted, archive.length)
    if span is None:
        headers["content-length"] = str(archive.length)
        return _streamed(archive, 0, archive.length, 200, headers)
    start, stop = span
    if start >= stop:
        content_range = {"content-range": f"bytes */{archive.length}"}
        raise RefusedError(416, "the ZIP has no such part", headers=content_range)
    headers["content-range"] = f"bytes {start}-{stop - 1}/{archive.length}"
    headers["content-length"] = str(stop - start)
    return _streamed(archive, start, stop, 206, headers)


def _streamed(
    archive: Archive, start: int, stop: int, status: int, headers: dict[str, str]
) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        position = start
        while position < stop:
            piece = await asyncio.to_thread(archive.piece, position, stop)
            position += len(piece)
            yield piece

    return StreamingResponse(pieces(), status, headers, media_type="application/zip")


def byte_range(header: str | None, length: int) -> tuple[int, int] | None:
    """What a Range header asks for: first byte, and the one after the last.

    None for all of it: also where several ranges are asked for, or it cannot be understood, as
    RFC 9110 (14.2) allows. A range that does not exist is empty.

    >>> byte_range("bytes=2-3", 10), byte_range("bytes=8-", 10), byte_range("bytes=-4", 10)
    ((2, 4), (8, 10), (6, 10))
    >>> byte_range("bytes=10-", 10), byte_range("bytes=1-2,4-5", 10), byte_range("lines=1-2", 10)
    ((10, 10), None, None)
    """
    unit, _, wanted = (header or "").partition("=")
    first, dash, last = wanted.strip().partition("-")
    numbers = [each for each in (first, last) if each]
    if unit.strip() != "bytes" or not dash or not numbers:
        return None
    if not all(each.isascii() and each.isdecimal() and len(each) < 20 for each in numbers):
        return None
    if not first:
        return max(0, length - int(last)), length
    if last and int(last) < int(first):
        return None
    return min(int(first), length), min(int(last) + 1 if last else length, length)


@router.get("/experiments/{key}/files/{name}", response_class=FileResponse)
async def get_file(
    service: Here, key: Key, name: Annotated[str, PathParameter(max_length=300)]
) -> FileResponse:
    """A file of the merged model; parts of it can be asked for (Range)."""
    path, sha256 = await service.file(key, name)
    headers = {"etag": f'"{sha256 or key}"'}
    return FileResponse(path, media_type="application/octet-stream", filename=name, headers=headers)


@router.get("/experiments/{key}/report")
async def get_report(service: Here, key: Key) -> FileResponse:
    """The report of a finished merge, as it lies beside the weights (JSON)."""
    path, _ = await service.file(key, REPORT_FILE)
    return FileResponse(path, media_type="application/json")


@router.get("/experiments/{key}/findings", response_class=HTMLResponse)
async def get_findings(service: Here, key: Key) -> HTMLResponse:
    """Where the models disagree: a page with heat maps."""
    return await _page(service, key, "findings.html")


@router.get("/experiments/{key}/comparison", response_class=HTMLResponse)
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
