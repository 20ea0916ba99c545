"""What a merged folder, or an adapter, says about itself: a card, and the report as JSON.

Both are meant to be published. So they name Hub models by their ids and folders by their last
part, never by a path; and they hold nothing that differs from one run to the next.
"""

import contextlib
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from merge_document import recipe_document
from merge_methods import METHODS
from merge_plan import Earlier, Plan
from merge_recipe import Recipe
from merge_report import MergeReport
from merge_yaml import write_recipes
from model_companions import AUTO_TEMPLATE, NO_TEMPLATE
from model_hashes import REPORT_FILE, sampled_sha256
from model_locate import HUB_ID, join_adapters, last_part, split_adapters, split_revision
from model_tokenizer import FORMS
from model_utils import Origin, WeightFile
from model_vocabulary import BY_MODEL, model_index

VERSION = "0.1.0"


def saved_report(plan: Plan, report: MergeReport, earlier: Earlier) -> dict[str, Any]:
    """The report as it lies beside the weights.

    Returns:
        "recipe" (resolved, as a recipe file has it), "earlier" (those whose results it uses),
        "base_model" and "models" (the inputs),
        "base_models" (Hub ids among the inputs, adapters too), "revisions" (their commits,
        where known), "versions", "result", "notes", "findings" per tensor, and what the models
        have changed, "task_vectors", empty unless it was asked for.
    """
    origins, names = _named(plan, earlier)
    content = {
        "recipe": recipe_document(resolved_recipe(plan), complete=True),
        "earlier": [
            {"name": name, **recipe_document(resolved_recipe(each), complete=True)}
            for name, each in earlier.plans.items()
        ],
        "base_model": plan.recipe.base_model,
        "models": plan.recipe.models,
        "base_models": [*dict.fromkeys(split_revision(n)[0] for n in origins if is_hub_id(n))],
        "revisions": {
            name: origin.path.name
            for name, origin in origins.items()
            if is_hub_id(name) and origin.path.parent.name == "snapshots"
        },
        "versions": {
            "llama-merge": VERSION,
            **computed_with(),
            "python": platform.python_version(),
        },
        "result": {
            "tensors": report.tensors,
            "bytes": report.bytes_written,
            "tied": plan.alignment.tied,
            "vocabulary": report.vocabulary,
            "files": report.files_carried,
        },
        "notes": list(report.notes),
        "findings": report.findings,
        "task_vectors": report.task_vectors,
    }
    public: dict[str, Any] = publish(json.loads(json.dumps(content)), names)
    return public


def _named(plan: Plan, earlier: Earlier) -> tuple[dict[str, Origin], dict[str, str]]:
    """What a merge reads, by name, and public names of all models and adapters."""
    sources = {
        name: source
        for each in (*earlier.plans.values(), plan)
        for name, source in zip(each.recipe.names, each.sources, strict=True)
        if name not in earlier.models
    }
    origins = {
        origin.name: origin
        for each in sources.values()
        for origin in each.origins
        if origin.name not in earlier.models
    }
    names = [*dict.fromkeys([*sources, *origins])]
    return origins, public_names(names, [*earlier.models])


def public_recipe(plan: Plan, earlier: Earlier) -> dict[str, Any]:
    """The resolved recipe as a recipe file has it, with public names."""
    _, names = _named(plan, earlier)
    document = recipe_document(resolved_recipe(plan), complete=True)
    published: dict[str, Any] = publish(json.loads(json.dumps(document)), names)
    return published


def weight_files(plan: Plan, earlier: Earlier) -> list[WeightFile]:
    """The weight files that a merge reads, those for earlier results included, each once."""
    files = {
        (file.folder, file.name): file
        for each in (*earlier.plans.values(), plan)
        for source in each.sources
        for file in source.files
    }
    return [*files.values()]


def public_inputs(
    plan: Plan, earlier: Earlier, hashes: Mapping[WeightFile, str] | None = None
) -> list[dict[str, Any]]:
    """What is told of the weight files that a merge reads: name, size, digests; no paths.

    Args:
        plan, earlier: the merge.
        hashes: their SHA-256, where these are known.
    """
    _, names = _named(plan, earlier)
    found = told_of(weight_files(plan, earlier), hashes, names)
    published: list[dict[str, Any]] = publish(found, names)
    return published


def told_of(
    files: Sequence[WeightFile],
    hashes: Mapping[WeightFile, str] | None = None,
    names: Collection[str] = (),
) -> list[dict[str, Any]]:
    """What can be told of weight files.

    Args:
        files: some of them.
        hashes: their SHA-256, where these are known.
        names: models that are called by their whole names; of others, it is the last part.
    """
    return [
        {
            "model": file.model if file.model in names else last_part(file.model),
            "file": file.name,
            "bytes": file.state.bytes,
            "header_sha256": file.header_sha256,
            "sample_sha256": sampled_sha256(file),
            **({"sha256": hashes[file]} if hashes else {}),
        }
        for file in files
    ]


