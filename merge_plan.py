"""From a recipe to what will happen, from config.json and the headers alone.

What can be known without reading weights is refused here, all at once.
"""

import fnmatch
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_findings import observed
from merge_layers import Place, config_changes, placed, slice_problems, views
from merge_lora import open_model
from merge_methods import ALIASES, METHODS, Method
from merge_operations import Finish, Loops, Operations
from merge_parameters import PROFILES, Values
from merge_recipe import Recipe, option_problems, output_problems, unknown_name
from merge_resolve import Parameters, distinct, resolve, tensor_parameters, unused_filters
from merge_stream import Merge, Passes, TensorTask
from model_checks import EMBEDDING, HEAD, model_problems
from model_companions import CarriedFiles, carry, code_note
from model_config import code_keys, merged_config, without_code
from model_errors import ModelCompatibilityError, refusal
from model_prep import Alignment, align, fit_problems
from model_safetensors import DTYPE_NAMES, TensorInfo
from model_utils import ModelFolder, Origin, WeightFile
from model_vocabulary import chosen_donor, settings_problems


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    Attributes:
        recipe: as it was given, its method under our name.
        parameters: the method's parameters, defaults filled in; of each slice, if there are any.
        base: the open base model, or None for a method without one.
        models: the open fine-tuned models.
        alignment: how their tensors become those of the result.
        tasks: every tensor of the result, in the order in which it is made.
        dtype: of the result: float32, float16 or bfloat16.
        config_text: config.json of the result.
        carried: its other files.
        notes: what the user should know.
    """

    recipe: Recipe
    parameters: tuple[Values, ...]
    base: ModelFolder | None
    models: list[ModelFolder]
    alignment: Alignment
    tasks: list[TensorTask]
    dtype: str
    config_text: str
    carried: CarriedFiles
    notes: tuple[str, ...]

    @property
    def method(self) -> Method:
        """The recipe's method."""
        return METHODS[self.recipe.method]

    @property
    def template(self) -> ModelFolder:
        """The model that the result takes its config from."""
        return self.base or self.models[0]

    @property
    def sources(self) -> list[ModelFolder]:
        """All models, the base (if any) first."""
        return self.models if self.base is None else [self.base, *self.models]

    @property
    def groups(self) -> list[list[TensorTask]]:
        """The tensors that are merged together: each alone, in the order of the files, or all."""
        merged = [task for task in self.tasks if not task.copied]
        if self.whole_model and merged:
            return [merged, *([task] for task in self.tasks if task.copied)]
        return [[task] for task in sorted(self.tasks, key=self._position)]

    def _position(self, task: TensorTask) -> tuple[int, int]:
        """Where a tensor lies in the files of the first model that feeds it."""
        model, name = task.inputs[0]
        return self.sources[model].position(name)

    def merge(self, tasks: Sequence[TensorTask], operations: Operations) -> Passes | Merge:
        """Merge a group; what is not to be merged is copied."""
        if tasks[0].copied:
            return Merge(operations.copy())
        return self.method.merge(tasks, operations)

    def observe(self, tasks: Sequence[TensorTask], operations: Operations) -> Passes:
        """Merge a group, and find out what its models have changed."""
        merge = self.merge(tasks, operations)
        if not isinstance(merge, Merge):
            merge = yield from merge
        if tasks[0].copied:
            return merge
        return observed(merge, tasks, operations, has_base=self.base is not None)

    @cached_property
    def variants(self) -> list[Values]:
        """Parameters of the tensors that are merged, each set of them once."""
        return distinct(task.parameters for task in self.tasks if not task.copied)

    @property
    def whole_model(self) -> bool:
        """Whether all tensors are merged as one."""
        return any(map(self.method.whole_model, self.variants))

    @property
    def loops(self) -> Loops:
        """How much of the arithmetic there are compiled loops for."""
        kinds = {self.method.loops(each) for each in self.variants}
        return kinds.pop() if len(kinds) == 1 else "some"

    @property
    def same_models(self) -> bool:
        """Whether all tensors are merged from the same models: what is found out can be added."""
        inputs = {
            tuple(each.model for each in task.inputs) for task in self.tasks if not task.copied
        }
        return len(inputs) == 1

    @property
    def most_models(self) -> int:
        """How many models, besides the base, feed a tensor at most."""
        return max(len(task.inputs) for task in self.tasks) - (self.base is not None)

    @property
    def passes(self) -> int:
        """How often the inputs are read at most."""
        return max(map(self.passes_of, self.tasks))

    def passes_of(self, task: TensorTask) -> int:
        """How often a tensor's inputs are read."""
        return 1 if task.copied else self.method.passes(task.parameters)

    @property
    def finish(self) -> Finish:
        """What is done to every merged value."""
        return Finish(self.recipe.weight_decay, self.recipe.clamp_range)

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs' rows, all passes together; one that stands in counts as read."""
        return sum(self.read_bytes_of([task], self.passes_of(task)) for task in self.tasks)

    def read_bytes_of(self, tasks: Sequence[TensorTask], passes: int) -> int:
        """Bytes of some tensors' inputs, read so often."""
        return passes * sum(
            TensorInfo(self.sources[model].tensors[name].dtype, task.info.shape).nbytes
            for task in tasks
            for model, name in task.inputs
        )

    @property
    def download_bytes(self) -> int:
        """Bytes of weights that are on the Hub only."""
        return sum({each.path: each.download_bytes for each in self.origins}.values())

    @property
    def origins(self) -> list[Origin]:
        """What all models are read from."""
        return [origin for source in self.sources for origin in source.origins]

    @property
    def write_bytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(task.info.nbytes for task in self.tasks)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtype and shape of the result's tensors."""
        return {task.name: task.info for task in self.tasks}


