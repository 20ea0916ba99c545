"""Adapters of every kind, put on their bases: what PEFT 0.21.2 makes of the same folders.

The truth is the forward pass of the adapter on its base, not merged. PEFT's merge_and_unload gives
the same, but for the cases that name why it does not. With transformers 4 and with transformers 5.
"""

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft_adapters import CASES, AdapterCase, make_adapter, make_base, peft_folded, peft_logits
from tiny_checkpoints import read_tensors
from transformers import AutoModelForCausalLM

from lora_llama import lora_fold_llama, lora_fold_llama_to_folder
from model_verify import verify_folder

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))

ROUNDED = [case for case in CASES if case.base_dtype != "float32"]
WRONG = [case for case in CASES if case.peft_wrong]


@cache
def room() -> TemporaryDirectory[str]:
    """Where the cases lie while this process runs."""
    return TemporaryDirectory()


@cache
def folders(name: str) -> tuple[Path, Path]:
    """A case's base and adapter, made once."""
    case = next(each for each in CASES if each.name == name)
    place = Path(room().name) / name
    base, adapter = place / "base", place / "adapter"
    make_base(case, base)
    make_adapter(case, base, adapter)
    return base, adapter


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether values are as near as that share of the largest one."""
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {HEAD: tensors[EMBEDDING]} | tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folded_adapter_is_the_adapter(case: AdapterCase, tmp_path: Path) -> None:
    base, adapter = folders(case.name)
    out = tmp_path / "out"
    lora_fold_llama_to_folder(base, [adapter], out, dtype="float32", progress=False)
    assert not verify_folder(out).problems
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    assert close(logits, peft_logits(case, base, adapter, IDS), 3e-6)
    if not case.peft_wrong:
        found, folded = with_head(read_tensors(out)), peft_folded(case, base, adapter)
        assert found.keys() == folded.keys()
        assert all(close(found[name], folded[name], 3e-7) for name in folded)


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_where_peft_is_wrong_it_is_so_still(case: AdapterCase, tmp_path: Path) -> None:
    """Else the case belongs among the others."""
    base, adapter = folders(case.name)
    out = tmp_path / "out"
    lora_fold_llama_to_folder(base, [adapter], out, dtype="float32", progress=False)
    found, folded = with_head(read_tensors(out)), peft_folded(case, base, adapter)
    assert not all(close(found[name], folded[name], 1e-3) for name in folded)


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_shared_head_is_what_peft_makes_of_it(case: AdapterCase, tmp_path: Path) -> None:
    if "tokens" in case.name or "tying" in case.name:
        pytest.skip("PEFT changes a shared matrix twice, or by what comes last")
    base, adapter = folders(case.name)
    out = tmp_path / "out"
    settings = {"tied_lora": "shared", "dtype": "float32", "progress": False}
    lora_fold_llama_to_folder(base, [adapter], out, **settings)
    tensors = read_tensors(out)
    assert HEAD not in tensors
    assert close(tensors[EMBEDDING], peft_folded(case, base, adapter)[EMBEDDING], 3e-7)


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_pefts_rounding_can_be_had(case: AdapterCase, tmp_path: Path) -> None:
    base, adapter = folders(case.name)
    out = tmp_path / "out"
    settings = {"lora_rounding": "delta", "tied_lora": "shared", "progress": False}
    lora_fold_llama_to_folder(base, [adapter], out, **settings)
    found, folded = (
        with_head(read_tensors(out)),
        peft_folded(case, base, adapter, rounded=True),
    )
    same = sum(int((found[name] == folded[name]).sum()) for name in folded)
    assert same >= 0.999 * sum(each.numel() for each in folded.values())
    assert all(close(found[name].float(), folded[name].float(), 2**-7) for name in folded)


def test_the_cases_are_as_many_as_they_should_be() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert {case.family for case in CASES} == {"llama", "qwen2"}


@pytest.mark.parametrize("name", ["tied-embed", "larger-tied"])
def test_a_model_in_memory_is_that_of_the_folder(name: str, tmp_path: Path) -> None:
    base, adapter = folders(name)
    warned = pytest.warns(UserWarning, match="its head is no longer the embedding")
    with warned if name == "tied-embed" else nullcontext():
        model = lora_fold_llama(base, [adapter], progress=False)
    out = tmp_path / "out"
    lora_fold_llama_to_folder(base, [adapter], out, dtype="float32", progress=False)
    expected = with_head(read_tensors(out))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
