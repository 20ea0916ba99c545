"""What a merge will do and what it did: for people as text, for programs as JSON."""

import errno
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from merge_memory import Fit, anonymous_memory
from merge_parameters import Values
from merge_plan import Earlier, Plan, free_bytes, merged_when_read
from merge_recipe import Recipe
from merge_settings import written
from model_checks import EMBEDDING, is_tied
from model_errors import MemoryLimitError
from model_hashes import OWN_FILES, REPORT_FILE
from model_utils import ModelFolder, format_bytes, free_memory, parse_size
from model_writer import RECORD_BYTES, file_sizes


@dataclass(frozen=True)
class ModelSummary:
    """One input of a merge.

    Attributes:
        name: what the user called it.
        role: "base", "model", or "of NAME", a model of an earlier recipe.
        folder: where it lies; empty for the result of an earlier recipe.
        model_type, dtypes, vocab_size: from config.json and the headers.
        tokens: in its tokenizer; None where it has none.
        tied: its head is its embedding.
        bytes: of its tensors.
        download_bytes: of its weight files that are on the Hub only.
    """

    name: str
    role: str
    folder: str
    model_type: str
    dtypes: tuple[str, ...]
    vocab_size: int
    tokens: int | None
    tied: bool
    bytes: int
    download_bytes: int


@dataclass(frozen=True)
class PlanReport:
    """What a merge will do, from config.json and the headers alone.

    Attributes:
        method, profile, parameters, output_dir, dtype: as resolved. Parameters that differ between
            tensors are as recipe files have them.
        slices: with their own parameters, if layers are stacked; else there are none.
        options: which tensors are merged, and what is done to every merged value.
        models: the inputs, the base (if any) first; also those of earlier recipes.
        earlier: the recipes whose results are among the inputs, one line each.
        vocabulary: mode, rows, tokens, the model that gives the tokenizer, tokens added, and by
            model the rows cut, moved and filled.
        tied: the result's head is its embedding.
        tensors, parameters_count: of the result.
        passes: how often the inputs are read.
        read_bytes: of weights, all passes together.
        write_bytes: of the result's tensors.
        disk_bytes: that the merge takes, all files together, at most; earlier results that have to
            be written down included.
        download_bytes: of weights that are on the Hub only.
        memory_bytes: highest memory of the process, without files that the system caches.
        threads: that are used.
        disk_free: where the output is to be, with what a merge that goes on has there already; None
            where no output is named.
        files: what the result has besides weights, in the order of names.
        files_left: what the first model has and the result does not.
        notes: what the user should know.
    """

    method: str
    profile: str
    parameters: Mapping[str, Any]
    slices: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]
    models: tuple[ModelSummary, ...]
    earlier: tuple[str, ...]
    output_dir: str | None
    dtype: str
    vocabulary: Mapping[str, Any]
    tied: bool
    tensors: int
    parameters_count: int
    passes: int
    read_bytes: int
    write_bytes: int
    disk_bytes: int
    download_bytes: int
    memory_bytes: int
    threads: int
    disk_free: int | None
    files: tuple[str, ...]
    files_left: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        return asdict(self)

    def check_room(
        self, *, max_disk: str | int | None = None, max_memory: str | int | None = None
    ) -> None:
        """Refuse, before anything is begun, a merge that would not fit where it is to run.

        Args:
            max_disk: what it may take on the disk, such as "19.5GB" where a notebook's output is
                limited to 20 GB and the disk does not say so; never more than is free.
            max_memory: what the process may take; by default what it has and what is free now.

        Raises:
            OSError: the disk has too little room (ENOSPC).
            MemoryLimitError: there is too little memory.
        """
        limits = [None if max_disk is None else parse_size(max_disk, "max_disk"), self.disk_free]
        room = min((limit for limit in limits if limit is not None), default=self.disk_bytes)
        if self.disk_bytes > room:
            raise OSError(
                errno.ENOSPC,
                f"the merge takes up to {format_bytes(self.disk_bytes)} on the disk, and "
                f"{format_bytes(room)} are there for {self.output_dir or 'it'}. Choose dtype "
                "float16 or bfloat16, make room, or write elsewhere",
            )
        if max_memory is not None:
            memory: int | None = parse_size(max_memory, "max_memory")
        else:
            free = free_memory()
            memory = None if free is None else free + anonymous_memory()
        if memory is not None and self.memory_bytes > memory:
            raise MemoryLimitError(
                f"the merge takes up to {format_bytes(self.memory_bytes)} of memory, and "
                f"{format_bytes(memory)} are there. Plan it with max_memory, or restart the "
                "notebook's kernel so that nothing else is held"
            )

    def summary(self) -> str:
        """The plan as lines of text."""
        words = self.vocabulary
        lines = [f"method      {self.method}, profile {self.profile}"]
        lines += _shown_parameters(self.parameters)
        for number, each in enumerate(self.slices, 1):
            lines.append(f"slice {number:<6}{each['sources']}")
            lines += _shown_parameters(each["parameters"])
        lines += [f"{name:<18} {_shown(value)}" for name, value in _set(self.options).items()]
        lines += [f"{model.role:<11} {_described(model)}" for model in self.models]
        lines += [f"earlier     {each}" for each in self.earlier]
        lines += [
            f"output      {self.output_dir or 'not named'}, {self.dtype}",
            f"tensors     {self.tensors}, {self.parameters_count:,} elements, head "
            f"{'tied' if self.tied else 'of its own'}",
            f"vocabulary  {words['rows']} rows, {words['tokens']} tokens, by {words['mode']!r}; "
            + (f"tokenizer of {words['tokenizer_source']}" if words["tokens"] else "no tokenizer"),
        ]
        lines += [
            f"  {name}: {', '.join(_rows(count, what) for what, count in counts.items())}"
            for name, counts in words["rows_changed"].items()
        ]
        lines += [
            f"files       {', '.join(self.files)}",
            f"read        {format_bytes(self.read_bytes)} in {self.passes} "
            f"pass{'es' if self.passes > 1 else ''}",
            f"write       {format_bytes(self.write_bytes)}",
            f"disk        at most {format_bytes(self.disk_bytes)}, all files together",
            f"memory      at most {format_bytes(self.memory_bytes)}, libraries included, "
            f"without cached files; {self.threads} thread{'s' if self.threads > 1 else ''}",
        ]
        if self.download_bytes:
            lines.append(f"download    {format_bytes(self.download_bytes)}")
            each = {model.name: model.download_bytes for model in self.models}
            lines += [f"  {name}: {format_bytes(size)}" for name, size in each.items() if size]
        if self.disk_free is not None:
            lines.append(f"disk free   {format_bytes(self.disk_free)}")
        return "\n".join(lines + [f"note        {note}" for note in self.notes])


