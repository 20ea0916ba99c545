"""Whether models fit together: folders by their headers, and models in memory."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import make_config, make_llama, read_tensors, tensor_shapes

from model_checks import ModelDescription, is_tied
from model_errors import ModelCompatibilityError
from model_prep import align, describe, prepare_models_for_merging
from model_safetensors import TensorInfo
from model_utils import get_llama, open_model_folder
from model_vocabulary import VocabularySettings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
FAMILY = ["llama", "mistral", "qwen2", "qwen3"]
ADVICE = "Merging needs float weights; use the original checkpoint"
ASSUMED = "token ids are taken to mean the same in all models"
MIXED = "some models tie their head to the embedding, some do not: the result does not"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """So that errors call a model "a", not by a long path."""
    monkeypatch.chdir(tmp_path)


def folder(name="a", **options):
    return make_llama(Path(name), **options)


def in_memory(name="a", **options):
    return get_llama(folder(name, tokenizer=True, **options))


def description(label="a", vocab_size=48, tied=False, drop=()):
    """A model of one layer that exists nowhere."""
    config = make_config("llama", vocab_size, 8, 12, 1)
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    shapes = tensor_shapes(config).items()
    tensors = {name: TensorInfo("BF16", shape) for name, shape in shapes if name not in drop}
    return ModelDescription(label, config, tensors)


def align_folders(*folders):
    with ExitStack() as stack:
        return align([stack.enter_context(open_model_folder(path)) for path in folders])


def notes_of(alignment):
    """All but the one that every alignment of folders without tokenizers has."""
    assumed = [note for note in alignment.notes if note.startswith("no tokenizer files in ")]
    assert assumed
    return tuple(note for note in alignment.notes if note not in assumed)


def refused(function, *arguments):
    """The problems for which models are refused."""
    with pytest.raises(ModelCompatibilityError) as caught:
        function(*arguments)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


# Folders that fit


@pytest.mark.parametrize("model_type", FAMILY)
def test_a_model_of_each_type_aligns_with_itself_tensor_by_tensor(model_type):
    stored = read_tensors(folder(model_type=model_type))
    alignment = align_folders("a", "a", "a")
    assert dict(alignment.tensors) == {
        name: (tuple(tensor.shape), (name, name, name), None) for name, tensor in stored.items()
    }
    assert (alignment.vocabulary.rows, alignment.tied) == (48, False)
    assert (alignment.vocabulary.changes, notes_of(alignment)) == ({}, ())
    assert alignment.notes == (f"no tokenizer files in a: {ASSUMED}",)


def test_vocabularies_are_cut_to_the_smallest_embedding_and_head_together():
    sizes = {"a": 48, "b": 40, "c": 44}
    alignment = align_folders(*(folder(name, vocab_size=size) for name, size in sizes.items()))
    assert alignment.vocabulary.rows == 40
    assert alignment.tensors[EMBEDDING].shape == alignment.tensors[HEAD].shape == (40, 32)
    assert alignment.tensors[f"{UP}.weight"].shape == (56, 32)
    assert alignment.vocabulary.changes == {"a": {"cut": 8}, "c": {"cut": 4}}
    assert alignment.notes == (
        "vocabularies cut to the smallest, 40 rows (a 48, b 40, c 44)",
        f"no tokenizer files in a, b, c: {ASSUMED}",
    )


def test_tensors_come_in_the_order_of_the_layers():
    names = list(align_folders(folder(layers=11)).tensors)
    assert [names[0], *names[-2:]] == [EMBEDDING, "model.norm.weight", HEAD]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == [layer for layer in range(11) for _ in range(9)]


@pytest.mark.parametrize(
    ("tied", "head", "notes"),
    [
        ((True, True), None, ()),
        ((False, False), ((48, 32), (HEAD, HEAD), None), ()),
        ((True, False), ((48, 32), (EMBEDDING, HEAD), None), (MIXED,)),
        ((False, True), ((48, 32), (HEAD, EMBEDDING), None), (MIXED,)),
    ],
)
def test_the_result_ties_its_head_only_where_all_models_do(tied, head, notes):
    alignment = align_folders(folder("a", tied=tied[0]), folder("b", tied=tied[1]))
    assert (alignment.tied, notes_of(alignment)) == (head is None, notes)
    assert alignment.tensors[EMBEDDING].sources == (EMBEDDING, EMBEDDING)
    assert alignment.tensors.get(HEAD) == head


def test_a_head_stored_in_a_tied_model_is_not_used_and_that_is_said():
    folder("a", tied=True, extra={HEAD: torch.zeros(48, 32)})
    unused = f"a: ties its head to the embedding, so its stored {HEAD} is not used"
    with_tied = align_folders("a", folder("b", tied=True))
    assert (HEAD in with_tied.tensors, notes_of(with_tied)) == (False, (unused,))
    with_untied = align_folders("a", folder("c"))
    assert with_untied.tensors[HEAD].sources == (EMBEDDING, HEAD)
    assert notes_of(with_untied) == (MIXED, unused)


@pytest.mark.parametrize(
    ("model_type", "drop", "tied"),
    [("llama", (HEAD,), False), ("olmo2", (HEAD,), True), ("olmo2", (), False)],
)
def test_a_config_silent_about_ties_means_what_its_type_means(model_type, drop, tied):
    model = description(drop=drop)
    silent = {key: value for key, value in model.config.items() if key != "tie_word_embeddings"}
    assert is_tied(model._replace(config=silent | {"model_type": model_type})) == tied


def test_a_llama_without_a_head_and_without_a_word_about_ties_is_refused():
    path = Path(folder(drop=[HEAD]), "config.json")
    path.write_text(path.read_text().replace('"tie_word_embeddings": false,', ""))
    (problem,) = refused(align_folders, "a")
    assert problem.startswith(f"a: 1 tensor ({HEAD}) missing")


@pytest.mark.parametrize(
    ("model_type", "settings", "biases"),
    [
        ("llama", {"attention_bias": True}, [f"self_attn.{letter}_proj" for letter in "qkvo"]),
        ("llama", {"mlp_bias": True}, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("qwen3", {"attention_bias": True}, [f"self_attn.{letter}_proj" for letter in "qkvo"]),
    ],
)
def test_biases_that_the_config_asks_for_belong_to_the_model(model_type, settings, biases):
    shapes = read_tensors(folder("plain", model_type=model_type))
    extra = {
        f"model.layers.{layer}.{name}.bias": torch.ones(
            len(shapes[f"model.layers.{layer}.{name}.weight"])
        )
        for layer in (0, 1)
        for name in biases
    }
    folder("a", model_type=model_type, config_changes=settings, extra=extra)
    assert align_folders("a").tensors.keys() >= extra.keys()
    folder("b", model_type=model_type, extra=extra)
    (problem,) = refused(align_folders, "b")
    assert "with this config.json does not have; loaders would ignore them" in problem
    folder("c", model_type=model_type, config_changes=settings)
    (problem,) = refused(align_folders, "c")
    assert f"{len(extra)} tensors (" in problem


@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        ("llama", "input_layernorm.weight"),
        ("qwen2", "self_attn.q_proj.bias"),
        ("qwen3", "self_attn.k_norm.weight"),
    ],
)
def test_what_all_layers_of_a_known_type_have_may_not_be_missing_in_all(model_type, part):
    drop = [f"model.layers.{layer}.{part}" for layer in (0, 1)]
    (problem,) = refused(align_folders, folder(model_type=model_type, drop=drop))
    assert problem.startswith(f"a: 2 tensors ({', '.join(drop)}) missing")


def test_a_type_that_is_not_known_must_only_have_layers_that_are_alike():
    folder("a", config_changes={"model_type": "olmo2"})
    assert align_folders("a").vocabulary.rows == 48
    folder("b", config_changes={"model_type": "olmo2"}, drop=[NORM])
    (problem,) = refused(align_folders, "b")
    assert problem.startswith(f"b: 1 tensor ({NORM}) missing")


def test_more_layers_than_tensors_are_not_even_counted():
    (problem,) = refused(align_folders, folder(config_changes={"num_hidden_layers": 10**9}))
    assert "is 1000000000, but there are only 21 tensors" in problem


def test_stored_rotary_frequencies_are_left_out_and_that_is_said():
    inverse = "model.layers.1.self_attn.rotary_emb.inv_freq"
    alignment = align_folders(folder("a"), folder("b", extra={inverse: torch.ones(4)}))
    assert notes_of(alignment) == ("b: stored rotary_emb.inv_freq left out (loaders compute it)",)
    assert inverse not in align_folders("b", "a").tensors


model_sets = st.lists(st.tuples(st.integers(3, 60), st.booleans()), min_size=1, max_size=5)


@given(model_sets.flatmap(lambda specs: st.tuples(st.just(specs), st.permutations(specs))))
def test_any_vocabularies_are_cut_to_the_smallest_whatever_the_order_of_the_models(orders):
    models, reordered = (
        [description(f"{size} rows", size, tied) for size, tied in specs] for specs in orders
    )
    first, second = align(models), align(reordered)
    smallest = min(size for size, _ in orders[0])
    assert first.vocabulary.rows == second.vocabulary.rows == smallest
    assert first.tied == second.tied == all(tied for _, tied in orders[0])
    assert first.vocabulary.changes == second.vocabulary.changes
    for name, (shape, sources, _) in first.tensors.items():
        assert second.tensors[name].shape == shape
        for model, source in zip(models, sources, strict=True):
            rows, *rest = model.tensors[source].shape
            assert shape == (smallest if name in (EMBEDDING, HEAD) else rows, *rest)


# Quantized models


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"load_in_8bit": True}, "unknown"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_that_names_a_quantization_is_refused(key, changes, method):
    assert refused(align_folders, folder(config_changes={key: changes})) == [
        f"a: weights are quantized (quant_method {method!r} in config.json). {ADVICE}"
    ]


def packed(**dtypes):
    """Tensors of a quantized projection; weight__absmax is called weight.absmax."""
    names = {name: f"{UP}.{name.replace('__', '.')}" for name in dtypes}
    return {names[name]: torch.zeros(4, 8).to(dtype) for name, dtype in dtypes.items()}


U8, I8, I32, I64 = torch.uint8, torch.int8, torch.int32, torch.int64
F8, F16, F32 = torch.float8_e4m3fn, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        (packed(qweight=I32, qzeros=I32, scales=F16, g_idx=I32), 4),  # GPTQ
        (packed(qweight=I32, qzeros=I32, scales=F16), 3),  # AWQ
        (packed(weight=U8, weight__absmax=F32, weight__nested_quant_map=F32), 3),  # bitsandbytes
        (packed(weight__quant_state__bitsandbytes__nf4=U8, weight__quant_map=F32), 2),
        (packed(weight=I8, SCB=F32, weight_format=U8), 3),  # bitsandbytes in 8 bits
        (packed(W_q=U8, meta=F32), 2),  # HQQ
        (packed(weight_packed=I32, weight_scale=F16, weight_shape=I64), 3),  # compressed-tensors
        (packed(weight=F8, weight_scale_inv=F32), 1),  # FP8 in blocks
        (packed(weight=F8, weight_scale=F32), 1),
        (packed(weight___data=I8, weight___scale=F16), 2),  # quanto
        (packed(weight=I8), 1),
        (packed(weight=F16, scales=F16), 1),
    ],
)
def test_packed_tensors_are_refused_whatever_the_config_says(tensors, count):
    (problem,) = refused(align_folders, folder(drop=[f"{UP}.weight"], extra=tensors))
    counted = f"{count} packed tensor" + "s" * (count > 1)
    text = rf"a: weights are quantized \({counted} \({UP}\.\S+.*\); [UIF]\d+\w*\)\. "
    assert re.fullmatch(text + ADVICE, problem)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (F8, "quantized to FP8"),
        (torch.float8_e5m2, "quantized to FP8"),
        (torch.float64, "stored as F64"),
    ],
)
def test_other_float_dtypes_are_refused_by_name(dtype, kind):
    folder(extra={f"{UP}.weight": torch.zeros(56, 32).to(dtype)})
    assert refused(align_folders, "a") == [
        f"a: weights are {kind} ({UP}.weight). "
        "Merging reads float32, float16 and bfloat16; save the model as one of these"
    ]


# Models of another family, and broken ones


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("qwen2_moe", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj"),
        ("deepseek_v3", "model.layers.0.mlp.gate.weight"),
        ("stablelm", "model.norm.bias"),
        ("llama", "score.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("llama", "base_model.model.model.norm.weight"),
    ],
)
def test_tensors_of_other_architectures_are_refused_by_name(model_type, name):
    extra = {name: torch.ones(2), "z.weight": torch.ones(2)}
    folder(config_changes={"model_type": model_type}, extra=extra)
    assert refused(align_folders, "a") == [
        f"a: not a LLaMA-family causal language model: model_type {model_type!r} with 2 other "
        f"tensors ({name}, z.weight). Expected the tensor names of Llama, Mistral, Qwen2 or Qwen3"
    ]


PROJECTIONS = [f"self_attn.{letter}_proj" for letter in "qkvo"]
PROJECTIONS += [f"mlp.{side}_proj" for side in ("gate", "up", "down")]
REQUIRED = [EMBEDDING, "model.norm.weight", HEAD]
REQUIRED += [f"model.layers.0.{projection}.weight" for projection in PROJECTIONS]


@given(st.sets(st.sampled_from(REQUIRED), min_size=1))
def test_missing_tensors_are_counted_and_three_of_them_named(missing):
    (problem,) = refused(align, [description(drop=missing)])
    found = re.fullmatch(
        r"a: (\d+) tensors? \((.*?)(, \.\.\.)?\) missing; num_hidden_layers in config\.json is 1\. "
        "Download or save the model again",
        problem,
    )
    named = found[2].split(", ")
    assert set(named) <= missing
    assert (int(found[1]), len(named)) == (len(missing), min(3, len(missing)))
    assert bool(found[3]) == (len(missing) > 3)


@pytest.mark.parametrize("layers", [None, "2", 2.0, True, 0, -1])
def test_the_number_of_layers_must_be_a_whole_number(layers):
    assert refused(align_folders, folder(config_changes={"num_hidden_layers": layers})) == [
        "a: config.json must have whole numbers above 0, got num_hidden_layers "
        f"{layers!r}. Download or save the model again"
    ]


def tensors_of_layer(number):
    names = ("input_layernorm", "mlp.down_proj", "mlp.gate_proj")
    listed = ", ".join(f"model.layers.{number}.{name}.weight" for name in names)
    return f"9 tensors ({listed}, ...)"


def test_layers_beyond_those_of_the_config_are_refused():
    assert refused(align_folders, folder(config_changes={"num_hidden_layers": 1})) == [
        f"a: {tensors_of_layer(1)} beyond num_hidden_layers 1 in config.json. Save the model again"
    ]


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        (
            {"config_changes": {"vocab_size": 47}},
            f"{EMBEDDING} [48, 32] instead of [47, 32] (and 1 more tensor)",
        ),
        (
            {"config_changes": {"num_key_value_heads": 4}},
            "model.layers.0.self_attn.k_proj.weight [16, 32] instead of [32, 32] "
            "(and 3 more tensors)",
        ),
        (
            {"config_changes": {"head_dim": 16}},
            "model.layers.0.self_attn.q_proj.weight [32, 32] instead of [64, 32] "
            "(and 7 more tensors)",
        ),
        ({"extra": {EMBEDDING: torch.ones(())}}, f"{EMBEDDING} [] instead of [48, 32]"),
        ({"extra": {HEAD: torch.ones(48, 17)}}, f"{HEAD} [48, 17] instead of [48, 32]"),
        ({"extra": {NORM: torch.ones(31)}}, f"{NORM} [31] instead of [32]"),
    ],
)
def test_shapes_that_are_not_those_of_the_config_are_refused(options, shapes):
    assert refused(align_folders, folder(**options)) == [
        f"a: shapes are not those of config.json: {shapes}. "
        "Use the config.json that belongs to these weights"
    ]


def test_a_tensor_that_one_layer_has_must_be_in_all_layers():
    (problem,) = refused(align_folders, folder(drop=[NORM]))
    assert problem.startswith(
        f"a: 1 tensor ({NORM}) missing; num_hidden_layers in config.json is 2"
    )


def test_a_layer_number_is_written_without_zeros_in_front():
    name = "model.layers.00.mlp.up_proj.weight"
    (problem,) = refused(align_folders, folder(extra={name: torch.ones(56, 32)}))
    assert f"1 other tensor ({name})" in problem


def test_a_tie_that_is_not_true_or_false_is_refused():
    assert refused(align_folders, folder(config_changes={"tie_word_embeddings": "false"})) == [
        "a: tie_word_embeddings in config.json must be true or false, got 'false'"
    ]


def test_what_one_config_leaves_out_and_the_other_says_is_no_difference():
    get_llama(folder("a")).save_pretrained("b")  # transformers writes head_dim
    assert "head_dim" in Path("b/config.json").read_text()
    assert align_folders("a", "b").vocabulary.rows == 48
    assert align_folders("b", "a").vocabulary.rows == 48


# Models that do not fit each other

ONE_BASE, ONE_SIZE = "Merge fine-tunes of one base", "Merge models of one size"
OTHER_TYPE = "model_type 'qwen2', but a has 'llama'. Merge models of one architecture"
HEADS = f"num_attention_heads 8, but a has 4. {ONE_BASE}"
KEY_HEADS = f"num_key_value_heads 4, but a has 2. {ONE_BASE}"
KEYS = "model.layers.0.self_attn.k_proj.weight has shape [32, 32], but [16, 32] in a"
ROWS = f"{EMBEDDING} has shape [48, 16], but [48, 32] in a"


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"model_type": "qwen2"}, [OTHER_TYPE]),
        ({"hidden_size": 16}, [f"{ROWS} (and 19 more tensors). {ONE_SIZE}"]),
        ({"kv_heads": 4}, [KEY_HEADS, f"{KEYS} (and 3 more tensors). {ONE_SIZE}"]),
        ({"heads": 8, "kv_heads": 4}, [HEADS, KEY_HEADS]),
        ({"layers": 3}, [f"{tensors_of_layer(2)} that a does not have"]),
        ({"layers": 1}, [f"{tensors_of_layer(1)} missing that a has"]),
        (
            {"extra": {f"model.layers.{n}.mlp.up_proj.bias": torch.ones(56) for n in (0, 1)}},
            [
                f"2 tensors ({UP}.bias, model.layers.1.mlp.up_proj.bias) that a llama with this "
                "config.json does not have; loaders would ignore them. Use the config.json that "
                "belongs to these weights"
            ],
        ),
    ],
)
def test_models_that_differ_are_refused(options, texts):
    problems = refused(align_folders, folder("a"), folder("b", **options))
    assert problems == [f"b: {text}" for text in texts]


@pytest.mark.parametrize(
    ("key", "value", "beyond"),
    [
        ("bos_token_id", 40, [40]),
        ("eos_token_id", [2, 40, 47], [40, 47]),
        ("pad_token_id", 47, [47]),
    ],
)
def test_special_tokens_of_the_first_model_must_survive_the_cut(key, value, beyond):
    folder("a", config_changes={key: value})
    assert refused(align_folders, "a", folder("b", vocab_size=44), folder("c", vocab_size=40)) == [
        f"a: {key} {', '.join(map(str, beyond))} in config.json lies beyond the vocabulary of the "
        "result (40 rows). Keep the row (vocabulary 'max', 'union' or 'base') or choose a model "
        "with other special tokens (tokenizer_source)"
    ]
    assert align_folders("c", "a").vocabulary.rows == 40  # the result has the special tokens of c


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
POSITIONS = "Weights trained for one do not fit the other"


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ({}, {"rope_theta": 5e5}, "rope_theta 500000.0, but a has 10000.0"),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 32.0}},
            "factor 32.0, but a has 8.0",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "factor None, but a has 2.0; rope_type None, but a has linear",
        ),
    ],
)
def test_models_that_turn_positions_in_other_ways_are_refused(ours, theirs, text):
    folder("a", config_changes=ours)
    (problem,) = refused(align_folders, "a", folder("b", config_changes=theirs))
    assert problem.startswith(f"b: other rotary positions: {text}. {POSITIONS}")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        (
            {"rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
    ],
)
def test_both_spellings_of_rotary_settings_are_the_same(ours, theirs):
    assert notes_of(
        align_folders(folder("a", config_changes=ours), folder("b", config_changes=theirs))
    ) == ()  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rope_scaling": 5}, "rope_scaling in config.json is 5, expected an object or null"),
        ({"rope_parameters": [1]}, "rope_parameters in config.json is [1], expected an object"),
        ({"rope_theta": 10**400}, "rope_theta in config.json must be a number above 0, got '1000"),
        ({"rope_theta": "x"}, "rope_theta in config.json must be a number above 0, got 'x'"),
        ({"eos_token_id": "2"}, "eos_token_id in config.json is '2', expected a whole number"),
        ({"pad_token_id": [1.0]}, "pad_token_id in config.json is [1.0], expected a whole number"),
        ({"bos_token_id": -5}, "bos_token_id in config.json is -5, expected a whole number"),
    ],
)
def test_settings_of_which_nothing_can_be_made_are_refused(changes, text):
    (problem,) = refused(align_folders, folder("a"), folder("b", config_changes=changes))
    assert problem.startswith(f"b: {text}")


def test_null_and_absent_rotary_settings_mean_the_default():
    align_folders(folder("a"), folder("b", config_changes={"rope_theta": None}))


def test_a_setting_that_only_one_model_gives_is_named_if_it_counts():
    folder("a", model_type="mistral", config_changes={"sliding_window": None})
    folder("b", model_type="mistral", config_changes={"sliding_window": 16})
    assert notes_of(align_folders("a", "b")) == (
        "b: sliding_window 16 (a: None); the result is as a",
    )


def test_special_ids_that_a_donor_leaves_out_are_those_of_its_class():
    folder("a", tokenizer=True)
    path = Path(folder("b", tokenizer=True), "config.json")
    path.write_text(path.read_text().replace('"eos_token_id": 2', '"sep_token_id": 7'))
    with open_model_folder("a") as first, open_model_folder("b") as donor:
        assert align([first, donor], donor=1).special_ids == {"sep_token_id": 7}


def test_another_activation_is_refused_and_other_settings_are_named():
    folder("a")
    (problem,) = refused(align_folders, "a", folder("b", config_changes={"hidden_act": "gelu"}))
    assert problem == f"b: hidden_act gelu, but a has silu. {ONE_BASE}"
    changes = {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "bos_token_id": 5}
    assert notes_of(align_folders("a", folder("c", config_changes=changes))) == (
        "c: max_position_embeddings 4096 (a: 128), rms_norm_eps 1e-06 (a: 1e-05); the result is "
        "as a",
    )


def test_the_head_may_be_tied_because_the_base_ties_it_and_what_that_costs_is_said():
    folder("a", tied=True)
    folder("b")
    with open_model_folder("a") as base, open_model_folder("b") as tuned:
        alignment = align([base, tuned], VocabularySettings(tie="base"))
        untied = align([tuned, base], VocabularySettings(tie="base"))
    assert (alignment.tied, HEAD in alignment.tensors) == (True, False)
    assert notes_of(alignment) == (
        "the result ties its head to the embedding as a does; the trained heads of b are lost",
    )
    assert (untied.tied, untied.tensors[HEAD].sources) == (False, (HEAD, EMBEDDING))


def test_the_last_row_kept_may_be_a_special_token():
    folder("a", config_changes={"pad_token_id": 39, "bos_token_id": None})
    assert align_folders("a", folder("b", vocab_size=40)).vocabulary.rows == 40


def test_everything_that_is_wrong_with_single_models_is_said_at_once():
    folder("a", config_changes={"quantization_config": {"quant_method": "awq"}})
    folder("b", extra={"score.weight": torch.ones(2)})
    folder("c", drop=["model.norm.weight"], config_changes={"vocab_size": 50})
    problems = refused(align_folders, "a", "b", "c", folder("d"))
    starts = ["a: weights are q", "b: not a LLaMA-f", "c: 1 tensor (mod", "c: shapes are no"]
    assert [problem[:16] for problem in problems] == starts


def test_everything_that_does_not_fit_together_is_said_at_once():
    folder("a", config_changes={"eos_token_id": 45})
    models = [folder("b", layers=3), folder("c", heads=8), folder("d", vocab_size=40)]
    problems = refused(align_folders, "a", *models)
    starts = ["b: 9 tensors (mo", "c: num_attention", "c: model.layers.", "a: eos_token_id "]
    assert [problem[:16] for problem in problems] == starts


# Models in memory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILY)
def test_models_in_memory_are_cut_together_and_still_compute(model_type, tied):
    options = {"model_type": model_type, "tied": tied}
    models = [in_memory(f"m{size}", vocab_size=size, **options) for size in (48, 40, 44)]
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in models]
    tokens = torch.tensor([[1, 39, 7]])
    logits = models[0](tokens).logits[..., :40]
    with pytest.warns(UserWarning, match="vocabularies cut to the smallest, 40 rows"):
        base, fine_tuned = prepare_models_for_merging(models[0], models[1:])
    assert [base, *fine_tuned] == models
    for model, old in zip(models, before, strict=True):
        assert model.config.vocab_size == 40
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, old[name][:40] if name in (EMBEDDING, HEAD) else old[name])
        assert model(tokens).logits.shape == (1, 3, 40)
    torch.testing.assert_close(base(tokens).logits, logits)
    assert base.generate(tokens, max_new_tokens=2, do_sample=False).shape[1] > 3


def test_models_in_memory_with_one_vocabulary_are_left_alone():
    base, model = in_memory("a"), in_memory("b", seed=1)
    parameters = [*base.parameters(), *model.parameters()]
    places = [parameter.data_ptr() for parameter in parameters]
    assert prepare_models_for_merging(base, [model]) == (base, [model])
    after = [*base.parameters(), *model.parameters()]
    assert all(new is old for new, old in zip(after, parameters, strict=True))
    assert [parameter.data_ptr() for parameter in after] == places


def test_where_only_some_models_in_memory_are_tied_all_get_a_head_of_their_own():
    base, model = in_memory("a", tied=True), in_memory("b", vocab_size=40)
    with pytest.warns(UserWarning, match=f"(?s)vocabularies cut.*{MIXED}"):
        prepare_models_for_merging(base, [model])
    for prepared in (base, model):
        names = [name for name, _ in prepared.named_parameters()]
        assert names.count(HEAD) == names.count(EMBEDDING) == 1
        assert prepared.lm_head.weight is not prepared.model.embed_tokens.weight
        assert prepared.config.tie_word_embeddings is False
    assert torch.equal(base.lm_head.weight, base.model.embed_tokens.weight)
    assert base.lm_head.weight.shape == model.lm_head.weight.shape == (40, 32)


def test_models_in_memory_that_share_a_config_are_all_cut():
    base, model = in_memory("a"), in_memory("b")
    model.config = base.config
    with pytest.warns(UserWarning, match="vocabularies cut"):
        prepare_models_for_merging(in_memory("c", vocab_size=40), [base, model])
    assert len(base.lm_head.weight) == len(model.lm_head.weight) == 40


def test_a_tied_model_in_memory_uses_its_embedding_whatever_head_it_stores():
    model = in_memory("a", tied=True, extra={HEAD: torch.ones(48, 32)})
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_in_memory_that_do_not_fit_are_refused_and_none_is_changed():
    base = in_memory("a", config_changes={"eos_token_id": 45})
    models = [in_memory("b", vocab_size=40), in_memory("c", layers=1)]
    problems = refused(prepare_models_for_merging, base, models)
    starts = ["ft_models[1]: 9 tensor", "base: eos_token_id 45 "]
    assert [problem[:22] for problem in problems] == starts
    assert [model.config.vocab_size for model in (base, *models)] == [48, 40, 48]
    assert base.lm_head.weight.shape == base.model.embed_tokens.weight.shape == (48, 32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_in_memory_is_described_as_its_folder(dtype):
    model = in_memory("a", dtype=dtype, model_type="qwen2").to(getattr(torch, dtype))
    label, config, tensors, _ = describe("x", model)
    with open_model_folder("a") as stored:
        assert (label, tensors) == ("x", stored.tensors)
    assert [config[key] for key in ("vocab_size", "num_hidden_layers")] == [48, 2]


PACKAGES = ["bitsandbytes.nn.modules", "auto_gptq.nn_modules.qlinear", "hqq.core.quantize"]
PACKAGES += ["gptqmodel.nn_modules.qlinear", "awq.modules.linear", "compressed_tensors.linear"]
PACKAGES += ["torchao.quantization", "optimum.quanto.nn", "eetq.modules", "aqlm.inference"]
PACKAGES += [f"transformers.integrations.{name}_fp8" for name in ("finegrained", "fbgemm")]


@pytest.mark.parametrize("package", PACKAGES)
def test_quantized_modules_in_memory_are_refused(package):
    base, model = in_memory("a"), in_memory("b", vocab_size=40)
    quantized = type("QuantLinear", (torch.nn.Linear,), {"__module__": package})
    model.model.layers[1].mlp.up_proj = quantized(32, 56, bias=False)
    assert refused(prepare_models_for_merging, base, [base, model]) == [
        f"ft_models[1]: module model.layers.1.mlp.up_proj is quantized ({package}.QuantLinear). "
        "Merging needs float weights; load the model without quantization"
    ]
    assert base.config.vocab_size == 48


def test_integer_and_float64_weights_in_memory_are_refused():
    double, integer = in_memory("a").double(), in_memory("b")
    integer.lm_head.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=I8), requires_grad=False)
    problems = refused(prepare_models_for_merging, double, [integer])
    assert [problem.split(". ")[0] for problem in problems] == [
        f"base: weights are stored as torch.float64 ({EMBEDDING})",
        f"ft_models[0]: weights are quantized (1 packed tensor ({HEAD}); torch.int8)",
    ]


def test_an_end_token_of_a_model_in_memory_must_survive_the_cut():
    base, model = in_memory("a"), in_memory("b", vocab_size=44)
    base.generation_config.eos_token_id = [2, 47]
    (problem,) = refused(prepare_models_for_merging, base, [model])
    assert problem.startswith("base: eos_token_id 47 in its generation config lies beyond")
    assert base.config.vocab_size == 48


def test_tokenizers_that_do_not_exist_are_refused():
    base, model = in_memory("a"), in_memory("b")
    with pytest.raises(ValueError, match="tokenizers: nowhere is no folder with a tokenizer"):
        prepare_models_for_merging(base, [model], tokenizers=["a", "nowhere"])
