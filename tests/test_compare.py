"""Base, sources and merge side by side: the numbers are those of a plain use of transformers."""

import json
import math
import random
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import make_llama
from tiny_tokenizers import NORMAL, write_byte_level

import eval_compare
import eval_llama
from eval_compare import Candidate, Comparison, Measured, Settings, compare
from eval_llama import main, short_names
from eval_page import comparison_page
from eval_perplexity import Perplexity, perplexity_after
from eval_tasks import check_tasks, run_tasks
from linear_llama import linear_merge_llama_to_folder
from merge_load import load_to_run, merged_tokenizer
from merge_recipe import make_recipe
from model_inference import Answer, load_model
from ties_llama import ties_merge_llama_to_folder

TINY = "examples/tiny_llamas"
ARABIC = "مرحبا، كيف حالك؟"
PROMPTS = ("capital: france =", "symbol: gold =", "young: dog =")
FACTS = ("capital: france = paris", "symbol: gold = Au", "young: dog = puppy")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A TIES merge of the tiny LLaMAs that know something."""
    out = tmp_path_factory.mktemp("merged") / "ties"
    tuned = [f"{TINY}/{name}" for name in ("capitals", "elements", "animals")]
    ties_merge_llama_to_folder(f"{TINY}/base", tuned, output_dir=out, progress=False)
    return out


@pytest.fixture(scope="module")
def compared(merged):
    return compare(candidates(merged), texts=FACTS, prompts=PROMPTS, settings=SHORT)


SHORT = Settings(max_new_tokens=12)


def candidates(merged, **others):
    roles = {"base": "base", "capitals": "source", "elements": "source", "animals": "source"}
    folders = {name: f"{TINY}/{name}" for name in roles} | {"ties": merged} | others
    return [
        Candidate(name, roles.get(name, "merge"), lambda folder=folder: load_model(folder, "cpu"))
        for name, folder in folders.items()
    ]


def nats_after(model, before, text):
    """Negative log-likelihood of a text's tokens, each by its own forward pass."""
    first = model.tokenizer(before)["input_ids"]
    own = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, found = [*first, *own], []
    for at in range(max(1, len(first)), len(ids)):
        with torch.no_grad():
            logits = model.model(torch.tensor([ids[:at]])).logits
        found.append(-logits[0, -1].double().log_softmax(0)[ids[at]].item())
    return found


def test_a_merge_is_set_beside_what_it_was_made_of(compared, merged):
    assert [(each.name, each.role) for each in compared.models] == [
        ("base", "base"), ("capitals", "source"), ("elements", "source"), ("animals", "source"),
        ("ties", "merge"),
    ]  # fmt: skip
    said = {each.name: [answer.text.strip() for answer in each.answers] for each in compared.models}
    assert said["ties"] == ["paris", "Au", "puppy"]
    assert said["capitals"][0] == "paris"
    assert said["capitals"][1:] != ["Au", "puppy"]
    assert compared.judge == "base"
    assert compared.columns == (
        "perplexity", "bits_per_byte", "distinct_1", "fluency"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["base", "capitals", "ties"])
def test_perplexities_are_those_of_every_token_alone(compared, merged, name):
    (found,) = (each for each in compared.models if each.name == name)
    model = load_model(merged if name == "ties" else f"{TINY}/{name}", "cpu")
    nats = [each for text in FACTS for each in nats_after(model, "", text)]
    expected = math.exp(math.fsum(nats) / len(nats))
    assert found.numbers()["perplexity"] == pytest.approx(expected, rel=1e-4)
    base = load_model(f"{TINY}/base", "cpu")
    nats = [each for answer in found.answers for each in nats_after(base, *answer[:2])]
    assert found.fluency.tokens == len(nats)
    expected = math.exp(math.fsum(nats) / len(nats))
    assert found.numbers()["fluency"] == pytest.approx(expected, rel=1e-4)


def test_answers_are_scored_in_windows_as_texts_are(merged):
    model = load_model(merged, "cpu")
    before, text = " capital: france = paris" * 4, " symbol: gold = Au" * 5
    ids = len(model.tokenizer(before)["input_ids"])
    for length, stride in ((64, 32), (20, 7), (20, 1)):
        found = perplexity_after(
            model, [(before, text), ("capital:", " france")], max_length=length, stride=stride
        )
        assert found.texts == 2
        assert found.bytes == len(text) + len(" france")
        own = model.tokenizer([text, " france"], add_special_tokens=False)["input_ids"]
        assert found.tokens == sum(map(len, own))
    assert ids > 20  # so that the first windows have nothing to count
    whole = nats_after(model, before, text) + nats_after(model, "capital:", " france")
    found = perplexity_after(model, [(before, text), ("capital:", " france")], batch_size=2)
    assert found.nats == pytest.approx(math.fsum(whole), rel=1e-5)


