"""Merging into a transformers model, and the four snippets that notebooks are written from."""

import importlib
import inspect
import json

import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors
from tiny_tokenizers import NORMAL, write_byte_level, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from dare_llama import dare_merge_llama
from dare_utils import DARE
from linear_llama import linear_merge_llama
from linear_utils import task_arithmetic
from merge_methods import METHODS
from model_errors import ModelCompatibilityError
from model_prep import prepare_models_for_merging
from model_utils import get_llama
from model_vocabulary import VocabularySettings
from slerp_llama import slerp_merge_llama
from task_arithmetic_llama import (
    task_arithmetic_merge_llama,
    task_arithmetic_merge_llama_to_folder,
)
from ties_llama import ties_merge_llama, ties_merge_llama_to_folder
from ties_utils import TIES, ties

SMALL = {"layers": 1, "hidden_size": 16, "intermediate_size": 24}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_family(folder, *, sizes=(48, 48, 48), tied=(False,) * 3, names=("base", "a", "b")):
    paths = [folder / name for name in names]
    for seed, (path, size, head_tied) in enumerate(zip(paths, sizes, tied, strict=True), 1):
        before = paths[0] if seed > 1 else None
        make_llama(path, seed=seed, base=before, vocab_size=size, tied=head_tied, **SMALL)
    return paths


CALLS = {
    "linear": lambda base, models: linear_merge_llama(models, [0.5, 0.4], progress=False),
    "slerp": lambda base, models: slerp_merge_llama(models, 0.3, progress=False),
    "task_arithmetic": lambda base, models: task_arithmetic_merge_llama(
        base, models, lam=0.5, progress=False
    ),
    "ties": lambda base, models: ties_merge_llama(
        base, models, [0.5, 0.4], [0.5, 0.3], progress=False
    ),
    "dare": lambda base, models: dare_merge_llama(
        base, models, densities=[0.5, 0.3], seed=3, progress=False
    ),
}
PARAMETERS = {
    "linear": {"weights": [0.5, 0.4]},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"lam": 0.5},
    "ties": {"weights": [0.5, 0.4], "densities": [0.5, 0.3]},
    "dare": {"densities": [0.5, 0.3], "seed": 3},
}