def small_file_bytes(plan: Plan, *, findings: bool = False) -> int:
    """What all files of a result besides weights take on the disk, at most."""
    carried = sum(path.stat().st_size for path in plan.carried.copies)
    sources = [edit.source for edit in plan.carried.edits.values() if edit.source is not None]
    carried += sum(2 * path.stat().st_size for path in sources)
    models = plan.most_models + 1
    each = 1024 + (512 if findings else 128) * models**2
    return carried + len(plan.config_text) + 2**18 + each * len(plan.tasks)


def disk_bytes(plan: Plan) -> int:
    """What a result takes on the disk while it is made, at most."""
    weights = file_sizes(plan.tensors, parse_size(plan.recipe.max_shard_size))
    records = RECORD_BYTES * (len(plan.tensors) + 1)
    return sum(weights.values()) + records + small_file_bytes(plan)


def plan_report(
    plan: Plan, fit: Fit, earlier: Earlier, output_dir: Path | None, there: int = 0
) -> PlanReport:
    """A plan as it is shown.

    Args:
        plan: the plan; its models may be open by their headers alone.
        fit: how it is made to fit into memory.
        earlier: the results of earlier recipes among its models.
        output_dir: where the output is to be.
        there: bytes of it that are on the disk already.
    """
    plans = [("", plan), *earlier.plans.items()]
    recipe = plan.recipe
    notes = [*plan.notes, *fit.notes]
    downloads = {origin.path: origin.download_bytes for _, each in plans for origin in each.origins}
    free = None if output_dir is None else free_bytes(output_dir) + there
    disk = disk_bytes(plan) + earlier.disk_bytes
    if free is not None and free < disk:
        notes.append("the disk has too little room; the merge would be refused")
    return PlanReport(
        method=recipe.method,
        profile=recipe.profile,
        parameters=resolved_parameters(plan),
        slices=resolved_slices(plan),
        options=plan.recipe.options,
        models=tuple(
            _summarise(source, each, name, earlier)
            for name, each in plans
            for source in each.sources
        ),
        earlier=tuple(
            f"{name}: {each.method.title} of {', '.join(each.recipe.names)}, "
            + ("merged as it is read" if merged_when_read(each) else "merged into a folder first")
            for name, each in earlier.plans.items()
        ),
        output_dir=None if output_dir is None else str(output_dir),
        dtype=plan.dtype,
        vocabulary=vocabulary_summary(plan),
        tied=plan.alignment.tied,
        tensors=len(plan.tasks),
        parameters_count=sum(task.info.numel for task in plan.tasks),
        passes=plan.passes,
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        disk_bytes=disk,
        download_bytes=sum(downloads.values()),
        memory_bytes=fit.memory_bytes,
        threads=fit.threads,
        disk_free=free,
        files=tuple(sorted((*OWN_FILES, *plan.carried.names))),
        files_left=plan.carried.left,
        notes=tuple(notes),
    )