def computed_with() -> dict[str, str]:
    """Versions of the packages that compute, looked up without importing them, and the machine."""
    found = {}
    for package in ("torch", "numba"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {**found, "machine": platform.machine()}


def resolved_recipe(plan: Plan) -> Recipe:
    """The recipe with everything filled in that decides the result, models by their whole names."""
    recipe = plan.recipe

    def whole(name: str) -> str:
        """A model's name as the recipe has it; anything else as it is."""
        index = model_index(name, recipe.names)
        return (
            name if index is None or name in (AUTO_TEMPLATE, NO_TEMPLATE) else recipe.names[index]
        )

    settings, donor = recipe.vocabulary, recipe.vocabulary.donor_name
    slices = tuple(
        replace(each, parameters=values)
        for each, values in zip(recipe.slices, plan.parameters, strict=False)
    )
    return replace(
        recipe,
        parameters={} if slices else plan.parameters[0],
        slices=slices,
        dtype=plan.dtype,
        **({} if not any(each.strengths for each in plan.sources) else _lora_of(recipe)),
        vocabulary=replace(
            settings,
            mode=settings.mode if donor is None else f"{BY_MODEL}{whole(donor)}",
            tokens={
                token: replace(source, model=whole(source.model)) if source.model else source
                for token, source in settings.tokens.items()
            },
        ),
        tokenizer_source=recipe.names[plan.alignment.vocabulary.donor],
        chat_template=whole(recipe.chat_template),
    )


def _lora_of(recipe: Recipe) -> dict[str, Any]:
    """How adapters are put on their bases, as the profile has it where the recipe does not say."""
    rounding, tied = recipe.lora
    return {"lora_rounding": rounding, "tied_lora": tied}


def is_hub_id(name: str) -> bool:
    """Whether a model was named by a Hub id."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def public_names(names: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """What models are called in public, by what the user called them; no two folders the same.

    Args:
        names: of the models.
        taken: names of earlier results, which stay, and which no other model may have.

    >>> public_names(["/home/me/models/chat", "/home/me/old/chat", "/data/code/", "chat"])
    {'chat': 'chat', '/home/me/models/chat': 'chat-2', '/home/me/old/chat': 'chat-3', \
'/data/code/': 'code'}
    >>> public_names(["/data/base+/data/chat:0.5"])["/data/base+/data/chat:0.5"]
    'base+chat:0.5'
    """
    public: dict[str, str] = {}
    by_path: dict[str, str] = {}
    with_adapters = {name: split_adapters(name) for name in names}
    single = [
        part
        for name, (model, adapters) in with_adapters.items()
        for part in (model, *(adapter.name for adapter in adapters))
    ]
    for name in sorted(dict.fromkeys(single), key=lambda name: "/" in name):
        if name in taken:
            public[name] = name
            continue
        path = name if is_hub_id(name) else os.path.abspath(name)
        if path not in by_path:
            short = name if is_hub_id(name) else Path(path).name or "model"
            by_path[path] = _unique(short, {*by_path.values(), *taken})
        public[name] = by_path[path]
    for name, (model, adapters) in with_adapters.items():
        shown = [adapter._replace(name=public[adapter.name]) for adapter in adapters]
        public[name] = join_adapters(public[model], shown)
    return public


def _unique(name: str, taken: Collection[str]) -> str:
    """A name that is not taken, with a number if it has to be."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def publish(value: Any, names: Mapping[str, str]) -> Any:
    """A JSON value in whose texts every model has its public name.

    Args:
        value: any JSON value; keys of objects are texts too.
        names: from `public_names`.

    A text that is a name is replaced whole, whatever it is. Within other texts paths are found,
    also as `repr` writes them. Bytes of a file name that are no UTF-8 become question marks.

    >>> publish(["../a: 2 rows cut", "../a", "a"], {"../a": "a-2", "a": "a"})
    ['a-2: 2 rows cut', 'a-2', 'a']
    """
    paths = {form: public for name, public in names.items() for form in _path_forms(name)}
    longest_first = sorted(map(re.escape, paths), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w/.-])(?:{'|'.join(longest_first) or '(?!)'})(?!\w)")

    def replace(text: str) -> str:
        text = names.get(text) or pattern.sub(lambda found: paths[found[0]], text)
        return text.encode("utf-8", "replace").decode()

    return _with_texts(value, replace)


def _path_forms(name: str) -> set[str]:
    """How a text may name a folder by its path; nothing for a name that is not one."""
    forms = {name, str(Path(name)), os.path.abspath(name)}
    with contextlib.suppress(ValueError, OSError):  # it can be no path at all
        forms.add(str(Path(name).resolve()))
    forms |= {repr(form)[1:-1] for form in forms}
    return {form for form in forms if "/" in form}


