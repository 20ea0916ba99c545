"""Models by Hub id, from a stand-in for the Hub: downloaded once, refused with a reason.

huggingface_hub reads its settings when it is imported, so everything runs in subprocesses.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest
import torch
from hub_stand_in import HubStandIn, Reply
from tiny_adapters import change_of, make_lora
from tiny_checkpoints import make_llama, read_tensors, tensor_hashes

from model_errors import ModelCompatibilityError
from model_partial import PartialFolder
from model_utils import format_bytes, open_model_folder

ROOT = Path(__file__).resolve().parent.parent
DEAD = "http://127.0.0.1:9"  # nothing listens there
UNWANTED = ("pytorch_model.bin", "optimizer.pt", "modeling.py", "model.gguf")
FIND = """
import sys
from model_utils import format_bytes
from model_errors import ModelCompatibilityError
from model_locate import find_model_folder
try:
    print(find_model_folder(sys.argv[1]))
except ModelCompatibilityError as error:
    print(error)
"""
OPEN = """
import json, sys
import numpy as np
from model_utils import format_bytes
from model_errors import ModelCompatibilityError
from model_utils import open_model_folder

def read(model):
    buffer = np.empty(4096, dtype=np.uint8)
    try:
        return model.read_rows("model.norm.weight", 0, 1, buffer).shape
    except ModelCompatibilityError as error:
        return str(error)

for name in sys.argv[2:]:
    try:
        with open_model_folder(name, weights=sys.argv[1] == "True") as model:
            opened = {"path": str(model.path), "config": model.config, "tensors": model.tensors}
            print(json.dumps(opened | {"bytes": model.download_bytes, "norm": read(model)}))
    except ModelCompatibilityError as error:
        print(json.dumps(str(error)))
assert "transformers" not in sys.modules
"""
HEADER_REQUEST = 100_001  # what huggingface_hub asks for to read a header
WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256, "dtype": "float32"}
GATED_TEXT = (
    "access to this Hub model must be requested on its page. "
    "Request it, then log in with `hf auth login` or set HF_TOKEN"
)
UNKNOWN_TEXT = (
    "no such folder, and no such model on the Hub (or it is private). "
    "Check the name; for a private model set HF_TOKEN"
)
OFFLINE_TEXT = (
    "no such folder, not in the Hub cache, and the Hub cannot be reached (LocalEntryNotFoundError)."
    " Go online once to download it, or give a local folder"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with org/a and org/b, fine-tunes of one base; org/a holds files not to be taken."""
    root = tmp_path_factory.mktemp("hub")
    make_llama(root / "org/a", tokenizer=True)
    make_llama(root / "org/b", seed=1, base=root / "org/a", shards=2)
    (root / "org/a/LICENSE").write_text("free")
    for unwanted in UNWANTED:
        (root / "org/a" / unwanted).write_bytes(b"not to be downloaded")
    return HubStandIn(root)


def run(*arguments, url, cache, cwd, **settings):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    fixed = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=kept | fixed | {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)} | settings,
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def merge(*arguments, **where):
    return run(ROOT / "linear_llama.py", "--quiet", "--ft_models", *arguments, **where)


def find(model, **where):
    """What `find_model_folder` answers: a folder or a refusal."""
    result = run("-c", FIND, model, **where)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.strip()


def open_models(*models, weights=False, **where):
    """What `open_model_folder` makes of each model: a dictionary, or the text of a refusal."""
    result = run("-c", OPEN, str(weights), *models, **where)
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


def described(folder):
    """Config and tensors of a local folder, as `open_models` gives them, or its refusal."""
    try:
        with open_model_folder(folder) as model:
            return json.loads(json.dumps({"config": model.config, "tensors": model.tensors}))
    except ModelCompatibilityError as error:
        return str(error)


def weight_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


@pytest.fixture(scope="module")
def merged(hub, tmp_path_factory):
    """A folder with a cache and the result of merging org/a and org/b, fresh from the Hub."""
    place = tmp_path_factory.mktemp("merged")
    with hub as url:
        result = merge("org/a", "org/b", "--save", "out", url=url, cache="cache", cwd=place)
    assert result.returncode == 0, result.stderr
    return place


