"""LoRA adapters merged into one adapter: exactly, to a rank, or by TIES and DARE.

The base is not needed. What a module's factors say is scaled and weighted; the modules that only
some adapters have are merged from those.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_adapter_output import AdapterOutput, AdapterReport, Errors
from merge_plan import place_problems
from merge_progress import Progress, progress_bar
from merge_recipe import brief, unknown_name
from model_checks import VOCABULARY_TENSORS, layer_order
from model_companions import code_notes, tokenizer_files
from model_errors import ModelCompatibilityError, refusal
from model_locate import adapter_name, last_part
from model_lora import (
    PREFIX,
    AdapterFolder,
    AdapterParts,
    ModuleFactors,
    is_number,
    is_saved,
    open_adapter,
    parts_of,
)
from model_lora_writer import NewAdapter
from model_rows import same_values
from model_safetensors import DTYPE_NAMES
from model_tokenizer import has_tokenizer

if TYPE_CHECKING:
    from lora_utils import Factors, Truncated

METHODS = {
    "auto": "cat while the rank stays within max_rank, else svd",
    "cat": "the sum of the changes, exactly; the ranks add up",
    "svd": "the sum, brought to a rank by singular values",
    "ties": "TIES on the changes, brought to a rank",
    "dare_linear": "DARE on the changes, brought to a rank",
    "dare_ties": "DARE with TIES' election on the changes, brought to a rank",
    "linear": "approximate: the factors are added, as by PEFT's linear",
}
"""Ways to merge adapters into one."""

SPARSE = ("ties", "dare_linear", "dare_ties")

_EMBEDDING, _HEAD = (tensor.removesuffix(".weight") for tensor in VOCABULARY_TENSORS)

MAX_RANK = 256
"""Of what `auto` leaves exact."""


@dataclass(frozen=True)
class AdapterMerge:
    """What is to be merged, and how.

    Attributes:
        adapters: folders or Hub ids, maybe with `:STRENGTH`, which multiplies the weight.
        method: a name of `METHODS`.
        weights: one for each adapter, of any sign; None for 1.0 each.
        rank: of the result, for what is brought to a rank; None for the largest of the adapters
            (`auto`: for `max_rank`).
        max_rank: up to which `auto` is `cat`.
        densities: share of a change that is kept, in [0, 1]; one for each adapter, for TIES and
            DARE; None for 1.0 each.
        lam: scale of the merged change, for TIES and DARE.
        seed: of DARE's masks.
        dtype: of the result.
    """

    adapters: tuple[str, ...]
    method: str = "auto"
    weights: tuple[float, ...] | None = None
    rank: int | None = None
    max_rank: int = MAX_RANK
    densities: tuple[float, ...] | None = None
    lam: float = 1.0
    seed: int = 0
    dtype: str = "float32"

    def problems(self) -> list[str]:
        """What is wrong with it, as far as that can be said without opening an adapter."""
        found = []
        if not self.adapters:
            found.append("no adapter is given. Name at least one")
        if self.method not in METHODS:
            found.append(unknown_name("method", self.method, METHODS))
        for name in ("weights", "densities"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.adapters):
                found.append(
                    f"{name} must have one entry per adapter: got {len(values)} for "
                    f"{len(self.adapters)}"
                )
            if values is not None and not all(map(is_number, values)):
                found.append(f"{name} must be numbers up to 1e30, got {brief(values)}")
                return found
        if self.densities is not None and not all(0 <= each <= 1 for each in self.densities):
            found.append(f"densities must be in [0, 1], got {brief(self.densities)}")
        if self.densities is not None and self.method not in SPARSE:
            found.append(f"densities have no effect with {self.method}. Leave them out")
        if self.method == "ties" and any(each < 0 for each in self.weights or ()):
            found.append(
                f"weights of ties must not be negative, got {brief(self.weights)}: the mean of "
                "those that agree could have any size. Use dare_linear, svd or cat"
            )
        for name in ("rank", "max_rank"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                found.append(f"{name} must be a whole number of at least 1, got {brief(value)}")
        if self.rank is not None and self.method in ("cat", "linear"):
            found.append(f"rank has no effect with {self.method}: use svd, or leave it out")
        useless = {
            "lam": self.lam != 1.0 and self.method not in SPARSE,
            "seed": self.seed != 0 and self.method not in ("dare_linear", "dare_ties"),
            "max_rank": self.max_rank != MAX_RANK and self.method != "auto",
        }
        found += [
            f"{name} has no effect with {self.method}. Leave it out"
            for name, is_useless in useless.items()
            if is_useless
        ]
        if not is_number(self.lam):
            found.append(f"lam must be a number up to 1e30, got {brief(self.lam)}")
        if not (type(self.seed) is int and 0 <= self.seed < 2**64):
            found.append(f"seed must be a whole number in [0, 2**64), got {brief(self.seed)}")
        if self.dtype not in DTYPE_NAMES:
            found.append(unknown_name("dtype", self.dtype, DTYPE_NAMES))
        return found


WORTH_A_NOTE = 0.05
"""A share of the change that is missing and that a user wants to hear of."""


class _Input(NamedTuple):
    """An open adapter.

    Attributes:
        adapter: the folder.
        weight: its multiplier.
        parts: what it holds.
    """

    adapter: AdapterFolder
    weight: float
    parts: AdapterParts


def merge_adapters(
    merge: AdapterMerge,
    output_dir: Path,
    *,
    progress: Progress = True,
    resume: bool = False,
    verify_inputs: bool = False,
) -> AdapterReport:
    """Merge adapters into one, which PEFT loads with the right scale.

    Args:
        merge: what to merge.
        output_dir: the folder to make; it must not exist, or be empty.
        progress, resume, verify_inputs: see `merge_run.RunSettings`.

    Raises:
        ValueError: something is wrong with the settings.
        OutputBusyError: another process is making this output.
        ModelCompatibilityError: adapters cannot be read, or cannot be merged into one.
        OSError: the disk is full, or a file cannot be read or written.
    """
    if problems := merge.problems():
        raise ValueError("\n".join(problems))
    with ExitStack() as stack:
        inputs = _open(merge, stack)
        adapters = [each.adapter for each in inputs]
        if wrong := place_problems(output_dir, adapters):
            raise ValueError("\n".join(wrong))
        given = {key: value for key, value in asdict(merge).items() if value is not None}
        output = AdapterOutput(
            output_dir,
            given,
            adapters,
            progress=progress,
            resume=resume,
            verify_inputs=verify_inputs,
        )
        if output.finished:
            return output.finished
        stack.enter_context(output)
        shapes = _shapes(inputs)
        new = NewAdapter(_base_name(inputs))
        whole, settings = _carried(inputs)
        new.whole, new.settings = whole, settings
        method = _chosen_method(merge, inputs)
        errors = Errors()
        modules = sorted(shapes, key=lambda module: layer_order(f"{module}.weight"))
        nbytes = {module: 4 * shape[0] * shape[1] for module, shape in shapes.items()}
        with progress_bar(sum(nbytes.values()), method, show=progress) as on_bytes:
            for module in modules:
                on_bytes(nbytes[module])
                if module == _HEAD and settings.get("ensure_weight_tying"):
                    lora_a, lora_b, _ = new.factors[_EMBEDDING]  # the same, the other way round
                    new.factors[_HEAD] = lora_b.T, lora_a.T, False
                    continue
                make = functools.partial(_merged, merge, method, inputs, module, shapes[module])
                found = output.factors(module, make)
                errors.add(module, found)
                lora_a, lora_b = (each.numpy() for each in found.factors)
                new.factors[module] = lora_a, lora_b, module == _EMBEDDING
        new.target_modules = _targets(inputs, modules)
        givers = [each.adapter for each in inputs if has_tokenizer(each.adapter.path)]
        new.files = tokenizer_files(givers[0]) if givers else ()
        notes = [*_notes(merge, method, inputs, errors.total)]
        if givers:
            notes.append(f"the tokenizer beside it is that of {givers[0].label}")
            notes += code_notes(givers[0], new.files)
        del given["adapters"], given["method"]
        return output.write(new, method, given, merge.adapters, merge.dtype, errors, notes)


def check_adapters(merge: AdapterMerge) -> None:
    """Whether adapters can be merged into one.

    Raises:
        ValueError: something is wrong with the settings.
        ModelCompatibilityError: adapters cannot be read, or cannot be merged into one.
    """
    if problems := merge.problems():
        raise ValueError("\n".join(problems))
    with ExitStack() as stack:
        inputs = _open(merge, stack)
        _shapes(inputs)
        _carried(inputs)


def _open(merge: AdapterMerge, stack: ExitStack) -> list[_Input]:
    """The adapters; what cannot be merged into an adapter is refused, all at once."""
    inputs: list[_Input] = []
    problems: list[str] = []
    for text, weight in zip(
        merge.adapters, merge.weights or (1.0,) * len(merge.adapters), strict=True
    ):
        name, strength = adapter_name(text)
        try:
            adapter = stack.enter_context(open_adapter(name))
            inputs.append(_Input(adapter, strength * weight, parts_of(adapter)))
        except ModelCompatibilityError as error:
            problems += error.problems
    for adapter, _, parts in inputs:
        if adapter.uses_dora:
            problems.append(
                f"{adapter.label}: is a DoRA adapter, whose change depends on the base, so no "
                "adapter is the sum of it and others. Merge BASE+ADAPTER models instead"
            )
        scales = {parts.factors[m].scale for m in (_EMBEDDING, _HEAD) if m in parts.factors}
        if adapter.config.get("ensure_weight_tying") and len(scales) > 1:
            problems.append(
                f"{adapter.label}: keeps embedding and head tied (ensure_weight_tying), but scales "
                "their changes differently. Merge BASE+ADAPTER models instead"
            )
        biased = [m for m, each in parts.modules.items() if "lora_bias" in each]
        if biased:
            problems.append(
                f"{adapter.label}: adds to biases (lora_bias, {biased[0]}), which merged factors "
                "cannot. Merge BASE+ADAPTER models instead"
            )
        if not parts.factors:
            problems.append(f"{adapter.label}: has no factors, so there is nothing to merge")
    turned = {bool(each.adapter.config.get("fan_in_fan_out")) for each in inputs}
    if len(turned) > 1:
        problems.append("some adapters have fan_in_fan_out, and some do not. Merge one kind")
    if problems:
        raise refusal(problems)
    return inputs


def _shapes(inputs: Sequence[_Input]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module, which must be the same in all adapters that have it."""
    shapes: dict[str, tuple[int, int]] = {}
    problems = []
    for adapter, _, parts in inputs:
        for module, factors in parts.factors.items():
            shape = _shape(adapter, factors)
            if shapes.setdefault(module, shape) != shape:
                problems.append(
                    f"{adapter.label}: changes {module} of shape {list(shape)}, others of "
                    f"{list(shapes[module])}. Merge adapters of one base"
                )
    if problems:
        raise ModelCompatibilityError(problems)
    return shapes


