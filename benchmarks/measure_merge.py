"""Measure a merge of a real model's shape: seconds, and peak anonymous memory.

    python benchmarks/measure_merge.py /tmp/bench --method ties --shape tinyllama-1.1b

Makes a base and fine-tunes (random weights, seeded, bfloat16; kept for the next run), plans a
merge and carries it out with a driver in processes of their own, and prints what it cost. Memory
is sampled from /proc 50 times a second (Linux). Delete the folder afterwards: it holds 9 GB for
1.1B.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model_safetensors import TensorInfo  # noqa: E402
from model_utils import FolderWriter, rows_of  # noqa: E402

SHAPES = {
    "tiny": (64, 176, 2, 4, 2, 512),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
}
"""hidden size, intermediate size, layers, heads, key-value heads, vocabulary."""

OPTIONS = {
    "linear": ("--weights",),
    "slerp": (),
    "task_arithmetic": ("--weights",),
    "ties": ("--weights", "--densities"),
    "dare": ("--weights", "--densities"),
}
"""The lists that each method takes; its models get 0.5, 0.4, 0.3, ..."""


def tensor_shapes(shape: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with a head of its own."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    key_value = hidden // heads * kv_heads
    per_layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        for name, size in per_layer.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = size
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def config(shape: str) -> str:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return json.dumps(values, indent=2)


def make_model(folder: Path, shape: str, model: int) -> None:
    """Model 0 is the base, N(0, 0.02); the others are the base plus N(0, 0.001)."""
    if folder.exists():
        return
    tensors = {name: TensorInfo("BF16", size) for name, size in tensor_shapes(shape).items()}
    with FolderWriter(folder, tensors, 10**12) as writer:
        for number, (name, info) in enumerate(tensors.items()):
            base = torch.Generator().manual_seed(number)
            noise = torch.Generator().manual_seed(number + 100_000 * model)
            for first, size in row_blocks(info.shape):
                rows = torch.randn(size, generator=base) * 0.02
                if model:
                    rows += torch.randn(size, generator=noise) * 0.001
                writer.write_rows(name, first, rows.to(torch.bfloat16).view(torch.uint16).numpy())
        writer.write_text("config.json", config(shape))
        writer.commit()


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, int]]]:
    rows, row_length = rows_of(shape)
    for first in range(0, rows, 1024):
        yield first, (min(1024, rows - first), row_length)


def anonymous_memory(pid: int) -> int:
    """Bytes of memory that the process has for itself now; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return sum(int(line.split()[1]) * 1024 for line in lines)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of a command."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where models are made")
    parser.add_argument("--method", nargs="+", choices=tuple(OPTIONS), default=["ties"])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--models", type=int, default=3, help="fine-tunes (default: %(default)s)")
    arguments, extra = parser.parse_known_args()
    folders = [
        arguments.folder / f"{arguments.shape}-{model}" for model in range(arguments.models + 1)
    ]
    base, *tuned = folders
    for model, folder in enumerate(folders):
        make_model(folder, arguments.shape, model)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    for method in arguments.method:
        output = arguments.folder / "merged"
        shutil.rmtree(output, ignore_errors=True)
        models = tuned[:2] if method == "slerp" else tuned
        positional = [] if method in ("linear", "slerp") else [str(base)]
        command = [sys.executable, str(ROOT / f"{method}_llama.py"), *positional, "--ft_models"]
        command += [*map(str, models), "--save", str(output), "--quiet", *extra]
        for option in OPTIONS[method]:
            command += [option, *(f"{0.5 - 0.1 * index:.1f}" for index in range(len(models)))]
        planned = json.loads(subprocess.check_output([*command, "--plan", "--json"]))
        seconds, peak = run(command)
        print(
            f"{method:<16} {seconds:7.1f} s   {peak / 1e6:7.0f} MB anonymous, planned "
            f"{planned['memory_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