def resolved_parameters(plan: Plan) -> dict[str, Any]:
    """The method's parameters as JSON can hold them; none where slices have them."""
    if plan.recipe.slices:
        return {}
    return _plain(plan.parameters[0])


def _plain(values: Values) -> dict[str, Any]:
    return {
        name: tuple(written(each) for each in value) if isinstance(value, tuple) else written(value)
        for name, value in values.items()
    }


def resolved_slices(plan: Plan) -> tuple[dict[str, Any], ...]:
    """The slices with their parameters as JSON can hold them."""
    return tuple(
        {
            "sources": ", ".join(f"{model}[{first}:{stop}]" for model, first, stop in each.inputs),
            "parameters": _plain(values),
        }
        for each, values in zip(plan.recipe.slices, plan.parameters, strict=False)
    )


def vocabulary_summary(plan: Plan) -> dict[str, Any]:
    """The merged vocabulary as JSON can hold it."""
    vocabulary = plan.alignment.vocabulary
    return {
        "mode": vocabulary.mode,
        "rows": vocabulary.rows,
        "tokens": len(vocabulary.tokens),
        "tokenizer_source": plan.sources[vocabulary.donor].label,
        "tokens_added": [entry["content"] for entry in vocabulary.added],
        "rows_changed": vocabulary.changes,
    }


def _summarise(source: ModelFolder, plan: Plan, recipe: str, earlier: Earlier) -> ModelSummary:
    tokens = source.tokens
    role = "base" if source is plan.base else "model"
    return ModelSummary(
        name=source.label,
        role=f"of {recipe}" if recipe else role,
        folder=" + ".join(
            str(each.path) for each in source.origins if each.name not in earlier.models
        ),
        model_type=str(source.config.get("model_type")),
        dtypes=tuple(sorted({info.dtype for info in source.stored_tensors.values()})),
        vocab_size=source.tensors[EMBEDDING].shape[0],
        tokens=None if tokens is None else len(tokens.tokens),
        tied=is_tied(source),
        bytes=sum(info.nbytes for info in source.tensors.values()),
        download_bytes=sum(origin.download_bytes for origin in source.origins),
    )


def _described(model: ModelSummary) -> str:
    place = f"{model.name} in {model.folder}"
    if model.folder.replace(" + ", "+") in ("", model.name):
        place = model.name
    tokens = "no tokenizer" if model.tokens is None else f"{model.tokens} tokens"
    return (
        f"{place} ({model.model_type}, {'/'.join(model.dtypes)}, {format_bytes(model.bytes)}, "
        f"{model.vocab_size} rows, {tokens})"
    )


