"""Every method, folder to folder, against the float64 reference; and what must not matter."""

import functools
import json
import math
import operator
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import make_llama, read_tensors, save_tensors, tensor_hashes

import merge_memory
import merge_plan
import merge_run
import merge_stream
from merge_methods import METHODS
from merge_operations import coarse_gather, make_operations
from merge_plan import open_plan
from merge_recipe import Recipe
from merge_run import merge_to_folder
from merge_stream import Gather, Merge, StreamSettings, stream
from merge_torch import TorchOperations
from model_errors import ModelCompatibilityError
from model_utils import rows_of
from model_vocabulary import VocabularySettings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = (0.5, 0.3, 1.2)
CASES = {
    "linear": ("linear", {"weights": WEIGHTS}),
    "linear, plain sum": ("linear", {"weights": WEIGHTS, "normalize": False}),
    "slerp": ("slerp", {"t": 0.3}),
    "task arithmetic": ("task_arithmetic", {"weights": WEIGHTS, "lam": 0.7}),
    "ties": ("ties", {"weights": WEIGHTS, "densities": (0.2, 0.5, 0.9), "lam": 0.8}),
    "ties, sum": (
        "ties",
        {"weights": (1.0, -0.5, 0.5), "densities": (0.4,) * 3, "normalize": False},
    ),
    "ties, rows": (
        "ties",
        {"weights": WEIGHTS, "densities": (0.2, 0.5, 0.9), "trim_scope": "row"},
    ),
    "dare": ("dare", {"weights": WEIGHTS, "densities": (0.3, 0.6, 1.0), "seed": 5}),
    "dare, l1": ("dare", {"weights": WEIGHTS, "densities": (0.3,) * 3, "rescale": "l1"}),
    "dare + ties": ("dare", {"weights": WEIGHTS, "densities": (0.5,) * 3, "variant": "ties"}),
}
"""Method and parameters, for three fine-tuned models, or as many as the method takes."""

THIRDS = {"weights": WEIGHTS, "densities": (0.2, 0.5, 0.7)}
EVERY_CASE = CASES | {
    "slerp, lengths apart": ("slerp", {"t": 0.3, "normalize_before_slerp": True}),
    "nuslerp": ("nuslerp", {"weights": (0.5, 1.2)}),
    "nuslerp, rows": ("nuslerp", {"nuslerp_flatten": False}),
    "nuslerp, columns": ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "nuslerp, columns, base": (
        "nuslerp",
        {"nuslerp_flatten": False, "nuslerp_row_wise": True, "from_base": True},
    ),
    "multislerp": ("multislerp", {"weights": WEIGHTS}),
    "multislerp, base": ("multislerp", {"weights": WEIGHTS, "from_base": True}),
    "karcher": ("karcher", {"weights": WEIGHTS}),
    "sequential": ("sequential", {"weights": WEIGHTS}),
    "sequential, lines": ("sequential", {"weights": WEIGHTS, "variant": "lerp"}),
    "nearswap": ("nearswap", {"t": 0.01}),
    "passthrough": ("passthrough", {"scale": 0.7}),
    "model stock": ("model_stock", {}),
    "model stock, rows": ("model_stock", {"filter_wise": True}),
    "ties, the paper's": (
        "ties",
        {
            "densities": (0.2, 0.5, 0.7),
            "trim_scope": "model",
            "trim_ties": "all",
            "k_rule": "paper",
            "elect_on": "unweighted",
            "elect_zero": "global_majority",
            "denominator": "count",
        },
    ),
    "ties, counted, l1": ("ties", THIRDS | {"elect_method": "count", "rescale": "l1"}),
    "della": ("della", THIRDS | {"epsilons": (0.1, 0.2, 0.0)}),
    "della, l1, sum": ("della", THIRDS | {"variant": "linear", "rescale": "l1"}),
    "breadcrumbs": ("breadcrumbs", THIRDS | {"gammas": (0.1, 0.0, 0.5)}),
    "breadcrumbs, rows": (
        "breadcrumbs",
        THIRDS | {"gammas": (0.1, 0.0, 0.5), "trim_scope": "row", "shrink": False},
    ),
    "breadcrumbs, ties, l1": ("breadcrumbs", THIRDS | {"variant": "ties", "rescale": "l1"}),
    "sce": ("sce", {"select_topk": 0.3}),
    "sce, weights only": ("sce", {"select_topk": 0.3, "sce_mask": "weights_only"}),
    "ram": ("ram", {"epsilon": 0.01}),
    "ram plus": ("ram", {"epsilon": 0.01, "variant": "ramplus"}),
    "consensus": ("consensus", {"weights": WEIGHTS}),
    "consensus, ties": ("consensus", THIRDS | {"variant": "ties", "trim_scope": "model"}),
    "arcee fusion": ("arcee_fusion", {}),
}


