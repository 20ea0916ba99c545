"""Run the programs that merge as we do, and pin their results as fixtures of the tests.

    python -m venv mk5 && mk5/bin/pip install mergekit==0.1.5
    python -m venv mk4 && mk4/bin/pip install mergekit==0.1.4 "transformers<5"
    python -m venv peft && peft/bin/pip install peft==0.21.2
    python benchmarks/parity.py --mergekit mk5/bin/python --mergekit_0_1_4 mk4/bin/python \
        --peft peft/bin/python --ties_merging ties_merging.py

Makes tiny LLaMAs, draws settings (see `parity_cases.py`), has the others merge them in
environments of their own, and writes for each a file of results and one of versions and settings to
tests/fixtures; then merges here, and writes docs/parity.md. Takes some ten minutes. A program that
is not given keeps its fixture; with none given only docs/parity.md is written. `--ties_rule`
computes the TIES authors' rule in `peers/ties_peer.py`; `--ties_merging` names a file with their
own function of that name (github.com/prateeky2806/ties-merging), which must agree with it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.parity_cases import (  # noqa: E402
    EXACT,
    FIXTURES,
    LIMIT,
    MOST_ASIDE,
    PEERS,
    REASONS,
    RESCALED_LIMIT,
    SEEDS,
    SIGMAS,
    STATISTICS,
    Case,
    Distances,
    Family,
    Fixture,
    Group,
    compare,
    draw_cases,
    join,
    make_families,
    merge_here,
    read_fixture,
    to_json,
)
from benchmarks.parity_random import in_sigmas, our_moments, pinned_moments  # noqa: E402

DOCUMENT = ROOT / "docs" / "parity.md"
MERGEKIT_NAMES = {
    "weights": "weight",
    "densities": "density",
    "gammas": "gamma",
    "epsilons": "epsilon",
    "lam": "lambda",
}
TASK_VECTOR_METHODS = (
    *("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"),
    *("dare_linear", "dare_ties", "della", "della_linear"),
)
Families = Mapping[bool, Family]


# Jobs for the peers


def mergekit_recipe(case: Case, families: Families) -> dict[str, Any]:
    """Says everything that mergekit has a default for, as some differ by method."""
    base, folders = case.folders(families)
    models: list[dict[str, Any]] = [{"model": folder.name, "parameters": {}} for folder in folders]
    shared: dict[str, Any] = {}
    for name, value in case.parameters.items():
        if isinstance(value, list):
            for model, each in zip(models, value, strict=True):
                model["parameters"][MERGEKIT_NAMES[name]] = each
        elif value is not None:
            shared[MERGEKIT_NAMES.get(name, name)] = value
    if case.method in TASK_VECTOR_METHODS:
        shared |= {"int8_mask": False, "rescale": _rescales(case)}
    recipe = {"merge_method": case.method, "models": models, "parameters": shared}
    if case.method == "slerp":
        base = folders[0]  # mergekit's name for the end where t is 0
    return recipe if base is None else recipe | {"base_model": base.name}


def _rescales(case: Case) -> bool:
    """Random masks are always rescaled."""
    return bool(case.parameters.get("rescale", _is_random(case) and "l1") == "l1")


def _is_random(case: Case) -> bool:
    return case.method.startswith(("dare", "della"))


def peft_call(case: Case, families: Families) -> dict[str, Any]:
    """One of PEFT's functions and its arguments."""
    arguments = {}
    if "densities" in case.parameters:
        arguments["density"] = case.parameters["densities"][0]
    if "elect_method" in case.parameters:
        votes = {"mass": "total", "count": "frequency"}
        arguments["majority_sign_method"] = votes[case.parameters["elect_method"]]
    return {
        "function": case.group.removesuffix(" by frequency"),
        "models": _names(case, families),
        "weights": case.parameters["weights"],
        "arguments": arguments,
    }


def _names(case: Case, families: Families) -> list[str]:
    """The folders of the base and the models."""
    base, folders = case.folders(families)
    return [folder.name for folder in (base, *folders) if folder is not None]