@dataclass
class Earlier:
    """Results of earlier recipes, which a recipe may name as its models.

    Attributes:
        models: by name.
        plans: how they are made.
        memory_bytes: what is taken to merge those that are merged as they are read.
        disk_bytes: what those take that are merged into a folder first.
        hashes: SHA-256 of their weight files, if these were to be verified.
        bytes_read: for those that were merged into a folder.
        notes: what the user should know of how they were made.
    """

    models: dict[str, ModelFolder] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    memory_bytes: int = 0
    disk_bytes: int = 0
    hashes: dict[WeightFile, str] = field(default_factory=dict)
    bytes_read: int = 0
    notes: tuple[str, ...] = ()


@contextmanager
def open_plan(
    recipe: Recipe,
    other_problems: Sequence[str] = (),
    *,
    weights: bool = True,
    earlier: Earlier | None = None,
) -> Iterator[Plan]:
    """Check a recipe against its models and lay out the merge; the models are open meanwhile.

    Args:
        recipe: what to merge.
        other_problems: what is wrong with the settings, to be said with everything else.
        weights: whether weights are to be read. Without, those of a Hub model stay there, and
            only their headers are fetched.
        earlier: results of earlier recipes.

    Raises:
        ValueError: something is wrong with the parameters or the output (the text also lists
            what is wrong with the models).
        ModelCompatibilityError: models cannot be read or do not fit together.
    """
    recipe = canonical(recipe)
    with ExitStack() as stack:
        parameters, problems = check_recipe(recipe)
        of_output = output_problems(recipe)  # which the recipe does not name
        usage = recipe.placed(each for each in problems if each not in of_output)
        usage += [*of_output, *other_problems]
        sources, broken = _open_all(recipe, stack, weights, earlier or Earlier())
        broken = recipe.placed(broken)
        usage += place_problems(recipe.output_dir, sources)
        by_name = dict(zip(recipe.names, sources, strict=False))
        if len(sources) == len(recipe.names):
            usage += recipe.placed(slice_problems(recipe, by_name))
        if len(sources) == len(recipe.names) and not recipe.slices:  # whose tensors are named anew
            usage += _pattern_problems(recipe, [name for each in sources for name in each.tensors])
        if usage or len(sources) < len(recipe.names):
            broken += _fit_problems(recipe, sources)
            if usage:
                raise ValueError("\n".join([*usage, *broken]))
            raise refusal(broken)
        if recipe.slices and (wrong := [p for each in sources for p in model_problems(each)]):
            raise ModelCompatibilityError(wrong)
        alignment = _align(recipe, parameters[0], sources)
        carried, broken = carry(sources, alignment.vocabulary, recipe.chat_template)
        if broken:
            raise refusal(broken)
        yield _lay_out(recipe, parameters, sources, alignment, carried)