def _rows(count: int, what: str) -> str:
    """ "3 rows filled"."""
    return f"{count} row{'' if count == 1 else 's'} {what}"


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are not as they are by themselves."""
    defaults = Recipe(method="", models=()).options
    return {name: value for name, value in options.items() if value != defaults[name]}


def _shown_parameters(parameters: Mapping[str, Any]) -> Iterator[str]:
    """A line for each; what depends on others that differ between tensors has none."""
    said = {name: value for name, value in parameters.items() if value is not None}
    width = max(map(len, said), default=0)
    return (f"  {name:<{width}} {_shown(value)}" for name, value in said.items())


def _shown(value: Any) -> str:
    """A value for people: numbers one after the other, filters before their values."""
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        parts = (f"{each.get('filter', 'else')}: {_shown(each['value'])}" for each in value)
        return f"({'; '.join(parts)})"
    return str(value)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        method, profile, parameters, slices, options, base_model, models, output_dir, dtype: as
            resolved; see `PlanReport`.
        vocabulary: as in `PlanReport`.
        tensors: tensors in the result.
        bytes_read: from the weights, all passes together.
        bytes_written: tensors of the result.
        bytes_kept: of them, those that a stopped run had merged already.
        finished_before: the output was there; nothing was done.
        seconds: wall time.
        peak_memory: highest resident memory of the whole process so far, in bytes.
        mapped_memory: what of it are files that the system caches, such as libraries; 0 if unknown.
        files_carried, files_left: other files that the result has, and those of the first model
            that were left behind.
        notes: what the user should know.
        findings: per tensor, what the method found out; with `findings` asked for, "task_vectors"
            as well: see `merge_findings.TensorSums.to_dict`.
        task_vectors: the same by layer, by projection and of the whole, if asked for. Where there
            is no base, both are of the models themselves.
    """

    method: str
    profile: str
    parameters: Mapping[str, Any]
    slices: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]
    base_model: str | None
    models: tuple[str, ...]
    output_dir: str | None
    dtype: str
    vocabulary: Mapping[str, Any]
    tensors: int
    bytes_read: int
    bytes_written: int
    bytes_kept: int
    seconds: float
    peak_memory: int
    mapped_memory: int
    files_carried: tuple[str, ...]
    files_left: tuple[str, ...]
    notes: tuple[str, ...]
    findings: Mapping[str, Mapping[str, Any]] = field(repr=False)
    task_vectors: Mapping[str, Any] = field(repr=False)
    finished_before: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def summary(self) -> str:
        """The report in a few lines."""
        count, mapped = len(self.models), self.mapped_memory
        if self.finished_before:
            return f"{self.output_dir} was finished before; nothing is left to do"
        lines = [
            f"merged {count} model{'s' if count > 1 else ''} by {self.method}, profile "
            f"{self.profile}, into {self.output_dir or 'memory'}: {self.tensors} tensors, "
            f"{self.dtype}, {format_bytes(self.bytes_written)}",
            f"read {format_bytes(self.bytes_read)} in {self.seconds:.1f} s, "
            f"peak memory {format_bytes(self.peak_memory)}"
            + (f", {format_bytes(mapped)} of it libraries' files" if mapped else ""),
        ]
        if self.bytes_kept:
            lines.append(f"kept {format_bytes(self.bytes_kept)} that a stopped run had merged")
        changed = [f"{name} {_shown(value)}" for name, value in _set(self.options).items()]
        if changed:
            lines.append(f"with {'; '.join(changed)}")
        if self.task_vectors:
            what = (
                "norms and cosines" if self.base_model is None else "what the models have changed"
            )
            lines.append(
                f"{what}: task_vectors (by layer and projection) and findings (by tensor) in "
                f"{self.output_dir}/{REPORT_FILE}"
            )
        if self.files_carried:
            lines.append(f"carried over: {', '.join(self.files_carried)}")
        if self.files_left:
            lines.append(f"left behind: {', '.join(self.files_left)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