def test_models_are_downloaded_into_the_cache_and_merged(hub, merged):
    local = merge(hub.root / "org/a", hub.root / "org/b", "--save", "local",
                  url=DEAD, cache="empty", cwd=merged)  # fmt: skip
    assert local.returncode == 0, local.stderr
    assert tensor_hashes(merged / "out") == tensor_hashes(merged / "local")
    assert (merged / "out/LICENSE").read_text() == "free"
    assert not (merged / "empty").exists()


def test_only_what_a_merge_needs_is_downloaded(hub, merged):
    snapshot = next((merged / "cache/hub/models--org--a/snapshots").iterdir())
    assert set(os.listdir(snapshot)) == set(os.listdir(hub.root / "org/a")) - set(UNWANTED)
    assert not [path for _, path in hub.requests if path.endswith(UNWANTED)]


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_second_merge_needs_no_network(merged, tmp_path, settings):
    result = merge("org/a", "org/b", "--save", tmp_path / "again",
                   url=DEAD, cache="cache", cwd=merged, **settings)  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert tensor_hashes(tmp_path / "again") == tensor_hashes(merged / "out")


def test_weights_in_the_cache_are_not_downloaded_again_and_new_ones_are(tmp_path):
    hub = HubStandIn(tmp_path / "hub")
    downloads, folders = [], []
    with hub as url:
        for seed in (0, 0, 1):
            make_llama(tmp_path / "hub/org/a", seed=seed)
            folders.append(find("org/a", url=url, cache="cache", cwd=tmp_path))
            downloads.append(hub.count("GET", ".safetensors"))
    assert downloads == [1, 1, 2]
    assert folders[0] == folders[1] != folders[2]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A Hub, a cache, and what the Hub's models are without their weights, by name."""
    place = tmp_path_factory.mktemp("planned")
    hub = HubStandIn(place / "hub")
    make_llama(hub.root / "org/single", **WIDE, tokenizer=True)
    make_llama(hub.root / "org/sharded", **WIDE, seed=1, shards=3)
    make_llama(hub.root / "org/both", **WIDE, seed=2)
    (hub.root / "org/both/model.safetensors.index.json").write_text("not an index")
    for unwanted in ("consolidated.safetensors", "original/model.safetensors", "model.gguf"):
        (hub.root / "org/both" / unwanted).parent.mkdir(exist_ok=True)
        (hub.root / "org/both" / unwanted).write_bytes(bytes(1000))
    names = ("org/single", "org/sharded", "org/both")
    with hub as url:
        opened = open_models(*names, url=url, cache="cache", cwd=place)
    return place, hub, dict(zip(names, opened, strict=True))


@pytest.mark.parametrize("name", ["org/single", "org/sharded", "org/both"])
def test_without_weights_a_model_is_described_as_with_them(planned, name):
    _, hub, opened = planned
    assert opened[name] == opened[name] | described(hub.root / name)
    assert len(opened[name]["tensors"]) == 21


def test_without_weights_only_headers_and_small_files_are_fetched(planned):
    place, hub, opened = planned
    assert hub.count("GET", ".safetensors") == 5
    assert 0 < hub.count_bytes(".safetensors") <= 5 * HEADER_REQUEST
    for name, model in opened.items():
        small = [file for file in (hub.root / name).iterdir() if file.suffix in (".json", ".jinja")]
        assert set(os.listdir(place / model["path"])) == {file.name for file in small}
    kept = [file for file in (place / "cache").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in kept) < HEADER_REQUEST


def test_headers_and_sizes_are_those_of_the_revision_of_the_small_files(planned):
    _, hub, opened = planned
    for name, model in opened.items():
        revision = Path(model["path"]).name
        assert hub.count("GET", f"/{name}/revision/{revision}") == 1
        paths = [path for _, path in hub.requests if f"/{name}/resolve/" in path]
        assert paths == [path for path in paths if f"/{revision}/" in path]


def test_the_bytes_left_to_download_are_those_of_the_weight_files(planned):
    _, hub, opened = planned
    for name, model in opened.items():
        assert model["bytes"] == weight_bytes(hub.root / name) > 1_000_000