def recipe_of(method, parameters, base, models, **options):
    """A recipe with the base if the method needs one, or the case says so."""
    parameters = dict(parameters)
    needed = parameters.pop("from_base", METHODS[method].base == "required")
    return Recipe(
        method=method,
        base_model=str(base) if needed else None,
        models=tuple(str(model) for model in models[: METHODS[method].most]),
        parameters=parameters,
        **options,
    )


def run(method, base, models, out, *, parameters=None, dtype="float32", threads=2, **options):
    options = {"output_dir": out, "dtype": dtype, **options}
    recipe = recipe_of(method, parameters or {}, base, models, **options)
    return merge_to_folder(recipe, threads=threads, progress=False)


SMALL = {"layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}


def make_family(folder, dtypes=("float32",) * 4, *, noise=0.03, changes=({},) * 4, **shape):
    """A base and its fine-tunes; `dtypes` and `changes` have one entry for each of them."""
    base = make_llama(folder / "base", seed=1, dtype=dtypes[0], **{**SMALL, **shape, **changes[0]})
    models = [
        make_llama(
            folder / f"model-{seed}",
            seed=seed,
            base=base,
            noise=noise,
            dtype=dtypes[seed - 1],
            **{**SMALL, **shape, **changes[seed - 1]},
        )
        for seed in range(2, len(dtypes) + 1)
    ]
    return base, models


def expected(method, parameters, name, base, models):
    """The reference's result, and a scale for the rounding of float32 sums."""
    if method == "slerp":
        result = reference.slerp(*models[:2], **parameters)
    elif method == "linear":
        result = reference.linear(models, **parameters)
    elif method == "dare":
        options = {"lam": 1.0, "seed": 0, **parameters}
        options["elect"] = options.pop("variant", "linear") == "ties"
        result = reference.dare(base, models, name=name, **options)
    else:
        result = getattr(reference, method)(base, models, **parameters)
    return result, sum(np.abs(x) for x in (base, *models)) + np.abs(result)


def close_votes(parameters, base, models):
    """Entries whose election is within rounding: float32 and float64 may disagree on the sign."""
    terms = [
        weight * (model - base) for weight, model in zip(parameters["weights"], models, strict=True)
    ]
    magnitude = sum(np.abs(term) for term in terms)
    sums = [np.zeros_like(base)]
    for term in terms:  # trimmed or not: any subset of the models may vote
        sums += [total + term for total in sums]
    close = [(np.abs(total) < 1e-5 * magnitude) & (total != 0) for total in sums]
    return functools.reduce(np.logical_or, close)


DTYPES = {
    "float32": ("float32",) * 4,
    "float16": ("float16",) * 4,
    "bfloat16": ("bfloat16",) * 4,
    "mixed": ("bfloat16", "float32", "float16", "bfloat16"),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("method", "parameters"), CASES.values(), ids=CASES)
def test_every_method_agrees_with_the_reference(tmp_path, method, parameters, dtypes):
    base, models = make_family(tmp_path, dtypes)
    run(method, base, models, tmp_path / "out", parameters=parameters)
    stored = [read_tensors(folder) for folder in (base, *models)]
    merged = read_tensors(tmp_path / "out")
    assert merged.keys() == stored[0].keys()
    for name, got in merged.items():
        arrays = [tensors[name].double().numpy() for tensors in stored]
        want, scale = expected(method, parameters, name, arrays[0], arrays[1:])
        wrong = np.abs(got.double().numpy() - want) > 16 * 2**-24 * (10 * scale)
        if method in ("ties", "dare"):
            wrong &= ~close_votes(parameters, arrays[0], arrays[1:])
        assert got.dtype == torch.float32
        assert not wrong.any(), (name, np.argwhere(wrong)[:3])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_result_is_rounded_once_to_the_output_dtype(tmp_path, dtype):
    base, models = make_family(tmp_path)
    for name in ("float32", dtype):
        run("ties", base, models, tmp_path / name, parameters=CASES["ties"][1], dtype=name)
    exact, rounded = (read_tensors(tmp_path / name) for name in ("float32", dtype))
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(getattr(torch, dtype)))


