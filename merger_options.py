"""The options of a `MergeConfig`: what each is here, and what is said of those that are nothing."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from merge_methods import METHODS
from merge_recipe import brief, unknown_name
from merge_run import RunSettings
from model_safetensors import DTYPE_NAMES

OF_THE_RECIPE = (
    "merge_embeddings", "merge_lm_head", "weight_decay", "include", "exclude", "profile",
    "vocabulary", "tokenizer_source", "lora_rounding", "tied_lora", "nan_policy",
)  # fmt: skip
"""Fields of a recipe by the same names."""

OF_A_FOLDER = ("chat_template", "max_shard_size")
"""The same, of what is merged into a folder."""

Kind = Literal["folder", "memory", "adapter"]
"""What is made: a folder, a model in memory, or an adapter."""

OF_THE_RUN: dict[Kind, tuple[str, ...]] = {
    "folder": ("verify_inputs", "resume", "threads", "max_memory", "findings"),
    "memory": ("verify_inputs", "threads", "max_memory"),
    "adapter": ("verify_inputs", "resume"),
}
"""Fields of `merge_run.RunSettings` by the same names, by what is made."""

WITH: dict[Kind, str] = {"folder": "", "memory": " in memory", "adapter": " of adapters"}

OF_ADAPTERS = ("rank", "max_rank", "densities", "lam", "seed")
"""Fields of `merge_adapters.AdapterMerge` by the same names."""

BY_OTHER_NAMES = (
    "normalize_weights", "scaling_factor", "clamp_weights", "clamp_range", "interpolation_factor",
    "torch_dtype", "dtype", "device_map", "verbose", "log_level", "merge_method",
)  # fmt: skip
"""What is something else here."""

WITHOUT_EFFECT = {
    "low_memory_mode": "memory never grows with the models; max_memory sets a limit",
    "sequential_loading": "models are not loaded, but read block by block",
    "parallel_loading": "models are not loaded, but read block by block, one on each core",
    "cache_models": "models are read block by block; the system caches their files",
    "offload_folder": "nothing has to be offloaded, and nothing but the output is written",
    "gradient_checkpointing": "a merge has no gradients",
    "torch_compile": "a merge runs compiled loops anyway; torch.compile(model) compiles the result",
}
"""What needs nothing to be done, and why."""

ALWAYS = {
    "preserve_tokenizer": "the result always has a tokenizer; tokenizer_source says whose",
    "preserve_base_model": "the base is only read, and stays as it is",
    "use_safetensors": "weights are always written as safetensors",
}
"""What is always on, and what is said to those who want it off."""

_PARAMETERS = {
    name
    for method in METHODS.values()
    for each in method.parameters
    for name in (each.name, each.key)
} - {"weight"}

KNOWN = (
    *BY_OTHER_NAMES, *OF_THE_RECIPE, *OF_A_FOLDER, *OF_THE_RUN["folder"], *WITHOUT_EFFECT, *ALWAYS,
    *sorted({*_PARAMETERS, *OF_ADAPTERS}),
)  # fmt: skip
"""Every option that there is."""


class Options:
    """Options that are taken one by one, so that none is passed over in silence."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = {key: value for key, value in given.items() if value is not None}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def take(self, name: str, default: Any = None) -> Any:
        """An option; None stands for the default."""
        self._taken.add(name)
        return self._given.get(name, default)

    def take_all(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of some names that are given."""
        return {name: self.take(name) for name in names if name in self}

    def remarks(self, strategy: str) -> Iterator[str]:
        """What is said of those that nothing has taken."""
        for name, value in self._given.items():
            if name in WITHOUT_EFFECT and value:
                yield f"{name}: {WITHOUT_EFFECT[name]}"
            elif name in ALWAYS and not value:
                yield f"{name}: {ALWAYS[name]}"
            elif name in KNOWN and name not in (*self._taken, *WITHOUT_EFFECT, *ALWAYS):
                yield f"{name} has no effect with {strategy}"

    def problems(self) -> Iterator[str]:
        """Those that do not exist."""
        return (unknown_name("option", name, KNOWN) for name in self._given if name not in KNOWN)


class RunOptions(NamedTuple):
    """How a merge is run, and its result loaded.

    Attributes:
        run: how it is run.
        device: where the result is loaded; see `model_inference.load_model`.
        dtype: of the result; None for that of the base or the first model.
        log_level: of the merger's messages; None leaves it as it is.
    """

    run: RunSettings
    device: str
    dtype: str | None
    log_level: int | None


def take_run_options(
    options: Options, kind: Kind, problems: list[str], notes: list[str]
) -> RunOptions:
    """What options say of the run; adds what is wrong with them, and what the user should know."""
    merge_device, load_device = _devices(options.take("device_map", "auto"), notes)
    verbose = options.take("verbose", True)
    if not isinstance(verbose, bool):
        problems.append(f"verbose must be true or false, got {brief(verbose)}")
    settings = options.take_all(OF_THE_RUN[kind])
    for name in ("findings", "resume", "verify_inputs"):
        if not isinstance(settings.get(name, False), bool):
            problems.append(f"{name} must be true or false, got {brief(settings[name])}")
    run = RunSettings(merge_device, progress=bool(verbose), **settings)
    problems += run.problems()
    level = _log_level(options.take("log_level"), problems)
    return RunOptions(run, load_device, _dtype(options, problems), level)


def _dtype(options: Options, problems: list[str]) -> str | None:
    given = {
        _dtype_name(options.take(name)) for name in ("torch_dtype", "dtype") if name in options
    }
    if len(given) > 1:
        problems.append("torch_dtype and dtype are the same. Leave one of them out")
    dtype = min(given, default="auto")
    if dtype not in ("auto", *DTYPE_NAMES):
        problems.append(unknown_name("torch_dtype", dtype, ("auto", *DTYPE_NAMES)))
        return None
    return None if dtype == "auto" else dtype


def _dtype_name(dtype: Any) -> str:
    """Its name, also of a torch.dtype or by a common short form."""
    name = str(dtype).removeprefix("torch.")
    return {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(
        name, name
    )


def _devices(device_map: Any, notes: list[str]) -> tuple[str, str]:
    """Where it is merged, and where the result is loaded."""
    if isinstance(device_map, Mapping) and [*device_map] == [""]:
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    text = str(device_map)
    if text == "cpu:0":
        text = "cpu"
    if text.partition(":")[0] in ("cpu", "cuda"):
        return text, text
    if text != "auto":
        notes.append(
            f"device_map {brief(device_map)}: the result is loaded on one device, a GPU if there "
            "is one"
        )
    return "cpu", "auto"


def _log_level(level: Any, problems: list[str]) -> int | None:
    names = logging.getLevelNamesMapping()
    if level is None or (isinstance(level, int) and not isinstance(level, bool)):
        return level
    if str(level).upper() not in names:
        problems.append(unknown_name("log_level", level, names))
        return None
    return names[str(level).upper()]
