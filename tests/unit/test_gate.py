"""`python -m stages.gate` on real models: each thing it looks for, broken once."""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from stages.__main__ import main as run_a_stage
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.evidence import read_evidence
from stages.artifacts.manifests import read_manifest
from stages.artifacts.store import Store, read_json, write_json
from stages.config.errors import ExitCode
from stages.config.execution import ExecutionConfig
from stages.config.gate_records import Check, Findings, GateRequest, Outcome, asked_of, failed, findings_key, gate_key
from stages.config.gates import GatesConfig
from stages.config.graph import Stage
from stages.config.invariants import bound_checks, recorded_checks
from stages.config.places import local_path
from stages.config.request import ArtifactRef, GateQuestions, RunInfo, StageRequest, StageResult
from stages.data.tokens.packing import TokenSequence, lay_out
from stages.data.tokens.views import Split, TokensArtifact
from stages.gate import examine, loaded, main
from stages.job.runner import load_request
from stages.judge.gates import computing, reload
from stages.judge.gates.again import pair_lengths
from stages.models import precision
from tests.gate_models import (
    REWARD,
    Rule,
    built,
    examined,
    heldout,
    learnt_by_chance,
    learnt_by_length,
    learnt_by_quality,
    republished,
    start_of,
    tokens_of,
)
from tests.small_world import CONFIGS

pytestmark = pytest.mark.slow


@dataclass
class Trained:
    home: Path
    tokens: ArtifactRef
    start: ArtifactRef
    reward: ArtifactRef
    made: dict[Stage, ArtifactRef] = field(default_factory=dict)

    def model(self, stage: Stage) -> ArtifactRef:
        """What a stage makes here; built when it is first asked for."""
        if stage is Stage.REWARD:
            return self.reward
        if stage not in self.made:
            inputs = (
                {"tokens": self.tokens} if stage is Stage.PRETRAIN else {"tokens": self.tokens, "model": self.start}
            )
            inputs |= {"reward": self.reward} if stage is Stage.PPO else {}
            self.made[stage] = built(self.home, stage, CONFIGS[stage], inputs)
        return self.made[stage]


