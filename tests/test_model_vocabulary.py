"""Which row of each model feeds each row of the merged vocabulary, by token strings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import make_llama, read_tensors, save_tensors, write_json
from tokenizers import Tokenizer, models, pre_tokenizers

from linear_utils import linear, task_arithmetic
from merge_recipe import Recipe
from merge_run import merge_to_folder
from model_row_maps import merge_vocabularies
from model_rows import MappedRows, TensorRows
from model_tokenizer import TokenTable, added_token
from model_vocabulary import (
    MISSING,
    Piece,
    Side,
    TokenSource,
    VocabularySettings,
    chosen_donor,
    model_index,
    settings_problems,
    token_source,
    vocabulary_settings,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARALLEL = "rows are no multiple of 64"


def table(words, added="", special="", **rules):
    """Tokens under the ids 0, 1, ...; "_" stands for an id without a token."""
    tokens = {row: token for row, token in enumerate(words.split()) if token != "_"}
    ids = {token: row for row, token in tokens.items()}
    entries = {
        token: added_token(ids[token], token, {"special": token in special.split()})
        for token in (added + " " + special).split()
    }
    return TokenTable(tokens, entries, **rules)


def side(label, words, rows=None, added="", special="", **rules):
    """A model with as many rows as tokens, unless said otherwise."""
    own = None if words is None else table(words, added, special, **rules)
    return Side(label, own.length if rows is None else rows, own)


def merged(*sides, donor=None, has_base=True, weights=None, **settings):
    """The merged vocabulary of models that can be brought together."""
    found, problems = merge_vocabularies(
        sides, VocabularySettings(**settings), donor=donor, has_base=has_base, weights=weights
    )
    assert problems == []
    return found


def problems_of(*sides, donor=None, has_base=True, weights=None, **settings):
    _, problems = merge_vocabularies(
        sides, VocabularySettings(**settings), donor=donor, has_base=has_base, weights=weights
    )
    return problems


def rows_of(vocabulary):
    """By model, its row for every row of the result; None where it has none."""
    if vocabulary.row_map is None:
        return None
    return [[None if r == MISSING else r for r in own] for own in vocabulary.row_map.rows.tolist()]


def words_of(vocabulary):
    """The tokens in the order of their ids, "_" for padding."""
    return " ".join(vocabulary.tokens.get(row, "_") for row in range(vocabulary.rows))


def notes_of(vocabulary):
    return [note for note in vocabulary.notes if PARALLEL not in note]


# The golden example, through a whole merge

BASE = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
TUNED = {"a": [2.0, 0.0], "c": [5.0, 5.0], "b": [0.0, 3.0]}


def write_words(folder, rows):
    """A model of one layer whose embedding and head have these rows, by token."""
    make_llama(
        folder, vocab_size=len(rows), hidden_size=2, intermediate_size=2, layers=1, heads=1,
        kv_heads=1, dtype="float32", config_changes={"bos_token_id": 0, "eos_token_id": 0},
    )  # fmt: skip
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    values = torch.tensor(list(rows.values()))
    save_tensors(folder, read_tensors(folder) | {EMBEDDING: values, HEAD: -values}, 1)
    tokenizer = Tokenizer(models.WordLevel({token: row for row, token in enumerate(rows)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def merge_words(tmp_path, method, **parameters):
    """Embedding and head of the golden models, merged by their strings."""
    write_words(tmp_path / "base", BASE)
    write_words(tmp_path / "tuned", TUNED)
    recipe = Recipe(
        method=method, base_model=str(tmp_path / "base"), models=(str(tmp_path / "tuned"),),
        parameters=parameters, output_dir=tmp_path / "out",
        vocabulary=VocabularySettings(mode="union", union_tokens="all"),
    )  # fmt: skip
    report = merge_to_folder(recipe, progress=False)
    assert report.vocabulary["tokens_added"] == ["c"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer.get_vocab() == {"a": 0, "b": 1, "c": 2}
    tensors = read_tensors(tmp_path / "out")
    return tensors[EMBEDDING].tolist(), tensors[HEAD].tolist()


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.5, [[1.5, 0.0], [0.0, 2.0], [5.0, 5.0]]),
        (2.0, [[3.0, 0.0], [0.0, 5.0], [5.0, 5.0]]),
    ],
)
def test_rows_are_matched_by_string_and_a_new_token_arrives_unscaled(tmp_path, weight, expected):
    embedding, head = merge_words(tmp_path, "task_arithmetic", weights=[weight])
    assert embedding == expected
    assert head == [[-value for value in row] for row in expected]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_the_token_of_a_single_owner_arrives_unscaled_in_every_method(tmp_path, method, lam):
    density = {} if method == "task_arithmetic" else {"densities": [0.5]}
    embedding, head = merge_words(tmp_path, method, lam=lam, **density)
    assert (embedding[2], head[2]) == ([5.0, 5.0], [-5.0, -5.0])


def stacked(vocabulary, *tensors):
    """The rows of the result of every model, each tensor being an embedding."""
    sources = [TensorRows({"e": torch.tensor(tensor)}) for tensor in tensors]
    rows = MappedRows(sources, ["e"] * len(tensors), vocabulary.row_map)
    values = [np.empty((vocabulary.rows, len(tensor[0])), np.float32) for tensor in tensors]
    rows.read(0, vocabulary.rows, values)
    return [torch.from_numpy(each) for each in values]


OWNERS = [side("base", "a b"), side("x", "a b <c>", added="<c>"), side("y", "<c> b a", added="<c>")]
VALUES = [
    [[1.0, 0.0], [0.0, 1.0]],
    [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]],
    [[4.0, 2.0], [0.0, 1.0], [1.0, 0.0]],
]


def test_the_token_of_two_owners_is_their_mean_plus_weighted_centred_differences():
    base, *tuned = stacked(merged(*OWNERS, mode="union"), *VALUES)
    assert base.tolist() == [[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]]
    result = task_arithmetic(base, tuned, [0.5, 0.25])
    # [3, 1] + 0.5 * ([2, 0] - [3, 1]) + 0.25 * ([4, 2] - [3, 1])
    assert result.tolist() == [[1.0, 0.0], [0.0, 1.0], [2.75, 0.75]]


def test_a_scaled_new_row_enters_the_base_as_zeros():
    base, x, y = stacked(merged(*OWNERS, mode="union", new_row="scaled"), *VALUES)
    assert [values[2].tolist() for values in (base, x, y)] == [[0.0, 0.0], [2.0, 0.0], [4.0, 2.0]]
    lone = [*OWNERS[:2], side("y", "a b")]
    base, x, y = stacked(merged(*lone, mode="union", new_row="scaled"), *VALUES[:2], VALUES[0])
    assert [values[2].tolist() for values in (base, x, y)] == [[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]


# Modes


def test_equal_vocabularies_need_no_map_even_as_different_objects():
    for mode in ("error", "truncate", "min", "pad", "max", "union", "base", "model:b"):
        found = merged(side("a", "x y z"), side("b", "x y z"), mode=mode)
        assert (found.row_map, found.rows, words_of(found)) == (None, 3, "x y z")
        assert (found.changes, found.added, found.cut, found.assumption) == ({}, (), False, None)
        assert notes_of(found) == []


@pytest.mark.parametrize("mode", ["error", "min", "max", "union", "base"])
@pytest.mark.parametrize("last", ["t", "u"])
def test_tokens_are_compared_by_id_as_hashing_all_their_strings_takes_long(mode, last):
    words = " ".join(f"t{number}" for number in range(50))
    sides = [side(label, f"{words} {end}") for label, end in (("a", "t"), ("b", last))]
    merge_vocabularies(sides, VocabularySettings(mode=mode))
    assert [each.label for each in sides if "ids" in vars(each.table)] == []


def test_min_keeps_the_rows_that_all_models_have():
    found = merged(side("a", "x y z v"), side("b", "x y", rows=3), side("c", "x y z v w"))
    assert (found.mode, found.rows, found.donor, found.cut) == ("min", 3, 0, True)
    assert words_of(found) == "x y z"
    assert rows_of(found) == [[0, 1, 2], [0, 1, None], [0, 1, 2]]
    assert found.row_map.fills == {2: (Piece(0, 2),)}
    assert found.changes == {"a": {"cut": 1}, "b": {"cut": 1, "filled": 1}, "c": {"cut": 2}}
    assert notes_of(found) == [
        "vocabularies cut to the smallest, 3 rows (a 4, b 3, c 5)",
        "a: 1 token not in the result: 'v' (vocabulary 'union' keeps them)",
        "c: 2 tokens not in the result: 'v', 'w' (vocabulary 'union' with union_tokens 'all' "
        "keeps them)",
    ]


def test_min_needs_no_map_where_all_tokens_that_are_left_agree():
    found = merged(side("a", "x y z"), side("b", "x y"))
    assert (found.row_map, found.rows, found.cut) == (None, 2, True)
    assert found.changes == {"a": {"cut": 1}}


def test_pad_keeps_the_rows_that_any_model_has_and_the_longest_tokenizer():
    found = merged(side("a", "x y"), side("b", "x y z"), side("c", "x y", rows=4), mode="max")
    assert (found.mode, found.rows, found.donor, words_of(found)) == ("max", 4, 1, "x y z _")
    assert rows_of(found) == [[0, 1, None, None], [0, 1, 2, None], [0, 1, None, 3]]
    assert found.row_map.fills == {2: (Piece(1, 2),), 3: (Piece(2, 3),)}
    assert found.changes["c"] == {"cut": 1, "filled": 1}
    assert notes_of(found) == [
        "vocabulary of 4 rows, by 'max' (a 2, b 3, c 4)",
        "tokenizer and special tokens of b, not of a",
    ]


def test_union_appends_added_tokens_in_the_order_of_models_and_then_of_ids():
    found = merged(
        side("a", "x y <s>", special="<s>"),
        side("b", "<q> x <p> y n", added="<p>", special="<q>"),
        side("c", "x y <s> <r> <p>", added="<r> <p>", special="<s>"),
        mode="union",
    )
    assert words_of(found) == "x y <s> <q> <p> <r>"
    assert rows_of(found) == [
        [0, 1, 2, None, None, None],
        [1, 3, None, 0, 2, None],
        [0, 1, 2, None, 4, 3],
    ]
    assert [(entry["id"], entry["content"], entry["special"]) for entry in found.added] == [
        *((3, "<q>", True), (4, "<p>", False), (5, "<r>", False)),
    ]
    assert found.row_map.fills == {
        2: (Piece(0, 2),),
        3: (Piece(1, 0),),
        4: (Piece(1, 2, 0.5), Piece(2, 4, 0.5)),
        5: (Piece(2, 3),),
    }
    assert found.changes["b"] == {"cut": 1, "moved": 4, "filled": 2}
    assert notes_of(found) == [
        "vocabulary of 6 rows, by 'union' (a 3, b 5, c 5)",
        "3 tokens added to those of a: '<q>', '<p>', '<r>'",
        "b: 1 token not in the result: 'n' (vocabulary 'union' with union_tokens 'all' keeps them)",
    ]


def test_union_of_all_tokens_adds_normal_ones_too_and_says_what_that_does():
    found = merged(
        side("a", "x y"), side("b", "x n y <p>", added="<p>"), mode="union", union_tokens="all"
    )
    assert words_of(found) == "x y n <p>"
    assert [entry["content"] for entry in found.added] == ["n", "<p>"]
    assert notes_of(found)[1:] == [
        "2 tokens added to those of a: 'n', '<p>'",
        "1 token added that their models have as normal ones: text that holds them is cut into "
        "other tokens than before: 'n'",
    ]


def test_union_uses_padding_rows_of_the_base_for_new_tokens():
    found = merged(
        side("a", "x y", rows=5), side("b", "x y <p>", added="<p>", rows=5), mode="union"
    )
    assert (words_of(found), found.rows) == ("x y <p> _ _", 5)
    assert rows_of(found) == [[0, 1, None, 3, 4], [0, 1, 2, 3, 4]]
    assert found.changes == {"a": {"cut": 1, "filled": 1}}


def test_a_token_that_one_tokenizer_holds_as_normal_and_another_as_added_is_one_token():
    found = merged(side("a", "x <p>"), side("b", "<p> x", added="<p>"), mode="union")
    assert (words_of(found), found.added) == ("x <p>", ())
    assert rows_of(found) == [[0, 1], [1, 0]]


def test_base_and_model_take_the_tokens_of_one_model():
    sides = [side("a", "x y"), side("b", "y <p> x n", added="<p>")]
    found = merged(*sides, mode="base", donor=0)
    assert (found.mode, words_of(found), rows_of(found)) == ("base", "x y", [[0, 1], [2, 0]])
    assert notes_of(found) == [
        "vocabulary of 2 rows, by 'base' (a 2, b 4)",
        "b: 2 tokens not in the result: '<p>', 'n' (vocabulary 'union' with union_tokens 'all' "
        "keeps them)",
    ]
    found = merged(*sides, mode="model:b", donor=1)
    assert (found.mode, words_of(found), found.donor) == ("base", "y <p> x n", 1)
    assert rows_of(found) == [[1, None, 0, None], [0, 1, 2, 3]]
    assert found.row_map.fills == {1: (Piece(1, 1),), 3: (Piece(1, 3),)}
    assert notes_of(found) == [
        "vocabulary of 4 rows, by 'model:b' (a 2, b 4)",
        "tokenizer and special tokens of b, not of a",
    ]


@pytest.mark.parametrize(
    ("mode", "rows"),
    [("error", 8), ("min", 4), ("max", 8), ("union", 8), ("base", 8), ("model:b", 8)],
)
def test_the_number_of_rows_is_rounded_up_in_every_mode(mode, rows):
    words = "x y z u v"
    sides = [side("a", words), side("b", words if mode != "min" else "x y")]
    found = merged(*sides, mode=mode, pad_to_multiple_of=4, donor=int(mode == "model:b"))
    assert (found.rows, len(found.tokens)) == (rows, min(rows, 5))
    assert len(found.row_map.rows[0]) == rows
    assert notes_of(found)[0] == (
        "vocabularies cut to the smallest, 2 rows, rounded up to 4 (a 5, b 2)"
        if mode == "min"
        else f"vocabulary of 8 rows, by {mode!r} and pad_to_multiple_of 4 (a 5, b 5)"
    )


def test_rounding_up_changes_nothing_where_the_number_fits():
    found = merged(side("a", "x y z u"), side("b", "x y z u"), pad_to_multiple_of=4)
    assert (found.row_map, found.rows, notes_of(found)) == (None, 4, [])


def test_a_number_of_rows_that_no_longer_splits_among_gpus_is_noted():
    found = merged(side("a", None, rows=64), side("b", None, rows=63))
    assert found.notes[1:] == (
        "63 rows are no multiple of 64, which splitting a head among GPUs may need; "
        "pad_to_multiple_of 64 makes them one",
    )
    assert not any(
        PARALLEL in note for note in merged(side("a", None, 63), side("b", None, 62)).notes
    )
    assert not any(
        PARALLEL in note
        for note in merged(side("a", None, 64), side("b", None, 63), mode="max").notes
    )


# Rows that a model lacks


def test_the_base_stands_in_for_a_row_that_it_has():
    found = merged(side("a", "x y z"), side("b", "x y"), side("c", "z y x"), mode="base", donor=0)
    assert found.row_map.fills == {2: (Piece(0, 2),)}


def test_without_a_base_the_owners_stand_in_whichever_comes_first():
    sides = [side("a", "x <p>", added="<p>"), side("b", "<p> x", added="<p>"), side("c", "x")]
    found = merged(*sides, mode="union", has_base=False)
    assert found.row_map.fills == {1: (Piece(0, 1, 0.5), Piece(1, 0, 0.5))}


@pytest.mark.parametrize(("missing_row", "fill"), [("mean", None), ("zero", ())])
def test_a_row_that_no_model_has_is_a_mean_or_zero(missing_row, fill):
    found = merged(
        side("a", "x y"), side("b", "x y"), pad_to_multiple_of=3, missing_row=missing_row
    )
    assert rows_of(found) == [[0, 1, None]] * 2
    assert found.row_map.fills == {2: fill}


RARE = [side("a", "x <p>", added="<p>"), side("b", "x"), side("c", "x <p>", added="<p>")]


def test_renormalise_leaves_a_model_out_of_the_rows_that_it_lacks():
    weights = [1.0, 4.0, 3.0]
    found = merged(
        *RARE, mode="union", linear_missing="renormalise", has_base=False, weights=weights
    )
    assert found.row_map.fills == {1: (Piece(0, 1, 0.25), Piece(2, 1, 0.75))}
    rows = stacked(found, [[1.0], [8.0]], [[1.0]], [[1.0], [4.0]])
    assert linear(rows, weights).tolist() == [[1.0], [5.0]]  # (1 * 8 + 3 * 4) / 4
    found = merged(*RARE, mode="union", has_base=False, weights=weights)
    rows = stacked(found, [[1.0], [8.0]], [[1.0]], [[1.0], [4.0]])
    assert linear(rows, weights).tolist() == [[1.0], [5.5]]  # (1 * 8 + 4 * 6 + 3 * 4) / 8


@pytest.mark.parametrize("weights", [[1.0, 5.0, -1.0], [0.0, 1.0, 0.0], [0.1 + 0.2, 1.0, -0.3]])
def test_weights_of_the_owners_that_sum_to_zero_cannot_be_renormalised(weights):
    settings = {"mode": "union", "linear_missing": "renormalise", "weights": weights}
    assert problems_of(*RARE, has_base=False, **settings) == [
        "linear_missing 'renormalise': the weights of those models that have '<p>' sum to 0 "
        "(a, c). Change a weight, or use 'fill'"
    ]
    zero = {"<p>": TokenSource()}
    assert problems_of(*RARE, has_base=False, tokens=zero, **settings) == []


def test_a_row_that_no_model_has_needs_no_weights():
    found = merged(
        *RARE, mode="union", pad_to_multiple_of=3, linear_missing="renormalise", has_base=False,
        weights=[1.0, 1.0, 1.0],
    )  # fmt: skip
    assert found.row_map.fills[2] is None


def test_weights_of_padding_rows_that_sum_to_zero_are_named_by_their_number():
    sides = [side("a", "x", rows=2), side("b", "x")]
    settings = {"mode": "max", "linear_missing": "renormalise", "weights": [0.0, 1.0]}
    (problem,) = problems_of(*sides, has_base=False, **settings)
    assert "those models that have row 1 sum to 0 (a)" in problem


# Sources of single tokens


def test_a_named_source_fills_the_token_only_for_models_that_lack_it():
    sides = [side("m/a", "x y"), side("m/b", "x y <p> <q>", added="<p> <q>")]
    chosen = {
        "<p>": TokenSource(model="base", token="x"),
        "<q>": TokenSource(model="b", token_id=0),
    }
    found = merged(*sides, mode="union", tokens=chosen)
    assert rows_of(found) == [[0, 1, None, None], [0, 1, 2, 3]]
    assert found.row_map.fills == {2: (Piece(0, 0),), 3: (Piece(1, 0),)}


def test_a_forced_source_fills_the_token_for_all_models():
    sides = [side("a", "x y"), side("b", "x y <p>", added="<p>")]
    chosen = {"<p>": TokenSource(model="a", token="y", force=True), "x": TokenSource(force=True)}
    found = merged(*sides, mode="union", tokens=chosen)
    assert rows_of(found) == [[None, 1, None]] * 2
    assert found.row_map.fills == {0: (), 2: (Piece(0, 1),)}
    assert merged(side("a", "x"), side("b", "x"), tokens={"x": TokenSource(force=True)}).row_map


def test_a_source_of_zeros_fills_with_zeros():
    sides = [side("a", "x"), side("b", "x <p>", added="<p>")]
    found = merged(*sides, mode="union", tokens={"<p>": TokenSource()})
    assert found.row_map.fills == {1: ()}


def test_a_source_takes_the_token_itself_unless_it_names_another():
    sides = [side("a", "x"), side("b", "<p> x", added="<p>"), side("c", "x <p>", added="<p>")]
    found = merged(*sides, mode="union", tokens={"<p>": TokenSource(model="b")})
    assert found.row_map.fills == {1: (Piece(1, 0),)}


def test_a_source_that_is_not_used_is_noted():
    found = merged(side("a", "x y"), side("b", "x y"), tokens={"y": TokenSource(model="b")})
    assert notes_of(found) == [
        "tokens: all models have 'y', so that its source is not used; force takes it for all"
    ]
    sides = [side("a", "x y"), side("b", "x y <p>", added="<p>")]
    found = merged(*sides, mode="union", tokens={"y": TokenSource(model="b")})
    assert found.row_map.fills == {2: (Piece(1, 2),)}


@pytest.mark.parametrize("mode", ["union", "base"])
def test_tokens_that_sources_name_are_added(mode):
    """As in mergekit: one that only a model has, one from another's row, one of zeros."""
    sources = {
        "<p>": TokenSource(model="b"),
        "<q>": TokenSource(model="b", token="y"),
        "<r>": TokenSource(),
    }
    found = merged(side("a", "x y"), side("b", "x y <p>", added="<p>"), mode=mode, tokens=sources)
    assert [entry["content"] for entry in found.added] == ["<p>", "<q>", "<r>"]
    assert found.tokens == {0: "x", 1: "y", 2: "<p>", 3: "<q>", 4: "<r>"}
    assert found.rows == 5
    assert found.row_map.fills == {2: (Piece(1, 2),), 3: (Piece(1, 1),), 4: ()}
    assert not [note for note in notes_of(found) if "normal ones" in note]


