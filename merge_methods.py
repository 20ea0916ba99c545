"""The methods: what each is called, which parameters it takes, and how it merges tensors.

A method is a few lines over the functions that `merge_operations` gives it: a generator that asks
`merge_stream` for passes over a group of tensors and ends with the function for a block. Those of
`merge_gram` add up models by their dot products, those of `merge_task_vectors` thin out task
vectors. To add one: its functions in a `*_utils` module, an entry in `METHODS`, a driver, a test.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gram_utils import (
    STOCK_AVERAGES,
    check_karcher,
    check_multislerp,
    nuslerp_t,
    sequential_steps,
)
from merge_gram import (
    merge_karcher,
    merge_linear,
    merge_model_stock,
    merge_multislerp,
    merge_nearswap,
    merge_nuslerp,
    merge_passthrough,
    merge_sequential,
    merge_slerp,
)
from merge_operations import Operations
from merge_recipe import Parameter
from merge_stream import Merge, Passes, TensorTask
from merge_task_vectors import (
    merge_arcee_fusion,
    merge_breadcrumbs,
    merge_consensus,
    merge_dare,
    merge_della,
    merge_ram,
    merge_sce,
    merge_task_arithmetic,
    merge_ties,
)
from scalar_utils import (
    DENOMINATORS,
    ELECT_METHODS,
    ELECT_ON,
    K_RULES,
    RANK_RESCALES,
    RESCALES,
    SCE_MASKS,
    TRIM_SCOPES,
    TRIM_TIES,
    check_agreement,
    check_della,
    check_density,
    check_distance,
    check_epsilon,
    check_gamma,
    check_lam,
    check_mask_lambda,
    check_normalizable,
    check_seed,
    check_t,
    check_ties_weights,
    check_topk,
    check_weights,
)

Values = Mapping[str, Any]
"""A method's parameters, resolved."""

PROFILES = ("default", "mergekit", "mergekit-0.1.4", "mergekit-0.0.6", "paper", "peft")
"""Whose conventions the defaults follow; "mergekit" is 0.1.5."""