def _fit_problems(recipe: Recipe, sources: Sequence[ModelFolder]) -> list[str]:
    """What is wrong with the models; with slices, what is wrong with one layer of each."""
    of_each = [problem for each in sources for problem in model_problems(each)]
    return of_each if recipe.slices and of_each else fit_problems(views(recipe, sources))


def _align(recipe: Recipe, parameters: Parameters, sources: Sequence[ModelFolder]) -> Alignment:
    donor, _ = chosen_donor(recipe.names, recipe.vocabulary, recipe.tokenizer_source)
    weights = None
    if recipe.method == "linear" and not recipe.slices:
        values, _ = parameters.at(EMBEDDING, 0.0, [EMBEDDING] * len(recipe.models))
        weights = values["weights"] if values["normalize"] else None
    return align(
        views(recipe, sources),
        recipe.vocabulary,
        donor=donor,
        has_base=recipe.base_model is not None,
        weights=weights,
    )


def check_recipe(recipe: Recipe) -> tuple[list[Parameters], list[str]]:
    """Parameters of the slices, and everything wrong with them, the models' number, the output."""
    others = option_problems(recipe) + output_problems(recipe) + _vocabulary_problems(recipe)
    method = METHODS.get(recipe.method)
    if method is None:
        return [], [unknown_name("method", recipe.method, [*METHODS, *ALIASES]), *others]
    problems = []
    if recipe.profile not in PROFILES:
        problems.append(unknown_name("profile", recipe.profile, PROFILES))
    if method.base == "required" and not recipe.has_base:
        problems.append(f"{recipe.method} needs a base_model, the common ancestor of the models")
    if method.base == "none" and recipe.base_model is not None:
        problems.append(f"{recipe.method} takes no base_model, got {recipe.base_model}")
    parameters, wrong = resolve(recipe)
    return parameters, [*problems, *wrong, *others]


def _vocabulary_problems(recipe: Recipe) -> list[str]:
    problems = settings_problems(recipe.vocabulary)
    if not problems:
        _, problems = chosen_donor(recipe.names, recipe.vocabulary, recipe.tokenizer_source)
    return problems


def canonical(recipe: Recipe) -> Recipe:
    """A recipe with our name for its method, where it has mergekit's for a variant.

    Raises:
        ValueError: the parameters ask for another variant than the name.
    """
    if recipe.method not in ALIASES:
        return recipe
    method, _ = ALIASES[recipe.method]
    if not recipe.slices:
        parameters = _with_implied(recipe.method, recipe.parameters)
        return replace(recipe, method=method, parameters=parameters)
    slices = tuple(
        replace(each, parameters=_with_implied(recipe.method, each.parameters))
        for each in recipe.slices
    )
    return replace(recipe, method=method, slices=slices)


def _with_implied(alias: str, parameters: Values) -> Values:
    """Parameters with those that mergekit's name for a variant stands for."""
    given = {name: value for name, value in parameters.items() if value is not None}
    _, implied = ALIASES[alias]
    for name, value in implied.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{alias} means {name} {value!r}, got {given[name]!r}. Leave {name} out"
            )
    return {**given, **implied}


