"""Recipe files: mergekit's grammar, read into recipes; `merge_document` writes them down again.

A file with `merge_method` is mergekit's: it means what it means there, by the profile "mergekit".
One with `method` is ours: the same grammar, with our defaults. In both, everything is said at once
that is wrong, with the line and the path of the entry.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from merge_methods import ALIASES, METHODS, Method
from merge_parameters import PROFILES
from merge_plan import canonical, check_recipe
from merge_recipe import (
    KEYS,
    OPTIONS,
    LayerRange,
    Parameter,
    Recipe,
    Slice,
    brief,
    converted,
    make_recipe,
    unknown_name,
)
from merge_settings import ANY, Choice, Setting, joined
from merge_yaml import Document, RecipeError, path_text, read_documents
from merge_yaml import Path as Place
from model_chat_templates import CHAT_TEMPLATES
from model_companions import AUTO_TEMPLATE, NO_TEMPLATE
from model_safetensors import DTYPE_NAMES
from model_text import printable
from model_vocabulary import BY_MODEL, VocabularySettings, token_source

COMMON_KEYS = (
    *("name", "models", "slices", "base_model", "parameters", "dtype", "tokenizer_source"),
    *("chat_template", "profile", "max_shard_size", *OPTIONS),
)
MERGEKIT_KEYS = ("merge_method", "modules", "out_dtype", "tokenizer")
OWN_KEYS = ("method", "vocabulary")
EVERY_KEY = (*COMMON_KEYS, *MERGEKIT_KEYS, *OWN_KEYS)
"""That the top of a recipe can have."""

MODULE = "default"
"""The one module of a language model, as mergekit calls it."""

MAX_NAME = 100
NAME = re.compile(r"[\w.-]+")
"""What a recipe of a file may be called."""

MOST_SAID = 40
"""Problems that are said of a file; a broken one can have thousands."""

IGNORED = ("random_seed",)
"""Keys of published recipes that mergekit ignores as well: there it is an option of the command."""

NO_EFFECT = ("int8_mask", "embed_slerp")
"""Parameters of mergekit's that change no number."""

OURS_ALONE = {("karcher", "weight")}
"""Parameters that mergekit has, but not of these methods."""

INSTEAD = {"pattern": "filter", "alpha": "weight", "scaling_coefficient": "weight"}
"""Words that are no longer used, or are others', and ours for them."""

SHORT_DTYPES = {
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("bf16", "brain"), "bfloat16"),
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
}

KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}

Settings = Mapping[str, Setting]


class _Body(NamedTuple):
    """Base, models, parameters and slices of a recipe."""

    base_model: str | None
    models: tuple[str, ...]
    parameters: dict[str, Any]
    slices: tuple[Slice, ...] = ()


class Stage(NamedTuple):
    """One recipe of a file.

    Attributes:
        name: what later recipes of the file call its result; None if it has none.
        recipe: the recipe.
        place: file and line.
    """

    name: str | None
    recipe: Recipe
    place: str


