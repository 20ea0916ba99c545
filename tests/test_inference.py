"""Finished models are asked and scored: what is said is that of a plain use of transformers."""

import copy
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import make_llama
from tiny_tokenizers import NORMAL, write_byte_level

import eval_perplexity
import model_inference
from eval_perplexity import (
    Perplexity,
    perplexity,
    perplexity_after,
    read_texts,
    windows_of,
)
from eval_texts import distinct, repetition
from generate import main, read_prompts
from model_errors import ModelCompatibilityError
from model_inference import ask, load_model
from model_text import isolated, printable

TINY = "examples/tiny_llamas"
ARABIC = "مرحبا، كيف حالك؟"


@pytest.fixture(scope="module")
def capitals():
    return load_model(f"{TINY}/capitals", device="cpu")


@pytest.fixture(scope="module")
def texts():
    """Texts of the tiny models' words, of several lengths; two are longer than they can see."""
    chance = random.Random(0)
    words = [
        "capital",
        ":",
        "france",
        "=",
        "paris",
        "symbol",
        "gold",
        "Au",
        "japan",
        "tokyo",
        "dog",
    ]
    return [" ".join(chance.choices(words, k=count)) for count in (1, 3, 9, 200, 30, 150)]


def plain(running, text, length, stride):
    """Negative log-likelihoods, each token alone: its scores from the window that first has it."""
    ids = running.tokenizer(text)["input_ids"]
    found = []
    for at in range(1, len(ids)):
        begin = 0
        while begin + length <= at:
            begin += stride
        with torch.no_grad():
            logits = running.model(torch.tensor([ids[begin:at]])).logits
        found.append(-logits[0, -1].double().log_softmax(0)[ids[at]].item())
    return found


@pytest.mark.parametrize(("length", "stride"), [(64, 32), (64, 1), (17, 16)])
def test_perplexity_is_that_of_every_token_alone(capitals, texts, length, stride):
    each = [nats for text in texts for nats in plain(capitals, text, length, stride)]
    for batch_size in (1, 3, 8):
        found = perplexity(
            capitals, iter(texts), batch_size=batch_size, max_length=length, stride=stride
        )
        assert found.tokens == len(each)
        assert found.texts == len(texts)
        assert found.bytes == sum(len(text.encode()) for text in texts)
        assert found.nats == pytest.approx(math.fsum(each), rel=1e-5)
        assert found.value == pytest.approx(math.exp(math.fsum(each) / len(each)), rel=1e-4)
        assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)


def test_a_short_text_is_scored_as_transformers_scores_it(capitals):
    text = "capital: france = paris"
    ids = torch.tensor([capitals.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = capitals.model(input_ids=ids, labels=ids).loss.item()
    assert perplexity(capitals, [text]).value == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("count", range(12))
@pytest.mark.parametrize(("length", "stride"), [(4, 2), (5, 1), (2, 1), (7, 6), (12, 4)])
def test_every_token_but_the_first_counts_once(count, length, stride):
    ids = list(range(count))
    windows = list(windows_of(ids, length, stride))
    counted = [token for window in windows for token in window.ids[window.first :]]
    assert counted == ids[1:]
    assert all(1 <= window.first < len(window.ids) <= length for window in windows)


def test_what_cannot_be_predicted_has_no_perplexity(capitals):
    assert math.isnan(perplexity(capitals, []).value)
    assert Perplexity(nats=1e9, tokens=1, bytes=1, texts=1).value == math.inf


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_length": 65}, r"max_length must be in \[2, 64\]"),
        ({"max_length": 1}, "max_length"),
        ({"stride": 64}, r"stride must be in \[1, 64\), got 64"),
        ({"stride": 0}, "stride"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(capitals, settings, text):
    with pytest.raises(ValueError, match=text):
        perplexity(capitals, ["x"], **settings)


def test_texts_are_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text(f"{ARABIC}\n\nmore\n", encoding="utf-8-sig")
    assert read_texts(tmp_path / "a.txt") == [f"{ARABIC}\n\nmore\n"]
    (tmp_path / "a.jsonl").write_text(f'"{ARABIC}"\n\n{{"text": "b", "id": 1}}\n')
    assert read_texts(str(tmp_path / "a.jsonl")) == [ARABIC, "b"]
    for content, text in {
        '"a"\n{': r"b.jsonl:2: not JSON",
        '"a"\n[1]': r"b.jsonl:2: expected a JSON string",
        '{"t": 1}': r"b.jsonl:1: expected",
        "\n": "there is no text in it",
    }.items():
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(ValueError, match=text):
            read_texts(tmp_path / "b.jsonl")
    (tmp_path / "p.txt").write_text(f"{ARABIC}\n\nb\n")
    assert read_prompts(tmp_path / "p.txt") == [ARABIC, "b"]
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="there is no prompt in it"):
        read_prompts(tmp_path / "p.txt")


def test_answers_do_not_depend_on_what_else_is_asked(capitals):
    prompts = ["capital: france =", "capital: japan =", "x", "capital: united kingdom of =", ARABIC]
    alone = [ask(capitals, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    for batch_size in (2, 5):
        seen = []
        answers = ask(
            capitals, prompts, max_new_tokens=8, batch_size=batch_size, on_answers=seen.extend
        )
        assert answers == alone == seen
    assert [(answer.text, answer.finish) for answer in alone[:2]] == [
        (" paris", "end"), (" tokyo", "end"),
    ]  # fmt: skip
    (cut,) = ask(capitals, prompts[:1], max_new_tokens=1)
    assert (cut.tokens, cut.finish) == (1, "length")


def test_draws_follow_the_seed_and_leave_torchs_alone(capitals):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn = {
        seed: ask(capitals, ["x", "y"], max_new_tokens=12, temperature=5.0, seed=seed)
        for seed in (0, 1)
    }
    assert torch.equal(before, torch.random.get_rng_state())
    assert drawn[0] == ask(capitals, ["x", "y"], max_new_tokens=12, temperature=5.0, seed=0)
    assert drawn[0] != drawn[1]
    (likeliest,) = ask(capitals, ["x"], max_new_tokens=12)
    (narrow,) = ask(capitals, ["x"], max_new_tokens=12, temperature=5.0, top_p=1e-6)
    assert narrow == likeliest


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": math.nan}, "temperature must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"chat": True}, "has no chat template"),
    ],
)
def test_what_cannot_be_asked_is_refused(capitals, settings, text):
    with pytest.raises(ValueError, match=text):
        ask(capitals, ["capital: france ="], **settings)