def _open_all(
    recipe: Recipe, stack: ExitStack, weights: bool, earlier: Earlier
) -> tuple[list[ModelFolder], list[str]]:
    """Open every model that can be opened; texts on those that cannot, each once."""
    opened: list[ModelFolder] = []
    problems: dict[str, None] = {}
    for index, name in enumerate(recipe.names):
        if name in earlier.models:
            opened.append(earlier.models[name])
            continue
        # An adapter alone is put on the base, where there is one.
        below = recipe.base_model if index else None
        try:
            model = open_model(
                name, recipe.lora, weights=weights, base_model=below, earlier=earlier.models
            )
            opened.append(stack.enter_context(model))
        except ModelCompatibilityError as error:
            problems.update(dict.fromkeys(error.problems))
    return opened, list(problems)


def _lay_out(
    recipe: Recipe,
    slices: list[Parameters],
    sources: list[ModelFolder],
    alignment: Alignment,
    carried: CarriedFiles,
) -> Plan:
    method = METHODS[recipe.method]
    base = None if recipe.base_model is None else sources[0]
    dtype = recipe.dtype or _main_dtype(sources[0])
    places = placed(recipe, alignment.tensors, sources[0].config["num_hidden_layers"])
    copied = _copied(recipe, places, tied=alignment.tied)
    parameters = tensor_parameters(
        recipe, slices, places, [name for name in places if name not in copied]
    )
    tasks = [
        _task(name, place, DTYPE_NAMES[dtype], parameters.get(name), method)
        for name, place in places.items()
    ]
    by_name = dict(zip(recipe.names, sources, strict=True))
    advice = [text for values in distinct(parameters.values()) for text in method.advice(values)]
    notes = [*recipe.notes, *unused_filters(slices, places), *dict.fromkeys(advice)]
    notes += [*dict.fromkeys(_model_notes(sources)), *alignment.notes, *carried.notes]
    if keys := code_keys(sources[0].config):
        notes.append(code_note(sources[0].label, "config.json", keys))
    if copied:
        owners = dict.fromkeys(sources[places[name].inputs[0].model].label for name in copied)
        notes.append(
            f"{len(copied)} of {len(tasks)} tensors are not merged but those of "
            f"{', '.join(owners)}: {', '.join(copied[:3])}{', ...' if len(copied) > 3 else ''}"
        )
    if recipe.dtype is None:
        notes += _rounding_notes(sources[0], dtype)
        notes += _precision_notes(sources, dtype)
    return Plan(
        recipe=recipe,
        parameters=tuple(each.values for each in slices),
        base=base,
        models=sources if base is None else sources[1:],
        alignment=alignment,
        tasks=tasks,
        dtype=dtype,
        config_text=_config_text(sources[0], dtype, alignment, config_changes(recipe, by_name)),
        carried=carried,
        notes=tuple(notes),
    )


def _task(
    name: str, place: Place, dtype: str, parameters: Values | None, method: Method
) -> TensorTask:
    """What is to be done for a tensor; without parameters it is copied."""
    return TensorTask(
        name,
        TensorInfo(dtype, place.aligned.shape),
        place.inputs if parameters is not None else place.inputs[:1],
        parameters or {},
        place.aligned.row_map,
        place.aligned.sources,
        in_order=parameters is not None and method.in_order(parameters),
        copied=parameters is None,
    )


def _copied(recipe: Recipe, names: Collection[str], *, tied: bool) -> list[str]:
    """The tensors that are not to be merged.

    Raises:
        ValueError: a pattern fits no tensor, no tensor is left, or the head is not to be merged
            but is the embedding.
    """
    problems = _pattern_problems(recipe, names)
    if tied and recipe.merge_embeddings and not recipe.merge_lm_head:
        problems.append(
            "merge_lm_head false: the head of these models is their embedding. Turn "
            "merge_embeddings off as well, or merge both"
        )
    if problems:
        raise ValueError("\n".join(problems))
    left = [*recipe.exclude]
    left += [] if recipe.merge_embeddings else [EMBEDDING]
    left += [] if recipe.merge_lm_head else [HEAD]
    copied = [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in left)
        or not any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.include or ("*",))
    ]
    if len(copied) == len(names):
        raise ValueError(
            "include, exclude, merge_embeddings and merge_lm_head leave none of the "
            f"{len(names)} tensors to be merged. Leave some in"
        )
    return copied


