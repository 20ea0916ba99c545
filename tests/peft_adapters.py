"""Small random LoRA adapters over the options of PEFT, and what PEFT makes of them.

PEFT is imported when a function is called, so that CASES can be listed where it is missing.
"""

import copy
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

Family = Literal["llama", "qwen2"]
DType = Literal["float32", "float16", "bfloat16"]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EMBEDDINGS = ["embed_tokens", "lm_head"]
VOCABULARY = 64


class AdapterCase(NamedTuple):
    """A base model and the options of an adapter for it."""

    name: str
    """Unique; also the seed of every random value."""
    family: Family
    config: Mapping[str, Any]
    """Arguments of peft.LoraConfig, but for task_type."""
    tied: bool = False
    """Whether the base has one tensor for embed_tokens and lm_head."""
    resized: int | None = None
    """Rows of the vocabulary the adapter was trained with, where the base has others."""
    attention_bias: bool = False
    """Of a llama base; qwen2 always has biases."""
    base_dtype: DType = "float32"
    adapter_dtype: DType = "float32"
    """Of what was trained. Whatever else PEFT saves keeps the dtype of the base."""
    peft_wrong: str = ""
    """Why merge_and_unload does not compute what the adapter computes; empty where it does."""


# Writing a base and an adapter


def make_base(case: AdapterCase, folder: Path) -> None:
    """Write a random model of 2 layers; no tensor is all zeros or ones."""
    with _quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        options: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": case.tied,
        }
        if case.family == "llama":
            options["attention_bias"] = case.attention_bias
        config = AutoConfig.for_model(case.family, **options)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            noise = 0.2 * _noise(parameter.shape, case.name, name)
            parameter.data.copy_(1 + noise if "norm" in name else noise)
        model.to(getattr(torch, case.base_dtype)).save_pretrained(folder)


def make_adapter(case: AdapterCase, base: Path, folder: Path) -> None:
    """Write an adapter of the base: each trained tensor differs from where training starts."""
    with _quiet():
        from peft import LoraConfig, get_peft_model

        model = _load_base(case, base, "float32")
        if case.resized is not None:
            _fill_embeddings(model, case.name)
        # A copy, as PEFT changes lists in it.
        config = LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(dict(case.config)))
        adapted = get_peft_model(model, config)
        _fill_adapter(adapted, case.name)
        for name, parameter in adapted.named_parameters():
            trained = parameter.requires_grad or ".lora_" in name
            dtype = case.adapter_dtype if trained else case.base_dtype
            parameter.data = parameter.data.to(getattr(torch, dtype))
        adapted.save_pretrained(folder)