@pytest.mark.parametrize(
    ("token", "source", "text"),
    [
        ("<p>", TokenSource(), "tokens: '<p>' is not a token of the result"),
        (
            "x",
            TokenSource(model="z"),
            "tokens: 'x' is to come from a model, but 'z' is none of the models: a, b",
        ),
        (
            "x",
            TokenSource(model="b", token="<p>"),
            "tokens: 'x' is to come from b, which has no token '<p>'",
        ),
        (
            "x",
            TokenSource(model="b", token_id=2),
            "tokens: 'x' is to come from b, which has no row 2",
        ),
    ],
)
def test_a_source_that_does_not_exist_is_a_problem(token, source, text):
    assert problems_of(side("a", "x y"), side("b", "x y"), tokens={token: source}) == [text]


# Ids that mean the same


def test_aliased_ids_are_one_token_under_the_name_that_the_donor_has():
    sides = [side("a", "x <r>", special="<r>"), side("b", "x <end>", special="<end>")]
    found = merged(*sides, id_alias=(1,))
    assert (words_of(found), found.row_map) == ("x <r>", None)
    assert notes_of(found) == ["b: by id_alias, '<end>' as '<r>'"]
    assert len(problems_of(*sides)) == 1
    found = merged(*sides, id_alias=(1,), mode="union")
    assert (words_of(found), found.added) == ("x <r>", ())


