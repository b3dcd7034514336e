"""Eight ways into the pipeline, each played stage by stage as its Ray jobs run it: docs/RECIPES.md has them as recipes.

What is given lies outside the store, as a plain Hugging Face folder, or in it, as an artifact of the run before.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.given import given_artifacts
from operators.plan import make_plan
from operators.prepare import build_request
from stages.__main__ import verb_of
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest, settings_digest
from stages.artifacts.store import Store
from stages.config.closing import PromoteConfig
from stages.config.decision import Candidate, decide
from stages.config.evaluation import Evaluation
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import PipelineConfig
from stages.config.request import ArtifactRef, Manifest, RunInfo
from stages.config.resolve import resolve
from stages.job.runner import execute
from stages.lineage.graph import ancestors, started_from
from tests.gguf_files import small_llama, write_gguf
from tests.playing import play
from tests.raw_text import WORDS, prose

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = {"tokenize.vocab_size": 320, "curate.planted": 0, "curate.toxicity": "none", "curate.heldout_fraction": 0.2}


@dataclass
class Played:
    """A run: its configuration and what its stages left."""

    config: PipelineConfig
    done: dict[Stage, ArtifactRef]
    store: Store

    def manifest(self, stage: Stage) -> Manifest:
        return read_manifest(self.done[stage])

    def reads(self, stage: Stage) -> dict[str, str]:
        """What a stage was made from, by role: fingerprints of artifacts, addresses of what lies outside."""
        manifest = self.manifest(stage)
        return {entry.role: entry.fingerprint for entry in manifest.inputs} | {
            source.role: source.uri for source in manifest.sources
        }

    def report(self) -> dict[str, Any]:
        """What `evaluate` measured."""
        folder = fetch(self.done[Stage.EVALUATE], Path(self.store.root_uri.removeprefix("file://")) / "cache")
        return json.loads((folder / "metrics.json").read_text())


def played(store: Store, name: str, **params: Any) -> Played:
    """A run without MLflow, so without promotion."""
    config = resolve({"recipe": "tiny", **params, "overrides": {**SETTINGS, **params.get("overrides", {})}})
    config = config.with_given(given_artifacts(config))
    make_plan(config, run=RunInfo(run_id=name, name=name), store=store)
    return Played(config, play(store, config, name), store)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@dataclass(frozen=True)
class World:
    """What somebody has who enters late: files, a policy, a reward model, and a smaller model of the same family."""

    home: Path
    store: Store
    documents: str
    instructions: str
    preferences: str
    first: Played
    policy: str
    reward: str
    small: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("ways")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("ATHANOR_SCRATCH", str(home / "scratch"))
        store = open_store((home / "store").as_uri())
        questions = [(f"Where is the {a} of the {b}?", f"By the {b}.") for a in WORDS for b in WORDS]
        documents = write(home / "documents.jsonl", [{"text": prose(seed)} for seed in range(60)])
        instructions = write(
            home / "instructions.jsonl", [{"instruction": asked, "response": answer} for asked, answer in questions]
        )
        preferences = write(
            home / "preferences.jsonl",
            [{"prompt": asked, "chosen": answer, "rejected": "No."} for asked, answer in questions[:60]],
        )
        data = {"documents": [documents], "instructions": [instructions], "preferences": [preferences]}
        first = played(store, "first", **data, alignment="ppo", last_stage="reward")

        def copied(stage: Stage) -> str:
            target = home / "models" / stage.value
            shutil.copytree(fetch(first.done[stage], home / "cache"), target)
            (target / "manifest.json").unlink(missing_ok=True)
            return str(target)

        policy, reward = copied(Stage.SFT), copied(Stage.REWARD)
        small = smaller(home, fetch(first.done[Stage.TOKENIZE], home / "cache"))
        yield World(home, store, documents, instructions, preferences, first, policy, reward, small)


def smaller(home: Path, tokens: Path) -> str:
    """A model with the policy's tokenizer and half of its width."""
    from stages.config.train import ModelConfig
    from stages.data.tokens.views import TokensArtifact
    from stages.models.build import new_causal_lm, save_model

    artifact, folder = TokensArtifact(tokens), home / "models" / "small"
    folder.mkdir(parents=True)
    shape = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    model = new_causal_lm(shape, artifact, seed=3)
    save_model(model, model.state_dict(), folder, artifact)
    return str(folder)


