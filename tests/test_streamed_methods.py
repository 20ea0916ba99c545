"""A stream gives the bits of each method's function of whole tensors."""

import pytest
import torch
from test_merge_to_folder import EVERY_CASE, make_family, recipe_of, run
from tiny_checkpoints import read_tensors

from arcee_fusion_utils import arcee_fusion
from breadcrumbs_utils import breadcrumbs, breadcrumbs_ties
from consensus_utils import consensus, keep_consensus
from dare_utils import dare_linear, dare_ties
from della_utils import della_linear, della_ties
from linear_utils import (
    add_task_vector,
    linear,
    nearswap,
    scale,
    sequential_lerp,
    task_arithmetic,
)
from merge_plan import open_plan
from model_stock_utils import model_stock
from ram_utils import ram, ramplus
from sce_utils import sce
from slerp_utils import karcher, multislerp, nuslerp, sequential_slerp, slerp
from ties_utils import elect_and_combine, elect_and_merge, elect_sign, majority, ties, trim_model

OF_A_MODEL = ("ties, the paper's", "consensus, ties")
NO_FUNCTION = ("ties, counted, l1", "breadcrumbs, ties, l1")
"""Rescaling by the L1 norm is the stream's; the other programs' results hold it."""

ELECTION = ("denominator", "elect_on", "elect_method")


def pick(parameters, *names):
    return {name: parameters[name] for name in names}


def whole(method, p, name, base, models):
    """The function of a method on whole tensors, by resolved parameters."""
    weights, variant = p.get("weights"), p.get("variant")
    if method in ("dare", "della"):
        function = {"dare": (dare_linear, dare_ties), "della": (della_linear, della_ties)}[method]
        shares = [p["densities"], *([p["epsilons"]] if method == "della" else [])]
        options = pick(p, "lam", "seed", "rescale")
        if variant == "linear" or method == "dare":
            options["normalize"] = p["normalize"]
        else:
            options |= pick(p, *ELECTION)
        chosen = function[variant == "ties"]
        return chosen(base, models, weights, *shares, name=name, **options)
    if method == "breadcrumbs":
        options = pick(p, "lam", "trim_scope", "shrink")
        shares = (p["densities"], p["gammas"])
        if variant == "ties":
            return breadcrumbs_ties(base, models, weights, *shares, **options, **pick(p, *ELECTION))
        return breadcrumbs(base, models, weights, *shares, **options, normalize=p["normalize"])
    calls = {
        "linear": lambda: linear(models, weights, normalize=p["normalize"]),
        "slerp": lambda: slerp(
            *models[:2], p["t"], eps=p["epsilon"], normalize=p["normalize_before_slerp"]
        ),
        "nuslerp": lambda: nuslerp(
            *models[:2],
            weights,
            base=base,
            flatten=p["nuslerp_flatten"],
            row_wise=p.get("nuslerp_row_wise", False),
        ),
        "multislerp": lambda: multislerp(models, weights, base=base),
        "karcher": lambda: karcher(models, weights),
        "sequential": lambda: {"lerp": sequential_lerp, "slerp": sequential_slerp}[variant](
            models, weights
        ),
        "nearswap": lambda: nearswap(base, models[0], p["t"]),
        "passthrough": lambda: scale(models[0], p["scale"]),
        "model_stock": lambda: model_stock(base, models, filter_wise=p["filter_wise"]),
        "task_arithmetic": lambda: task_arithmetic(
            base, models, weights, **pick(p, "lam", "normalize")
        ),
        "ties": lambda: ties(
            base,
            models,
            weights,
            p["densities"],
            **pick(p, "lam", "trim_scope", "trim_ties", "k_rule", *ELECTION),
        ),
        "sce": lambda: sce(base, models, **pick(p, "select_topk", "sce_mask", "sce_floor", "lam")),
        "ram": lambda: (
            ram(base, models, **pick(p, "epsilon", "lam"))
            if variant == "ram"
            else ramplus(base, models, **pick(p, "epsilon", "lam", "r", "alpha"))
        ),
        "consensus": lambda: consensus(
            base, models, weights, p["mask_lambdas"], **pick(p, "agreement", "lam")
        ),
        "arcee_fusion": lambda: arcee_fusion(base, models[0]),
    }
    return calls[method]()


@pytest.mark.parametrize("case", [c for c in EVERY_CASE if c not in (*OF_A_MODEL, *NO_FUNCTION)])
def test_tensor_by_tensor(tmp_path, case):
    method, parameters = EVERY_CASE[case]
    folder, folders = make_family(tmp_path, ("bfloat16", "float32", "float16", "bfloat16"))
    run(method, folder, folders, tmp_path / "out", parameters=parameters)
    merged, base = read_tensors(tmp_path / "out"), read_tensors(folder)
    recipe = recipe_of(method, parameters, folder, folders)
    with open_plan(recipe) as plan:
        resolved = plan.parameters[0]
    models = [read_tensors(path) for path in folders[: len(recipe.models)]]
    for name, values in merged.items():
        ancestor = base[name].float() if recipe.base_model else None
        tensors = [model[name].float() for model in models]
        assert torch.equal(values, whole(method, resolved, name, ancestor, tensors)), name


@pytest.mark.parametrize("case", OF_A_MODEL)
def test_the_whole_model_at_once(tmp_path, case):
    method, parameters = EVERY_CASE[case]
    folder, folders = make_family(tmp_path)
    run(method, folder, folders, tmp_path / "out", parameters=parameters)
    merged, base = read_tensors(tmp_path / "out"), read_tensors(folder)
    models = [read_tensors(path) for path in folders]
    with open_plan(recipe_of(method, parameters, folder, folders)) as plan:
        names, p = [task.name for task in plan.tasks], plan.parameters[0]
    deltas = [[model[name] - base[name] for name in names] for model in models]
    trimmed = [
        trim_model(each, density, rule=p["k_rule"], all_ties=p["trim_ties"] == "all")
        for each, density in zip(deltas, p["densities"], strict=True)
    ]
    by_tensor = [*zip(*trimmed, strict=True)]
    zero = majority([elect_sign(each, zero=0.0) for each in by_tensor])
    options = pick(p, *ELECTION)
    for index, name in enumerate(names):
        if method == "ties":
            want = elect_and_merge(
                base[name], by_tensor[index], p["weights"], p["lam"], **options, zero=zero
            )
        else:
            delta = elect_and_combine(by_tensor[index], p["weights"], **options)
            own = [each[index] for each in deltas]
            kept = keep_consensus(delta, own, p["mask_lambdas"], p["agreement"])
            want = add_task_vector(base[name], kept, p["lam"])
        assert torch.equal(merged[name], want), name
