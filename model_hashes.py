"""The SHA-256 of weight files: what is known of them, and what they have."""

import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from model_config import read_config
from model_errors import ModelCompatibilityError, UnsafeProblem
from model_files import chunks, has_file, open_file, read_file, read_text, real_file
from model_utils import WeightFile

REPORT_FILE, RECIPE_FILE = "merge_report.json", "merge_recipe.yml"
MANIFEST = "merge_manifest.json"
"""What a merge leaves beside its weights: sizes and SHA-256 of its files, and what went in."""

CARD = "README.md"
"""The model card, which people edit."""

OWN_FILES = (CARD, "config.json", RECIPE_FILE, REPORT_FILE, MANIFEST)
"""What a merge writes itself, besides weights."""

SAMPLES, SAMPLE_BYTES = 64, 256
"""How many are taken of a weight file, and how long they are."""

_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\0\ud800-\udbff]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Known(NamedTuple):
    """The SHA-256 that a file should have, and where that stands."""

    sha256: str
    source: str


def known_sha256(file: WeightFile) -> Known | None:
    """The SHA-256 that a weight file should have; None where nothing says it.

    The Hugging Face cache calls a large file by it, a folder that was downloaded to has it under
    `.cache`, and a merge in its manifest.
    """
    blob = real_file(file.folder, file.name, file.model).name
    if _SHA256.fullmatch(blob):
        return Known(blob, "the Hub's cache")
    downloaded = f".cache/huggingface/download/{file.name}.metadata"
    if has_file(file.folder, downloaded):
        lines = read_file(file.folder, downloaded, file.model).splitlines()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1].decode("latin-1")):
            return Known(lines[1].decode(), "the Hub, when it was downloaded")
    if has_file(file.folder, MANIFEST):
        try:
            manifest = read_config(read_text(file.folder, MANIFEST, file.model))
            return Known(str(manifest["files"][file.name]["sha256"]), MANIFEST)
        except (ValueError, LookupError, TypeError):
            return None
    return None


@functools.lru_cache(maxsize=1024)
def sampled_sha256(file: WeightFile) -> str:
    """SHA-256 of samples from all over a weight file.

    It tells another training run from this one at the cost of a few reads, and not a single
    changed value.
    """
    digest = hashlib.sha256()
    step = max(SAMPLE_BYTES, file.state.bytes // SAMPLES)
    descriptor = open_file(file.folder, file.name, file.model)
    try:
        for offset in range(0, file.state.bytes, step):
            digest.update(os.pread(descriptor, SAMPLE_BYTES, offset))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def changed_files(folder: Path, label: str) -> tuple[list[str], list[str]]:
    """Compare the files of a finished folder with its manifest.

    Returns:
        Problems; and notes, on a card that has been edited, files that are not in the manifest, or
        that there is none.
    """
    if not has_file(folder, MANIFEST):
        return [], [f"there is no {MANIFEST}, so no file was compared with what a merge wrote"]
    try:
        listed = read_config(read_text(folder, MANIFEST, label))["files"]
        expected = {str(name): str(file["sha256"]) for name, file in listed.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{label}: {MANIFEST} is no manifest ({error}). Merge again"], []
    problems: list[str] = []
    there = {name for name in os.listdir(folder) if not name.startswith(".")}
    others = sorted(there - {*expected, MANIFEST})
    notes = [f"not in {MANIFEST}: {', '.join(others)}"] if others else []
    for name, sha256 in expected.items():
        if not _FILE_NAME.fullmatch(name):
            text = f"{label}: {MANIFEST} names {name[:60]!r}, which is no file of this folder"
            kind = UnsafeProblem if "/" in name or ".." in name else str
            problems.append(kind(f"{text}. Do not use it"))
        elif not has_file(folder, name):
            problems.append(
                f"{label}: {name}, which the merge wrote, is missing. Merge again; if you have "
                f"removed it, remove {MANIFEST}"
            )
        elif sha256_of(folder, name, label) != sha256:
            text = f"{name} is not as the merge wrote it (another SHA-256 than in {MANIFEST})"
            if name == CARD:
                notes.append(text)
            else:
                problems.append(
                    f"{label}: {text}. Merge again; if you have changed it, remove {MANIFEST}"
                )
    return problems, notes


def sha256_of(
    folder: Path, name: str, label: str, on_bytes: Callable[[int], None] = lambda _: None
) -> str:
    """The SHA-256 that a file has; `on_bytes` is told how many bytes have been read."""
    digest = hashlib.sha256()
    descriptor = open_file(folder, name, label)
    try:
        for part in chunks(descriptor, 0, os.fstat(descriptor).st_size):
            digest.update(part)
            on_bytes(len(part))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def verify_files(
    files: Sequence[WeightFile], threads: int, on_bytes: Callable[[int], None]
) -> tuple[dict[WeightFile, str], list[str]]:
    """Compare weight files with what is known of them; an interrupt ends it at once.

    Args:
        files: what is compared.
        threads: files read at once.
        on_bytes: told how many bytes have been read since the last call.

    Returns:
        The SHA-256 of each, and notes on those of which nothing is known.

    Raises:
        ModelCompatibilityError: some have another one.
    """

    lock, stopped = threading.Lock(), threading.Event()

    def told(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        with lock:  # several files are read at once
            on_bytes(count)

    def of_file(file: WeightFile) -> str:
        return sha256_of(file.folder, file.name, file.model, told)

    with ThreadPoolExecutor(threads) as pool:
        try:
            found = dict(zip(files, pool.map(of_file, files), strict=True))
        except BaseException:
            stopped.set()
            raise
    expected = {file: known_sha256(file) for file in files}
    wrong = [
        f"{file.model}: {file.name} has the SHA-256 {found[file]}, expected {known.sha256} "
        f"(according to {known.source}). Download it or make it again"
        for file, known in expected.items()
        if known is not None and known.sha256 != found[file]
    ]
    if wrong:
        raise ModelCompatibilityError(wrong)
    unknown: dict[str, list[str]] = {}
    for file in files:
        if expected[file] is None:
            unknown.setdefault(file.model, []).append(file.name)
    notes = [
        f"{model}: no SHA-256 is known of {', '.join(names)}, so nothing could be compared"
        for model, names in unknown.items()
    ]
    return found, notes
