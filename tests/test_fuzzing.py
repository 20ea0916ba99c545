"""A few hundred cases of each fuzzing campaign; `python tests/fuzzing.py` runs all of them."""

import json
import random

import fuzzing
import pytest


@pytest.mark.parametrize(("campaign", "count"), {"parsers": 500, "differential": 3000}.items())
def test_what_strangers_write_is_read_or_refused(campaign, count):
    outcome = fuzzing.run_cases(campaign, 0, count)
    assert outcome.failures == {}
    assert outcome.counts.total() == count


def test_merges_of_broken_folders_are_right_or_refused():
    outcome = fuzzing.run_cases("folders", 0, 80)
    assert outcome.failures == {}
    ended = {kind.rpartition(" ")[2] for kind in outcome.counts}
    assert ended == {"merged", "refused"}


def test_what_is_found_counts_as_a_failure(monkeypatch):
    monkeypatch.setattr(fuzzing, "REASONS", ("x",) * len(fuzzing.STRICTER))
    failures = fuzzing.run_cases("differential", 0, 300).failures
    assert any("refused, but accepted by the library" in where for where in failures)


def test_a_wrong_value_is_seen(tmp_path):
    base = fuzzing.make_llama(tmp_path / "base", **fuzzing.SIZES)
    wanted = fuzzing.expected("linear", [base, base])
    found = fuzzing.weights_of(base)
    fuzzing.check_result(found, wanted)
    found["model.norm.weight"][3] *= 1.01
    with pytest.raises(fuzzing.BrokenPromiseError, match=r"model.norm.weight at \(3,\)"):
        fuzzing.check_result(found, wanted)


def test_cases_follow_from_their_seeds():
    document = json.dumps({"a": [1, 2, {"b": "c"}], "d": None}).encode()
    for seed in range(50):
        one, two = (fuzzing.broken(document, random.Random(seed), [document]) for _ in range(2))
        assert one == two