@pytest.mark.parametrize(("method", "parameters"), EVERY_CASE.values(), ids=EVERY_CASE)
def test_blocks_threads_and_shards_do_not_change_a_bit(tmp_path, monkeypatch, method, parameters):
    base, models = make_family(tmp_path / "one", ("bfloat16",) * 4)
    sharded = [make_sharded(folder, tmp_path / "many") for folder in (base, *models)]
    hashes = []
    for number, (block_bytes, segment, threads, copy) in enumerate(
        [(2**21, 2**25, 1, False), (2**21, 2**25, 2, False), (1, 2000, 4, True), (1000, 1, 2, True)]
    ):
        monkeypatch.setattr(merge_memory, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(merge_stream, "SEGMENT_BYTES", segment)
        out = tmp_path / f"out-{number}"
        first, *rest = sharded if copy else (base, *models)
        shard_size = 1000 if copy else "5GB"
        run(
            method, first, rest, out,
            parameters=parameters, dtype="bfloat16", threads=threads, max_shard_size=shard_size,
        )  # fmt: skip
        assert (len(list(out.glob("*.safetensors"))) > 1) == copy
        hashes.append(tensor_hashes(out))
    assert hashes[1:] == hashes[:1] * 3


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_trim_of_the_whole_model_takes_it_as_one_vector(tmp_path, monkeypatch, dtypes):
    base, models = make_family(tmp_path / "one", dtypes)
    parameters = {"weights": WEIGHTS, "densities": (0.2, 0.5, 1.0), "trim_scope": "model"}
    report = run("ties", base, models, tmp_path / "out", parameters=parameters)
    merged, names = read_tensors(tmp_path / "out"), [*report.findings]
    stored = [read_tensors(folder) for folder in (base, *models)]
    vectors = [
        np.concatenate([tensors[name].double().numpy().ravel() for name in names])
        for tensors in (*stored, merged)
    ]
    del parameters["trim_scope"]
    wrong = np.abs(vectors[-1] - reference.ties(vectors[0], vectors[1:-1], **parameters)) > 1e-6
    assert not (wrong & ~close_votes(parameters, vectors[0], vectors[1:-1])).any()

    kept = np.array(
        [[model["kept"] for model in each["trim"]] for each in report.findings.values()]
    )
    size = len(vectors[0])
    assert kept.sum(axis=0).tolist() == [int(0.2 * size), int(0.5 * size), size]
    assert len({*kept[:, 0] / [merged[name].numel() for name in names]}) > 3  # not tensor by tensor

    monkeypatch.setattr(merge_memory, "BLOCK_BYTES", 700)
    monkeypatch.setattr(merge_stream, "SEGMENT_BYTES", 1)
    first, *rest = [make_sharded(folder, tmp_path / "many") for folder in (base, *models)]
    parameters["trim_scope"] = "model"
    run("ties", first, rest, tmp_path / "again", parameters=parameters, threads=4)
    assert tensor_hashes(tmp_path / "again") == tensor_hashes(tmp_path / "out")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_sample_that_misleads_costs_time_and_nothing_else(tmp_path, monkeypatch, scope):
    """The rows that are sampled differ from the base by more than all others, or not at all."""
    monkeypatch.setattr(merge_memory, "BLOCK_BYTES", 4096)
    base, (model,) = make_family(tmp_path, ("float32",) * 2, hidden_size=64, vocab_size=900)
    tensors = read_tensors(base)
    random = np.random.default_rng(0)
    for name, factor in ((EMBEDDING, 1000.0), (HEAD, 0.0)):
        noise = torch.from_numpy(random.normal(0, 0.01, tensors[name].shape)).float()
        rows_of_a_block = 4096 // (3 * 4 * 64)
        for first in range(0, 900, merge_stream.SAMPLE_STEP * rows_of_a_block):
            noise[first : first + rows_of_a_block] *= factor
        tensors[name] += noise
    save_tensors(model, tensors, 1)
    parameters = {"densities": (0.5,), "trim_scope": scope}
    passes = []
    plain = merge_stream._Reader.work

    def work(reader, group, segment):
        passes.append((segment.task.name, id(group.request)))
        plain(reader, group, segment)

    monkeypatch.setattr(merge_stream._Reader, "work", work)
    report = run("ties", base, [model], tmp_path / "out", parameters=parameters)
    assert len({request for name, request in passes if name == HEAD}) > 4
    merged, before = read_tensors(tmp_path / "out"), read_tensors(base)
    kept = {name: int((merged[name] != before[name]).sum()) for name in merged}
    if scope == "model":
        assert sum(kept.values()) <= sum(tensor.numel() for tensor in before.values()) // 2
    found = {name: each["trim"][0] for name, each in report.findings.items()}
    for name in (EMBEDDING, HEAD):
        delta = (tensors[name] - before[name]).abs()
        lowest = found[name]["threshold"]
        assert found[name]["kept"] == int((delta > lowest).sum()) + found[name]["tied_kept"]
        if scope == "tensor":
            assert found[name]["kept"] == delta.numel() // 2


@pytest.mark.parametrize(("method", "parameters"), EVERY_CASE.values(), ids=EVERY_CASE)
def test_torch_and_the_kernels_make_the_same_bytes(tmp_path, monkeypatch, method, parameters):
    base, models = make_family(tmp_path, DTYPES["mixed"])
    cases = [parameters]
    if method == "ties" and "trim_scope" not in parameters:
        cases.append(parameters | {"trim_scope": "model"})
    for number, case in enumerate(cases):
        for name in ("kernels", "torch"):
            run(method, base, models, tmp_path / f"{name}-{number}", parameters=case)
            monkeypatch.setattr(
                merge_run,
                "make_operations",
                lambda device, loops, finish: TorchOperations(device, finish),
            )
        monkeypatch.undo()
        found = [tensor_hashes(tmp_path / f"{name}-{number}") for name in ("kernels", "torch")]
        assert found[0] == found[1]


def make_sharded(folder, parent):
    """The same model in three files."""
    copy = parent / folder.name
    copy.mkdir(parents=True)
    save_tensors(copy, read_tensors(folder), 3)
    (copy / "config.json").write_text((folder / "config.json").read_text())
    return copy


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare"])
@pytest.mark.parametrize("count", [1, 6])
def test_one_model_and_many(tmp_path, method, count):
    base, models = make_family(tmp_path, ("float32",) * (count + 1), changes=({},) * 7)
    report = run(method, base, models, tmp_path / "out")
    merged, stored = read_tensors(tmp_path / "out"), [read_tensors(folder) for folder in models]
    assert report.parameters["weights"] == (1.0,) * count
    parameters = {"weights": (1.0,) * count}
    if method in ("ties", "dare"):
        parameters["densities"] = (1.0,) * count
    for name, tensor in read_tensors(base).items():
        arrays = [tensor.double().numpy(), *(other[name].double().numpy() for other in stored)]
        want, scale = expected(method, parameters, name, arrays[0], arrays[1:])
        right = np.abs(merged[name].double().numpy() - want) <= 64 * 2**-24 * scale
        if method == "ties":
            right |= close_votes(parameters, arrays[0], arrays[1:])
        assert right.all()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(sorted(EVERY_CASE)),
    heads=st.sampled_from([(2, 1), (4, 2), (2, 2)]),
    layers=st.integers(1, 3),
    width=st.sampled_from([8, 24]),
    vocab_size=st.integers(3, 40),
    tied=st.booleans(),
    block=st.integers(1, 500),
)
def test_shapes_and_blocks_of_any_size(
    tmp_path_factory, monkeypatch, case, heads, layers, width, vocab_size, tied, block
):
    folder = tmp_path_factory.mktemp("any")
    method, parameters = EVERY_CASE[case]
    shape = {"layers": layers, "hidden_size": width, "intermediate_size": width + 5, "tied": tied}
    shape |= {"heads": heads[0], "kv_heads": heads[1], "vocab_size": vocab_size}
    base, models = make_family(folder, ("bfloat16",) * 4, **shape)
    run(method, base, models, folder / "whole", parameters=parameters)
    with monkeypatch.context() as patch:
        patch.setattr(merge_memory, "BLOCK_BYTES", 10 * block)
        run(method, base, models, folder / "blocks", parameters=parameters)
    assert tensor_hashes(folder / "blocks") == tensor_hashes(folder / "whole")


