"""A folder of models served on this machine the way the Hugging Face Hub serves them.

    hub = HubStandIn(root)
    with hub as url:
        snapshot_download("org/name", endpoint=url, cache_dir=cache)
    assert hub.requests

`root/<org>/<name>/` is the repository "org/name", with one revision, main. huggingface_hub reads
HF_ENDPOINT when it is imported: set it for a subprocess, and use `endpoint=` within a process.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?/?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Reply:
    """What the server answers; the sender adds Content-Length."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubStandIn:
    """A context manager: serves `root` on a free loopback port and yields the base URL.

    `requests` holds every request so far as (method, path without the query). The client may make
    some of its own accord, so count those of one kind rather than all. `served` holds the path and
    the number of bytes of every body sent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.served: list[tuple[str, int]] = []

    def __enter__(self) -> str:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, method: str, ending: str = "") -> int:
        """How many requests of this method had a path with this ending."""
        return sum(m == method and path.endswith(ending) for m, path in self.requests)

    def count_bytes(self, ending: str) -> int:
        """How many bytes were sent of files with this ending."""
        return sum(size for path, size in self.served if path.endswith(ending))


def make_handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    """A request handler that notes requests in `hub` and sends what `answer` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(with_body=True)

        def do_HEAD(self) -> None:
            self.reply(with_body=False)

        def reply(self, with_body: bool) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, unquote(path)))
            reply = part_of(answer(hub.root, self.path), self.headers.get("Range"))
            self.send_response(reply.status)
            headers = {"Content-Length": str(len(reply.body))} | reply.headers
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            if with_body:
                hub.served.append((unquote(path), len(reply.body)))
                self.wfile.write(reply.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test output clean."""

    return Handler


# What is answered, as a function of the folder and the path


def answer(root: Path, url: str) -> Reply:
    """The reply to a path and its query, still percent-encoded."""
    path, query = urlsplit(url).path, urlsplit(url).query
    if match := API.fullmatch(path):
        name, revision = unquote(match[1]), unquote(match[3] or "main")
        kind = match[2] or ""
        return answer_repository(root, name, revision, kind, sizes="blobs=true" in query.lower())
    if match := RESOLVE.fullmatch(path):
        name, revision, file = map(unquote, match.groups())
        return answer_file(root, name, revision, file)
    return refuse("EntryNotFound", f"{path!a} is nothing that a Hub serves")


def answer_repository(root: Path, name: str, revision: str, kind: str, sizes: bool) -> Reply:
    """Model information, with or without the sizes of files; for "tree" the list of files."""
    files = read_repository(root, name)
    if refusal := check_revision(files, name, revision):
        return refusal
    content: Any = [describe(path, data) for path, data in files.items()]
    if kind != "tree":
        siblings = [
            {"rfilename": path} | ({"size": len(data)} if sizes else {})
            for path, data in files.items()
        ]
        content = {"_id": "0", "id": name, "modelId": name, "private": False, "tags": []}
        content |= {"sha": commit_of(files), "siblings": siblings, "downloads": 0, "likes": 0}
    return Reply(body=json.dumps(content).encode(), headers={"Content-Type": "application/json"})


def answer_file(root: Path, name: str, revision: str, file: str) -> Reply:
    """One file's bytes with the headers that the client's cache needs."""
    files = read_repository(root, name)
    if refusal := check_revision(files, name, revision):
        return refusal
    commit = {"X-Repo-Commit": commit_of(files)}
    if file not in files:
        return refuse("EntryNotFound", f"{name} has no file {file!a}", commit)
    etag = {"ETag": f'"{blob_id(file, files[file])}"', "Accept-Ranges": "bytes"}
    return Reply(body=files[file], headers=commit | etag)


def check_revision(files: dict[str, bytes], name: str, revision: str) -> Reply | None:
    """A refusal if there is no such repository or revision."""
    if not files:
        return refuse("RepoNotFound", f"Repository {name!a} not found")
    if revision not in ("main", commit_of(files)):
        return refuse("RevisionNotFound", f"{name} has no revision {revision!a}")
    return None


def refuse(code: str, message: str, headers: dict[str, str] | None = None) -> Reply:
    """A 404 that the client turns into its own exception."""
    return Reply(404, headers={"X-Error-Code": code, "X-Error-Message": message} | (headers or {}))


def part_of(reply: Reply, requested: str | None) -> Reply:
    """The part that a Range header asks for: "bytes=N-" to resume a download, or "bytes=N-M"."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", requested or "")
    if not match or reply.status != 200:
        return reply
    size, start = len(reply.body), int(match[1])
    end = min(int(match[2] or size), size - 1)
    if start > end:
        return Reply(416, headers={"Content-Range": f"bytes */{size}"})
    content_range = {"Content-Range": f"bytes {start}-{end}/{size}"}
    return Reply(206, reply.body[start : end + 1], reply.headers | content_range)


# Repositories


def read_repository(root: Path, name: str) -> dict[str, bytes]:
    """Every file of a repository by its path, sorted; empty if there is no such repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        return {}
    folder = root / name
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def commit_of(files: dict[str, bytes]) -> str:
    """A commit hash, 40 hexadecimal digits, that changes with any file."""
    listing = "".join(f"{path}\0{blob_id(path, data)}\n" for path, data in files.items())
    return hashlib.sha1(listing.encode()).hexdigest()


def blob_id(path: str, data: bytes) -> str:
    """SHA-256 of a weight file, git's own hash of any other."""
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    """Whether the Hub would hold the file outside git."""
    return path.endswith((".safetensors", ".bin", ".gguf"))


def describe(path: str, data: bytes) -> dict[str, Any]:
    """One file's entry in a tree listing."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(path, data)}
    if not is_large(path):
        return entry
    pointer = hashlib.sha1(blob_id(path, data).encode()).hexdigest()
    large = {"oid": entry["oid"], "size": len(data), "pointerSize": 134}
    return entry | {"oid": pointer, "lfs": large}
