"""Compare what merges cost: ours, mergekit's, transformers in memory, and reading and writing.

    python benchmarks/compare.py /data/bench
    python benchmarks/compare.py /data/bench --shapes llama-2-7b --methods ties --drop
    python benchmarks/compare.py /data/bench --cache warm --runs 3 --docs docs

Makes a base and fine-tunes of a real model's shape (random, seeded, bfloat16; kept for the next
run), and merges them to bfloat16 with

    ours          the drivers; ties_model is ties_llama.py --trim_scope model
    mergekit      mergekit-yaml as it comes, in an environment made in FOLDER; it has no
                  whole-model TIES, so ties_model is set beside its ties
    transformers  load all models, average, save; linear only
    floor         no merge: reads the same inputs once, writes as many bytes, waits for the disk

Every measurement is a whole process timed from outside, start-up included, after every program
has merged the tiny shape once unmeasured, so that compiled code is cached and libraries are in
memory. With a warm cache the inputs were read right before; with a cold one they were dropped
from it. Memory is sampled from /proc 50 times a second (Linux), child processes included.

Results are added to FOLDER/results.json one by one. What is in there, failures too, is not
measured again without --again, so a stopped command can be repeated and a finished one extended;
--docs tells of all of them. The exit status is 1 if a run failed or a shape was left out. FOLDER
holds 9 GB for tinyllama-1.1b, 67 GB for llama-2-7b, and 1 GB or more for mergekit.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

# Only the standard library is imported here, the rest where it is needed: the peak RSS that Linux
# reports for a child begins at what its parent held, so this process has to stay small.

ROOT = Path(__file__).resolve().parent.parent
WHO = ("ours", "mergekit", "transformers", "floor")
CACHES = ("warm", "cold")
MERGEKIT_REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")
BLOCK = 8 * 2**20
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


class Shape(NamedTuple):
    """What a Llama's config.json says of its tensors."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    positions: int = 4096
    rope_theta: float = 10000.0
    bos: int = 1
    eos: int = 2


SHAPES: Mapping[str, Shape] = {
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000, positions=2048),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, True, 131072, 5e5, 128000, 128001),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256, True, 131072, 5e5, 128000, 128001),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "tiny": Shape(64, 176, 2, 4, 2, 512),
}


class Method(NamedTuple):
    """How a merge is asked for; its models get the weights and densities 0.5, 0.45, 0.4, ...

    Attributes:
        driver: our script, without _llama.py.
        inputs: a key of `INPUTS`.
        mergekit: the name of its method; empty where it has none.
        lists: the options that take a number for each model.
        extra: more options of our driver.
        shared: mergekit's parameters for all models; those whose defaults could be others than
            ours.
    """

    driver: str
    inputs: str
    mergekit: str
    lists: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    shared: Mapping[str, Any] = {}


MODELS, TWO, ONE, PAIR = "models", "two models", "one model", "base and one model"
WITH_BASE = "base and models"
WEIGHTS = ("weights",)
TIES_LISTS = ("weights", "densities")

METHODS: Mapping[str, Method] = {
    "linear": Method("linear", MODELS, "linear", WEIGHTS, shared={"normalize": True}),
    "slerp": Method("slerp", TWO, "slerp", shared={"t": 0.5}),
    "nuslerp": Method("nuslerp", TWO, "nuslerp", WEIGHTS),
    "nuslerp_rows": Method(
        "nuslerp",
        TWO,
        "nuslerp",
        WEIGHTS,
        ("--no-nuslerp_flatten",),
        {"nuslerp_flatten": False},
    ),
    "multislerp": Method("multislerp", MODELS, "multislerp", WEIGHTS),
    "karcher": Method("karcher", MODELS, "karcher"),
    "sequential": Method("sequential", MODELS, "", WEIGHTS),
    "nearswap": Method("nearswap", PAIR, "nearswap", (), ("--t", "0.001"), {"t": 0.001}),
    "passthrough": Method("passthrough", ONE, "passthrough"),
    "model_stock": Method("model_stock", WITH_BASE, "model_stock"),
    "task_arithmetic": Method(
        "task_arithmetic", WITH_BASE, "task_arithmetic", WEIGHTS, shared={"normalize": False}
    ),
    "ties": Method("ties", WITH_BASE, "ties", TIES_LISTS, shared={"normalize": True}),
    "ties_model": Method("ties", WITH_BASE, "ties", TIES_LISTS, ("--trim_scope", "model")),
    "dare": Method("dare", WITH_BASE, "dare_linear", TIES_LISTS, shared={"normalize": False}),
    "della": Method("della", WITH_BASE, "della", TIES_LISTS, shared={"normalize": True}),
    "breadcrumbs": Method(
        "breadcrumbs", WITH_BASE, "breadcrumbs", TIES_LISTS, shared={"normalize": False}
    ),
    "sce": Method("sce", WITH_BASE, "sce", (), ("--select_topk", "0.1"), {"select_topk": 0.1}),
    "ram": Method("ram", WITH_BASE, "ram"),
    "consensus": Method("consensus", WITH_BASE, "", WEIGHTS),
    "arcee_fusion": Method("arcee_fusion", PAIR, "arcee_fusion"),
}