def built(run: Played) -> set[str]:
    return {stage.value for stage in run.done}


def outside(run: Played) -> set[str]:
    """The data that curation has read."""
    return {source.role for source in run.manifest(Stage.CURATE).sources}


def test_sft_only(world: World) -> None:
    run = played(
        world.store,
        "sft",
        base_model=world.policy,
        instructions=[world.instructions],
        alignment="none",
        last_stage="evaluate",
    )
    assert built(run) == {"curate", "tokenize", "sft", "evaluate"}
    assert outside(run) == {"instructions"}
    assert "reads no documents" in run.manifest(Stage.CURATE).ledger["notes"][0]
    assert run.manifest(Stage.TOKENIZE).metrics["tokens/train"] == 0
    assert run.reads(Stage.SFT) == {"tokens": run.done[Stage.TOKENIZE].fingerprint, "base_model": world.policy}
    assert set(run.report()["models"]) == {"base", "sft"}
    assert run.report()["left_out"].keys() == {"documents", "preferences"}


def test_dpo_on_a_given_model(world: World) -> None:
    run = played(
        world.store,
        "dpo",
        base_model=world.policy,
        first_stage="dpo",
        preferences=[world.preferences],
        last_stage="evaluate",
        overrides={"dpo.num_epochs": 3, "dpo.optimizer.learning_rate": 0.01},
    )
    assert built(run) == {"curate", "tokenize", "dpo", "evaluate"}
    assert outside(run) == {"preferences"}
    assert run.reads(Stage.DPO)["base_model"] == world.policy
    measured = run.report()["models"]
    assert set(measured) == {"base", "dpo"}
    assert "eval/win_rate" not in measured["dpo"]
    assert measured["base"].get("eval/preference_accuracy") is None
    assert measured["dpo"]["eval/preference_accuracy"] > 0.5
    # Nothing judges the answers, so promotion goes by the pairs, against the given model.
    settings = settings_digest(run.manifest(Stage.EVALUATE))
    evaluation = Evaluation.from_report(run.report(), settings_digest=settings)
    candidate = Candidate("dpo", run.done[Stage.DPO].fingerprint)
    decision = decide([candidate], None, evaluation, PromoteConfig(min_items=2))
    ruling = decision.ruling
    assert ruling is not None
    assert ruling.primary is not None
    assert (decision.comparison, ruling.opponent, ruling.primary.suite) == ("start", "base", "pairs")
    page = page_of(world, run)
    assert "preference accuracy" in page


def page_of(world: World, run: Played) -> str:
    """The report of what a run has made so far."""
    inputs = {role: run.done[source] for role, source in GRAPH[Stage.REPORT].inputs if source in run.done}
    config = run.config.model_copy(update={"only": Stage.REPORT, "given": inputs})
    request = build_request(
        Stage.REPORT, run=RunInfo(run_id="r", name="r"), store=world.store, config=config, upstream={}
    )
    made = execute(request, world.store, verb_of).artifact
    return (fetch(made, world.home / "cache") / "report.html").read_text()


def test_ppo_with_a_given_policy_and_a_given_reward_model(world: World) -> None:
    sft = world.first.done[Stage.SFT]
    run = played(
        world.store,
        "ppo",
        base_model=sft.uri,
        reward_model=world.reward,
        first_stage="ppo",
        alignment="ppo",
        instructions=[world.instructions],
        last_stage="evaluate",
    )
    assert built(run) == {"curate", "tokenize", "ppo", "evaluate"}
    assert outside(run) == {"instructions"}
    tokens = run.done[Stage.TOKENIZE].fingerprint
    assert run.reads(Stage.PPO) == {"tokens": tokens, "base_model": sft.fingerprint, "reward_model": world.reward}
    assert started_from(run.manifest(Stage.PPO)) == sft.fingerprint
    measured = run.report()["models"]
    assert measured["base"]["eval/win_rate"] == 0.5  # against itself
    assert 0 <= measured["ppo"]["eval/win_rate"] <= 1
    (judge,) = (source for source in run.manifest(Stage.EVALUATE).sources if source.role == "reward_model")
    assert run.report()["reward_fingerprint"] == judge.digest


