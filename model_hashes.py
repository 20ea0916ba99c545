"""The SHA-256 of weight files: what is known of them, and what they have."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model_config import read_config
from model_errors import ModelCompatibilityError, UnsafeProblem
from model_files import chunks, has_file, open_file, read_file, read_text, real_file
from model_utils import WeightFile

MANIFEST = "merge_manifest.json"
"""What a merge leaves beside its weights: sizes and SHA-256 of its files, and what went in."""

_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\0\ud800-\udbff]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def known_sha256(file: WeightFile) -> str | None:
    """The SHA-256 that a weight file should have; None where nothing says it.

    The Hugging Face cache calls a large file by it, a folder that was downloaded to has it under
    `.cache`, and a merge in its manifest.
    """
    blob = real_file(file.folder, file.name, file.model).name
    if _SHA256.fullmatch(blob):
        return blob
    downloaded = f".cache/huggingface/download/{file.name}.metadata"
    if has_file(file.folder, downloaded):
        lines = read_file(file.folder, downloaded, file.model).splitlines()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1].decode("latin-1")):
            return lines[1].decode()
    if has_file(file.folder, MANIFEST):
        try:
            manifest = read_config(read_text(file.folder, MANIFEST, file.model))
            return str(manifest["files"][file.name]["sha256"])
        except (ValueError, LookupError, TypeError):
            return None
    return None


def changed_files(folder: Path, label: str) -> tuple[list[str], list[str]]:
    """Compare the files of a finished folder with its manifest.

    Returns:
        Problems; and notes, on a README.md that has been edited. Nothing if there is no manifest.
    """
    if not has_file(folder, MANIFEST):
        return [], []
    try:
        listed = read_config(read_text(folder, MANIFEST, label))["files"]
        expected = {str(name): str(file["sha256"]) for name, file in listed.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{label}: {MANIFEST} is no manifest ({error}). Merge again"], []
    problems: list[str] = []
    notes: list[str] = []
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
            if name == "README.md":
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
    """Compare weight files with what is known of them.

    Args:
        files: what is compared.
        threads: files read at once.
        on_bytes: told how many bytes have been read since the last call.

    Returns:
        The SHA-256 of each, and notes on those of which nothing is known.

    Raises:
        ModelCompatibilityError: some have another one.
    """

    lock = threading.Lock()

    def told(count: int) -> None:
        with lock:  # several files are read at once
            on_bytes(count)

    def of_file(file: WeightFile) -> str:
        return sha256_of(file.folder, file.name, file.model, told)

    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(files, pool.map(of_file, files), strict=True))
    expected = {file: known_sha256(file) for file in files}
    if wrong := [file for file in files if expected[file] not in (None, found[file])]:
        raise ModelCompatibilityError(
            f"{file.model}: {file.name} has the SHA-256 {found[file]}, expected {expected[file]}: "
            "its bytes are not those that were published. Download it again"
            for file in wrong
        )
    unknown: dict[str, list[str]] = {}
    for file in files:
        if expected[file] is None:
            unknown.setdefault(file.model, []).append(file.name)
    notes = [
        f"{model}: no SHA-256 is known of {', '.join(names)}, so nothing could be compared"
        for model, names in unknown.items()
    ]
    return found, notes