# Heads and vocabularies


def test_tied_models_stay_tied(tmp_path):
    base, models = make_family(tmp_path, tied=True)
    run("linear", base, models, tmp_path / "out")
    assert HEAD not in read_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_and_an_untied_model_give_one_with_a_head_of_its_own(tmp_path):
    tied, untied = {"tied": True}, {}
    base, models = make_family(tmp_path, changes=(tied, untied, tied, tied))
    report = run("linear", base, models, tmp_path / "out")
    merged, stored = read_tensors(tmp_path / "out"), [read_tensors(folder) for folder in models]
    heads = [stored[0][HEAD], stored[1][EMBEDDING], stored[2][EMBEDDING]]
    want = reference.linear([head.double().numpy() for head in heads], [1.0] * 3)
    assert np.abs(merged[HEAD].numpy() - want).max() < 1e-6
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert any("tie" in note for note in report.notes)


def test_vocabularies_are_cut_to_the_smallest_and_the_report_says_so(tmp_path):
    sizes = [{"vocab_size": size} for size in (32, 24, 32, 28)]
    base, models = make_family(tmp_path, changes=sizes)
    report = run("ties", base, models, tmp_path / "out", parameters=CASES["ties"][1])
    merged = read_tensors(tmp_path / "out")
    assert merged[EMBEDDING].shape == merged[HEAD].shape == (24, 16)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 24
    changed = {str(base): {"cut": 8}, str(models[1]): {"cut": 8}, str(models[2]): {"cut": 4}}
    assert report.vocabulary["rows_changed"] == changed
    stored = [read_tensors(folder) for folder in (base, *models)]
    for name in (EMBEDDING, HEAD):  # the first rows of each
        first, *rest = (tensors[name][:24].double().numpy() for tensors in stored)
        want = reference.ties(first, rest, **CASES["ties"][1])
        wrong = np.abs(merged[name].numpy() - want) > 1e-5
        assert not (wrong & ~close_votes(CASES["ties"][1], first, rest)).any()