def test_where_sizes_are_not_said_those_of_the_tensors_count(planned, tmp_path, monkeypatch):
    _, hub, before = planned
    answer = hub_stand_in.answer
    monkeypatch.setattr(hub_stand_in, "answer", lambda root, url: answer(root, url.split("?")[0]))
    with HubStandIn(hub.root) as url:
        [model] = open_models("org/single", url=url, cache="cache", cwd=tmp_path)
    sizes = [4 * math.prod(shape) for _, shape in before["org/single"]["tensors"].values()]
    assert model["bytes"] == sum(sizes) < before["org/single"]["bytes"]


def test_rows_of_weights_that_are_not_downloaded_are_refused(planned):
    for name, model in planned[2].items():
        assert model["norm"] == (
            f"{name}: model.norm.weight cannot be read: its weights are not downloaded, only its "
            "header was read. Open the model with its weights"
        )


def test_weights_are_downloaded_after_a_look_at_their_headers(planned, tmp_path):
    place, hub, before = planned
    shutil.copytree(place / "cache", tmp_path / "cache", symlinks=True)
    hub = HubStandIn(hub.root)
    with hub as url:
        opened = open_models(*before, weights=True, url=url, cache="cache", cwd=tmp_path)
    sizes = [weight_bytes(hub.root / name) for name in before]
    assert hub.count_bytes(".safetensors") == sum(sizes)
    revisions = [path.rsplit("/", 1)[1] for _, path in hub.requests if "/revision/" in path]
    assert revisions == ["main"] * 3  # sizes are not asked for
    for name, model in zip(before, opened, strict=True):
        now = {"path": before[name]["path"].replace(str(place), str(tmp_path))}
        assert model == before[name] | now | {"bytes": 0, "norm": [1, 128]}


def test_only_headers_of_weights_that_the_cache_lacks_are_fetched(hub, merged, tmp_path):
    shutil.copytree(merged / "cache", tmp_path / "cache", symlinks=True)
    shard = "model-00002-of-00002.safetensors"
    next((tmp_path / "cache").rglob(shard)).unlink()
    hub = HubStandIn(hub.root)
    with hub as url:
        whole, part = open_models("org/a", "org/b", url=url, cache="cache", cwd=tmp_path)
    assert [path.rsplit("/")[-1] for _, path in hub.requests if ".safetensors" in path] == [shard]
    assert whole == whole | described(hub.root / "org/a") | {"bytes": 0, "norm": [1, 32]}
    assert part == part | described(hub.root / "org/b")
    assert part["bytes"] == (hub.root / "org/b" / shard).stat().st_size
    assert "cannot be read" in part["norm"]


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_cached_model_is_described_and_read_without_a_network(hub, merged, settings):
    opened = open_models("org/a", "org/b", url=DEAD, cache="cache", cwd=merged, **settings)
    for name, model in zip(("org/a", "org/b"), opened, strict=True):
        assert model == model | described(hub.root / name) | {"bytes": 0, "norm": [1, 32]}


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_small_files_alone_do_not_describe_a_model_without_a_network(planned, settings):
    names = ("org/single", "org/sharded", "org/neither")
    refused = open_models(*names, url=DEAD, cache="cache", cwd=planned[0], **settings)
    assert refused == [f"{name}: {OFFLINE_TEXT}" for name in names]


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_folder_is_opened_alike_without_weights(tmp_path, name):
    make_llama(tmp_path / name, shards={"one": 1, "two": 2}[name])
    with (
        open_model_folder(tmp_path / name) as model,
        open_model_folder(tmp_path / name, weights=False) as same,
    ):
        assert (same.tensors, same.config) == (model.tensors, model.config)
        assert same.download_bytes == 0


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        (Reply(403, headers={"X-Error-Code": "GatedRepo"}), [GATED_TEXT] * 3),
        (Reply(404, headers={"X-Error-Code": "RepoNotFound"}), [UNKNOWN_TEXT] * 3),
        (Reply(500), [OFFLINE_TEXT, OFFLINE_TEXT, "the download from the Hub broke off (HfHub"]),
    ],
)
def test_a_refusal_reads_alike_whatever_was_asked_for(tmp_path, monkeypatch, reply, texts):
    refused = {"org/found": "/api/", "org/listed": "blobs=", "org/header": ".safetensors"}

    answer = hub_stand_in.answer

    def answer_some(root, url):
        refuse = any(name in url and part in url for name, part in refused.items())
        return reply if refuse else answer(root, url)

    for name in refused:
        make_llama(tmp_path / "hub" / name)
    monkeypatch.setattr(hub_stand_in, "answer", answer_some)
    with HubStandIn(tmp_path / "hub") as url:
        answers = open_models(*refused, url=url, cache="cache", cwd=tmp_path)
    for name, text, said in zip(refused, texts, answers, strict=True):
        assert said.startswith(f"{name}: {text}")


