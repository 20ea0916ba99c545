"""The service as its clients see it: a real server in a process, asked over HTTP."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn
from tiny_checkpoints import make_llama

pytest.importorskip("fastapi")

from service_server import API, ROOT, TWO, Server

import merge

TINY = ROOT / "examples/tiny_llamas"
BIG = {"layers": 4, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "heads": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("service") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def done(server):
    """A finished merge with findings."""
    return server.finished(server.merge(CODE_AND_CHAT), 120)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with two models whose merge takes a second or two."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        make_llama(folder / name, seed=seed, **BIG)
    return folder


CODE_AND_CHAT = {
    "name": "Code + Chat Model",
    "method": "ties",
    "base_model": "base",
    "models": [{"id": "capitals", "weight": 0.6}, {"id": "elements", "weight": 0.4}],
    "parameters": {"density": 0.5},
}
LARGE = {"method": "linear", "models": [{"id": "one", "weight": 0.5}, {"id": "two", "weight": 0.5}]}


def expected(tmp_path, request=TWO, models=TINY):
    """SHA-256 of the weights that the same merge gives without the service."""
    content = {
        "method": request["method"],
        "models": [
            {"model": str(models / each["id"]), "parameters": {"weight": each.get("weight", 1.0)}}
            for each in request["models"]
        ],
    }
    merge.merge_recipe(content, tmp_path / "expected", progress=False)
    return sha256(tmp_path / "expected" / "model.safetensors")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_of(found):
    (file,) = (each for each in found["result"]["files"] if each["name"] == "model.safetensors")
    return file["sha256"]


# Models


def test_models_have_what_the_api_promises(server):
    models = {each["id"]: each for each in server.get("/models")["models"]}
    assert {"base", "capitals", "elements", "capitals-lora"} <= models.keys()
    assert models["capitals-lora"]["kind"] == "adapter"
    assert models["capitals-lora"]["base_model"] == "base"
    seeds = ["mistral-7b-instruct", "zephyr-7b-beta", "code-llama-7b", "llama2-7b-chat"]
    for key in (*seeds, "openchat-7b"):
        assert models[key]["size"] == "7B"
        assert models[key]["download_size"].endswith("GB")
        assert not models[key]["available"]
    assert models["mistral-7b-instruct"]["architecture"] == "mistral"


def test_models_below_configured_folders_are_offered_by_id(tmp_path):
    make_llama(tmp_path / "models" / "team a" / "über chat", seed=1)
    make_llama(tmp_path / "models" / "team a" / "base", seed=2)
    broken = tmp_path / "models" / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (tmp_path / "models" / "loop").symlink_to(tmp_path / "models")
    with Server(tmp_path / "data", "--models", tmp_path / "models") as server:
        models = {each["id"]: each for each in server.get("/models")["models"]}
        assert {"team-a-ber-chat", "team-a-base", "base", "broken"} <= models.keys()
        assert "not valid JSON" in models["broken"]["note"]
        assert str(tmp_path) not in json.dumps(models)
        key = server.merge(
            {"method": "linear", "models": [{"id": "team-a-ber-chat"}, {"id": "team-a-base"}]}
        )
        assert server.finished(key)["status"] == "completed"
        both = {"method": "linear", "models": [{"id": "broken"}, {"id": "base"}]}
        answer = server.ask("POST", f"{API}/experiments", both)
        assert (answer.status, answer.json["problems"][0]["where"]) == (422, "models[0].id")


def test_two_models_of_one_name_have_ids_of_their_own(tmp_path):
    for number in (1, 2):
        make_llama(tmp_path / f"root{number}" / "chat", seed=number)
    roots = [tmp_path / "root1", tmp_path / "root2"]
    with Server(tmp_path / "data", "--models", *roots) as server:
        ids = [each["id"] for each in server.get("/models")["models"]]
        chats = [key for key in ids if key.startswith("chat")]
        assert len(chats) == len(set(chats)) == 2


def test_own_models_have_the_plain_ids_and_adapters_the_base_beside_them(tmp_path):
    make_llama(tmp_path / "models" / "base", seed=1)
    with Server(tmp_path / "data", "--models", tmp_path / "models") as server:
        models = {each["id"]: each for each in server.get("/models")["models"]}
        tiny = models["capitals-lora"]["base_model"]
        assert tiny.startswith("base-")
        assert models["base"]["bytes"] != models[tiny]["bytes"] == models["capitals"]["bytes"]


def test_a_model_of_the_hub_is_downloaded_when_it_is_asked_for(tmp_path):
    make_llama(tmp_path / "hub" / "team" / "chat", seed=1)
    make_llama(tmp_path / "models" / "code", seed=2)
    hub = HubStandIn(tmp_path / "hub")
    with hub as url:
        environment = {
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",  # whatever other tests have set
            "HF_HOME": str(tmp_path / "cache"),
            "LLAMA_MERGE_HUB_MODELS": "team/chat",
            "LLAMA_MERGE_HUB_DOWNLOADS": "true",
            "LLAMA_MERGE_MODELS": str(tmp_path / "models"),
        }
        with Server(tmp_path / "data", environment=environment) as server:
            request = {"method": "linear", "models": [{"id": "team-chat"}, {"id": "code"}]}
            plan = server.post("/experiments/plan", request)["plan"]
            assert plan["download_bytes"] > 0
            assert not [*(tmp_path / "cache").rglob("*.safetensors")]
            found = server.finished(server.merge(request))
            assert found["status"] == "completed", found
            assert [*(tmp_path / "cache").rglob("*.safetensors")]
            assert found["models"][0]["id"] == "team-chat"
            report = server.ask("GET", found["links"]["report"]).json
            assert report["base_models"] == ["team/chat"]
            assert "/" not in plan["summary"].replace("team/chat", "")
            text = json.dumps([found, server.experiment(found["id"])])
            assert str(tmp_path) not in text


def test_models_of_the_hub_are_merged_as_they_were_planned_with(tmp_path):
    """Also where others are uploaded while a merge waits."""
    make_llama(tmp_path / "hub" / "team" / "chat", seed=1)
    make_llama(tmp_path / "models" / "code", seed=2)
    with HubStandIn(tmp_path / "hub") as url:
        environment = {
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "cache"),
            "LLAMA_MERGE_HUB_DOWNLOADS": "true",
        }
        options = ("--models", tmp_path / "models", "--hub-models", "team/chat")
        copy = {"method": "passthrough", "models": [{"id": "team-chat"}]}
        with Server(tmp_path / "data", *options, environment=environment) as server:
            first, second = server.merge(copy), server.merge(copy)
            server.finished(first)
            with server.frozen(second):
                third = server.merge(copy)
                make_llama(tmp_path / "hub" / "team" / "chat", seed=9)
            found = [server.finished(key) for key in (first, third, server.merge(copy))]
            assert [each["problems"] for each in found] == [[], [], []]
            weights = [weights_of(each) for each in found]
            assert weights[0] == weights[1] != weights[2]


def test_errors_and_plans_tell_of_no_folders(tmp_path):
    """Not where the data folder is a link, a file cannot be read, or a name is no Unicode."""
    real, data = tmp_path / "real", tmp_path / "data"
    real.mkdir()
    data.symlink_to(real)
    for seed, name in enumerate(("one", "two", "odd")):
        make_llama(tmp_path / "models" / name, seed=seed, tokenizer=True)
    (tmp_path / "models" / "two" / "tokenizer.json").unlink()
    (tmp_path / "models" / "two" / "tokenizer.json").mkdir()
    with open(os.fsencode(tmp_path / "models" / "odd") + b"/caf\xe9.txt", "w"):
        pass
    with Server(data, "--models", tmp_path / "models") as server:
        both = {"method": "linear", "models": [{"id": "one"}, {"id": "two"}]}
        answer = server.ask("POST", f"{API}/experiments", both)
        assert answer.status == 422
        assert str(tmp_path) not in answer.body.decode()
        odd = {"method": "linear", "models": [{"id": "odd"}, {"id": "one"}]}
        plan = server.post("/experiments/plan", odd)["plan"]
        assert r"caf\udce9.txt" in plan["files_left"]
        found = server.finished(server.merge(odd))
        assert found["status"] == "completed"
        assert str(tmp_path) not in json.dumps(found)


# Experiments


def test_a_merge_gives_the_bytes_that_the_command_gives(server, tmp_path):
    found = server.finished(server.merge())
    assert (found["status"], found["progress"]) == ("completed", 100)
    assert weights_of(found) == expected(tmp_path)
    folder = server.data / "results" / found["id"] / "model"
    for file in found["result"]["files"]:
        assert sha256(folder / file["name"]) == file["sha256"]


def test_a_plan_starts_nothing(server):
    before = len(server.get("/experiments?limit=200")["experiments"])
    found = server.post("/experiments/plan", TWO)
    assert found["plan"]["memory_bytes"] > 0
    assert found["plan"]["disk_bytes"] > found["plan"]["write_bytes"]
    assert found["recipe"].startswith("method: linear\n")
    assert len(server.get("/experiments?limit=200")["experiments"]) == before


def test_what_is_wrong_is_said_at_once_with_its_places(server):
    request = {"method": "ties", "models": [{"id": "capitals"}, {"id": "elements", "density": 2}]}
    for path in ("/experiments", "/experiments/plan"):
        answer = server.ask("POST", API + path, request)
        assert answer.status == 422
        assert answer.json["success"] is False
        assert [each["where"] for each in answer.json["problems"]] == [
            "base_model",
            "models[1].density",
        ]
        assert answer.json["error"] == "\n".join(each["text"] for each in answer.json["problems"])


@pytest.mark.parametrize(
    ("body", "where", "text"),
    [
        (b"{bad", "", "this is no JSON: Expecting property name"),
        (b"", "", "the request has no body. Expected JSON, as {"),
        (b"[]", "", "expected an object, as {"),
        (b'{"models": ["a"]}', "models[0]", 'expected an object, as {"id": "capitals", "weight"'),
        (b'{"models": [{}]}', "models[0].id", "is missing"),
        (b'{"models": "a"}', "models", "expected a list"),
        (b'{"evaluation": {"txt": 1}}', "evaluation.txt", "unknown entry 'txt'; there are: "),
    ],
)
def test_what_is_wrong_with_the_form_of_a_request_is_said_in_words(server, body, where, text):
    headers = {"Content-Type": "application/json"}
    answer = server.ask("POST", f"{API}/experiments", body, headers)
    assert answer.status == 422
    found = answer.json["problems"][0]
    assert (found["where"], found["text"][: len(text)]) == (where, text)


def test_what_only_the_models_show_is_said_too(server):
    request = {"method": "linear", "models": [{"id": "capitals"}, {"id": "elements"}],
               "vocabulary": "nonsense"}  # fmt: skip
    answer = server.ask("POST", f"{API}/experiments/plan", request)
    assert answer.status == 422
    assert "vocabulary" in answer.json["problems"][0]["text"]


def test_whole_recipes_are_merged(server):
    recipe = (ROOT / "examples/recipes/stages.yml").read_text().replace("examples/tiny_llamas/", "")
    found = server.finished(server.merge({"recipe": recipe, "name": "stages"}))
    assert found["status"] == "completed", found
    assert [each["id"] for each in found["models"]] == ["base", "capitals", "elements", "animals"]


def test_adapters_are_merged_with_their_base(server):
    found = server.finished(
        server.merge({"method": "linear", "models": [{"id": "capitals-lora"}, {"id": "elements"}]})
    )
    assert found["status"] == "completed", found
    assert found["models"][0]["id"] == "base+capitals-lora"


def test_slices_of_different_models_have_no_findings_and_are_merged(server):
    recipe = """