INPUTS: Mapping[str, Callable[[list[Path]], list[Path]]] = {
    MODELS: lambda folders: folders[1:],
    TWO: lambda folders: folders[1:3],
    ONE: lambda folders: folders[1:2],
    PAIR: lambda folders: folders[:2],
    WITH_BASE: lambda folders: folders,
}
"""Which of the base and its fine-tunes are read."""

BASED = (WITH_BASE, PAIR)


class Case(NamedTuple):
    """What is measured once.

    Attributes:
        method: a key of `METHODS`; of `INPUTS` for the floor, which is the same for all methods
            that read the same files.
        options: more options of our driver, as one string.
        run: 1 for the first.
    """

    shape: str
    models: int
    cache: str
    method: str
    who: str
    options: str
    run: int


class Measured(NamedTuple):
    """What a process cost; `error` is empty if it did its work."""

    seconds: float
    peak_anonymous: int
    peak_rss: int
    error: str


# Inputs


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors; a tied model has no head of its own."""
    hidden, intermediate = shape.hidden, shape.intermediate
    key_value = hidden // shape.heads * shape.kv_heads
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
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    for layer in range(shape.layers):
        for name, size in per_layer.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = size
    head = {} if shape.tied else {"lm_head.weight": (shape.vocabulary, hidden)}
    return shapes | {"model.norm.weight": (hidden,)} | head


def model_bytes(shape: Shape) -> int:
    """Of the tensors, in bfloat16."""
    return sum(2 * math.prod(size) for size in tensor_shapes(shape).values())


def config(shape: Shape) -> str:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    return json.dumps(values, indent=2) + "\n"


def model_folders(folder: Path, shape: str, models: int) -> list[Path]:
    """The base, then its fine-tunes."""
    return [folder / shape / name for name in ("base", *(f"tuned-{i + 1}" for i in range(models)))]


def make_models(shape_name: str, folders: Sequence[str]) -> None:
    """Make those that are not there. The base is N(0, 0.02), a fine-tune that plus N(0, 0.001)."""
    sys.path.insert(0, str(ROOT))
    import torch

    from model_partial import PartialFolder
    from model_safetensors import TensorInfo
    from model_writer import FolderWriter

    torch.set_num_threads(1)  # the tensors are spread over the cores instead
    shape = SHAPES[shape_name]
    tensors = {name: TensorInfo("BF16", size) for name, size in tensor_shapes(shape).items()}
    with contextlib.ExitStack() as stack:
        partial = {
            model: stack.enter_context(PartialFolder(Path(folder)))
            for model, folder in enumerate(folders)
            if not Path(folder).exists()
        }
        writers = {
            model: stack.enter_context(FolderWriter(each, tensors, 10**10, plan={}))
            for model, each in partial.items()
        }

        def make_tensor(number: int, name: str) -> None:
            """The same numbers whichever models are made: each has a generator of its own."""
            base = torch.Generator().manual_seed(number)
            noises = {
                model: torch.Generator().manual_seed(number + 100_000 * model) for model in writers
            }
            for first, size in row_blocks(tensors[name].shape):
                rows = torch.randn(size, generator=base).mul_(0.02)
                for model, writer in writers.items():
                    changed = rows
                    if model:
                        noise = torch.randn(size, generator=noises[model])
                        changed = noise.mul_(0.001).add_(rows)
                    bits = changed.to(torch.bfloat16).view(torch.uint16)
                    writer.write_rows(name, first, bits.numpy())

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(make_tensor, range(len(tensors)), tensors))
        for writer in writers.values():
            writer.finish({name: {} for name in tensors})
            writer.write_text("config.json", config(shape))
            writer.commit()


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, int]]]:
    """First row and size of blocks of about a million elements."""
    rows, row_length = shape if len(shape) == 2 else (1, *shape)
    step = max(1, 2**20 // row_length)
    for first in range(0, rows, step):
        yield first, (min(step, rows - first), row_length)


def prepare_shape(folder: Path, name: str, models: int) -> None:
    """Make the inputs that are missing.

    Raises:
        OSError: there is no room for them and for a result.
    """
    folders = model_folders(folder, name, models)
    missing = [model for model in folders if not model.exists()]
    each = model_bytes(SHAPES[name])
    needed, free = (len(missing) + 1) * each, shutil.disk_usage(folder).free
    what = f"{len(missing)} models and a result of {each / 1e9:.1f} GB each"
    if needed > free:
        raise OSError(
            f"{name} needs {needed / 1e9:.1f} GB ({what}), and {folder} has {free / 1e9:.1f} GB "
            "free. Free some, or use another folder"
        )
    if missing:
        say(f"making {name}: {what} need {needed / 1e9:.1f} of {free / 1e9:.1f} GB free")
        started = time.monotonic()
        subprocess.run(call(make_models, name, [*map(str, folders)]), check=True)
        say(f"made in {time.monotonic() - started:.0f} s")


# What is measured


def call(function: Callable[..., None], *arguments: object) -> list[str]:
    """The command that calls a function of this file in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); "
        f"import compare; compare.{function.__name__}(*{arguments!r})"
    )
    return [sys.executable, "-c", code]


