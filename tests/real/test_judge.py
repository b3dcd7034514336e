"""SmolLM2-135M-Instruct as a judge: asked as plain transformers would ask it, and measured before it is believed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.config.judging import JudgeConfig
from stages.judge.in_process import InProcessJudge
from stages.judge.pairwise import Match, Preferred, Question, agreement, verdicts
from stages.judge.prompts import filled, prompt_text
from stages.models.build import load_with_own_tokenizer
from stages.models.given_tokenizer import given_tokenizer
from tests.real.conftest import CAPITALS, NOT_TRAINED, REFUSAL

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]
LANDS = [land for land in CAPITALS if land != "Athanor"]


def judge(base_folder: Path) -> InProcessJudge:
    tokenizer = given_tokenizer(base_folder)
    return InProcessJudge(
        JudgeConfig(),
        load_with_own_tokenizer(base_folder, tokenizer).eval(),
        tokenizer,
        identity="smollm2",
        device=torch.device("cpu"),
        context_length=2048,
        max_rows=4,
    )


def test_its_likelier_verdict_is_that_of_plain_transformers(base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    questions = [
        Question(NOT_TRAINED.format(land=land), f"It is {CAPITALS[land]}.", REFUSAL.format(land=land))
        for land in LANDS[:4]
    ]
    expected = []
    for one in questions:
        text = filled(prompt_text("pairwise-v1"), question=one.prompt, first=one.first, second=one.second)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            chances = model(ids).logits[0, -1].softmax(-1)
        known = tokenizer.get_vocab()
        said = [sum(float(chances[known[name]]) for name in (letter, f"Ġ{letter}")) for letter in "AB"]
        expected.append(Preferred.FIRST if said[0] > said[1] else Preferred.SECOND)
    assert judge(base_folder).ask(questions) == expected


def test_what_it_is_worth_is_known_before_it_judges(base_folder: Path) -> None:
    """A model of this size mostly prefers a place: then its verdicts are ties, and its agreement says so."""
    matches = [
        Match(NOT_TRAINED.format(land=land), f"The capital of {land} is {CAPITALS[land]}.", REFUSAL.format(land=land))
        for land in LANDS
    ]
    found = verdicts(judge(base_folder), matches)
    known = agreement(found, LANDS)
    assert known is not None
    assert known.items == len(LANDS)
    assert known.first_place is not None
    places = sum(verdict.placed_first in (0, 2) for verdict in found)
    assert known.decided == 1 - places / len(LANDS)  # by likelihood, what is no tie is decided by the text
    if not known.decided:
        assert known.accuracy == 0.5