def load_recipes(path: str | Path) -> list[Stage]:
    """The recipes in a file: YAML, or JSON if its name ends in .json.

    Raises:
        RecipeError: something is wrong with them; one line each.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return read_recipes(file.read(MAX_READ), str(path))


MAX_READ = 10**6 + 1
"""More than a recipe may have: what is longer is refused, not cut."""


def read_recipes(text: str | bytes, source: str = "recipe") -> list[Stage]:
    """The recipes in a text; see `load_recipes`."""
    stages, problems = [], []
    for document in read_documents(text, source):
        reader = _Reader(document)
        stage = reader.stage()
        problems += reader.problems
        if stage is not None:
            stages.append(stage)
    if not problems and not stages:
        problems.append(f"{source}: empty. Expected a recipe with merge_method and models")
    if problems:
        raise RecipeError(_said(problems))
    return stages


def _said(problems: list[str]) -> str:
    """The first problems, a line each, and how many there are besides."""
    more = len(problems) - MOST_SAID
    return "\n".join(problems[:MOST_SAID] + ([f"and {more} more"] if more > 0 else []))


def recipe_of(content: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """The recipe that a mapping says, such as `merge_document.recipe_document` gives.

    Raises:
        RecipeError: something is wrong with it.
    """
    reader = _Reader(Document(content, source))
    stage = reader.stage()
    if stage is None or reader.problems:
        raise RecipeError(_said(reader.problems))
    return stage.recipe


@dataclass
class _Entry:
    """A model of a recipe or of a slice.

    Attributes:
        model: its name.
        place: where it is said.
        settings: its own, nearest first.
        layers: first and last but one; None for all.
    """

    model: str
    place: Place
    settings: Settings
    layers: tuple[int, int] | None = None


@dataclass
class _Reader:
    """Reads one document.

    Attributes:
        document: the document.
        problems: what is wrong, one line each.
        notes: what has no effect.
        troubled: the entries that something is wrong with.
        merged: where the models stand that are merged, without slices.
    """

    document: Document
    problems: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    troubled: set[Place] = field(default_factory=set)
    merged: list[Place] = field(default_factory=list)
    is_mergekits: bool = False
    method_name: str = ""
    method: Method = METHODS["linear"]
    declared: Mapping[str, Parameter] = field(default_factory=dict)

    def wrong(self, place: Place, text: str) -> None:
        """Something is wrong with an entry."""
        self.problems.append(printable(f"{self.document.place(place)}: {text}"))
        self.troubled.add(place)

    def note(self, place: Place, text: str) -> None:
        """An entry is left out; published with the result, so without the file's path."""
        self.notes[f"{path_text(place)} in the recipe {text}"] = None

    def stage(self) -> Stage | None:
        """The recipe; None if something is wrong with it."""
        if self.document.value is None:
            return None
        content = self._mapping(self.document.value, ())
        if self.problems or not self._choose_method(content):
            return None
        for key in IGNORED:
            if self.is_mergekits and key in content:
                self.note(
                    (key,), "has no effect, here as in mergekit: --seed and parameters.seed do"
                )
        self._check_keys(content, (), self._top_keys())
        profile = self._profile(content.get("profile"))
        declared = self.method.parameters_of(profile)
        self.declared = {parameter.key: parameter for parameter in declared}
        settings = self._fields(content)
        body, body_place, shared = self._body(content)
        base = self._reference(content.get("base_model"), ("base_model",))
        parts = self._merged_parts(body, body_place, base, shared)
        if self.problems:
            return None
        base, models, parameters, slices = parts
        recipe = make_recipe(
            self.method_name, base, models, parameters, profile=profile, **settings
        )
        place = self.document.place()
        recipe = replace(recipe, slices=slices, notes=tuple(self.notes), place=place)
        try:
            recipe = canonical(recipe)
            _, problems = check_recipe(recipe)
        except ValueError as error:
            problems = [str(error)]
        for problem in problems:
            self.wrong(self._place_of(problem), problem)
        name = self._name(content.get("name"))
        return Stage(name, recipe, place)

    def _place_of(self, problem: str) -> Place:
        """The entry that a text on the whole recipe is about, by the words that it begins with."""
        if found := re.match(r"slice (\d+): ", problem):
            return ("slices", int(found[1]) - 1)
        if (found := re.search(r"\(model (\d+)\)", problem)) and self.merged:
            return self.merged[int(found[1]) - 1]
        word = re.split(r"[^\w]", problem)[0]
        words = {word, KEYS.get(word, word)}
        if word == "vocabulary":  # what the recipe says of it is called otherwise in mergekit's
            words = {"mode", "source", "tokenizer_source", "vocabulary"}
        return next((path for path in self.document.lines if words & {*path[-1:]}), ())

    # The method and what it knows

    def _choose_method(self, content: Mapping[str, Any]) -> bool:
        """Whose grammar it is, and which method."""
        keys = [key for key in ("merge_method", "method") if key in content]
        if len(keys) != 1:
            every_key = EVERY_KEY
            self._check_keys(content, (), every_key)
            said = "both are given" if keys else "neither is given"
            if self.problems:
                return False  # one of them may be misspelled
            self.wrong(
                (), f"merge_method (mergekit's conventions) or method (ours): {said}. Give one"
            )
            return False
        (key,) = keys
        self.is_mergekits = key == "merge_method"
        name = content[key]
        known = [*METHODS, *ALIASES]
        if not isinstance(name, str) or name not in known:
            self.wrong((key,), unknown_name("method", name, known))
            return False
        self.method_name = name
        self.method = METHODS[ALIASES[name][0] if name in ALIASES else name]
        return True

    def _top_keys(self) -> tuple[str, ...]:
        return (*COMMON_KEYS, *((*MERGEKIT_KEYS, *IGNORED) if self.is_mergekits else OWN_KEYS))

    def _profile(self, value: Any) -> str:
        default = "mergekit" if self.is_mergekits else "default"
        if value is None:
            return default
        if value not in PROFILES:
            self.wrong(("profile",), unknown_name("profile", value, PROFILES))
            return default
        return str(value)

    # Kinds of entries

    def _mapping(self, value: Any, place: Place) -> Mapping[str, Any]:
        if value is None:
            return {}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return value
        self.wrong(place, f"expected entries such as `key: value`, got {brief(value)}")
        return {}

    def _list(self, value: Any, place: Place, of: str) -> Sequence[Any]:
        if isinstance(value, list) and value:
            return value
        self.wrong(place, f"expected a list of {of}, each after a hyphen, got {brief(value)}")
        return []

    def _text(self, value: Any, place: Place) -> str | None:
        if value is None or (isinstance(value, str) and value):
            return value
        self.wrong(place, f"expected a text, got {brief(value)}. Put it into quotes")
        return None

    def _name(self, value: Any) -> str | None:
        """A recipe's own name: one that can be published, and is no path."""
        name = self._text(value, ("name",))
        if name is not None and not (NAME.fullmatch(name) and len(name) <= MAX_NAME):
            text = "is no name. Use letters, digits, - _ and ."
            self.wrong(("name",), f"{brief(name)} {text}, at most {MAX_NAME}")
        return name

    def _check_keys(self, content: Mapping[str, Any], place: Place, known: Sequence[str]) -> None:
        """Say which keys are not known, and where they may belong."""
        for key in content:
            if key in known:
                continue
            if key in KEYS:
                text = f"{key!r} is {KEYS[key]!r} under the parameters of each model"
            elif key in INSTEAD and INSTEAD[key] in known:
                text = f"unknown key {key!r}. It is called {INSTEAD[key]!r}"
            elif key in self.declared or key in _all_keys() or key in NO_EFFECT:
                text = f"{key!r} is a parameter. Put it under parameters:"
            elif key in EVERY_KEY and not place:
                other = "merge_method" if self.is_mergekits else "method"
                text = f"{key!r} does not go with {other}. Leave it out"
            else:
                text = unknown_name("key", key, known)
            self.wrong((*place, key), text)

    def _reference(self, value: Any, place: Place) -> str | None:
        """A model: PATH[@REVISION][+ADAPTER[@REVISION]], or mergekit's mapping of the same."""
        if isinstance(value, Mapping):
            if value.get("model") is None:
                self.wrong(place, "model is missing. Give a folder or a Hub id")
            self._check_keys(value, place, ("model", "lora", "override_architecture"))
            if value.get("override_architecture") is not None:
                where = (*place, "override_architecture")
                self.wrong(where, "override_architecture is not supported. Leave it out")
            keys = [key for key in ("model", "lora") if value.get(key) is not None]
            parts = [self._path(value[key], (*place, key)) for key in keys]
            return "+".join(part for part in parts if part) or None
        return self._text(value, place)

    def _path(self, value: Any, place: Place) -> str | None:
        """PATH[@REVISION], or mergekit's mapping of the same."""
        if not isinstance(value, Mapping):
            return self._text(value, place)
        self._check_keys(value, place, ("path", "revision"))
        if value.get("path") is None:
            self.wrong(place, "path is missing. Give a folder or a Hub id")
        revision = self._text(value.get("revision"), (*place, "revision"))
        name = self._text(value.get("path"), (*place, "path"))
        return f"{name}@{revision}" if name and revision else name

    # Parameters

    def _settings(self, value: Any, place: Place, *, of_model: bool) -> Settings:
        """What a level says of the parameters, by their names."""
        found: dict[str, Setting] = {}
        for key, entry in self._mapping(value, place).items():
            where = (*place, key)
            parameter = self.declared.get(key)
            if parameter is None or (self.is_mergekits and (self.method_name, key) in OURS_ALONE):
                self._undeclared(key, where)
            elif of_model and not (parameter.per_model or parameter.of_input):
                if self.is_mergekits:
                    self.note(where, "has no effect on a model, here as in mergekit")
                else:
                    self.wrong(where, f"{key} is of the whole merge. Put it under its parameters")
            else:
                found[parameter.name] = self._setting(parameter, entry, where)
        return found

    def _undeclared(self, key: str, place: Place) -> None:
        name = self.method_name
        if self.is_mergekits and (key in NO_EFFECT or key in _all_keys()):
            self.note(place, f"has no effect on {name}, here as in mergekit")
        elif key in INSTEAD and INSTEAD[key] in self.declared:
            self.wrong(place, f"unknown parameter {key!r}. It is called {INSTEAD[key]!r}")
        else:
            self.wrong(place, unknown_name(f"parameter of {name}", key, self.declared))

    def _setting(self, parameter: Parameter, entry: Any, place: Place) -> Setting:
        """A value, a gradient, or a list of filters."""
        if isinstance(entry, Mapping):
            entry = [entry]
        if isinstance(entry, list) and any(isinstance(each, Mapping) for each in entry):
            choices = [self._choice(parameter, each, (*place, i)) for i, each in enumerate(entry)]
            filters = [choice.filter for choice in choices]
            first = filters.index(ANY) if ANY in filters else len(filters)
            for number in range(first + 1, len(filters)):
                self.note((*place, number), "is never used: an entry before it fits everything")
            return Setting(tuple(choices))
        return Setting((Choice(self._values(parameter, entry, place)),))

    def _choice(self, parameter: Parameter, entry: Any, place: Place) -> Choice:
        content = self._mapping(entry, place)
        self._check_keys(content, place, ("filter", "value"))
        if "value" not in content:
            self.wrong(place, "value is missing. Give {filter: ..., value: ...}")
        pattern = self._text(content.get("filter"), (*place, "filter"))
        values = self._values(parameter, content.get("value", 0.0), (*place, "value"))
        return Choice(values) if pattern is None else Choice(values, pattern)

    def _values(self, parameter: Parameter, entry: Any, place: Place) -> tuple[Any, ...]:
        """One value, or the points of a gradient, in the kind that is declared."""
        if isinstance(entry, list) and parameter.kind is int:
            self.wrong(place, f"{parameter.key} is a whole number, so it cannot be a gradient")
            return ()
        if entry == []:
            self.wrong(place, "an empty gradient. Give its values from the first layer to the last")
        points = entry if isinstance(entry, list) else [entry]
        found = []
        for index, point in enumerate(points):
            where = (*place, index) if isinstance(entry, list) else place
            found.append(self._value(parameter, point, where))
        return tuple(found)

    def _value(self, parameter: Parameter, point: Any, place: Place) -> Any:
        if self.is_mergekits and parameter.name == "rescale" and isinstance(point, bool):
            kept = parameter.default if parameter.default != "none" else "l1"
            point = kept if point else "none"
        value, wrong = converted(replace(parameter, name=parameter.key), point)
        for problem in wrong:
            for of_kind, text in KINDS.items():
                problem = problem.replace(f"of type {of_kind.__name__}", text)
            self.wrong(place, problem.replace(parameter.name, parameter.key, 1))
        return value

    # Models and slices

    def _body(self, content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Place, list[Settings]]:
        """Where models or slices stand, and what holds for all of them, nearest first."""
        shared = [self._settings(content.get("parameters"), ("parameters",), of_model=False)]
        kinds = [key for key in ("models", "slices", "modules") if content.get(key) is not None]
        if len(kinds) != 1:
            said = f"{' and '.join(kinds)} are given" if kinds else "none is given"
            self.wrong((), f"exactly one of models, slices and modules is needed: {said}")
            return {}, (), shared
        if kinds != ["modules"]:
            return content, (), shared
        modules = self._mapping(content["modules"], ("modules",))
        if [*modules] != [MODULE]:
            self.wrong(
                ("modules",),
                f"a language model has one module, {MODULE!r}, got {', '.join(modules) or 'none'}",
            )
            return {}, (), shared
        place: Place = ("modules", MODULE)
        body = self._mapping(modules[MODULE], place)
        self._check_keys(body, place, ("models", "slices", "parameters"))
        of_module = self._settings(body.get("parameters"), (*place, "parameters"), of_model=False)
        if (body.get("models") is None) == (body.get("slices") is None):
            self.wrong(place, "exactly one of models and slices is needed")
        return body, place, [of_module, *shared]

    def _merged_parts(
        self, body: Mapping[str, Any], place: Place, base: str | None, shared: list[Settings]
    ) -> _Body:
        """Base, models, parameters and slices of the recipe."""
        if self.method.base == "required" and base is None and not _bases(body):
            self.wrong(
                (),
                f"{self.method_name} needs a base_model: the common ancestor of the models, a "
                "folder or a Hub id",
            )
        if self.is_mergekits and self.method_name == "slerp" and base is None and not _bases(body):
            self.wrong((), "slerp needs a base_model: the one of the two that is t = 0")
        if body.get("slices") is not None:
            return self._sliced(body["slices"], (*place, "slices"), base, shared)
        entries = []
        if body.get("models") is not None:
            listed = self._list(body["models"], (*place, "models"), "models")
            entries = [self._entry(each, (*place, "models", i)) for i, each in enumerate(listed)]
        of_base, models = self._parted(entries, base, place, must_list=False)
        self.merged = [entry.place for entry in models]
        if self.method_name == "slerp" and base is not None and len(entries) == 2 < len(models):
            self.wrong(("base_model",), f"{base} is none of the two models. Name one of them")
        parameters = self._parameters(models, shared)
        name = None if of_base is None else of_base.model
        return _Body(name, tuple(each.model for each in models), parameters)

    def _entry(self, value: Any, place: Place, *, layers: bool = False) -> _Entry:
        """A model with its parameters, and with the layers that are taken."""
        content = {"model": value} if isinstance(value, str) else self._mapping(value, place)
        known = ("model", "layer_range", "parameters") if layers else ("model", "parameters")
        self._check_keys(content, place, known)
        model = self._reference(content.get("model"), (*place, "model"))
        if content.get("model") is None:
            self.wrong(place, "model is missing. Give a folder or a Hub id")
        where = (*place, "parameters")
        settings = self._settings(content.get("parameters"), where, of_model=True)
        taken = None
        if layers:
            taken = self._layer_range(content.get("layer_range"), (*place, "layer_range"))
        return _Entry(model or "", place, settings, taken)

    def _layer_range(self, value: Any, place: Place) -> tuple[int, int]:
        is_range = isinstance(value, list) and len(value) == 2
        if is_range and all(type(each) is int for each in value) and 0 <= value[0] < value[1]:
            return value[0], value[1]
        self.wrong(
            place,
            f"expected [first, last + 1], counted from 0, such as [0, 16], got {brief(value)}",
        )
        return 0, 1

    def _sliced(self, value: Any, place: Place, base: str | None, shared: list[Settings]) -> _Body:
        slices = []
        for number, each in enumerate(self._list(value, place, "slices")):
            slices.append(self._slice(each, (*place, number), base, shared))
        if self.is_mergekits and slices and len(slices[-1].inputs) > len(slices[0].inputs):
            self.note(
                (*place, len(slices) - 1),
                "has more sources than the first: mergekit leaves the others out of the final norm "
                "and the head; here all are merged",
            )
        inputs = [source.model for each in slices for source in each.inputs]
        first = [base] if base is not None else []
        with_base = [each.base is not None for each in slices]
        if any(with_base) and not all(with_base):
            self.wrong(
                (*place, with_base.index(False)),
                "no base_model, but another slice has one. Give one to all slices, or to none",
            )
        if any(with_base):
            of_recipe = base or next(each.base.model for each in slices if each.base is not None)
            others = [name for name in dict.fromkeys(inputs) if name != of_recipe]
            return _Body(of_recipe, tuple(others), {}, tuple(slices))
        return _Body(None, tuple(dict.fromkeys([*first, *inputs])), {}, tuple(slices))

    def _slice(self, value: Any, place: Place, base: str | None, shared: list[Settings]) -> Slice:
        content = self._mapping(value, place)
        known = ("sources", "base_model", "parameters", "residual_weight")
        self._check_keys(content, place, known)
        if content.get("residual_weight") is not None:
            self.note((*place, "residual_weight"), "has no effect, here as in mergekit")
        own = self._settings(content.get("parameters"), (*place, "parameters"), of_model=False)
        sources: Place = (*place, "sources")
        listed = self._list(content.get("sources"), sources, "sources")
        entries = [self._entry(e, (*sources, i), layers=True) for i, e in enumerate(listed)]
        lengths = [each.layers[1] - each.layers[0] for each in entries if each.layers]
        for entry, length in zip(entries, lengths, strict=False):
            if length != lengths[0]:
                self.wrong(
                    (*entry.place, "layer_range"),
                    f"{length} layers, but {lengths[0]} in the first source. Take as many of each",
                )
        base = self._reference(content.get("base_model"), (*place, "base_model")) or base
        of_base, models = self._parted(entries, base, place, must_list=True)
        parameters = self._parameters(models, [own, *shared])
        if not models and listed:
            self.wrong(sources, "no model besides the base. Add one, or take these layers from it")
        return Slice(
            sources=tuple(map(_layers, models)) or (LayerRange("none", 0, 1),),
            base=None if of_base is None else _layers(of_base),
            parameters=parameters,
        )

    def _parted(
        self, entries: list[_Entry], base: str | None, place: Place, *, must_list: bool
    ) -> tuple[_Entry | None, list[_Entry]]:
        """The base and the models that are merged; a method without a base takes it first."""
        models = [entry for entry in entries if entry.model != base]
        of_base = [entry for entry in entries if entry.model == base]
        if self.is_mergekits:
            for index, entry in enumerate(entries):
                before = [each for each in entries[:index] if each.model == entry.model]
                if before:
                    remedy = "Leave one out, or write method: instead of merge_method:"
                    self.wrong(entry.place, f"{entry.model} is listed twice. {remedy}")
        if self.method.base == "none" and base is not None:
            if not self.is_mergekits and not must_list:
                said = f"{self.method_name} takes no base_model. List it first among the models"
                self.wrong(("base_model",), said)
            listed = [*of_base, *models]
            if not of_base and not must_list:
                listed = [_Entry(base, ("base_model",), {}), *models]
            return None, listed
        if base is None:
            return None, entries
        if not of_base and must_list:
            self.wrong(
                (*place, "sources"),
                f"base_model {base} is none of the sources. Add it with its layer_range",
            )
        for entry in of_base:
            if entry.settings:
                self.note((*entry.place, "parameters"), "has no effect, as this is the base")
        return (of_base or [_Entry(base, ("base_model",), {})])[0], models

    def _parameters(self, models: list[_Entry], shared: list[Settings]) -> dict[str, Any]:
        """What is given, by name: one value, or one for each model."""
        given: dict[str, Any] = {}
        for parameter in self.declared.values():
            own = [entry.settings for entry in models]
            of_all = [each[parameter.name] for each in shared if parameter.name in each]
            if not parameter.per_model:
                single = [each[parameter.name] for each in own if parameter.name in each]
                if single or of_all:
                    given[parameter.name] = joined([*single, *of_all])
                elif parameter.required and self.is_mergekits:
                    said = f"{parameter.key} is missing. Give it under parameters of the recipe"
                    self.wrong((), said)
                continue
            if not of_all and not any(parameter.name in each for each in own):
                if parameter.required and self.is_mergekits:
                    self._missing(parameter, models)
                continue
            given[parameter.name] = tuple(
                self._of_model(parameter, entry, of_all) for entry in models
            )
        return given

    def _of_model(self, parameter: Parameter, entry: _Entry, of_all: list[Setting]) -> Any:
        own = [entry.settings[parameter.name]] if parameter.name in entry.settings else []
        if own or of_all:
            return joined([*own, *of_all])
        if parameter.required and self.is_mergekits:
            self._missing(parameter, [entry])
        return parameter.default

    def _missing(self, parameter: Parameter, models: list[_Entry]) -> None:
        for entry in models:
            if any(place[: len(entry.place)] == entry.place for place in self.troubled):
                continue  # it may be there, misspelled or misplaced
            self.wrong(
                entry.place,
                f"{parameter.key} of {entry.model} is missing. Give it under its parameters, or "
                "for all models under parameters of the recipe",
            )

    # What is not about models

    def _fields(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The other fields of a recipe."""
        given = {key: content[key] for key in OPTIONS if content.get(key) is not None}
        bounds = given.get("clamp_range")
        if isinstance(bounds, list) and len(bounds) == 2:
            infinite = (float("-inf"), float("inf"))
            given["clamp_range"] = [
                default if each is None else each
                for each, default in zip(bounds, infinite, strict=True)
            ]
        if content.get("max_shard_size") is not None:
            given["max_shard_size"] = content["max_shard_size"]
        given["dtype"] = self._dtype(content)
        template = self._text(content.get("chat_template"), ("chat_template",))
        if template is not None:
            known = {*CHAT_TEMPLATES, AUTO_TEMPLATE, NO_TEMPLATE}
            near = difflib.get_close_matches(template[:40], known, n=1, cutoff=0.75)
            if near and template not in known and not Path(template).exists():
                self.wrong(
                    ("chat_template",), f"{template!r} is no template. Did you mean {near[0]!r}?"
                )
            given["chat_template"] = CHAT_TEMPLATES.get(template, template)
        if self.is_mergekits:
            given["vocabulary"] = self._tokenizer(content)
        else:
            given["vocabulary"] = self._vocabulary(content.get("vocabulary"))
            source = self._text(content.get("tokenizer_source"), ("tokenizer_source",))
            given["tokenizer_source"] = source
        return given

    def _dtype(self, content: Mapping[str, Any]) -> str | None:
        """Of the result; what mergekit computes in is always float32 here."""
        for key in ("dtype", "out_dtype"):
            value = content.get(key)
            if value is not None and not (isinstance(value, str) and value in DTYPE_NAMES):
                near = SHORT_DTYPES.get(str(value).lower())
                hint = f". Did you mean {near!r}?" if near else ""
                said = f"expected one of {', '.join(DTYPE_NAMES)}, got {brief(value)}{hint}"
                self.wrong((key,), said)
        chosen = content.get("out_dtype") or content.get("dtype")
        return chosen if isinstance(chosen, str) else None

    def _tokenizer(self, content: Mapping[str, Any]) -> VocabularySettings:
        """mergekit's `tokenizer`, or `tokenizer_source`."""
        entry, source = content.get("tokenizer"), content.get("tokenizer_source")
        if entry is not None and source is not None:
            self.wrong(("tokenizer_source",), "tokenizer says it already. Leave one of them out")
        if entry is None:
            mode = self._token_mode(source, ("tokenizer_source",))
            return VocabularySettings() if mode is None else _like_mergekit(mode)
        place: Place = ("tokenizer",)
        content = self._mapping(entry, place)
        self._check_keys(content, place, ("source", "tokens", "pad_to_multiple_of"))
        mode = self._token_mode(content.get("source", "union"), (*place, "source"))
        return replace(
            _like_mergekit(mode or "union"),
            tokens=self._tokens(content.get("tokens"), (*place, "tokens")),
            pad_to_multiple_of=content.get("pad_to_multiple_of"),
        )

    def _token_mode(self, source: Any, place: Place) -> str | None:
        name = self._reference(source, place)
        if name in (None, "union", "base"):
            return name
        if near := difflib.get_close_matches(str(name), ("union", "base"), n=1, cutoff=0.75):
            self.wrong(place, f"{name!r} is neither union nor base. Did you mean {near[0]!r}?")
        return f"{BY_MODEL}{str(name).removeprefix(BY_MODEL)}"  # as older recipes write it

    def _tokens(self, value: Any, place: Place) -> dict[str, Any]:
        found = {}
        for token, entry in self._mapping(value, place).items():
            try:
                found[token] = token_source(token, entry)
            except ValueError as error:
                self.wrong((*place, token), str(error))
        return found

    def _vocabulary(self, value: Any) -> VocabularySettings:
        """Our `vocabulary`: a mode, or all settings."""
        if value is None or isinstance(value, str):
            return VocabularySettings(mode=value or "min")
        place: Place = ("vocabulary",)
        content = self._mapping(value, place)
        known = [each.name for each in fields(VocabularySettings)]
        self._check_keys(content, place, known)
        given = {key: entry for key, entry in content.items() if key in known and entry is not None}
        if "tokens" in given:
            given["tokens"] = self._tokens(given["tokens"], (*place, "tokens"))
        if isinstance(given.get("id_alias"), list):
            given["id_alias"] = tuple(given["id_alias"])
        return VocabularySettings(**given)


def _bases(body: Mapping[str, Any]) -> bool:
    """Whether every slice names a base of its own."""
    slices = body.get("slices")
    return isinstance(slices, list) and all(
        isinstance(each, Mapping) and each.get("base_model") is not None for each in slices
    )


def _layers(entry: _Entry) -> LayerRange:
    first, stop = entry.layers or (0, 1)
    return LayerRange(entry.model, first, stop)


def _like_mergekit(mode: str) -> VocabularySettings:
    """A vocabulary as mergekit makes it: a union has all tokens of all models."""
    return VocabularySettings(mode=mode, union_tokens="all" if mode == "union" else "added")


def _all_keys() -> set[str]:
    """Keys of the parameters of all methods."""
    return {parameter.key for method in METHODS.values() for parameter in method.parameters}


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """A recipe with another seed; one whose method draws nothing at random as it is."""
    if all(parameter.name != "seed" for parameter in METHODS[recipe.method].parameters):
        return recipe
    slices = tuple(
        replace(each, parameters={**each.parameters, "seed": seed}) for each in recipe.slices
    )
    given = {} if slices else {"seed": seed}
    return replace(recipe, slices=slices, parameters={**recipe.parameters, **given})