# What goes wrong while it runs


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_weights_that_are_not_numbers_are_refused_by_place(tmp_path, value, shown):
    base, models = make_family(tmp_path)
    tensors = read_tensors(models[1])
    tensors["model.layers.0.mlp.up_proj.weight"][7, 3] = value
    save_tensors(models[1], tensors, 1)
    text = rf"up_proj\.weight has NaN or infinite weights: row 7, column 3 \(element 115, {shown}\)"
    with pytest.raises(ModelCompatibilityError, match=text) as caught:
        run("ties", base, models, tmp_path / "out")
    assert str(caught.value).startswith(f"{models[1]}: model.layers.0")
    assert sorted(os.listdir(tmp_path)) == ["base", "model-2", "model-3", "model-4"]


@pytest.mark.parametrize(("method", "parameters"), EVERY_CASE.values(), ids=EVERY_CASE)
@pytest.mark.parametrize("arithmetic", ["kernels", "torch"])
def test_every_method_refuses_them(tmp_path, monkeypatch, method, parameters, arithmetic):
    if arithmetic == "torch":
        monkeypatch.setattr("merge_operations.numba_problem", lambda: "not wanted")
    name = "model.layers.0.mlp.down_proj.weight"
    for dtype, value in (("float32", math.nan), ("float16", -math.inf), ("bfloat16", math.inf)):
        base, models = make_family(tmp_path / dtype, (dtype,) * 4)
        needs_base = METHODS[method].base == "required"
        for broken in (models[0], base) if needs_base else models[:1]:
            plain = read_tensors(broken)
            tensors = {key: tensor.clone() for key, tensor in plain.items()}
            tensors[name][-1, 0] = value
            save_tensors(broken, tensors, 1)
            with pytest.raises(
                ModelCompatibilityError, match=rf"row 15, column 0 \(element 360, {value}\)"
            ):
                run(method, base, models, tmp_path / "out", parameters=parameters)
            save_tensors(broken, plain, 1)