@pytest.mark.parametrize("method", CALLS)
def test_a_model_in_memory_holds_what_the_folder_holds(tmp_path, method):
    base, *models = make_family(tmp_path)
    merged = CALLS[method](base, models)
    to_folder = getattr(
        importlib.import_module(f"{method}_llama"), f"{method}_merge_llama_to_folder"
    )
    sources = {"base_model_path": base} if METHODS[method].base == "required" else {}
    to_folder(
        **sources, ft_model_paths=models, output_dir=tmp_path / "out", dtype="float32",
        progress=False, **PARAMETERS[method],
    )  # fmt: skip
    in_memory, stored = merged.state_dict(), read_tensors(tmp_path / "out")
    assert in_memory.keys() == stored.keys()
    assert all(torch.equal(in_memory[name], stored[name]) for name in stored)
    assert {(p.dtype, p.device.type) for p in merged.parameters()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_both_functions_take_the_same_arguments_in_the_same_order(method):
    module = importlib.import_module(f"{method}_llama")
    memory = inspect.signature(getattr(module, f"{method}_merge_llama")).parameters
    folder = inspect.signature(getattr(module, f"{method}_merge_llama_to_folder")).parameters
    shared = [name for name in folder if name not in FOLDER_ONLY]
    assert shared == list(memory)
    assert [folder[name].default for name in shared] == [p.default for p in memory.values()]
    for parameter in METHODS[method].parameters:
        assert memory[parameter.name].default is None  # stands for the profile's


FOLDER_ONLY = ("output_dir", "dtype", "chat_template", "max_shard_size", "findings", "resume")
CUT = "vocabularies cut to the smallest, 40 rows"
MIXED = "some models tie their head"


def test_a_smaller_vocabulary_in_memory(tmp_path):
    base, *models = make_family(tmp_path, sizes=(40, 48, 44))
    with pytest.warns(UserWarning, match=CUT):
        merged = ties_merge_llama(base, models, progress=False)
    assert merged.config.vocab_size == 40
    assert merged.get_input_embeddings().weight.shape == (40, 16)
    assert merged.lm_head.weight.shape == (40, 16)
    merged.save_pretrained(tmp_path / "out")
    assert get_llama(tmp_path / "out").lm_head.weight.shape == (40, 16)


def test_a_base_with_the_larger_vocabulary_in_memory(tmp_path):
    base, *models = make_family(tmp_path, sizes=(48, 40, 44))
    with pytest.warns(UserWarning, match=CUT):
        merged = ties_merge_llama(base, models, progress=False)
    assert merged.config.vocab_size == 40
    assert merged(torch.tensor([[3, 4]])).logits.shape == (1, 2, 40)


def test_tied_and_untied_models_in_memory_give_an_untied_one_that_stays_so(tmp_path):
    base, *models = make_family(tmp_path, tied=(True, False, True))
    with pytest.warns(UserWarning, match=MIXED):
        merged = ties_merge_llama(base, models, lam=0.7, progress=False)
    ties_merge_llama_to_folder(
        base, models, lam=0.7, output_dir=tmp_path / "out", dtype="float32", progress=False
    )
    stored = read_tensors(tmp_path / "out")
    merged.save_pretrained(tmp_path / "saved")
    again = get_llama(tmp_path / "saved")
    assert again.config.tie_word_embeddings is False
    for model in (merged, again, get_llama(tmp_path / "out")):
        assert torch.equal(model.lm_head.weight, stored[HEAD])
        assert torch.equal(model.get_input_embeddings().weight, stored[EMBEDDING])
    assert not torch.equal(stored[HEAD], stored[EMBEDDING])


def test_a_head_that_a_tied_model_stores_and_does_not_use_is_left_out(tmp_path):
    folder = make_llama(tmp_path / "m", tied=True, extra={HEAD: torch.ones(48, 16)}, **SMALL)
    with pytest.warns(UserWarning, match=r"its stored lm_head\.weight is not used"):
        merged = linear_merge_llama([folder, folder], progress=False)
    embedding = read_tensors(folder)[EMBEDDING].float()
    assert torch.equal(merged.lm_head.weight, embedding)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)


def test_dare_parameter_by_parameter_is_the_merge_in_memory(tmp_path):
    paths = make_family(tmp_path)
    base, ft1, ft2 = (get_llama(path) for path in paths)
    base, [ft1, ft2] = prepare_models_for_merging(base, [ft1, ft2])
    tuned = [dict(model.named_parameters()) for model in (ft1, ft2)]
    for name, parameter in base.named_parameters():
        others = [parameters[name] for parameters in tuned]
        parameter.data = DARE().merge([0.5, 0.4], parameter, others, [0.5, 0.3], seed=1, name=name)
    merged = dare_merge_llama(paths[0], paths[1:], [0.5, 0.4], [0.5, 0.3], seed=1, progress=False)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor)


@pytest.mark.parametrize("method", [TIES(), DARE()])
def test_packed_parameters_are_refused(method):
    packed = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"must be float tensors, got torch\.int8"):
        method.merge([1.0], torch.zeros(3), [packed], [1.0])


# What notebooks do


def load_for_inference(folder):
    """As on a GPU, as far as this machine goes."""
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), torch_dtype=torch.float16, device_map="auto"
    )
    assert model.dtype == torch.float16
    tokens = model.generate(
        torch.tensor([[1, 5, 6]], device=model.device), max_new_tokens=5, do_sample=False
    )
    assert tokens.shape[1] > 3
    return model


