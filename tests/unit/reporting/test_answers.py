"""The same prompts answered stage by stage: what the report marks, folds and says about small models."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts.store import Store
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, FileEntry, RunInfo, SourceEntry, SourceKind
from stages.reporting.answers import LONGEST_SHOWN, samples
from stages.reporting.page import render_page
from stages.reporting.sizes import size_of
from stages.reporting.story import Story, read_story
from tests.pipeline_records import publish_artifact, publish_run, refs_for, tampered

BASE = "The capital of France is Paris."
SFT = "The capital of France is Paris, a city on the Seine."
DPO = "It is Paris."


def story_of(tmp_path: Path, *, without: frozenset[Stage] = frozenset(), **responses: str) -> Story:
    """A run whose models gave these answers to one prompt, by role."""
    store, made = publish_run(tmp_path, without=without)
    return told(tmp_path, store, made, [{"prompt": "What is the capital of France?", "responses": responses}])


def told(tmp_path: Path, store: Store, made: dict[Stage, ArtifactRef], rows: list[dict[str, Any]]) -> Story:
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"models": {}}))
    (folder / "samples.json").write_text(json.dumps(rows))
    made[Stage.EVALUATE], _ = publish_artifact(store, Stage.EVALUATE, {}, folder, salt="answers")
    return read_story(refs_for(Stage.REPORT, made), RunInfo(run_id="r", name="n"), title="t", max_samples=9)


def marked(story: Story) -> dict[str, str]:
    """Each model's answer with [new words] in brackets, and how it changed."""
    (sample,) = samples(story)
    return {
        answer.model: "".join(f"[{piece.text}]" if piece.is_new else piece.text for piece in answer.pieces)
        + (f" ({answer.change})" if answer.change else "")
        for answer in sample.answers
    }


def test_answers_stand_in_the_order_of_the_pipeline_and_show_what_is_new(tmp_path: Path) -> None:
    assert marked(story_of(tmp_path, dpo=DPO, ppo=SFT, sft=SFT, base=BASE)) == {
        "Base": BASE,
        "SFT": "The capital of France is Paris[, a city on the Seine]. (changed from Base, new words are marked)",
        "PPO": f"{SFT} (the same as SFT)",
        "DPO": "[It] is Paris. (changed from SFT, new words are marked)",
    }


def test_an_answer_that_is_mostly_new_is_not_marked(tmp_path: Path) -> None:
    found = marked(story_of(tmp_path, sft=SFT, dpo="I would rather talk of cheese and wine from there."))
    assert found["DPO"].endswith("there. (another answer than that of SFT)")
    assert "[" not in found["DPO"]


def test_a_given_model_is_called_so_and_is_what_the_others_are_compared_with(tmp_path: Path) -> None:
    """DPO directly on a given model: no base and no SFT model were made."""
    without = frozenset({Stage.PRETRAIN, Stage.SFT, Stage.PPO, Stage.REWARD})
    found = marked(story_of(tmp_path, without=without, dpo=SFT, base=BASE))
    answer = "The capital of France is Paris[, a city on the Seine]."
    assert found == {"Given model": BASE, "DPO": f"{answer} (changed from Given model, new words are marked)"}


def test_nothing_said_is_told_and_roles_of_other_versions_are_shown_last(tmp_path: Path) -> None:
    story = story_of(tmp_path, other="x", dpo="", sft=SFT)
    assert marked(story) == {"SFT": SFT, "DPO": "", "other": "x"}
    assert "(nothing)" in render_page(story)


def test_a_long_answer_is_folded_and_complete(tmp_path: Path) -> None:
    long = " ".join(f"word{number}" for number in range(300))
    page = render_page(story_of(tmp_path, base="short", sft=long))
    folded = re.findall(r"<details><summary><span>(.*?)</span></summary>\s*<p>(.*?)</p>", page, re.DOTALL)
    assert len(folded) == 1
    beginning, whole = folded[0]
    assert len(long) > LONGEST_SHOWN > len(beginning)
    assert long.startswith(beginning.removesuffix("…"))
    assert whole == long


def test_two_very_long_answers_take_no_time_to_compare(tmp_path: Path) -> None:
    story = story_of(tmp_path, base="a b " * 50_000, sft="b a " * 50_000)
    assert marked(story)["SFT"].endswith("(another answer than that of Base)")


