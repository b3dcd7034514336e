"""Evaluation: which models are measured follows from the graph, which numbers from the list of metrics."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import evaluate
from stages.config.closing import EvaluateConfig
from stages.config.graph import GRAPH, Stage, StageSpec
from stages.config.metrics import EVALUATION_METRICS
from stages.config.request import ArtifactRef
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.originals import published_tokenizer
from stages.data.tokens.packing import collate
from stages.data.tokens.ragged import Ragged, RaggedWriter
from stages.data.tokens.views import Split, TokensArtifact
from stages.judge import aggregates
from stages.judge.heldout import Heldout
from stages.judge.subjects import language_roles, scorer_role
from tests.small_world import make_context, make_models, make_tokens

Inputs = dict[str, ArtifactRef]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Inputs]:
    """An untrained model in every role, and a reward model."""
    home = tmp_path_factory.mktemp("world")
    tokens = make_tokens(home)
    models = make_models(home, tokens)[Stage.PPO]
    return home, {"tokens": tokens, "reward": models["reward"], "base": models["model"], "sft": models["model"]}


def measured(home: Path, inputs: Inputs) -> dict[str, Any]:
    config = EvaluateConfig(max_prompts=6, max_preferences=6, max_instructions=6, max_response_length=4, num_samples=2)
    context = make_context(home, Stage.EVALUATE, config, inputs)
    evaluate.measure_models(context)
    return json.loads((context.output_dir / "metrics.json").read_text())


def test_an_aligned_stage_that_joins_the_graph_is_measured_against_its_reference(
    made: tuple[Path, Inputs], imaginary_stage: StageSpec
) -> None:
    home, inputs = made
    role = imaginary_stage.role
    report = measured(home, inputs | {role: inputs["sft"]})
    assert list(report["models"]) == ["base", "sft", role]
    assert report["models"][role]["eval/kl"] == pytest.approx(0.0, abs=1e-5)  # it is its reference
    assert report["models"][role]["eval/win_rate"] == pytest.approx(0.5)
    assert "eval/kl" not in report["models"]["sft"]


def test_a_scoring_stage_that_joins_the_graph_is_not_asked_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    imaginary: Any = "critic"
    monkeypatch.setitem(GRAPH, imaginary, replace(GRAPH[Stage.REWARD], stage=imaginary, role="critic"))
    assert language_roles() == ["base", "sft", "ppo", "dpo"]
    assert scorer_role() == "reward"


def test_every_metric_of_a_model_is_in_the_list_that_report_and_approval_read(made: tuple[Path, Inputs]) -> None:
    home, inputs = made
    report = measured(home, inputs | {"dpo": inputs["sft"]})
    measured_keys = {key for metrics in report["models"].values() for key in metrics}
    assert measured_keys == {metric.key for metric in EVALUATION_METRICS}


def test_tokens_are_counted_over_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RaggedWriter(tmp_path, "tokens", np.dtype(np.uint16), shard_items=4)
    for document in ([1, 2, 2], [0, 2, 1, 4], [4, 4]):
        writer.append(np.array(document))
    writer.close()
    monkeypatch.setattr(aggregates, "_TOKENS_AT_ONCE", 5)
    assert aggregates.count_tokens(Ragged(tmp_path, "tokens"), vocab_size=6).tolist() == [1, 2, 3, 0, 3, 0]


def test_the_unigram_model_is_that_of_the_training_tokens(made: tuple[Path, Inputs]) -> None:
    _, inputs = made
    tokens = TokensArtifact(Path(inputs["tokens"].uri.removeprefix("file://")))
    settings = TokenizeConfig()
    found = Heldout(EvaluateConfig(), tokens, published_tokenizer(tokens, settings), settings=settings)
    train = tokens.documents(Split.TRAIN)
    counts = np.bincount(train.slice(0, train.num_items), minlength=tokens.vocab_size) + 1.0
    logprobs = np.log(counts / counts.sum())
    rows = [collate([found.rows[int(number)]]) for number in found.row_numbers]
    heldout = [row.input_ids_BT[row.loss_mask_BT == 1].numpy() for row in rows]
    expected = np.exp(-np.concatenate([logprobs[ids] for ids in heldout]).mean())
    assert aggregates.unigram_perplexity(found) == pytest.approx(expected)