def test_two_aliased_ids_may_be_swapped():
    found = merged(side("a", "x <r> <s>"), side("b", "x <s> <r>"), id_alias=[1, 2])
    assert found.row_map is None


def test_an_alias_must_be_a_token_of_the_donor():
    sides = [side("a", "x y", rows=3), side("b", "x y <p>", added="<p>")]
    assert problems_of(*sides, id_alias=(2,), mode="union") == [
        "id_alias: 2 is no token of a, whose tokens the result has. Leave it out, or choose "
        "another model with tokenizer_source"
    ]
    assert problems_of(*sides, id_alias=(2,), mode="model:b", donor=1) == []
    bare = [replace(each, table=None) for each in sides]
    assert problems_of(*bare, id_alias=(2,)) == []  # all ids mean the same there


def test_an_alias_may_not_give_a_model_one_token_twice():
    sides = [side("a", "x y <r>"), side("b", "x <r> <end>")]
    alias, other = problems_of(*sides, id_alias=(2,))
    assert alias == "id_alias: 2 is '<r>' in a, which is 1 in b. Name both ids, or none"
    assert "(1 is '<r>', not 'y')" in other
    assert problems_of(*sides, id_alias=(1, 2)) == []


# Ids that disagree

STRINGS = (
    "Match tokens by their strings: vocabulary 'union' keeps the added tokens of all models, "
    "'base' or 'model:<name>' the tokens of one"
)


