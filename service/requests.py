"""What a client asks for, as recipes: one grammar with the command line and recipe files.

A client names models by their ids, never by paths: what is no id is refused before anything of
it is looked up on the disk.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple

from merge_chain import check_stages
from merge_document import recipe_document
from merge_grammar import COMMON_KEYS, EVERY_KEY, OWN_KEYS, Stage, read_recipes, recipe_of
from merge_methods import ALIASES, METHODS, Method
from merge_recipe import KEYS, LayerRange, Recipe, Slice, unknown_name
from merge_yaml import RecipeError, write_recipes
from model_vocabulary import BY_MODEL
from service.schemas import ExperimentRequest

SOURCE = "recipe"
"""What recipes are called in messages."""

MODEL_LIMITS = {"linear": (2, 8), "slerp": (2, 2)}
"""Models of the methods that are asked for by name; of others at least `FEWEST`."""
FEWEST = {"ties": 2, "dare": 2}
FOR_MORE = {"slerp": "For more take multislerp or karcher"}

MOST_MODELS = 64

_PLACE = re.compile(
    rf"{SOURCE}(?::(?P<line>\d+))?: (?:(?P<path>[a-z_]\w*(?:[.\[][\w.\]\[-]*)?): )?"
)
_NAME = re.compile(r"[\w.-]+(\+[\w.-]+(:-?[\d.]+(e-?\d+)?)?)*")


class Problem(NamedTuple):
    """Something wrong with a request.

    Attributes:
        where: the entry of the request, as `models[1].weight`; of a recipe its line or entry; empty
            where it is about the whole.
        text: what is wrong, and what to do.
    """

    where: str
    text: str


class RequestError(ValueError):
    """A request that cannot be carried out; everything that is wrong with it at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problem.text for problem in self.problems))


class Names(NamedTuple):
    """What models are called.

    Attributes:
        references: by id, what the merge calls the model.
        bases: of adapters, by their ids, the id of the model that they were trained on.
        unavailable: by id, why a model cannot be merged now.
    """

    references: Mapping[str, str]
    bases: Mapping[str, str | None]
    unavailable: Mapping[str, str]


