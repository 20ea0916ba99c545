"""Who is let in, how often, and what HTTP promises beside bodies; over sockets."""

import contextlib
import os
import socket
import time

import pytest

pytest.importorskip("fastapi")

from service_server import API, Server

TOKEN = "0123456789abcdef"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
WRONG = {"Authorization": "Bearer 0123456789abcdeX"}
PAGE = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Behind a proxy, which is this test."""
    options = ("--hosts", "merge.lan", "--trusted-proxies", "127.0.0.1")
    environment = {"LLAMA_MERGE_TOKEN": TOKEN}
    with Server(tmp_path_factory.mktemp("http") / "data", *options, environment=environment) as it:
        yield it


@pytest.fixture(scope="module")
def done(server):
    """A finished merge."""
    models = [{"id": "capitals"}, {"id": "elements"}]
    request = {"method": "linear", "models": models}
    key = server.post("/experiments", request, headers=RIGHT)["experiment_id"]
    end = time.monotonic() + 60
    while server.get(f"/experiments/{key}", headers=RIGHT)["experiment"]["status"] != "completed":
        assert time.monotonic() < end
        time.sleep(0.05)
    return key


def of(client, **headers):
    """Headers of a client with an address of its own, as a proxy passes them on."""
    return {"X-Forwarded-For": f"10.0.0.{client}", **headers}


def raw(server, sent, *, seconds=10):
    """What comes back on a connection until it is closed, or nothing has come for so long."""
    with socket.create_connection(("127.0.0.1", server.port), seconds) as connection:
        connection.sendall(sent)
        got = b""
        while piece := connection.recv(2**16):
            got += piece
    return got


# Who is let in


def test_names_of_the_service_are_those_it_is_told(server):
    for host, status in {
        "merge.lan": 200, "127.0.0.1": 200, "merge.lan:81": 200, "MERGE.lan": 200,
        "evil.com": 421, "a!b.evil.com": 421, "evil.com:123456": 421, "": 421, "[": 421,
    }.items():  # fmt: skip
        answer = server.ask("GET", f"{API}/health", headers={**RIGHT, "Host": host})
        assert (host, answer.status) == (host, status)


def test_who_serves_others_behind_a_proxy_needs_a_token(tmp_path):
    with Server(tmp_path / "data", "--hosts", "merge.lan") as server:
        assert server.ask("GET", f"{API}/health").status == 401
        while not server.said[-1].startswith("token: "):
            time.sleep(0.01)


def test_visits_without_a_token_are_no_guesses(server):
    for _ in range(15):
        answer = server.ask("GET", "/experiments", headers=of(1, **PAGE))
        assert (answer.status, answer.headers["location"]) == (303, "/login?next=/experiments")


def test_wrong_tokens_are_counted_and_lock_nobody_out(server):
    statuses = [server.ask("GET", f"{API}/health", headers=of(2, **WRONG)).status for _ in "x" * 15]
    assert (statuses[:10], statuses[-1]) == ([401] * 10, 429)
    assert server.ask("GET", f"{API}/health", headers=of(2, **RIGHT)).status == 200
    assert server.ask("GET", f"{API}/health", headers=of(3, **WRONG)).status == 401


def test_wrong_tokens_of_the_login_are_counted_too(server):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    body = b"token=0123456789abcdeX"
    statuses = [server.ask("POST", "/login", body, of(4, **form)).status for _ in range(12)]
    assert (statuses[:10], statuses[-1]) == ([401] * 10, 429)
    answer = server.ask("POST", "/login", f"token={TOKEN}".encode(), of(4, **form))
    assert answer.status == 303


def test_strangers_use_up_nothing_of_those_who_are_known(server):
    asked = [server.ask("POST", f"{API}/experiments/x/cancel", headers=of(5)) for _ in range(70)]
    assert {answer.status for answer in asked} == {401}
    answer = server.ask("POST", f"{API}/experiments/x/cancel", headers=of(5, **RIGHT))
    assert answer.status == 404
    asked = [server.ask("GET", f"{API}/health", headers=of(6)).status for _ in range(250)]
    assert asked[-1] == 429
    assert server.ask("GET", f"{API}/health", headers=of(6, **RIGHT)).status == 200


def test_strangers_cannot_send_much(server):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    body = b"a=1&" * 2000
    assert server.ask("POST", "/login", body, of(7, **form)).status == 413
    assert server.ask("POST", "/login", b"a=1&" * 900, of(7, **form)).status == 401
    answer = server.ask("POST", f"{API}/experiments/plan", b" " * 10_000, of(7))
    assert answer.status == 401


def test_a_cookie_is_only_a_cookie_and_is_secret_behind_https(server):
    form = {"Content-Type": "application/x-www-form-urlencoded", "Host": "merge.lan"}
    login = "/login?next=/experiments%3Fbefore=30"
    for more in (
        {"X-Forwarded-Proto": "https", "Origin": "https://merge.lan"},
        {"Origin": "https://merge.lan"},
        {},
    ):
        answer = server.ask("POST", login, f"token={TOKEN}".encode(), {**form, **more})
        assert answer.headers["location"] == "/experiments?before=30"
        set_cookie = answer.headers["set-cookie"]
        assert ("Secure" in set_cookie) == bool(more)
    cookie = set_cookie.split(";")[0]
    assert server.ask("GET", f"{API}/health", headers={"Cookie": cookie}).status == 200
    as_token = {"Authorization": f"Bearer {cookie.partition('=')[2]}"}
    assert server.ask("GET", f"{API}/health", headers=of(8, **as_token)).status == 401


@pytest.mark.parametrize(
    ("wanted", "after"),
    [
        ("/?from=exp-1", "/?from=exp-1"),
        ("/experiments/exp-1", "/experiments/exp-1"),
        ("//evil.com", "/"),
        ("/experiments/..", "/"),
        ("https://evil.com", "/"),
        ("/experiments?before=1&x=2", "/"),
    ],
)
def test_a_login_leads_to_pages_of_the_service_alone(server, wanted, after):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    path = f"/login?next={wanted.replace('?', '%3F').replace('&', '%26')}"
    answer = server.ask("POST", path, f"token={TOKEN}".encode(), form)
    assert answer.headers["location"] == after


def test_the_description_says_how_to_get_in(server):
    described = server.ask("GET", f"{API}/openapi.json", headers=RIGHT).json
    assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    create = described["paths"][f"{API}/experiments"]["post"]
    assert create["security"] == [{"HTTPBearer": []}]
    assert create["responses"].keys() >= {"201", "4XX", "5XX"}


# What HTTP promises


@pytest.mark.parametrize("path", ["/", f"{API}/health", f"{API}/models", "/experiments"])
def test_heads_are_those_of_the_whole_answers(server, path):
    head, whole = (server.ask(method, path, headers=RIGHT) for method in ("HEAD", "GET"))
    assert (head.status, head.body) == (whole.status, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


def test_heads_of_downloads_and_of_events_end(server, done):
    for name in ("download", "files/model.safetensors", "report", "events"):
        path = f"{API}/experiments/{done}/{name}"
        head = server.ask("HEAD", path, headers=RIGHT)
        assert (head.status, head.body) == (200, b"")
        if name != "events":
            whole = server.ask("GET", path, headers=RIGHT)
            assert int(head.headers["content-length"]) == len(whole.body)


def test_downloads_are_conditional(server, done):
    path = f"{API}/experiments/{done}/download"
    tag = server.ask("HEAD", path, headers=RIGHT).headers["etag"]

    def status(**headers):
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return server.ask("GET", path, headers={**RIGHT, **given}).status

    assert status(If_None_Match=tag) == status(If_None_Match=f'"x", W/{tag}') == 304
    assert status(If_None_Match="*") == 304
    assert status(If_None_Match='"x"') == status(If_Match=tag) == status(If_Match="*") == 200
    assert status(If_Match='"x"', Range="bytes=0-1") == status(If_Match=f"W/{tag}") == 412
    assert status(If_Match=f'"x", {tag}', Range="bytes=0-1") == 206


def test_a_result_without_a_file_is_said_to_be_gone(server, done):
    path = server.data / "results" / done / "model" / "generation_config.json"
    content = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(content + b" ")):
        damage()
        for name in ("download", f"files/{path.name}"):
            answer = server.ask("GET", f"{API}/experiments/{done}/{name}", headers=RIGHT)
            assert answer.status == 410
            assert "have changed" in answer.json["error"]
    path.write_bytes(content)
    assert server.ask("GET", f"{API}/experiments/{done}/download", headers=RIGHT).status == 200


def test_what_is_no_http_is_answered_and_leaves_no_trace_in_the_log(server):
    before = len(server.said)
    for host in ["127.0.0.1", "evil.com"] * 10:  # the second is refused before it has been read
        head = f"GET {API}/health HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
        sent = f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n"
        assert raw(server, sent.encode()).startswith(b"HTTP/1.1 400 ")
    assert [line for line in server.said[before:] if not line.startswith("exp-")] == []


def test_a_client_that_waits_to_send_is_refused_for_good(server):
    """It may send its body after all; whoever takes the connection next must not."""
    head = f"POST {API}/experiments HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    sent = f"{head}Expect: 100-continue\r\nContent-Length: 2000\r\n\r\n"
    answer = raw(server, sent.encode()).lower()
    assert answer.startswith(b"http/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in answer


def test_bodies_of_what_needs_none_are_not_kept(server, done):
    """Else a few who watch would leave no room for the requests of others."""
    other = server.post(
        "/experiments",
        {"method": "linear", "models": [{"id": "base"}, {"id": "german"}]},
        headers=RIGHT,
    )["experiment_id"]
    head = f"GET {API}/experiments/{other}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = b" " * 900_000
    sent = f"{head}Authorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with server.frozen(other), contextlib.ExitStack() as watching:
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", server.port), 10)
            watching.enter_context(connection)
            connection.sendall(sent + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        plan = {"recipe": " " * 30_000}
        answer = server.ask("POST", f"{API}/experiments/plan", plan, headers=RIGHT)
        assert answer.status == 422


def test_low_limits_let_something_through(tmp_path):
    with Server(tmp_path / "data", "--changes-per-minute", 0.5) as server:
        statuses = [server.ask("POST", f"{API}/experiments/x/cancel").status for _ in range(2)]
        assert statuses == [404, 429]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_everywhere_means_both_protocols(tmp_path):
    environment = {"LLAMA_MERGE_TOKEN": TOKEN}
    with Server(tmp_path / "data", "--host", "::", environment=environment) as server:
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, server.port), 10) as connection:
                host = f"[{address}]" if ":" in address else address
                head = f"GET {API}/health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
                connection.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_idle_connections_leave_files_for_the_service(tmp_path):
    """More of them than files may be open: those beyond are closed, and jobs are done."""
    options = ("--header-seconds", 60)
    with (
        Server(tmp_path / "data", *options, files=700) as server,
        contextlib.ExitStack() as idle,
    ):
        for _ in range(900):
            where = "127.0.0.1", server.port
            idle.enter_context(socket.create_connection(where, 10))
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 600
        idle.close()
        key = None
        while key is None:  # until those have gone
            with contextlib.suppress(ConnectionError, AssertionError):
                key = server.merge()
        assert server.finished(key)["status"] == "completed"
        assert len(server.said) < 20