@pytest.mark.parametrize("mode", ["error", "min", "max"])
def test_an_id_that_means_something_else_is_a_problem_that_names_it(mode):
    sides = [side("a", "x y z"), side("b", "x y w")]
    assert problems_of(*sides, mode=mode) == [
        f"b: 1 token id means something else than in a (2 is 'w', not 'z'). {STRINGS}"
    ]
    for other in ("union", "base"):
        assert problems_of(*sides, mode=other) == []


def test_of_many_ids_that_disagree_three_are_named():
    (problem,) = problems_of(side("a", "p q r s t"), side("b", "q p s r t"))
    assert problem == (
        "b: 4 token ids mean something else than in a "
        f"(0 is 'q', not 'p'; 1 is 'p', not 'q'; 2 is 's', not 'r'; ...). {STRINGS}"
    )


def test_a_token_that_has_another_id_disagrees_even_where_its_own_id_is_free():
    (problem,) = problems_of(side("a", "x y z"), side("b", "x _ z y"))
    assert f"1 token id means something else than in a ('y' is 3, not 1). {STRINGS}" in problem


def test_ids_beyond_the_rows_that_are_kept_may_disagree():
    assert problems_of(side("a", "x y z"), side("b", "x y w"), side("c", "x y")) == []
    for rows in [(2, 2), (2, 3), (3, 2)]:
        sides = [side("a", "x y z", rows=rows[0]), side("b", "x y w", rows=rows[1])]
        assert problems_of(*sides) == problems_of(*sides, mode="max") == []