def _pattern_problems(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """Patterns that fit no tensor."""
    known = list(dict.fromkeys(names))
    return [
        f"{option} {pattern!r} fits none of the {len(known)} tensors; they are named like "
        f"{known[0]} and {known[-1]}. * stands for anything"
        for option in ("include", "exclude")
        for pattern in getattr(recipe, option)
        if known and isinstance(pattern, str) and not fnmatch.filter(known, pattern)
    ]


def place_problems(output_dir: Path | None, sources: Sequence[ModelFolder]) -> list[str]:
    """An output that would lie inside one of the models, or adapters."""
    if output_dir is None:
        return []
    place = output_dir.resolve()
    origins = [origin for source in sources for origin in source.origins]
    around = [origin.name for origin in origins if origin.path.resolve() in place.parents]
    return [
        f"{output_dir}: the output lies inside the model {label!r}. Choose another place"
        for label in dict.fromkeys(around)
    ]


def _config_text(
    template: ModelFolder, dtype: str, alignment: Alignment, of_layers: Mapping[str, Any]
) -> str:
    """config.json of the result: the template's text with the values that the merge changes."""
    keys = [key for key in ("dtype", "torch_dtype") if key in template.config] or ["torch_dtype"]
    changes: dict[str, Any] = {
        **dict.fromkeys(keys, dtype),
        "vocab_size": alignment.vocabulary.rows,
        "tie_word_embeddings": alignment.tied,
        **alignment.special_ids,
        **of_layers,
    }
    return without_code(merged_config(template.config_text, changes))


def _model_notes(sources: Sequence[ModelFolder]) -> Iterator[str]:
    """Says where one folder stands for two models."""
    seen: dict[tuple[object, ...], str] = {}
    for source in sources:
        model = (*(origin.path.resolve() for origin in source.origins), source.strengths)
        if model in seen:
            yield f"{source.label}: the same model as {seen[model]}"
        seen.setdefault(model, source.label)
        yield from source.notes


def _rounding_notes(model: ModelFolder, dtype: str) -> Iterator[str]:
    """Says that a model stores some tensors in another dtype than most, and the result does not."""
    stored = DTYPE_NAMES[dtype]
    tensors = model.stored_tensors
    others = [info.dtype for info in tensors.values() if info.dtype != stored]
    if others:
        yield (
            f"{model.label}: stores {'/'.join(sorted(set(others)))} in {len(others)} of "
            f"{len(tensors)} tensors, {stored} in most; the result is {dtype} throughout "
            "(set dtype for another)"
        )


def _precision_notes(sources: Sequence[ModelFolder], dtype: str) -> Iterator[str]:
    """Says where other models than the first are stored in float32, and the result is not."""
    finer = [each.label for each in sources[1:] if _main_dtype(each) == "float32"]
    if finer and dtype != "float32":
        yield (
            f"the result is {dtype} as {sources[0].label}, although {', '.join(finer)} store "
            "float32 (set dtype for another)"
        )


def _main_dtype(model: ModelFolder) -> str:
    """The dtype in which most of a model's elements are stored."""
    counts: Counter[str] = Counter()
    for info in model.stored_tensors.values():
        counts[info.dtype] += info.numel
    main = counts.most_common(1)[0][0]
    return next(name for name, stored in DTYPE_NAMES.items() if stored == main)


def merged_when_read(plan: Plan) -> bool:
    """Whether rows of the result can be merged one by one, once what they share is known."""
    return not plan.whole_model and all(
        task.copied or not (task.in_order or plan.method.bins(task.parameters, len(task.inputs)))
        for task in plan.tasks
    )


def free_bytes(output_dir: Path) -> int:
    """Free space where a folder would be made."""
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