def ties_call(case: Case, families: Families) -> dict[str, Any]:
    """What the authors' rule takes."""
    return {
        "models": _names(case, families),
        "density": case.parameters["densities"][0],
        "lam": case.parameters["lam"],
        "reduction": "mean" if case.parameters["denominator"] == "count" else "sum",
    }


def make_job(peer: str, families: Families, settings: int, authors: Path | None) -> dict[str, Any]:
    """All cases of a peer in its own terms, and as they go into the fixture."""
    groups, random = PEERS[peer].groups, PEERS[peer].random
    cases, seeded = draw_cases(groups, settings), draw_cases(random, 1)
    translate = {"mergekit": mergekit_recipe, "peft": peft_call, "paper": ties_call}
    call = translate[PEERS[peer].profile.split("-")[0]]
    # Linear, too, where 0.1.4 takes other steps.
    inexact = [
        key
        for key, case in cases.items()
        if case.group == "linear" or not groups[case.group].same_steps
    ]
    return {
        "recipes": {key: call(case, families) for key, case in cases.items()},
        "random": {key: call(case, families) for key, case in seeded.items()},
        "exact": inexact if peer == EXACT else [],
        "statistics": STATISTICS,
        "seeds": SEEDS,
        "authors": None if authors is None else str(authors),
        "cases": {key: to_json(case) for key, case in cases.items()},
        "seeded": {key: to_json(case) for key, case in seeded.items()},
    }


# Fixtures


def make_fixture(peer: str, python: str, job: dict[str, Any], families: Families) -> None:
    """Have a peer merge, and write what comes out."""
    script = "ties" if peer == "ties-merging" else peer.split("-")[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / name) for name in ("folder", "arrays.npz", "versions")}
        calls = {key: value for key, value in job.items() if key not in ("cases", "seeded")}
        calls |= {key.removesuffix(".npz"): path for key, path in paths.items()}
        Path(folder, "job.json").write_text(json.dumps(calls))
        file = ROOT / "benchmarks" / "peers" / f"{script}_peer.py"
        run_peer(python, file, f"{folder}/job.json", families[True].folders[0].parent)
        with np.load(paths["arrays.npz"]) as arrays:
            narrow = {key: arrays[key].astype(np.float32) for key in arrays.files}
        versions = json.loads(Path(paths["versions"]).read_text())
    write_fixture(peer, versions, job, families, narrow)


def run_peer(python: str, script: Path, job: str, models: Path) -> None:
    """In the folder of the models, which jobs name by their own folders alone."""
    done = subprocess.run(
        [str(Path(python).absolute()), str(script), job],
        cwd=models,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-3000:]}")