def _with_texts(value: Any, replace: Callable[[str], str]) -> Any:
    """A JSON value with `replace` applied to all its texts."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, list):
        return [_with_texts(entry, replace) for entry in value]
    if isinstance(value, dict):
        return {replace(key): _with_texts(entry, replace) for key, entry in value.items()}
    return value


def model_card(saved: Mapping[str, Any]) -> str:
    """README.md of a merged model, with the fields that the Hub reads at its head.

    Args:
        saved: from `saved_report`.
    """
    recipe = saved["recipe"]
    recipe_text = write_recipes([*saved["earlier"], recipe])
    versions = ", ".join(f"{name} {version}" for name, version in saved["versions"].items())
    parts = [
        "\n".join(["---", *_head(saved), "---"]),
        f"# A merge by {METHODS[recipe['method']].title}",
        "\n".join(_models(saved)),
        _result(saved),
        f"{_fence(recipe_text)}yaml\n{recipe_text}{_fence(recipe_text)}",
        "\n".join(f"- {_plain(note)}" for note in saved["notes"]),
        f"Made with {versions}. {REPORT_FILE} has the findings per tensor.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def adapter_texts(made: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """README.md and merge_report.json of an adapter that has been made, fit to be published.

    Args:
        made: "method", "settings", "inputs", "base_model", "modules", "ranks", "error", "errors"
            and "notes" of it, as JSON can hold them.
        names: of models and adapters, as the user called them.
    """
    versions = {"llama-merge": VERSION, **computed_with(), "python": platform.python_version()}
    content = json.loads(json.dumps({**made, "versions": versions}))
    called = [name for name in dict.fromkeys([*names, made["base_model"]]) if name]
    saved = publish(content, public_names(called))
    fields: dict[str, Any] = (
        {"base_model": saved["base_model"]} if is_hub_id(made["base_model"]) else {}
    )
    fields |= {"library_name": "peft", "tags": ["lora", "merge", "llama-merge"]}
    low, high = saved["ranks"]
    settings = ", ".join(f"{key} {value}" for key, value in saved["settings"].items())
    parts = [
        "\n".join(
            ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"]
        ),
        f"# A LoRA adapter by {saved['method']}",
        "\n".join(f"- {_code(name)}" for name in saved["inputs"]),
        f"For {_code(saved['base_model'] or 'an unknown base')}: {saved['modules']} modules, rank "
        f"{low if low == high else f'{low} to {high}'}, relative error {saved['error']:.2e}. "
        f"{_plain(settings)}",
        "\n".join(f"- {_plain(note)}" for note in saved["notes"]),
        f"{REPORT_FILE} has the errors by module.",
    ]
    return {
        "README.md": "\n\n".join(part for part in parts if part) + "\n",
        REPORT_FILE: json.dumps(saved, indent=2, ensure_ascii=False) + "\n",
    }


def _head(saved: Mapping[str, Any]) -> Iterator[str]:
    """The fields that the Hub reads: YAML, whose values may be written as in JSON."""
    fields: dict[str, Any] = {}
    if saved["base_models"]:
        fields |= {"base_model": saved["base_models"], "base_model_relation": "merge"}
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["tags"] = ["merge", "llama-merge"]
    yield from (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())


def _models(saved: Mapping[str, Any]) -> Iterator[str]:
    """A list of what went in, the base first, with the commits of Hub models."""
    revisions = saved["revisions"]
    bases = [] if saved["base_model"] is None else [saved["base_model"]]
    for name, role in [
        *((base, " (base)") for base in bases),
        *((m, "") for m in saved["models"]),
    ]:
        at = f" at {revisions[name]}" if name in revisions else ""
        yield f"- {_code(name)}{role}{at}"


def _result(saved: Mapping[str, Any]) -> str:
    result, dtype = saved["result"], saved["recipe"]["dtype"]
    words = result["vocabulary"]
    has_tokenizer = any(form in result["files"] for form in FORMS)
    tokenizer = (
        f"tokenizer of {_code(words['tokenizer_source'])}" if has_tokenizer else "no tokenizer"
    )
    return f"{result['tensors']} tensors in {dtype}; {words['rows']} vocabulary rows, {tokenizer}."


def _fence(text: str) -> str:
    """Backticks around a text that may have some itself."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _code(text: str) -> str:
    """A text as Markdown shows it unchanged, on one line.

    >>> print(_code("a`b"))
    `` a`b ``
    """
    text = " ".join(text.split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"`{text}`" if not longest else f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"


def _plain(text: str) -> str:
    """A text as Markdown shows it unchanged: on one line, what means something there escaped.

    >>> print(_plain("2 tokens added: '<think>', '*', of my_model"))
    2 tokens added: '\\<think\\>', '\\*', of my_model
    """
    special = r"[\\`*<>\[\]#|~$&]|(?<!\w)_|_(?!\w)"
    return re.sub(special, lambda found: "\\" + found[0], " ".join(text.split()))