merge_method: passthrough
slices:
- sources: [{model: capitals, layer_range: [0, 1]}]
- sources: [{model: elements, layer_range: [1, 2]}]
"""
    found = server.finished(server.merge({"recipe": recipe}))
    assert found["status"] == "completed", found
    assert "findings" not in found["links"]


def test_events_tell_how_far_it_is_until_the_end(server):
    key = server.merge()
    body = server.ask("GET", f"{API}/experiments/{key}/events").body.decode()
    events = [dict(line.split(": ", 1) for line in event.splitlines() if not line.startswith(":"))
              for event in body.strip().split("\n\n")]  # fmt: skip
    events = [event for event in events if event]
    assert [event["event"] for event in events[:-1]] == ["progress"] * (len(events) - 1)
    last = json.loads(events[-1]["data"])
    assert events[-1]["event"] == "end"
    assert (last["id"], last["status"], last["progress"]) == (key, "completed", 100)
    again = server.ask("GET", f"{API}/experiments/{key}/events").body.decode()
    assert again == f"event: end\ndata: {json.dumps(last)}\n\n"


def test_lists_come_in_pages_the_newest_first(server):
    keys = [server.merge() for _ in range(3)]
    first = server.get("/experiments?limit=2")
    assert [each["id"] for each in first["experiments"]] == keys[:0:-1]
    second = server.ask("GET", first["next"]).json
    assert second["experiments"][0]["id"] == keys[0]
    for key in keys:
        server.finished(key)


# Results


def test_the_zip_is_the_model(server, done, tmp_path):
    answer = server.ask("GET", done["links"]["download"])
    assert answer.headers["content-disposition"] == 'attachment; filename="Code-Chat-Model.zip"'
    assert int(answer.headers["content-length"]) == len(answer.body)
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        archive.extractall(tmp_path)
    for file in done["result"]["files"]:
        assert sha256(tmp_path / "Code-Chat-Model" / file["name"]) == file["sha256"]


def test_the_model_of_the_zip_loads_and_answers(server, done, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(io.BytesIO(server.ask("GET", done["links"]["download"]).body)) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "Code-Chat-Model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("capital: france =", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=2, do_sample=False)[0])
    assert "paris" in text


@pytest.mark.parametrize("path", ["download", "files/model.safetensors"])
def test_a_download_that_broke_off_goes_on(server, done, path):
    url = f"{done['links']['self']}/{path}"
    whole = server.ask("GET", url)
    half = len(whole.body) // 2
    headers = {"Range": f"bytes={half}-", "If-Range": whole.headers["etag"]}
    rest = server.ask("GET", url, headers=headers)
    assert (rest.status, rest.body) == (206, whole.body[half:])
    size = len(whole.body)
    assert rest.headers["content-range"] == f"bytes {half}-{size - 1}/{size}"
    changed = server.ask("GET", url, headers={**headers, "If-Range": '"other"'})
    assert (changed.status, len(changed.body)) == (200, size)
    beyond = server.ask("GET", url, headers={"Range": f"bytes={size}-"})
    assert beyond.status == 416
    assert beyond.headers["content-range"] == f"bytes */{size}"


def test_a_client_that_goes_away_leaves_nothing_open(server, done):
    def open_results():
        links = []
        for each in Path(f"/proc/{server.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                links.append(os.readlink(each))
        return [link for link in links if "/results/" in link]

    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", done["links"]["download"])
        connection.getresponse().read(10)
        connection.close()
    end = time.monotonic() + 10
    while open_results() and time.monotonic() < end:
        time.sleep(0.05)
    assert open_results() == []


def test_pages_of_a_result_run_no_scripts(server, done):
    answer = server.ask("GET", f"{done['links']['self']}/findings")
    assert "Conflicts of sign" in answer.body.decode()
    assert "sandbox" in answer.headers["content-security-policy"]


def test_an_evaluation_compares_sources_and_merge(server):
    """And another, while the process of the first is still ending, leaves the result."""
    asked = {"prompts": ["capital: france =", "symbol: gold ="], "text": "capital: france = paris"}
    key = server.merge({**CODE_AND_CHAT, "evaluation": asked})
    found = server.until(key, lambda found: "events" not in found["links"], 120)
    server.post(f"/experiments/{key}/evaluation", {"text": "symbol: gold = Au"})
    result = found["evaluation"]["result"]
    assert [(each["name"], each["role"]) for each in result["models"]] == [
        ("base", "base"),
        ("capitals", "source"),
        ("elements", "source"),
        ("merged", "merge"),
    ]
    assert found["evaluation"]["total_bytes"] == 4  # models
    merged = result["models"][-1]
    assert [each["text"].strip() for each in merged["answers"]] == ["paris", "Au"]
    assert merged["numbers"]["perplexity"] > 1
    page = server.ask("GET", found["links"]["comparison"])
    assert "perplexity" in page.body.decode()
    assert "sandbox" in page.headers["content-security-policy"]
    for body in (page.body, json.dumps(found).encode()):
        assert str(server.data).encode() not in body
        assert str(ROOT).encode() not in body
    server.worker(key)
    server.cancel(key)
    found = server.until(key, lambda found: "events" not in found["links"])
    assert found["evaluation"]["status"] == "cancelled"
    assert server.ask("HEAD", found["links"]["download"]).status == 200


def test_an_evaluation_has_something_to_compare_and_to_compare_by(server):
    key = server.merge()
    with server.frozen(key):
        early = server.ask("POST", f"{API}/experiments/{key}/evaluation", {"prompts": ["a"]})
    assert early.status == 409
    empty = server.ask("POST", f"{API}/experiments/{key}/evaluation", {})
    assert (empty.status, empty.json["problems"][0]["where"]) == (422, "evaluation")
    server.finished(key)


def test_no_answer_tells_of_folders(server, done):
    paths = ["/models", "/experiments", f"/experiments/{done['id']}", "/health", "/openapi.json"]
    paths += [f"/experiments/{done['id']}/{each}" for each in ("report", "findings")]
    bodies = [server.ask("GET", API + path).body for path in paths]
    bodies.append(server.ask("GET", done["links"]["download"]).body)
    for body in bodies:
        assert str(server.data).encode() not in body
        assert str(ROOT).encode() not in body


def test_what_is_not_there_is_said_in_the_same_form(server, done):
    for path in ("/nothing", "/experiments/exp-0", f"/experiments/{done['id']}/files/x"):
        answer = server.ask("GET", API + path)
        assert (answer.status, answer.json["success"]) == (404, False)
    assert server.ask("PUT", f"{API}/models").status == 405


# Changes of state


def test_what_waits_can_be_cancelled_and_removed(server):
    keys = [server.merge() for _ in range(3)]
    found = server.post(f"/experiments/{keys[-1]}/cancel")["experiment"]
    assert found["status"] == "cancelled"
    assert server.ask("POST", f"{API}/experiments/{keys[-1]}/cancel").status == 409
    assert server.ask("GET", f"{API}/experiments/{keys[-1]}/download").status == 409
    assert server.ask("DELETE", f"{API}/experiments/{keys[-1]}").json == {"success": True}
    assert server.ask("GET", f"{API}/experiments/{keys[-1]}").status == 404
    for key in keys[:2]:
        server.finished(key)
        server.ask("DELETE", f"{API}/experiments/{key}")
        assert not (server.data / "results" / key).exists()


def test_a_merge_that_runs_is_cancelled_and_leaves_nothing(tmp_path, large):
    with Server(tmp_path / "data", "--models", large) as server:
        key = server.merge(LARGE)
        with server.frozen(key):  # so that it is not done too early
            assert server.ask("DELETE", f"{API}/experiments/{key}").status == 409
            server.cancel(key)
            time.sleep(0.5)
        assert server.finished(key)["status"] == "cancelled"
        end = time.monotonic() + 10
        while (server.data / "results" / key).exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not (server.data / "results" / key).exists()
        assert server.finished(server.merge(LARGE))["status"] == "completed"  # the queue goes on


def test_a_killed_worker_is_followed_by_another(tmp_path, large):
    with Server(tmp_path / "data", "--models", large) as server:
        key = server.merge(LARGE)
        os.kill(server.worker(key), signal.SIGKILL)
        found = server.finished(key)
        assert found["status"] == "completed", found
        assert weights_of(found) == expected(tmp_path, LARGE, large)
        assert any("was killed" in step["text"] for step in found["history"])


def test_a_merge_survives_the_server(tmp_path, large):
    server = Server(tmp_path / "data", "--models", large)
    server.start()
    key, waiting = server.merge(LARGE), server.merge(LARGE)
    process = server.worker(key)
    server.kill()
    server.start()
    for each in (key, waiting):
        found = server.finished(each)
        assert found["status"] == "completed", found
        assert weights_of(found) == expected(tmp_path / each, LARGE, large)
        assert [step["state"] for step in found["history"]].count("completed") == 1
    assert server.stop() == 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        pytest.fail("a worker outlived its server")


def test_a_server_that_is_stopped_has_its_jobs_wait(tmp_path, large):
    server = Server(tmp_path / "data", "--models", large)
    server.start()
    key = server.merge(LARGE)
    server.worker(key)
    assert server.stop() == 0
    assert server.workers() == {}
    with server:
        assert server.finished(key)["status"] == "completed"


def test_a_job_held_before_the_machine_was_restarted_is_taken_up(tmp_path):
    server = Server(tmp_path / "data")
    server.start()
    key = server.merge()
    server.finished(key)
    server.stop()
    with contextlib.closing(sqlite3.connect(server.data / "jobs.sqlite3")) as db:
        db.execute(
            "UPDATE jobs SET state = 'running', holder = 'x', boot = 'before', pid = 1, born = 1, "
            "lease = 1e12"
        )
        db.commit()
    with server:
        found = server.finished(key)
    assert found["status"] == "completed"
    assert any("was restarted" in step["text"] for step in found["history"])


def test_one_server_works_with_a_data_folder(tmp_path):
    with Server(tmp_path / "data"), pytest.raises(RuntimeError, match="another server works"):
        Server(tmp_path / "data").start()


def test_a_port_that_is_taken_is_said(tmp_path, server):
    second = Server(tmp_path / "data")
    second.port = server.port
    with pytest.raises(RuntimeError, match=f"port {server.port}: Address already in use"):
        second.start()


# What is refused before it is begun


def test_slices_of_different_models_have_no_findings(server):
    layers = [{"model": name, "layer_range": [0, 1]} for name in ("capitals", "elements", "base")]
    slices = [{"sources": layers[:2]}, {"sources": layers[1:]}]
    recipe = json.dumps({"method": "linear", "slices": slices})
    assert server.post("/experiments/plan", {"recipe": recipe})["plan"]["tensors"]
    answer = server.ask("POST", f"{API}/experiments", {"recipe": recipe, "findings": True})
    assert answer.status == 422
    assert "slices have different ones" in answer.json["problems"][0]["text"]


def test_an_adapter_on_an_earlier_result_is_merged(server):
    first = {"name": "first", "method": "linear", "models": ["base", "elements"]}
    last = {"method": "linear", "models": ["first+capitals-lora", "capitals"]}
    recipe = "\n---\n".join(map(json.dumps, (first, last)))
    found = server.finished(server.merge({"recipe": recipe}))
    assert found["status"] == "completed", found
    assert {model["id"] for model in found["models"]} == {"base", "elements", "capitals"}


def test_an_adapter_can_be_the_base_by_its_id(server):
    request = {**TWO, "method": "ties", "base_model": "capitals-lora"}
    assert "base_model: base+capitals-lora" in server.post("/experiments/plan", request)["recipe"]


def test_a_recipe_may_come_with_what_is_empty(server):
    recipe = json.dumps({"method": "linear", "models": ["capitals", "elements"]})
    both = {"recipe": recipe, "method": None, "models": [], "parameters": {}}
    assert server.post("/experiments/plan", both)["plan"]["tensors"]


def test_an_evaluation_for_which_there_is_no_memory_is_refused(tmp_path):
    with Server(tmp_path / "data", "--max-memory", "900MB") as server:
        judged = {**TWO, "evaluation": {"prompts": ["a"]}}
        answer = server.ask("POST", f"{API}/experiments", judged)
        assert answer.status == 422
        assert answer.json["problems"][0]["where"] == "evaluation"
        key = server.merge()
        server.finished(key)
        path = f"{API}/experiments/{key}/evaluation"
        answer = server.ask("POST", path, {"prompts": ["a"]})
        assert answer.status == 422
        assert "takes about 1.00 GB" in answer.json["error"]


# Room


def test_the_queue_has_an_end(tmp_path, large):
    with Server(tmp_path / "data", "--queue", 2, "--models", large) as server:
        first = server.merge(LARGE)
        with server.frozen(first):
            server.merge()
            answer = server.ask("POST", f"{API}/experiments", TWO)
            assert answer.status == 429
            assert "the queue is full" in answer.json["error"]
        server.finished(first)


def test_a_merge_for_which_the_disk_has_no_room_is_refused(tmp_path):
    with Server(tmp_path / "data", "--disk-reserve", "1000000GB") as server:
        answer = server.ask("POST", f"{API}/experiments", TWO)
        assert answer.status == 409
        assert "on the disk" in answer.json["problems"][0]["text"]


def test_a_merge_for_which_there_is_no_memory_is_refused(tmp_path):
    with Server(tmp_path / "data", "--max-memory", "110MB") as server:
        answer = server.ask("POST", f"{API}/experiments", TWO)
        assert answer.status == 422
        assert "max_memory" in answer.json["problems"][0]["text"]


def test_results_are_removed_when_they_have_been_kept_long_enough(tmp_path):
    server = Server(tmp_path / "data")
    server.start()
    key = server.merge()
    server.finished(key)
    server.stop()
    with contextlib.closing(sqlite3.connect(server.data / "jobs.sqlite3")) as db:
        db.execute("UPDATE jobs SET finished = finished - 31 * 86400")
        db.commit()
    with server:
        found = server.until(key, lambda found: not found["result"]["available"])
        assert (found["status"], found["kept_until"]) == ("completed", None)
        answer = server.ask("GET", f"{API}/experiments/{key}/download")
        assert answer.status == 410
        folder = server.data / "results" / key
        server.until(key, lambda _: not folder.exists())


def test_old_results_make_way_for_new_ones(tmp_path):
    with Server(tmp_path / "data", "--max-results", "3MB") as server:
        keys = []
        for _ in range(4):
            keys.append(server.merge())
            server.finished(keys[-1])
        there = [server.experiment(key)["result"]["available"] for key in keys]
        assert there[-1]
        assert not there[0]
        small = server.ask(
            "POST", f"{API}/experiments", {**TWO, "dtype": "float32", "max_shard_size": "1GB"}
        )
        assert small.status == 201


# The server itself


def test_the_server_stays_small(server, done):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert not any(name in maps for name in ("libtorch", "numba", "llvmlite"))
    resident = int(status.split("VmRSS:")[1].split()[0])
    assert resident < 150_000  # KB


def test_plans_end_in_time(tmp_path):
    with Server(tmp_path / "data", "--plan-seconds", "0.01") as server:
        answer = server.ask("POST", f"{API}/experiments/plan", TWO)
        assert answer.status == 422
        assert "took longer than 0.01 s" in answer.json["error"]
        assert server.get("/health")["status"] == "ok"


def test_a_model_that_has_just_come_is_known_at_once(tmp_path):
    root = tmp_path / "models"
    root.mkdir()
    with Server(tmp_path / "data", "--models", root) as server:
        assert "new" not in {each["id"] for each in server.get("/models")["models"]}
        make_llama(root / "new", seed=1)
        both = {"method": "linear", "models": [{"id": "new"}, {"id": "new"}]}
        assert server.post("/experiments/plan", both)["plan"]["tensors"] > 0


def test_beyond_loopback_every_request_needs_the_token(tmp_path):
    token = {"LLAMA_MERGE_TOKEN": "0123456789abcdef"}
    with Server(tmp_path / "data", "--host", "0.0.0.0", environment=token) as server:
        assert server.ask("GET", f"{API}/models").status == 401
        for given in (
            "Bearer wrong",
            "Bearer",
            "Basic 0123456789abcdef",
            "Bearer 0123456789ABCDEF",
        ):
            assert (
                server.ask("GET", f"{API}/models", headers={"Authorization": given}).status == 401
            )
        right = {"Authorization": "Bearer 0123456789abcdef"}
        assert server.ask("GET", f"{API}/models", headers=right).status == 200


def test_beyond_loopback_a_token_is_made(tmp_path):
    with Server(tmp_path / "data", "--host", "0.0.0.0") as server:
        while not server.said[-1].startswith("token: "):
            time.sleep(0.01)
        token = server.said[-1].removeprefix("token: ").strip()
        assert len(token) >= 32
        right = {"Authorization": f"Bearer {token}"}
        assert server.ask("GET", f"{API}/models", headers=right).status == 200
        assert server.ask("GET", f"{API}/models").status == 401


def test_without_its_packages_the_command_says_what_to_install(tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ImportError('no', name='fastapi')")
    done = subprocess.run(
        [sys.executable, ROOT / "start.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "pip install 'llama-merge[service]'" in done.stderr


def test_the_command_of_merges_serves_too(tmp_path):
    command = [sys.executable, "-m", "merge", "serve", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--hub-downloads" in done.stdout


def test_many_watch_at_once(tmp_path, large):
    with Server(tmp_path / "data", "--models", large, "--watchers", 20) as server:
        key = server.merge(LARGE)
        ends = []

        def watch():
            while (answer := server.ask("GET", f"{API}/experiments/{key}/events")).status == 429:
                time.sleep(0.05)  # the main thread was faster
            body = answer.body.decode()
            ends.append(body.rstrip().rpartition("event: ")[2].split("\n")[0])

        threads = [threading.Thread(target=watch) for _ in range(20)]
        with server.frozen(key):
            for thread in threads:
                thread.start()
            end = time.monotonic() + 20
            while True:  # until all have come, one more is sent away
                answer = server.ask("GET", f"{API}/models")
                assert answer.status == 200
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
                connection.request("GET", f"{API}/experiments/{key}/events")
                status = connection.getresponse().status
                connection.close()
                if status == 429:
                    break
                assert time.monotonic() < end
                time.sleep(0.1)
        for thread in threads:
            thread.join(60)
        assert set(ends) <= {"end", "progress"}


def test_the_data_folder_is_its_owners(server):
    for path in (server.data, server.data / "results", server.data / "logs"):
        assert path.stat().st_mode & 0o077 == 0


# The page that says how to use it


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_of_the_page_work_as_they_stand(tmp_path, server):
    """From create to download; but for the port, and the id that the first answer has."""
    text = (ROOT / "docs/how_to/serve.md").read_text()
    (block,) = (each for each in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
                if "curl" in each)  # fmt: skip
    commands = [each for each in re.split(r"\n\n", block) if "curl" in each]
    assert len(commands) == 4
    key, answers = "", []
    for command in commands:
        line = command.replace("localhost:5007", f"localhost:{server.port}").replace("{id}", key)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if done.stdout:
            answers.append(json.loads(done.stdout))
            assert answers[-1]["success"]
        if "experiment_id" in answers[-1]:
            key = answers[-1]["experiment_id"]
            server.finished(key)
    assert answers[-1]["experiments"][0]["id"] == key
    with zipfile.ZipFile(tmp_path / "merged.zip") as archive:
        assert archive.testzip() is None


def test_the_page_lists_every_request_of_the_api(server):
    text = (ROOT / "docs/how_to/serve.md").read_text()
    described = server.ask("GET", f"{API}/openapi.json").json["paths"]
    for path in described:
        short = path.removeprefix(API).replace("{key}", "{id}")
        last = short.rpartition("/")[2]
        assert short in text or f"`/{last}`" in text, path


def test_the_page_has_a_recipe_that_is_merged(server):
    text = (ROOT / "docs/how_to/serve.md").read_text()
    (content,) = re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)
    assert server.finished(server.merge(json.loads(content)))["status"] == "completed"
