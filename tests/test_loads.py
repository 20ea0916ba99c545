"""What a merge writes, as transformers loads it: run with transformers 4 and with transformers 5.

A base and a fine-tune of every kind of difference are merged by task arithmetic, and the folder
is compared with the same merge computed from whole tensors, whose rows are matched here by what
transformers' own tokenizers say.
"""

import json
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors, save_tensors
from tiny_tokenizers import NORMAL, write_byte_level, write_json, write_sentencepiece
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from linear_utils import task_arithmetic
from merge_recipe import Recipe
from merge_run import merge_to_folder, plan
from model_verify import verify_folder
from model_vocabulary import VocabularySettings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHT = 0.5
END, BEGIN, SPARE, TOOL, TALK = "<|end|>", "<|begin|>", "<|reserved_0|>", "<|tool|>", "<|im_end|>"
SPECIAL = (BEGIN, END, SPARE)
PLAIN = "the quick brown token"


@dataclass(frozen=True)
class Side:
    """One of the two models: its added tokens, rows beyond them, and whether its head is tied."""

    special: tuple[str, ...] = SPECIAL
    ordinary: tuple[str, ...] = ()
    padding: int = 0
    tied: bool = False
    form: str = "tokenizer.json"
    end: str = END

    @property
    def rows(self):
        return NORMAL + len(self.special) + len(self.ordinary) + self.padding


@dataclass(frozen=True)
class Pair:
    """Two models, how they are merged, and the tokens that the result must have."""

    name: str
    base: Side
    tuned: Side
    mode: str
    added: tuple[str, ...]
    rows: int
    model_type: str = "llama"
    tied: bool = False
    settings: dict = field(default_factory=dict)
    end: str = END


LONGER = Side(special=(*SPECIAL, TOOL, TALK))
PADDED = Side(padding=17)
ADDED = Side(special=(*SPECIAL, TOOL), ordinary=("brown",))
RENAMED = Side(special=(BEGIN, END, TALK))
SHUFFLED = Side(special=(SPARE, END, BEGIN))
N = NORMAL