def test_one_model_after_the_other_is_in_memory(merged):
    alive, most = weakref.WeakSet(), []

    def loader(folder):
        def load():
            running = load_model(folder, "cpu")
            alive.add(running.model)
            most.append(len(alive))
            return running

        return load

    some = [each._replace(load=loader(f"{TINY}/{each.name}")) for each in candidates(merged)[:4]]
    compare(some, texts=FACTS)
    assert most == [1, 1, 1, 1]


def test_without_a_base_the_first_source_reads_the_answers(merged):
    some = candidates(merged)[1:3] + candidates(merged)[4:]
    found = compare(some, prompts=PROMPTS[:1], settings=SHORT)
    assert found.judge == "capitals"
    assert "under capitals" in found.definitions["fluency"]
    alone = compare(some[-1:], prompts=PROMPTS[:1], settings=SHORT)
    assert (alone.judge, alone.columns) == ("", ("distinct_1",))


def test_only_what_is_asked_for_is_measured(merged):
    some = candidates(merged)[:1]
    settings = Settings(metrics=("coherence",), max_new_tokens=12)
    found = compare(some, texts=FACTS, prompts=PROMPTS, settings=settings)
    assert found.columns == ("distinct_1",)
    assert (found.models[0].perplexity, found.models[0].fluency, found.judge) == (None, None, "")
    with pytest.raises(ValueError, match="nothing to compare by"):
        compare(some, texts=FACTS, settings=Settings(metrics=("fluency",)))
    settings = Settings(tasks=lambda running: {"own": running.model.config.vocab_size})
    found = compare(some, settings=settings)
    assert found.models[0].numbers()["own"] == 579
    assert found.columns == ("own",)


def test_a_model_without_a_chat_template_gets_plain_prompts_and_a_note(merged):
    some = candidates(merged)[:1]
    chat = compare(some, prompts=PROMPTS, settings=Settings(chat=True, max_new_tokens=12))
    assert chat.notes == ("base: has no chat template; it was given the plain prompts",)
    plain = compare(some, prompts=PROMPTS, settings=SHORT)
    assert chat.models[0].answers == plain.models[0].answers


def test_what_cannot_be_compared_is_said_at_once(merged):
    twice = candidates(merged)[:1] * 2
    with pytest.raises(ValueError, match="two models are called 'base'") as error:
        compare(twice, settings=Settings(metrics=("perplexity", "accuracy")))
    assert "nothing to compare by" in str(error.value)
    assert "no metric 'accuracy'; there are: perplexity, coherence, fluency" in str(error.value)
    with pytest.raises(ValueError, match="no model is given"):
        compare([], texts=FACTS)


def made(name, role, text, **others):
    answer = Answer(ARABIC, text, 3, "end")
    return Measured(
        name=name, role=role, device="cpu", dtype="float32", answers=(answer,), **others
    )


@pytest.fixture(scope="module")
def in_arabic():
    """A comparison whose answers are in Arabic, or hostile."""
    models = (
        made("a", "source", "بخير، شكرا", perplexity=Perplexity(2000.0, 2, 10, 1)),
        made("<b>", "merge", "<script>alert(1)</script>\nسطر", fluency=Perplexity()),
    )
    return Comparison(models=models, prompts=(ARABIC,), judge="a")


def test_arabic_keeps_its_direction(in_arabic):
    summary = in_arabic.summary()
    assert f"> \u2068{ARABIC}\u2069" in summary
    assert "  a    \u2068بخير، شكرا\u2069" in summary
    assert "  <b>  \u2068<script>alert(1)</script>\u2069\n       \u2068سطر\u2069" in summary
    page = comparison_page(in_arabic)
    assert '<td class=text dir="auto">بخير، شكرا</td>' in page
    assert f'<td class=text dir="auto">{ARABIC}</td>' in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page


def test_answers_too_short_to_repeat_say_nothing_of_repetition():
    short, long = made("a", "merge", "yes"), made("b", "merge", "a b c d a b c d")
    assert short.numbers()["repetition_4"] is None
    assert long.numbers()["repetition_4"] == pytest.approx(1 / 5)
    both = replace(long, answers=(*short.answers, *long.answers))
    assert both.numbers()["repetition_4"] == pytest.approx(1 / 5)


