"""A language model of this process as a judge, against plain transformers and against models that are planted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.config.judging import JudgeConfig
from stages.config.tokens import PLAIN, TokenizeConfig
from stages.judge.in_process import InProcessJudge
from stages.judge.pairwise import CUT, TOO_LONG, UNCLEAR, Match, Preferred, Question, verdicts
from stages.judge.prompts import filled, prompt_text
from stages.models.build import load_with_own_tokenizer
from stages.models.given_tokenizer import given_tokenizer
from tests.judging import make_world, published_model

QUESTIONS = [
    Question("What does `sort_array` do?", "It will sort the array.", "It will sort the"),
    Question("What?", "merge", "It will merge the queue and the tree and the table and the graph."),
    Question("What does `copy_tree` do?", "It", "It will copy the tree."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = TokenizeConfig(vocab_size=340, sequence_length=1024, bpe_train_bytes=10_000, chat_template=PLAIN)
    world = make_world(tmp_path_factory.mktemp("judge"), settings)
    return Path(published_model(world, seed=7).uri.removeprefix("file://"))


def judge(folder: Path, *, bias: dict[str, float] | None = None, context: int = 1024, **settings: Any) -> Any:
    """The model as a judge; `bias` makes it say these tokens by so much more."""
    tokenizer = given_tokenizer(folder)
    model: Any = load_with_own_tokenizer(folder, tokenizer).eval()
    if bias:
        head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=True)
        head.weight.data.zero_()
        head.bias.data.zero_()
        for text, value in bias.items():
            head.bias.data[tokenizer.backend.token_to_id(text)] = value
        model.lm_head = head
    return InProcessJudge(
        JudgeConfig(**settings),
        model,
        tokenizer,
        identity="content",
        device=torch.device("cpu"),
        context_length=context,
        max_rows=2,
    )


def test_the_likelier_verdict_is_that_of_plain_transformers(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    expected = []
    for one in QUESTIONS:
        text = filled(prompt_text("pairwise-v1"), question=one.prompt, first=one.first, second=one.second)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            chances = model(ids).logits[0, -1].softmax(-1)
        known = tokenizer.get_vocab()
        said = [sum(float(chances[known[name]]) for name in (x, f"Ġ{x}") if name in known) for x in "AB"]
        expected.append(Preferred.FIRST if said[0] > said[1] else Preferred.SECOND)
    assert judge(folder).ask(QUESTIONS) == expected


def test_verdicts_do_not_depend_on_what_else_is_asked(folder: Path) -> None:
    asked = judge(folder)
    assert asked.ask(QUESTIONS) == [asked.ask([one])[0] for one in QUESTIONS]


def test_a_model_that_always_says_a_prefers_a_place_and_so_nothing(folder: Path) -> None:
    always = judge(folder, bias={"A": 9.0})
    assert always.ask(QUESTIONS) == [Preferred.FIRST] * 3
    found = verdicts(always, [Match(one.prompt, one.first, one.second) for one in QUESTIONS])
    assert [(one.value, one.placed_first) for one in found] == [(0.5, 2)] * 3
    assert judge(folder, bias={"B": 9.0}).ask(QUESTIONS) == [Preferred.SECOND] * 3
    assert judge(folder, bias={"!": 9.0}).ask(QUESTIONS) == [Preferred.NEITHER] * 3  # A and B are equally likely


def test_a_question_beyond_its_context_is_counted_and_the_others_are_answered(folder: Path) -> None:
    alone = judge(folder).ask(QUESTIONS)
    lengths = [len(judge(folder)._encoded(one)) for one in QUESTIONS]
    answers = judge(folder, context=sorted(lengths)[1] + 1).ask(QUESTIONS)
    longest = lengths.index(max(lengths))
    assert answers == [TOO_LONG if place == longest else alone[place] for place in range(3)]
    assert judge(folder, context=5).ask(QUESTIONS) == [TOO_LONG] * 3


def test_a_written_verdict_is_read_and_an_unclear_or_cut_one_counted(folder: Path) -> None:
    end = AutoTokenizer.from_pretrained(folder).eos_token
    assert judge(folder, bias={"A": 9.0}, method="generation", answer_tokens=1).ask(QUESTIONS) == [Preferred.FIRST] * 3
    assert judge(folder, bias={end: 9.0}, method="generation", answer_tokens=4).ask(QUESTIONS) == [UNCLEAR] * 3
    assert judge(folder, bias={"!": 9.0}, method="generation", answer_tokens=4).ask(QUESTIONS) == [CUT] * 3


def test_what_decides_its_answers_is_in_its_identity(folder: Path) -> None:
    own = "{question} {first} {second}"
    made = [judge(folder), judge(folder, prompt=own), judge(folder, method="generation")]
    assert len({one.identity for one in made}) == 3
    assert judge(folder, answer_tokens=3).identity == made[0].identity  # it writes nothing
    assert judge(folder, max_items=3).identity == made[0].identity