def trained(home: Path, rule: Rule, *, held: Rule | None = heldout) -> Trained:
    tokens = tokens_of(home, rule, held=held)
    start = start_of(home, tokens)
    return Trained(home, tokens, start, built(home, Stage.REWARD, REWARD, {"tokens": tokens, "model": start}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("quality"), learnt_by_quality)


@pytest.fixture(scope="module")
def half(world: Trained) -> Trained:
    """Models of the same tokens that were trained in bfloat16, emulated where the CPU does not multiply it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "multiplies_bfloat16", lambda device_type: True)
        inputs = {"tokens": world.tokens, "model": world.start}
        made = {
            stage: built(world.home, stage, config.model_copy(update={"precision": "bf16", "seed": 5}), inputs | more)
            for stage, config, more in (
                (Stage.SFT, CONFIGS[Stage.SFT], {}),
                (Stage.DPO, CONFIGS[Stage.DPO], {}),
                (Stage.REWARD, REWARD, {}),
                (Stage.PPO, CONFIGS[Stage.PPO], {"reward": world.reward}),
            )
        }
    return Trained(world.home, world.tokens, world.start, made[Stage.REWARD], made)


def named(findings: Findings) -> dict[str, Check]:
    by_name = {check.name: check for check in findings.checks}
    assert len(by_name) == len(findings.checks)
    return by_name


def red(findings: Findings) -> set[str]:
    return {check.name for check in findings.checks if check.outcome is Outcome.FAILED}


def bounds_missed(findings: Findings) -> set[str]:
    checks = bound_checks(GatesConfig().bounds, findings.metrics, findings.unmeasured)
    return {check.name for check in checks if check.outcome is Outcome.FAILED}


def test_a_reward_model_of_quality_is_accepted(world: Trained):
    found = examined(world.reward, Stage.REWARD)
    assert red(found) == set(), [check for check in found.checks if check.outcome.value == "failed"]
    assert bounds_missed(found) == set()
    checks = named(found)
    for name in ("reload", "same_ids", "heldout_again", "swap_probe", "padding_probe", "batch_probe", "files_model"):
        assert checks[name].outcome is Outcome.PASSED, name
    assert found.metrics["accept/pairs"] == 160
    assert found.metrics["accept/longer_is_better"] == 0.75
    assert found.metrics["accept/over_length_low"] > 0
    assert found.unmeasured["accept/best_of_n_gold"] == "the run has no gold scorer that is an artifact"
    assert len(found.tables["by_length_difference"]) == 4


def test_an_ensemble_is_accepted_as_one_scorer_and_compared_with_the_reward_model_before_it(world: Trained):
    inputs = {"tokens": world.tokens, "model": world.start}
    ensemble = built(world.home, Stage.REWARD, REWARD.model_copy(update={"ensemble_size": 2}), inputs)
    found = examined(ensemble, Stage.REWARD, earlier=world.reward, inputs=inputs)
    assert red(found) == set(), [check for check in found.checks if check.outcome.value == "failed"]
    checks = named(found)
    for name in ("reload", "heldout_again", "swap_probe", "padding_probe", "batch_probe"):
        assert checks[name].outcome is Outcome.PASSED, name
    before = examined(world.reward, Stage.REWARD).metrics["accept/accuracy"]
    assert found.metrics["accept/earlier_accuracy"] == before
    assert found.metrics["accept/gain"] == pytest.approx(found.metrics["accept/accuracy"] - before)
    assert found.metrics["accept/gain_low"] <= found.metrics["accept/gain"] <= found.metrics["accept/gain_high"]


def test_a_reward_model_of_shuffled_labels_is_not(tmp_path: Path):
    found = examined(trained(tmp_path, learnt_by_chance).reward, Stage.REWARD)
    assert red(found) == set()  # it is what training made
    assert "accept/balanced_low" in bounds_missed(found)


def test_a_reward_model_of_length_alone_is_not_though_its_accuracy_is_high(tmp_path: Path):
    found = examined(trained(tmp_path, learnt_by_length).reward, Stage.REWARD)
    assert found.metrics["accept/accuracy_low"] > 0.5
    assert bounds_missed(found) == {"accept/balanced_low"}
    assert found.metrics["accept/over_length_low"] <= 0


def test_a_reward_model_of_length_alone_is_not_where_all_pairs_prefer_the_longer_answer(tmp_path: Path):
    """There, length tells every pair right, and nothing tells it from quality."""
    found = examined(trained(tmp_path, learnt_by_length, held=learnt_by_length).reward, Stage.REWARD)
    assert found.metrics["accept/accuracy_low"] > 0.9
    assert "accept/balanced_low" in found.unmeasured
    assert bounds_missed(found) == {"accept/balanced_low"}


def test_a_reward_model_that_no_held_out_pair_can_judge_is_not(tmp_path: Path):
    found = examined(trained(tmp_path, learnt_by_quality, held=None).reward, Stage.REWARD)
    assert bounds_missed(found) == {"accept/accuracy_low", "accept/balanced_low"}


def test_a_document_that_is_lost_from_a_published_file_is_found(tmp_path: Path):
    def lose(folder: Path) -> None:
        path = folder / "documents" / "train" / "part-00000.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            kept = list(lines)[:-1]
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(kept)

    checks = recorded_checks(read_evidence(tokens_of(tmp_path, learnt_by_quality, lose=lose)), {})
    found = {check.name: check for check in checks if check.outcome is Outcome.FAILED}
    assert set(found) == {"ledger_train_documents", "ledger_train_bytes"}
    assert found["ledger_train_documents"].found == "59 (train documents tokenized)"
    assert found["ledger_train_documents"].allowed == "60 (published by curate)"


@pytest.mark.parametrize("stage", [Stage.PRETRAIN, Stage.SFT, Stage.DPO, Stage.PPO])
def test_a_trained_language_model_passes(world: Trained, stage: Stage):
    found = examined(world.model(stage), stage)
    assert red(found) == set(), [check for check in found.checks if check.outcome.value == "failed"]
    assert named(found)["heldout_again"].outcome is Outcome.PASSED
    assert named(found)["reload"].outcome is Outcome.PASSED


def nudged(folder: Path, name: str = "model.layers.1.mlp.down_proj.weight") -> None:
    """Change one matrix a little, as a wrong export would."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name] = weights[name] * 0.5
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("stage", [Stage.PRETRAIN, Stage.SFT, Stage.DPO, Stage.REWARD, Stage.PPO])
def test_weights_other_than_those_that_were_trained_are_found(world: Trained, stage: Stage, tmp_path: Path):
    found = examined(republished(tmp_path, world.model(stage), nudged), stage)
    assert red(found) == {"heldout_again"}
    assert "as training measured it" in named(found)["heldout_again"].allowed


def test_a_byte_that_changed_in_the_store_is_found(world: Trained, tmp_path: Path):
    model = republished(tmp_path, world.reward, lambda folder: None)
    path = local_path(model.uri) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert red(examined(model, Stage.REWARD)) == {"files"}


def test_a_reference_that_changed_since_it_was_read_is_found(world: Trained, tmp_path: Path):
    reference = republished(tmp_path, world.start, lambda folder: None)
    inputs = {"tokens": world.tokens, "model": reference}
    model = built(world.home, Stage.DPO, CONFIGS[Stage.DPO], inputs)
    path = local_path(reference.uri) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert red(examined(model, Stage.DPO)) == {"files_model"}


def test_a_missing_chat_template_is_a_red_check_and_the_rest_is_measured(world: Trained, tmp_path: Path):
    found = examined(
        republished(tmp_path, world.reward, lambda folder: (folder / "chat_template.jinja").unlink()), Stage.REWARD
    )
    assert red(found) == {"same_ids"}
    assert named(found)["reload"].outcome is Outcome.PASSED
    assert "accept/accuracy_low" in found.metrics


def test_a_missing_tensor_is_a_red_check(world: Trained, tmp_path: Path):
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.down_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    found = examined(republished(tmp_path, world.reward, change), Stage.REWARD)
    assert red(found) == {"reload"}
    assert "lacks weights: model.layers.1.mlp.down_proj.weight" in named(found)["reload"].found
    assert found.unmeasured["accept/accuracy_low"] == "the model cannot be loaded"


def test_a_model_that_transformers_does_not_know_is_a_red_check(world: Trained, tmp_path: Path):
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "model_type": "unheard-of"}))

    found = examined(republished(tmp_path, world.start, change), Stage.SFT)
    assert "reload" in red(found)
    assert "plain transformers cannot load it" in named(found)["reload"].found


