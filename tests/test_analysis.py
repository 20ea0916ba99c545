"""What models have changed and where they disagree: as findings of a merge, JSON and page."""

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors, save_tensors, tensor_hashes

import merge_operations
import merge_stream
from merge_analysis import analysis_page, saved_analysis
from merge_findings import layer_of, least_density
from merge_recipe import make_recipe
from merge_run import analyze_models, merge_to_folder
from slerp_llama import main as slerp_main
from ties_llama import main as ties_main
from ties_utils import coarse_histogram, count_conflicts

SMALL = {"layers": 11, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
NAMES = ("a", "b", "c")
DENSITIES = {"densities": [0.3] * 3}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and three fine-tunes in the current folder: base, a, b and c."""
    base = make_llama(tmp_path / "base", seed=1, **SMALL)
    for seed, name in enumerate(NAMES, 2):
        make_llama(tmp_path / name, seed=seed, base=base, **SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def analyze(method="ties", base="base", names=NAMES, **options):
    recipe = make_recipe(method, base, list(names), {}, **options)
    return analyze_models(recipe, threads=2, progress=False)


def deltas(names=NAMES, base="base"):
    """Task vectors by tensor name: shape (models, entries), float32."""
    before, tuned = read_tensors_of(base), [read_tensors_of(name) for name in names]
    return {
        name: np.stack([(t[name].float() - tensor.float()).numpy().ravel() for t in tuned])
        for name, tensor in before.items()
    }


def read_tensors_of(name):
    return read_tensors(Path(name))


def expected(changes, base):
    """The numbers of an analysis, plainly."""
    wide = changes.astype(np.float64)
    norms = np.sqrt((wide**2).sum(axis=1))
    pairs = [(i, j) for j in range(len(wide)) for i in range(j)]
    raised, lowered = (changes > 0).any(axis=0), (changes < 0).any(axis=0)
    both = [(changes[i] * changes[j] != 0, changes[i] * changes[j] < 0) for i, j in pairs]
    return {
        "elements": changes.shape[1],
        "norms": norms,
        "base_norm": np.sqrt((base.astype(np.float64) ** 2).sum()),
        "cosines": [wide[i] @ wide[j] / norms[i] / norms[j] for i, j in pairs],
        "sign_conflict": (raised & lowered).sum() / (raised | lowered).sum(),
        "pair_conflicts": [apart.sum() / changed.sum() for changed, apart in both],
    }


def assert_agrees(found, want):
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_numbers_of_tensors_layers_and_the_whole_are_right(models):
    analysis = analyze()
    changes = deltas()
    base = {name: t.float().numpy().ravel() for name, t in read_tensors_of("base").items()}
    for name, each in changes.items():
        assert_agrees(analysis.tensors[name], expected(each, base[name]))

    def of(names):
        parts = [np.concatenate([changes[name] for name in names], axis=1)]
        return expected(*parts, np.concatenate([base[name] for name in names]))

    assert_agrees(analysis.whole, of(changes))
    assert_agrees(analysis.layers["10"], of([n for n in changes if ".layers.10." in n]))
    up = [n for n in changes if n.endswith("mlp.up_proj.weight")]
    assert_agrees(analysis.projections["mlp.up_proj"], of(up))
    assert [*analysis.layers] == [*map(str, range(11))]


def test_the_largest_changes_are_those_that_a_trim_would_keep(models):
    analysis, name = analyze(), "model.layers.3.mlp.up_proj.weight"
    changes = deltas()[name]
    lowest = np.quantile(np.abs(changes), 0.8, axis=1, method="higher")[:, None]
    large = np.where(np.abs(changes) >= lowest, changes, 0)
    pairs = [(0, 1), (0, 2), (1, 2)]
    want = [(large[i] * large[j] < 0).sum() / (large[i] * large[j] != 0).sum() for i, j in pairs]
    assert analysis.tensors[name]["largest_pair_conflicts"] == pytest.approx(want, abs=0.06)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_density_that_keeps_a_share_of_the_change(share):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(20000, generator=generator) ** 3 * 1e-3
    squares = (delta.double() ** 2).sort(descending=True).values.cumsum(0)
    exact = int((squares < share * squares[-1]).sum() + 1) / len(delta)
    histogram = coarse_histogram(delta).reshape(-1, 16).sum(dim=1).numpy()
    assert least_density([histogram], share) == pytest.approx(exact, rel=0.02)
    assert least_density([np.zeros(2048, dtype=np.int64)], share) == 0


def test_the_density_of_each_tensor_that_keeps_a_share_of_all_their_changes():
    """Tensors of different scale: the same density of each keeps different shares of it."""
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(5000, generator=generator) ** k * s for k, s in ((1, 1e-3), (3, 2e-3))]
    squares = [(d.double() ** 2).sort(descending=True).values.cumsum(0) for d in deltas]
    total = sum(each[-1] for each in squares)
    kept = sum(each / total for each in squares)  # by the entries kept of each
    exact = int((kept < 0.9).sum() + 1) / 5000
    histograms = [coarse_histogram(d).reshape(-1, 16).sum(dim=1).numpy() for d in deltas]
    alone = [least_density([each], 0.9) for each in histograms]
    assert least_density(histograms, 0.9) == pytest.approx(exact, rel=0.02)
    assert min(alone) < exact < max(alone)


def test_blocks_threads_and_torch_find_the_same(models, monkeypatch):
    found = [analyze().to_dict()]
    monkeypatch.setattr(merge_stream, "SEGMENT_BYTES", 1)
    monkeypatch.setattr("merge_memory.BLOCK_BYTES", 500)
    found.append(analyze().to_dict())
    monkeypatch.setattr(merge_operations, "numba_problem", lambda: "not wanted")
    found.append(analyze().to_dict())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("ties", DENSITIES),
        ("ties", DENSITIES | {"trim_scope": "model"}),
        ("model_stock", {}),
    ],
)
def test_a_merge_finds_the_same_in_its_last_pass(models, method, parameters):
    recipe = make_recipe(method, "base", NAMES, parameters, output_dir="out")
    report = merge_to_folder(recipe, findings=True, progress=False)
    analysis = analyze(method)
    for name, found in report.findings.items():
        counted = analysis.tensors[name]
        mine = found["task_vectors"]
        assert set(counted) - set(mine) == {
            "largest_conflict",
            "largest_pair_conflicts",
            "densities",
        }
        assert mine == {key: counted[key] for key in mine}
    for group in ("layers", "projections"):
        told = getattr(analysis, group)
        assert list(report.task_vectors[group]) == list(told)
        for key, mine in report.task_vectors[group].items():
            assert mine == {each: told[key][each] for each in mine}
    saved = json.loads((models / "out/merge_report.json").read_text())
    assert saved["task_vectors"] == report.task_vectors
    assert "task_vectors (by layer and projection)" in report.summary()
    plain = make_recipe(method, "base", NAMES, parameters, output_dir="plain")
    report = merge_to_folder(plain, progress=False)
    assert not any("task_vectors" in found for found in report.findings.values())
    assert report.task_vectors == {}
    assert tensor_hashes(models / "out") == tensor_hashes(models / "plain")


def test_the_page_of_a_report_shows_what_the_merge_found(models):
    recipe = make_recipe("ties", "base", NAMES, DENSITIES, output_dir="out")
    merge_to_folder(recipe, findings=True, progress=False)
    found = saved_analysis(json.loads((models / "out/merge_report.json").read_text()))
    assert (found.models, found.base_model) == (NAMES, "base")
    known = analyze()
    assert found.whole["sign_conflict"] == known.whole["sign_conflict"]
    assert f"a: changed by {known.whole['relative_norms'][0]:.2%} of the base's norm" in (
        found.advice
    )
    page = analysis_page(found)
    assert "Conflicts of sign" in page
    assert "Densities to try" not in page  # a merge does not count what they need
    assert "of large changes" not in page


def test_a_report_without_findings_has_no_page(models):
    recipe = make_recipe("linear", None, NAMES, {}, output_dir="out")
    merge_to_folder(recipe, progress=False)
    assert saved_analysis(json.loads((models / "out/merge_report.json").read_text())) is None


def test_without_a_base_the_models_themselves_are_compared(models):
    analysis = analyze("linear", None)
    wide = [t.double().flatten() for t in (read_tensors_of(n)["lm_head.weight"] for n in NAMES)]
    want = [
        float(wide[i] @ wide[j] / wide[i].norm() / wide[j].norm())
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert analysis.tensors["lm_head.weight"]["cosines"] == pytest.approx(want)
    assert "sign_conflict" not in analysis.whole
    assert analysis.base_model is None


def test_what_is_not_to_be_merged_is_not_analyzed(models):
    analysis = analyze(include=["*.mlp.*"])
    assert all(".mlp." in name for name in analysis.tensors)


def density_of_each(deltas, share):
    """To a thousandth: what, taken of each tensor, keeps a share of all their squares."""
    squares = [(delta.double() ** 2).flatten().sort(descending=True).values for delta in deltas]
    sums = [torch.cat([torch.zeros(1), each.cumsum(0)]) for each in squares]
    wanted = share * sum(each[-1] for each in sums)
    densities = np.arange(0, 1, 0.001)
    kept = [sum(each[round(d * (len(each) - 1))] for each in sums) for d in densities]
    return next(d for d, part in zip(densities, kept, strict=True) if part >= wanted)


def test_opposite_models_are_told_apart(models):
    """b takes back what a does, in one projection of one layer."""
    base, tuned = read_tensors_of("base"), read_tensors_of("a")
    name = "model.layers.7.self_attn.q_proj.weight"
    other = read_tensors_of("b")
    large = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) ** 3 * 0.05
    tuned[name], other[name] = base[name] + large, base[name] - large
    save_tensors(models / "a", tuned, 1)
    save_tensors(models / "b", other, 1)
    analysis = analyze(names=("a", "b"))
    found = analysis.tensors[name]
    assert found["cosines"][0] < -0.9
    assert found["largest_pair_conflicts"][0] > 0.95
    assert sum("; most in layer 7, " in line for line in analysis.advice) == 2  # all, and large
    assert analysis.whole["tensor_densities"][0]["0.9"] == pytest.approx(
        density_of_each([tuned[each] - base[each] for each in analysis.tensors], 0.9), rel=0.03
    )
    each, at_once = (analysis.whole[k][0] for k in ("tensor_densities", "densities"))
    assert each["0.9"] > 1.01 * at_once["0.9"]
    assert f"density {each['0.9']:.2g} of each tensor keeps 90%" in analysis.advice[0]
    assert f"of the whole model (trim_scope model), {at_once['0.9']:.2g} and" in analysis.advice[0]


@pytest.mark.parametrize(("entries", "conflicts"), [(64, False), (16384, True)])
def test_a_conflict_is_only_told_where_chance_would_not_make_it(tmp_path, entries, conflicts):
    """A fifth of the entries are large in both models, and 70% of these go opposite ways."""
    width = int(entries**0.5)
    shape = {**SMALL, "layers": 1, "hidden_size": width, "intermediate_size": width}
    base = make_llama(tmp_path / "base", seed=1, dtype="float32", **shape)
    random, name = np.random.default_rng(0), "model.layers.0.mlp.up_proj.weight"
    large = random.random((width, width)) < 0.2
    signs = np.where(random.random((width, width)) < 0.7, -1.0, 1.0)
    change = random.normal(size=(width, width)) * np.where(large, 1.0, 0.01)
    tensors = read_tensors(base)
    for model, each in (("a", change), ("b", change * signs)):
        folder = make_llama(tmp_path / model, seed=1, dtype="float32", **shape)
        tuned = {**tensors, name: tensors[name] + torch.from_numpy(each).float()}
        save_tensors(folder, tuned, 1)
    analysis = analyze(base=base, names=(tmp_path / "a", tmp_path / "b"))
    told = any(f"conflict most in {name} (" in line for line in analysis.advice)
    assert told == conflicts


class Page(HTMLParser):
    """Open elements, and everything that a page asks for from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_command_writes_json_and_a_page_that_stands_alone(models, capsys):
    (models / "a").rename(models / "<b>&amp;")
    arguments = ["base", "--ft_models", "<b>&amp;", "b", "c", "--quiet", "--analyze"]
    before = {path.name for path in models.iterdir()}
    assert ties_main([*arguments, "reports/seen.html"]) == 0
    assert "wrote reports/seen.json and reports/seen.html" in capsys.readouterr().out
    assert {path.name for path in models.iterdir()} - before == {"reports"}
    found = json.loads((models / "reports/seen.json").read_text())
    assert found["models"] == ["<b>&amp;", "b", "c"]
    assert found["whole"]["elements"] == sum(
        found["tensors"][n]["elements"] for n in found["tensors"]
    )
    text = (models / "reports/seen.html").read_text()
    page = Page(text)
    assert (page.open, page.links) == ([], [])
    assert "script" not in page.tags
    assert "http" not in text
    assert "<b>&amp; and b" in page.text
    assert page.tags.count("figure") == 3 + 1 + 3 + 3 + 3


def test_columns_and_layers_stand_in_their_order(models):
    assert ties_main(["base", "--ft_models", "a", "b", "--quiet", "--analyze", "seen"]) == 0
    table = (models / "seen.html").read_text().split("<table>")[1]
    heads = [part.split("<")[0] for part in table.split("class=column>")[1:]]
    assert heads == ["norm", "q", "k", "v", "o", "norm 2", "gate", "up", "down", "all"]
    rows = [part.split("<")[0] for part in table.split("class=row>")[1:]]
    assert rows[:12] == [*(f"layer {k}" for k in range(11)), "all"]
    assert rows[12:] == ["embed_tokens", "norm", "lm_head"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--analyze", "x", "--save", "y"], "--analyze merges nothing: give it without --save"),
        (["--analyze", "x", "--plan"], "--analyze merges nothing"),
    ],
)
def test_it_stands_alone(models, capsys, arguments, text):
    with pytest.raises(SystemExit):
        ties_main(["base", "--ft_models", "a", *arguments])
    assert text in capsys.readouterr().err


def test_a_report_that_exists_is_not_overwritten(models, capsys):
    (models / "x.json").write_text("mine")
    assert slerp_main(["--ft_models", "a", "b", "--analyze", "x", "--quiet"]) != 0
    assert "x.json: exists already. Choose another name" in capsys.readouterr().err
    assert (models / "x.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj.bias", (12, "self_attn.q_proj.bias")),
        ("model.norm.weight", None),
    ],
)
def test_a_tensor_has_its_place(name, place):
    assert layer_of(name) == place


def test_counts_of_conflicts_agree_with_every_combination_of_signs():
    columns = np.array(list(itertools.product([-1.0, 0.0, 1.0], repeat=3)), dtype=np.float32).T
    counted = count_conflicts([torch.from_numpy(row.copy()) for row in columns], [0, 0, 0])
    raised, lowered = (columns > 0).any(axis=0), (columns < 0).any(axis=0)
    assert counted[-1] == (26, (raised & lowered).sum())
    assert counted[1] == (12, 6)