def test_a_result_in_memory_can_be_asked(tmp_path):
    """Also where its generation config says that transformers made it from a config."""
    base, *models = make_family(tmp_path)
    entries = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    for folder in (base, *models):
        (folder / "generation_config.json").write_text(json.dumps(entries))
    merged = linear_merge_llama(models, progress=False)
    assert merged.generation_config.eos_token_id == 2
    tokens = merged.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=5, do_sample=False)
    assert tokens.shape[1] > 3


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_merge_save_and_load_in_float16(tmp_path):
    base, *models = make_family(tmp_path)
    merged = ties_merge_llama(
        base_model_path=str(base),
        ft_model_paths=[str(model) for model in models],
        weights=[0.5, 0.5],
        densities=[1.0, 1.0],
        device="cpu",
    )
    merged.save_pretrained(str(tmp_path / "merged_model"))
    loaded = load_for_inference(tmp_path / "merged_model").state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(loaded[name].cpu(), tensor.half())


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_kaggle_paths(tmp_path):
    nested = ("llama-3.2/transformers/1b-instruct/1", "model-1/finetuned", "model-2/finetuned")
    make_family(tmp_path, names=nested)
    merged = ties_merge_llama(
        base_model_path=f"{tmp_path}/llama-3.2",
        ft_model_paths=[f"{tmp_path}/model-1", f"{tmp_path}/model-2/finetuned"],
        weights=[0.5, 0.5],
        densities=[1.0, 1.0],
        device="cpu",
    )
    merged.save_pretrained(f"{tmp_path}/working/merged_model")
    load_for_inference(tmp_path / "working/merged_model")


def test_preparing_and_merging_by_hand(tmp_path):
    base, ft1, ft2 = (
        get_llama(str(path), device="cpu") for path in make_family(tmp_path, sizes=(48, 40, 44))
    )
    with pytest.warns(UserWarning, match=CUT):
        base, [ft1, ft2] = prepare_models_for_merging(base, [ft1, ft2])
    assert base.config.vocab_size == ft1.config.vocab_size == 40
    assert base.lm_head.weight.shape[0] == ft1.lm_head.weight.shape[0] == 40
    for _, module in base.named_modules():
        assert "bitsandbytes" not in module.__class__.__module__
    method = TIES()
    parameters = [dict(model.named_parameters()) for model in (base, ft1, ft2)]
    with torch.no_grad():
        for name, base_parameter in parameters[0].items():
            tuned = [parameters[1][name], parameters[2][name]]
            merged = method.merge([0.5, 0.5], base_parameter, tuned, [0.5, 0.5], "cpu")
            assert torch.equal(merged, ties(base_parameter, tuned, [0.5, 0.5], [0.5, 0.5]))
            base_parameter.copy_(merged)
    assert base(torch.tensor([[1, 2]])).logits.shape == (1, 2, 40)


# Vocabularies matched by their strings

BASE, TUNED = ("<|b|>", "<|e|>", "<|spare|>"), ("<|spare|>", "<|e|>", "<|tool|>", "<|b|>")


def make_strangers(folder):
    """A base and a fine-tune with the same added tokens under other ids, and one more."""
    paths = [folder / "base", folder / "tuned"]
    for seed, (path, tokens) in enumerate(zip(paths, (BASE, TUNED), strict=True)):
        size = NORMAL + len(tokens)
        before = paths[0] if seed else None
        make_llama(path, seed=seed, base=before, vocab_size=size, dtype="float32", **SMALL)
        ids = write_byte_level(path, tokens, bos="<|b|>", eos="<|e|>")
        for name in ("config.json", "generation_config.json"):
            config = json.loads((path / name).read_text())
            special = {"bos_token_id": ids["<|b|>"], "eos_token_id": ids["<|e|>"]}
            write_json(path / name, config | special)
    return paths


@pytest.mark.parametrize("vocabulary", ["union", "base", "model:tuned"])
def test_any_vocabulary_in_memory_is_that_of_the_folder(tmp_path, vocabulary):
    base, tuned = make_strangers(tmp_path)
    arguments = {"densities": [0.5], "vocabulary": vocabulary, "progress": False}
    with pytest.warns(UserWarning, match="vocabulary of|not in the result"):
        merged = ties_merge_llama(base, [tuned], **arguments)
    ties_merge_llama_to_folder(base, [tuned], output_dir=tmp_path / "out", **arguments)
    stored = read_tensors(tmp_path / "out")
    assert merged.state_dict().keys() == stored.keys()
    assert all(torch.equal(merged.state_dict()[name], stored[name]) for name in stored)
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key in ("vocab_size", "bos_token_id", "eos_token_id"):
        assert getattr(merged.config, key) == config[key]
    assert merged.generation_config.bos_token_id == config["bos_token_id"]


