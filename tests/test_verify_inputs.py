"""Weight files are compared with the SHA-256 that are known of them."""

import hashlib
import json
import math
import os
import signal

import pytest
from safetensors.numpy import load_file, save_file
from tiny_adapters import make_lora
from tiny_checkpoints import make_llama

import lora_llama
from linear_llama import linear_merge_llama, linear_merge_llama_to_folder, main
from model_errors import ModelCompatibilityError
from model_hashes import verify_files
from model_utils import FileState, WeightFile

COMMIT = "c" * 40


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path, offset=-5):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def snapshot(folder, model):
    """The model in the cache of the Hub, as huggingface_hub lays it out."""
    place = folder / "models--org--a" / "snapshots" / COMMIT
    blobs = folder / "models--org--a" / "blobs"
    for each in (place, blobs):
        each.mkdir(parents=True)
    for file in model.iterdir():
        name = digest(file) if file.suffix == ".safetensors" else f"etag-{file.name}"
        (blobs / name).write_bytes(file.read_bytes())
        (place / file.name).symlink_to(os.path.relpath(blobs / name, place))
    return place


def downloaded(folder, model):
    """The model in a folder that `hf download --local-dir` has filled."""
    place = folder / "local"
    place.mkdir()
    for file in model.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    metadata = place / ".cache/huggingface/download/model.safetensors.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"{COMMIT}\n{digest(place / 'model.safetensors')}\n1750000000.0\n")
    return place


def merged(folder, model):
    """The model as a result of a merge."""
    linear_merge_llama_to_folder([model], output_dir=folder / "merged", progress=False)
    return folder / "merged"


def merge(tmp_path, model, **options):
    (tmp_path / "work").mkdir(exist_ok=True)
    return linear_merge_llama_to_folder(
        [model], output_dir=tmp_path / "work/out", verify_inputs=True, progress=False, **options
    )


@pytest.mark.parametrize(
    ("known", "source"),
    [
        (snapshot, "the Hub's cache"),
        (downloaded, "the Hub, when it was downloaded"),
        (merged, "merge_manifest.json"),
    ],
)
def test_a_single_bit_is_found_where_the_sha256_is_known(tmp_path, known, source):
    model = known(tmp_path, make_llama(tmp_path / "a"))
    weights = model / "model.safetensors"
    report = merge(tmp_path, model)
    assert not [note for note in report.notes if "no SHA-256" in note]
    manifest = json.loads((tmp_path / "work/out/merge_manifest.json").read_text())
    assert manifest["inputs"][0]["sha256"] == digest(weights)
    (tmp_path / "work/out").rename(tmp_path / "first")
    flip(weights.resolve())
    with pytest.raises(
        ModelCompatibilityError, match=r"model.safetensors has the SHA-256 \w{64}, "
    ):
        merge(tmp_path, model)
    assert os.listdir(tmp_path / "work") == []
    assert linear_merge_llama([model], progress=False) is not None  # which did not ask
    with pytest.raises(ModelCompatibilityError, match=f"according to {source}"):
        linear_merge_llama([model], progress=False, verify_inputs=True)


def test_files_of_which_nothing_is_known_are_noted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama(tmp_path / "a", shards=2)
    assert main(["--ft_models", "a", "--save", "out", "--verify-inputs", "--quiet"]) == 0
    text = "note: a: no SHA-256 is known of model-00001-of-00002.safetensors, model-00002-of-00002"
    assert text in capsys.readouterr().out
    with pytest.warns(UserWarning, match="a: no SHA-256 is known of"):
        linear_merge_llama(["a"], progress=False, verify_inputs=True)


def test_adapters_are_verified_by_every_verb(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama(tmp_path / "a")
    base = merged(tmp_path, tmp_path / "a").rename(tmp_path / "base")
    make_lora(tmp_path / "lora", base)
    verbs = {
        "fold": ["base", "made"],
        "merge": ["made", "made"],
        "extract": ["a", "--base", "base", "--rank", "1"],
    }
    more = ["--verify-inputs", "--quiet", "--save"]
    assert lora_llama.main(["merge", "lora", *more, "made"]) == 0
    assert "lora: no SHA-256 is known of adapter_model.safetensors" in capsys.readouterr().out
    make_llama(tmp_path / "a", seed=1, base=base)
    for verb, names in verbs.items():
        assert lora_llama.main([verb, *names, *more, f"by-{verb}"]) == 0
        manifest = json.loads((tmp_path / f"by-{verb}/merge_manifest.json").read_text())
        for file in manifest["inputs"]:
            assert file["sha256"] == digest(tmp_path / file["model"] / file["file"])
    flip(base / "model.safetensors")
    flip(tmp_path / "made/adapter_model.safetensors")
    for verb, names in verbs.items():
        capsys.readouterr()
        assert lora_llama.main([verb, *names, *more, "work"]) == 3
        assert "has the SHA-256" in capsys.readouterr().err
        assert not [name for name in os.listdir(tmp_path) if "work" in name]


def test_an_interrupt_ends_all_reading(tmp_path):
    files = []
    for name in ("a", "b"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**28)
        files.append(WeightFile("m", tmp_path, name, "", FileState(2**28, 0, 0)))
    told = []

    def on_bytes(count):
        told.append(count)
        if len(told) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        verify_files(files, 2, on_bytes)
    assert len(told) < 50  # parts of 4 MB; there are 128


def test_the_check_of_a_result_finds_every_changed_file(tmp_path, capsys):
    folder = merged(tmp_path, make_llama(tmp_path / "a", tokenizer=True))
    assert main(["--check", str(folder)]) == 0
    for name in sorted(os.listdir(folder)):
        if name not in ("README.md", "merge_manifest.json"):
            flip(folder / name)
            assert main(["--check", str(folder)]) == 3, name
            flip(folder / name)
    flip(folder / "model.safetensors")
    capsys.readouterr()
    assert main(["--check", str(folder)]) == 3
    assert "model.safetensors is not as the merge wrote it" in capsys.readouterr().out
    flip(folder / "model.safetensors")
    (folder / "README.md").write_text("my own words")
    capsys.readouterr()
    assert main(["--check", str(folder)]) == 0
    assert "note: README.md is not as the merge wrote it" in capsys.readouterr().out
    (folder / "more.bin").write_text("")
    assert main(["--check", str(folder)]) == 0
    assert "note: not in merge_manifest.json: more.bin" in capsys.readouterr().out
    (folder / "tokenizer_config.json").unlink()
    assert main(["--check", str(folder)]) == 3
    assert "tokenizer_config.json, which the merge wrote, is missing" in capsys.readouterr().out
    (folder / "merge_manifest.json").unlink()
    assert main(["--check", str(folder)]) == 0
    assert "note: there is no merge_manifest.json" in capsys.readouterr().out


def test_the_check_of_an_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_llama(tmp_path / "a")
    make_lora(tmp_path / "lora", tmp_path / "a")
    command = ["merge", "lora", "--save", "made", "--quiet"]
    assert lora_llama.main(command) == 0
    assert lora_llama.main(["--check", "made"]) == 0
    assert lora_llama.main(command) == 2
    weights = tmp_path / "made/adapter_model.safetensors"
    flip(weights)
    capsys.readouterr()
    assert main(["--check", "made"]) == 3
    assert "made: adapter_model.safetensors is not as the merge wrote it" in capsys.readouterr().out
    content = load_file(weights)
    next(iter(content.values()))[0, 0] = math.nan
    save_file(content, weights)
    assert main(["--check", "made"]) == 3
    assert "NaN" in capsys.readouterr().out