def test_a_token_that_only_some_models_have_is_filled_or_lost_but_no_disagreement():
    found = merged(side("a", "x y z"), side("b", "x _ z"))
    assert rows_of(found) == [[0, 1, 2], [0, None, 2]]
    found = merged(side("a", "x _ z"), side("b", "x y z"))
    assert (words_of(found), rows_of(found)) == ("x _ z", [[0, 1, 2], [0, None, 2]])
    assert notes_of(found) == [
        "b: 1 token not in the result: 'y' (vocabulary 'union' with union_tokens 'all' keeps them)"
    ]


CHOOSE = f"{STRINGS}; 'min' and 'max' go by ids, where all models agree on them"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (side("b", "x y", rows=3), "3 vocabulary rows, not 2"),
        (side("b", "x _"), "1 token that only one of them has: 'y'"),
        (
            side("b", "x _ z u v"),
            "5 vocabulary rows, not 2; 4 tokens that only one of them has: 'y', 'z', 'u', ...",
        ),
    ],
)
def test_error_accepts_no_difference_and_says_which_there_is(other, difference):
    first = side("a", "x y")
    other = replace(other, rows=max(other.rows, 2))
    assert problems_of(first, other, mode="error") == [
        f"b: its vocabulary is not that of a ({difference}). {CHOOSE}"
    ]
    for mode in ("min", "max", "union", "base"):
        assert problems_of(first, other, mode=mode) == []


def test_error_asks_only_for_rows_of_a_model_without_tokenizer_files():
    first = side("a", "x y z", rows=2)
    assert problems_of(first, side("b", None, rows=2), mode="error") == []
    (problem,) = problems_of(first, side("b", None, rows=3), mode="error")
    assert "(3 vocabulary rows, not 2)" in problem


def test_error_takes_no_offence_at_a_token_that_has_a_row_in_neither():
    first, second = side("a", "x y z", rows=2), side("b", "x y _ z", rows=2)
    assert problems_of(first, second, mode="error") == []


# Families

BPE = '{"model type": "BPE", "normalizer": null}'
UNIGRAM = '{"model type": "Unigram", "normalizer": null}'


@pytest.mark.parametrize("mode", ["min", "union", "base"])
def test_tokenizers_that_cut_text_into_other_tokens_cannot_be_merged(mode):
    sides = [side("a", "x y z", splitting=BPE), side("b", "x y w", splitting=UNIGRAM)]
    assert problems_of(*sides, mode=mode) == [
        "b: its tokenizer is of another family than that of a (other model type), so the same "
        "text has other tokens. Merge models of one family"
    ]


@pytest.mark.parametrize("words", [("x y z", "x y"), ("x y", "x y z")])
def test_it_takes_one_normal_token_more_to_be_of_another_family(words):
    first, second = (
        side(label, own, splitting=rules)
        for label, own, rules in zip("ab", words, (BPE, UNIGRAM), strict=True)
    )
    (problem,) = problems_of(first, second, mode="base")
    assert "another family than that of a (other model type)" in problem
    assert problems_of(first, second) == []  # ids agree


def test_tokenizers_with_one_set_of_normal_tokens_may_be_written_in_other_ways():
    sides = [side("a", "x y", splitting=BPE), side("b", "x y <p>", added="<p>", splitting=UNIGRAM)]
    found = merged(*sides, mode="union")
    assert notes_of(found)[2:] == [
        "b: its tokenizer cuts text in another way than that of a (model type), which the result "
        "has"
    ]


def test_tokenizers_of_unknown_kind_are_of_one_family_if_they_share_half_of_their_tokens():
    first = side("a", "p q r s")
    assert problems_of(first, side("b", "s r x y"), mode="base") == []
    assert problems_of(first, side("b", "s v x y w"), mode="base") == [
        "b: its tokenizer is of another family than that of a (1 of its 5 tokens in common), so "
        "the same text has other tokens. Merge models of one family"
    ]
    assert problems_of(first, side("b", "q"), mode="base") == []


def test_other_merge_rules_are_noted():
    found = merged(side("a", "x y", merges="1"), side("b", "x y", merges="2"), side("c", "x y"))
    assert notes_of(found) == ["b: its tokenizer has other merge rules than that of a"]


@pytest.mark.parametrize("mode", ["min", "union"])
def test_a_token_that_is_special_in_only_one_model_is_noted(mode):
    first = side("a", "x <s> <t> <u>", added="<s>", special="<t> <u>")
    second = side("b", "<s> x <t> <u>" if mode == "union" else "x <s> <t> <u>", special="<s> <u>")
    found = merged(first, second, mode=mode)
    assert notes_of(found) == [
        "b: 2 tokens special in the result but not there, or the other way round: '<s>', '<t>'"
    ]


def test_a_new_token_that_its_owners_flag_differently_is_noted():
    sides = [side("a", "x"), side("b", "x <p>", special="<p>"), side("c", "<p> x", added="<p>")]
    found = merged(*sides, mode="union")
    assert found.added[0]["special"] is True
    assert notes_of(found)[2:] == [
        "c: 1 token special in the result but not there, or the other way round: '<p>'"
    ]


# Tokenizers that are missing, or do not fit their rows