PAIRS = [
    Pair("equal", Side(), Side(), "min", SPECIAL, N + 3),
    Pair("equal, no difference allowed", Side(), Side(), "error", SPECIAL, N + 3, "mistral"),
    Pair("both tied", Side(tied=True), Side(tied=True), "min", SPECIAL, N + 3, "qwen2", True),
    Pair("base tied", Side(tied=True), Side(), "min", SPECIAL, N + 3, "qwen3"),
    Pair("tuned tied", Side(), Side(tied=True), "min", SPECIAL, N + 3, "mistral"),
    Pair("longer, cut", Side(), LONGER, "min", SPECIAL, N + 3),
    Pair("longer base, cut", LONGER, Side(), "min", SPECIAL, N + 3, "qwen2"),
    Pair("longer base, cut, mixed ties", LONGER, Side(tied=True), "min", SPECIAL, N + 3, "qwen3"),
    Pair("longer, padded", Side(), LONGER, "max", (*SPECIAL, TOOL, TALK), N + 5),
    Pair("longer base, padded", LONGER, Side(), "max", (*SPECIAL, TOOL, TALK), N + 5, "mistral"),
    Pair("longer, united", Side(), LONGER, "union", (*SPECIAL, TOOL, TALK), N + 5, "qwen3"),
    Pair("longer, of the base", Side(), LONGER, "base", SPECIAL, N + 3),
    Pair("longer, of the tuned", Side(), LONGER, "model:tuned", (*SPECIAL, TOOL, TALK), N + 5),
    Pair("both padded", PADDED, PADDED, "min", SPECIAL, N + 20, "qwen2"),
    Pair("base padded, cut", PADDED, Side(), "min", SPECIAL, N + 3, "qwen2"),
    Pair("base padded, kept", PADDED, Side(), "max", SPECIAL, N + 20, "qwen2"),
    Pair("padding used by the tuned", PADDED, LONGER, "union", (*SPECIAL, TOOL, TALK), N + 20),
    Pair("padding of the base kept", PADDED, LONGER, "base", SPECIAL, N + 20, "qwen2"),
    Pair("added, united", Side(), ADDED, "union", (*SPECIAL, TOOL, "brown"), N + 5, "mistral"),
    Pair("added on both sides", LONGER, ADDED, "union", (*LONGER.special, "brown"), N + 6),
    Pair("added, both tied", Side(tied=True), Side(special=(*SPECIAL, TOOL), tied=True), "union",
         (*SPECIAL, TOOL), N + 4, "qwen2", True),
    Pair("added, mixed ties", Side(tied=True), ADDED, "union", (*SPECIAL, TOOL, "brown"), N + 5),
    Pair("added, to a multiple", Side(), ADDED, "union", (*SPECIAL, TOOL, "brown"), N + 20,
         settings={"pad_to_multiple_of": 64}),
    Pair("renamed, united", Side(), RENAMED, "union", (*SPECIAL, TALK), N + 4, "qwen3"),
    Pair("renamed, of the base", Side(), RENAMED, "base", SPECIAL, N + 3, "qwen2"),
    Pair("renamed, the same slot", Side(), RENAMED, "min", SPECIAL, N + 3,
         settings={"id_alias": (N + 2,)}),
    Pair("shuffled, of the base", Side(), SHUFFLED, "base", SPECIAL, N + 3),
    Pair("shuffled, of the tuned", Side(), SHUFFLED, "model:tuned", SHUFFLED.special, N + 3),
    Pair("other end, of the tuned", Side(), Side(special=(*SPECIAL, TALK), end=TALK), "model:tuned",
         (*SPECIAL, TALK), N + 4, end=TALK),
    Pair("vocab.json", Side(form="vocab.json"), ADDED, "union", (*SPECIAL, TOOL, "brown"), N + 5,
         "qwen2"),
    Pair("tokenizer.model", Side((), form="tokenizer.model", end="</s>"),
         Side((TOOL,), form="tokenizer.model", end="</s>"), "union", (TOOL,), N + 1, end="</s>"),
    Pair("tokenizer.model, longer base cut", Side((TOOL,), form="tokenizer.model", end="</s>"),
         Side((), form="tokenizer.model", end="</s>"), "min", (), N, "mistral", end="</s>"),
]  # fmt: skip


def write_side(folder, side, model_type, base=None):
    """A model that always answers with its end token: its row in the head reads dimension 0."""
    make_llama(
        folder, seed=1 if base is None else 2, base=base, vocab_size=side.rows, tied=side.tied,
        model_type=model_type, dtype="float32", layers=1,
    )  # fmt: skip
    if side.form == "tokenizer.model":
        write_sentencepiece(folder, side.special)
        ids = {END: 2, "</s>": 2, BEGIN: 1}
    else:
        ids = write_byte_level(
            folder, side.special, side.ordinary, bos=BEGIN, eos=side.end, form=side.form
        )
        ids[BEGIN] = ids.get(BEGIN, 0)
    tensors = read_tensors(folder)
    tensors[EMBEDDING][:, 0] = 1.0
    head = tensors[EMBEDDING if side.tied else HEAD]
    head[:, 0] = 1.0
    head[ids[side.end], 0] = 8.0
    save_tensors(folder, tensors, 1)
    special = {"bos_token_id": ids[BEGIN], "eos_token_id": ids[side.end]}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | special)
    write_json(folder / "generation_config.json", special)


@contextmanager
def no_warning():
    """Neither from Python nor in the logs of transformers."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert records == []


def load(folder):
    with no_warning():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    assert {what: list(names) for what, names in info.items() if names} == {}
    return model.eval()


def rows_by_string(models, merged):
    """By model, its row for every row of the result, as transformers' tokenizers have them."""
    tokens = {token_id: token for token, token_id in merged.get_vocab().items()}
    found = []
    for folder, side in models:
        own = AutoTokenizer.from_pretrained(folder)
        ids = {token: i for token, i in own.get_vocab().items() if i < side.rows}
        used = set(ids.values())
        found.append((tokens, ids, used, side.rows))
    return found


