"""What the parity suite merges, and how far two results are apart.

`parity.py` makes fixtures of these cases with other programs, `tests/test_parity.py` merges them
here and compares. A case is a setting drawn at random for a pair of tiny LLaMAs and their
fine-tunes, in the names of our recipes.

Distances are given in units in the last place (ulp) of float32: of the result, and of the largest
operand, which is any number that goes into one of the method's sums. Where large terms cancel, one
rounding of a term is thousands of ulps of what is left, so methods that do not compute in the same
steps as their peer are held to the second.

Set aside are elements whose value is a matter of chance in the peer. That is decided from the
inputs alone, never from the results:
    cut      a magnitude that a trim both keeps and drops (which, the peer leaves to its sort), or
             a variance that float32 cannot tell from the one at the cut
    vote     the votes of the models cancel to within the rounding of their sum
    cosine   the cosine of two tensors is too near SLERP's threshold for float32 to tell the side
    score    an importance is within float32's noise of Arcee Fusion's threshold
"""

import hashlib
import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from merge_methods import ALIASES, METHODS  # noqa: E402
from merge_parameters import settled  # noqa: E402
from merge_recipe import make_recipe, resolve_parameters  # noqa: E402
from merge_run import merge_to_folder  # noqa: E402
from tests.tiny_checkpoints import make_llama, read_tensors  # noqa: E402

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]
Tensors = dict[str, Floats]
Values = dict[str, Any]

FIXTURES = ROOT / "tests" / "fixtures"

LIMIT = 2.0
"""Ulps that two results may be apart."""

RESCALED_LIMIT = 4.0
"""The same where task vectors are rescaled to their L1 norm. Entry, factor, weight and lambda are
multiplied one after the other in float32, here and there, and mergekit's factor is a ratio of
float32 sums: two programs that do so are up to 6 ulps apart, and as far from float64."""

MOST_ASIDE = 0.05
"""Share of a group's elements that may be left out."""

SEEDS = 200
"""Merges with random masks that a mean is taken over."""

SIGMAS = 5.0
"""Standard deviations that two such means may be apart."""

NOISES = (0.0002, 0.0003, 0.003, 0.02, 0.05)
"""How far each fine-tune is from the base, whose weights are N(0, 0.1). The first two are near
enough for SCE's and Model Stock's floors, and for straight lines in every tensor."""

STATISTICS = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
)
"""Tensors of which means over seeds are compared."""

EPSILON = 2.0**-24
"""Half an ulp of 1: the relative error of one rounding."""


# Models