def test_without_any_tokenizer_ids_are_taken_to_agree():
    sides = [side("a", None, rows=4), side("b", None, rows=3)]
    for mode, rows in [("min", 3), ("max", 4), ("base", 4), ("model:b", 3)]:
        found = merged(*sides, mode=mode, donor=int(mode == "model:b"))
        assert (found.rows, found.tokens, found.cut) == (rows, {}, False)
        assert found.assumption == (
            "no tokenizer files in a, b: token ids are taken to mean the same in all models"
        )
    assert rows_of(merged(*sides, mode="max")) == [[0, 1, 2, 3], [0, 1, 2, None]]
    assert problems_of(*sides, mode="union") == [
        "vocabulary 'union' matches tokens by their strings, but no model has tokenizer files. "
        "Use 'min' or 'max', or add the tokenizers to the folders"
    ]


def test_a_model_without_tokenizer_is_read_by_that_of_the_donor_as_far_as_it_has_rows():
    sides = [side("a", None, rows=2), side("b", "x y <p>", added="<p>"), side("c", "<p> x")]
    found = merged(*sides, mode="union")
    assert (found.donor, words_of(found)) == (1, "x y <p>")
    assert rows_of(found) == [[0, 1, None], [0, 1, 2], [1, None, 0]]
    assert found.assumption == (
        "no tokenizer files in a: token ids are taken to mean the same as in b"
    )
    assert merged(side("a", None, rows=2)).assumption is None


@pytest.mark.parametrize("mode", ["min", "union", "base"])
def test_a_chosen_donor_without_tokenizer_is_a_problem_where_another_has_one(mode):
    sides = [side("a", None, rows=2), side("b", "x y"), side("b", "x y")]
    assert problems_of(*sides, mode=mode, donor=0) == [
        "a: no tokenizer files, so the result cannot have its tokens. Add them, or choose a model "
        "that has some with vocabulary 'model:<name>' or tokenizer_source: b"
    ]


def test_tokens_beyond_the_rows_of_a_model_are_not_its_tokens():
    sides = [side("a", "x y <p>", rows=2), side("b", "x y <p> <q>", rows=3, added="<p> <q>")]
    found = merged(*sides, mode="union")
    assert (words_of(found), rows_of(found)) == ("x y <p>", [[0, 1, None], [0, 1, 2]])
    assert notes_of(found)[1:] == [
        "a: its tokenizer has 1 token beyond its 2 rows: '<p>'",
        "b: its tokenizer has 1 token beyond its 3 rows: '<q>'",
    ]
    for mode in ("error", "min"):
        found = merged(sides[0], sides[0], mode=mode)
        assert (found.rows, words_of(found), found.cut, found.row_map) == (2, "x y", True, None)


def test_a_token_that_no_model_has_a_row_for_gets_one_in_base_and_union():
    found = merged(side("a", "x y <p>", rows=2), side("b", "x y", rows=2), mode="base", donor=0)
    assert (found.rows, rows_of(found)) == (3, [[0, 1, None]] * 2)
    assert found.row_map.fills == {2: None}


def test_added_tokens_cannot_follow_ids_with_a_gap():
    sides = [side("a", "x _ y"), side("b", "x y <p>", added="<p>")]
    assert problems_of(*sides, mode="union") == [
        "a: no token has the id 1, so that loaders would give added tokens other ids than rows. "
        "Use vocabulary 'base', or the tokenizer of another model (tokenizer_source)"
    ]
    assert problems_of(*sides, mode="base") == []
    assert problems_of(sides[0], side("b", "y x _"), mode="union") == []


def test_a_row_goes_by_its_number_only_where_it_is_padding_in_the_model_too():
    found = merged(side("a", "x y", rows=4), side("b", "y x z", rows=4), mode="base", donor=0)
    assert rows_of(found) == [[0, 1, 2, 3], [1, 0, None, 3]]
    assert found.row_map.fills == {2: (Piece(0, 2),)}


def test_a_model_that_stands_twice_is_counted_once():
    base, tuned = side("a", "x"), side("b", "x <p>", added="<p>")
    found = merged(base, tuned, tuned, mode="union")
    assert found.changes == {"a": {"filled": 1}}
    assert found.row_map.fills == {1: (Piece(1, 1, 0.5), Piece(2, 1, 0.5))}
    assert merged(base, base).row_map is None


# Which model is meant


@pytest.mark.parametrize(
    ("name", "labels", "index"),
    [
        ("m/b", ["m/a", "m/b"], 1),
        ("b", ["m/a", "m/b"], 1),
        ("m/b/", ["m/a", "./m/b"], 1),
        ("b", ["m/b", "m/b"], 0),
        ("b", ["m/b", "n/b"], None),
        ("c", ["m/a", "m/b"], None),
        ("base", ["m/a", "m/b"], 0),
        ("base", ["m/a", "m/base"], 1),
        ("base", ["m/a", "base"], 1),
        ("base", ["a", "m/base", "n/base"], None),
        (5, ["a"], None),
        ("", ["a"], None),
    ],
)
def test_a_model_is_meant_by_its_name_its_last_part_or_as_the_base(name, labels, index):
    assert model_index(name, labels) == index


@pytest.mark.parametrize(
    ("mode", "tokenizer_source", "donor"),
    [
        ("min", None, None),
        ("union", "b", 1),
        ("base", None, 0),
        ("base", "a", 0),
        ("model:b", None, 1),
        ("model:b", "m/b", 1),
    ],
)
def test_the_donor_is_who_is_named(mode, tokenizer_source, donor):
    settings = VocabularySettings(mode=mode)
    assert chosen_donor(["m/a", "m/b"], settings, tokenizer_source) == (donor, [])


def test_mode_base_is_the_first_model_whatever_the_others_are_called():
    assert chosen_donor(["m/a", "base"], VocabularySettings(mode="base"), None) == (0, [])


def test_a_donor_who_is_no_model_is_a_problem():
    _, problems = chosen_donor(["a", "b"], VocabularySettings(mode="model:z"), "")
    assert problems == [
        "vocabulary: 'z' is none of the models: a, b",
        "tokenizer_source: '' is none of the models: a, b",
    ]