def test_a_difference_that_overflows_is_no_broken_input(tmp_path):
    base, models = make_family(tmp_path)
    for folder, value in ((base, -3e38), (models[0], 3e38)):
        tensors = read_tensors(folder)
        tensors["lm_head.weight"][3, 5] = value
        save_tensors(folder, tensors, 1)
    with pytest.raises(ModelCompatibilityError, match="does not fit float32"):
        run("task_arithmetic", base, models, tmp_path / "out")
    with pytest.raises(ModelCompatibilityError) as caught:
        run("model_stock", base, models, tmp_path / "out")
    assert "infinite weights" not in str(caught.value)


def test_every_block_is_checked_and_large_sums_are_no_infinities(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_memory, "BLOCK_BYTES", 500)
    base, models = make_family(tmp_path)
    tensors = read_tensors(models[1])
    tensors["lm_head.weight"][-1] = 3e38  # finite, but their sum is not
    save_tensors(models[1], tensors, 1)
    run("slerp", base, models, tmp_path / "out")
    tensors["lm_head.weight"][-1, 5] = math.nan
    save_tensors(models[1], tensors, 1)
    with pytest.raises(ModelCompatibilityError, match=r"infinite weights: row 31, column 5"):
        run("slerp", base, models, tmp_path / "again")


def test_a_pass_gathers_in_as_many_places_as_threads(tmp_path, monkeypatch):
    """However many segments there are: what they find would pile up otherwise."""
    monkeypatch.setattr(merge_stream, "SEGMENT_BYTES", 1)
    answers, together = [], threading.Barrier(2, timeout=60)
    started = Counter()

    def merge(tasks):
        def start(names):
            assert {*names} == {tasks[0].name}
            started[tasks[0].name] += 1
            if len(names) > 1:  # both threads
                together.wait()
            return Counter()

        def take(block, found, _):
            found[block.segment] += block.rows

        answers.append((yield Gather(start, take, operator.add)))
        return Merge(lambda block, _: block.stored(-1).fill(0))

    _, (model,) = make_family(tmp_path, ("float32",) * 2)
    with open_plan(Recipe(method="linear", models=(str(model),))) as plan:
        settings = StreamSettings(threads=2, block_bytes=1)
        groups = [[task] for task in plan.tasks]
        operations = make_operations("cpu")
        stream(groups, merge, lambda _: 2, operations, plan.sources, Nowhere(), settings)
        rows = sorted(rows_of(task.info.shape)[0] for task in plan.tasks)
    assert {*started.values()} == {1, 2}
    assert sorted(len(found) for found in answers) == rows
    assert all(set(found) == {*range(len(found))} for found in answers)
    assert {rows for found in answers for rows in found.values()} == {1}


@pytest.mark.skipif(not merge_memory.STATUS.exists(), reason="needs Linux's /proc")
def test_histograms_count_as_memory_where_something_is_counted():
    before = merge_memory.anonymous_memory()
    left, right = (coarse_gather(100, lambda *_: None, sample=False).start([]) for _ in range(2))
    right[:, 9] = 1
    assert coarse_gather(100, lambda *_: None, sample=False).fold(left, right) is left
    assert left.sum() == 100
    assert merge_memory.anonymous_memory() - before < left.nbytes / 4
    left += 1
    assert merge_memory.anonymous_memory() - before > left.nbytes / 2