def _fill_embeddings(model: Any, seed: str) -> None:
    """Change every row, as PEFT saves all of a resized vocabulary."""
    tables = {
        id(module.weight): module.weight
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for number, weight in enumerate(tables.values()):
        noise = 0.2 * _noise(weight.shape, seed, f"table {number}")
        weight.data[:VOCABULARY] += 0.1 * noise[:VOCABULARY]
        weight.data[VOCABULARY:] = noise[VOCABULARY:]


def _fill_adapter(model: Any, seed: str) -> None:
    """Give each low-rank product a tenth of its weight's size, and change what else is trained."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            _fill_factors(module, seed, name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            size = parameter.data.square().mean().sqrt()
            parameter.data += 0.2 * size * _noise(parameter.shape, seed, name)


def _fill_factors(module: Any, seed: str, name: str) -> None:
    adapter = "default"
    if adapter in module.lora_embedding_A:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    else:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    size = 0.1 * module.get_base_layer().weight.data.square().mean().sqrt()
    a.data.copy_(_noise(a.shape, seed, f"{name}.a"))
    factor = size / (module.scaling[adapter] * module.r[adapter] ** 0.5)
    b.data.copy_(factor * _noise(b.shape, seed, f"{name}.b"))
    if module.lora_bias[adapter]:
        bias = module.lora_B[adapter].bias
        bias.data.copy_(size / module.scaling[adapter] * _noise(bias.shape, seed, f"{name}.bias"))
    if adapter in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector[adapter].weight
        magnitude.data *= 1 + 0.05 * _noise(magnitude.shape, seed, f"{name}.magnitude")


def _noise(shape: torch.Size, *names: str) -> torch.Tensor:
    """Normal values that depend on the names alone."""
    generator = torch.Generator().manual_seed(zlib.crc32("/".join(names).encode()))
    return torch.randn(shape, generator=generator)


# What PEFT makes of them


def peft_folded(
    case: AdapterCase, base: Path, adapter: Path, *, rounded: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of merge_and_unload, lm_head.weight among them even where it is tied.

    Args:
        case: what the two folders were made from.
        base: folder of make_base.
        adapter: folder of make_adapter.
        rounded: compute in the dtype of the base, to which PEFT then rounds the adapter first.
            Otherwise all is float32.
    """
    with _quiet(), torch.no_grad():
        model = _load_adapted(case, base, adapter, rounded).merge_and_unload()
        tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    return tensors


def peft_logits(case: AdapterCase, base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """The float32 logits of base and adapter side by side: what the adapter means."""
    with _quiet(), torch.no_grad():
        logits: torch.Tensor = _load_adapted(case, base, adapter)(ids).logits
    return logits


def _load_adapted(case: AdapterCase, base: Path, adapter: Path, rounded: bool = False) -> Any:
    from peft import PeftModel

    model = _load_base(case, base, case.base_dtype if rounded else "float32")
    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=not rounded).eval()


def _load_base(case: AdapterCase, base: Path, dtype: DType) -> Any:
    """The base, its vocabulary resized where the adapter needs that."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    if case.resized is not None:
        model.resize_token_embeddings(case.resized, mean_resizing=False)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: PEFT has one for most of these options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The cases

# How merge_and_unload goes wrong on tied bases, with transformers 4.57 and 5.23 alike: embed_tokens
# and lm_head stay one tensor, while the adapter means two that differ, or one changed once.
HEAD_TOO = "the change of embed_tokens is made in the tensor that is lm_head too"
EMBED_TOO = "the change of lm_head is made in the tensor that is embed_tokens too"
BOTH = "the different changes of embed_tokens and lm_head are both made in their one tensor"
TWICE = "the one change of embed_tokens and lm_head is made in their one tensor twice"

TARGETS = [
    AdapterCase("attention", "llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 16}),
    AdapterCase("mlp", "qwen2", {"target_modules": MLP, "r": 8, "lora_alpha": 4}),
    AdapterCase("default-targets", "llama", {}),
    AdapterCase("default-targets-qwen2", "qwen2", {"r": 2, "lora_dropout": 0.3}),
    AdapterCase("all-linear", "llama", {"target_modules": "all-linear", "r": 3, "lora_alpha": 7}),
    AdapterCase("all-linear-qwen2", "qwen2", {"target_modules": "all-linear", "lora_alpha": 2.5}),
    AdapterCase(
        "regex",
        "llama",
        {"target_modules": r".*\.layers\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)", "r": 4},
    ),
    AdapterCase(
        "full-names",
        "qwen2",
        {"target_modules": ["model.layers.0.mlp.down_proj", "layers.1.self_attn.k_proj", "o_proj"]},
    ),
    AdapterCase(
        "excluded",
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "0.self_attn.q_proj"]},
    ),
    AdapterCase(
        "excluded-regex",
        "qwen2",
        {"target_modules": [*ATTENTION, *MLP], "exclude_modules": r".*\.0\.mlp\..*"},
    ),
    AdapterCase("rank-one", "qwen2", {"target_modules": ["v_proj"], "r": 1, "lora_alpha": 3}),
    AdapterCase("rank-above-size", "llama", {"target_modules": ["k_proj", "up_proj"], "r": 40}),
    AdapterCase("one-layer", "llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    AdapterCase(
        "layers-pattern",
        "qwen2",
        {"target_modules": MLP, "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    AdapterCase("fan-in-fan-out", "llama", {"target_modules": ATTENTION, "fan_in_fan_out": True}),
    # PEFT saves false as soon as a linear layer is targeted, and true here.
    AdapterCase(
        "fan-in-fan-out-embed",
        "qwen2",
        {"target_modules": ["embed_tokens"], "fan_in_fan_out": True, "lora_alpha": 5},
    ),
    AdapterCase(
        "fan-in-fan-out-dora",
        "qwen2",
        {"target_modules": ["o_proj", "up_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
]

SCALES = [
    AdapterCase(
        "rslora",
        "llama",
        {"target_modules": "all-linear", "r": 6, "lora_alpha": 3, "use_rslora": True},
    ),
    AdapterCase(
        "rslora-rank-pattern",
        "qwen2",
        {
            "target_modules": [*ATTENTION, *MLP],
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {"mlp.down_proj": 9, "q_proj": 2},
        },
    ),
    AdapterCase(
        "rslora-both-patterns",
        "llama",
        {
            "target_modules": [*ATTENTION, "lm_head", "embed_tokens"],
            "use_rslora": True,
            "rank_pattern": {"embed_tokens": 5, "lm_head": 3, "self_attn.[kv]_proj": 2},
            "alpha_pattern": {"embed_tokens": 20, "o_proj": 1},
        },
    ),
    AdapterCase(
        "rank-pattern",
        "llama",
        {"target_modules": [*ATTENTION, *MLP], "rank_pattern": {r".*mlp\..*": 3, "v_proj": 5}},
    ),
    AdapterCase(
        "alpha-pattern",
        "qwen2",
        {
            "target_modules": "all-linear",
            "lora_alpha": 4,
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 32, "gate_proj|up_proj": 1},
        },
    ),
    # PEFT sorts the keys when it saves: only sorted ones mean the same before and after.
    AdapterCase(
        "first-pattern-special",
        "llama",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 6},
            "alpha_pattern": {"1.mlp.down_proj": 3, "down_proj": 24, "layers.0.*": 48},
        },
    ),
    AdapterCase(
        "first-pattern-general",
        "qwen2",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {r".*_proj": 3, "layers.0.self_attn.q_proj": 7},
            "alpha_pattern": {"(q|k)_proj": 2, "k_proj": 40, "self_attn.q_proj": 80},
        },
    ),
    # Neither a part of a name nor a name's beginning matches.
    AdapterCase(
        "patterns-without-match",
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"attn.q_proj": 2, "proj": 3},
            "alpha_pattern": {"model.layers.0": 40, "o_proj": 5},
        },
    ),
    AdapterCase(
        "gaussian", "qwen2", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}
    ),
    AdapterCase("init-false", "llama", {"target_modules": MLP, "init_lora_weights": False}),
    AdapterCase(
        "orthogonal", "llama", {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}
    ),
    AdapterCase(
        "mica",
        "qwen2",
        {"target_modules": ["embed_tokens", "o_proj"], "init_lora_weights": "mica"},
    ),
    AdapterCase("eva", "llama", {"target_modules": ["down_proj"], "init_lora_weights": "eva"}),
]

UNTIED = [
    AdapterCase(
        "embed", "llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "lora_alpha": 12}
    ),
    AdapterCase("head", "qwen2", {"target_modules": ["lm_head", "v_proj"], "lora_alpha": 3}),
    AdapterCase("embed-and-head", "llama", {"target_modules": EMBEDDINGS, "use_rslora": True}),
    AdapterCase("embed-and-head-qwen2", "qwen2", {"target_modules": [*EMBEDDINGS, *MLP], "r": 3}),
    AdapterCase("embed-full-name", "llama", {"target_modules": ["model.embed_tokens", "k_proj"]}),
    AdapterCase("embed-regex", "qwen2", {"target_modules": r".*(embed_tokens|\.0\.mlp\.up_proj)"}),
    AdapterCase(
        "saved-head", "llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}
    ),
    AdapterCase(
        "saved-embed", "qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    ),
    AdapterCase(
        "saved-embed-and-head", "llama", {"target_modules": MLP, "modules_to_save": EMBEDDINGS}
    ),
    # What is saved whole gets no low-rank factors.
    AdapterCase(
        "saved-and-targeted",
        "llama",
        {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head"]},
    ),
    # Names are matched by their end: this is the last norm and those of the layers.
    AdapterCase(
        "saved-norms", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    ),
    AdapterCase(
        "saved-input-norm",
        "qwen2",
        {"target_modules": MLP, "modules_to_save": ["1.input_layernorm", "model.norm"]},
    ),
    AdapterCase(
        "saved-mlp",
        "qwen2",
        {"target_modules": ["v_proj"], "modules_to_save": ["layers.1.mlp", "lm_head"]},
    ),
    AdapterCase(
        "embed-and-saved-head",
        "qwen2",
        {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head"]},
    ),
    AdapterCase(
        "tokens", "llama", {"target_modules": ATTENTION, "trainable_token_indices": [5, 2, 63]}
    ),
    AdapterCase(
        "tokens-of-both",
        "qwen2",
        {
            "target_modules": ["v_proj"],
            "trainable_token_indices": {"embed_tokens": [9, 8], "lm_head": [0, 7, 3]},
        },
    ),
    AdapterCase(
        "tokens-of-embed",
        "qwen2",
        {
            "target_modules": ["lm_head", "down_proj"],
            "trainable_token_indices": {"model.embed_tokens": [1]},
        },
    ),
    AdapterCase(
        "tokens-and-saved-head",
        "llama",
        {
            "target_modules": MLP,
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": [11, 12],
        },
    ),
]

BIASES = [
    AdapterCase(
        "bias-all",
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
        attention_bias=True,
    ),
    AdapterCase("bias-all-qwen2", "qwen2", {"target_modules": ["k_proj"], "bias": "all"}),
    AdapterCase("bias-all-without-any", "llama", {"target_modules": ATTENTION, "bias": "all"}),
    AdapterCase(
        "bias-lora-only",
        "llama",
        {"target_modules": ["o_proj", "v_proj"], "bias": "lora_only"},
        attention_bias=True,
    ),
    AdapterCase(
        "bias-lora-only-qwen2", "qwen2", {"target_modules": "all-linear", "bias": "lora_only"}
    ),
    AdapterCase(
        "lora-bias",
        "llama",
        {"target_modules": ATTENTION, "lora_bias": True, "r": 4, "lora_alpha": 12},
        attention_bias=True,
    ),
    AdapterCase(
        "lora-bias-and-bias-all",
        "qwen2",
        {
            "target_modules": ["q_proj", "v_proj"],
            "lora_bias": True,
            "bias": "all",
            "use_rslora": True,
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    AdapterCase(
        "lora-bias-and-bias-lora-only",
        "llama",
        {"target_modules": ["k_proj"], "lora_bias": True, "bias": "lora_only"},
        attention_bias=True,
    ),
    AdapterCase(
        "saved-attention-and-bias-all",
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["1.self_attn.k_proj"], "bias": "all"},
    ),
]

DORA = [
    AdapterCase("dora", "llama", {"target_modules": ATTENTION, "use_dora": True, "lora_alpha": 16}),
    AdapterCase(
        "dora-rslora",
        "qwen2",
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    ),
    AdapterCase(
        "dora-embed", "llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}
    ),
    AdapterCase("dora-embed-and-head", "qwen2", {"target_modules": EMBEDDINGS, "use_dora": True}),
    AdapterCase(
        "dora-patterns",
        "llama",
        {
            "target_modules": [*ATTENTION, *MLP],
            "use_dora": True,
            "rank_pattern": {"mlp.*": 2},
            "alpha_pattern": {"o_proj": 32},
        },
    ),
    AdapterCase(
        "dora-bias-all", "qwen2", {"target_modules": ATTENTION, "use_dora": True, "bias": "all"}
    ),
    AdapterCase(
        "dora-saved-and-tokens",
        "llama",
        {
            "target_modules": ATTENTION,
            "use_dora": True,
            "bias": "lora_only",
            "modules_to_save": ["norm", "lm_head"],
            "trainable_token_indices": [4],
        },
        attention_bias=True,
    ),
]

TIED = [
    AdapterCase("tied", "qwen2", {"target_modules": "all-linear"}, tied=True),
    AdapterCase(
        "tied-embed", "llama", {"target_modules": ["embed_tokens"]}, tied=True, peft_wrong=HEAD_TOO
    ),
    AdapterCase(
        "tied-embed-qwen2",
        "qwen2",
        {"target_modules": ["embed_tokens", *MLP]},
        tied=True,
        peft_wrong=HEAD_TOO,
    ),
    AdapterCase(
        "tied-head",
        "llama",
        {"target_modules": ["lm_head", "q_proj"]},
        tied=True,
        peft_wrong=EMBED_TOO,
    ),
    AdapterCase(
        "tied-embed-and-head", "qwen2", {"target_modules": EMBEDDINGS}, tied=True, peft_wrong=BOTH
    ),
    AdapterCase(
        "tied-dora-embed",
        "llama",
        {"target_modules": ["embed_tokens"], "use_dora": True},
        tied=True,
        peft_wrong=HEAD_TOO,
    ),
    AdapterCase(
        "tied-dora-head",
        "qwen2",
        {"target_modules": ["lm_head", "v_proj"], "use_dora": True},
        tied=True,
        peft_wrong=EMBED_TOO,
    ),
    AdapterCase(
        "tied-saved-embed",
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
        tied=True,
    ),
    AdapterCase(
        "tied-saved-head",
        "qwen2",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        tied=True,
    ),
    AdapterCase(
        "tied-saved-embed-and-head",
        "llama",
        {"target_modules": MLP, "modules_to_save": EMBEDDINGS},
        tied=True,
    ),
    AdapterCase(
        "tied-embed-and-saved-head",
        "qwen2",
        {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head"]},
        tied=True,
    ),
    AdapterCase(
        "tied-tokens",
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [6, 1]},
        tied=True,
    ),
    AdapterCase(
        "tied-tokens-of-both",
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"lm_head": [6, 1], "embed_tokens": [6, 1]},
        },
        tied=True,
    ),
    AdapterCase(
        "tied-tokens-differ",
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [6, 1], "lm_head": [6, 30]},
        },
        tied=True,
        peft_wrong=BOTH,
    ),
    AdapterCase(
        "tied-tokens-of-head",
        "qwen2",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}},
        tied=True,
        peft_wrong=EMBED_TOO,
    ),
]

TYING = [
    AdapterCase(
        "tying-embed",
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        tied=True,
        peft_wrong=TWICE,
    ),
    AdapterCase(
        "tying-head",
        "qwen2",
        {"target_modules": ["lm_head", *MLP], "ensure_weight_tying": True, "lora_alpha": 3},
        tied=True,
        peft_wrong=TWICE,
    ),
    AdapterCase(
        "tying-embed-and-head",
        "llama",
        {"target_modules": EMBEDDINGS, "ensure_weight_tying": True, "use_rslora": True},
        tied=True,
        peft_wrong=TWICE,
    ),
    AdapterCase(
        "tying-alpha-pattern",
        "qwen2",
        {
            "target_modules": ["embed_tokens"],
            "ensure_weight_tying": True,
            "alpha_pattern": {"embed_tokens": 2, "lm_head": 16},
        },
        tied=True,
        peft_wrong=BOTH,
    ),
    AdapterCase(
        "tying-dora",
        "llama",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
        tied=True,
        peft_wrong=BOTH,
    ),
    AdapterCase(
        "tying-saved-embed",
        "qwen2",
        {
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        tied=True,
    ),
    AdapterCase(
        "tying-saved-head",
        "llama",
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        tied=True,
    ),
    AdapterCase(
        "tying-saved-embed-and-head",
        "qwen2",
        {"target_modules": MLP, "modules_to_save": EMBEDDINGS, "ensure_weight_tying": True},
        tied=True,
    ),
    AdapterCase(
        "tying-tokens",
        "llama",
        {
            "target_modules": ["v_proj"],
            "trainable_token_indices": [0, 9],
            "ensure_weight_tying": True,
        },
        tied=True,
    ),
    AdapterCase(
        "tying-untied",
        "qwen2",
        {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
    ),
]

RESIZED = [
    AdapterCase("larger", "llama", {"target_modules": ATTENTION}, resized=70),
    AdapterCase("smaller", "qwen2", {"target_modules": ATTENTION}, resized=60),
    AdapterCase("larger-tied", "qwen2", {"target_modules": MLP}, tied=True, resized=70),
    AdapterCase("smaller-tied", "llama", {"target_modules": MLP}, tied=True, resized=60),
    AdapterCase(
        "larger-embed-and-head", "llama", {"target_modules": [*EMBEDDINGS, "q_proj"]}, resized=70
    ),
    AdapterCase("smaller-embed-and-head", "qwen2", {"target_modules": EMBEDDINGS}, resized=60),
    AdapterCase(
        "larger-tied-embed",
        "llama",
        {"target_modules": ["embed_tokens"]},
        tied=True,
        resized=70,
        peft_wrong=HEAD_TOO,
    ),
    AdapterCase(
        "larger-tied-head",
        "qwen2",
        {"target_modules": ["lm_head"]},
        tied=True,
        resized=70,
        peft_wrong=EMBED_TOO,
    ),
    AdapterCase(
        "larger-tying",
        "qwen2",
        {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
        tied=True,
        resized=70,
        peft_wrong=TWICE,
    ),
    AdapterCase(
        "larger-saved-embed-and-head",
        "llama",
        {"target_modules": MLP, "modules_to_save": EMBEDDINGS},
        resized=70,
    ),
    AdapterCase(
        "larger-tying-saved-embed",
        "qwen2",
        {"target_modules": MLP, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        tied=True,
        resized=70,
    ),
    AdapterCase(
        "larger-dora",
        "qwen2",
        {"target_modules": [*EMBEDDINGS, "o_proj"], "use_dora": True},
        resized=70,
    ),
    AdapterCase(
        "larger-tokens",
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [69, 3]},
        resized=70,
    ),
    AdapterCase(
        "larger-tied-tokens-by-name",
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [64, 66]}},
        tied=True,
        resized=70,
    ),
    AdapterCase(
        "one-layer-and-head",
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    ),
    AdapterCase(
        "larger-tied-tokens",
        "qwen2",
        {"target_modules": ["q_proj"], "trainable_token_indices": [64, 65]},
        tied=True,
        resized=70,
    ),
]

DTYPES = [
    AdapterCase(
        "bfloat16",
        "llama",
        {"target_modules": "all-linear"},
        base_dtype="bfloat16",
        adapter_dtype="bfloat16",
    ),
    AdapterCase("bfloat16-base", "qwen2", {"target_modules": "all-linear"}, base_dtype="bfloat16"),
    AdapterCase(
        "float16",
        "qwen2",
        {"target_modules": [*EMBEDDINGS, "q_proj"], "use_rslora": True},
        base_dtype="float16",
        adapter_dtype="float16",
    ),
    AdapterCase(
        "float16-base",
        "llama",
        {"target_modules": ["v_proj"], "trainable_token_indices": [1, 2], "bias": "all"},
        attention_bias=True,
        base_dtype="float16",
    ),
    AdapterCase(
        "bfloat16-adapter",
        "llama",
        {"target_modules": [*EMBEDDINGS, "o_proj"]},
        adapter_dtype="bfloat16",
    ),
    AdapterCase("float16-adapter", "qwen2", {"target_modules": MLP}, adapter_dtype="float16"),
    AdapterCase(
        "bfloat16-adapter-float16-base",
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
        base_dtype="float16",
        adapter_dtype="bfloat16",
    ),
    AdapterCase(
        "float16-adapter-bfloat16-base",
        "qwen2",
        {"target_modules": ["q_proj"], "lora_bias": True},
        base_dtype="bfloat16",
        adapter_dtype="float16",
    ),
    AdapterCase(
        "bfloat16-dora",
        "qwen2",
        {"target_modules": ["embed_tokens", "down_proj"], "use_dora": True},
        base_dtype="bfloat16",
        adapter_dtype="bfloat16",
    ),
    AdapterCase(
        "float16-dora",
        "llama",
        {"target_modules": ["lm_head", "k_proj"], "use_dora": True},
        base_dtype="float16",
        adapter_dtype="float16",
    ),
    AdapterCase(
        "bfloat16-base-dora",
        "llama",
        {"target_modules": ATTENTION, "use_dora": True},
        base_dtype="bfloat16",
    ),
    AdapterCase(
        "bfloat16-base-tying",
        "qwen2",
        {"target_modules": ["v_proj"], "modules_to_save": EMBEDDINGS, "ensure_weight_tying": True},
        tied=True,
        base_dtype="bfloat16",
    ),
    AdapterCase(
        "bfloat16-larger",
        "llama",
        {"target_modules": [*EMBEDDINGS, "q_proj"]},
        resized=70,
        base_dtype="bfloat16",
    ),
]

CASES = [*TARGETS, *SCALES, *UNTIED, *BIASES, *DORA, *TIED, *TYING, *RESIZED, *DTYPES]