def test_a_full_disk_is_no_finding_about_the_model():
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        loaded(full)


def test_without_a_chat_template_that_takes_a_question_the_reload_asks_it_as_text(
    world: Trained, monkeypatch: pytest.MonkeyPatch
):
    def refuses(tokenizer: Any) -> list[np.ndarray]:
        raise ValueError("only tools speak here")

    monkeypatch.setattr(reload, "fixed_prompts", refuses)
    checks = named(examined(world.start, Stage.SFT))
    assert "only tools speak here" in checks["same_ids"].found
    assert checks["reload"].outcome is Outcome.PASSED


def test_another_chat_template_is_found(world: Trained, tmp_path: Path):
    def change(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("user", "human") + " ")

    found = examined(republished(tmp_path, world.reward, change), Stage.REWARD)
    assert red(found) == {"same_ids"}
    assert "in place" in named(found)["same_ids"].found


def test_a_score_that_plain_transformers_reads_elsewhere_is_found(world: Trained, tmp_path: Path):
    """As the last token that is no padding: which one that is says config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        tokenizer = reload.plain_tokenizer(folder)
        settings["pad_token_id"] = int(reload.fixed_prompts(tokenizer)[0][-1])
        path.write_text(json.dumps(settings))

    found = red(examined(republished(tmp_path, world.reward, change), Stage.REWARD))
    assert {"reload", "padding_probe"} <= found


def test_documents_that_see_each_other_in_a_row_are_found(world: Trained, monkeypatch: pytest.MonkeyPatch):
    def as_one(sequences: list[TokenSequence]) -> Any:
        ids = np.concatenate([sequence.ids for sequence in sequences])
        return lay_out([TokenSequence(ids, np.ones(len(ids), dtype=np.int64))])

    model = world.model(Stage.SFT)
    monkeypatch.setattr(reload, "lay_out", as_one)
    assert red(examined(model, Stage.SFT)) == {"reload"}


def test_scores_that_depend_on_their_place_in_a_pair_are_found(world: Trained, monkeypatch: pytest.MonkeyPatch):
    from stages.judge.gates import heldout

    honest = heldout.segment_scores

    def by_place(*arguments: Any, **options: Any) -> torch.Tensor:
        scores = honest(*arguments, **options)
        return scores + torch.tensor([10.0, 0.0]).repeat(len(scores) // 2)

    monkeypatch.setattr(heldout, "segment_scores", by_place)
    assert {"swap_probe", "batch_probe", "heldout_again"} <= red(examined(world.reward, Stage.REWARD))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_outputs_that_are_no_numbers_fail_in_any_prompt(place: int, value: str):
    plain, ours = ([torch.zeros(1, 2), torch.zeros(1, 2)] for _ in range(2))
    plain[place][0, 1] = float(value)
    assert reload.same_outputs("reload", plain, ours).outcome is Outcome.FAILED


def test_the_best_of_n_is_measured_where_there_is_a_gold_scorer(world: Trained):
    found = examined(world.reward, Stage.REWARD, gold=world.reward, max_response_length=6)
    rows = found.tables["best_of_n"]
    assert [row["n"] for row in rows] == [1, 2, 4, 8, 16]
    assert rows[1]["kl"] == pytest.approx(np.log(2) - 0.5, abs=1e-6)
    assert all(row["proxy"] == row["gold"] for row in rows)  # one model twice
    assert found.metrics["accept/best_of_n_gold_low"] > 0


def test_a_given_reward_model_is_asked_about_the_data_of_the_run(world: Trained, tmp_path: Path):
    """What it was made from may be gone, and its chat template may be its own."""

    def change(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("user", "human") + " ")

    given = republished(tmp_path, world.reward, change)
    path = local_path(given.uri) / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["inputs"]:
        entry["uri"] = f"{entry['uri']}-gone"
        entry["digest"] = "0" * 64
    path.write_text(json.dumps(manifest))
    asked = {"is_given": True, "inputs": {"tokens": world.tokens, "model": world.start}, "max_response_length": 6}
    found = examined(given, Stage.REWARD, gold=world.reward, **asked)
    assert red(found) == set(), [check for check in found.checks if check.outcome.value == "failed"]
    assert bounds_missed(found) == set()
    assert found.metrics["accept/pairs"] == 160
    assert found.metrics["accept/best_of_n_gold"] > 0
    checks = named(found)
    assert checks["heldout_again"].found.endswith("held out from its training is not known")
    assert "same_ids" not in checks
    assert {checks[name].outcome for name in ("files", "files_tokens", "reload", "swap_probe")} == {Outcome.PASSED}


def test_a_given_reward_model_that_reads_other_ids_is_refused(world: Trained, tmp_path: Path):
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        first, second = list(tokenizer["model"]["vocab"])[-2:]
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(tokenizer))

    given = republished(tmp_path, world.reward, change)
    found = examined(given, Stage.REWARD, is_given=True, inputs={"tokens": world.tokens})
    assert red(found) == {"same_ids"}
    assert "reward_model" in named(found)["same_ids"].found


def test_a_given_reward_model_of_length_alone_is_not_accepted(world: Trained, tmp_path: Path):
    theirs = trained(tmp_path, learnt_by_length)
    found = examined(theirs.reward, Stage.REWARD, is_given=True, inputs={"tokens": world.tokens, "model": world.start})
    assert "accept/balanced_low" in bounds_missed(found)


def test_a_gold_scorer_with_another_chat_template_is_not_asked_in_the_run_s(world: Trained, tmp_path: Path):
    def change(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("user", "human") + " ")

    gold = republished(tmp_path, world.reward, change)
    found = examined(world.reward, Stage.REWARD, gold=gold, max_response_length=6)
    assert red(found) == set(), [check for check in found.checks if check.outcome.value == "failed"]
    assert "chat template of its own" in found.unmeasured["accept/best_of_n_gold"]


def test_on_a_cpu_as_many_pairs_are_measured_as_it_can_take(world: Trained, monkeypatch: pytest.MonkeyPatch):
    tokens = TokensArtifact(local_path(world.tokens.uri))
    lengths = pair_lengths(tokens.pairs(Split.HELDOUT))
    weights = sum(weight.size for weight in load_numpy(local_path(world.reward.uri) / "model.safetensors").values())
    monkeypatch.setattr(computing, "_MOST_FLOPS", 2 * weights * lengths.mean() * 100.5)
    found = examined(world.reward, Stage.REWARD)
    assert found.metrics["accept/pairs"] == 100
    assert named(found)["all_pairs"].found.startswith("100 of 160 pairs are measured: ")
    monkeypatch.setattr(computing, "_MOST_FLOPS", 2 * weights * lengths.mean() * 20)
    found = examined(world.reward, Stage.REWARD, gold=world.reward, max_response_length=6)
    for metric in ("accept/accuracy_low", "accept/best_of_n_gold"):
        assert "on a CPU a gate spends" in found.unmeasured[metric]
    assert "on a CPU a gate spends" in named(found)["heldout_again"].found


@pytest.mark.parametrize("gate_has_it", [True, False])
@pytest.mark.parametrize("stage", [Stage.SFT, Stage.DPO, Stage.REWARD, Stage.PPO])
def test_a_model_that_was_trained_in_half_precision_passes(
    half: Trained, stage: Stage, gate_has_it: bool, monkeypatch: pytest.MonkeyPatch
):
    model = half.model(stage)
    assert read_manifest(model).execution["compute_dtype"] == "bfloat16"
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device_type: gate_has_it)
    found = examined(model, stage)
    assert red(found) == set(), [check for check in found.checks if check.outcome.value == "failed"]
    assert named(found)["heldout_again"].outcome is Outcome.PASSED


def test_the_command_leaves_its_findings_with_the_run_and_by_content(world: Trained):
    store = open_store(world.reward.uri.split("/artifacts/")[0])
    request = GateRequest(
        stage=Stage.REWARD, run=RunInfo(run_id="r", name="n"), store_uri=store.root_uri, artifact=world.reward
    )
    key = gate_key("r", Stage.REWARD, "config.json")
    write_json(store, key, request.model_dump(mode="json"))
    assert main([f"{store.root_uri}/{key}"]) == ExitCode.OK
    kept = Findings.model_validate(read_json(store, findings_key(request)))
    assert kept == Findings.model_validate(read_json(store, gate_key("r", Stage.REWARD, "result.json")))
    assert kept.checks
    assert kept.seconds > 0


def sft_request(world: Trained, name: str, **changed: Any) -> str:
    """Write what Airflow asks of SFT, and return where."""
    store = open_store(world.reward.uri.split("/artifacts/")[0])
    request = StageRequest(
        stage=Stage.SFT,
        run=RunInfo(run_id=name, name="n"),
        store_uri=store.root_uri,
        config=CONFIGS[Stage.SFT].model_copy(update={"seed": len(name)}).model_dump(mode="json"),
        inputs={"tokens": world.tokens, "model": world.start},
        **{"execution": ExecutionConfig(), "gate": GateQuestions(), **changed},
    )
    key = run_key(name, Stage.SFT, "config.json")
    write_json(store, key, request.model_dump(mode="json"))
    return f"{store.root_uri}/{key}"


def published(uri: str) -> tuple[Store, GateRequest]:
    """What the stage of a request has published, as its gate will ask about it."""
    request, store = load_request(uri)
    result = StageResult.model_validate(read_json(store, run_key(request.run.run_id, Stage.SFT, "result.json")))
    asked = asked_of(request.model_copy(update={"gate": GateQuestions()}), result.artifact)
    assert asked is not None
    return store, asked


def test_the_process_that_trained_a_model_examines_it_too(world: Trained):
    uri = sft_request(world, "early")
    assert run_a_stage([uri]) == ExitCode.OK
    store, asked = published(uri)
    kept = Findings.model_validate(read_json(store, findings_key(asked)))
    assert kept.checks == examine(asked).checks
    assert {"files", "files_tokens", "reload", "heldout_again"} <= set(named(kept))
    assert red(kept) == set()

    store.delete(findings_key(asked))
    assert run_a_stage([uri]) == ExitCode.OK, "a hit, which trains nothing"
    assert not store.exists(findings_key(asked))


def test_what_it_finds_wrong_is_left_to_the_gate_s_own_job(world: Trained, monkeypatch: pytest.MonkeyPatch):
    def finds(request: GateRequest) -> Findings:
        return Findings(checks=(failed("reload", "1", "0", ""),))

    def breaks(request: GateRequest) -> Findings:
        raise MemoryError("no room")

    for name, examining in {"red": finds, "broken": breaks}.items():
        monkeypatch.setattr("stages.gate.examine", examining)
        uri = sft_request(world, name)
        assert run_a_stage([uri]) == ExitCode.OK
        store, asked = published(uri)
        assert not store.exists(findings_key(asked))


def test_it_examines_only_what_it_is_asked_about(world: Trained, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stages.gate.examine", lambda request: pytest.fail("nobody asked"))
    assert run_a_stage([sft_request(world, "not_asked", gate=None)]) == ExitCode.OK


def test_a_wrong_call_says_how_to_call_it(capsys: pytest.CaptureFixture[str]):
    assert main([]) == ExitCode.CONFIG
    assert "usage: python -m stages.gate <config uri>" in capsys.readouterr().err
    assert main(["file:///nowhere/runs/r/gate_sft/config.json"]) == ExitCode.CONFIG