@pytest.mark.parametrize("mode", ["base", "model:a"])
def test_two_different_donors_are_a_problem(mode):
    _, problems = chosen_donor(["a", "b"], VocabularySettings(mode=mode), "b")
    assert problems == [
        f"vocabulary {mode!r} takes the tokens of a, but tokenizer_source is 'b'. Use vocabulary "
        "'model:b', or leave tokenizer_source out"
    ]


# Settings


def test_the_default_settings_are_sound_and_a_mode_alone_makes_settings():
    assert settings_problems(VocabularySettings()) == []
    assert vocabulary_settings("union") == VocabularySettings(mode="union")
    settings = VocabularySettings(mode="max")
    assert vocabulary_settings(settings) is settings


MODES = "vocabulary must be one of error, min, max, union, base, truncate, pad or model:<name>, got"
SOURCE = (
    "Expected a string and a TokenSource of a model (its token or token_id, not both), or of none "
    "for a row of zeros"
)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "cut"}, f"{MODES} 'cut'"),
        ({"mode": "model:"}, f"{MODES} 'model:'"),
        ({"mode": None}, f"{MODES} None"),
        ({"mode": ["union"]}, f"{MODES} ['union']"),
        ({"union_tokens": "some"}, "union_tokens must be one of added, all, got 'some'"),
        ({"union_tokens": ["all"]}, "union_tokens must be one of added, all, got ['all']"),
        ({"union_tokens": {}}, "union_tokens must be one of added, all, got {}"),
        ({"missing_row": 0}, "missing_row must be one of mean, zero, got 0"),
        ({"new_row": None}, "new_row must be one of donor, scaled, got None"),
        ({"linear_missing": 1}, "linear_missing must be one of fill, renormalise, got 1"),
        ({"tie": True}, "tie must be one of auto, base, got True"),
        *(
            (
                {"pad_to_multiple_of": value},
                f"pad_to_multiple_of must be a whole number above 0, got {value!r}",
            )
            for value in (True, 0, -64, 64.0, "64")
        ),
        *(
            ({"id_alias": value}, f"id_alias must be a list of token ids, got {value!r}")
            for value in (5, None, "12", [True], (-1,), [1, "2"], {3})
        ),
        ({"tokens": ["<p>"]}, "tokens must map each token to its source, got ['<p>']"),
        ({"tokens": None}, "tokens must map each token to its source, got None"),
        ({"tokens": {"<p>": "a"}}, f"tokens: '<p>' has the source 'a'. {SOURCE}"),
        ({"tokens": {3: TokenSource()}}, f"tokens: 3 has the source {TokenSource()!r}. {SOURCE}"),
    ],
)
def test_settings_of_any_type_get_a_text(settings, text):
    assert settings_problems(VocabularySettings(**settings)) == [text]
    assert chosen_donor(["a"], VocabularySettings(**settings), None)[1] in ([], [text]) or (
        settings["mode"] == "model:"
    )


@pytest.mark.parametrize(
    "source",
    [
        TokenSource(model="a", token="x", token_id=1),
        TokenSource(token="x"),
        TokenSource(token_id=1),
        TokenSource(model=None),
        TokenSource(model="a", token=1),
        TokenSource(model="a", token_id=True),
        TokenSource(model="a", token_id=-1),
        TokenSource(model="a", force="yes"),
    ],
)
def test_a_source_that_says_too_much_or_the_wrong_type_is_a_problem(source):
    (problem,) = settings_problems(VocabularySettings(tokens={"<p>": source}))
    assert problem == f"tokens: '<p>' has the source {source!r}. {SOURCE}"


def test_settings_that_have_no_effect_are_noted():
    sides = [side("a", "x y"), side("b", "x y")]
    settings = {"union_tokens": "all", "new_row": "scaled", "linear_missing": "renormalise"}
    assert notes_of(merged(*sides, has_base=False, **settings)) == [
        "union_tokens 'all' has no effect: vocabulary is not 'union'",
        "new_row 'scaled' has no effect: there is no base",
        "linear_missing 'renormalise' has no effect: this is no linear merge with normalize",
    ]
    weighted = {"has_base": False, "weights": [1.0, 1.0], "linear_missing": "renormalise"}
    assert notes_of(merged(*sides, **weighted)) == []
    assert notes_of(merged(*sides, new_row="scaled", mode="union", union_tokens="all")) == []


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("m/a", TokenSource(model="m/a")),
        ({"source": "a"}, TokenSource(model="a")),
        ({"source": "a", "force": True}, TokenSource(model="a", force=True)),
        ({"kind": "zero"}, TokenSource()),
        ({"source": {"kind": "zero"}, "force": True}, TokenSource(force=True)),
        ({"kind": "model_token", "model": "a"}, TokenSource(model="a")),
        (
            {"source": {"kind": "model_token", "model": "a", "token": "<x>"}},
            TokenSource(model="a", token="<x>"),
        ),
        (
            {"source": {"kind": "model_token", "model": "a", "token_id": 0}},
            TokenSource(model="a", token_id=0),
        ),
    ],
)
def test_sources_are_read_as_mergekit_writes_them(entry, source):
    assert token_source("<p>", entry) == source


@pytest.mark.parametrize(
    "entry",
    [
        *(None, "", 5, [], {}, {"source": None}, {"source": ""}, {"kind": []}, {"kind": "mean"}),
        *({"source": "a", "force": "false"}, {"source": "a", "other": 1}),
        *({"kind": "zero", "model": "a"}, {"kind": "model_token"}),
        *({"kind": "model_token", "model": ""}, {"kind": "model_token", "model": ["a"]}),
        {"kind": "model_token", "model": "a", "token": "<x>", "token_id": 1},
        {"kind": "model_token", "model": "a", "token": 1},
        {"kind": "model_token", "model": "a", "token_id": "1"},
        {"kind": "model_token", "model": "a", "token_id": True},
        {"kind": "model_token", "model": "a", "token_id": -1},
    ],
)
def test_a_source_that_is_none_is_refused_with_what_is_expected(entry):
    with pytest.raises(ValueError, match="tokens: '<p>' has the source") as caught:
        token_source("<p>", entry)
    assert str(caught.value) == (
        f"tokens: '<p>' has the source {entry!r}. Expected a model, or "
        '{"source": MODEL or {"kind": "zero"} or {"kind": "model_token", "model": MODEL, '
        '"token" or "token_id": ...}, "force": true or false}'
    )


# Any vocabularies

