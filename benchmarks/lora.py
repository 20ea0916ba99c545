"""Time and memory of what is done with LoRA adapters, beside PEFT.

    python benchmarks/lora.py FOLDER [--rank 16] [--runs 3] [--extract]

Makes a base of TinyLlama-1.1B's shape (random weights, bfloat16) and two adapters for all its
projections (float32), and measures whole commands with a warm page cache: folding one adapter,
here and with PEFT's merge_and_unload and save_pretrained; TIES of base and both adapters; merging
both into one; with --extract, taking the adapter out of the folded model again (minutes). The
outputs are deleted, the inputs stay.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare import (  # noqa: E402
    SHAPES,
    Measured,
    measure,
    megabytes,
    model_folders,
    prepare_shape,
    say,
    session,
    set_cache,
    tensor_shapes,
)

SHAPE = "tinyllama-1.1b"


def make_adapter(folder: Path, base: Path, rank: int, seed: int) -> None:
    """An adapter for all projections; its changes are as large as a fine-tune's."""
    import torch

    from model_lora_writer import NewAdapter, write_adapter
    from model_partial import PartialFolder

    generator = torch.Generator().manual_seed(seed)
    new = NewAdapter(str(base), target_modules=[])
    for name, shape in tensor_shapes(SHAPES[SHAPE]).items():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            lora_a = torch.randn(rank, shape[1], generator=generator) * 0.02
            lora_b = torch.randn(shape[0], rank, generator=generator) * 0.02
            new.factors[module] = lora_a.numpy(), lora_b.numpy(), False
    new.target_modules = sorted({module.rpartition(".")[2] for module in new.factors})
    with PartialFolder(folder) as partial:
        partial.begin({})
        write_adapter(new, partial, "F32", {})


def best(name: str, command: Sequence[str], out: Path, inputs: Sequence[Path], runs: int) -> None:
    """Measure a command several times, and print the median."""
    found: list[Measured] = []
    for _ in range(runs):
        rmtree(out, ignore_errors=True)
        set_cache("warm", inputs)
        measured = measure(command)
        if measured.error:
            say(f"{name}: FAILED: {measured.error}")
            return
        found.append(measured)
    seconds = statistics.median(each.seconds for each in found)
    anonymous = max(each.peak_anonymous for each in found)
    resident = max(each.peak_rss for each in found)
    say(
        f"{name:<32} {seconds:7.1f} s   {megabytes(anonymous):>6} MB anonymous, "
        f"{megabytes(resident):>6} MB resident"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--extract", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    prepare_shape(arguments.folder, SHAPE, 0)
    (base,) = model_folders(arguments.folder, SHAPE, 0)
    adapters = [arguments.folder / SHAPE / f"adapter-{arguments.rank}-{seed}" for seed in (1, 2)]
    for seed, adapter in enumerate(adapters, 1):
        if not adapter.exists():
            make_adapter(adapter, base, arguments.rank, seed)
    out, folded = arguments.folder / "output", arguments.folder / "folded"
    one, two = map(str, adapters)
    ours = [sys.executable, str(ROOT / "lora_llama.py")]
    ties = [sys.executable, str(ROOT / "ties_llama.py"), str(base), "--densities", "0.5", "0.5"]
    peer = [sys.executable, str(ROOT / "benchmarks/peers/peft_fold_peer.py")]
    say(json.dumps({key: value for key, value in session(None).items() if key != "command"}))
    inputs = [base, *adapters]
    cases = {
        "fold": [*ours, "fold", str(base), one, "--quiet", "--save", str(out)],
        "fold, PEFT": [*peer, str(base), one, str(out)],
        "TIES of two adapters": [*ties, "--quiet", "--ft_models", one, two, "--save", str(out)],
        "two adapters into one, exactly": [*ours, "merge", one, two, "--quiet", "--save", str(out)],
        "two adapters into one, by SVD": [
            *(*ours, "merge", one, two, "--quiet", "--save", str(out)),
            *("--method", "svd", "--rank", str(arguments.rank)),
        ],
    }  # fmt: skip
    for name, command in cases.items():
        best(name, command, out, inputs, arguments.runs)
    if arguments.extract:
        rmtree(folded, ignore_errors=True)
        fold = measure([*cases["fold"][:-1], str(folded)])
        rank = ["--rank", str(arguments.rank), "--quiet", "--save", str(out)]
        extract = [*ours, "extract", str(folded), "--base", str(base), *rank]
        if not fold.error:
            best("extract", extract, out, [base, folded], 1)
    for place in (out, folded):
        rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