def write_fixture(
    peer: str,
    versions: Mapping[str, str],
    job: Mapping[str, Any],
    families: Families,
    arrays: Mapping[str, NDArray[np.float32]],
) -> None:
    about = {
        "versions": versions,
        "models": {"tied": families[True].hash, "untied": families[False].hash},
        "seeds": SEEDS,
    }
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    parts += [_lines("cases", job["cases"]), _lines("random", job["seeded"])]
    FIXTURES.mkdir(exist_ok=True)
    (FIXTURES / f"{peer}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    savez: Any = np.savez_compressed
    savez(FIXTURES / f"{peer}.npz", **arrays)


def _lines(name: str, cases: Mapping[str, Any]) -> str:
    """JSON with a line for each case."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in cases.items()]
    return f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}"


# The document


class Row(NamedTuple):
    """What came out for one group of settings."""

    name: str
    kind: Group
    settings: int
    tensors: int
    distances: Distances


def measure(peer: str, families: Families, folder: Path) -> list[Row]:
    """All cases of a peer's fixture against our merges."""
    profile, fixture, exact = PEERS[peer].profile, read_fixture(peer), read_fixture(EXACT)
    found: dict[str, list[Distances]] = {}
    tensors: Counter[str] = Counter()
    for key, case in fixture.cases.items():
        family, inputs = families[case.tied], case.inputs(families)
        ours = merge_here(case, profile, families, folder)
        exactly = exact_of(key, case, fixture, exact)
        each = compare(case, profile, family, inputs, ours, fixture.arrays[key], exactly)
        found.setdefault(case.group, []).append(each)
        tensors[case.group] += len(ours)
    return [
        Row(name, PEERS[peer].groups[name], len(parts), tensors[name], join(parts))
        for name, parts in found.items()
    ]


def exact_of(key: str, case: Case, fixture: Fixture, exact: Fixture) -> NDArray[np.float64] | None:
    """A case's result in float64, where its settings are those of the peer that has it."""
    return exact.exact(key) if exact.cases.get(key) == case else None


def table(rows: Iterable[Row]) -> str:
    lines = [
        "| method | settings | tensors | elements | ulp of result | ulp of operand | "
        "ours from float64 | peer from float64 | held to | left out |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    return "\n".join([*lines, *map(_table_row, rows)])


def _table_row(row: Row) -> str:
    compared = row.distances.aside == 0
    result, operand, ours, peer = (values[compared] for values in row.distances[:4])
    beyond = int(row.distances.beyond(row.kind).sum())
    held = f"{row.kind.limit:g} ulp of the {'result' if row.kind.same_steps else 'operand'}"
    held += f" (**{beyond} beyond**)" if beyond else ""
    numbers = (_most(values) for values in (result, operand, ours, peer))
    return (
        f"| {row.name} | {row.settings} | {row.tensors} | {compared.size:,} | "
        f"{' | '.join(numbers)} | {held} | {left_out(row.distances)} |"
    )


def _most(values: NDArray[np.float64]) -> str:
    largest = np.max(values, initial=0.0)
    if np.isnan(largest):
        return ""
    return "0" if largest == 0 else f"{largest:,.0f}" if largest >= 100 else f"{largest:.2f}"


def left_out(distances: Distances) -> str:
    """How many elements for each reason."""
    counts = [(reason, np.sum(distances.aside == i)) for i, reason in enumerate(REASONS)]
    return ", ".join(f"{count} {reason}" for reason, count in counts[1:] if count) or "none"


def random_table(peer: str, families: Families) -> str:
    """The largest distance of means over seeds, and the mean of squared ones, by method."""
    fixture, lines = read_fixture(peer), ["| method | settings | elements | sigma | mean square |"]
    found: dict[str, list[NDArray[np.float64]]] = {}
    for key, case in fixture.random.items():
        ours = our_moments(case, PEERS[peer].profile, families[case.tied], SEEDS)
        apart = in_sigmas(ours, pinned_moments(fixture, key), SEEDS)
        found.setdefault(case.group, []).append(apart)
    for group, parts in found.items():
        apart = np.concatenate(parts)
        numbers = f"{apart.max():.2f} | {np.mean(apart**2):.2f}"
        lines.append(f"| {group} | {len(parts)} | {apart.size} | {numbers} |")
    lines.insert(1, "|---|---:|---:|---:|---:|")
    return "\n".join([f"Random masks, means over {SEEDS} seeds:", "", *lines])


def document(families: Families, folder: Path) -> str:
    sections = [INTRODUCTION]
    for peer in PEERS:
        versions = read_fixture(peer).about["versions"]
        said = ", ".join(f"{name} {version}" for name, version in versions.items())
        sections += [f"## {peer}", f"Profile `{PEERS[peer].profile}`; {said}."]
        sections.append(table(measure(peer, families, folder)))
        if PEERS[peer].random:
            sections.append(random_table(peer, families))
    return "\n\n".join([*sections, NOTES]) + "\n"


INTRODUCTION = f"""\
# Parity with other programs

Written by `python benchmarks/parity.py`, which also says how to run it. The others' results are
pinned in tests/fixtures, and `tests/test_parity.py` holds ours to them.

The models are tiny float32 LLaMAs with a tied head and with one of their own, and five fine-tunes
of each (noise of 0.0002 to 0.05 on weights of 0.1). Settings are drawn from a fixed seed, half of
them for each kind of head. Everything is merged by `merge_to_folder` in the profile named below,
and compared tensor by tensor. Distances are the largest of all elements that were not left out, in
float32 units in the last place: of the result, and of the largest operand, which is what counts
where large terms cancel (any number that goes into one of the method's sums: inputs, task vectors,
these times their multipliers, partial sums). "From float64" is in units of the operand, from
mergekit's own formula, run by mergekit in float64.

Held to: of the result, where both compute in the same steps; else of the operand, from the peer or
from float64, whichever is nearer. Far from the peer and near float64 are elements where the peer's
float32 sums are off. Where task vectors are rescaled to their L1 norm (not mergekit's default but
for DARE and DELLA), entry, factor, weight and lambda are multiplied one after the other in float32
on both sides, and the limit is {RESCALED_LIMIT:g} ulp; elsewhere it is {LIMIT:g}."""

NOTES = f"""\
## Left out

Decided from the inputs alone, never from the results; at most {MOST_ASIDE:.0%} of a method's
elements:

- **cut**: equal magnitudes on both sides of a trim's cut, of which the peer's sort takes any; for
  SCE, whole tensors in which float32 cannot tell the variances at the cut apart.
- **vote**: the models' votes cancel to within the rounding of their sum.
- **cosine**: tensors whose cosine is within float32's noise of SLERP's threshold.
- **score**: importances within float32's noise of Arcee Fusion's threshold.

## Where they differ

- mergekit 0.1.4's Breadcrumbs loses a whole task vector where `gamma` removes none of its entries;
  ours follows 0.1.5 in every profile, so settings for 0.1.4 remove at least one of each tensor.
- mergekit 0.1.4 adds up the models of Multi-SLERP and SCE in the order of a set, which changes from
  run to run: so do last places of these results when they are made again. All others stay.
- mergekit 0.1.4 stops where a trim keeps nothing; its settings keep at least one of each tensor.
- Refused here: weights of opposite signs in NuSLERP, by which mergekit extrapolates; a sum of
  weights of 0 or less in Multi-SLERP; a sum of 0 to normalize by in linear (mergekit: infinite
  values) and task arithmetic (mergekit: does not divide); t outside [0, 1] in SLERP.
- Arcee Fusion takes the other model's values as they are; mergekit adds their distance from the
  base to the base, which can round a last place of the larger of both.

## Random masks

DARE and DELLA draw other masks than their peers, so they are compared in law: per element the mean
over {SEEDS} seeds, here and there, in {len(STATISTICS)} tensors. Sigma is from both sample
variances. At most {SIGMAS:g} sigma apart, and over all elements of a method the squared distances
in sigma must average 1 within a fifth. Both versions of mergekit draw the same masks.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="python of an environment with mergekit 0.1.5")
    parser.add_argument("--mergekit_0_1_4", help="python of one with mergekit 0.1.4")
    parser.add_argument("--peft", help="python of one with peft 0.21.2")
    parser.add_argument("--ties_rule", action="store_true", help="compute the TIES authors' rule")
    parser.add_argument("--ties_merging", type=Path, help="file with the authors' function, too")
    parser.add_argument("--settings", type=int, default=10, help="for each group and kind of head")
    given = parser.parse_args(arguments)
    pythons = {
        "mergekit-0.1.5": given.mergekit,
        "mergekit-0.1.4": given.mergekit_0_1_4,
        "peft-0.21.2": given.peft,
        "ties-merging": sys.executable if given.ties_rule or given.ties_merging else None,
    }
    with tempfile.TemporaryDirectory() as folder:
        families = make_families(Path(folder))
        for peer, python in pythons.items():
            if python is not None:
                job = make_job(peer, families, given.settings, given.ties_merging)
                make_fixture(peer, python, job, families)
        DOCUMENT.write_text(document(families, Path(folder) / "merged"))


if __name__ == "__main__":
    main()