@dataclass(frozen=True)
class Family:
    """Tiny models of one shape, the base first, each with its tensors by name."""

    folders: tuple[Path, ...]
    tensors: tuple[Tensors, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the order in which fixtures hold them."""
        return tuple(sorted(self.tensors[0]))

    @property
    def hash(self) -> str:
        """SHA-256 of all values."""
        digest = hashlib.sha256()
        for tensors, name in itertools.product(self.tensors, self.names):
            digest.update(tensors[name].tobytes())
        return digest.hexdigest()

    def split(self, flat: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The tensors of a merged model, from a fixture's array."""
        shapes = [self.tensors[0][name].shape for name in self.names]
        parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
        return {n: p.reshape(s) for n, p, s in zip(self.names, parts, shapes, strict=True)}


def make_family(folder: Path, *, tied: bool) -> Family:
    """Write the models; the same bytes every time."""
    folders: list[Path] = []
    for model, noise in enumerate((0.0, *NOISES)):
        made = make_llama(
            folder / f"{'tied' if tied else 'untied'}-{model}",
            seed=model,
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            layers=1,
            dtype="float32",
            tied=tied,
            base=folders[0] if folders else None,
            noise=noise,
        )
        folders.append(made)
    return Family(tuple(folders), tuple(read_arrays(made) for made in folders))


def make_families(folder: Path) -> dict[bool, Family]:
    """The models with a tied head (True) and with one of their own (False)."""
    return {tied: make_family(folder, tied=tied) for tied in (True, False)}


def read_arrays(folder: Path) -> Tensors:
    return {name: tensor.numpy() for name, tensor in read_tensors(folder).items()}


# Cases


@dataclass(frozen=True)
class Case:
    """One merge that a peer and we do.

    Attributes:
        group: settings that are reported together; its name begins with the method's.
        method: as our recipes name it.
        tied: which models.
        base: position of the base in its family; None where the method takes none.
        models: positions of the fine-tunes.
        parameters: as our recipes name them.
    """

    group: str
    method: str
    tied: bool
    base: int | None
    models: tuple[int, ...]
    parameters: Values

    def folders(self, families: Mapping[bool, Family]) -> tuple[Path | None, list[Path]]:
        """The base's folder, and the models'."""
        folders = families[self.tied].folders
        return None if self.base is None else folders[self.base], [folders[m] for m in self.models]

    def inputs(self, families: Mapping[bool, Family]) -> list[Tensors]:
        """What the method reads, the base first."""
        read = self.models if self.base is None else (self.base, *self.models)
        return [families[self.tied].tensors[model] for model in read]


def to_json(case: Case) -> Values:
    return vars(case) | {"models": list(case.models)}


def from_json(values: Values) -> Case:
    return Case(**(values | {"models": tuple(values["models"])}))


@dataclass(frozen=True)
class Draw:
    """What settings are drawn with.

    Attributes:
        random: seeded by group and number.
        number: of the setting within its group; switches take turns by it.
    """

    random: random.Random
    number: int

    def uniform(self, low: float, high: float) -> float:
        """Three digits, so that shares of small tensors are sometimes whole numbers."""
        return round(self.random.uniform(low, high), 3)

    def decades(self, low: float, high: float) -> float:
        """A number between two powers of ten."""
        return float(f"{10 ** self.random.uniform(low, high):.3g}")

    def every(self, period: int) -> bool:
        """True for one number in `period`; the first has it."""
        return self.number % period == 0

    def turn(self, period: int) -> bool:
        """True for `period` numbers, then false for as many."""
        return self.number // period % 2 == 0

    def models(self, count: int | None = None) -> tuple[int, ...]:
        """Different fine-tunes in any order; two to four if no number is given."""
        taken = self.random.sample(range(1, len(NOISES) + 1), count or self.random.randint(2, 4))
        return tuple(taken)

    def each(self, models: Sequence[int], low: float, high: float) -> list[float]:
        return [self.uniform(low, high) for _ in models]

    def weights(self, models: Sequence[int], *, positive: bool) -> list[float]:
        return self.each(models, 0.2 if positive else -1.2, 1.2)


Settings = Callable[[Draw], tuple[int | None, tuple[int, ...], Values]]
"""Draws the base, the models and the parameters."""


class Group(NamedTuple):
    """A kind of settings.

    Attributes:
        method: as our recipes name it.
        draw: draws one setting.
        same_steps: the peer computes in the same steps, so that equal results can be expected.
        limit: ulps that results may be apart.
    """

    method: str
    draw: Settings
    same_steps: bool = True
    limit: float = LIMIT


def draw_cases(groups: Mapping[str, Group], count: int) -> dict[str, Case]:
    """`count` settings for tied heads and as many for untied ones, of each group."""
    cases = {}
    for name, group in groups.items():
        for number in range(2 * count):
            draw = Draw(random.Random(f"{name}/{number}"), number // 2)
            base, models, parameters = group.draw(draw)
            case = Case(name, group.method, number % 2 == 0, base, models, parameters)
            cases[f"{name}/{number:02}"] = case
    return cases


def _linear(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    models, normalize = draw.models(), draw.every(2)
    weights = draw.weights(models, positive=normalize)
    return None, models, {"weights": weights, "normalize": normalize}


def _slerp(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    return None, draw.models(2), {"t": draw.uniform(0.02, 0.98)}


def _nuslerp(flatten: bool, row_wise: bool) -> Settings:
    def draw_one(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
        models, base = draw.models(2), 0 if draw.every(2) else None
        axes = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
        return base, models, {"weights": draw.weights(models, positive=True)} | axes

    return draw_one


def _multislerp(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    models, base = draw.models(), 0 if draw.every(2) else None
    weights = draw.weights(models, positive=True)
    return base, models, {"weights": weights, "normalize_weights": draw.turn(2)}


def _karcher(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    values = {"max_iter": draw.random.randint(1, 20), "tol": draw.decades(-7, -4)}
    return None, draw.models(), values


def _model_stock(filter_wise: bool) -> Settings:
    return lambda draw: (0, draw.models(), {"filter_wise": filter_wise})


def _task_arithmetic(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    models, normalize = draw.models(), draw.every(2)
    weights = draw.weights(models, positive=normalize)
    return 0, models, {"weights": weights, "normalize": normalize, "lam": draw.uniform(0.3, 1.5)}


def _ties(rescale: str) -> Settings:
    def draw_one(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
        _, models, values = _task_arithmetic(draw)
        return 0, models, values | {"densities": draw.each(models, 0.15, 0.95), "rescale": rescale}

    return draw_one


def _breadcrumbs(rescale: str, least_gamma: float, *, elects: bool) -> Settings:
    def draw_one(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
        _, models, values = _ties(rescale)(draw)
        values["gammas"] = draw.each(models, least_gamma, 0.3)
        values["normalize"] = values["normalize"] and elects
        return 0, models, values

    return draw_one


def _sce(selects: bool) -> Settings:
    def draw_one(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
        return 0, draw.models(), {"select_topk": draw.uniform(0.15, 0.9) if selects else 1.0}

    return draw_one


def _nearswap(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    return 0, draw.models(1), {"t": draw.decades(-5, -1)}


def _arcee_fusion(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    """Two models of which one is far: what is left of a near pair's scores is noise in float32."""
    far = draw.random.randint(4, 5)
    near = draw.random.choice([model for model in range(6) if model != far])
    base, model = draw.random.sample((near, far), 2)
    return base, (model,), {}


def _ram(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    return 0, draw.models(), {"epsilon": draw.decades(-5, -2)}


def _ramplus(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    base, models, values = _ram(draw)
    return base, models, values | {"r": draw.uniform(0.0, 0.5), "alpha": draw.uniform(0.0, 2.0)}


def _passthrough(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    scale = None if draw.every(4) else draw.uniform(-2, 2)
    return None, (draw.random.randint(0, len(NOISES)),), {"scale": scale}


def _random(**more: tuple[float, float]) -> Settings:
    """Three models of about one size, so that signs are in dispute; `more` are per model."""

    def draw_one(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
        models = draw.models(3)
        values = {name: draw.each(models, *bounds) for name, bounds in more.items()}
        weights = draw.weights(models, positive=True)
        return 0, models, {"weights": weights, "lam": draw.uniform(0.5, 1.5)} | values

    return draw_one


def _peft(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    models = draw.models()
    return 0, models, {"weights": draw.weights(models, positive=draw.every(2))}


def _peft_pruned(**more: Any) -> Settings:
    """PEFT has one density for all models."""

    def draw_one(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
        base, models, values = _peft(draw)
        low, high = (0.02, 0.12) if draw.every(5) else (0.15, 0.95)  # nothing of a vector of 8
        share = {"densities": [draw.uniform(low, high)] * len(models)}
        gammas = {"gammas": [0.0] * len(models)} if more.get("gammas") else {}
        return base, models, values | share | {**more, **gammas}

    return draw_one


def _paper(draw: Draw) -> tuple[int | None, tuple[int, ...], Values]:
    models = draw.models()
    values = {"densities": [draw.uniform(0.05, 0.95)] * len(models), "lam": draw.uniform(0.3, 1.5)}
    return 0, models, values | {"denominator": "count" if draw.every(2) else "none"}


def mergekit_groups(version: str) -> dict[str, Group]:
    """Version 0.1.4 loses whole task vectors where gamma removes nothing, so there it does."""
    before = version == "0.1.4"
    gamma = 0.13 if before else 0.0
    groups = {
        "linear": Group("linear", _linear, not before),
        "slerp": Group("slerp", _slerp, False),
        "nuslerp": Group("nuslerp", _nuslerp(True, False), False),
        "nuslerp of rows": Group("nuslerp", _nuslerp(False, False), False),
        "nuslerp of columns": Group("nuslerp", _nuslerp(False, True), False),
        "multislerp": Group("multislerp", _multislerp, False),
        "karcher": Group("karcher", _karcher, False),
        "model_stock": Group("model_stock", _model_stock(False), False),
        "model_stock of rows": Group("model_stock", _model_stock(True), False),
        "task_arithmetic": Group("task_arithmetic", _task_arithmetic),
        "ties": Group("ties", _ties("none")),
        "ties rescaled": Group("ties", _ties("l1"), False, RESCALED_LIMIT),
        "sce": Group("sce", _sce(False), False),
        "sce selecting": Group("sce", _sce(True), False),
        "nearswap": Group("nearswap", _nearswap),
        "arcee_fusion": Group("arcee_fusion", _arcee_fusion, False),
        "passthrough": Group("passthrough", _passthrough),
    }
    for name, elects in (("breadcrumbs", False), ("breadcrumbs_ties", True)):
        plain = _breadcrumbs("none", gamma, elects=elects)
        rescaled = _breadcrumbs("l1", 0.13, elects=elects)
        groups[name] = Group(name, plain)
        groups[f"{name} rescaled"] = Group(name, rescaled, False, RESCALED_LIMIT)
    if not before:
        groups |= {
            "ram": Group("ram", _ram, False),
            "ramplus_tl": Group("ramplus_tl", _ramplus, False),
        }
    return groups


MERGEKIT_RANDOM = {
    "dare_linear": Group("dare_linear", _random(densities=(0.2, 0.9))),
    "dare_ties": Group("dare_ties", _random(densities=(0.2, 0.9))),
    "della": Group("della", _random(densities=(0.35, 0.65), epsilons=(0.0, 0.3))),
    "della_linear": Group("della_linear", _random(densities=(0.35, 0.65), epsilons=(0.0, 0.3))),
}
PEFT_GROUPS = {
    "task_arithmetic": Group("task_arithmetic", _peft),
    "magnitude_prune": Group("breadcrumbs", _peft_pruned(gammas=True)),
    "ties": Group("ties", _peft_pruned(elect_method="mass")),
    "ties by frequency": Group("ties", _peft_pruned(elect_method="count")),
}
PEFT_RANDOM = {
    "dare_linear": Group("dare_linear", _peft_pruned()),
    "dare_ties": Group("dare_ties", _peft_pruned(elect_method="mass")),
    "dare_ties by frequency": Group("dare_ties", _peft_pruned(elect_method="count")),
}
PAPER_GROUPS = {"ties": Group("ties", _paper)}


class Peer(NamedTuple):
    """A program to compare with: its settings, and the profile that follows its conventions."""

    profile: str
    groups: Mapping[str, Group]
    random: Mapping[str, Group]


PEERS = {
    "mergekit-0.1.5": Peer("mergekit", mergekit_groups("0.1.5"), MERGEKIT_RANDOM),
    "mergekit-0.1.4": Peer("mergekit-0.1.4", mergekit_groups("0.1.4"), MERGEKIT_RANDOM),
    "peft-0.21.2": Peer("peft", PEFT_GROUPS, PEFT_RANDOM),
    "ties-merging": Peer("paper", PAPER_GROUPS, {}),
}
EXACT = "mergekit-0.1.5"
"""The peer that is also run in float64."""


# Fixtures


class Fixture(NamedTuple):
    """What a peer made of its cases.

    Attributes:
        about: versions, the models' hashes, the settings.
        arrays: by case, the merged model, float32; `off/` and the case for how far the peer in
            float64 is from it; `mean/` and `variance/` over seeds of the merged task vectors.
    """

    about: Values
    arrays: Mapping[str, NDArray[Any]]

    @property
    def cases(self) -> dict[str, Case]:
        return {key: from_json(values) for key, values in self.about["cases"].items()}

    @property
    def random(self) -> dict[str, Case]:
        return {key: from_json(values) for key, values in self.about["random"].items()}

    def exact(self, key: str) -> Doubles | None:
        """The peer's result in float64; None where it was not computed."""
        if f"off/{key}" not in self.arrays:
            return None
        exact: Doubles = self.arrays[key].astype(np.float64) + self.arrays[f"off/{key}"]
        return exact


def read_fixture(peer: str, folder: Path = FIXTURES) -> Fixture:
    about = json.loads((folder / f"{peer}.json").read_text())
    with np.load(folder / f"{peer}.npz") as arrays:
        return Fixture(about, dict(arrays))


def resolved(case: Case, profile: str) -> tuple[str, Values]:
    """The method and all parameters that our recipe of a case comes to."""
    method, fixed = ALIASES.get(case.method, (case.method, {}))
    declared, given = METHODS[method].parameters_of(profile), {**fixed, **case.parameters}
    values, problems = resolve_parameters(declared, given, len(case.models))
    values, pointless = settled(declared, values, given)
    if problems or pointless:
        raise ValueError(f"{case.group}: {'; '.join([*problems, *pointless])}")
    return method, values


def merge_here(
    case: Case, profile: str, families: Mapping[bool, Family], folder: Path
) -> dict[str, Floats]:
    """Our merge of a case."""
    base, models = case.folders(families)
    shutil.rmtree(folder, ignore_errors=True)
    recipe = make_recipe(
        case.method,
        base,
        models,
        case.parameters,
        output_dir=folder,
        profile=profile,
        dtype="float32",
    )
    merge_to_folder(recipe, threads=1, progress=False)
    return read_arrays(folder)


# Setting aside


REASONS = ("", "cut", "vote", "cosine", "score")
"""Why an element is set aside; `Distances.aside` holds the positions."""


def set_aside(case: Case, profile: str, inputs: Sequence[Floats]) -> NDArray[np.int8]:
    """Positions in `REASONS`. Looks at the inputs only, and shares no code with our merges."""
    reasons = np.zeros(inputs[0].shape, np.int8)
    for reason, mask in _chance(case, profile, inputs):
        reasons[mask] = REASONS.index(reason)
    return reasons


def _chance(
    case: Case, profile: str, inputs: Sequence[Floats]
) -> Iterator[tuple[str, Mask | slice]]:
    values = case.parameters
    if case.method == "slerp" and near_threshold(*inputs):
        yield "cosine", slice(None)
    if case.method == "arcee_fusion":
        yield "score", near_score(*inputs)
    if case.base is None or case.method in ("arcee_fusion", "multislerp", "nuslerp"):
        return
    deltas = [model - inputs[0] for model in inputs[1:]]
    if case.method == "sce":
        yield from _chance_of_sce(deltas, values["select_topk"])
    if profile == "paper" or "densities" not in values:
        return
    ranks = [kept_ranks(case, profile, model, delta.size) for model, delta in enumerate(deltas)]
    if case.method in ("ties", "breadcrumbs_ties") and values.get("elect_method") != "count":
        kept = [keep(delta, *rank) for delta, rank in zip(deltas, ranks, strict=True)]
        weights = [1.0] * len(kept) if profile == "peft" else values["weights"]
        yield "vote", undecided(kept, weights)
    for delta, rank in zip(deltas, ranks, strict=True):
        yield "cut", at_cuts(np.abs(delta), rank)


def _chance_of_sce(deltas: Sequence[Floats], share: float) -> Iterator[tuple[str, Mask | slice]]:
    kept = [delta.astype(np.float64) for delta in deltas]
    if share < 1:
        variance = np.var(kept, axis=0)
        count = int(np.count_nonzero(variance) * share)
        ordered = np.sort(variance, axis=None)[::-1]
        if ordered[count - 1] - ordered[count] <= 8 * EPSILON * ordered[count]:
            yield "cut", slice(None)  # the weights of the models hang on which it is
        kept = [np.where(variance >= ordered[count - 1], delta, 0.0) for delta in kept]
    yield "vote", undecided(kept, [1.0] * len(kept))


def kept_ranks(case: Case, profile: str, model: int, numel: int) -> tuple[int, int]:
    """Of magnitudes in descending order, the first that is kept and the first after those."""
    kept = int(case.parameters["densities"][model] * numel)
    if "gammas" not in case.parameters:
        return 0, kept if profile == "peft" else max(1, kept)
    first = min(int(case.parameters["gammas"][model] * numel), numel - kept)
    return first, first + kept


def keep(delta: Floats, first: int, stop: int) -> Doubles:
    """The entries of these ranks, all of those that are equal at the ends; zero elsewhere."""
    if stop <= first:
        return np.zeros(delta.shape)
    ordered = np.sort(np.abs(delta), axis=None)[::-1]
    inside = (np.abs(delta) <= ordered[first]) & (np.abs(delta) >= ordered[stop - 1])
    return np.where(inside, delta, 0.0).astype(np.float64)


def at_cuts(magnitudes: Floats, ranks: Sequence[int]) -> Mask:
    """Elements of the magnitude at a cut that is found on both of its sides."""
    ordered = np.sort(magnitudes, axis=None)[::-1]
    found = np.zeros(magnitudes.shape, np.bool_)
    for rank in ranks:
        if 0 < rank < ordered.size and ordered[rank - 1] == ordered[rank]:
            found |= magnitudes == ordered[rank]
    return found


def undecided(kept: Sequence[Doubles], weights: Sequence[float]) -> Mask:
    """Elements where float32 may get the sign of the summed votes wrong.

    The sum over n models is off by at most n + 4 roundings (of the weight, a factor, the product
    and the additions), each 2**-24 of the summed magnitudes.
    """
    votes = np.stack([delta * weight for delta, weight in zip(kept, weights, strict=True)])
    size: Doubles = np.abs(votes).sum(axis=0)
    margin = (len(votes) + 4) * EPSILON * size
    disputed = np.count_nonzero(votes, axis=0) > 1
    near_zero: Mask = disputed & (np.abs(votes.sum(axis=0)) <= margin)
    return near_zero


def near_threshold(a: Floats, c: Floats) -> bool:
    """Whether the cosine is within the noise of a float32 sum from SLERP's threshold."""
    aa, cc, ac = (np.sum(x * y, dtype=np.float64) for x, y in ((a, a), (c, c), (a, c)))
    return bool(abs(abs(ac) / math.sqrt(aa * cc) - 0.9995) <= a.size * EPSILON)


def near_score(base: Floats, tensor: Floats) -> Mask:
    """Elements whose importance float32 may put on the other side of Arcee Fusion's threshold.

    A row's divergence is a sum of terms that cancel: what is left of them is off by some roundings
    of terms that sum to 1, whatever is left. The threshold is off like the scores it is made of.
    """
    p, q = (_softmax(x.astype(np.float64)) + 1e-8 for x in (tensor, base))
    divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    change = np.abs(tensor - base).astype(np.float64)
    score, noise = change * divergence, 4 * EPSILON * change
    ordered = np.sort(score, axis=None)
    ranks = [int(share * (score.size - 1)) for share in (0.25, 0.5, 0.75)]
    first, median, third = (ordered[rank] for rank in ranks)
    slack = 4 * float(np.median(noise))
    near: Mask = np.abs(score - median - 1.5 * (third - first)) <= noise + slack
    return near


def _softmax(rows: Doubles) -> Doubles:
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    shares: Doubles = powers / powers.sum(axis=-1, keepdims=True)
    return shares


# Comparing


class Distances(NamedTuple):
    """Per element, flat: how far two results are apart, and the reason for setting it aside.

    `ours_off` and `peer_off` are the distances from float64, in ulps of the operand; NaN where
    there is no result in float64.
    """

    in_result: Doubles
    in_operand: Doubles
    ours_off: Doubles
    peer_off: Doubles
    aside: NDArray[np.int8]

    def measured(self, *, same_steps: bool) -> Doubles:
        """The distance that is held to the limit: to the peer, or to its formula in float64.

        The nearer of both: where float32 sums leave the peer itself off by more than the limit,
        being near it would be wrong.
        """
        return self.in_result if same_steps else np.fmin(self.in_operand, self.ours_off)

    def beyond(self, group: Group) -> Mask:
        """Elements that are too far apart and not set aside."""
        apart = self.measured(same_steps=group.same_steps) > group.limit
        far: Mask = apart & (self.aside == 0)
        return far


def compare(
    case: Case,
    profile: str,
    family: Family,
    inputs: Sequence[Tensors],
    ours: Tensors,
    peer: Floats,
    exact: Doubles | None,
) -> Distances:
    """All tensors of two merged models, joined into one."""
    if set(ours) != set(family.names):
        raise ValueError(f"the merge of {case.group} has other tensors than its models")
    theirs = family.split(peer)
    exacts = family.split(np.full(peer.shape, np.nan) if exact is None else exact)
    parts = [
        _compare_tensor(
            case, profile, [x[name] for x in inputs], ours[name], theirs[name], exacts[name]
        )
        for name in family.names
    ]
    return join(parts)


def _compare_tensor(
    case: Case,
    profile: str,
    inputs: Sequence[Floats],
    ours: Floats,
    peer: Floats,
    exact: Doubles,
) -> Distances:
    operand = ulp(np.max(np.abs([*operands(case, inputs), peer]), axis=0))
    apart = np.abs(ours.astype(np.float64) - peer)
    return Distances(
        (apart / ulp(peer)).ravel(),
        (apart / operand).ravel(),
        (np.abs(ours - exact) / operand).ravel(),
        (np.abs(peer - exact) / operand).ravel(),
        set_aside(case, profile, inputs).ravel(),
    )


def operands(case: Case, inputs: Sequence[Floats]) -> Iterator[Floats]:
    """What goes into a method's sums: models, task vectors, and both times their multipliers."""
    yield from inputs
    terms = list(inputs)
    if case.base is not None:
        terms = [model - inputs[0] for model in inputs[1:]]
        yield from terms
    if case.method == "model_stock":
        t, divisor = stock_ratio(terms, filter_wise=case.parameters["filter_wise"])
        scale = t / np.clip(divisor, 1e-6, 1.0)  # in the divisor, too, a sum may cancel
        yield from (inputs[0] * (1 - t), np.mean(inputs[1:], axis=0) * scale)
    if case.method == "multislerp":
        weights = np.array(case.parameters["weights"], np.float32)
        normalize = case.parameters["normalize_weights"]
        yield from mean_directions(terms, weights / weights.sum() if normalize else weights)
    if case.method in ADDING:
        weights = case.parameters.get("weights", [1.0] * len(terms))
        weighted = [term * np.float32(weight) for term, weight in zip(terms, weights, strict=True)]
        lam = np.float32(case.parameters.get("lam", 1.0))
        yield from (sums * lam for sums in (*weighted, *np.cumsum(weighted, axis=0)))


ADDING = ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
"""Methods that multiply models or task vectors by weights of any size, and add them up."""


def stock_ratio(deltas: Sequence[Floats], *, filter_wise: bool) -> tuple[Floats, Floats]:
    """Where Model Stock goes between the base and the models' mean, per tensor or row.

    With the divisor that its formula ends with.
    """
    rows = [delta if filter_wise else delta.ravel() for delta in deltas]
    units = [row / np.maximum(1e-30, np.linalg.norm(row, axis=-1, keepdims=True)) for row in rows]
    pairs = itertools.combinations(units, 2)
    cosine = np.mean([np.sum(a * b, axis=-1, keepdims=True) for a, b in pairs], axis=0)
    divisor: Floats = 1 + (len(deltas) - 1) * cosine
    return len(deltas) * cosine / divisor, divisor


def mean_directions(terms: Sequence[Floats], shares: Floats) -> list[Floats]:
    """What Multi-SLERP adds up: weighted directions, at the length of the result."""
    norms = [np.linalg.norm(term) for term in terms]
    units = [w * term / norm for w, term, norm in zip(shares, terms, norms, strict=True)]
    length = np.dot(shares, norms) / np.linalg.norm(np.sum(units, axis=0))
    return [unit * length for unit in units]


def join(parts: Sequence[Distances]) -> Distances:
    return Distances(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def ulp(values: Floats) -> Doubles:
    """Distance from |value| to the next larger float32."""
    return np.spacing(np.abs(values)).astype(np.float64)