_MERGEKITS = ("mergekit", "mergekit-0.1.4", "mergekit-0.0.6")


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        merge: merges a group of tensors; see `merge_stream.Passes`.
        title: what it is called.
        source: where it is from.
        parameters: what the user can set.
        profiles: by profile, defaults that differ.
        passes: how often the inputs are read, from the resolved parameters.
        base: whether the method uses the models' common ancestor.
        fewest, most: number of fine-tuned models; None for any.
        check: raises `ValueError` for parameters that do not go together.
        advice: remarks on parameters that are allowed and seldom meant.
        remarks: what is worth saying about the findings of all tensors.
        whole_model: whether all tensors are one group; else each is one.
        in_order: whether one thread works through all rows of a tensor, in their order.
        compiled: whether there are loops for it in `merge_kernels`.
        bins: histograms of `FINE_BINS` that a pass fills, from the number of models, for the
            memory plan.
        sums: sums that are gathered for each run of a row, from the number of models, for the
            memory plan.
        copies: float32 blocks that torch holds per input, as measured, for the memory plan.
    """

    merge: Callable[[Sequence[TensorTask], Operations], Passes | Merge]
    title: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    profiles: Mapping[str, Values] = field(default_factory=dict)
    passes: Callable[[Values], int] = lambda _: 1
    base: Literal["required", "optional", "none"] = "required"
    fewest: int = 1
    most: int | None = None
    check: Callable[[Values], None] = lambda _: None
    advice: Callable[[Values], Iterable[str]] = lambda _: ()
    remarks: Callable[[Mapping[str, Values]], Iterable[str]] = lambda _: ()
    whole_model: Callable[[Values], bool] = lambda _: False
    in_order: Callable[[Values], bool] = lambda _: False
    compiled: Callable[[Values], bool] = lambda _: True
    bins: Callable[[Values, int], int] = lambda _, models: 0
    sums: Callable[[Values, int], int] = lambda _, models: 0
    copies: int = 7

    def parameters_of(self, profile: str) -> tuple[Parameter, ...]:
        """The parameters with the defaults of a profile."""
        defaults = self.profiles.get(profile, {})
        return tuple(
            replace(each, default=defaults[each.name]) if each.name in defaults else each
            for each in self.parameters
        )


# Parameters


def _normalize(default: bool, what: str = "") -> Parameter:
    return Parameter("normalize", bool, default, f"divide by the sum of the weights{what}")


def _variant(default: str, text: str, *choices: str) -> Parameter:
    return Parameter("variant", str, default, text, choices=choices)


WEIGHTS = Parameter(
    "weights",
    float,
    1.0,
    "multiplier of each model",
    lambda w: check_weights([w]),
    per_model=True,
    positional=True,
)
DENSITIES = Parameter(
    "densities",
    float,
    1.0,
    "share of each task vector that is kept, in [0, 1]",
    check_density,
    per_model=True,
    positional=True,
)
LAM = Parameter(
    "lam", float, 1.0, "scale of the merged task vector (lambda)", check_lam, flag="--lambda"
)
SEED = Parameter("seed", int, 0, "seed of the random masks, in [0, 2**64)", check_seed)
OF_THOSE_WHO_AGREE = " of the models that agree"
ELECTS = "linear adds the task vectors, ties elects signs"
ELECTION = (
    Parameter(
        "denominator",
        str,
        None,
        "what the sum over the models that agree is divided by: their weights, their number, or "
        "nothing; by default their weights if normalize is on",
        choices=DENOMINATORS,
    ),
    Parameter(
        "elect_on",
        str,
        "weighted",
        "models vote with their weighted task vectors, or as these are",
        choices=ELECT_ON,
    ),
    Parameter(
        "elect_method",
        str,
        "mass",
        "a vote counts with its magnitude, or as one",
        choices=ELECT_METHODS,
    ),
    Parameter(
        "negative_weights",
        bool,
        False,
        "accept them where the sum is divided by weights; the result can then have any size",
    ),
)
TRIM = (
    Parameter(
        "trim_scope",
        str,
        "tensor",
        "what a density is a share of: each tensor, each of its rows, or the whole model",
        choices=TRIM_SCOPES,
    ),
    Parameter(
        "trim_ties",
        str,
        "index",
        "of equal changes at the cut, keep the first ones, or all",
        choices=TRIM_TIES,
    ),
    Parameter(
        "k_rule",
        str,
        "floor",
        "how many a density keeps of n: int(density n) and at least 1 (floor), one more (paper), "
        "or that and maybe none (peft)",
        choices=K_RULES,
    ),
)
L1_OR_NOT = Parameter(
    "rescale",
    str,
    "none",
    "scale what is kept up to the same L1 norm, or not",
    choices=("l1", "none"),
)

_PEFT_ELECTION = {"elect_on": "unweighted", "denominator": "count"}
_ALLOW = {name: {"negative_weights": True} for name in _MERGEKITS}


# Checks and remarks


def _check_normalizable(values: Values) -> None:
    check_weights(values["weights"])
    if values["normalize"]:
        check_normalizable(values["weights"])


def _check_election(values: Values) -> None:
    if values.get("variant") == "linear":
        _check_normalizable(values)
        return
    divides = values["denominator"] == "weight" and not values["negative_weights"]
    check_ties_weights(values["weights"], normalize=divides)


def completed(values: Values) -> dict[str, Any]:
    """Parameters with those filled in whose defaults depend on others."""
    complete = dict(values)
    if "normalize" in complete and complete["normalize"] is None:
        complete["normalize"] = complete["variant"] == "ties"
    if "denominator" in complete and complete["denominator"] is None:
        complete["denominator"] = "weight" if complete["normalize"] else "none"
    return complete


def _check_ties(values: Values) -> None:
    _check_election(values)
    if values["elect_zero"] == "global_majority" and values["trim_scope"] == "tensor":
        raise ValueError(
            "elect_zero global_majority looks at the whole model, so trim_scope must be model or "
            "row, got tensor"
        )


def _check_consensus(values: Values) -> None:
    check_weights(values["weights"])
    if values["variant"] == "ties":
        _check_election(values)


def _check_max_iter(max_iter: int) -> None:
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")


def _check_scale(scale: float) -> None:
    check_weights([scale])


def _nothing(_: object) -> None:
    """For checks that are functions with a result."""


def _check_della(values: Values) -> None:
    _check_election(values)
    for density, epsilon in zip(values["densities"], values["epsilons"], strict=True):
        check_della(density, epsilon)


def _trim_passes(values: Values) -> int:
    """One to find the thresholds and one to merge; more where a sample is misleading."""
    trims = any(0 < density < 1 for density in values["densities"])
    passes = 2 if trims and values["trim_scope"] != "row" else 1
    return passes + int(values.get("elect_zero") == "global_majority")


def _rescaled(passes: int, values: Values) -> int:
    return passes + int(values["rescale"] == "l1")


def _gram_sums(values: Values, models: int) -> int:
    return models * (models + 1) // 2


def _l1_sums(values: Values, models: int) -> int:
    return 2 * models if values["rescale"] == "l1" else 0


def _advise(values: Values) -> Iterator[str]:
    """On task vectors: densities, weights and lambda that make a result no one wants."""
    densities = values.get("densities", ())
    removes = any(values.get("gammas", ())) and not values["shrink"]
    if densities and all(density == 1 for density in densities) and not removes:
        yield "every density is 1.0, so nothing is trimmed or dropped; 0.2 to 0.5 is usual"
    for model, density in enumerate(densities, 1):
        if density == 0:
            yield f"density 0 leaves nothing of model {model}"
    if values["lam"] == 0:
        yield "lambda is 0, so the result is the base"
    if "weights" not in values:
        return
    reach = abs(values["lam"]) * sum(abs(weight) for weight in values["weights"])
    divides = values.get("normalize") or values.get("denominator") in ("weight", "count")
    if not divides and reach > ADVISED_REACH * len(values["weights"]):
        yield (
            f"lambda times the weights sums to {reach:g}; weights are factors, not percent, "
            "and 0.3 to 1 for each model is usual"
        )


def _advise_on_consensus(values: Values) -> Iterator[str]:
    models = len(values["weights"])
    if values["agreement"] > models:
        yield (
            f"agreement {values['agreement']} is more than there are models, so the result is the "
            "base"
        )
    if values["variant"] == "ties":
        yield from _advise(values)


def _remark_on_arcs(findings: Mapping[str, Values]) -> Iterator[str]:
    arcs = {name: found for name, found in findings.items() if "branch" in found}
    lines = [name for name, found in arcs.items() if found["branch"] == "lerp"]
    opposite = [name for name in lines if arcs[name]["cosine"] < 0]
    if lines:
        yield (
            f"{len(lines)} of {len(findings)} tensors took the straight line: they are so nearly "
            "parallel that the arc is one"
        )
    if opposite:
        yield (
            f"{len(opposite)} tensors point opposite ways, so that near t 0.5 little is left of "
            f"them ({', '.join(opposite[:3])})"
        )


def _remark_on_karcher(findings: Mapping[str, Values]) -> Iterator[str]:
    late = [name for name, found in findings.items() if not found["converged"]]
    wide = [name for name, found in findings.items() if found["cosine"] < -0.99]
    if late:
        yield (
            f"{len(late)} of {len(findings)} tensors had not come to rest after max_iter steps "
            f"({', '.join(late[:3])}); the last step's mean is taken"
        )
    if wide:
        yield (
            f"{len(wide)} tensors point nearly opposite ways, so that their mean is not unique "
            f"({', '.join(wide[:3])})"
        )


def _remark_on_stock(findings: Mapping[str, Values]) -> Iterator[str]:
    at_base = [name for name, found in findings.items() if found["t"] == 0]
    if at_base:
        yield (
            f"{len(at_base)} of {len(findings)} tensors are the base's: their task vectors have "
            "nothing in common"
        )


ADVISED_REACH = 5.0
"""Where lambda times the mean weight lies above this, percent were probably meant."""


METHODS: dict[str, Method] = {
    "linear": Method(
        merge_linear,
        "linear average",
        "model soups, arXiv:2203.05482, and WiSE-FT, arXiv:2109.01903; see `linear_utils.linear`",
        (WEIGHTS, _normalize(True)),
        base="none",
        check=_check_normalizable,
        copies=2,
    ),
    "slerp": Method(
        merge_slerp,
        "SLERP",
        "K. Shoemake, 1985; see `slerp_utils.slerp`. Each tensor is one vector",
        (
            Parameter(
                "t",
                float,
                0.5,
                "position: 0 is the first model, 1 the second",
                check_t,
                positional=True,
            ),
            Parameter(
                "normalize_before_slerp",
                bool,
                False,
                "turn the direction along the arc and interpolate the length apart",
            ),
            Parameter(
                "epsilon", float, 1e-8, "tensors of a norm up to it count as zero", check_epsilon
            ),
        ),
        passes=lambda _: 2,
        base="none",
        fewest=2,
        most=2,
        sums=_gram_sums,
        remarks=_remark_on_arcs,
    ),
    "nuslerp": Method(
        merge_nuslerp,
        "NuSLERP",
        "mergekit's NuSLERP; see `slerp_utils.nuslerp`",
        (
            WEIGHTS,
            Parameter(
                "nuslerp_flatten", bool, True, "each tensor is one vector; else each of its rows"
            ),
            Parameter(
                "nuslerp_row_wise",
                bool,
                False,
                "without nuslerp_flatten, each column is a vector (the name is mergekit's)",
            ),
        ),
        passes=lambda p: 2 if p["nuslerp_flatten"] or p["nuslerp_row_wise"] else 1,
        base="optional",
        fewest=2,
        most=2,
        check=lambda p: _nothing(nuslerp_t(p["weights"])),
        in_order=lambda p: p["nuslerp_row_wise"] and not p["nuslerp_flatten"],
        compiled=lambda p: not p["nuslerp_row_wise"] or p["nuslerp_flatten"],
        sums=_gram_sums,
        remarks=_remark_on_arcs,
    ),
    "multislerp": Method(
        merge_multislerp,
        "Multi-SLERP",
        "mergekit's Multi-SLERP; see `slerp_utils.multislerp`",
        (
            WEIGHTS,
            Parameter(
                "normalize_weights", bool, True, "divide the weights by their sum; changes lengths"
            ),
            Parameter("eps", float, 1e-8, "norms below it count as zero", check_epsilon),
        ),
        passes=lambda _: 2,
        base="optional",
        check=lambda p: check_multislerp(p["weights"]),
        sums=_gram_sums,
    ),
    "karcher": Method(
        merge_karcher,
        "Karcher mean",
        "the Riemannian mean on the sphere, arXiv:2603.04972; see `slerp_utils.karcher`",
        (
            WEIGHTS,
            Parameter("max_iter", int, 10, "at most so many steps", _check_max_iter),
            Parameter(
                "tol",
                float,
                1e-5,
                "steps shorter than this end the search; tensors of a norm up to it have no say",
                check_epsilon,
            ),
        ),
        passes=lambda _: 2,
        base="none",
        check=lambda p: check_karcher(p["weights"]),
        sums=_gram_sums,
        remarks=_remark_on_karcher,
    ),
    "sequential": Method(
        merge_sequential,
        "sequential interpolation",
        "the models one after the other; see `linear_utils.sequential_lerp` and "
        "`slerp_utils.sequential_slerp`",
        (
            WEIGHTS,
            _variant("slerp", "how to go from one to the next", "slerp", "lerp"),
        ),
        passes=lambda p: 2 if p["variant"] == "slerp" else 1,
        base="none",
        check=lambda p: _nothing(sequential_steps(p["weights"])),
        sums=_gram_sums,
    ),
    "nearswap": Method(
        merge_nearswap,
        "NearSwap",
        "alchemonaut's NearSwap, as in mergekit; see `linear_utils.nearswap`",
        (
            Parameter(
                "t",
                float,
                1e-4,
                "distance up to which the base's values give way, at least 0",
                check_distance,
                positional=True,
            ),
        ),
        most=1,
    ),
    "passthrough": Method(
        merge_passthrough,
        "passthrough",
        "the model as it is; see `linear_utils.scale`",
        (
            Parameter(
                "scale", float, None, "multiplier of every tensor; by default none", _check_scale
            ),
        ),
        base="none",
        most=1,
    ),
    "model_stock": Method(
        merge_model_stock,
        "Model Stock",
        "Model Stock, arXiv:2403.19522; see `model_stock_utils.model_stock`",
        (
            Parameter("filter_wise", bool, False, "each row by its own angles, not each tensor"),
            Parameter(
                "stock_average",
                str,
                "cosine",
                "of more than two models, average the cosines or the angles",
                choices=STOCK_AVERAGES,
            ),
            Parameter(
                "stock_norm_floor",
                float,
                0.0,
                "products of norms count as at least this; mergekit has 1e-6",
                check_epsilon,
            ),
            Parameter("clamp_t", bool, True, "stay between the base and the models' mean"),
        ),
        profiles={name: {"stock_norm_floor": 1e-6, "clamp_t": False} for name in _MERGEKITS},
        passes=lambda p: 1 if p["filter_wise"] else 2,
        fewest=2,
        sums=_gram_sums,
        remarks=_remark_on_stock,
    ),
    "task_arithmetic": Method(
        merge_task_arithmetic,
        "task arithmetic",
        "task arithmetic, arXiv:2212.04089; see `linear_utils.task_arithmetic`",
        (WEIGHTS, LAM, _normalize(False)),
        check=_check_normalizable,
        advice=_advise,
    ),
    "ties": Method(
        merge_ties,
        "TIES",
        "TIES-Merging, arXiv:2306.01708; `ties_utils.ties` says how each step is done",
        (
            WEIGHTS,
            DENSITIES,
            LAM,
            _normalize(True, OF_THOSE_WHO_AGREE),
            *TRIM,
            L1_OR_NOT,
            *ELECTION,
            Parameter(
                "elect_zero",
                str,
                "plus",
                "the sign where votes balance: plus, or that of the whole model's votes",
                choices=("plus", "global_majority"),
            ),
        ),
        profiles={
            **_ALLOW,
            "paper": {
                "densities": 0.2,
                "trim_scope": "model",
                "trim_ties": "all",
                "k_rule": "paper",
                "elect_on": "unweighted",
                "elect_zero": "global_majority",
                "denominator": "count",
            },
            "peft": {**_PEFT_ELECTION, "k_rule": "peft"},
        },
        passes=lambda p: _rescaled(_trim_passes(p), p),
        check=_check_ties,
        advice=_advise,
        whole_model=lambda p: p["trim_scope"] == "model" or p["elect_zero"] == "global_majority",
        bins=lambda p, models: 0 if p["trim_scope"] == "row" else models,
        sums=_l1_sums,
    ),
    "dare": Method(
        merge_dare,
        "DARE",
        "DARE, arXiv:2311.03099; see `dare_utils.dare_linear` and `dare_ties`",
        (
            WEIGHTS,
            DENSITIES,
            LAM,
            SEED,
            _variant("linear", ELECTS, "linear", "ties"),
            Parameter(
                "rescale",
                str,
                "inverse_density",
                "how kept entries are scaled up: by 1/density, to the same L1 norm, or not",
                choices=RESCALES,
            ),
            _normalize(False),
            *ELECTION,
        ),
        profiles={
            "mergekit": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.1.4": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.0.6": {"negative_weights": True},
            "peft": _PEFT_ELECTION,
        },
        passes=lambda p: _rescaled(1, p),
        sums=_l1_sums,
        check=_check_election,
        advice=_advise,
    ),
    "della": Method(
        merge_della,
        "DELLA",
        "DELLA-Merging, arXiv:2406.11617; see `della_utils.della_ties` and `della_linear`",
        (
            WEIGHTS,
            DENSITIES,
            Parameter(
                "epsilons",
                float,
                0.15,
                "a row's smallest change is kept with chance density - epsilon, its largest with "
                "density + epsilon",
                lambda epsilon: check_della(0, epsilon),
                per_model=True,
            ),
            LAM,
            SEED,
            _variant("ties", ELECTS, "ties", "linear"),
            Parameter(
                "rescale",
                str,
                "inverse_prob",
                "how kept entries are scaled up: by 1/chance, to the same L1 norm, or not",
                choices=RANK_RESCALES,
            ),
            Parameter(
                "normalize",
                bool,
                None,
                "divide by the sum of the weights; by default with variant ties",
            ),
            *ELECTION,
        ),
        profiles={
            "mergekit": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.1.4": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.0.6": {"negative_weights": True},
        },
        passes=lambda p: _rescaled(1, p),
        sums=_l1_sums,
        check=_check_della,
        advice=_advise,
    ),
    "breadcrumbs": Method(
        merge_breadcrumbs,
        "Model Breadcrumbs",
        "Model Breadcrumbs, arXiv:2312.06795; see `breadcrumbs_utils.breadcrumbs`",
        (
            WEIGHTS,
            DENSITIES,
            Parameter(
                "gammas",
                float,
                0.01,
                "share of the largest changes that is removed, in [0, 1)",
                check_gamma,
                per_model=True,
            ),
            LAM,
            _variant("linear", ELECTS, "linear", "ties"),
            _normalize(False),
            Parameter(
                "trim_scope",
                str,
                "tensor",
                "what shares are of: each tensor, or each of its rows",
                choices=("tensor", "row"),
            ),
            Parameter(
                "shrink",
                bool,
                True,
                "where density and gamma do not fit together, remove fewer; else keep fewer",
            ),
            L1_OR_NOT,
            *ELECTION,
        ),
        profiles={
            **_ALLOW,
            "paper": {
                "trim_scope": "row",
                "shrink": False,
                "densities": 0.2,
                "gammas": 0.1,
                "lam": 0.4,
            },
        },
        passes=lambda p: _rescaled(_trim_passes(p), p),
        sums=_l1_sums,
        check=_check_election,
        advice=_advise,
        bins=lambda p, models: 0 if p["trim_scope"] == "row" else 2 * models,
    ),
    "sce": Method(
        merge_sce,
        "SCE",
        "SCE, arXiv:2408.07990; see `sce_utils.sce`",
        (
            Parameter(
                "select_topk",
                float,
                1.0,
                "share of the entries that differ between models that is merged, in [0, 1]",
                check_topk,
                positional=True,
            ),
            LAM,
            Parameter(
                "sce_mask",
                str,
                "deltas",
                "the selection drops the other entries, or counts for the weights alone",
                choices=SCE_MASKS,
            ),
            Parameter(
                "sce_floor",
                float,
                0.0,
                "weights are equal where the mean squares sum to less; mergekit has 1e-6",
                check_epsilon,
            ),
        ),
        profiles={
            **{name: {"sce_floor": 1e-6} for name in _MERGEKITS},
            "paper": {"sce_mask": "weights_only", "select_topk": 0.1},
        },
        passes=lambda p: 4 if 0 < p["select_topk"] < 1 else 2,
        advice=_advise,
        bins=lambda p, models: int(0 < p["select_topk"] < 1),
        sums=lambda p, models: 2 * models,
    ),
    "ram": Method(
        merge_ram,
        "RAM",
        "Reinforced Agent Merging, arXiv:2601.13572; see `ram_utils.ram` and `ramplus`",
        (
            LAM,
            _variant("ram", "ramplus amplifies what one model alone has changed", "ram", "ramplus"),
            Parameter("epsilon", float, 1e-5, "changes up to it do not count", check_epsilon),
            Parameter("r", float, 0.1, "strength of ramplus, at least 0", check_epsilon),
            Parameter("alpha", float, 0.2, "bound of ramplus, at least 0", check_epsilon),
        ),
        passes=lambda p: 2 if p["variant"] == "ramplus" else 1,
        advice=_advise,
    ),
    "consensus": Method(
        merge_consensus,
        "consensus merging",
        "TALL masks, arXiv:2405.07813; see `consensus_utils.consensus` and `consensus_ties`",
        (
            WEIGHTS,
            Parameter(
                "mask_lambdas",
                float,
                0.4,
                "how near the merged change must be to a model's own, from 0; larger is nearer",
                check_mask_lambda,
                per_model=True,
            ),
            Parameter("agreement", int, 2, "models that a change must matter to", check_agreement),
            LAM,
            _variant(
                "linear", "what is merged: the sum of the task vectors, or TIES'", "linear", "ties"
            ),
            DENSITIES,
            *TRIM,
            replace(ELECTION[0], default="weight"),
            *ELECTION[1:],
        ),
        passes=lambda p: _trim_passes(p) if p["variant"] == "ties" else 1,
        check=_check_consensus,
        advice=_advise_on_consensus,
        whole_model=lambda p: p["variant"] == "ties" and p["trim_scope"] == "model",
        bins=lambda p, models: models if p["variant"] == "ties" and p["trim_scope"] != "row" else 0,
    ),
    "arcee_fusion": Method(
        merge_arcee_fusion,
        "Arcee Fusion",
        "mergekit's Arcee Fusion; see `arcee_fusion_utils.arcee_fusion`",
        passes=lambda _: 2,
        most=1,
        compiled=lambda _: False,
        bins=lambda p, models: 3,
        copies=24,
    ),
}

ALIASES: Mapping[str, tuple[str, Values]] = {
    "dare_linear": ("dare", {"variant": "linear"}),
    "dare_ties": ("dare", {"variant": "ties"}),
    "della_linear": ("della", {"variant": "linear"}),
    "breadcrumbs_ties": ("breadcrumbs", {"variant": "ties"}),
    "ramplus_tl": ("ram", {"variant": "ramplus"}),
}
"""Names that mergekit has for a method with a variant."""