@pytest.mark.parametrize(
    ("method", "arithmetic"), [("ties", "kernels"), ("ties", "torch"), ("arcee_fusion", "both")]
)
def test_merges_at_the_same_time_leave_torchs_threads_as_they_were(
    tmp_path, monkeypatch, method, arithmetic
):
    if arithmetic == "torch":
        monkeypatch.setattr("merge_operations.numba_problem", lambda: "not wanted")
    base, models = make_family(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: run(method, base, models, tmp_path / f"{n}"), range(8)))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        assert len({str(tensor_hashes(tmp_path / f"{n}")) for n in range(8)}) == 1
    finally:
        torch.set_num_threads(before)


def test_a_model_with_weight_zero_is_still_checked(tmp_path):
    base, models = make_family(tmp_path)
    save_tensors(models[0], {n: t * math.inf for n, t in read_tensors(models[0]).items()}, 1)
    with pytest.raises(ModelCompatibilityError, match="NaN or infinite weights"):
        run("linear", base, models, tmp_path / "out", parameters={"weights": (0.0, 1.0, 1.0)})


def test_a_result_too_large_for_float16_is_refused(tmp_path):
    base, models = make_family(tmp_path)
    parameters = {"weights": (1e6, 1.0, 1.0)}
    text = r"\.weight: row \d+, column \d+ .* does not fit float16 .*65504"
    with pytest.raises(ModelCompatibilityError, match=text):
        run(
            "task_arithmetic", base, models, tmp_path / "out",
            parameters=parameters, dtype="float16", threads=1,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    base, models = make_family(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=20, f_frsize=512))
    text = r"out: the result needs \d{3},\d{3} bytes .*, the disk has 10,240 free"
    with pytest.raises(OSError, match=text):
        run("linear", base, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Plan, report, and what else is in the folder


class Nowhere:
    """A sink that takes everything."""

    def write_rows(self, name, first, rows):
        pass

    def finish(self, findings):
        pass


@pytest.mark.parametrize(("method", "parameters"), EVERY_CASE.values(), ids=EVERY_CASE)
def test_the_plan_says_how_many_bytes_will_be_read(tmp_path, method, parameters):
    base, models = make_family(tmp_path, DTYPES["mixed"])
    recipe = recipe_of(method, parameters, base, models)
    counts = []
    with open_plan(recipe) as plan:
        settings = StreamSettings(block_bytes=5000, on_bytes=counts.append)
        operations = make_operations("cpu", plan.loops)
        stream(
            plan.groups,
            lambda tasks: plan.merge(tasks, operations),
            plan.passes_of, operations, plan.sources, Nowhere(), settings,
        )  # fmt: skip
        assert sum(counts) == plan.read_bytes
        stored = sum(info.nbytes for source in plan.sources for info in source.tensors.values())
        assert plan.read_bytes == stored * plan.passes


def test_the_report_says_what_was_done(tmp_path):
    base, models = make_family(tmp_path)
    report = run("ties", base, models, tmp_path / "out", parameters={"densities": (0.5,) * 3})
    assert (report.tensors, report.dtype, report.base_model) == (12, "float32", str(base))
    assert report.bytes_written == sum(t.nbytes for t in read_tensors(tmp_path / "out").values())
    assert report.peak_memory > 10**7
    assert report.seconds > 0
    up = report.findings["model.layers.0.mlp.up_proj.weight"]["trim"][0]
    assert up["kept"] == 24 * 16 // 2
    assert up["threshold"] > 0
    slerp = run("slerp", base, models, tmp_path / "slerp")
    found = slerp.findings["lm_head.weight"]
    assert found["branch"] == "slerp"
    assert 0.8 < found["cosine"] < 0.9995
    same = run("slerp", base, [base, base], tmp_path / "same")
    assert {found["branch"] for found in same.findings.values()} == {"lerp"}
    assert any(note.startswith("12 of 12 tensors took the straight line") for note in same.notes)
    assert json.loads(json.dumps(report.to_dict()))["vocabulary"]["rows_changed"] == {}
    none = run("ties", base, models, tmp_path / "none", parameters={"densities": (0.0, 1.0, 0.5)})
    json.dumps(none.to_dict(), allow_nan=False)
    assert none.findings["model.norm.weight"]["trim"][0]["threshold"] is None
    assert "merged 3 models by ties" in report.summary()


def test_everything_that_belongs_to_a_model_is_carried_byte_for_byte(tmp_path):
    base, models = make_family(tmp_path, tokenizer=True)
    (base / "README.md").write_text("# A model card of another model")
    (base / "modeling.py").write_text("raise SystemExit")
    (base / "tokenizer.model").write_bytes(bytes(range(256)))
    report = run("linear", base, [base, *models], tmp_path / "out")
    carried = [
        "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    assert list(report.files_carried) == carried
    assert report.files_left == ("modeling.py",)
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    own = ("config.json", "README.md", "merge_recipe.yml", "merge_report.json")
    own += ("merge_manifest.json",)
    files = {"model.safetensors", *own, *carried}
    assert set(os.listdir(tmp_path / "out")) == files


def test_config_keeps_its_spelling_and_tells_the_stored_dtype(tmp_path):
    base, models = make_family(tmp_path)
    text = (base / "config.json").read_text().replace('"rope_theta": 10000.0', '"rope_theta":  1e4')
    (base / "config.json").write_text(text)
    run("task_arithmetic", base, models, tmp_path / "out", dtype="float16")
    merged = (tmp_path / "out/config.json").read_text()
    assert merged == text.replace('"torch_dtype": "float32"', '"torch_dtype": "float16"')


def test_a_template_of_several_dtypes_is_said_to_be_rounded(tmp_path):
    norm = {"model.norm.weight": torch.ones(16) * 1.001}
    base, models = make_family(tmp_path, ("bfloat16",) * 2, changes=({"extra": norm}, {}))
    report = run("ties", base, models, tmp_path / "out", dtype=None)
    (note,) = [note for note in report.notes if "stores" in note]
    assert "stores F32 in 1 of 12 tensors, BF16 in most; the result is bfloat16" in note


def test_the_dtype_is_that_of_the_base_unless_another_is_asked_for(tmp_path):
    base, models = make_family(tmp_path, ("float16", "float32", "bfloat16", "float32"))
    assert run("ties", base, models, tmp_path / "a", dtype=None).dtype == "float16"
    assert run("linear", base, models, tmp_path / "b", dtype=None).dtype == "float32"


def test_a_result_that_is_not_as_planned_is_removed(tmp_path, monkeypatch):
    base, models = make_family(tmp_path)
    wrong = '{"model_type": "llama", "vocab_size": 7}'
    monkeypatch.setattr(merge_plan, "merged_config", lambda text, changes: wrong)
    with pytest.raises(ModelCompatibilityError) as caught:
        run("ties", base, models, tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: config.json must have whole numbers")
    assert caught.value.problems[0].endswith(
        "So the result is not what was planned, and was removed"
    )
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_a_broken_row_that_stands_in_for_others_is_said_to_be_its_owners(tmp_path):
    base, models = make_family(tmp_path, changes=({}, *({"vocab_size": 36},) * 3))
    tensors = read_tensors(models[1])
    tensors[EMBEDDING][34, 3] = math.nan
    save_tensors(models[1], tensors, 1)
    with pytest.raises(ModelCompatibilityError) as caught:
        run("ties", base, models, tmp_path / "out", vocabulary=VocabularySettings(mode="max"))
    assert str(caught.value).startswith(f"{models[1]}: {EMBEDDING} has NaN or infinite weights: ")
    assert "row 34, column 3 (element 547, nan)" in str(caught.value)


def test_a_function_is_told_how_far_the_merge_is(tmp_path, capsys):
    make_llama(tmp_path / "a", seed=1)
    recipe = Recipe(method="linear", models=(str(tmp_path / "a"),), output_dir=tmp_path / "out")
    told = []
    report = merge_to_folder(recipe, progress=lambda *each: told.append(each))
    assert told[0] == ("linear", 0, report.bytes_read)
    assert told[-1] == ("linear", report.bytes_read, report.bytes_read)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert capsys.readouterr().err == ""
