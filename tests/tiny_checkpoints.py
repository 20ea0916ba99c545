"""Tiny but complete model folders, written without transformers, and two ways to read them."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

DType = Literal["bfloat16", "float16", "float32"]
ModelType = Literal["llama", "mistral", "qwen2", "qwen3"]
Shapes = dict[str, tuple[int, ...]]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_llama(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 48,
    hidden_size: int = 32,
    intermediate_size: int = 56,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: DType = "bfloat16",
    tied: bool = False,
    model_type: ModelType = "llama",
    shards: int = 1,
    base: Path | None = None,
    noise: float = 0.02,
    tokenizer: bool = False,
    config_changes: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a model folder and return it; the same arguments give the same bytes.

    Args:
        folder: created with its parents; files already there are overwritten.
        seed: of the random values. Each tensor has its own, whatever else the model holds.
        dtype: of the weights.
        tied: leave lm_head.weight out, as the embedding is used twice.
        shards: number of weight files, with an index when there is more than one.
        base: a folder written by this function. The weights are its weights plus noise, rounded
            to `dtype` once; surplus rows of a larger vocabulary are dropped, missing ones random.
            The sizes are not taken over: say them again.
        noise: standard deviation of that noise; 0 copies the base.
        tokenizer: add a tokenizer that reads character by character, and a chat template. A
            larger vocabulary extends a smaller one; the smallest has 3 tokens.
        config_changes: entries to set in config.json; the weights do not follow.
        drop: names of tensors to leave out, all of which must exist.
        extra: tensors to add, any name, shape and dtype.

    Raises:
        ValueError: a shape other than the vocabulary's differs from the base's.
        KeyError: a name in `drop` is not a tensor of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(model_type, vocab_size, hidden_size, intermediate_size, layers)
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config |= {"tie_word_embeddings": tied, "torch_dtype": dtype}
    if model_type == "qwen3":
        config["head_dim"] = hidden_size // heads
    tensors = make_tensors(tensor_shapes(config), seed, base, noise, getattr(torch, dtype))
    for name in drop:
        del tensors[name]
    save_tensors(folder, tensors | dict(extra or {}), shards)
    write_json(folder / "config.json", config | dict(config_changes or {}))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    if tokenizer:
        write_tokenizer(folder, vocab_size)
    return folder


def make_config(
    model_type: ModelType, vocab_size: int, hidden_size: int, intermediate_size: int, layers: int
) -> dict[str, Any]:
    """The part of config.json that does not depend on heads and dtype."""
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


# Weights


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor's name and shape, in the order of the forward pass."""
    vocabulary = (config["vocab_size"], config["hidden_size"])
    shapes: Shapes = {"model.embed_tokens.weight": vocabulary}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (config["hidden_size"],)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def layer_shapes(config: Mapping[str, Any]) -> Shapes:
    """One decoder layer's tensors; qwen2 adds biases, qwen3 norms inside the attention."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    outputs = {"q": hidden, "k": keys, "v": keys}
    shapes: Shapes = {f"self_attn.{p}_proj.weight": (n, hidden) for p, n in outputs.items()}
    if config["model_type"] == "qwen2":
        shapes |= {f"self_attn.{p}_proj.bias": (n,) for p, n in outputs.items()}
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    return shapes | {
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def make_tensors(
    shapes: Shapes, seed: int, base: Path | None, noise: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights, computed in float32 and rounded to `dtype`."""
    before = read_tensors(base) if base else {}
    tensors = {}
    for name, shape in shapes.items():
        values = random_values(name, shape, seed)
        if name in before:
            values = resize_rows(name, before[name].float(), values)
            values = values + noise * gaussian(f"{seed}/noise/{name}", values.shape)
        tensors[name] = values.to(dtype)
    return tensors


def random_values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values as in a trained model: norms near 1, the rest near 0, float32."""
    offset = 1.0 if name.endswith("norm.weight") else 0.0
    return offset + 0.1 * gaussian(f"{seed}/{name}", shape)


def resize_rows(name: str, old: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """The base's values in the shape of `random`, whose rows fill up a vocabulary."""
    vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
    if old.shape[1:] != random.shape[1:] or (len(old) != len(random) and not vocabulary):
        raise ValueError(f"{name}: the base has shape {[*old.shape]}, not {[*random.shape]}")
    return torch.cat([old[: len(random)], random[len(old) :]])


def gaussian(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal values, float32, the same for the same key and shape."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Files


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    """Write one weight file, or `shards` of them and their index, in the order given."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json and what belongs to it, for exactly `vocab_size` tokens."""
    special = list(SPECIAL_TOKENS.values())
    characters = [
        *"abcdefghijklmnopqrstuvwxyz ",
        *".,:?!\n0123456789",
        *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    ]
    filler = [f"<filler_{i}>" for i in range(vocab_size)]
    words = (special + characters + filler)[:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.index("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    settings |= {"clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings | SPECIAL_TOKENS)
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as the libraries do, two spaces deep."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder by name, of one file or of those its index names."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return tensors


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor's dtype, shape and bytes, by name; blind to how they are filed."""
    hashes = {}
    for name, tensor in read_tensors(folder).items():
        digest = hashlib.sha256(f"{tensor.dtype} {[*tensor.shape]}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        hashes[name] = digest.hexdigest()
    return hashes
