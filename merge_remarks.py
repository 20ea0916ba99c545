"""What is worth saying of a merge: of its parameters beforehand, of its findings afterwards."""

from collections.abc import Iterator, Mapping

from merge_parameters import Values


def advise(values: Values) -> Iterator[str]:
    """On task vectors: densities, weights and lambda that make a result no one wants."""
    densities, gammas = values.get("densities", ()), values.get("gammas", ())
    removes = any(gammas) and not values["shrink"]
    if densities and all(density == 1 for density in densities) and not removes:
        others = "gammas" if any(gammas) else "epsilons" if any(values.get("epsilons", ())) else ""
        so = f" and {others} have no effect" if others else ""
        usual = "" if gammas else "; 0.2 to 0.5 is usual"
        yield f"every density is 1.0, so nothing is trimmed or dropped{so}{usual}"
    for model, density in enumerate(densities, 1):
        if density == 0:
            yield f"density 0 leaves nothing of model {model}"
    if values["lam"] == 0:
        yield "lambda is 0, so the result is the base"
    if "weights" not in values:
        return
    if not any(values["weights"]):
        yield "all weights are 0, so the result is the base"
    reach = abs(values["lam"]) * sum(abs(weight) for weight in values["weights"])
    divides = values.get("normalize") or values.get("denominator") in ("weight", "count")
    if not divides and reach > ADVISED_REACH * len(values["weights"]):
        yield (
            f"lambda times the weights sums to {reach:g}; weights are factors, not percent, "
            "and 0.3 to 1 for each model is usual"
        )


def advise_on_consensus(values: Values) -> Iterator[str]:
    """On an agreement that cannot be reached."""
    models = len(values["weights"])
    if values["agreement"] > models:
        yield (
            f"agreement {values['agreement']} is more than there are models, so the result is the "
            "base"
        )
    yield from advise(values)


def remark_on_arcs(findings: Mapping[str, Values]) -> Iterator[str]:
    """On tensors that are parallel, or opposite."""
    arcs = {name: found for name, found in findings.items() if "branch" in found}
    lines = [name for name, found in arcs.items() if found["branch"] == "lerp"]
    opposite = [name for name in lines if arcs[name]["cosine"] < 0]
    if lines:
        yield (
            f"{len(lines)} of {len(arcs)} tensors took the straight line: they are so nearly "
            "parallel that the arc is one"
        )
    if opposite:
        yield (
            f"{len(opposite)} tensors point opposite ways, so that near t 0.5 little is left of "
            f"them ({', '.join(opposite[:3])})"
        )


def remark_on_karcher(findings: Mapping[str, Values]) -> Iterator[str]:
    """On means that were not reached, or are not the only ones."""
    means = {name: found for name, found in findings.items() if "converged" in found}
    late = [name for name, found in means.items() if not found["converged"]]
    wide = [name for name, found in means.items() if found["cosine"] < -0.99]
    if late:
        yield (
            f"{len(late)} of {len(means)} tensors had not come to rest after max_iter steps "
            f"({', '.join(late[:3])}); the last step's mean is taken"
        )
    if wide:
        yield (
            f"{len(wide)} tensors point nearly opposite ways, so that their mean is not unique "
            f"({', '.join(wide[:3])})"
        )


def remark_on_stock(findings: Mapping[str, Values]) -> Iterator[str]:
    """On tensors that stayed where they were."""
    ratios = {name: found["t"] for name, found in findings.items() if "t" in found}
    at_base = [name for name, t in ratios.items() if t == 0]
    if at_base:
        yield (
            f"{len(at_base)} of {len(ratios)} tensors are the base's: their task vectors have "
            "nothing in common"
        )


ADVISED_REACH = 5.0
"""Where lambda times the mean weight lies above this, percent were probably meant."""