@pytest.mark.parametrize("vocabulary", ["union", "base", "model:ft_models[0]"])
@pytest.mark.parametrize("given", ["folders they come from", "folders", "tokenizers"])
def test_models_in_memory_are_prepared_as_folders_are_merged(tmp_path, vocabulary, given):
    paths = make_strangers(tmp_path)
    base, tuned = map(get_llama, paths)
    tokenizers = {"folders": paths, "tokenizers": [*map(AutoTokenizer.from_pretrained, paths)]}
    if given != "folders they come from":
        base.name_or_path = tuned.name_or_path = ""
    with pytest.warns(UserWarning, match="vocabulary of|not in the result"):
        prepare_models_for_merging(
            base, [tuned], vocabulary=vocabulary, tokenizers=tokenizers.get(given)
        )
    folder_name = vocabulary.replace("ft_models[0]", "tuned")
    task_arithmetic_merge_llama_to_folder(
        *(paths[0], paths[1:], [0.5]),
        output_dir=tmp_path / "out", vocabulary=folder_name, progress=False,
    )  # fmt: skip
    tuned_state = tuned.state_dict()
    for name, tensor in read_tensors(tmp_path / "out").items():
        mine = task_arithmetic(base.state_dict()[name], [tuned_state[name]], [0.5])
        assert torch.equal(mine, tensor)
    config = json.loads((tmp_path / "out/config.json").read_text())
    for model in (base, tuned):
        assert model.config.vocab_size == config["vocab_size"]
        assert model.config.eos_token_id == config["eos_token_id"]


def test_ids_that_contradict_each_other_are_refused_in_memory_too(tmp_path):
    base, tuned = map(get_llama, make_strangers(tmp_path))
    with pytest.raises(ModelCompatibilityError) as caught:
        prepare_models_for_merging(base, [tuned])
    assert "2 token ids mean something else than in base" in str(caught.value)
    assert "300 is '<|spare|>', not '<|b|>'" in str(caught.value)
    with pytest.raises(ValueError, match="vocabulary must be one of error, min"):
        prepare_models_for_merging(base, [tuned], vocabulary="onion")
    with pytest.raises(ValueError, match="tokenizers: got 1 for 2 models"):
        prepare_models_for_merging(base, [tuned], tokenizers=[None])


def test_generation_in_memory_ends_where_that_of_the_folder_does(tmp_path):
    base, tuned = make_strangers(tmp_path)
    ends = {"eos_token_id": [301, 302], "temperature": 0.5, "do_sample": True}
    write_json(tuned / "generation_config.json", ends)
    with pytest.warns(UserWarning, match="tokenizer and special tokens of"):
        merged = ties_merge_llama(base, [tuned], vocabulary="model:tuned", progress=False)
    assert merged.generation_config.eos_token_id == [301, 302]
    assert merged.generation_config.temperature == 0.5
    base, tuned = map(get_llama, (base, tuned))
    with pytest.warns(UserWarning, match="tokenizer and special tokens of"):
        prepare_models_for_merging(base, [tuned], vocabulary="model:ft_models[0]")
    assert base.generation_config.eos_token_id == [301, 302]


def test_without_normalize_a_missing_row_is_filled_whatever_is_asked(tmp_path):
    paths = make_strangers(tmp_path)
    settings = VocabularySettings(mode="union", linear_missing="renormalise")
    for normalize, factor in ((True, 1.0), (False, 1.5)):
        with pytest.warns(UserWarning, match="1 token added"):
            merged = linear_merge_llama(
                paths, [0.75, 0.75], normalize=normalize, vocabulary=settings, progress=False
            )
        row = read_tensors(paths[1])[HEAD][NORMAL + 2]
        torch.testing.assert_close(merged.lm_head.weight[NORMAL + 3].detach(), factor * row)
