"""From a recipe to what will happen, from config.json and the headers alone.

What can be known without reading weights is refused here, all at once.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_methods import METHODS, Method
from merge_recipe import Recipe, output_problems, resolve_parameters, unknown_name
from merge_stream import BLOCK_ELEMENTS, TensorTask
from model_errors import ModelCompatibilityError
from model_prep import Alignment, align
from model_safetensors import DTYPE_NAMES, TensorInfo
from model_utils import ModelFolder, open_model_folder, rows_of


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    Attributes:
        recipe: as it was given.
        parameters: the method's parameters, defaults filled in.
        base: the open base model, or None for a method without one.
        models: the open fine-tuned models.
        alignment: how their tensors become those of the result.
        tasks: every tensor of the result, in the order in which it is made.
        dtype: of the result: float32, float16 or bfloat16.
        notes: what the user should know.
    """

    recipe: Recipe
    parameters: Mapping[str, Any]
    base: ModelFolder | None
    models: list[ModelFolder]
    alignment: Alignment
    tasks: list[TensorTask]
    dtype: str
    notes: tuple[str, ...]

    @property
    def method(self) -> Method:
        """The recipe's method."""
        return METHODS[self.recipe.method]

    @property
    def template(self) -> ModelFolder:
        """The model that the result takes its config and tokenizer from."""
        return self.base or self.models[0]

    @property
    def sources(self) -> list[ModelFolder]:
        """All models, the base (if any) first."""
        return self.models if self.base is None else [self.base, *self.models]

    @property
    def passes(self) -> int:
        """How often the inputs are read."""
        return self.method.passes(self.parameters)

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs, all passes together."""
        once = sum(
            TensorInfo(source.tensors[name].dtype, task.info.shape).nbytes
            for task in self.tasks
            for source, name in zip(self.sources, task.sources, strict=True)
        )
        return once * self.passes

    @property
    def write_bytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(task.info.nbytes for task in self.tasks)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtype and shape of the result's tensors."""
        return {task.name: task.info for task in self.tasks}


@contextmanager
def open_plan(recipe: Recipe, other_problems: Sequence[str] = ()) -> Iterator[Plan]:
    """Check a recipe against its models and lay out the merge; the models are open meanwhile.

    Args:
        recipe: what to merge.
        other_problems: what is wrong with the settings, to be said with everything else.

    Raises:
        ValueError: something is wrong with the parameters or the output (the text also lists
            what is wrong with the models).
        ModelCompatibilityError: models cannot be read or do not fit together.
    """
    with ExitStack() as stack:
        parameters, usage = _check_recipe(recipe)
        usage += other_problems
        names = recipe.models if recipe.base_model is None else (recipe.base_model, *recipe.models)
        sources, broken = _open_all(names, stack)
        alignment = None
        if sources:
            try:
                alignment = align(sources)
            except ModelCompatibilityError as error:
                broken += error.problems
        if usage:
            raise ValueError("\n".join([*usage, *broken]))
        if broken or alignment is None:
            raise ModelCompatibilityError(broken)
        yield _lay_out(recipe, parameters, sources, alignment)


