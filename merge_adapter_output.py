"""Where an adapter is made: module by module, so that a stopped run can be gone on with."""

import base64
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from merge_card import VERSION, adapter_texts, told_of
from merge_identity import FORMAT, digest, is_older, of_this_run, verified
from merge_memory import peak_memory
from merge_plan import usable_cores
from merge_progress import Progress, teller
from model_config import read_config
from model_files import read_text
from model_hashes import REPORT_FILE
from model_locate import adapter_name
from model_lora_writer import NewAdapter, write_adapter
from model_partial import PartialFolder, tidy
from model_safetensors import DTYPE_NAMES
from model_tokenizer import signature
from model_utils import ModelFolder, WeightFile, format_bytes
from model_writer import read_manifest

if TYPE_CHECKING:
    from lora_utils import Truncated

NO_ERROR = 1e-6
"""What rounding to float32 leaves; not reported by module."""


@dataclass(frozen=True)
class AdapterReport:
    """What was made.

    Attributes:
        method: how.
        inputs: adapters, or the tuned model and its base.
        output_dir, dtype: of the result.
        modules: how many have factors.
        ranks: the lowest and the highest.
        error: norm of what the result lacks of the exact change, by the norm of that; over all
            modules.
        errors: the same by module, where it is not 0.
        bytes_written: of its tensors.
        modules_kept: how many a stopped run had made already.
        seconds: wall time.
        peak_memory: highest resident memory of the process so far, in bytes.
        notes: what the user should know.
    """

    method: str
    inputs: tuple[str, ...]
    output_dir: str
    dtype: str
    modules: int
    ranks: tuple[int, int]
    error: float
    errors: Mapping[str, float]
    bytes_written: int
    modules_kept: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def summary(self) -> str:
        """The report in a few lines."""
        if self.modules_kept and not self.seconds:
            return f"{self.output_dir} was finished before; nothing is left to do"
        low, high = self.ranks
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        lines = [
            f"{self.method} of {', '.join(self.inputs)} into {self.output_dir}: an adapter of "
            f"{self.modules} modules, {rank}, {self.dtype}, {format_bytes(self.bytes_written)}",
            f"{self.seconds:.1f} s, peak memory {format_bytes(self.peak_memory)}",
            f"relative error {self.error:.2e}"
            + ("" if self.errors else ": exact but for rounding"),
        ]
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:3]
        if worst:
            lines.append(f"largest: {', '.join(f'{name} {error:.2e}' for name, error in worst)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


class Errors:
    """Errors of modules, added up to that of the whole."""

    def __init__(self) -> None:
        self.by_module: dict[str, float] = {}
        self._missing = self._whole = 0.0

    def add(self, module: str, found: "Truncated") -> None:
        """Take in a module."""
        if found.error > NO_ERROR:
            self.by_module[module] = found.error
        self._missing += (found.error * found.norm) ** 2
        self._whole += found.norm**2

    @property
    def total(self) -> float:
        """Of all modules together."""
        return (self._missing / self._whole) ** 0.5 if self._whole else 0.0


class AdapterOutput:
    """The folder of an adapter that is being made, in a `with` block.

    Args:
        output_dir: the folder to make.
        settings: JSON; how the adapter is made.
        sources: the open models and adapters of which it is made.
        progress: show how far the verification is, on stderr.
        resume: keep the modules that a stopped run has made in the same way.
        verify_inputs: read all weight files first, and compare them with the SHA-256 known of them.

    Attributes:
        finished: the report, if the output is there already; then nothing else can be done.
    """

    def __init__(
        self,
        output_dir: Path,
        settings: Mapping[str, Any],
        sources: Sequence[ModelFolder],
        *,
        progress: Progress,
        resume: bool,
        verify_inputs: bool,
    ) -> None:
        self.output_dir = output_dir
        self._started = time.monotonic()
        self._progress, self._verify_inputs = progress, verify_inputs
        self._files = [file for source in sources for file in source.files]
        self._hashes: Mapping[WeightFile, str] = {}
        self._unknown: list[str] = []
        configs = [
            [
                [hashlib.sha256(text.encode()).hexdigest() for text in each.config_texts],
                signature(each.tokenizer_path, each.label),
            ]
            for each in sources
        ]
        identity = {
            "the version": [FORMAT, VERSION],
            "the settings": settings,
            "the inputs": told_of(self._files),
            "the small files": configs,
        }
        self._identity = identity
        self._digest = digest(identity)
        self._sources = sources
        self._made: dict[str, Mapping[str, Any]] = {}
        self.finished = _finished(output_dir, self._digest, self._files) if resume else None
        self._partial = None
        if not self.finished:
            self._partial = PartialFolder(output_dir, resume=resume, tell=teller(show=progress))

    def __enter__(self) -> Self:
        if self._partial is not None:
            self._partial.__enter__()
            try:
                if self._verify_inputs:
                    self._hashes, self._unknown = verified(
                        self._files, usable_cores(), progress=self._progress
                    )
                others = of_this_run(self._files, self._hashes, threads=torch_threads())
                if self._partial.begin({**self._identity, **others}):
                    records = self._partial.records()
                    self._made = {each["module"]: each for each in records if "module" in each}
                    if self._made:
                        count = len(self._made)
                        self._partial.tell(
                            f"{count} modules are kept of what a stopped run has left"
                        )
                self._partial.open_records(0)
            except BaseException as error:
                self._partial.__exit__(type(error), error, error.__traceback__)
                raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._partial is not None:
            self._partial.__exit__(kind, error, trace)

    def factors(self, module: str, make: "Callable[[], Truncated]") -> "Truncated":
        """The factors of a module, made now if they have not been made before."""
        if module in self._made:
            return _restored(self._made[module])
        assert self._partial is not None
        found = make()
        self._partial.record({"module": module, **_stored(found)})
        return found

    def write(
        self,
        new: NewAdapter,
        method: str,
        settings: Mapping[str, Any],
        inputs: Sequence[str],
        dtype: str,
        errors: "Errors",
        notes: Sequence[str],
    ) -> AdapterReport:
        """Write the adapter with its card, and say what was done."""
        assert self._partial is not None
        for source in self._sources:
            source.check_unchanged()
        ranks = [*new.ranks.values()]
        made = {
            "method": method,
            "inputs": tuple(inputs),
            "modules": len(ranks),
            "ranks": (min(ranks), max(ranks)),
            "error": errors.total,
            "errors": errors.by_module,
            "notes": tuple(notes),
        }
        said = {"settings": {**settings, "dtype": dtype}, "base_model": new.base_name}
        names = [adapter_name(name).name for name in inputs]
        size = write_adapter(
            new,
            self._partial,
            DTYPE_NAMES[dtype],
            adapter_texts({**made, **said}, names),
            {"plan_sha256": self._digest, "inputs": told_of(self._files, self._hashes)},
        )
        return AdapterReport(
            **{**made, "notes": (*notes, *self._unknown, *self._partial.notes)},  # type: ignore[arg-type]
            output_dir=str(self.output_dir),
            dtype=dtype,
            bytes_written=size,
            modules_kept=len(self._made),
            seconds=time.monotonic() - self._started,
            peak_memory=peak_memory(),
        )


def _finished(output_dir: Path, identity: str, files: Sequence[WeightFile]) -> AdapterReport | None:
    """The report of an adapter that was made before in just this way."""
    manifest = read_manifest(output_dir)
    if manifest is None or manifest.get("plan_sha256") != identity or is_older(output_dir, files):
        return None
    tidy(output_dir)
    saved = read_config(read_text(output_dir, REPORT_FILE, str(output_dir)))
    names = ("method", "inputs", "modules", "ranks", "error", "errors", "notes")
    return AdapterReport(
        **{name: saved[name] for name in names},
        output_dir=str(output_dir),
        dtype=saved["settings"]["dtype"],
        bytes_written=0,
        modules_kept=saved["modules"],
        seconds=0.0,
        peak_memory=peak_memory(),
    )


def torch_threads() -> int:
    """How many threads torch decomposes with; the last places of the result depend on it."""
    import torch

    return torch.get_num_threads()


def _stored(found: "Truncated") -> dict[str, Any]:
    """Factors as records can hold them."""
    factors = [
        [factor.shape, base64.b64encode(factor.contiguous().numpy().tobytes()).decode()]
        for factor in found.factors
    ]
    return {"factors": factors, "error": found.error, "norm": found.norm}


def _restored(record: Mapping[str, Any]) -> "Truncated":
    """What `_stored` was given."""
    import torch

    from lora_utils import Factors, Truncated

    factors = (
        torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).reshape(shape).copy())
        for shape, text in record["factors"]
    )
    return Truncated(Factors(*factors), record["error"], record["norm"])