def test_empty_answers_are_named(merged):
    some = candidates(merged)[4:]
    found = compare(some, prompts=[ARABIC, PROMPTS[0]], settings=SHORT)
    empty = [not answer.text.strip() for answer in found.models[0].answers]
    assert empty == [True, False]
    assert found.notes == ("ties: 1 of 2 answers are empty",)
    assert "  ties  (empty)" in found.summary()
    assert '<td class=text dir="auto">(empty)</td>' in comparison_page(found)


def test_names_are_shown_as_texts_are():
    hostile = "\x1b[2J<i>\u202e\n"
    models = (
        made("نموذج", "source", "a b"),
        made(hostile, "merge", "c"),
        made("模型", "merge", "d"),
    )
    found = Comparison(models=models, prompts=(ARABIC,), notes=(f"{hostile}: slow",))
    for shown in (found.summary(), comparison_page(found)):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    lines = found.summary().splitlines()
    assert lines[1].startswith("\u2068نموذج\u2069 ")
    roles = ("source", "merge", "merge")
    places = [line.index(role) for line, role in zip(lines[1:4], roles, strict=True)]
    isolates = [2, 2, 2]  # which have no width
    wide = [0, 0, -2]  # two letters of the last name take two columns each
    assert len({p - i - w for p, i, w in zip(places, isolates, wide, strict=True)}) == 1
    page = comparison_page(found)
    assert "<i>" not in page
    assert page.count("<bdi>نموذج</bdi>") == 2


def test_letters_without_a_width_stay_in_their_words():
    word = "می\u200cروم \U0001f468\u200d\U0001f33e"
    found = Comparison(models=(made("a", "merge", word),), prompts=(word,))
    assert found.summary().count(word) == 2
    assert comparison_page(found).count(word) == 2


def test_what_cannot_be_opened_is_said_before_anything_is_loaded(merged, tmp_path, capsys):
    given = ["--base", "typo", "--ft_models", f"{TINY}/capitals", "absent", "--prompt", "a"]
    assert main([str(merged), *given]) == 3
    said = capsys.readouterr().err
    assert "error: typo: no such folder" in said
    assert "error: absent: no such folder" in said
    assert "loading" not in said
    settings = ["--max-new-tokens", "0", "--stride", "-5", "--temperature", "-1"]
    assert main([str(merged), "--prompt", "a", "--batch-size", "0", *settings]) == 2
    said = capsys.readouterr().err
    for name in ("max_new_tokens", "stride", "temperature", "batch_size"):
        assert f"error: {name} must be" in said
    assert "loading" not in said
    (tmp_path / "file").write_text("")
    assert main([str(merged), "--prompt", "a", "--page", str(tmp_path / "file" / "page")]) == 6
    assert "cannot be written there" in capsys.readouterr().err


def test_memory_is_released_after_every_model(merged, monkeypatch):
    released = []
    monkeypatch.setattr(eval_compare, "release_memory", lambda: released.append(1))
    compare(candidates(merged)[:3], texts=FACTS)
    assert len(released) == 3


def test_numbers_that_are_none_are_shown_as_such(in_arabic):
    first, second = in_arabic.to_dict()["models"]
    assert first["numbers"]["perplexity"] is None  # infinite
    assert second["numbers"]["fluency"] is None
    json.dumps(in_arabic.to_dict(), allow_nan=False)
    lines = in_arabic.summary().splitlines()
    assert lines[1].split()[:3] == ["a", "source", "inf"]
    assert lines[2].split()[-1] == "-"


