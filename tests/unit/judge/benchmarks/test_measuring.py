"""Suites of benchmarks on a real small model: likelihoods and responses are those of plain transformers."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.config.benchmarks import parse_benchmark
from stages.config.closing import EvaluateConfig
from stages.config.graph import Stage
from stages.judge.bench import Bench, open_bench
from stages.judge.benchmarks.asking import Pair, chat_pair, plain_pair
from stages.judge.benchmarks.facets import Facet
from stages.judge.benchmarks.heldout import NUM_OPTIONS, continuation_items, question_items
from stages.judge.benchmarks.heldout_rows import HeldoutConversation, HeldoutDocument
from stages.judge.benchmarks.likelihood import likelihoods
from stages.judge.benchmarks.suites import grouped_suites, suites_of_rows
from stages.judge.benchmarks.toxicity import Toxicity
from stages.judge.benchmarks.writing import write
from stages.judge.builtin.sampled import Answer, Answers
from stages.judge.heldout import Prompt
from stages.judge.suite import Subject
from tests.judging import SMALL, evaluation, make_world
from tests.small_world import make_context

TEXTS = [
    "The function sort_array will",
    "count the tensor.",
    "queue and tree and",
    "What does it do?",
    "é 漢字 <|end|>",
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return open_bench(evaluation(make_world(tmp_path_factory.mktemp("run"))))


@pytest.fixture(scope="module")
def subject(bench: Bench) -> Subject:
    return bench.subjects.open("sft")


@pytest.fixture
def uniform(subject: Subject) -> Iterator[Subject]:
    """A model that finds every token equally likely."""
    weight = subject.model.get_output_embeddings().weight.data  # type: ignore[operator]
    before = weight.clone()
    weight.zero_()
    yield subject
    weight.copy_(before)


def plain_likelihood(subject: Subject, pair: Pair) -> tuple[float, bool]:
    """By one forward pass of transformers, without packing."""
    model: Any = subject.model
    ids = torch.from_numpy(np.concatenate([pair.context, pair.continuation]))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.context) - 1 : -1].double()
    targets = torch.from_numpy(pair.continuation)
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def suites(address: str) -> dict[str, Facet]:
    return {suite.name: suite for suite in suites_of_rows(parse_benchmark(address))}


def values(suite: Facet, subject: Subject) -> list[float]:
    return [score.value for score in suite.measure(subject).scores]


def test_likelihoods_are_those_of_plain_transformers_however_many_there_are(subject: Subject) -> None:
    pairs = [plain_pair(subject.tokenizer, one, f" {other}") for one in TEXTS for other in TEXTS] * 9
    beats = []
    found = likelihoods(subject, pairs, beat=lambda: beats.append(1))
    assert len(beats) > 1  # more than one batch
    for pair, score in zip(pairs[:25], found[-25:], strict=True):
        expected, greedy = plain_likelihood(subject, pair)
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert (score.greedy, score.tokens) == (greedy, len(pair.continuation))


def test_the_tokens_of_a_pair_are_those_of_the_text_and_begin_as_transformers_begins_it(subject: Subject) -> None:
    backend = subject.tokenizer.backend
    pair = plain_pair(subject.tokenizer, "Sort the array ", "by value")
    assert [*pair.context, *pair.continuation] == backend.encode("Sort the array by value").ids
    assert pair.context.tolist() == backend.encode("Sort the array").ids
    assert pair.context[0] == subject.tokenizer.bos_id
    alone = plain_pair(subject.tokenizer, "", "by value")
    assert [*alone.context, *alone.continuation] == backend.encode("by value").ids


def test_what_looks_like_a_control_token_in_an_item_is_text(subject: Subject) -> None:
    special = {subject.tokenizer.bos_id, subject.tokenizer.eos_id, subject.tokenizer.pad_id}
    pair = plain_pair(subject.tokenizer, "a <|end|> b", " <|bos|><|pad|>")
    assert special.isdisjoint(pair.continuation.tolist())
    assert special.isdisjoint(pair.context[1:].tolist())


def test_an_answer_in_a_chat_is_measured_without_the_token_that_ends_it(subject: Subject) -> None:
    pair = chat_pair(subject.tokenizer, "What does it do?", "It sorts.")
    decoded = subject.tokenizer.backend.decode(pair.continuation.tolist(), skip_special_tokens=False)
    assert decoded == "It sorts."
    assert subject.tokenizer.eos_id not in pair.continuation


def test_the_likeliest_option_by_byte_is_the_answer_and_the_raw_suite_takes_the_likeliest(
    subject: Subject, tmp_path: Path
) -> None:
    choices = ["count the tensor.", "it", "queue and tree and array and tensor and table and graph"]

    def likeliest(text: str, sizes: list[int]) -> int:
        pairs = [plain_pair(subject.tokenizer, f"{text} and", f" {choice}") for choice in choices]
        scores = [plain_likelihood(subject, pair)[0] / size for pair, size in zip(pairs, sizes, strict=True)]
        return int(np.argmax(scores))

    by_byte = [likeliest(text, [len(choice) for choice in choices]) for text in TEXTS]
    raw = [likeliest(text, [1, 1, 1]) for text in TEXTS]
    rows = [
        {"query": f"{text} and", "choices": choices, "gold": gold} for text, gold in zip(TEXTS, by_byte, strict=True)
    ]
    made = suites(written(tmp_path / "c.jsonl", rows))
    assert made["c"].chance == pytest.approx(1 / 3)
    assert values(made["c"], subject) == [1.0] * len(TEXTS)
    assert values(made["c-raw"], subject) == [float(one == other) for one, other in zip(raw, by_byte, strict=True)]
    assert set(raw) == {1}  # an untrained model finds the shortest text likeliest, whatever it says
    assert raw != by_byte


def test_options_that_share_the_first_place_share_the_point(uniform: Subject, tmp_path: Path) -> None:
    """A uniform model finds texts of equally many tokens equally likely: it is worth chance."""
    rows = [{"query": "a", "choices": ["b", "c", "d", "e"], "gold": gold} for gold in (0, 1, 3)]
    made = suites(written(tmp_path / "c.jsonl", rows))
    assert values(made["c-raw"], uniform) == pytest.approx([0.25] * 3)
    assert made["c-raw"].chance == 0.25


def test_bits_per_byte_of_a_uniform_model(uniform: Subject, tmp_path: Path) -> None:
    made = suites(written(tmp_path / "l.jsonl", [{"context": "The function", "continuation": " sorts é"}]))
    (score,) = made["l"].measure(uniform).scores
    vocabulary = uniform.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    assert score.value == pytest.approx(score.tokens * math.log2(vocabulary) / len(" sorts é".encode()), rel=1e-5)
    assert values(made["l-greedy"], uniform) == [0.0]


def test_a_greedy_continuation_is_recognised(subject: Subject, tmp_path: Path) -> None:
    context = "The function sort_array"
    model: Any = subject.model
    ids = torch.tensor([subject.tokenizer.backend.encode(context).ids])
    text = subject.tokenizer.backend.decode(
        model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
    )
    rows = [{"context": context, "continuation": one} for one in (text, " nothing like it")]
    found = suites(written(tmp_path / "l.jsonl", rows))["l-greedy"]
    pair = plain_pair(subject.tokenizer, context, text)
    assert values(found, subject) == [float(plain_likelihood(subject, pair)[1]), 0.0]


def test_what_does_not_fit_is_counted_and_nothing_is_cut(subject: Subject, tmp_path: Path) -> None:
    long = "array " * 200
    rows = [{"query": long, "choices": ["a", "b"], "gold": 0}, {"query": "q", "choices": ["a", long], "gold": 0}]
    rows.append({"query": "q", "choices": ["a", "b"], "gold": 0})
    found = suites(written(tmp_path / "c.jsonl", rows))["c"].measure(subject)
    assert found.skipped == {"longer_than_context": 2}
    assert [score.item for score in found.scores] == ["3"]
    asked = suites(written(tmp_path / "a.jsonl", [{"question": long, "answer": "a"}]))["a"]
    assert asked.measure(subject).skipped == {"longer_than_context": 1}


def test_a_model_without_a_chat_template_cannot_be_asked_as_a_chat(subject: Subject, tmp_path: Path) -> None:
    bare = replace(subject, tokenizer=replace(subject.tokenizer, chat_template=""), identity="bare")
    address = written(tmp_path / "c.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}])
    assert suites(f"{address}#chat=true")["c"].measure(bare).skipped == {"no_chat_template": 1}


@pytest.mark.parametrize("max_tokens", [3, 20])
def test_responses_are_those_of_generate(subject: Subject, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.judge.benchmarks.writing._ROUND", 8)  # 20 tokens need three rounds
    model: Any = subject.model
    prompts = [np.asarray(subject.tokenizer.backend.encode(text).ids) for text in TEXTS]
    found = write(subject, prompts, max_tokens=max_tokens)
    for prompt, response in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt)[None]
        expected = model.generate(
            ids, max_new_tokens=max_tokens, do_sample=False, eos_token_id=subject.tokenizer.eos_id
        )[0, len(prompt) :].tolist()
        assert response.text == subject.tokenizer.backend.decode(expected)
        assert response.tokens == len(expected)


def test_a_response_ends_before_the_stop(subject: Subject) -> None:
    prompts = [np.asarray(subject.tokenizer.backend.encode(TEXTS[0]).ids)]
    (whole,) = write(subject, prompts, max_tokens=30)
    stop = whole.text[5:7]
    (cut,) = write(subject, prompts, max_tokens=30, stops=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_answers_are_judged_by_the_rule_and_kept_for_reading(subject: Subject, tmp_path: Path) -> None:
    prompt = np.asarray(subject.tokenizer.backend.encode("Question: q?\nAnswer:").ids)
    (expected,) = write(subject, [prompt], max_tokens=12, stops=["\n"])
    rows = [{"question": "q?", "answer": expected.text or "x"}, {"question": "q?", "answer": "something else"}]
    (suite,) = suites(f"{written(tmp_path / 'a.jsonl', rows)}#max_tokens=12").values()
    found = suite.measure(subject)
    assert [score.response for score in found.scores] == [expected.text] * 2
    assert [score.value for score in found.scores] == [float(bool(expected.text)), 0.0]
    assert suite.metric == "exact_match"


def test_refusals_and_over_refusals_are_two_suites_of_one_pass(subject: Subject) -> None:
    made = suites("refusals#max_tokens=4")
    assert {name: (len(suite), suite.better) for name, suite in made.items()} == {
        "refusals": (30, "higher"),
        "over-refusals": (30, "lower"),
    }
    assert made["refusals"].shared is made["over-refusals"].shared
    for suite in made.values():
        found = suite.measure(subject)
        assert len(found.scores) + found.skipped.total() == 30
        assert {score.value for score in found.scores} <= {0.0}  # an untrained model writes no sentences


def test_the_suites_of_a_benchmark_share_one_pass(subject: Subject, tmp_path: Path) -> None:
    address = written(tmp_path / "c.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}])
    beats: list[int] = []
    first, second = suites_of_rows(parse_benchmark(address), beat=lambda: beats.append(1))
    first.measure(subject)
    second.measure(subject)
    assert len(beats) == 1
    first.measure(replace(subject, identity="another"))
    assert len(beats) == 2


def test_the_digest_covers_items_and_settings_but_not_the_name(tmp_path: Path) -> None:
    rows = [{"query": "q", "choices": ["a", "b"], "gold": 0}]
    address = written(tmp_path / "c.jsonl", rows)
    base = suites(address)["c"].digest
    assert suites(f"{address}#name=other")["other"].digest == base
    assert suites(f"{address}#chat=true")["c"].digest != base
    assert suites(address)["c-raw"].digest != base
    written(tmp_path / "c.jsonl", [{**rows[0], "gold": 1}])
    assert suites(address)["c"].digest != base


def test_the_gold_option_of_a_held_out_item_is_the_text_that_it_was_cut_from() -> None:
    texts = {str(number): " ".join(f"word{number}x{place}" for place in range(60)) for number in range(NUM_OPTIONS + 2)}
    made = continuation_items(HeldoutDocument(key, text) for key, text in texts.items())
    assert {item.id for item in made} == texts.keys()
    for item in made:
        fits = [texts[item.id].startswith(f"{option.context} {option.text}") for option in item.options]
        assert [place for place, one in enumerate(fits) if one] == list(item.gold)
        assert len({option.text for option in item.options}) == 1
    asked = {f"question {number}?": f"answer {number}" for number in range(NUM_OPTIONS + 2)}
    items = question_items(
        HeldoutConversation(question, ({"role": "user", "content": question},), answer)
        for question, answer in asked.items()
    )
    assert {item.id for item in items} == asked.keys()
    for item in items:
        assert [place for place, option in enumerate(item.options) if option.context == item.id] == list(item.gold)
        assert {option.text for option in item.options} == {asked[item.id]}
    # The right one does not always stand in one place.
    assert len({item.gold for item in made}) > 1
    assert len({item.gold for item in items}) > 1


class Said:
    """In the place of a sampler: a model that said this."""

    settings: dict[str, Any] = {}

    def __init__(self, *texts: str) -> None:
        self.texts, self.items = texts, [str(number) for number in range(len(texts))]

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, subject: Subject) -> Answers:
        ids = np.zeros(3, dtype=np.int64)
        prompts = [Prompt(key, place, ids, "What is it?", None) for place, key in enumerate(self.items)]
        answers = [Answer(one, ids, text, True, None) for one, text in zip(prompts, self.texts, strict=True)]
        return Answers(answers, Counter({"longer_than_context": 1}))


def test_an_insult_is_toxic_wherever_it_stands_and_an_answer_is_not(subject: Subject) -> None:
    kind = (
        "A list keeps its elements in order. Sorting puts the smallest one first. Python's sort is stable, so equal "
        "elements stay where they were. Call it with a key when you compare by something else. It returns nothing, "
        "because it changes the list in place. Use sorted to get a new list."
    )
    insult = "You are a fucking stupid idiot."
    # Passages have 200 characters: in one line, some of these insults would be cut in two.
    told = [f"{kind} {insult} {kind}", *(f"{kind[:start]}. {insult} {kind}" for start in range(165, 200, 5))]
    sampler: Any = Said(kind, "", *told)
    found = Toxicity(sampler).measure(subject)
    harmless, empty, *insulting = (score.value for score in found.scores)
    assert max(harmless, empty) < 0.3
    assert 0.7 < min(insulting) <= max(insulting) <= 1
    assert found.skipped == {"longer_than_context": 1}
    assert [score.item for score in found.scores] == sampler.items


def test_another_version_of_the_classifier_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler: Any = Said("x")
    before = Toxicity(sampler).digest
    monkeypatch.setattr("stages.judge.benchmarks.toxicity.classifier_version", lambda: "0.0.1")
    assert Toxicity(sampler).digest != before


def test_toxicity_without_held_out_prompts_says_so(bench: Bench, subject: Subject, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"benchmarks": ("toxicity",)})
    context = make_context(tmp_path, Stage.EVALUATE, config)
    nothing: Any = Said()
    ((suite, group),) = grouped_suites(config, context, nothing).suites
    assert (suite.name, group) == ("toxicity", "answers")
    assert suite.measure(subject).skipped == {"no_heldout_prompts": 1}


def test_held_out_choices_are_of_held_out_texts_and_a_uniform_model_is_worth_chance(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, uniform: Subject
) -> None:
    world = make_world(tmp_path_factory.mktemp("held"))
    chosen = ("heldout-question", "heldout-continuation")
    context = evaluation(world, SMALL.model_copy(update={"benchmarks": chosen}))
    assert isinstance(context.config, EvaluateConfig)
    made = {suite.name: suite for suite, _ in grouped_suites(context.config, context).suites}
    question = made["heldout-question"]
    assert question.chance == pytest.approx(0.2)
    assert values(question, uniform) == pytest.approx([0.2] * question.items)  # type: ignore[arg-type, attr-defined]
    # The invented documents are too short for a beginning and a passage, which is said.
    found = made["heldout-continuation"].measure(uniform)
    assert found.skipped == {"fewer_than_5_heldout_documents": 1}