NAMES = [*"abcdefg", "<p>", "<q>", "<r>"]


@st.composite
def random_sides(draw):
    """A model with tokens under any ids, more or fewer rows, or without a tokenizer."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=8))
    ids = draw(st.lists(st.integers(0, 9), unique=True, min_size=len(names), max_size=len(names)))
    tokens = dict(zip(ids, names, strict=True))
    added = {
        token: added_token(row, token, {"special": draw(st.booleans())})
        for row, token in tokens.items()
        if token.startswith("<")
    }
    has_tokenizer = draw(st.integers(0, 5)) > 0
    rows = draw(st.integers(1, 12))
    return Side("m", rows, TokenTable(tokens, added) if has_tokenizer else None)


def by_strings(sides, donor):
    """By model, its rows by string and the rows that are no token."""
    first = sides[donor].table or TokenTable({}, {})
    found = []
    for each in sides:
        own = (each.table or first).tokens.items()
        ids = {token: row for row, token in own if row < each.rows}
        found.append((ids, set(range(each.rows)) - set(ids.values())))
    return found


@given(
    st.lists(random_sides(), min_size=1, max_size=4),
    st.sampled_from(["error", "min", "max", "union", "base"]),
    st.sampled_from(["added", "all"]),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
)
def test_every_row_is_that_of_the_same_string_for_every_model(
    sides, mode, union_tokens, multiple, has_base
):
    sides = [replace(each, label=f"m{index}") for index, each in enumerate(sides)]
    settings = VocabularySettings(mode=mode, union_tokens=union_tokens, pad_to_multiple_of=multiple)
    found, _ = merge_vocabularies(sides, settings, has_base=has_base)
    rows, tokens = found.rows, found.tokens
    maps = [list(range(rows))] * len(sides)
    if found.row_map is not None:
        maps = found.row_map.rows.tolist()
    for own, (ids, padding) in zip(maps, by_strings(sides, found.donor), strict=True):
        for row in range(rows):
            right = ids.get(tokens[row]) if row in tokens else row if row in padding else None
            assert own[row] == (MISSING if right is None else right)
    fills = {} if found.row_map is None else found.row_map.fills
    assert set(fills) == {row for row in range(rows) if MISSING in [own[row] for own in maps]}
    for row, fill in fills.items():
        owners = [(model, own[row]) for model, own in enumerate(maps) if own[row] != MISSING]
        if has_base and owners and owners[0][0] == 0:
            owners = owners[:1]
        expected = tuple(Piece(*owner, 1 / len(owners)) for owner in owners)
        assert fill == (expected or None)


@given(st.lists(random_sides(), min_size=1, max_size=4), st.sampled_from(["added", "all"]))
def test_a_union_keeps_every_token_that_has_a_row_and_the_ids_of_the_donor(sides, union_tokens):
    settings = VocabularySettings(mode="union", union_tokens=union_tokens)
    found, _ = merge_vocabularies(sides, settings)
    donor = sides[found.donor].table or TokenTable({}, {})
    assert {row: found.tokens.get(row) for row in donor.tokens} == dict(donor.tokens)
    expected = list(donor.tokens.values())
    for each in sides:
        own = {} if each.table is None else each.table.tokens
        for row in sorted(own):
            wanted = union_tokens == "all" or own[row].startswith("<")
            if wanted and row < each.rows and own[row] not in expected:
                expected.append(own[row])
    new = expected[len(donor.tokens) :]
    assert [entry["content"] for entry in found.added] == new
    assert [found.tokens[donor.length + place] for place in range(len(new))] == new
    assert len(found.tokens) == len(expected)
    assert found.rows == max(donor.length + len(new), sides[found.donor].rows)


@given(st.lists(random_sides(), min_size=2, max_size=4), st.sampled_from(["min", "max"]))
def test_ids_are_refused_where_a_string_has_two_ids_or_an_id_two_strings(sides, mode):
    sides = [replace(each, label=f"m{index}") for index, each in enumerate(sides)]
    found, problems = merge_vocabularies(sides, VocabularySettings(mode=mode))
    first = sides[found.donor]
    donor = first.table or TokenTable({}, {})
    expected = set()
    for each in sides:
        own = donor if each.table is None else each.table
        limit = min(first.rows, each.rows, found.rows)
        for row, token in donor.tokens.items():
            other_string = own.tokens.get(row, token) != token
            other_id = token in own.ids and own.ids[token] != row
            if row < limit and each.table is not None and (other_string or other_id):
                expected.add(each.label)
    named = {problem.split(":")[0] for problem in problems}
    assert named == expected
    assert all("something else" in text or "another family" in text for text in problems)


@given(st.lists(random_sides(), min_size=1, max_size=4))
def test_tokens_that_are_lost_are_counted(sides):
    sides = [replace(each, label=f"m{index}") for index, each in enumerate(sides)]
    for mode in ("min", "max", "union", "base"):
        found, _ = merge_vocabularies(sides, VocabularySettings(mode=mode))
        for each in sides:
            own = {} if each.table is None else each.table.tokens
            kept = set(found.tokens.values())
            lost = [own[row] for row in sorted(own) if row < each.rows and own[row] not in kept]
            notes = [note for note in found.notes if f"{each.label}: " in note and "not in" in note]
            assert len(notes) == bool(lost)
            if lost:
                count = f"{len(lost)} token{'s' * (len(lost) > 1)} not in the result: "
                assert notes[0].startswith(f"{each.label}: {count}{lost[0]!r}")


def test_changes_count_rows_cut_moved_and_filled():
    found = merged(side("a", "x y z", rows=4), side("b", "z x", rows=2), mode="base", donor=0)
    assert rows_of(found) == [[0, 1, 2, 3], [1, None, 0, None]]
    assert found.changes == {"b": {"moved": 2, "filled": 2}}
    assert isinstance(found.changes["b"]["moved"], int)
    assert found.row_map.rows.dtype == np.int64


def test_a_row_that_no_model_has_is_a_mean_also_where_new_tokens_arrive_scaled():
    settings = {"pad_to_multiple_of": 4, "new_row": "scaled"}
    found = merged(
        side("a", "x y"), side("b", "x y z"), mode="union", union_tokens="all", **settings
    )
    assert (found.row_map.fills[2], found.row_map.fills[3]) == ((), None)
