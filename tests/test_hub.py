"""Models by Hub id, from a stand-in for the Hub: downloaded once, refused with a reason.

huggingface_hub reads its settings when it is imported, so everything runs in subprocesses.
"""

import os
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest
from hub_stand_in import HubStandIn, Reply
from tiny_checkpoints import make_llama, tensor_hashes

ROOT = Path(__file__).resolve().parent.parent
DEAD = "http://127.0.0.1:9"  # nothing listens there
UNWANTED = ("pytorch_model.bin", "optimizer.pt", "modeling.py", "model.gguf")
FIND = """
import sys
from model_errors import ModelCompatibilityError
from model_locate import find_model_folder
try:
    print(find_model_folder(sys.argv[1]))
except ModelCompatibilityError as error:
    print(error)
"""
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


def test_every_unknown_id_is_refused_and_nothing_is_written(hub, tmp_path):
    with hub as url:
        result = merge("org/x", "org/a", "org/y", "--save", "out",
                       url=url, cache="cache", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 3
    assert result.stderr.splitlines() == [
        f"error: {name}: no such folder, and no such model on the Hub (or it is private). "
        "Check the name; for a private model set HF_TOKEN"
        for name in ("org/x", "org/y")
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
    monkeypatch.setattr(hub_stand_in, "answer", lambda root, path: gated)
    with hub as url:
        assert find("org/a", url=url, cache="cache", cwd=tmp_path) == (
            "org/a: access to this Hub model must be requested on its page. "
            "Request it, then log in with `hf auth login` or set HF_TOKEN"
        )


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