def test_a_reward_model_only(world: World) -> None:
    run = played(
        world.store,
        "reward",
        base_model=world.policy,
        first_stage="reward",
        last_stage="reward",
        preferences=[world.preferences],
    )
    assert built(run) == {"curate", "tokenize", "reward"}
    assert outside(run) == {"preferences"}
    assert run.reads(Stage.REWARD)["base_model"] == world.policy


def test_a_reward_model_that_is_smaller_than_the_policy(world: World) -> None:
    run = played(
        world.store,
        "smaller",
        base_model=world.policy,
        reward_base=world.small,
        first_stage="reward",
        alignment="ppo",
        last_stage="ppo",
        instructions=[world.instructions],
        preferences=[world.preferences],
    )
    assert built(run) == {"curate", "tokenize", "reward", "ppo"}
    assert run.reads(Stage.REWARD) == {"tokens": run.done[Stage.TOKENIZE].fingerprint, "reward_base": world.small}
    sizes = {
        stage: json.loads((fetch(run.done[stage], world.home / "cache") / "config.json").read_text())["hidden_size"]
        for stage in (Stage.REWARD, Stage.PPO)
    }
    assert sizes == {Stage.REWARD: 16, Stage.PPO: 32}
    assert run.reads(Stage.PPO)["reward"] == run.done[Stage.REWARD].fingerprint


def test_evaluation_only(world: World) -> None:
    run = played(
        world.store,
        "evaluate",
        base_model=world.policy,
        reward_model=world.first.done[Stage.REWARD].uri,
        first_stage="evaluate",
        instructions=[world.instructions],
    )
    assert built(run) == {"curate", "tokenize", "evaluate", "report"}
    assert run.reads(Stage.EVALUATE)["reward_model"] == world.first.done[Stage.REWARD].fingerprint
    assert set(run.report()["models"]) == {"base"}
    assert {"eval/response_loss", "eval/score_mean"} <= run.report()["models"]["base"].keys()
    assert run.report()["reward_fingerprint"] == world.first.done[Stage.REWARD].fingerprint


def test_a_gold_scorer_learns_from_the_other_half_and_judges_what_learnt_from_the_first(world: World) -> None:
    given = {"base_model": world.policy, "instructions": [world.instructions], "preferences": [world.preferences]}
    run = played(world.store, "gold", **given, first_stage="reward", gold_scorer="train", last_stage="evaluate")
    assert built(run) == {"curate", "tokenize", "reward", "gold", "ppo", "dpo", "evaluate"}
    assert "gold" not in run.reads(Stage.DPO)
    # PPO only measures by it.
    assert run.reads(Stage.PPO)["gold"] == run.reads(Stage.EVALUATE)["gold"] == run.done[Stage.GOLD].fingerprint
    ledgers = {stage: run.manifest(stage).ledger for stage in (Stage.REWARD, Stage.DPO, Stage.GOLD)}
    used = {stage: ledger["pairs"] - ledger["pairs_of_the_other_half"] for stage, ledger in ledgers.items()}
    assert used[Stage.REWARD] == used[Stage.DPO] > 0
    assert used[Stage.REWARD] + used[Stage.GOLD] == ledgers[Stage.GOLD]["pairs"]
    assert "eval/reward_accuracy" in run.manifest(Stage.GOLD).metrics
    suites = run.report()["suites"]
    assert suites["gold"]["roles"].keys() == {"base", "ppo", "dpo"}
    assert suites["gold_agreement"]["roles"].keys() == {"gold"}
    assert {"suite/gold/score"} <= {name.partition("/")[2] for name in run.manifest(Stage.EVALUATE).metrics}