def test_an_answer_ends_where_the_model_can_see_no_more(capitals, monkeypatch):
    monkeypatch.setattr(capitals.model.generation_config, "eos_token_id", 578)
    prompts = ["capital: france = paris " * 4, "x"]
    rows = [len(capitals.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for batch_size in (1, 2):
        answers = ask(capitals, prompts, max_new_tokens=1000, batch_size=batch_size)
        assert [answer.tokens for answer in answers] == [64 - count for count in rows]
        assert {answer.finish for answer in answers} == {"length"}
    with pytest.raises(ValueError, match=r"has \d+ tokens, and the model can see 64"):
        ask(capitals, ["x", "capital: france = paris " * 20])


def test_an_answer_is_not_shaped_by_the_models_own_settings(capitals, monkeypatch):
    (plain,) = ask(capitals, ["capital: france ="], max_new_tokens=12)
    config = copy.deepcopy(capitals.model.generation_config)
    config.update(repetition_penalty=9.0, num_beams=3, min_new_tokens=9, suppress_tokens=[1, 2])
    monkeypatch.setattr(capitals.model, "generation_config", config)
    assert ask(capitals, ["capital: france ="], max_new_tokens=12) == [plain]
    assert capitals.model.generation_config is config


class Appending:
    """A tokenizer that puts an end behind every text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, add_special_tokens=True, **settings):
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens, **settings)["input_ids"]
        return {"input_ids": [*ids, 1] if add_special_tokens else ids}


def test_a_chat_template_that_begins_a_text_does_so_once(tmp_path):
    make_llama(tmp_path, vocab_size=NORMAL + 2)
    begin = "<s>"
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    write_byte_level(tmp_path, [begin, "</s>"], bos=begin, eos="</s>", chat_template=template)
    running = load_model(tmp_path, "cpu")
    ids = model_inference._prompt_ids(running, "hi", chat=True)
    assert ids == [NORMAL, *running.tokenizer("hi", add_special_tokens=False)["input_ids"]]
    doubling = replace(running, tokenizer=Beginning(running.tokenizer))
    assert model_inference._prompt_ids(doubling, "hi", chat=True) == ids
    assert model_inference._prompt_ids(doubling, "hi", chat=False) == ids


class Beginning(Appending):
    """A tokenizer that puts a beginning before every text."""

    def __call__(self, text, add_special_tokens=True, **settings):
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [NORMAL, *ids] if add_special_tokens else ids}


def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_prompt(capitals):
    appending = replace(capitals, tokenizer=Appending(capitals.tokenizer))
    prompts = ["capital: france =", "x"]
    assert ask(appending, prompts, max_new_tokens=6) == ask(capitals, prompts, max_new_tokens=6)
    pairs = [("capital: france =", " paris")]
    assert perplexity_after(appending, pairs) == perplexity_after(capitals, pairs)


def test_bytes_are_those_of_what_was_predicted(capitals):
    class Bare(Appending):
        def __call__(self, text, **settings):
            return self.tokenizer(text, add_special_tokens=False)

    bare = replace(capitals, tokenizer=Bare(capitals.tokenizer))
    text = "capital: france"
    first = capitals.tokenizer.decode(bare.tokenizer(text)["input_ids"][:1])
    assert perplexity(capitals, [text]).bytes == len(text)
    assert perplexity(bare, [text]).bytes == len(text) - len(first)
    assert math.isnan(perplexity(bare, [first]).bits_per_byte)


def test_a_batch_has_no_more_windows_than_there_is_room_for_scores(capitals, texts, monkeypatch):
    whole = perplexity(capitals, texts, batch_size=8)
    seen = []
    nats = eval_perplexity._nats
    monkeypatch.setattr(eval_perplexity, "SCORES_BYTES", 4 * 579 * 100)
    monkeypatch.setattr(
        eval_perplexity, "_nats", lambda running, batch: seen.append(batch) or nats(running, batch)
    )
    found = perplexity(capitals, texts, batch_size=8)
    assert found.nats == pytest.approx(whole.nats, rel=1e-6)
    assert found.tokens == whole.tokens
    for batch in seen:
        assert len(batch) == 1 or len(batch) * max(len(each.ids) for each in batch) <= 100
    assert max(map(len, seen)) > 1


def test_chat_puts_a_message_into_the_template_once(capitals, monkeypatch):
    template = "{{ bos_token }}{% for m in messages %}capital: {{ m['content'] }}{% endfor %} ="
    monkeypatch.setattr(capitals.tokenizer, "chat_template", template)
    (answer,) = ask(capitals, ["france"], chat=True, max_new_tokens=8)
    plain_ids = capitals.tokenizer("capital: france =")["input_ids"]
    begins = plain_ids[0] == capitals.tokenizer.bos_token_id
    expected = "<s>capital: france =" if not begins else "capital: france ="
    (wanted,) = ask(capitals, [expected], max_new_tokens=8)
    assert answer.text == wanted.text
    assert answer.prompt == "france"


def test_where_a_model_runs(monkeypatch):
    running = load_model(f"{TINY}/base")
    cuda = torch.cuda.is_available()
    expected = ("cuda", "float16") if cuda else ("cpu", "float32")
    assert (running.device, running.dtype) == expected
    assert {each.dtype for each in running.model.parameters()} == {getattr(torch, running.dtype)}
    half = load_model(f"{TINY}/base", "cpu", "bfloat16")
    assert {each.dtype for each in half.model.parameters()} == {torch.bfloat16}
    assert ask(half, ["capital: france ="], max_new_tokens=2)
    monkeypatch.setattr(model_inference, "free_memory", lambda: 1000)
    small = load_model(f"{TINY}/base", "cpu")
    assert small.dtype == "bfloat16"
    assert "runs in bfloat16: float32 would take" in small.notes[0]


@pytest.mark.parametrize(
    ("device", "dtype", "text"),
    [
        ("gpu", "auto", "device must be auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
        ("cuda:x", "auto", "device must be"),
        ("cuda:99", "auto", "there is no device cuda:99 here"),
        ("cpu", "float8", "dtype must be auto, float32, float16, bfloat16, got 'float8'"),
    ],
)
def test_what_there_is_not_is_refused(device, dtype, text):
    with pytest.raises(ValueError, match=text):
        load_model(f"{TINY}/base", device, dtype)


def test_a_model_without_a_tokenizer_cannot_be_asked(tmp_path):
    make_llama(tmp_path / "m")
    with pytest.raises(ModelCompatibilityError, match=r"cannot load its tokenizer .*beside it"):
        load_model(tmp_path / "m", "cpu")


def test_free_memory_is_known_on_linux():
    assert 10**6 < model_inference.free_memory() < 10**15


def test_the_command(capsys, tmp_path):
    (tmp_path / "p.txt").write_text(f"capital: france =\n{ARABIC}\n")
    command = [f"{TINY}/capitals", "--device", "cpu", "--max-new-tokens", "8"]
    assert main([*command, "--prompts", str(tmp_path / "p.txt")]) == 0
    out = capsys.readouterr().out
    assert "> capital: france =\nparis\n" in out
    assert f"> \u2068{ARABIC}\u2069\n" in out
    assert "float32 on cpu, " in out
    assert main([*command, "capital: japan =", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == [
        {"prompt": "capital: japan =", "text": " tokyo", "tokens": 2, "finish": "end"}
    ]
    assert found["tokens_per_second"] > 0
    assert main([*command, "x", "--temperature", "-1"]) == 2
    assert main([str(tmp_path), "x"]) == 3
    for wrong in (command, [*command, "x", "--prompts", "p.txt"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "--prompts FILE" in capsys.readouterr().err


def test_texts_keep_their_direction_and_can_do_nothing_to_a_terminal():
    assert isolated(ARABIC) == f"\u2068{ARABIC}\u2069"
    assert isolated("a\u2069\x1b[2J\u202eb\nc") == "\u2068a\\x1b[2J\\u202eb\u2069\n\u2068c\u2069"
    assert printable(isolated(ARABIC)) == isolated(ARABIC)


def test_repetition_and_distinct_count_words():
    assert distinct(["a b c", "a b d"], 1) == 4 / 6
    assert distinct(["a b c", "a b d"], 2) == 3 / 4
    assert distinct([], 1) is None
    assert distinct(["a"], 2) is None
    assert repetition("a b c d") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition(" ".join(["yes"] * 103)) == pytest.approx(0.99)
    assert repetition(ARABIC, 1) == 0.0
