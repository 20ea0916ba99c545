"""`MergeConfig`, and what it asks for in the words of the engine.

A strategy becomes a recipe (for adapters, an `AdapterMerge`), and an option one of its parameters.
An option that has no meaning here is accepted, and a note says what happens instead.
"""

import math
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_adapters import METHODS as ADAPTER_METHODS
from merge_adapters import AdapterMerge
from merge_methods import ALIASES, METHODS, Method
from merge_plan import canonical, check_recipe
from merge_recipe import Parameter, Recipe, brief, make_recipe, model_name, unknown_name
from merge_run import RunSettings
from merger_options import (
    OF_A_FOLDER,
    OF_ADAPTERS,
    OF_THE_RECIPE,
    WITH,
    Kind,
    Options,
    RunOptions,
    take_run_options,
)
from merger_validation import Validation, read_validation
from model_locate import adapter_name, last_part, split_adapters
from model_partial import check_output_dir
from model_text import numbered

STRATEGIES = {"weighted": "linear"}
"""Names of strategies that are not those of methods."""

OPERATIONS = ("add", "subtract")

PEFT_KEYS = ("merge_adapters", "adapter_names", "base_model_path")


@dataclass
class MergeConfig:
    """What to merge, how, and how to look at the result.

    Attributes:
        strategy: "weighted" (a linear average), "sequential", "task_arithmetic", "slerp", or any
            other method of `merge_methods.METHODS`, also by mergekit's names.
        models: a mapping for each model: "path" (a folder, a Hub id, or BASE+ADAPTER), and maybe
            "weight" (1.0), "name" (the path's last part), "operation" ("add", or "subtract", which
            takes its weight as negative), and what else the method takes of each model, such as
            "density".
        output_path: the folder to make; without one, the result is in memory alone.
        base_model: the common ancestor, for strategies that use one. For others, what a validation
            compares with.
        options: of the strategy by name, and those in the documentation of `ModelMerger`.
        peft_config: the models are LoRA adapters: "merge_adapters" (True merges them into one
            adapter, False puts each on the base and merges the models), "adapter_names" (of
            adapters in folders of their own below the paths), "base_model_path".
        validation: how the result is looked at; see `merger_validation.read_validation`.
    """

    strategy: str
    models: list[dict[str, Any]]
    output_path: str | os.PathLike[str] | None = None
    base_model: str | os.PathLike[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    peft_config: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A `MergeConfig` in the words of the engine.

    Attributes:
        work: what is merged, and how.
        output_dir: the folder to make.
        sources: the models by their names, as merges take them.
        base_model: what they were tuned from, as far as that was said.
        run: how it is run.
        device, dtype: where and how the result is loaded; see `model_inference.load_model`.
        validation: how it is looked at.
        log_level: of the merger's messages; None leaves it as it is.
        notes: what happens instead of what was asked for.
    """

    work: Recipe | AdapterMerge
    output_dir: Path | None
    sources: Mapping[str, str]
    base_model: str | None
    run: RunSettings
    device: str
    dtype: str
    validation: Validation
    log_level: int | None
    notes: tuple[str, ...]


def translate(config: MergeConfig) -> Translation:
    """What a config asks for.

    Raises:
        ValueError: something is wrong with it; all of it is said at once.
    """
    if not isinstance(config, MergeConfig):
        raise TypeError(
            f"config must be a MergeConfig, got {brief(config)}. MergeConfig(**config)?"
        )
    return _Translator(config).translation()


def _adapter_below(path: str, name: str) -> str:
    """The folder of an adapter by its name, with the strength behind it."""
    if name == "default":
        return path
    folder, strength = adapter_name(path)
    return os.path.join(folder, name) + ("" if strength == 1 else f":{strength}")


class _Translator:
    """One config, and what is found out on the way."""

    def __init__(self, config: MergeConfig) -> None:
        self.config = config
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.options = Options(self._mapping("options") or {})
        self.peft = self._mapping("peft_config")
        self.strategy = str(config.strategy)
        self.method = STRATEGIES.get(self.strategy, self.strategy)
        self.into_one = self.peft is not None and self.peft.get("merge_adapters", True) is not False
        self.models = self._models()
        self.base = self._base()
        self._look_at_peft()
        self.adapters = [] if self.peft is None else self._adapters()
        self.paths = self._paths()
        self.names = numbered(
            [str(each.get("name", last_part(each["path"]))) for each in self.models]
        )

    def translation(self) -> Translation:
        """All of it, or all that is wrong."""
        output_dir = self._output_dir()
        kind: Kind = "adapter" if self.into_one else "memory" if output_dir is None else "folder"
        taken = take_run_options(self.options, kind, self.problems, self.notes)
        run, device, dtype, log_level = taken
        work = self._adapter_merge(dtype) if self.into_one else self._recipe(output_dir, taken)
        if output_dir is not None and not (run.resume and output_dir.exists()):
            try:
                check_output_dir(output_dir)
            except (FileExistsError, ValueError) as error:
                self.problems.append(str(error))
        validation, problems = read_validation(self.config.validation)
        self.problems += [*self.options.problems(), *problems]
        self.notes += self.options.remarks(f"{self.strategy}{WITH[kind]}")
        if self.problems or work is None:
            raise ValueError("\n".join(dict.fromkeys(self.problems)))
        return Translation(
            work=work,
            output_dir=output_dir,
            sources=dict(zip(self.names, self.paths, strict=True)),
            base_model=self.base,
            run=run,
            device=device,
            dtype=dtype or "auto",
            validation=validation,
            log_level=log_level,
            notes=tuple(self.notes),
        )

    def _mapping(self, name: str) -> Mapping[str, Any] | None:
        """An entry of the config that must be a mapping, if it is there."""
        value = getattr(self.config, name)
        if value is None or isinstance(value, Mapping):
            return value
        self.problems.append(f"{name} must be a mapping, got {brief(value)}")
        return None

    def _output_dir(self) -> Path | None:
        output_path = self.config.output_path
        if output_path is None:
            return None
        try:
            return Path(model_name(output_path, "output_path"))
        except TypeError:
            self.problems.append(f"output_path must name a folder, got {brief(output_path)}")
            return None

    def _models(self) -> list[dict[str, Any]]:
        """The models, as far as they are mappings with a path."""
        models: Any = self.config.models
        if isinstance(models, str | Mapping) or not isinstance(models, Sequence) or not models:
            self.problems.append(f'models must be a list of {{"path": ...}}, got {brief(models)}')
            return []
        found = []
        for number, model in enumerate(models, 1):
            if not isinstance(model, Mapping) or "path" not in model:
                self.problems.append(
                    f'model {number} must be a mapping with "path", got {brief(model)}'
                )
                continue
            try:
                found.append(
                    {**model, "path": model_name(model["path"], f"path of model {number}")}
                )
            except TypeError as error:
                self.problems.append(str(error))
        return found

    def _base(self) -> str | None:
        """The base, of models or of adapters."""
        of_peft = None if self.peft is None else self.peft.get("base_model_path")
        found = []
        for name, base in (("base_model", self.config.base_model), ("base_model_path", of_peft)):
            try:
                found += [] if base is None else [model_name(base, name)]
            except TypeError as error:
                self.problems.append(str(error))
        if len({*found}) > 1:
            self.problems.append(
                f"base_model {found[0]} and base_model_path {found[1]} differ. Leave one out"
            )
        return found[0] if found else None

    def _look_at_peft(self) -> None:
        if self.peft is None:
            return
        for key in self.peft:
            if key not in PEFT_KEYS:
                self.problems.append(unknown_name("entry of peft_config", key, PEFT_KEYS))
        given = self.peft.get("merge_adapters", True)
        if not isinstance(given, bool):
            self.problems.append(f"merge_adapters must be true or false, got {brief(given)}")
        if self.base is None and self.into_one:
            self.problems.append(
                "base_model_path must name the model that the adapters are for: merge() returns "
                "the merged adapter on it"
            )
        elif self.base is None:
            self.problems.append(
                "merge_adapters is false, so each adapter is put on a base: name it as "
                "base_model_path"
            )

    def _paths(self) -> list[str]:
        """The models as merges take them: adapters on their base."""
        if self.peft is None:
            return [model["path"] for model in self.models]
        on_base = "" if self.base is None else f"{self.base}+"
        return [f"{on_base}{adapter}" for adapter in self.adapters]

    def _adapters(self) -> list[str]:
        """Folders of adapters: PEFT saves those that are not called default below the path."""
        paths = [model["path"] for model in self.models]
        for path in paths:
            if split_adapters(path).adapters:
                self.problems.append(
                    f"{path}: with peft_config, a path names an adapter alone; base_model_path "
                    "names the base"
                )
        names: Any = (self.peft or {}).get("adapter_names") or ["default"]
        if isinstance(names, str) or not isinstance(names, Sequence):
            self.problems.append(f"adapter_names must be a list of names, got {brief(names)}")
            return paths
        for name in names:
            if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)):
                self.problems.append(
                    f"each of adapter_names must be a name without slashes, got {brief(name)}"
                )
                return paths
        if len(names) not in (1, len(paths)):
            self.problems.append(
                f"adapter_names must have one name for all adapters or one for each, got "
                f"{len(names)} for {len(paths)}"
            )
            return paths
        each = [*names] * (len(paths) if len(names) == 1 else 1)
        return [_adapter_below(path, name) for path, name in zip(paths, each, strict=True)]

    def _weights(self) -> list[float] | None:
        """Weights with the signs of the operations; None where no model says one."""
        weights = []
        for model in self.models:
            weight: Any = model.get("weight", 1.0)
            operation = model.get("operation", "add")
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
                self.problems.append(
                    f"{model['path']}: weight must be a number, got {brief(weight)}"
                )
                weight = 1.0
            if operation not in OPERATIONS:
                where = f"operation (of {model['path']})"
                self.problems.append(unknown_name(where, operation, OPERATIONS))
            weights.append(-abs(weight) if operation == "subtract" else float(weight))
        said = any(key in model for model in self.models for key in ("weight", "operation"))
        return weights if said else None

    def _recipe(self, output_dir: Path | None, options: RunOptions) -> Recipe | None:
        """The recipe of models, or of adapters each on its base."""
        name = self.method
        if name not in METHODS and name not in ALIASES:
            known = [*STRATEGIES, *METHODS, *ALIASES]
            self.problems.append(unknown_name("strategy", self.config.strategy, known))
            return None
        method = METHODS[ALIASES[name][0] if name in ALIASES else name]
        parameters = self._parameters(method)
        names = OF_THE_RECIPE if output_dir is None else (*OF_THE_RECIPE, *OF_A_FOLDER)
        settings = self.options.take_all(names)
        for key in ("chat_template", "tokenizer_source", "profile"):
            if not isinstance(settings.get(key, ""), str):
                self.problems.append(f"{key} must be a text, got {brief(settings.pop(key))}")
        try:
            recipe = canonical(
                make_recipe(
                    name,
                    self.base if method.base != "none" else None,
                    self.paths,
                    parameters,
                    output_dir=output_dir,
                    dtype=options.dtype,
                    clamp_range=self._clamp_range(),
                    **settings,
                )
            )
            if len(self.models) == len(self.config.models):  # else that is what is wrong
                self.problems += check_recipe(replace(recipe, output_dir=None))[1]
        except (TypeError, ValueError) as error:
            self.problems.append(str(error))
            return None
        return recipe

    def _parameters(self, method: Method) -> dict[str, Any]:
        """The method's parameters, from the options and the models."""
        declared = {parameter.name: parameter for parameter in method.parameters}
        values: dict[str, Any] = {}
        for name, parameter in declared.items():
            keys = (name,) if parameter.per_model else dict.fromkeys((name, parameter.key))
            given = [key for key in keys if key in self.options]
            if len(given) > 1:
                self.problems.append(f"{' and '.join(given)} are the same. Leave one of them out")
            for key in given:
                values[name] = self.options.take(key)
        self._take("normalize_weights", declared, ("normalize", "normalize_weights"), values)
        self._take("scaling_factor", declared, ("lam",), values)
        self._take("interpolation_factor", declared, ("t",), values)
        weights = self._weights()
        if weights is not None and "weights" in declared:
            if "weights" in values:
                self.problems.append("weights are given twice: as an option and with the models")
            values["weights"] = weights
            if self.method == "linear" and values.get("normalize", True) is True:
                self._look_at_signs(weights)
        elif weights is not None and self.method == "slerp":
            self._position(weights, values)
        elif weights is not None:
            self.notes.append(f"weight and operation have no effect with {self.strategy}")
        of_models = {each.key: each for each in declared.values() if each.per_model}
        self._look_at_models(*of_models)
        values |= self._values_of_models(of_models)
        return values

    def _look_at_signs(self, weights: Sequence[float]) -> None:
        """What is divided by a sum must not have several signs: it would turn or grow."""
        if min(weights, default=0.0) < 0:
            self.problems.append(
                f"weights of {self.strategy} are divided by their sum, so they must not be "
                f"negative, got {', '.join(f'{each:g}' for each in weights)}. Use task_arithmetic "
                "to subtract, or set normalize_weights to false"
            )

    def _take(
        self,
        option: str,
        declared: Mapping[str, Parameter],
        names: Sequence[str],
        values: dict[str, Any],
    ) -> None:
        """An option that is a parameter by another name."""
        if option not in self.options:
            return
        name = next((name for name in names if name in declared), None)
        if name is not None and name in values and name != option:
            self.problems.append(f"{option} and {name} are the same. Leave one of them out")
        elif name is not None:
            values[name] = self.options.take(option)

    def _position(self, weights: Sequence[float], values: dict[str, Any]) -> None:
        """SLERP's t: the share of the second weight, unless it is given itself."""
        if len(weights) != 2:
            return  # the method says how many models it takes
        total = sum(weights)
        if min(weights) < 0 or not 0 < total < math.inf:
            self.problems.append(
                f"weights of slerp must be at least 0, and not both 0: got {weights[0]:g} and "
                f"{weights[1]:g}"
            )
            return
        share = weights[1] / total
        given = values.setdefault("t", share)
        if given != share:
            self.notes.append(
                f"interpolation_factor {given} is taken; by the weights it would be {share:g}"
            )

    def _look_at_models(self, *keys: str) -> None:
        """What models say must be known; `keys` are the strategy's own."""
        known = dict.fromkeys(["path", "weight", "name", "operation", *keys])
        for model in self.models:
            for key in model:
                if key not in known:
                    self.problems.append(unknown_name(f"entry (of {model['path']})", key, known))

    def _values_of_models(self, of_models: Mapping[str, Parameter]) -> Iterator[tuple[str, Any]]:
        """Parameters with a value for each model: its own, or that of the options for all."""
        for key, parameter in of_models.items():
            if parameter.name == "weights":
                continue
            given = key in self.options
            of_all = self.options.take(key, parameter.default)
            if given or any(key in model for model in self.models):
                if parameter.name in self.options:
                    self.problems.append(
                        f"{key} and {parameter.name} are both given. Leave one of them out"
                    )
                yield parameter.name, [model.get(key, of_all) for model in self.models]

    def _clamp_range(self) -> Any:
        clamp, bounds = self.options.take("clamp_weights"), self.options.take("clamp_range")
        if not isinstance(clamp, bool | None):
            self.problems.append(f"clamp_weights must be true or false, got {brief(clamp)}")
        if clamp and bounds is None:
            self.problems.append("clamp_weights needs clamp_range, such as [-2.0, 2.0]")
        if clamp is False and bounds is not None:
            self.notes.append("clamp_range has no effect, as clamp_weights is false")
            return None
        return bounds

    def _adapter_merge(self, dtype: str | None) -> AdapterMerge | None:
        """The merge of adapters into one."""
        strategies = ["weighted", "task_arithmetic", *ADAPTER_METHODS]
        strategy = self.strategy
        if strategy not in strategies:
            self.problems.append(
                f"{unknown_name('strategy', strategy, strategies)} Others need merge_adapters "
                "false: each adapter on its base, merged as models"
            )
        method = self.options.take("merge_method")
        if strategy in ADAPTER_METHODS:
            if method not in (None, strategy):
                self.problems.append(f"strategy {strategy} and merge_method {method!r} differ")
            method = strategy
        if self.config.output_path is None:
            self.problems.append("output_path must name the folder of the merged adapter")
        self._look_at_models("density")
        settings = self.options.take_all(OF_ADAPTERS)
        densities = [model.get("density") for model in self.models]
        if any(each is not None for each in densities):
            if "densities" in settings:
                self.problems.append("densities are given twice: as an option and with the models")
            settings["densities"] = tuple(1.0 if each is None else each for each in densities)
        elif isinstance(settings.get("densities", ()), str | float | int):
            given = settings.pop("densities")
            self.problems.append(f"densities must be a list, got {brief(given)}")
        elif "densities" in settings:
            settings["densities"] = tuple(settings["densities"])
        merge = AdapterMerge(
            adapters=tuple(self.adapters),
            method="auto" if method is None else str(method),
            weights=self._adapter_weights(),
            dtype=dtype or "float32",
            **settings,
        )
        self.problems += merge.problems()
        return merge

    def _adapter_weights(self) -> tuple[float, ...] | None:
        """Weights of adapters, by their sum if the strategy is "weighted"."""
        weights = self._weights() or [1.0] * len(self.models)
        normalize = self.options.take("normalize_weights", self.strategy == "weighted")
        if not isinstance(normalize, bool):
            self.problems.append(f"normalize_weights must be true or false, got {brief(normalize)}")
        if not normalize:
            return tuple(weights)
        self._look_at_signs(weights)
        if not weights or not math.isfinite(total := sum(weights)) or abs(total) < 1e-8:
            self.problems.append(
                f"weights cannot be normalized, as their sum is {sum(weights):g}. Change them, or "
                "set normalize_weights to false"
            )
            return None
        return tuple(weight / total for weight in weights)