def test_a_given_gold_scorer_and_a_given_model_judge_without_being_trained(world: World) -> None:
    run = played(
        world.store,
        "judged",
        base_model=world.policy,
        gold_model=world.reward,
        judge=world.first.done[Stage.SFT].uri,
        first_stage="dpo",
        last_stage="evaluate",
        alignment="dpo",
        instructions=[world.instructions],
        preferences=[world.preferences],
    )
    assert built(run) == {"curate", "tokenize", "dpo", "evaluate"}
    assert run.reads(Stage.EVALUATE)["gold_model"] == world.reward
    assert run.reads(Stage.EVALUATE)["judge"] == world.first.done[Stage.SFT].fingerprint
    assert "pairs_of_the_other_half" not in run.manifest(Stage.DPO).ledger  # it was not trained on these pairs
    report = run.report()
    assert report["suites"]["gold"]["roles"].keys() == {"base", "dpo"}
    # A judge with 128 tokens of context reads none of the questions, which is said and costs nothing else.
    assert report["left_out"]["suite judge"] == "the judge gave no verdict: judge_context_too_short"
    assert report["judge"]["better_than_chance"] is False


def test_continued_pretraining_then_sft(world: World) -> None:
    run = played(
        world.store,
        "continued",
        base_model=world.policy,
        continue_pretraining=True,
        documents=[world.documents],
        instructions=[world.instructions],
        alignment="none",
        last_stage="sft",
    )
    assert built(run) == {"curate", "tokenize", "pretrain", "sft"}
    assert outside(run) == {"documents", "instructions"}
    assert run.reads(Stage.PRETRAIN)["base_model"] == world.policy
    assert run.reads(Stage.SFT) == {
        "tokens": run.done[Stage.TOKENIZE].fingerprint,
        "model": run.done[Stage.PRETRAIN].fingerprint,
    }


def test_a_gguf_file(world: World) -> None:
    model = small_llama()
    file = write_gguf(world.home / "policy.gguf", model)
    run = played(
        world.store,
        "gguf",
        base_model=str(file),
        instructions=[world.instructions],
        alignment="none",
        last_stage="evaluate",
        overrides={"convert.dtype": "fp32"},
    )
    assert built(run) == {"convert", "curate", "tokenize", "sft", "evaluate"}
    given = run.done[Stage.CONVERT]
    assert run.reads(Stage.CONVERT) == {"base_model": str(file)}
    for stage in (Stage.TOKENIZE, Stage.SFT, Stage.EVALUATE):
        assert run.reads(stage)["base_model"] == given.fingerprint
    names = {node.uri for node in ancestors([run.done[Stage.SFT].uri]).nodes}
    assert {str(file), given.uri} <= names
    # The same numbers came out of the file as went into it.
    before, after = model.state_dict(), weights_in(fetch(given, world.home / "cache"))
    assert before.keys() - {"lm_head.weight"} == after.keys()  # it is tied
    assert all(np.allclose(before[name].numpy(), value, atol=1e-6) for name, value in after.items())
    assert run.manifest(Stage.CONVERT).metrics["convert/parameters"] == sum(one.size for one in after.values())
    again = played(
        world.store,
        "again",
        base_model=str(shutil.copy(file, world.home / "renamed.gguf")),
        instructions=[world.instructions],
        alignment="none",
        last_stage="sft",
        overrides={"convert.dtype": "fp32"},
    )
    assert read_manifest(again.done[Stage.CONVERT]).digest == read_manifest(given).digest


def weights_in(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_a_model_with_another_tokenizer_is_refused_by_name(world: World) -> None:
    from stages.config.errors import ConfigError
    from stages.data.tokens.views import TokensArtifact

    other = played(
        world.store,
        "other",
        documents=[world.documents],
        instructions=[world.instructions],
        alignment="none",
        last_stage="pretrain",
        overrides={"tokenize.vocab_size": 330, "curate.preferences": []},
    )
    given = {"base_model": world.policy, "first_stage": "reward", "preferences": [world.preferences]}
    with pytest.raises(
        ConfigError, match=r"reward_base: the tokenizer in .* is not that of the policy .* tokens differ"
    ):
        played(world.store, "wrong", **given, reward_base=other.done[Stage.PRETRAIN].uri, last_stage="reward")
    from stages.models.same_tokenizer import check_given_scorer

    tokens = TokensArtifact(fetch(world.first.done[Stage.TOKENIZE], world.home / "cache")).tokenizer()
    check_given_scorer(Path(world.reward), tokens, role="reward_model")
    with pytest.raises(ConfigError, match=r"reward_model='.*' holds \['LlamaForCausalLM'\], which gives no scores"):
        check_given_scorer(Path(world.policy), tokens, role="reward_model")