def average_in_memory(output: str, weights: Sequence[float], folders: Sequence[str]) -> None:
    """What one would write without a merging tool; sums in float32, models in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16) for f in folders]
    with torch.no_grad():
        for params in zip(*(model.parameters() for model in models), strict=True):
            terms = (weight * param.float() for weight, param in zip(weights, params, strict=True))
            params[0].copy_(sum(terms) / sum(weights))
    models[0].save_pretrained(output)


def read_and_write(output: str, size: int, folders: Sequence[str]) -> None:
    """Read all files once, then write that many bytes and wait for the disk."""
    buffer = memoryview(bytearray(BLOCK))
    for folder in folders:
        for file in files_of([Path(folder)]):
            read_file(file, buffer)
    with open(output, "wb", buffering=0) as target:
        while size:
            size -= target.write(buffer[: min(size, BLOCK)])
        os.fsync(target.fileno())


def files_of(folders: Iterable[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.iterdir())]


def read_file(path: Path, buffer: memoryview) -> None:
    with open(path, "rb", buffering=0) as source:
        while source.readinto(buffer):
            pass


def shares(models: Sequence[object]) -> list[float]:
    """Weights and densities alike."""
    return [round(0.5 - 0.05 * index, 2) for index in range(len(models))]


def inputs_of(case: Case, folder: Path) -> list[Path]:
    kind = case.method if case.who == "floor" else METHODS[case.method].inputs
    return INPUTS[kind](model_folders(folder, case.shape, case.models))


def command_of(case: Case, folder: Path, mergekit: Path, output: Path) -> list[str]:
    inputs = inputs_of(case, folder)
    if case.who == "ours":
        return our_command(case, inputs, output)
    if case.who == "mergekit":
        recipe = output.with_name("recipe.yml")
        recipe.write_text(json.dumps(mergekit_recipe(case.method, inputs), indent=2))  # is YAML
        return [str(mergekit), str(recipe), str(output)]
    names = [str(path) for path in inputs]
    if case.who == "transformers":
        return call(average_in_memory, str(output), shares(inputs), names)
    return call(read_and_write, str(output), model_bytes(SHAPES[case.shape]), names)


def our_command(case: Case, inputs: Sequence[Path], output: Path) -> list[str]:
    method = METHODS[case.method]
    base, models = (inputs[:1], inputs[1:]) if method.inputs in BASED else ([], inputs)
    command = [sys.executable, str(ROOT / f"{method.driver}_llama.py"), *map(str, base)]
    command += ["--ft_models", *map(str, models), "--save", str(output), "--quiet"]
    for option in method.lists:
        command += [f"--{option}", *map(str, shares(models))]
    return [*command, *method.extra, *shlex.split(case.options)]


def mergekit_recipe(name: str, inputs: Sequence[Path]) -> dict[str, Any]:
    """Says what mergekit's default could be another than ours of."""
    method = METHODS[name]
    models = inputs[1:] if method.inputs in BASED else inputs
    keys = [{"weights": "weight", "densities": "density"}[option] for option in method.lists]
    recipe: dict[str, Any] = {
        "merge_method": method.mergekit,
        "models": [
            {"model": str(model), "parameters": dict.fromkeys(keys, share)}
            for model, share in zip(models, shares(models), strict=True)
        ],
        "parameters": dict(method.shared),
        "dtype": "bfloat16",
    }
    if method.inputs in BASED or name == "slerp":  # its base of a slerp is where t is 0
        recipe["base_model"] = str(inputs[0])
    return recipe