def _check_recipe(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """Resolved parameters, and everything wrong with them, the models' number or the output."""
    method = METHODS.get(recipe.method)
    if method is None:
        return {}, [unknown_name("method", recipe.method, METHODS)]
    problems = []
    if method.uses_base and recipe.base_model is None:
        problems.append(f"{recipe.method} needs a base_model, the common ancestor of the models")
    if not method.uses_base and recipe.base_model is not None:
        problems.append(f"{recipe.method} takes no base_model, got {recipe.base_model}")
    count = len(recipe.models)
    if count != method.model_count if method.model_count else count < 1:
        expected = f"exactly {method.model_count}" if method.model_count else "at least 1"
        problems.append(f"{recipe.method} takes {expected} fine-tuned models, got {count}")
    parameters, wrong = resolve_parameters(method.parameters, recipe.parameters, count)
    if count and not wrong:
        try:
            method.check(parameters)
        except ValueError as error:
            wrong.append(str(error))
    return parameters, problems + wrong + output_problems(recipe)


def _open_all(names: tuple[str, ...], stack: ExitStack) -> tuple[list[ModelFolder], list[str]]:
    """Open every model that can be opened; texts on those that cannot, each once."""
    opened: list[ModelFolder] = []
    problems: dict[str, None] = {}
    for name in names:
        try:
            opened.append(stack.enter_context(open_model_folder(name)))
        except ModelCompatibilityError as error:
            problems.update(dict.fromkeys(error.problems))
    return opened, list(problems)


def _lay_out(
    recipe: Recipe, parameters: Mapping[str, Any], sources: list[ModelFolder], alignment: Alignment
) -> Plan:
    base = None if recipe.base_model is None else sources[0]
    models = sources if base is None else sources[1:]
    dtype = recipe.dtype or _main_dtype(sources[0])
    tasks = [
        TensorTask(name, TensorInfo(DTYPE_NAMES[dtype], tensor.shape), tensor.sources, parameters)
        for name, tensor in alignment.tensors.items()
    ]
    notes = [*METHODS[recipe.method].advice(parameters), *_model_notes(sources), *alignment.notes]
    if recipe.dtype is None:
        notes += _rounding_notes(sources[0], dtype)
    return Plan(recipe, parameters, base, models, alignment, tasks, dtype, tuple(notes))


def _model_notes(sources: Sequence[ModelFolder]) -> Iterator[str]:
    """Says where one folder stands for two models."""
    seen: dict[Path, str] = {}
    for source in sources:
        path = source.path.resolve()
        if path in seen:
            yield f"{source.label}: the same model as {seen[path]}"
        seen.setdefault(path, source.label)


def _rounding_notes(model: ModelFolder, dtype: str) -> Iterator[str]:
    """Says that a model stores some tensors in another dtype than most, and the result does not."""
    stored = DTYPE_NAMES[dtype]
    others = [info.dtype for info in model.tensors.values() if info.dtype != stored]
    if others:
        yield (
            f"{model.label}: stores {'/'.join(sorted(set(others)))} in {len(others)} of "
            f"{len(model.tensors)} tensors, {stored} in most; the result is {dtype} throughout "
            "(set dtype for another)"
        )


def _main_dtype(model: ModelFolder) -> str:
    """The dtype in which most of a model's elements are stored."""
    counts: Counter[str] = Counter()
    for info in model.tensors.values():
        counts[info.dtype] += info.numel
    main = counts.most_common(1)[0][0]
    return next(name for name, stored in DTYPE_NAMES.items() if stored == main)


def free_bytes(output_dir: Path) -> int:
    """Free space where a folder would be made."""
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def working_bytes(plan: Plan, threads: int) -> int:
    """About how much memory the blocks take.

    Per thread a few float32 tensors for each input, and what up to three spans have gathered
    (for TIES, a histogram per model).
    """
    rows = (rows_of(task.info.shape) for task in plan.tasks)
    longest = max(min(count * length, max(BLOCK_ELEMENTS, length)) for count, length in rows)
    blocks = threads * (7 * len(plan.sources) + 8) * 4 * longest
    gathered = 3 * threads * len(plan.models) * 2**19 if plan.passes > 1 else 0
    return blocks + gathered


def describe_plan(plan: Plan, threads: int) -> str:
    """A plan as text, for `--plan`."""
    recipe = plan.recipe
    lines = [f"method      {recipe.method}"]
    lines += [f"  {name:<10}{_shown(value)}" for name, value in plan.parameters.items()]
    lines += [
        f"{'base' if source is plan.base else 'model':<12}{_place(source)} ({_stored(source)})"
        for source in plan.sources
    ]
    tensors = f"{len(plan.tasks)}, {sum(task.info.numel for task in plan.tasks):,} elements"
    lines += [
        f"output      {recipe.output_dir or 'not named'}, {plan.dtype}",
        f"tensors     {tensors}, vocabulary {plan.alignment.vocab_size}, "
        f"head {'tied' if plan.alignment.tied else 'of its own'}",
        f"read        {format_bytes(plan.read_bytes)} in {plan.passes} "
        f"pass{'es' if plan.passes > 1 else ''}",
        f"write       {format_bytes(plan.write_bytes)}",
        f"memory      about {format_bytes(working_bytes(plan, threads))} beside Python and torch",
    ]
    notes = list(plan.notes)
    if recipe.output_dir is not None:
        free = free_bytes(recipe.output_dir)
        lines.append(f"disk free   {format_bytes(free)}")
        if free < plan.write_bytes:
            notes.append("the disk has too little room; the merge would be refused")
    return "\n".join(lines + [f"note        {note}" for note in notes])


def _shown(value: Any) -> str:
    return ", ".join(str(entry) for entry in value) if isinstance(value, tuple) else str(value)


def _place(model: ModelFolder) -> str:
    """What the user called a model, and the folder if that is another."""
    return model.label if str(model.path) == model.label else f"{model.label} in {model.path}"


def _stored(model: ModelFolder) -> str:
    size = sum(info.nbytes for info in model.tensors.values())
    kinds = sorted({info.dtype for info in model.tensors.values()})
    return f"{model.config.get('model_type')}, {'/'.join(kinds)}, {format_bytes(size)}"


def format_bytes(count: float) -> str:
    """A size for people, in decimal units.

    >>> format_bytes(2200000000), format_bytes(512)
    ('2.20 GB', '512 bytes')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