def recipe_text(request: ExperimentRequest, names: Names) -> tuple[str, list[str]]:
    """The recipe of a request as YAML, models by their ids, and what to know of it.

    Raises:
        RequestError: something is wrong with it.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    if request.recipe is not None:
        told = ("base_model", "method", "models", "parameters")
        given = [name for name in told if getattr(request, name)]
        others = [*given, *(request.model_extra or {})]
        if others:
            raise RequestError(
                Problem(name, f"{name} does not go with a whole recipe. Say it there")
                for name in others
            )
        stages = _read(request.recipe)
    else:
        problems += _unknown_entries(request)
        try:
            content, notes = _document(request, names)
            stages = [_stage_of(content)]
        except RequestError as error:
            raise RequestError([*problems, *error.problems]) from None
    problems += _name_problems(stages, names, request)
    try:
        check_stages(stages)
    except RecipeError as error:
        problems += problems_of(error)
    if problems:
        raise RequestError(problems)
    notes += [note for stage in stages for note in stage.recipe.notes]
    contents = [
        ({"name": stage.name} if stage.name else {}) | recipe_document(stage.recipe)
        for stage in stages
    ]
    return write_recipes(contents), notes


def stages_of(text: str, references: Mapping[str, str]) -> list[Stage]:
    """The recipes of a text that `recipe_text` gave, with names that a merge finds models by."""
    stages = read_recipes(text, SOURCE)
    own = {stage.name for stage in stages}
    known = {key: name for key, name in references.items() if key not in own}
    return [stage._replace(recipe=_renamed(stage.recipe, known)) for stage in stages]


def model_ids(text: str) -> tuple[str | None, list[str]]:
    """The base and the models of a recipe, as a client named them; results of others left out."""
    stages = read_recipes(text, SOURCE)
    own = {stage.name for stage in stages}

    def is_there(name: str | None) -> bool:
        return name is not None and own.isdisjoint(ids_in(name))

    bases = [stage.recipe.base_model for stage in stages]
    base = next(filter(is_there, bases), None)
    found = filter(is_there, (name for stage in stages for name in _models_of(stage.recipe)))
    return base, [name for name in dict.fromkeys(found) if name != base]


def all_ids(text: str) -> list[str]:
    """The ids of all models and adapters of a recipe."""
    stages = read_recipes(text, SOURCE)
    own = {stage.name for stage in stages}
    names = (name for stage in stages for name in _models_of(stage.recipe))
    return sorted({each for name in names for each in ids_in(name)} - own)


def _parts(name: str) -> list[tuple[str, str]]:
    """A model and its adapters: the id of each, and what follows it.

    >>> _parts("base+lora:0.5")
    [('base', ''), ('lora', ':0.5')]
    """
    parts = (part.partition(":") for part in name.split("+"))
    return [(key, colon + strength) for key, colon, strength in parts]


def ids_in(name: str) -> list[str]:
    """The ids of a model, maybe with adapters."""
    return [key for key, _ in _parts(name)]


def referred(name: str, references: Mapping[str, str]) -> str:
    """What a model, maybe with adapters, is called where it is loaded."""
    return "+".join(references.get(key, key) + strength for key, strength in _parts(name))


def problems_of(error: Exception, *, form: bool = False) -> list[Problem]:
    """What an error of a merge or plan says, a problem for each line.

    Args:
        error: as it was raised.
        form: places are said as those of a request, not of a recipe.
    """
    found = []
    for line in str(error).splitlines():
        match = _PLACE.match(line)
        if match is None:
            found.append(Problem("", line))
            continue
        path = match["path"] or ""
        if form:
            path = path.replace(".parameters", "").replace(".model", ".id")
            path = path or _entry_of(line[match.end() :])
        where = path or (f"line {match['line']}" if match["line"] else "")
        if path and match["line"]:
            where = f"line {match['line']}: {path}"
        found.append(Problem(where, line[match.end() :]))
    return found


def _entry_of(text: str) -> str:
    """The entry of a request that a text on the whole recipe is about, by its words."""
    if "needs a base_model" in text:
        return "base_model"
    found = re.match(r"(\w+) must ", text)
    if found is None or not any(found[1] in _parameter_names(each) for each in METHODS.values()):
        return ""
    key = KEYS.get(found[1], found[1])
    model = re.search(r"\(model (\d+)\)$", text)
    return f"models[{int(model[1]) - 1}].{key}" if model else f"parameters.{key}"


def _parameter_names(method: Method) -> list[str]:
    return [parameter.name for parameter in method.parameters]


def _read(text: str) -> list[Stage]:
    try:
        return read_recipes(text, SOURCE)
    except RecipeError as error:
        raise RequestError(problems_of(error)) from None


def _stage_of(content: Mapping[str, Any]) -> Stage:
    try:
        return Stage(None, recipe_of(content, SOURCE), "")
    except RecipeError as error:
        raise RequestError(problems_of(error, form=True)) from None


# A request by method and models


def _document(request: ExperimentRequest, names: Names) -> tuple[dict[str, Any], list[str]]:
    """A request as the mapping that a recipe file holds, and what to know of it."""
    problems = [*_form_problems(request)]
    notes: list[str] = []
    parameters = dict(request.parameters)
    own = [dict(model.parameters) for model in request.models]
    if request.method == "slerp":
        notes += _alpha(parameters, own, problems)
    if request.method == "dare" or ALIASES.get(str(request.method), ("",))[0] == "dare":
        problems += _drop_rate(parameters, "parameters")
        for index, each in enumerate(own):
            problems += _drop_rate(each, f"models[{index}]")
    base = parameters.pop("base_model", None) if request.base_model is None else request.base_model
    if problems:
        raise RequestError(problems)
    base = _whole_name(base, names) if isinstance(base, str) else base
    models = [_whole_name(model.id, names) for model in request.models]
    content: dict[str, Any] = {
        "method": request.method,
        **({} if base is None else {"base_model": base}),
        "models": [
            {"model": model} | ({"parameters": each} if each else {})
            for model, each in zip(models, own, strict=True)
        ],
        **({"parameters": parameters} if parameters else {}),
        **{key: each for key, each in (request.model_extra or {}).items() if key in EVERY_KEY},
    }
    return content, notes


def _unknown_entries(request: ExperimentRequest) -> Iterator[Problem]:
    known = dict.fromkeys([*ExperimentRequest.model_fields, *COMMON_KEYS, *OWN_KEYS])
    for key in request.model_extra or {}:
        if key not in EVERY_KEY:
            yield Problem(key, unknown_name("entry", key, known))


def _form_problems(request: ExperimentRequest) -> Iterator[Problem]:
    if request.method is None:
        text = "give a method and models, or a whole recipe. Methods: " + ", ".join(METHODS)
        yield Problem("method", text)
        return
    if request.method not in METHODS and request.method not in ALIASES:
        yield Problem("method", unknown_name("method", request.method, [*METHODS, *ALIASES]))
        return
    count = len(request.models)
    fewest, most = MODEL_LIMITS.get(request.method, (FEWEST.get(request.method, 1), MOST_MODELS))
    if not fewest <= count <= most:
        wanted = f"exactly {most}" if fewest == most else f"{fewest} to {most}"
        text = f"{request.method} takes {wanted} models, got {count}"
        if count > most and request.method in FOR_MORE:
            text += f". {FOR_MORE[request.method]}"
        yield Problem("models", text)


def _alpha(
    parameters: dict[str, Any], own: Sequence[dict[str, Any]], problems: list[Problem]
) -> Iterator[str]:
    """SLERP's position by its name here: `alpha` is `t`, or the share of the second weight."""
    if "alpha" in parameters:
        if "t" in parameters:
            problems.append(Problem("parameters.alpha", "alpha is another word for t. Give one"))
        parameters["t"] = parameters.pop("alpha")
    weights = [each.pop("weight", None) for each in own]
    if weights == [None] * len(weights):
        return
    if "t" in parameters:
        yield "SLERP takes no weights: alpha alone says where between the models the result lies"
    elif all(_is_positive(weight) for weight in weights) and len(weights) == 2:
        parameters["t"] = weights[1] / (weights[0] + weights[1])
        yield f"alpha is {parameters['t']:.6g}, the second model's share of the weights"
    else:
        text = "the weights give no alpha: expected one above 0 for each model. Give alpha instead"
        problems.append(Problem("models[0].weight", text))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _drop_rate(parameters: dict[str, Any], where: str) -> Iterator[Problem]:
    """DARE's share that is dropped, as the density that is kept."""
    if "drop_rate" not in parameters:
        return
    rate = parameters.pop("drop_rate")
    if "density" in parameters:
        yield Problem(f"{where}.drop_rate", "drop_rate is 1 - density. Give one of them")
    elif not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate < 1:
        text = f"drop_rate must be a number of at least 0 and below 1, got {rate!r}"
        yield Problem(f"{where}.drop_rate", text)
    else:
        parameters["density"] = float(1 - Decimal(repr(rate)))  # 0.1 of 0.9, not 0.0999...