@pytest.fixture
def broken(tmp_path):
    """A Hub with models whose list of files or index is not as it should be."""
    folder = tmp_path / "hub/org"
    for name in ("outside", "swapped", "shardless"):
        make_llama(folder / name, shards=2)
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    edit_index(folder / "outside", {first: f"../{first}"})
    edit_index(folder / "swapped", {first: second, second: first})
    (folder / "shardless" / second).unlink()
    for name, weights in (("pickle", "pytorch_model.bin"), ("strange", "other.safetensors")):
        make_llama(folder / name)
        (folder / name / "model.safetensors").rename(folder / name / weights)
    return HubStandIn(tmp_path / "hub")


def edit_index(folder, changes):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = {name: changes.get(file, file) for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index | {"weight_map": files}))


@pytest.mark.parametrize("weights", [True, False])
def test_a_broken_model_is_refused_on_the_hub_as_it_is_in_a_folder(broken, tmp_path, weights):
    names = [f"org/{folder.name}" for folder in sorted((broken.root / "org").iterdir())]
    with broken as url:
        answers = open_models(*names, weights=weights, url=url, cache="cache", cwd=tmp_path)
    folders = [broken.root / name for name in names]
    texts = [
        described(folder).replace(str(folder), name)
        for folder, name in zip(folders, names, strict=True)
    ]
    assert answers == texts
    assert "org/pickle: has only pickle weights (pytorch_model.bin)" in answers[1]
    assert not broken.count("GET", ".bin")


def test_a_corrupt_header_on_the_hub_is_refused(tmp_path):
    entry = '{"x": {"dtype": "%s", "shape": %s, "data_offsets": [0, 4]}}'
    texts = {
        "not JSON": "header is not json-encoded",
        entry % ("F32", [2]): "'x' with F32 [2] does not fill its bytes (0, 4)",
        entry % ("F99", [1]): "'x' with F99 [1] does not fill its bytes (0, 4)",
        entry % ("F32", 1): "'x' with F32 1 does not fill its bytes (0, 4)",
    }
    names = [f"org/{number}" for number in range(len(texts))]
    for name, header in zip(names, texts, strict=True):
        content = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
        (make_llama(tmp_path / "hub" / name) / "model.safetensors").write_bytes(content)
    with HubStandIn(tmp_path / "hub") as url:
        answers = open_models(*names, url=url, cache="cache", cwd=tmp_path)
    for name, text, said in zip(names, texts.values(), answers, strict=True):
        assert said.startswith(f"{name}: a safetensors header on the Hub is corrupt: ")
        assert text in said