def install_mergekit(environment: Path) -> None:
    say(f"installing {' '.join(MERGEKIT_REQUIREMENTS)} in {environment}")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([*pip, *MERGEKIT_REQUIREMENTS], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{environment} could not be made. Install mergekit yourself and name its "
            "mergekit-yaml with --mergekit, or leave mergekit out of --who"
        ) from error


def planned_memory(command: Sequence[str]) -> int | None:
    """What our plan says, in bytes; None if there is no plan."""
    done = subprocess.run(
        [*command, "--plan", "--json"], capture_output=True, text=True, env=ENVIRONMENT
    )
    if done.returncode:
        return None
    return int(json.loads(done.stdout)["memory_bytes"])


# Measuring


def set_cache(state: str, folders: Iterable[Path]) -> None:
    """Fill the page cache with the inputs, or drop them from it."""
    os.sync()  # what is still being written would slow the run down, and cannot be dropped
    buffer = memoryview(bytearray(BLOCK))
    for file in files_of(folders):
        if state == "warm":
            read_file(file, buffer)
        else:
            with open(file, "rb") as source:
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def processes(pid: int) -> Iterator[int]:
    """A process and all that it started and that are still there."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from processes(int(child))


def anonymous_memory(pid: int) -> int:
    """Bytes of memory that the process and its children have for themselves now."""
    total = 0
    for process in processes(pid):
        with contextlib.suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
    return total


def measure(command: Sequence[str]) -> Measured:
    peak = 0
    with tempfile.TemporaryFile() as errors:  # a pipe would have to be emptied meanwhile
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=ENVIRONMENT,
        )
        # If memory runs out, this process goes, and not another one of the machine.
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        try:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            while not ended:
                peak = max(peak, anonymous_memory(process.pid))
                time.sleep(0.02)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here, not there
        error = "" if process.returncode == 0 else failure(process.returncode, errors)
    return Measured(round(seconds, 3), peak, usage.ru_maxrss * 1024, error)


def failure(code: int, errors: Any) -> str:
    """How a process ended, and the last that it said."""
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()[-5:]
    how = f"killed by signal {-code} (9: often for lack of memory)" if code < 0 else f"exit {code}"
    return "\n".join([how, *said])


def measure_case(case: Case, folder: Path, mergekit: Path) -> dict[str, Any]:
    """What is recorded of a run; its output is deleted."""
    output = folder / "output" / "merged"
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir()
    try:
        command = command_of(case, folder, mergekit, output)
        planned = planned_memory(command) if case.who == "ours" else None
        set_cache(case.cache, inputs_of(case, folder))
        measured = measure(command)
        written = sum(file.stat().st_size for file in output.parent.rglob("*") if file.is_file())
        expected = model_bytes(SHAPES[case.shape])
        if not measured.error and written < expected:  # tensors are missing
            measured = measured._replace(error=f"wrote {written} of {expected} bytes")
    finally:
        shutil.rmtree(output.parent)
    return case._asdict() | measured._asdict() | {"planned_memory": planned}


def describe(run: Mapping[str, Any]) -> str:
    keys = ("shape", "cache", "method", "who", "options")
    name = f"{' '.join(str(run[key]) for key in keys if run[key])} #{run['run']}"
    if run["error"]:
        return f"{name}: FAILED after {run['seconds']:.1f} s: {run['error']}"
    planned = f" (planned {megabytes(run['planned_memory'])})" if run["planned_memory"] else ""
    return (
        f"{name:<48} {run['seconds']:8.1f} s   {megabytes(run['peak_anonymous'])} MB anonymous"
        f"{planned}, {megabytes(run['peak_rss'])} MB RSS"
    )


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f}"


def say(text: str) -> None:
    print(text, flush=True)


# Results


def session(mergekit: Path | None) -> dict[str, Any]:
    """Where, when and with what the runs were made."""
    return {
        "date": date.today().isoformat(),
        "command": shown_command(sys.argv),
        "revision": revision(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions(mergekit),
    }


def shown_command(arguments: Sequence[str]) -> str:
    """The command as anyone would repeat it: without the paths of this machine."""
    shown, hidden = [], False
    for argument in arguments[1:]:
        if hidden or argument == "--mergekit":
            hidden = not hidden
            continue
        shown.append("FOLDER" if os.path.isdir(argument) and os.path.isabs(argument) else argument)
    return shlex.join(["python", "benchmarks/compare.py", *shown])


def processor() -> str:
    """Its model name, where the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def revision() -> str:
    """The commit of this checkout, "-dirty" if it was changed since; empty outside of git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return ""


def versions(mergekit: Path | None) -> dict[str, str]:
    """By package; mergekit's environment, which has packages of its own, is asked by itself."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numba", "numpy", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if mergekit:
        script = (
            "from importlib.metadata import version as v\n"
            "print(v('mergekit'), f'(torch {v(\"torch\")}, transformers {v(\"transformers\")})')"
        )
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = [str(mergekit.parent / "python"), "-c", script]
            found["mergekit"] = subprocess.check_output(command, text=True).strip()
    return found