def expected_rows(pair, names, folders, merged, rows):
    """Embedding or head of the result, row by row: task arithmetic of base and tuned."""
    tensors = [read_tensors(folder)[name] for folder, name in zip(folders, names, strict=True)]
    sides = rows_by_string(list(zip(folders, (pair.base, pair.tuned), strict=True)), merged)
    alias = dict(zip(pair.settings.get("id_alias", ()), [True] * 9, strict=False))
    result = torch.empty(rows, tensors[0].shape[1])
    for row in range(rows):
        own = []
        for (tokens, ids, used, count), tensor in zip(sides, tensors, strict=True):
            place = ids.get(tokens[row]) if row in tokens else row if row < count else None
            if row not in tokens and row in used:
                place = None
            if alias.get(row):
                place = row
            own.append(None if place is None else tensor[place])
        base, tuned = own
        if base is None and tuned is None:
            means = [
                tensor[: side.rows].mean(dim=0, dtype=torch.float64).float()
                for tensor, side in zip(tensors, (pair.base, pair.tuned), strict=True)
            ]
            base, tuned = means
        base = tuned if base is None else base
        result[row] = task_arithmetic(base, [base if tuned is None else tuned], [WEIGHT])
    return result


def reference(pair, folders, merged):
    """The merge in memory: a model made from the config, filled with whole tensors."""
    config = AutoConfig.from_pretrained(folders[0])
    config.vocab_size, config.tie_word_embeddings = pair.rows, pair.tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base, tuned = (read_tensors(folder) for folder in folders)
    state = {
        name: task_arithmetic(base[name], [tuned[name]], [WEIGHT])
        for name in base
        if name not in (EMBEDDING, HEAD)
    }
    state[EMBEDDING] = expected_rows(pair, (EMBEDDING, EMBEDDING), folders, merged, pair.rows)
    names = [EMBEDDING if side.tied else HEAD for side in (pair.base, pair.tuned)]
    head = expected_rows(pair, names, folders, merged, pair.rows)
    state[HEAD] = state[EMBEDDING] if pair.tied else head
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_merge_loads_computes_encodes_and_ends(tmp_path, monkeypatch, pair):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "base", tmp_path / "tuned"]
    write_side(folders[0], pair.base, pair.model_type)
    write_side(folders[1], pair.tuned, pair.model_type, base=folders[0])
    recipe = Recipe(
        method="task_arithmetic", base_model="base", models=("tuned",), output_dir=tmp_path / "out",
        parameters={"weights": [WEIGHT]},
        vocabulary=VocabularySettings(mode=pair.mode, **pair.settings),
    )  # fmt: skip
    planned = plan(recipe)
    report = merge_to_folder(recipe, progress=False)
    assert report.vocabulary == planned.vocabulary

    with no_warning():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    vocabulary = tokenizer.get_vocab()
    assert (len(vocabulary), planned.vocabulary["rows"]) == (NORMAL + len(pair.added), pair.rows)
    added = range(NORMAL, NORMAL + len(pair.added))
    assert {token: vocabulary[token] for token in pair.added} == dict(
        zip(pair.added, added, strict=True)
    )
    donor = AutoTokenizer.from_pretrained(folders["tuned" in pair.mode])
    assert tokenizer.encode(PLAIN.replace("brown", "")) == donor.encode(PLAIN.replace("brown", ""))
    for token in pair.added:
        assert tokenizer.encode(f"a{token}b", add_special_tokens=False).count(vocabulary[token])

    model = load(tmp_path / "out")
    assert model.config.vocab_size == pair.rows == len(model.get_input_embeddings().weight)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tied, model.config.tie_word_embeddings) == (pair.tied, pair.tied)
    tokens = torch.tensor([[*range(0, pair.rows - 1, 7), pair.rows - 1]])
    with torch.no_grad():
        expected = reference(pair, folders, tokenizer)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)

    prompt = tokenizer(PLAIN, return_tensors="pt")
    with no_warning():
        answer = model.generate(
            **prompt, max_new_tokens=5, do_sample=False, pad_token_id=vocabulary[pair.end]
        )
    length = prompt["input_ids"].shape[1]
    assert answer[0, length:].tolist() == [vocabulary[pair.end]]
    assert verify_folder(tmp_path / "out").problems == ()