def test_marks_stand_around_escaped_text_only(tmp_path: Path) -> None:
    before = f"{BASE} It lies on the Seine, and it has more museums than one can visit in a week."
    hostile = before.replace("Paris", "</mark><script>x()</script>")
    page = render_page(story_of(tmp_path, base=before, sft=hostile))
    (answer,) = re.findall(r"<p>(The capital of France is <mark>.*?)</p>", page)
    assert html.unescape(re.sub(r"</?mark>", "", answer)) == hostile
    assert "<script>" not in page


# ---- what to think of them


def sized(store: Store, made: dict[Stage, ArtifactRef], *, parameters: float, tokens: float | None) -> None:
    """Let the manifests say that the models have so many parameters, and were pretrained on so many tokens."""
    for stage in (Stage.PRETRAIN, Stage.SFT, Stage.PPO, Stage.DPO):
        if stage in made:
            file = FileEntry(path="model.safetensors", size=int(parameters * 4), sha256="0" * 64)
            adapter = FileEntry(path="adapter/adapter_model.safetensors", size=10**12, sha256="0" * 64)
            tampered(made[stage], files=[file.model_dump(), adapter.model_dump()])
    if Stage.PRETRAIN in made:
        tampered(made[Stage.PRETRAIN], ledger={} if tokens is None else {"tokens_trained": tokens})


def caution(tmp_path: Path, *, parameters: float, tokens: float | None, given: bool = False) -> str:
    store, made = publish_run(tmp_path, without=frozenset({Stage.PRETRAIN}) if given else frozenset())
    sized(store, made, parameters=parameters, tokens=tokens)
    if given:
        source = SourceEntry(role="base_model", kind=SourceKind.MODEL, uri="org/model", digest="a" * 40)
        tampered(made[Stage.SFT], sources=[source.model_dump(mode="json")])
    return read_story(refs_for(Stage.REPORT, made), RunInfo(run_id="r", name="n"), title="t", max_samples=1).caution


@pytest.mark.parametrize(
    ("parameters", "tokens", "given", "said"),
    [
        (2.6e6, 5e6, False, "A model of 2.6 M parameters trained on 5 M tokens cannot write sentences that are right."),
        (135e6, 5e6, False, "A model of 135 M parameters trained on 5 M tokens"),
        (135e6, 2e12, False, ""),
        (135e6, None, True, ""),
        (10e6, None, True, "A model of 10 M parameters cannot write"),
        (135e6, None, False, ""),  # an early version did not record it: nothing is known against it
    ],
)
def test_facts_decide_whether_sentences_may_be_judged(
    parameters: float, tokens: float | None, given: bool, said: str, tmp_path: Path
) -> None:
    found = caution(tmp_path, parameters=parameters, tokens=tokens, given=given)
    assert found.startswith(said) if said else found == ""
    assert ("Judge it by the numbers on held-out data" in found) is bool(said)


def test_the_page_says_so_under_its_headline_and_above_the_samples(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path, promotion={"promoted": True, "chosen": "ppo", "reason": "x", "models": []})
    sized(store, made, parameters=2.6e6, tokens=5e6)
    page = render_page(
        read_story(refs_for(Stage.REPORT, made), RunInfo(run_id="r", name="n"), title="t", max_samples=1)
    )
    header, samples_section = page.index("The PPO model is champion."), page.index('id="samples"')
    places = [found.start() for found in re.finditer('class="caution"', page)]
    assert len(places) == 2
    assert header < places[0] < samples_section < places[1]


def test_pretraining_of_earlier_runs_counts(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    sized(store, made, parameters=135e6, tokens=400e6)
    first = made[Stage.PRETRAIN]
    # another run continues the pretraining of that base model
    _, again = publish_run(tmp_path, salt="2")
    sized(store, again, parameters=135e6, tokens=300e6)
    edge = {"role": "base_model", **first.model_dump(include={"kind", "uri", "fingerprint", "digest"})}
    tampered(again[Stage.PRETRAIN], inputs=[edge])
    story = read_story(refs_for(Stage.REPORT, again), RunInfo(run_id="r", name="n"), title="t", max_samples=1)
    assert story.caution == ""
    assert size_of(story.manifests["sft"], story.manifests.values()).pretrained_tokens == 300_000_000