class Results:
    """FOLDER/results.json: the runs by their case, and the sessions that they were made in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        read = json.loads(path.read_text()) if path.exists() else {"sessions": [], "runs": []}
        self.sessions: list[dict[str, Any]] = read["sessions"]
        self.runs: dict[Case, dict[str, Any]] = {
            Case(*(run[field] for field in Case._fields)): run for run in read["runs"]
        }

    def add(self, case: Case, run: dict[str, Any]) -> None:
        """Save a run of the last session; an earlier one of the same case goes."""
        self.runs[case] = run | {"session": len(self.sessions) - 1}
        partial = self.path.with_suffix(".partial")
        text = json.dumps({"sessions": self.sessions, "runs": [*self.runs.values()]}, indent=2)
        partial.write_text(text + "\n")
        partial.replace(self.path)


# Report


class Row(NamedTuple):
    """The runs of one program for one method: a line of a table."""

    method: str
    who: str
    options: str
    runs: list[dict[str, Any]]

    def median(self, key: str) -> float | None:
        """Of the runs that did not fail; None where there is nothing."""
        values = [run[key] for run in self.runs if not run["error"] and run[key] is not None]
        return statistics.median(values) if values else None


def rows_of_table(runs: Mapping[Case, dict[str, Any]]) -> list[Row]:
    """By method: every method that was merged, with what stands for it of the others."""
    rows = []
    for method in METHODS:
        if not any(case.method == method for case in runs):
            continue
        for who in WHO:
            subject = subject_of(who, method)
            cases = [case for case in runs if (case.who, case.method) == (who, subject)]
            for options in sorted({case.options for case in cases}):
                found = [runs[case] for case in cases if case.options == options]
                rows.append(Row(method, who, options, found))
    return rows


def subject_of(who: str, method: str) -> str:
    """The `Case.method` that is measured for a method."""
    if who == "floor":
        return METHODS[method].inputs
    return "ties" if who == "mergekit" and method == "ties_model" else method


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| method | who | runs | seconds | ÷ floor | mergekit ÷ ours | peak anonymous MB "
        "| planned MB | peak RSS MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = {
            other.who: other.median("seconds") for other in rows if other.method == row.method
        }
        own = row.median("seconds")
        cells = [
            row.method,
            f"{row.who} {row.options}".strip(),
            str(sum(not run["error"] for run in row.runs)),
            "failed" if own is None else f"{own:.1f}",
            ratio(own, seconds.get("floor")) if row.who != "floor" else "",
            ratio(seconds.get("mergekit"), own) if row.who == "ours" else "",
            *(cell(row.median(key)) for key in ("peak_anonymous", "planned_memory", "peak_rss")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(value: float | None, of: float | None) -> str:
    return f"{value / of:.2f}" if value and of else ""


def cell(size: float | None) -> str:
    return "" if size is None else megabytes(size)


def failures(rows: Sequence[Row]) -> str:
    """A line for every failed run: how it ended, and the last that it said."""
    errors = {
        f"- {row.method}, {row.who}: {brief(run['error'])}"
        for row in rows
        for run in row.runs
        if run["error"]
    }
    return "\n".join(["Failed:", "", *sorted(errors)]) if errors else ""


def brief(error: str) -> str:
    how, *said = error.splitlines()
    return f"{how}: `{said[-1].strip().replace('`', chr(39))}`" if said else how


def markdown(results: Results) -> str:
    parts = [
        "# Time and memory of merges",
        "Written by `benchmarks/compare.py`, which says how each of these is measured. Seconds "
        "are of whole processes, start-up included, the median of the runs. *Floor* reads the "
        "same inputs once on one thread and writes a result's bytes. Ours and the floor end when "
        "the result is on the disk; mergekit and transformers leave it to the system to write. "
        "Ours computes in float32, mergekit in bfloat16, as its recipe asks for bfloat16; "
        "transformers sums in float32. Before measuring, every program merged the tiny shape "
        "once, so that compiled code was cached. Anonymous memory is the process's own; RSS "
        "counts input files that it has mapped, too. mergekit has no whole-model TIES: "
        "`ties_model` is compared with its `ties`.",
        *sessions_used(results),
    ]
    if any(case.who == "ours" and case.shape == "tiny" for case in results.runs):
        parts.append("The tiny shape tells of starting up only.")
    for (shape, models, cache), runs in groups(results).items():
        rows = rows_of_table(runs)
        if rows:
            title = f"## {shape}, {models} fine-tunes, {cache} cache"
            note = too_large(shape, models, cache, results)
            parts += filter(None, [title, note, table(rows), failures(rows)])
    return "\n\n".join(parts) + "\n"


def sessions_used(results: Results) -> list[str]:
    """A paragraph for every session that has runs left."""
    used = sorted({run["session"] for run in results.runs.values()})
    return [session_text(results.sessions[number]) for number in used]


def session_text(made: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{package} {version}" for package, version in made["versions"].items())
    at = f" at {made['revision']}" if made["revision"] else ""
    return (
        f"{made['date']}{at}: {made['cores']} cores of {made['cpu']}, "
        f"{made['memory_bytes'] / 1e9:.0f} GB of memory; {packages}.\n\n    {made['command']}"
    )


def too_large(shape: str, models: int, cache: str, results: Results) -> str:
    size = (models + 1) * model_bytes(SHAPES[shape])
    if cache == "cold" or size < min(made["memory_bytes"] for made in results.sessions):
        return ""
    return f"The inputs, {size / 1e9:.0f} GB, do not fit in memory, so only some were cached."


def groups(results: Results) -> dict[tuple[str, int, str], dict[Case, dict[str, Any]]]:
    """The runs of each table, tables in the order of `SHAPES`."""

    def place(case: Case) -> tuple[int, int, int]:
        return [*SHAPES].index(case.shape), case.models, CACHES.index(case.cache)

    grouped: dict[tuple[str, int, str], dict[Case, dict[str, Any]]] = {}
    for case in sorted(results.runs, key=place):
        table_of = (case.shape, case.models, case.cache)
        grouped.setdefault(table_of, {})[case] = results.runs[case]
    return grouped


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """A bar for each method and program; the same results always give the same file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    seconds = {(row.method, row.who): row.median("seconds") for row in rows if not row.options}
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(8, 1.5 + 0.62 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for position, who in enumerate(WHO):
        bars = [(i, seconds.get((method, who))) for i, method in enumerate(methods)]
        places = [i + (position - 1.5) * 0.2 for i, value in bars if value]
        lengths = [value for _, value in bars if value]
        if lengths:
            container = axes.barh(places, lengths, height=0.19, label=who)
            axes.bar_label(container, fmt="%.3g", fontsize=8, padding=2)
    values = [value for value in seconds.values() if value]
    if max(values) > 20 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=len(WHO), frameon=False)
    figure.savefig(path, metadata={"Date": None})