def _shape(adapter: AdapterFolder, factors: ModuleFactors) -> tuple[int, int]:
    return adapter.tensors[factors.lora_B].shape[0], adapter.tensors[factors.lora_A].shape[1]


def _base_name(inputs: Sequence[_Input]) -> str:
    return next((each.adapter.base_name for each in inputs if each.adapter.base_name), "")


def _chosen_method(merge: AdapterMerge, inputs: Sequence[_Input]) -> str:
    if merge.method != "auto":
        return merge.method
    total = sum(max(each.rank for each in i.parts.factors.values()) for i in inputs)
    return "cat" if total <= merge.max_rank and merge.rank is None else "svd"


def _merged(
    merge: AdapterMerge,
    method: str,
    inputs: Sequence[_Input],
    module: str,
    shape: tuple[int, int],
) -> "Truncated":
    """The merged change of a module."""
    from lora_utils import Truncated, cat_factors, linear_factors, truncate_factors

    having = [each for each in inputs if module in each.parts.factors]
    factors = [_factors(each, module) for each in having]
    multipliers = [each.weight * each.parts.factors[module].scale for each in having]
    highest = merge.max_rank if merge.method == "auto" else None
    rank = merge.rank or highest or max(f.rank for i in inputs for f in i.parts.factors.values())
    if method in SPARSE:
        return _sparse(merge, method, inputs, module, shape, rank)
    exact = cat_factors(factors, multipliers)
    if not (exact.lora_A.isfinite().all() and exact.lora_B.isfinite().all()):
        raise ModelCompatibilityError(
            f"{module}: weights times scales of {', '.join(f'{by:g}' for by in multipliers)} take "
            "its change beyond float32. Choose smaller weights"
        )
    if method == "cat":
        return Truncated(exact, 0.0, product_norm(exact))
    if method == "svd":
        return truncate_factors(exact, rank)
    try:
        found = linear_factors(factors, multipliers)
    except ValueError as wrong:
        raise ModelCompatibilityError(f"{module}: {wrong}. Use cat or svd") from wrong
    norm, missing = product_norm(exact), product_norm(cat_factors([found, exact], [1.0, -1.0]))
    return Truncated(found, missing / norm if norm else 0.0, norm)


