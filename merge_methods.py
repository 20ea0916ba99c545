"""The methods: what each is called, which parameters it takes, and how it merges tensors.

A method is a few lines over the functions that `merge_operations` gives it: a generator that asks
`merge_stream` for passes over a group of tensors and ends with the function for a block. Those of
`merge_gram` add up models by their dot products, those of `merge_task_vectors` thin out task
vectors. To add one: its functions in a `*_utils` module, an entry in `METHODS`, a driver, a test.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gram_utils import (
    STOCK_AVERAGES,
    check_karcher,
    check_multislerp,
    check_nuslerp,
    check_sequential,
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
from merge_operations import Loops, Operations
from merge_parameters import (
    ALLOW,
    DENSITIES,
    ELECTION,
    ELECTS,
    L1_OR_NOT,
    LAM,
    MERGEKITS,
    OF_THOSE_WHO_AGREE,
    PEFT_ELECTION,
    SEED,
    TRIM,
    WEIGHTS,
    Values,
    electable,
    gram_sums,
    l1_sums,
    normalizable,
    normalize,
    only_with,
    rescaled,
    trim_passes,
    trimmable,
    variant,
)
from merge_recipe import Parameter, said
from merge_remarks import (
    advise,
    advise_on_consensus,
    remark_on_arcs,
    remark_on_karcher,
    remark_on_stock,
)
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
    RANK_RESCALES,
    RESCALES,
    SCE_MASKS,
    check_above_0,
    check_agreement,
    check_at_least_0,
    check_della,
    check_distance,
    check_gamma,
    check_lam,
    check_mask_lambda,
    check_t,
    check_topk,
    check_weights,
)


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
        problems: what is wrong with parameters that do not go together.
        advice: remarks on parameters that are allowed and seldom meant.
        remarks: what is worth saying about the findings of all tensors.
        whole_model: whether all tensors are one group; else each is one.
        in_order: whether one thread works through all rows of a tensor, in their order.
        loops: how much of its arithmetic there are compiled loops for.
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
    problems: Callable[[Values], Iterable[str]] = lambda _: ()
    advice: Callable[[Values], Iterable[str]] = lambda _: ()
    remarks: Callable[[Mapping[str, Values]], Iterable[str]] = lambda _: ()
    whole_model: Callable[[Values], bool] = lambda _: False
    in_order: Callable[[Values], bool] = lambda _: False
    loops: Callable[[Values], Loops] = lambda _: "all"
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


def _della_problems(values: Values) -> Iterator[str]:
    yield from electable(values)
    shares = zip(values["densities"], values["epsilons"], strict=True)
    for model, (density, epsilon) in enumerate(shares, 1):
        for problem in said(check_della, density, epsilon):
            yield f"{problem} (model {model})"


def _consensus_problems(values: Values) -> Iterable[str]:
    return (
        electable(values) if values["variant"] == "ties" else said(check_weights, values["weights"])
    )


def _check_max_iter(max_iter: int) -> None:
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")


def _check_scale(scale: float) -> None:
    check_lam(scale, "scale")


def _at_least_0(name: str) -> Callable[[float], None]:
    return lambda value: check_at_least_0(name, value)


def _above_0(name: str) -> Callable[[float], None]:
    return lambda value: check_above_0(name, value)


CONSENSUS_DENOMINATOR = replace(
    ELECTION[0],
    default="weight",
    help="what the sum over the models that agree is divided by: their weights, their number, or "
    "nothing",
)

MAYBE_WEIGHTS = replace(WEIGHTS, required=False)

METHODS: dict[str, Method] = {
    "linear": Method(
        merge_linear,
        "linear average",
        "model soups, arXiv:2203.05482, and WiSE-FT, arXiv:2109.01903; see `linear_utils.linear`",
        (WEIGHTS, normalize(True)),
        base="none",
        problems=normalizable,
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
                required=True,
            ),
            Parameter(
                "normalize_before_slerp",
                bool,
                False,
                "turn the direction along the arc and interpolate the length apart",
            ),
            Parameter(
                "epsilon",
                float,
                1e-8,
                "tensors of a norm up to it count as zero",
                _at_least_0("epsilon"),
            ),
        ),
        passes=lambda _: 2,
        base="none",
        fewest=2,
        most=2,
        sums=gram_sums,
        remarks=remark_on_arcs,
    ),
    "nuslerp": Method(
        merge_nuslerp,
        "NuSLERP",
        "mergekit's NuSLERP; see `slerp_utils.nuslerp`",
        (
            MAYBE_WEIGHTS,
            Parameter(
                "nuslerp_flatten", bool, True, "each tensor is one vector; else each of its rows"
            ),
            Parameter(
                "nuslerp_row_wise",
                bool,
                False,
                "without nuslerp_flatten, each column is a vector (the name is mergekit's)",
                only=("nuslerp_flatten", (False,)),
            ),
        ),
        passes=lambda p: 2 if p["nuslerp_flatten"] or p.get("nuslerp_row_wise") else 1,
        base="optional",
        fewest=2,
        most=2,
        problems=lambda p: said(check_nuslerp, p["weights"]),
        in_order=lambda p: bool(p.get("nuslerp_row_wise")),
        loops=lambda p: "none" if p.get("nuslerp_row_wise") else "all",
        sums=gram_sums,
        remarks=remark_on_arcs,
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
            Parameter("eps", float, 1e-8, "norms below it count as zero", _at_least_0("eps")),
        ),
        passes=lambda _: 2,
        base="optional",
        problems=lambda p: said(check_multislerp, p["weights"]),
        sums=gram_sums,
    ),
    "karcher": Method(
        merge_karcher,
        "Karcher mean",
        "the Riemannian mean on the sphere, arXiv:2603.04972; see `slerp_utils.karcher`",
        (
            MAYBE_WEIGHTS,
            Parameter("max_iter", int, 10, "at most so many steps", _check_max_iter),
            Parameter(
                "tol",
                float,
                1e-5,
                "steps shorter than this end the search; tensors of a norm up to it have no say",
                _above_0("tol"),
            ),
        ),
        passes=lambda _: 2,
        base="none",
        problems=lambda p: said(check_karcher, p["weights"]),
        sums=gram_sums,
        remarks=remark_on_karcher,
    ),
    "sequential": Method(
        merge_sequential,
        "sequential interpolation",
        "the models one after the other; see `linear_utils.sequential_lerp` and "
        "`slerp_utils.sequential_slerp`",
        (
            WEIGHTS,
            variant("slerp", "how to go from one to the next", "slerp", "lerp"),
        ),
        passes=lambda p: 2 if p["variant"] == "slerp" else 1,
        base="none",
        problems=lambda p: said(check_sequential, p["weights"]),
        sums=gram_sums,
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
                required=True,
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
                "scale",
                float,
                None,
                "multiplier of every tensor; by default none",
                _check_scale,
                of_input=True,
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
                _at_least_0("stock_norm_floor"),
            ),
            Parameter("clamp_t", bool, True, "stay between the base and the models' mean"),
        ),
        profiles={name: {"stock_norm_floor": 1e-6, "clamp_t": False} for name in MERGEKITS},
        passes=lambda p: 1 if p["filter_wise"] else 2,
        fewest=2,
        sums=gram_sums,
        remarks=remark_on_stock,
    ),
    "task_arithmetic": Method(
        merge_task_arithmetic,
        "task arithmetic",
        "task arithmetic, arXiv:2212.04089; see `linear_utils.task_arithmetic`",
        (WEIGHTS, LAM, normalize(False)),
        problems=normalizable,
        advice=advise,
    ),
    "ties": Method(
        merge_ties,
        "TIES",
        "TIES-Merging, arXiv:2306.01708; `ties_utils.ties` says how each step is done",
        (
            WEIGHTS,
            DENSITIES,
            LAM,
            normalize(True, OF_THOSE_WHO_AGREE),
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
            **ALLOW,
            "paper": {
                "densities": 0.2,
                "trim_scope": "model",
                "trim_ties": "all",
                "k_rule": "paper",
                "elect_on": "unweighted",
                "elect_zero": "global_majority",
                "denominator": "count",
            },
            "peft": {**PEFT_ELECTION, "k_rule": "peft"},
        },
        passes=lambda p: rescaled(trim_passes(p), p),
        problems=trimmable,
        advice=advise,
        whole_model=lambda p: p["trim_scope"] == "model" or p["elect_zero"] == "global_majority",
        bins=lambda p, models: 0 if p["trim_scope"] == "row" else models,
        sums=l1_sums,
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
            variant("linear", ELECTS, "linear", "ties"),
            Parameter(
                "rescale",
                str,
                "inverse_density",
                "how kept entries are scaled up: by 1/density, to the same L1 norm, or not",
                choices=RESCALES,
            ),
            normalize(False),
            *only_with("variant", "ties", ELECTION),
        ),
        profiles={
            "mergekit": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.1.4": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.0.6": {"negative_weights": True},
            "peft": PEFT_ELECTION,
        },
        passes=lambda p: rescaled(1, p),
        sums=l1_sums,
        problems=electable,
        advice=advise,
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
            variant("ties", ELECTS, "ties", "linear"),
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
            *only_with("variant", "ties", ELECTION),
        ),
        profiles={
            "mergekit": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.1.4": {"rescale": "l1", "negative_weights": True},
            "mergekit-0.0.6": {"negative_weights": True},
        },
        passes=lambda p: rescaled(1, p),
        sums=l1_sums,
        problems=_della_problems,
        advice=advise,
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
            variant("linear", ELECTS, "linear", "ties"),
            normalize(False),
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
            *only_with("variant", "ties", ELECTION),
        ),
        profiles={
            **ALLOW,
            "paper": {
                "trim_scope": "row",
                "shrink": False,
                "densities": 0.2,
                "gammas": 0.1,
                "lam": 0.4,
            },
        },
        passes=lambda p: rescaled(trim_passes(p), p),
        sums=l1_sums,
        problems=trimmable,
        advice=advise,
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
                _at_least_0("sce_floor"),
            ),
        ),
        profiles={
            **{name: {"sce_floor": 1e-6} for name in MERGEKITS},
            "paper": {"sce_mask": "weights_only", "select_topk": 0.1},
        },
        passes=lambda p: 4 if 0 < p["select_topk"] < 1 else 2,
        advice=advise,
        bins=lambda p, models: int(0 < p["select_topk"] < 1),
        sums=lambda p, models: 2 * models,
    ),
    "ram": Method(
        merge_ram,
        "RAM",
        "Reinforced Agent Merging, arXiv:2601.13572; see `ram_utils.ram` and `ramplus`",
        (
            LAM,
            variant("ram", "ramplus amplifies what one model alone has changed", "ram", "ramplus"),
            Parameter(
                "epsilon", float, 1e-5, "changes up to it do not count", _at_least_0("epsilon")
            ),
            *only_with(
                "variant",
                "ramplus",
                (
                    Parameter("r", float, 0.1, "strength of ramplus, at least 0", _at_least_0("r")),
                    Parameter(
                        "alpha", float, 0.2, "bound of ramplus, at least 0", _at_least_0("alpha")
                    ),
                ),
            ),
        ),
        passes=lambda p: 2 if p["variant"] == "ramplus" else 1,
        advice=advise,
    ),
    "consensus": Method(
        merge_consensus,
        "consensus merging",
        "TALL masks, arXiv:2405.07813; see `consensus_utils.consensus` and `consensus_ties`",
        (
            MAYBE_WEIGHTS,
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
            variant(
                "linear", "what is merged: the sum of the task vectors, or TIES'", "linear", "ties"
            ),
            *only_with("variant", "ties", (DENSITIES, *TRIM)),
            *only_with("variant", "ties", (CONSENSUS_DENOMINATOR, *ELECTION[1:])),
        ),
        passes=lambda p: trim_passes(p) if p["variant"] == "ties" else 1,
        problems=_consensus_problems,
        advice=advise_on_consensus,
        whole_model=lambda p: p["variant"] == "ties" and p["trim_scope"] == "model",
        bins=lambda p, models: models if p["variant"] == "ties" and p["trim_scope"] != "row" else 0,
    ),
    "arcee_fusion": Method(
        merge_arcee_fusion,
        "Arcee Fusion",
        "mergekit's Arcee Fusion; see `arcee_fusion_utils.arcee_fusion`",
        passes=lambda _: 4,
        most=1,
        loops=lambda _: "some",
        bins=lambda p, models: 3,
        copies=4,
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
