"""Models are found, and called the same as long as they are the same."""

import json

import pytest

pytest.importorskip("fastapi")

from tiny_checkpoints import make_llama

from service import registry
from service.registry import names_of, scan


def scanned(*roots):
    """What is found below some folders, by id, without the Hub's models."""
    found = scan([str(root) for root in roots], None, [], False)
    return {each["id"]: each for each in found if each["hub_id"] is None}


def cached(cache, name, commit, *, main=False, seed=1):
    """A version of a Hub model as it lies in a cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    make_llama(folder / "snapshots" / commit, seed=seed)
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def adapter(folder, base):
    """An adapter's folder, as far as a scan looks."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")


def test_the_plain_id_of_a_cached_model_is_that_of_the_version_it_stands_for(tmp_path):
    old = cached(tmp_path, "org/chat", "a" * 40)
    new = cached(tmp_path, "org/chat", "b" * 40, main=True)
    found = scanned(tmp_path)
    assert found["org-chat"]["source"] == str(new)
    (other,) = found.keys() - {"org-chat"}
    assert found[other]["source"] == str(old)
    assert {each["name"] for each in found.values()} == {"org/chat"}


def test_adapters_find_their_base_by_folder_by_name_on_the_hub_and_by_last_name(tmp_path):
    hub = cached(tmp_path / "cache", "org/Base-1B", "c" * 40, main=True)
    make_llama(tmp_path / "models" / "own", seed=2)
    adapter(tmp_path / "models" / "by-name", "org/Base-1B")
    adapter(tmp_path / "models" / "by-folder", hub)
    adapter(tmp_path / "models" / "by-last", "/elsewhere/own")
    adapter(tmp_path / "models" / "alone", "org/not-there")
    found = scanned(tmp_path / "models", tmp_path / "cache")
    bases = {key: each["base"] for key, each in found.items() if each["kind"] == "adapter"}
    assert bases == {
        "by-name": "org-Base-1B", "by-folder": "org-Base-1B", "by-last": "own", "alone": None,
    }  # fmt: skip
    entries = {key: registry.Entry(**each) for key, each in found.items()}
    assert names_of(entries).bases == bases


def test_what_is_passed_over_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(registry, "MOST_MODELS", 2)
    for number in range(3):
        make_llama(tmp_path / str(number), seed=number)
    assert scanned(tmp_path).keys() == {"0", "1"}
    assert "3 models, of which the first 2 are offered" in capfd.readouterr().err
    monkeypatch.setattr(registry, "MOST_FOLDERS", 2)
    scanned(tmp_path)
    assert "more than 2 folders" in capfd.readouterr().err


def test_results_of_services_are_no_models(tmp_path):
    make_llama(tmp_path / "own", seed=1)
    make_llama(tmp_path / "data" / "results" / "exp-1" / "model", seed=2)
    (tmp_path / "data" / "jobs.sqlite3").write_bytes(b"")
    assert scanned(tmp_path).keys() == {"own"}
    assert scanned(tmp_path / "data" / "results").keys() == {"exp-1-model"}  # asked for by name