def product_norm(factors: "Factors") -> float:
    """Frobenius norm of a change, without the change."""
    a, b = factors.lora_A.double(), factors.lora_B.double()
    return float(((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt())


def _factors(each: _Input, module: str) -> "Factors":
    import torch

    from lora_utils import Factors

    names = each.parts.factors[module]
    return Factors(
        torch.from_numpy(each.adapter.values(names.lora_A)),
        torch.from_numpy(each.adapter.values(names.lora_B)),
    )


def _sparse(
    merge: AdapterMerge,
    method: str,
    inputs: Sequence[_Input],
    module: str,
    shape: tuple[int, int],
    rank: int,
) -> "Truncated":
    """TIES or DARE on the dense changes, brought to a rank; one that has none changes nothing."""
    import torch

    from dare_utils import dare_linear, dare_ties
    from lora_utils import factorise, lora_delta
    from ties_utils import ties

    embeds = False
    deltas = []
    for each in inputs:
        names = each.parts.factors.get(module)
        if names is None:
            deltas.append(torch.zeros(shape))
            continue
        lora_a, lora_b = _factors(each, module)
        deltas.append(lora_delta(lora_a, lora_b, names.scale))
        embeds = names.embeds
    if embeds:  # as the matrix lies in the model, whose elements the masks are for
        deltas = [delta.T.contiguous() for delta in deltas]
    weights = [each.weight for each in inputs]
    densities = merge.densities or (1.0,) * len(inputs)
    nothing = torch.zeros_like(deltas[0])
    if method == "ties":
        merged = ties(nothing, deltas, weights, densities, lam=merge.lam)
    else:
        function = dare_linear if method == "dare_linear" else dare_ties
        name = f"{module}.weight"
        merged = function(
            nothing, deltas, weights, densities, seed=merge.seed, name=name, lam=merge.lam
        )
    return factorise(merged.T if embeds else merged, rank=rank)


class _Whole(NamedTuple):
    """A tensor of an adapter that takes the place of the base's, or of rows of it.

    Attributes:
        owner: the adapter.
        module: what it belongs to.
        part: "weight", "bias" or "tokens".
        name: in the adapter's file.
        is_copy: whether it is the base's own embedding or head, as far as names tell.
    """

    owner: _Input
    module: str
    part: str
    name: str
    is_copy: bool


def _whole_of(each: _Input) -> Iterator[_Whole]:
    for module, parts in each.parts.modules.items():
        for part in ("weight", "bias", "tokens"):
            if part in parts:
                vocabulary = part == "weight" and f"{module}.weight" in VOCABULARY_TENSORS
                is_copy = vocabulary and not is_saved(each.adapter.config, module)
                yield _Whole(each, module, part, parts[part], is_copy)


def _carried(inputs: Sequence[_Input]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What takes the place of the base's tensors, which only one adapter may do, at weight 1.

    Returns:
        The tensors by their names, and the entries of adapter_config.json for them.
    """
    changed = {module for each in inputs for module in each.parts.factors}
    by_place: dict[tuple[str, str], list[_Whole]] = {}
    for each in inputs:
        for found in _whole_of(each):
            by_place.setdefault((found.module, found.part), []).append(found)
    whole: dict[str, Any] = {}
    problems: list[str] = []
    for (module, part), having in by_place.items():
        problems += _carrying_problems(inputs, having)
        first = having[0]
        name = first.name
        if part in ("weight", "bias"):  # PEFT keeps what is beneath factors under another name
            within = ".base_layer" if module in changed else ""
            within = ".token_adapter.base_layer" if (module, "tokens") in by_place else within
            name = f"{PREFIX}{module}{within}.{part}"
        whole[name] = first.owner.adapter.values(first.name)
    settings, wrong = _settings_for(inputs)
    if problems := [*dict.fromkeys(problems), *wrong]:
        raise ModelCompatibilityError(problems)
    return whole, settings


def _carrying_problems(inputs: Sequence[_Input], having: Sequence[_Whole]) -> Iterator[str]:
    """What speaks against keeping a tensor that some adapters have whole."""
    first = having[0]
    adapter, name = first.owner.adapter, first.name
    labels = ", ".join(each.owner.adapter.label for each in having)
    instead = "Merge BASE+ADAPTER models instead"
    copies = all(each.is_copy for each in having)
    if len(having) > 1 and not (
        copies
        and all(same_values(adapter, name, each.owner.adapter, each.name) for each in having[1:])
    ):
        yield f"{labels}: each replaces {first.module}.{first.part}, and only one can. {instead}"
    elif not copies and first.owner.weight != 1.0:
        yield (
            f"{labels}: replaces {first.module}.{first.part}, so its weight must be 1, got "
            f"{first.owner.weight:g}. {instead}"
        )
    owners = [each.owner.adapter for each in having]
    others = [
        each.adapter.label
        for each in inputs
        if each.adapter not in owners
        and first.part != "bias"
        and first.module in each.parts.modules
        and not copies
    ]
    if others:
        yield (
            f"{labels}: replaces {first.module}.{first.part}, which {', '.join(others)} changes as "
            f"well. {instead}"
        )


def _settings_for(inputs: Sequence[_Input]) -> tuple[dict[str, Any], list[str]]:
    """Entries of adapter_config.json for what is kept whole, and what keeps them from agreeing."""
    settings: dict[str, Any] = {}
    problems = []
    for key in ("bias", "trainable_token_indices"):
        values = [each.adapter.config.get(key) for each in inputs]
        given = [value for value in values if value and value != "none"]
        if any(value != given[0] for value in given[1:]):
            problems.append(
                f"{key} differs between the adapters. Merge BASE+ADAPTER models instead"
            )
        elif given:
            settings[key] = given[0]
    saved = [name for each in inputs for name in each.adapter.config.get("modules_to_save") or ()]
    if saved:
        settings["modules_to_save"] = [*dict.fromkeys(saved)]
    tying = {bool(each.adapter.config.get("ensure_weight_tying")) for each in inputs}
    if tying == {True}:
        settings["ensure_weight_tying"] = True
    elif len(tying) > 1:
        problems.append(
            "some adapters keep embedding and head tied (ensure_weight_tying), and some do not. "
            "Merge BASE+ADAPTER models instead"
        )
    return settings, problems


def _targets(inputs: Sequence[_Input], modules: Sequence[str]) -> list[str]:
    """Names by which PEFT finds the merged modules, and no others.

    Short ones, such as q_proj, if every adapter has those, in all layers; else whole paths.
    """
    named: set[str] = set()
    for adapter, _, _ in inputs:
        targets = adapter.config.get("target_modules")
        layers = adapter.config.get("layers_to_transform")
        limited = layers not in (None, []) or adapter.config.get("exclude_modules")
        if not isinstance(targets, list) or limited:
            return [*modules]
        named.update(targets)
    short = {module.rpartition(".")[2] for module in modules}
    return sorted(short) if short <= named else [*modules]


def _notes(
    merge: AdapterMerge, method: str, inputs: Sequence[_Input], error: float
) -> Iterator[str]:
    bases = [each.adapter.base_name for each in inputs if each.adapter.base_name]
    if len({last_part(name) for name in bases}) > 1:
        yield (
            f"the adapters say that they were trained on different bases: "
            f"{', '.join(dict.fromkeys(bases))}. If these are not the same weights, the result is "
            f"wrong; the first is named as its base"
        )
    if error > WORTH_A_NOTE and method != "linear":
        yield (
            f"{error:.0%} of the merged change (by its norm) does not fit the rank. A higher rank "
            "keeps more"
        )
    resized = [
        each.adapter.label
        for each in inputs
        for found in _whole_of(each)
        if found.is_copy and ".base_layer." not in found.name
    ]
    if resized:
        yield (
            f"{', '.join(dict.fromkeys(resized))}: has embeddings of its own, maybe of another "
            "number of rows: with PEFT, resize the base's first (resize_token_embeddings)"
        )
    if method == "linear" and len(inputs) > 1:
        yield (
            "linear is approximate: it adds the factors, so the result also has products of one "
            "adapter's B with another's A. cat is exact"
        )
    if merge.method == "auto":
        yield f"by method auto it was {method}"