def test_the_command_says_what_the_function_does(merged, tmp_path, capsys, compared):
    prompts, text = tmp_path / "prompts.txt", tmp_path / "facts.jsonl"
    prompts.write_text("\n".join(PROMPTS[1:]))
    text.write_text("\n".join(map(json.dumps, FACTS)))
    sources = [f"{TINY}/{name}" for name in ("capitals", "elements", "animals")]
    given = [str(merged), "--base", f"{TINY}/base", "--ft-models", *sources, "--text", str(text)]
    given += ["--prompt", PROMPTS[0], "--prompts", str(prompts), "--max-new-tokens", "12"]
    given += ["--device", "cpu"]
    page = tmp_path / "made" / "page"
    assert main([*given, "--json", "--page", str(page)]) == 0
    out = json.loads(capsys.readouterr().out)
    assert json.loads(page.with_suffix(".json").read_text(encoding="utf-8")) == out
    assert page.with_suffix(".html").read_text(encoding="utf-8").count("<svg") == 4
    expected = compared.to_dict()
    for each in (*out["models"], *expected["models"]):
        assert each.pop("tokens_per_second") > 0
    assert out == expected
    assert main([*given, "--page", str(page)]) == 2
    assert "page.json: exists already" in capsys.readouterr().err
    assert main([*given, "--metrics", "fluency", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out.split()[:5] == ["model", "role", "fluency", "base", "base"]
    assert "loading" not in shown.err


def test_the_command_needs_something_to_compare_by(merged, capsys):
    with pytest.raises(SystemExit):
        main([str(merged)])
    assert "say what to compare by" in capsys.readouterr().err


def test_names_are_as_long_as_they_must_be():
    assert short_names(["a/b/c", "x/b/c", "c"]) == ["a/b/c", "x/b/c", "c"]
    assert short_names(["org/chat", "base/"]) == ["chat", "base"]
    assert short_names(["base", "base"]) == ["base", "base (2)"]


def test_a_base_with_adapters_runs_as_its_fold(tmp_path):
    name = f"{TINY}/base+{TINY}/capitals-lora"
    folded = tmp_path / "folded"
    linear_merge_llama_to_folder([name], output_dir=folded, dtype="float32", progress=False)
    one, other = load_to_run(name, "cpu"), load_to_run(folded, "cpu")
    ids = torch.arange(8)[None]
    assert torch.equal(one.model(ids).logits, other.model(ids).logits)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert (one.device, one.dtype) == ("cpu", "float32")


def test_the_tokenizer_of_a_merge_is_that_of_its_folder(tmp_path):
    make_llama(tmp_path / "a", vocab_size=40, tokenizer=True)
    make_llama(tmp_path / "b", vocab_size=44, tokenizer=True, seed=1)
    models = [tmp_path / "a", tmp_path / "b"]
    recipe = make_recipe("linear", None, models, {}, vocabulary="max")
    out = tmp_path / "out"
    linear_merge_llama_to_folder(models, output_dir=out, vocabulary="max", progress=False)
    own = merged_tokenizer(recipe)
    assert own.get_vocab() == load_model(out, "cpu").tokenizer.get_vocab()
    assert len(own) == 44


def test_the_tokenizer_of_a_union_has_the_tokens_of_all(tmp_path):
    for name in ("a", "b"):
        make_llama(tmp_path / name, vocab_size=NORMAL + 1)
        write_byte_level(tmp_path / name, [f"<{name}>"])
    models = [tmp_path / "a", tmp_path / "b"]
    recipe = make_recipe("linear", None, models, {}, vocabulary="union")
    out = tmp_path / "out"
    linear_merge_llama_to_folder(models, output_dir=out, vocabulary="union", progress=False)
    vocab = merged_tokenizer(recipe).get_vocab()
    assert {"<a>", "<b>"} <= vocab.keys()
    assert vocab == load_model(out, "cpu").tokenizer.get_vocab()


TASK = """
task: tiny_capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "capital: {{country}} ="
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.filterwarnings("ignore")  # of the harness and its libraries
def test_tasks_of_the_harness_run_on_sources_and_merge(merged, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    (tmp_path / "capitals.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    answers = [("france", "paris"), ("japan", "tokyo"), ("italy", "rome"), ("egypt", "cairo")]
    lines = [
        json.dumps({"country": country, "choices": ["oslo", city], "answer": 1})
        for country, city in answers
    ]
    (tmp_path / "capitals.jsonl").write_text("\n".join(lines))
    given = [str(merged), "--base", f"{TINY}/base", "--ft_models", f"{TINY}/capitals"]
    given += ["--tasks", "tiny_capitals", "--task_folder", str(tmp_path), "--json", "--quiet"]
    assert main([*given, "--limit", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == ["tasks: of 3 questions each, at most: a first look, no score"]
    numbers = {each["name"]: each["numbers"]["tiny_capitals acc"] for each in found["models"]}
    assert numbers["capitals"] == numbers["ties"] == 1.0
    assert numbers["base"] < 1.0
    state = random.getstate(), torch.random.get_rng_state()
    run_tasks(load_model(merged, "cpu"), ["tiny_capitals"], include_path=tmp_path, limit=1)
    assert random.getstate() == state[0]
    assert torch.equal(torch.random.get_rng_state(), state[1])
    with pytest.raises(ValueError, match="the harness has no task 'arc_eazy'"):
        check_tasks(["tiny_capitals", "arc_eazy"], tmp_path)


def test_without_the_harness_it_is_said_how_to_install_it(merged, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert main([str(merged), "--tasks", "arc_easy"]) == 2
    assert 'pip install "llama-merge[lm-eval]"' in capsys.readouterr().err
    with pytest.raises(ValueError, match="Language Model Evaluation Harness"):
        run_tasks(load_model(merged, "cpu"), ["arc_easy"])


def test_the_description_is_what_the_command_shows(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert eval_llama.__doc__.splitlines()[2] in capsys.readouterr().out