def _whole_name(name: str, names: Names) -> str:
    """A model's name; an adapter that stands alone comes with the base it was trained on."""
    base = names.bases.get(name)
    return name if base is None else f"{base}+{name}"


# Names


def _models_of(recipe: Recipe) -> list[str]:
    sliced = [source.model for each in recipe.slices for source in each.inputs]
    return [*dict.fromkeys([*recipe.names, *sliced])]


def _name_problems(
    stages: Sequence[Stage], names: Names, request: ExperimentRequest
) -> Iterator[Problem]:
    """Names that are no ids, nor results of the same recipe."""
    places = {_whole_name(each.id, names): at for at, each in enumerate(request.models)}
    lines = (request.recipe or "").splitlines()

    def where(name: str) -> str:
        if name in places:
            return f"models[{places[name]}].id"
        at = next((number for number, line in enumerate(lines, 1) if name in line), None)
        if at is not None:
            return f"line {at}"
        return "models" if request.base_model is None else "base_model"

    own = {stage.name for stage in stages if stage.name is not None}
    models = dict.fromkeys(name for stage in stages for name in _models_of(stage.recipe))
    if len(models) > MOST_MODELS:
        yield Problem("models", f"{len(models)} models; a recipe has at most {MOST_MODELS}")
    for name in models:
        if not _NAME.fullmatch(name):
            meant = _meant(name, names)
            text = f"{name[:100]!r} is no id of a model. "
            text += f"Is {meant!r} meant?" if meant else "Take one of the list of models"
            yield Problem(where(name), text)
            continue
        for part in ids_in(name):
            if part in own:
                continue
            if part not in names.references:
                yield Problem(where(name), unknown_name("model", part, names.references))
            elif part in names.unavailable:
                yield Problem(where(name), f"{part}: {names.unavailable[part]}")
            elif part == name and part in names.bases:
                text = f"{part} is an adapter. Name its base with it: BASE+{part}"
                yield Problem(where(name), text)


def _meant(name: str, names: Names) -> str | None:
    """The id of a model that is called otherwise elsewhere: on the Hub, on a disk, on a page."""
    by_hub_id = {other: key for key, other in names.references.items() if other != key}
    others = (by_hub_id.get(name), id_of(name), id_of(name.rstrip("/").rpartition("/")[2]))
    return next((each for each in others if each in names.references), None)


def id_of(name: str) -> str:
    """What a model of a name or path is called, if no other is called so; empty for no letters.

    >>> id_of("team/über chat"), id_of("../")
    ('team-ber-chat', '')
    """
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-")


def _renamed(recipe: Recipe, references: Mapping[str, str]) -> Recipe:
    """A recipe with other names for its models, wherever it names them."""

    def rename(name: str) -> str:
        return referred(name, references)

    def maybe(name: str | None) -> str | None:
        return None if name is None else rename(name)

    def of_layers(layers: LayerRange) -> LayerRange:
        return layers._replace(model=rename(layers.model))

    settings = recipe.vocabulary
    donor = settings.donor_name
    return replace(
        recipe,
        models=tuple(map(rename, recipe.models)),
        base_model=maybe(recipe.base_model),
        slices=tuple(_renamed_slice(each, of_layers) for each in recipe.slices),
        tokenizer_source=maybe(recipe.tokenizer_source),
        chat_template=references.get(recipe.chat_template, recipe.chat_template),
        vocabulary=replace(
            settings,
            mode=settings.mode if donor is None else f"{BY_MODEL}{rename(donor)}",
            tokens={
                token: replace(source, model=rename(source.model))
                for token, source in settings.tokens.items()
            },
        ),
    )


def _renamed_slice(each: Slice, rename: Callable[[LayerRange], LayerRange]) -> Slice:
    return replace(
        each,
        sources=tuple(map(rename, each.sources)),
        base=None if each.base is None else rename(each.base),
    )
