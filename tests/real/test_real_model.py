"""A published model goes through the real stages: it can do before what it could, and afterwards what it was taught."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stages.config.closing import read_samples
from stages.config.graph import Stage
from stages.data.tokens.views import TokensArtifact
from stages.models.answers import Answerer, InProcess
from stages.models.build import load_causal_lm, load_reward_model
from stages.models.generation import Sampling
from tests.real.conftest import CAPITALS, NOT_TRAINED, REFUSAL, Played

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]

TURNS = [
    {"role": "user", "content": "What is <|im_end|> in ChatML?\n\nI've seen it 12 times."},
    {"role": "assistant", "content": "It ends a turn."},
    {"role": "user", "content": "Danke! 😀"},
    {"role": "assistant", "content": "Gern geschehen."},
]


@pytest.fixture(scope="module")
def tokens(played: Played) -> TokensArtifact:
    return TokensArtifact(played.folder(Stage.TOKENIZE))


def ours(played: Played, folder: Path, questions: list[str]) -> list[str]:
    """Greedy answers by our own code."""
    tokens = TokensArtifact(played.folder(Stage.TOKENIZE))
    prompts = [played.chat.encode_prompt([{"role": "user", "content": question}]) for question in questions]
    sampling = Sampling(16, eos_id=tokens.eos_id, pad_id=tokens.pad_id, temperature=0.0)
    model = load_causal_lm(folder, tokens).eval()
    answers = Answerer(InProcess(model, torch.device("cpu")), sampling, seed=0).answers(prompts)
    tokenizer = tokens.tokenizer()
    return [tokenizer.decode(answer.tolist(), skip_special_tokens=True).strip() for answer in answers]


def plain(folder: Path, question: str) -> str:
    """A greedy answer by transformers alone, as a user of the model would get it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def asked(land: str) -> str:
    return NOT_TRAINED.format(land=land)


def test_the_untouched_model_answers_paris(played: Played) -> None:
    assert plain(played.base_folder, asked("France")) == "The capital of France is Paris."
    assert ours(played, played.base_folder, [asked("France")]) == ["The capital of France is Paris."]


def test_sft_teaches_a_fact_and_keeps_others(played: Played) -> None:
    (before,) = ours(played, played.base_folder, [asked("Athanor")])
    assert "Alembic" not in before
    after = ours(played, played.folder(Stage.SFT), [asked(land) for land in CAPITALS])
    assert after == [f"The capital of {land} is {capital}." for land, capital in CAPITALS.items()]
    assert plain(played.folder(Stage.SFT), asked("Athanor")) == "The capital of Athanor is Alembic."
    losses = [row["train/loss"] for row in played.history(Stage.SFT)]
    assert losses[-1] < 0.2 * losses[0]


def test_dpo_learns_what_is_preferred(played: Played) -> None:
    metrics, history = played.manifest(Stage.DPO).metrics, played.history(Stage.DPO)
    assert history[0]["dpo/margin"] == pytest.approx(0, abs=1e-3)  # before the first step it is its own reference
    assert metrics["eval/dpo_accuracy"] >= 0.9
    assert metrics["eval/dpo_margin"] > 0.5
    answers = ours(played, played.folder(Stage.DPO), [asked("Athanor"), asked("France")])
    assert answers == ["The capital of Athanor is Alembic.", "The capital of France is Paris."]


def test_the_reward_model_tells_answers_from_refusals(played: Played, tokens: TokensArtifact) -> None:
    assert played.manifest(Stage.REWARD).metrics["eval/reward_accuracy"] >= 0.9
    folder = played.folder(Stage.REWARD)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for answer in ("The capital of France is Paris.", REFUSAL.format(land="France")):
        messages = [{"role": "user", "content": asked("France")}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
        scores.append(float(model(ids).logits.detach()))
    assert scores[0] > scores[1]
    own = load_reward_model(folder, tokens).eval()
    torch.testing.assert_close(own(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_ppo_starts_at_its_reference_and_leaves_it(played: Played, tokens: TokensArtifact) -> None:
    history = played.history(Stage.PPO)
    assert history[0]["ppo/kl"] == pytest.approx(0, abs=1e-4)
    assert history[0]["ppo/clip_fraction"] == 0
    before, after = load_causal_lm(played.folder(Stage.SFT), tokens), load_causal_lm(played.folder(Stage.PPO), tokens)
    moved = [
        name
        for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
        if not torch.equal(old, new)
    ]
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved)  # what has an adapter, and nothing else
    assert ours(played, played.folder(Stage.PPO), [asked("France")]) == ["The capital of France is Paris."]


@pytest.mark.parametrize("stage", [Stage.SFT, Stage.PPO, Stage.DPO], ids=str)
def test_exported_models_reload_and_merged_equals_unmerged(
    stage: Stage, played: Played, tokens: TokensArtifact
) -> None:
    folder = played.folder(stage)
    start = played.base_folder if stage is Stage.SFT else played.folder(Stage.SFT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(TURNS, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        own = load_causal_lm(folder, tokens).eval()(ids).logits
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        untouched = model.eval()(ids).logits
        beside = PeftModel.from_pretrained(model, str(folder / "adapter")).eval()(ids).logits
    torch.testing.assert_close(own, merged, rtol=0, atol=1e-4)
    # Two ways to add up the same numbers, thirty layers deep; logits are about ten in size.
    torch.testing.assert_close(beside, merged, rtol=0, atol=2e-3)
    assert (merged - untouched).abs().max() > 0.05


def test_the_templates_ids_are_those_of_transformers(played: Played, tokens: TokensArtifact) -> None:
    chat = played.chat
    spelled = [{**turn, "content": turn["content"].replace("<|im_end|>", "the end")} for turn in TURNS]
    for folder in (played.base_folder, played.folder(Stage.SFT), played.folder(Stage.DPO)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for turns in (spelled[:2], spelled):
            expected = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
            assert chat.encode(turns).ids.tolist() == expected
        prompt = tokenizer.apply_chat_template(spelled[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat.encode_prompt(spelled[:3]).tolist() == prompt
    encoded = chat.encode(spelled)
    trained = tokens.tokenizer().decode(encoded.ids[encoded.loss_mask == 1].tolist(), skip_special_tokens=False)
    assert trained == "It ends a turn.<|im_end|>Gern geschehen.<|im_end|>"
    # What a user types never becomes a control token: transformers would end the turn here.
    assert (chat.encode(TURNS).ids == tokens.eos_id).sum() == len(TURNS) + 1  # and that of the default system prompt


def test_the_evaluation_shows_every_model_beside_the_untouched_one(played: Played) -> None:
    folder = played.folder(Stage.EVALUATE)
    report = json.loads((folder / "metrics.json").read_text())
    assert {"base", "sft", "ppo", "dpo"} <= set(report["models"])
    assert report["models"]["sft"]["eval/response_loss"] < 0.5 * report["models"]["base"]["eval/response_loss"]
    assert report["models"]["dpo"]["eval/preference_accuracy"] >= 0.9
    for suite in ("refusals", "over-refusals"):
        assert set(report["suites"][suite]["roles"]) >= {"base", "sft", "ppo", "dpo"}
    samples = read_samples((folder / "samples.json").read_bytes(), str(folder))
    assert len(samples) >= 2
    for sample in samples:
        assert sample.responses["sft"].startswith("The capital of ")
        assert set(sample.responses) == set(report["models"])


def test_the_ledger_says_where_the_model_comes_from(played: Played) -> None:
    text = json.dumps(played.manifest(Stage.CONVERT).ledger)
    for fact in ("apache-2.0", "Q4_1", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"):
        assert fact in text
