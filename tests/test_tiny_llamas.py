"""The tiny LLaMAs that the project ships: what they know, and what a merge of them knows."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_llamas.skills import COMPATIBLE, CONFLICTING, score
from linear_llama import linear_merge_llama_to_folder
from slerp_llama import slerp_merge_llama_to_folder
from task_arithmetic_llama import task_arithmetic_merge_llama_to_folder
from ties_llama import ties_merge_llama_to_folder

TINY = Path(__file__).resolve().parent.parent / "examples/tiny_llamas"
ALL = (*COMPATIBLE, *CONFLICTING)
NAMES = [skill.name for skill in COMPATIBLE]


@cache
def scores(folder):
    """Accuracy in every skill."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {skill.name: score(model, tokenizer, skill) for skill in ALL}


def test_the_base_knows_nothing():
    assert max(scores(TINY / "base").values()) <= 0.05


@pytest.mark.parametrize("name", [skill.name for skill in ALL])
def test_a_specialist_knows_its_own_table_only(name):
    found = dict(scores(TINY / name))
    assert found.pop(name) >= 0.95
    assert max(found.values()) <= 0.1


@pytest.mark.parametrize("name", ["base", *(skill.name for skill in ALL)])
def test_every_folder_is_small(name):
    assert sum(file.stat().st_size for file in (TINY / name).iterdir()) < 2_000_000


def test_ties_and_task_arithmetic_of_three_specialists_know_all_three_tables(tmp_path):
    models = [TINY / name for name in NAMES]
    base = TINY / "base"
    ties_merge_llama_to_folder(
        base, models, densities=[0.5] * 3, output_dir=tmp_path / "ties", progress=False
    )
    task_arithmetic_merge_llama_to_folder(
        base, models, lam=0.7, output_dir=tmp_path / "arithmetic", progress=False
    )
    for name in ("ties", "arithmetic"):
        found = scores(tmp_path / name)
        assert min(found[skill] for skill in NAMES) >= 0.8


def test_slerp_of_two_specialists_knows_their_two_tables(tmp_path):
    slerp_merge_llama_to_folder(
        [TINY / name for name in NAMES[:2]], output_dir=tmp_path / "out", progress=False
    )
    found = scores(tmp_path / "out")
    assert min(found[name] for name in NAMES[:2]) >= 0.8
    assert found[NAMES[2]] <= 0.1


def test_specialists_that_answer_the_same_questions_differently_cannot_both_be_kept(tmp_path):
    names = [skill.name for skill in CONFLICTING]
    linear_merge_llama_to_folder(
        [TINY / name for name in names], output_dir=tmp_path / "out", progress=False
    )
    found = scores(tmp_path / "out")
    assert sum(found[name] for name in names) <= 1