def test_every_unknown_id_is_refused_and_nothing_is_written(hub, tmp_path):
    with hub as url:
        result = merge("org/x", "org/a", "org/y", "--save", "out",
                       url=url, cache="cache", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 3
    assert result.stderr.splitlines() == [
        f"error: {name}: {UNKNOWN_TEXT}" for name in ("org/x", "org/y")
    ]
    assert os.listdir(tmp_path) == ["cache"]


def test_an_uncached_id_without_a_network_is_refused(tmp_path):
    result = merge("org/a", "--plan", url=DEAD, cache="cache", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (3, f"error: org/a: {OFFLINE_TEXT}\n")


def test_an_uncached_id_in_offline_mode_is_refused_without_asking(hub, tmp_path):
    asked = len(hub.requests)
    with hub as url:
        answer = find("org/a", url=url, cache="cache", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert answer == f"org/a: {OFFLINE_TEXT}"
    assert len(hub.requests) == asked


def test_a_model_that_needs_permission_says_how_to_get_it(hub, tmp_path, monkeypatch):
    gated = Reply(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
    monkeypatch.setattr(hub_stand_in, "answer", lambda root, url: gated)
    with hub as url:
        assert find("org/a", url=url, cache="cache", cwd=tmp_path) == f"org/a: {GATED_TEXT}"


def test_a_folder_is_preferred_to_a_hub_model_of_that_name(hub, tmp_path):
    make_llama(tmp_path / "org/a")
    asked = len(hub.requests)
    with hub as url:
        assert find("org/a", url=url, cache="cache", cwd=tmp_path) == "org/a"
    assert len(hub.requests) == asked


def test_a_snapshot_that_something_else_cached_is_enough(hub, tmp_path):
    fetch = (
        "import sys; from huggingface_hub import snapshot_download; "
        "snapshot_download('org/a', allow_patterns=['config.json', '*.safetensors'])"
    )
    with hub as url:
        run("-c", fetch, url=url, cache="cache", cwd=tmp_path)
    found = find("org/a", url=DEAD, cache="cache", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert sorted(os.listdir(found)) == ["config.json", "model.safetensors"]
    [model] = open_models("org/a", url=DEAD, cache="cache", cwd=tmp_path)
    assert model == model | described(hub.root / "org/a") | {"bytes": 0, "norm": [1, 32]}


@pytest.mark.parametrize(
    ("model", "url", "text"),
    [
        ("org/a--b", DEAD, "not a name that a Hub model can have. Check the path"),
        ("org/a", "nowhere", "the download from the Hub broke off (UnsupportedProtocol: "),
    ],
)
def test_ids_and_downloads_that_fail_are_refused(tmp_path, model, url, text):
    answer = find(model, url=url, cache="cache", cwd=tmp_path)
    assert answer.startswith(f"{model}: ")
    assert text in answer


def test_a_hub_repository_that_is_no_model_is_told_from_one(tmp_path):
    for name, file in (("gguf", "params.json"), ("adapter", "adapter_config.json")):
        (tmp_path / "hub/org" / name).mkdir(parents=True)
        (tmp_path / "hub/org" / name / file).write_text("{}")
    with HubStandIn(tmp_path / "hub") as url:
        answers = open_models("org/gguf", "org/adapter", url=url, cache="cache", cwd=tmp_path)
    assert answers[0].startswith("org/gguf: this Hub model has no config.json, so it is no model")
    assert answers[1].startswith("org/adapter: is a LoRA adapter, not a model (it has adapter_conf")


def test_a_plan_downloads_no_weights_and_says_how_much_there_would_be(tmp_path):
    hub = HubStandIn(tmp_path / "hub")
    models = [make_llama(hub.root / f"org/{name}", shards=2, **WIDE) for name in "ab"]
    with hub as url:
        result = merge(
            "org/a", "org/b", "--plan", "--save", "out", url=url, cache="cache", cwd=tmp_path
        )
    assert (result.returncode, result.stderr) == (0, "")
    download = sum(map(weight_bytes, models))
    assert f"download    {format_bytes(download)}\n" in result.stdout
    assert 0 < hub.count_bytes(".safetensors") <= 4 * HEADER_REQUEST < download / 2
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_models_that_do_not_fit_are_refused_before_any_weights_are_downloaded(tmp_path):
    make_llama(tmp_path / "hub/org/a", **WIDE)
    make_llama(tmp_path / "hub/org/b", layers=1, **WIDE)
    hub = HubStandIn(tmp_path / "hub")
    with hub as url:
        result = merge("org/a", "org/b", "--save", "o", url=url, cache="cache", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (3, "")
    assert "error: org/b: 9 tensors" in result.stderr
    assert 0 < hub.count_bytes(".safetensors") <= 2 * HEADER_REQUEST
    assert not [*(tmp_path / "cache").rglob("model.safetensors")]


def test_an_output_that_another_run_makes_costs_no_download(tmp_path):
    for name in "ab":
        make_llama(tmp_path / f"hub/org/{name}", **WIDE)
    hub = HubStandIn(tmp_path / "hub")
    with hub as url, PartialFolder(tmp_path / "out"):
        result = merge("org/a", "org/b", "--save", "out", url=url, cache="cache", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (7, "")
    assert not [*(tmp_path / "cache").rglob("model.safetensors")]


def test_a_revision_is_looked_for_and_one_that_is_not_there_refused(hub, tmp_path):
    with hub as url:
        found = find("org/a@main", url=url, cache="cache", cwd=tmp_path)
        answer = find("org/a@v9", url=url, cache="cache", cwd=tmp_path)
    assert "models--org--a/snapshots/" in found
    assert (
        answer
        == "org/a@v9: this Hub model has no such revision. Give a branch, tag or commit it has"
    )
    again = find("org/a@main", url=DEAD, cache="cache", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert again == found


def test_what_only_the_last_of_several_recipes_names_is_downloaded_too(tmp_path):
    hub = HubStandIn(tmp_path / "hub")
    for name in "abc":
        make_llama(hub.root / f"org/{name}", **WIDE)
    text = "name: first\nmethod: {}\nmodels: [org/a, org/b]\n---\nmethod: linear\n"
    for method in ("linear", "nuslerp\nparameters: {nuslerp_flatten: false}"):
        (tmp_path / "r.yml").write_text(text.format(method) + "models: [first, org/c]\n")
        with hub as url:
            result = run(
                ROOT / "merge.py", "r.yml", f"out-{method[:3]}", "--quiet",
                url=url, cache=f"cache-{method[:3]}", cwd=tmp_path,
            )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, "")


def test_a_recipe_of_hub_models_is_planned_without_weights_and_merged_from_the_cache(tmp_path):
    hub = HubStandIn(tmp_path / "hub")
    models = [make_llama(hub.root / f"org/{name}", tokenizer=True, **WIDE) for name in "ab"]
    text = "merge_method: linear\nparameters: {weight: 0.5}\nmodels:\n"
    (tmp_path / "r.yml").write_text(text + "- model: org/a@main\n- model: org/b\n")
    arguments = (ROOT / "merge.py", "r.yml", "out", "--quiet")
    with hub as url:
        planned = run(*arguments, "--plan", url=url, cache="cache", cwd=tmp_path)
        assert not [*(tmp_path / "cache").rglob("*.safetensors")]
        merged = run(*arguments, url=url, cache="cache", cwd=tmp_path)
    assert (planned.returncode, planned.stderr) == (0, "")
    each = [format_bytes(weight_bytes(model)) for model in models]
    assert f"download    {format_bytes(sum(map(weight_bytes, models)))}\n" in planned.stdout
    assert f"\n  org/a@main: {each[0]}\n  org/b: {each[1]}\n" in planned.stdout
    assert (merged.returncode, merged.stderr) == (0, "")
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["base_models"] == ["org/a", "org/b"]
    assert report["revisions"].keys() == {"org/a@main", "org/b"}


def test_a_base_with_an_adapter_is_planned_without_weights_and_merged(tmp_path):
    hub = HubStandIn(tmp_path / "hub")
    base = make_llama(tmp_path / "hub/org/base", layers=1)
    make_lora(tmp_path / "hub/org/chat", base, changes={"base_model_name_or_path": "org/base"})
    where = {"url": None, "cache": "cache", "cwd": tmp_path}
    with hub as url:
        where["url"] = url
        planned = merge("org/base+org/chat", "--plan", "--json", **where)
        assert not [*(tmp_path / "cache").rglob("*.safetensors")]
        done = merge("org/base+org/chat", "--save", "out", **where)
        alone = run(
            ROOT / "ties_llama.py", "--quiet", "org/base", "--ft_models", "org/chat",
            "--densities", "1", "--save", "alone", **where,
        )  # fmt: skip
    assert planned.returncode == done.returncode == 0, done.stderr
    assert alone.returncode == 0, alone.stderr
    [model] = json.loads(planned.stdout)["models"]
    adapter = (tmp_path / "hub/org/chat/adapter_model.safetensors").stat().st_size
    assert model["download_bytes"] == weight_bytes(base) + adapter
    saved = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert saved["base_models"] == ["org/base", "org/chat"]
    assert saved["revisions"].keys() == {"org/base", "org/chat"}
    assert saved["models"] == ["org/base+org/chat"]
    expected = change_of(tmp_path / "hub/org/chat", base)
    found = read_tensors(tmp_path / "out")
    assert all(torch.equal(value.bfloat16(), found[name]) for name, value in expected.items())
