"""Ensembles: each member is what it would be alone, one artifact holds all, and they are read as one score."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from stages import reward
from stages.config.errors import ConfigError
from stages.config.execution import ExecutionConfig
from stages.config.graph import Stage
from stages.config.preferences import RewardConfig
from stages.config.request import ArtifactRef
from stages.config.resolve import resolve
from stages.config.rollouts import PPOConfig
from stages.data.tokens.packing import RowBudget, TokenSequence, lay_out
from stages.data.tokens.views import Split, TokensArtifact, evenly
from stages.job.context import StageContext, StageOutcome
from stages.judge.gates import reload
from stages.models.build import load_reward_model, load_scorer
from stages.models.ensemble import Ensemble, member_folders
from stages.models.forward import member_scores, segment_scores
from stages.train.comparisons import planned_comparisons, resampled
from stages.train.members import member_seed, train_members_on_worker
from stages.train.rollout.reading import reading_of, scale_of
from stages.train.rollout.scoring import RewardModel, ScoreScale
from stages.train.run import train_model, train_on_worker
from tests.numerics.training import run_training
from tests.small_world import CONFIGS, make_context, make_models, make_tokens, published

REWARD: Any = CONFIGS[Stage.REWARD]


def config(**changes: Any) -> RewardConfig:
    return REWARD.model_copy(update={"num_epochs": 0.5, **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArtifactRef]:
    home = tmp_path_factory.mktemp("world")
    return make_models(home, make_tokens(home))[Stage.REWARD]


def train(home: Path, inputs: dict[str, ArtifactRef], **changes: Any) -> tuple[StageContext, StageOutcome]:
    changed = config(**changes)
    execution = ExecutionConfig(micro_batch_size=4, log_every=1)
    context = make_context(home, Stage.REWARD, changed, inputs, execution)
    body = train_on_worker if changed.ensemble_size == 1 else train_members_on_worker
    return context, body(context, reward.prepare)


@pytest.fixture(scope="module")
def ensemble(
    inputs: dict[str, ArtifactRef], tmp_path_factory: pytest.TempPathFactory
) -> tuple[StageContext, StageOutcome]:
    return train(tmp_path_factory.mktemp("three"), inputs, ensemble_size=3)


def tokens_of(context: StageContext) -> TokensArtifact:
    return TokensArtifact(context.input_dir("tokens"))


def batch() -> Any:
    ids = [[9, 10, 11, 1], [20, 21, 22, 23, 24], [50, 51]]
    return lay_out([TokenSequence(np.array(one), np.ones(len(one), dtype=np.int64)) for one in ids])


def test_every_member_loads_in_plain_transformers_and_no_two_are_alike(ensemble: Any) -> None:
    context, _ = ensemble
    folders = member_folders(context.output_dir)
    assert [str(folder.relative_to(context.output_dir)) for folder in folders] == [".", "members/01", "members/02"]
    plain = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in folders]
    with torch.no_grad():
        scores = [model(torch.tensor([[9, 10, 11, 1]])).logits[0, 0].item() for model in plain]
    assert len({round(score, 4) for score in scores}) == 3
    ours = load_scorer(context.output_dir, tokens_of(context)).eval()
    with torch.no_grad():
        each = member_scores(ours, batch(), pad_id=tokens_of(context).pad_id)
        mean = segment_scores(ours, batch(), pad_id=tokens_of(context).pad_id)
    assert each[:, 0].tolist() == pytest.approx(scores, abs=1e-5)
    torch.testing.assert_close(mean, (each[0] + each[1] + each[2]) / 3)


def test_a_gate_compares_all_members_with_plain_transformers(ensemble: Any) -> None:
    context, _ = ensemble
    tokens = tokens_of(context)
    plain = reload.plain_model(context.output_dir, scores=True)
    ours: Any = load_scorer(context.output_dir, tokens).eval()
    prompts = [np.array([9, 10, 11]), np.array([20, 21])]
    assert reload.reloaded(plain, ours, prompts, scores=True, pad_id=tokens.pad_id).outcome == "passed"
    assert isinstance(ours, Ensemble)
    ours.members[2].score.weight.data.add_(0.1)  # type: ignore[union-attr, operator]
    assert reload.reloaded(plain, ours, prompts, scores=True, pad_id=tokens.pad_id).outcome == "failed"


def test_a_member_is_what_it_would_be_alone(ensemble: Any, inputs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    """The third one, with its seed: nothing of the members before it is left in it."""
    context, _ = ensemble
    seed = member_seed(REWARD.seed, 2)
    alone = make_context(tmp_path, Stage.REWARD, config(seed=seed), inputs)
    tokens = tokens_of(context)
    member = load_reward_model(member_folders(context.output_dir)[2], tokens)
    changed = config(seed=seed, ensemble_size=2)  # draws a head, as members do
    train_model(replace(alone, config=changed), reward.prepare)
    found = load_reward_model(alone.output_dir, tokens)
    for (name, one), (_, other) in zip(member.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_steps_go_on_from_member_to_member_and_metrics_are_those_of_the_mean(ensemble: Any) -> None:
    context, outcome = ensemble
    rows = [json.loads(line) for line in (context.output_dir / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))  # three steps each, and the ensemble
    assert {name: value for name, value in rows.pop().items() if name != "step"} == outcome.metrics
    last = [row for row in rows if "eval/reward_margin" in row]
    assert [row["step"] for row in last] == [3, 6, 9]
    margins = [row["eval/reward_margin"] for row in last]
    assert outcome.metrics["eval/reward_margin"] == pytest.approx(sum(margins) / 3)
    assert outcome.ledger["steps"] == 9
    assert not (context.output_dir / "members" / "01" / "history.jsonl").exists()
    assert abs(rows[0]["train/loss"] - math.log(2)) < 0.2


def test_statistics_are_those_of_the_scores_that_the_published_models_give(ensemble: Any) -> None:
    context, outcome = ensemble
    tokens = tokens_of(context)
    told = json.loads((context.output_dir / "scores.json").read_text())
    ours = load_scorer(context.output_dir, tokens).eval()
    planned = planned_comparisons(tokens, config(), micro_batch_size=4).planned
    held = tokens.pairs(Split.HELDOUT)
    chosen = evenly(len(held), at_most=REWARD.eval_items)
    with torch.no_grad():
        each = torch.cat(
            [member_scores(ours, one, pad_id=tokens.pad_id) for one in planned.steps.micro_batches(held, chosen)],
            dim=1,
        ).double()
    mean = each.mean(dim=0)
    assert told["heldout"]["answers"] == len(mean) == 16
    assert told["heldout"]["mean"] == pytest.approx(mean.mean().item(), abs=1e-5)
    assert told["heldout"]["std"] == pytest.approx(mean.std(correction=0).item(), abs=1e-5)
    assert [one["heldout"]["mean"] for one in told["members"]] == pytest.approx(each.mean(dim=1).tolist(), abs=1e-5)
    assert told["train"]["answers"] == 16
    assert outcome.metrics["eval/score_mean"] == told["heldout"]["mean"]
    assert outcome.metrics["eval/score_std"] == told["heldout"]["std"]
    assert outcome.metrics["eval/score_spread"] == pytest.approx(each.std(dim=0, correction=0).mean().item(), abs=1e-5)


def test_a_single_reward_model_has_statistics_and_no_ensemble(inputs: dict[str, ArtifactRef], tmp_path: Path) -> None:
    context, outcome = train(tmp_path, inputs)
    told = json.loads((context.output_dir / "scores.json").read_text())
    assert set(told) == {"train", "heldout"}
    assert outcome.metrics["eval/score_std"] == told["heldout"]["std"] > 0
    assert member_folders(context.output_dir) == [context.output_dir]
    assert not isinstance(load_scorer(context.output_dir, tokens_of(context)), Ensemble)
    assert not list(context.store.list("checkpoints"))  # a single training leaves none behind its last step


def test_a_retry_takes_members_that_are_done_from_their_last_checkpoint(
    ensemble: Any, inputs: dict[str, ArtifactRef], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context, outcome = ensemble
    caplog.set_level("INFO")
    again = make_context(
        tmp_path, Stage.REWARD, config(ensemble_size=3), inputs, ExecutionConfig(micro_batch_size=4, log_every=1),
        store_uri=context.store.root_uri,
    )  # fmt: skip
    found = train_members_on_worker(again, reward.prepare)
    assert caplog.text.count("resumed from the checkpoint of step 3 of 3") == 3
    assert found.metrics == outcome.metrics
    for name in ("model.safetensors", "members/02/model.safetensors", "scores.json", "history.jsonl"):
        assert (again.output_dir / name).read_bytes() == (context.output_dir / name).read_bytes(), name


def test_a_bootstrap_sample_has_as_many_pairs_of_which_some_come_again(inputs: dict[str, ArtifactRef]) -> None:
    order = np.concatenate([np.arange(0, 200, 2), np.arange(0, 200, 2)[::-1]])  # two passes over the even pairs
    drawn = resampled(order, seed=3)
    assert drawn.tolist() != resampled(order, seed=4).tolist()
    assert drawn.tolist() == resampled(order, seed=3).tolist()
    assert set(drawn.tolist()) <= set(order.tolist())
    assert drawn[:100].tolist() == drawn[100:][::-1].tolist()  # every pass sees the same sample
    assert 50 < len(set(drawn.tolist())) < 76  # 63 of 100 are expected
    with pytest.raises(ValueError, match="ensemble_bootstrap=true needs ensemble_size above 1"):
        RewardConfig(optimizer=REWARD.optimizer, global_batch_size=4, ensemble_bootstrap=True)


def test_an_ensemble_with_a_missing_member_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text('{"members": 2, "seeds": [0, 1]}')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="an ensemble of 2 reward models without members/01"):
        member_folders(tmp_path)


def ppo(**changes: Any) -> PPOConfig:
    known: Any = CONFIGS[Stage.PPO]
    return PPOConfig.model_validate({**known.model_dump(), "num_rollouts": 1, "num_epochs": 1, **changes})


def test_scores_of_members_are_read_from_the_same_origin(ensemble: Any) -> None:
    """Bradley-Terry leaves the offset of each member open: one that is low everywhere is not the worst."""
    folder = ensemble[0].output_dir
    told = [one["heldout"]["mean"] for one in json.loads((folder / "scores.json").read_text())["members"]]
    reading = reading_of(ppo(aggregation="minimum"), folder, size=3)
    assert sum(reading.offsets) == pytest.approx(0.0, abs=1e-9)
    alike = torch.tensor([[mean] for mean in told])  # each member gives its own usual score
    (score,) = reading.scores(alike)
    assert score.value == pytest.approx(sum(told) / 3, abs=1e-6)
    assert score.spread == pytest.approx(0.0, abs=1e-6)
    lower = reading_of(ppo(aggregation="lower", spread_coefficient=2.0), folder, size=3)
    (score,) = lower.scores(alike + torch.tensor([[3.0], [0.0], [0.0]]))  # mean 1, spread sqrt 2
    assert score.value == pytest.approx(sum(told) / 3 + 1 - 2 * 2**0.5, abs=1e-5)


def test_the_scale_of_scores_is_that_of_the_model_if_wanted(ensemble: Any, tmp_path: Path) -> None:
    folder = ensemble[0].output_dir
    told = json.loads((folder / "scores.json").read_text())["heldout"]
    scale = scale_of(ppo(score_scale="model"), folder)
    assert scale == ScoreScale(told["mean"], told["std"])
    scorer = RewardModel(None, pad_id=0, budget=RowBudget(row_length=8, max_rows=1), scale=scale)
    assert scorer.rewards([told["mean"] + told["std"]] * 2) == pytest.approx([1.0, 1.0], abs=1e-4)
    assert scale_of(ppo(), tmp_path) is None
    with pytest.raises(ConfigError, match="has no statistics of its scores"):
        scale_of(ppo(score_scale="model"), tmp_path)


def test_an_aggregation_of_one_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an ensemble of reward models, and this one has one member"):
        reading_of(ppo(aggregation="minimum"), tmp_path, size=1)
    with pytest.raises(ConfigError, match=r"ppo\.aggregation=minimum needs an ensemble, and reward\.ensemble_size=1"):
        resolve({"recipe": "tiny", "alignment": "ppo", "overrides": {"ppo.aggregation": "minimum"}})
    with pytest.raises(ValueError, match="aggregation=mean and spread_coefficient=1 do not go together"):
        ppo(spread_coefficient=1.0)
    with pytest.raises(ValueError, match="aggregation=lower and spread_coefficient=0 do not go together"):
        ppo(aggregation="lower")


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapter"])
def test_ppo_reads_all_members_with_and_without_an_adapter(
    rank: int, ensemble: Any, inputs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    """With an adapter the critic without it is the first member. Either way the first rollout has the same scores."""
    given = {**inputs, "reward": published(ensemble[0])}
    changed = ppo(aggregation="minimum", lora={"rank": rank})
    first = run_training(tmp_path, Stage.PPO, changed, given).history[0]
    mean = run_training(tmp_path / "mean", Stage.PPO, ppo(lora={"rank": rank}), given).history[0]
    assert first["ppo/score_spread"] == pytest.approx(mean["ppo/score_spread"], abs=1e-6) != 0.0
    assert first["ppo/score"] < mean["ppo/score"]