def write_docs(results: Results, folder: Path, shape: str, models: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.md").write_text(markdown(results), "utf-8")
    rows = rows_of_table(groups(results).get((shape, models, "warm"), {}))
    if any(row.median("seconds") for row in rows):
        title = f"Merging {models} fine-tunes of {shape}, bfloat16, warm cache"
        draw(rows, title, folder / "benchmarks.svg")
    else:
        say(f"no chart: nothing was measured of {shape} with a warm cache")
    say(f"wrote {folder}/benchmarks.md")


# The command


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Everything that is asked for, each once, in the order of measuring."""
    cases = [
        Case(
            shape,
            arguments.models,
            cache,
            subject_of(who, method),
            who,
            arguments.driver_options if who == "ours" else "",
            run + 1,
        )
        for shape in arguments.shapes
        for cache in arguments.cache
        for run in range(arguments.runs)
        for method in arguments.methods
        for who in arguments.who
        if (who != "transformers" or method == "linear")
        and (who != "mergekit" or METHODS[method].mergekit)
    ]
    return list(dict.fromkeys(cases))


def rehearse(cases: Sequence[Case], folder: Path, mergekit: Path) -> None:
    """Merge the tiny shape once by every method with every program."""
    programs = [case for case in cases if case.who != "floor"]
    if not programs:
        return
    say("merging the tiny shape unmeasured, so that compiled code is cached")
    prepare_shape(folder, "tiny", programs[0].models)
    for case in dict.fromkeys(
        case._replace(shape="tiny", cache="warm", run=0) for case in programs
    ):
        run = measure_case(case, folder, mergekit)
        if run["error"]:
            say(describe(run))


def measure_shape(cases: Sequence[Case], folder: Path, mergekit: Path, results: Results) -> bool:
    """Measure the cases of one shape; False if one failed or there was no room for it."""
    try:
        prepare_shape(folder, cases[0].shape, cases[0].models)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"{cases[0].shape} is left out: {error}")
        return False
    well = True
    for case in cases:
        run = measure_case(case, folder, mergekit)
        say(describe(run))
        results.add(case, run)
        well &= not run["error"]
    return well


def measure_all(
    cases: Sequence[Case], folder: Path, arguments: argparse.Namespace, results: Results
) -> bool:
    """Measure shape by shape; False if not all went well."""
    environment = folder / "mergekit-env"
    mergekit = Path(os.path.abspath(arguments.mergekit or environment / "bin" / "mergekit-yaml"))
    uses_mergekit = any(case.who == "mergekit" for case in cases)
    if uses_mergekit and not mergekit.exists():
        install_mergekit(environment)
    results.sessions.append(session(mergekit if uses_mergekit else None))
    rehearse(cases, folder, mergekit)
    well = True
    for shape in dict.fromkeys(case.shape for case in cases):
        chosen = [case for case in cases if case.shape == shape]
        well &= measure_shape(chosen, folder, mergekit, results)
        if arguments.drop:
            shutil.rmtree(folder / shape, ignore_errors=True)
    return well


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where inputs, outputs and results.json are")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["tinyllama-1.1b"])
    parser.add_argument("--models", type=int, default=3, help="fine-tunes, 2 to 8 (default: 3)")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=[*METHODS])
    parser.add_argument("--who", nargs="+", choices=WHO, default=[*WHO])
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=[*CACHES])
    parser.add_argument("--runs", type=int, default=1, help="of each (default: 1)")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--drop", action="store_true", help="delete a shape's inputs afterwards")
    parser.add_argument("--docs", type=Path, help="write benchmarks.md and .svg in this folder")
    parser.add_argument("--mergekit", type=Path, help="use this mergekit-yaml")
    parser.add_argument(
        "--driver-options", default="", help='more options of ours, such as "--threads 1"'
    )
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.models <= 8:
        parser.error(f"--models must be 2 to 8, got {arguments.models}")
    if arguments.mergekit and not arguments.mergekit.is_file():
        parser.error(f"--mergekit: there is no file {arguments.mergekit}")
    if arguments.docs and not importlib.util.find_spec("matplotlib"):
        parser.error("--docs draws a chart and needs matplotlib: pip install matplotlib")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    folder = Path(os.path.abspath(arguments.folder))
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json")
    asked = cases_of(arguments)
    cases = [case for case in asked if arguments.again or case not in results.runs]
    if len(cases) < len(asked):
        say(f"{len(asked) - len(cases)} of {len(asked)} runs are in {results.path} already")
    well = not cases or measure_all(cases, folder, arguments, results)
    if arguments.docs:
        write_docs(results, arguments.docs, arguments.shapes[0], arguments.models)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
