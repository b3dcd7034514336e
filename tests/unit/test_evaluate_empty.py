"""Splits that may be empty: what cannot be measured is left out with its reason, and never costs what was trained."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import evaluate, tokenize
from stages.config.closing import EvaluateConfig
from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.tokens import TokenizeConfig
from stages.judge.aggregates import without_infinite
from stages.judge.forward import Forward
from stages.train.run import train_stage
from tests.small_world import CONFIGS, make_context, make_models, prepare_of, published, write_curated, write_ledger

PARTS = {
    "documents": "documents/heldout/part-00000.jsonl.gz",
    "instructions": "instructions/heldout.jsonl.gz",
    "preferences": "preferences/heldout.jsonl.gz",
}


def tokens_without(home: Path, *parts: str) -> ArtifactRef:
    """A `tokens` artifact whose held-out split has none of these; of documents it has one, shorter than a row."""
    curate = make_context(home, Stage.CURATE, CurateConfig())
    write_curated(curate.output_dir)
    for part in parts:
        rows = [{"id": "d", "text": "Too short."}] if part == "documents" else []
        with gzip.open(curate.output_dir / PARTS[part], "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    write_ledger(curate.output_dir)
    config = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)
    context = make_context(home, Stage.TOKENIZE, config, {"curated": published(curate)})
    tokenize.run(context)
    return published(context)


def strict_json(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))


def evaluated(home: Path, tokens: ArtifactRef) -> tuple[dict[str, Any], Any]:
    models = make_models(home, tokens)[Stage.PPO]
    inputs = {"tokens": tokens, "reward": models["reward"], "sft": models["model"], "dpo": models["model"]}
    config = EvaluateConfig(max_prompts=4, max_preferences=4, max_instructions=4, max_response_length=4, num_samples=2)
    context = make_context(home, Stage.EVALUATE, config, inputs)
    outcome = evaluate.measure_models(context)
    report, samples = (strict_json(context.output_dir / name) for name in ("metrics.json", "samples.json"))
    return report | {"samples": samples}, outcome


def test_heldout_documents_shorter_than_a_row_leave_the_language_out_with_the_reason(tmp_path: Path) -> None:
    report, outcome = evaluated(tmp_path, tokens_without(tmp_path, "documents"))
    assert "eval/perplexity" not in report["models"]["dpo"]
    assert {"eval/response_loss", "eval/win_rate"} <= report["models"]["dpo"].keys()
    assert "unigram_perplexity" not in report
    assert "a row has 64" in report["left_out"]["documents"]
    assert outcome.ledger["left_out"] == report["left_out"]


def test_without_conversations_and_prompts_language_and_preferences_are_measured(tmp_path: Path) -> None:
    report, _ = evaluated(tmp_path, tokens_without(tmp_path, "instructions"))
    assert report["left_out"].keys() == {"responses", "prompts"}
    assert {"eval/perplexity", "eval/preference_accuracy"} <= report["models"]["dpo"].keys()
    assert not {"eval/response_length", "eval/score_mean", "eval/win_rate"} & report["models"]["dpo"].keys()
    assert report["reward"]["reward/accuracy"] >= 0.0


def test_without_pairs_the_reward_model_is_not_measured(tmp_path: Path) -> None:
    report, _ = evaluated(tmp_path, tokens_without(tmp_path, "preferences"))
    assert report["left_out"].keys() == {"preferences"}
    assert report["reward"] == {}


def test_with_nothing_to_evaluate_on_the_failure_says_so_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is nothing to evaluate on: the held-out documents have"):
        evaluated(tmp_path, tokens_without(tmp_path, *PARTS))


def test_a_result_that_is_not_finite_is_left_out_and_named() -> None:
    values = {"eval/loss": float("nan"), "eval/perplexity": float("inf"), "eval/kl": 1.0}
    reasons = without_infinite("dpo", values)
    assert values == {"eval/kl": 1.0}
    assert reasons["dpo eval/loss"] == "the result is not a finite number: nan"


def test_a_score_that_is_not_finite_is_null_in_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forward, "scores", lambda self, scorer, sequences, pad_id: np.full(len(sequences), np.nan))
    report, _ = evaluated(tmp_path, tokens_without(tmp_path))
    assert len(report["samples"]) == 2
    assert [sample["scores"] for sample in report["samples"]] == [{"sft": None, "dpo": None}] * 2
    assert report["suites"]["score"]["roles"]["dpo"] == {"items": 0, "skipped": {"not_finite": 4}}
    assert "not_finite" in report["left_out"]["suite score"]


@pytest.mark.parametrize("stage", [Stage.PRETRAIN, Stage.SFT, Stage.REWARD, Stage.DPO, Stage.PPO])
def test_training_without_a_heldout_split_succeeds_and_says_that_nothing_was_evaluated(
    stage: Stage, tmp_path: Path
) -> None:
    tokens = tokens_without(tmp_path, *PARTS)
    inputs = make_models(tmp_path, tokens)[stage]
    outcome = train_stage(make_context(tmp_path, stage, CONFIGS[stage], inputs), prepare_of(stage))
    assert not [key for key in outcome.metrics if key.startswith("eval/")]
    assert "no held-out items" in outcome.ledger["not_evaluated"]


def test_a_best_step_that_cannot_be_measured_fails_before_training(tmp_path: Path) -> None:
    tokens = tokens_without(tmp_path, *PARTS)
    config = CONFIGS[Stage.DPO].model_copy(update={"best_metric": "eval/loss", "eval_every": 1})
    context = make_context(tmp_path, Stage.DPO, config, make_models(tmp_path, tokens)[Stage.DPO])
    with pytest.raises(DataError, match="best_metric='eval/loss' cannot be measured"):
        train_stage(context, prepare_of(Stage.DPO))
