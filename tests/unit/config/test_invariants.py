"""Each invariant over what is recorded goes red when one number of it is broken, and says both numbers."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from stages.config.gate_evidence import Evidence
from stages.config.gate_records import Check, Outcome
from stages.config.gates import GatesConfig
from stages.config.graph import GRAPH, Stage
from stages.config.invariants import bound_checks, earlier_checks, recorded_checks
from stages.config.request import ArtifactRef, FileEntry, InputEntry, Manifest
from tests.gate_world import CURATED, META, MODEL_FILES, SIZES, TOKENS, VOCABULARY, WIDTH, ledger_of


def file(path: str, sha256: str = "0", size: int = 1) -> FileEntry:
    return FileEntry(path=path, size=size, sha256=sha256)


def manifest(stage: Stage, **fields: Any) -> Manifest:
    return Manifest(
        **{
            "kind": GRAPH[stage].kind,
            "stage": stage,
            "version": GRAPH[stage].version,
            "fingerprint": f"f-{stage.value}",
            "digest": f"d-{stage.value}",
            "files": (),
            "inputs": (),
            "config": {},
            "execution": {"compute_dtype": "float32"},
            "created_at": "2026-11-29T15:00:00+00:00",
            **fields,
        }
    )


def edge(role: str, stage: Stage) -> InputEntry:
    kind = GRAPH[stage].kind
    return InputEntry(
        role=role, kind=kind, uri=f"file:///s/{kind}", fingerprint=f"f-{stage.value}", digest=f"d-{stage.value}"
    )


def tokens(**fields: Any) -> Manifest:
    files = tuple(file(f"tokenizer/{name}", sha256) for name, sha256 in MODEL_FILES.items())
    settings = {"sequence_length": 10}
    sizes = tuple(file(path.format(split), size=size) for path, size in SIZES.items() for split in ("train", "heldout"))
    known: dict[str, Any] = {
        "inputs": (edge("curated", Stage.CURATE),),
        "files": (*files, *sizes),
        "config": settings,
        "ledger": TOKENS,
        "metrics": {"tokens/vocab_size": VOCABULARY},
    }
    return manifest(Stage.TOKENIZE, **{**known, **fields})


def evidence(stage: Stage) -> Evidence:
    """Of an artifact that is as it should be."""
    match stage:
        case Stage.CURATE:
            return Evidence(manifest(stage, ledger=CURATED))
        case Stage.TOKENIZE:
            return Evidence(tokens(), {"curated": manifest(Stage.CURATE, ledger=CURATED)}, meta=META)
        case Stage.EVALUATE:
            roles = {"tokens": Stage.TOKENIZE, "sft": Stage.SFT, "reward": Stage.REWARD}
            report = {
                "models": {"sft": {"eval/loss": 2.0}},
                "data": {"digest": "d-tokenize"},
                "reward_fingerprint": "f-reward",
            }
            inputs = tuple(edge(role, source) for role, source in roles.items())
            return Evidence(manifest(stage, inputs=inputs), report=report)
    loss = math.log(VOCABULARY) if stage is Stage.PRETRAIN else math.log(2)
    inputs = (edge("tokens", Stage.TOKENIZE), *((edge("model", Stage.SFT),) if stage is not Stage.PRETRAIN else ()))
    made = manifest(
        stage,
        inputs=inputs,
        ledger=ledger_of(stage),
        config={"model": {"initializer_range": 0.02, "hidden_size": WIDTH}} if stage is Stage.PRETRAIN else {},
        files=tuple(file(name, sha256) for name, sha256 in MODEL_FILES.items()),
    )
    row = {"step": 1, "train/loss": loss, "ppo/approx_kl": 0.0, "ppo/clip_fraction": 0.0}
    before = {"model": manifest(Stage.SFT)} if stage is not Stage.PRETRAIN else {}
    return Evidence(made, {"tokens": tokens(), **before}, first_row=row)


def outcomes(found: Evidence, expected: dict[str, ArtifactRef] | None = None) -> dict[str, Check]:
    checks = recorded_checks(found, expected or {})
    by_name = {check.name: check for check in checks}
    assert len(by_name) == len(checks)  # names tell checks apart
    return by_name


def failures(found: Evidence, expected: dict[str, ArtifactRef] | None = None) -> dict[str, Check]:
    return {name: check for name, check in outcomes(found, expected).items() if check.outcome is Outcome.FAILED}


GATED = (Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN, Stage.SFT, Stage.REWARD, Stage.PPO, Stage.DPO, Stage.EVALUATE)


@pytest.mark.parametrize("stage", GATED)
def test_what_is_as_it_should_be_passes_every_check(stage: Stage):
    found = outcomes(evidence(stage))
    left = {name for name, check in found.items() if check.outcome is not Outcome.PASSED}
    assert left <= {"no_heldout_item_in_training"}
    assert len(found) > len(left)


def with_ledger(found: Evidence, change: Any) -> Evidence:
    ledger = json.loads(json.dumps(found.manifest.ledger))  # nothing in it is one object with anything else
    change(ledger)
    return replace(found, manifest=found.manifest.model_copy(update={"ledger": ledger}))


def test_a_document_that_curate_lost_between_two_steps_is_found():
    broken = with_ledger(evidence(Stage.CURATE), lambda it: it["documents"]["steps"][1]["in"].update(documents=11))
    (check,) = failures(broken).values()
    assert (check.name, check.found, check.allowed) == (
        "ledger_documents",
        "11 (into pii)",
        "12 (out of the step before)",
    )


def test_a_document_that_a_step_dropped_without_a_reason_is_found():
    broken = with_ledger(evidence(Stage.CURATE), lambda it: it["documents"]["steps"][0]["dropped"].clear())
    (check,) = failures(broken).values()
    assert (check.found, check.allowed) == ("12 (kept or dropped by read)", "14 (came in)")


def test_published_documents_without_those_taken_over_are_what_the_last_step_kept():
    broken = with_ledger(evidence(Stage.CURATE), lambda it: it["documents"]["published"]["heldout"].update(documents=4))
    assert failures(broken)["ledger_documents"].found.startswith("9 ")
    carried = with_ledger(
        evidence(Stage.CURATE),
        lambda it: (
            it["documents"]["published"]["heldout"].update(documents=8),
            it["carried"].update({"documents/heldout": {"documents": 3}}),
        ),
    )
    assert not failures(carried)


def test_a_document_lost_on_the_way_to_tokens_is_found_with_both_numbers():
    broken = with_ledger(evidence(Stage.TOKENIZE), lambda it: it["train"]["documents"].update(documents=4))
    found = failures(broken)
    assert found["ledger_train_documents"].in_words() == (
        "ledger_train_documents: 4 (train documents tokenized); allowed: 5 (published by curate). This is a defect, "
        "not a matter of settings: keep the artifact and report it."
    )
    # The files still hold all five, so the ledger is what is wrong.
    assert found["files_train_documents"].found.startswith("5 ")


def test_rows_and_tokens_of_pairs_conserve():
    broken = with_ledger(evidence(Stage.TOKENIZE), lambda it: it["heldout"]["preferences"].update(target_tokens=49))
    assert set(failures(broken)) == {"conserves_heldout_preferences_tokens"}
    broken = with_ledger(evidence(Stage.TOKENIZE), lambda it: it["train"]["conversations"].update(kept=7))
    assert set(failures(broken)) == {"conserves_train_conversations_rows", "files_train_conversations"}


def test_files_that_hold_less_than_the_ledger_says_are_found():
    found = evidence(Stage.TOKENIZE)
    files = tuple(
        entry.model_copy(update={"size": entry.size - 2}) if entry.path == "documents/train/tokens-00000.npy" else entry
        for entry in found.manifest.files
    )
    broken = replace(found, manifest=found.manifest.model_copy(update={"files": files}))
    assert failures(broken)["files_train_tokens"].found == "199 (in the files)"


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("part", ["documents", "conversations", "preferences"])
def test_files_of_a_whole_part_that_are_gone_are_found(split: str, part: str):
    found = evidence(Stage.TOKENIZE)
    files = tuple(entry for entry in found.manifest.files if not entry.path.startswith(f"{part}/{split}/"))
    for version in (found.manifest.version, 0):  # whatever version recorded that there was something
        lost = found.manifest.model_copy(update={"files": files, "version": version})
        check = failures(replace(found, manifest=lost))[f"files_{split}_{part}"]
        assert (check.found, check.allowed[0]) == ("0 (in the files)", "5" if part == "documents" else "8")


def test_a_ledger_without_a_split_is_found():
    broken = with_ledger(evidence(Stage.TOKENIZE), lambda it: it.update(train={}))
    found = failures(broken)
    assert found["ledger_train_documents"].found == "no number (train documents tokenized)"
    assert found["ledger_train_documents"].allowed == "5 (published by curate)"
    assert {"ledger_train_conversations", "ledger_train_preferences", "files_train_tokens"} <= set(found)
    assert "files" in failures(replace(evidence(Stage.TOKENIZE), meta=None))


@pytest.mark.parametrize("stage", [Stage.PRETRAIN, Stage.SFT, Stage.REWARD, Stage.GOLD, Stage.PPO, Stage.DPO])
def test_a_training_that_does_not_say_what_it_found_is_red(stage: Stage):
    bare = with_ledger(evidence(stage), lambda it: it.clear())
    (check,) = failures(bare).values()
    assert check.found == "no number (found by training)"
    found = evidence(stage)
    gone = found.inputs["tokens"].model_copy(update={"ledger": {}})
    assert failures(replace(found, inputs={**found.inputs, "tokens": gone}))[check.name].allowed.startswith("no number")


@pytest.mark.parametrize("stage", [Stage.SFT, Stage.REWARD, Stage.DPO])
@pytest.mark.parametrize(("name", "published"), [("tokens_available", 80), ("targets_available", 50)])
def test_tokens_of_examples_are_those_that_tokenize_accounted_for(stage: Stage, name: str, published: int):
    broken = with_ledger(evidence(stage), lambda it: it.update({name: published - 1}))
    check = failures(broken)[f"ledger_{name}"]
    assert (check.found, check.allowed) == (f"{published - 1} (found by training)", f"{published} (published)")
    earlier = with_ledger(evidence(stage), lambda it: it.pop(name))
    assert outcomes(earlier)[f"ledger_{name}"].outcome is Outcome.SKIPPED


@pytest.mark.parametrize(
    ("stage", "ledger", "there"),
    [
        (Stage.REWARD, {"pairs_of_the_reasons": 3, "pairs_of_other_reasons": 5}, "8 (pairs there are)"),
        (
            Stage.GOLD,
            {"pairs_of_the_reasons": 3, "pairs_of_other_reasons": 1, "pairs_of_the_other_half": 4},
            "8 (pairs there are)",
        ),
        (Stage.DPO, {"examples_of_the_reasons": 6, "examples_of_other_reasons": 10}, "16 (examples there are)"),
    ],
)
def test_what_reasons_leave_and_leave_out_is_all_there_is(stage: Stage, ledger: dict[str, int], there: str):
    found = with_ledger(evidence(stage), lambda it: it.update(ledger))
    assert outcomes(found)["ledger_reasons"].outcome is Outcome.PASSED
    for name in ledger:
        lost = with_ledger(found, lambda it, name=name: it.update({name: ledger[name] - 1}))
        assert failures(lost)["ledger_reasons"].allowed == there
    assert "ledger_reasons" not in outcomes(evidence(stage))


def test_the_rows_of_pretraining_are_all_its_tokens():
    broken = with_ledger(evidence(Stage.PRETRAIN), lambda it: it.update(rows_available=19))
    assert failures(broken)["ledger_rows_available"].allowed == "20 (whole rows of 10 in 200 tokens)"


@pytest.mark.parametrize(
    ("stage", "name", "published"),
    [
        (Stage.PRETRAIN, "tokens_available", 200),
        (Stage.SFT, "conversations", 8),
        (Stage.REWARD, "pairs", 8),
        (Stage.DPO, "pairs", 8),
        (Stage.PPO, "prompts", 7),
    ],
)
def test_what_training_found_is_what_tokenize_published(stage: Stage, name: str, published: int):
    broken = with_ledger(evidence(stage), lambda it: it.update({name: published - 1}))
    check = failures(broken)[f"ledger_{name}"]
    assert (check.found[0], check.allowed[0]) == (f"{published - 1:,}"[0], f"{published:,}"[0])


def test_trained_tokens_are_the_trained_rows():
    broken = with_ledger(evidence(Stage.PRETRAIN), lambda it: it.update(tokens_trained=61))
    assert failures(broken)["ledger_tokens_trained"].allowed == "60 (6 rows of 10)"


@pytest.mark.parametrize(
    ("name", "check"), [("chat_template.jinja", "chat_template"), ("tokenizer.json", "tokenizer_tokenizer.json")]
)
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_model_with_another_template_or_tokenizer_than_its_tokens_is_found(name: str, check: str, how: str):
    found = evidence(Stage.SFT)
    files = [entry for entry in found.manifest.files if entry.path != name]
    if how == "changed":
        files.append(file(name, "other"))
    broken = replace(found, manifest=found.manifest.model_copy(update={"files": tuple(files)}))
    assert set(failures(broken)) == {check}


def test_an_input_that_changed_after_it_was_read_is_found():
    found = evidence(Stage.DPO)
    changed = {**found.inputs, "model": manifest(Stage.SFT, digest="other")}
    assert set(failures(replace(found, inputs=changed))) == {"input_model"}


def test_an_input_that_is_gone_is_found():
    found = evidence(Stage.PPO)
    inputs = {role: one for role, one in found.inputs.items() if role != "model"}
    broken = replace(found, inputs=inputs, unreadable={"model": "file:///s/sft-model is gone"})
    assert failures(broken)["input_model"].found == "file:///s/sft-model is gone"


def test_a_model_trained_from_another_reference_than_the_runs_is_found():
    theirs = ArtifactRef(kind="sft-model", uri="u", fingerprint="f", digest="another")
    assert set(failures(evidence(Stage.DPO), {"model": theirs})) == {"input_model"}
    assert set(failures(evidence(Stage.DPO), {"gold": theirs})) == {"input_gold"}


def starting(stage: Stage, **row: Any) -> Evidence:
    found = evidence(stage)
    return replace(found, first_row={**(found.first_row or {}), **row})


def test_a_new_model_starts_at_ln_v_within_the_spread_of_its_init():
    spread = 0.02 * math.sqrt(WIDTH)
    center, tolerance = math.log(VOCABULARY) + spread**2 / 2, 0.02 + spread / 2
    for shift, is_red in ((0, False), (0.99 * tolerance, False), (1.01 * tolerance, True), (-1.01 * tolerance, True)):
        broken = starting(Stage.PRETRAIN, **{"train/loss": center + shift})
        assert ("initial_loss" in failures(broken)) is is_red
    # The z-loss is not part of what V decides.
    assert not failures(starting(Stage.PRETRAIN, **{"train/loss": center + 0.5, "train/z_loss": 0.5}))


@pytest.mark.parametrize("stage", [Stage.REWARD, Stage.DPO])
def test_pairs_start_at_ln_2(stage: Stage):
    check = failures(starting(stage, **{"train/loss": 0.70}))["initial_loss"]
    assert (check.found, check.allowed) == ("0.700000 in the first step", "ln 2 = 0.693147 ± 0.0001")
    assert not failures(starting(stage, **{"train/loss": 0.69315}))


def test_with_margins_a_reward_model_starts_where_equal_scores_put_it():
    asked = {"reward/even_loss": 0.91}
    assert not failures(starting(Stage.REWARD, **asked, **{"train/loss": 0.91}))
    check = failures(starting(Stage.REWARD, **asked, **{"train/loss": 0.693147}))["initial_loss"]
    assert check.allowed == "equal scores = 0.910000 ± 0.0001"


def test_the_members_of_an_ensemble_start_near_equal_scores():
    near, far = (starting(Stage.REWARD, **{"train/loss": loss}) for loss in (0.75, 0.95))
    assert failures(near)
    for found, is_red in ((near, False), (far, True)):
        config = {**found.manifest.config, "ensemble_size": 3}
        ensemble = replace(found, manifest=found.manifest.model_copy(update={"config": config}))
        assert ("initial_loss" in failures(ensemble)) is is_red


def losing(loss: dict[str, Any], **row: Any) -> Evidence:
    """DPO with another loss, as its manifest records it."""
    found = starting(Stage.DPO, **row)
    config = {**found.manifest.config, "loss": loss}
    return replace(found, manifest=found.manifest.model_copy(update={"config": config}))


@pytest.mark.parametrize(
    ("loss", "start", "tolerance"),
    [
        ({"kind": "sigmoid", "beta": 0.3}, math.log(2), 1e-4),
        ({"beta": 0.3}, math.log(2), 1e-4),  # of the time when there was one loss
        ({"kind": "robust", "label_smoothing": 0.2}, math.log(2), 1e-4),
        ({"kind": "hinge"}, 1.0, 1e-4),
        ({"kind": "ipo", "beta": 0.1}, 25.0, 25e-4),
        ({"kind": "nca"}, 2 * math.log(2), 1.3e-4),
        ({"kind": "exo", "label_smoothing": 0.1}, math.log(0.5 / 0.3), 1e-4),
    ],
    ids=lambda it: it.get("kind", "none") if isinstance(it, dict) else "",
)
def test_each_preference_loss_starts_at_its_own_value(loss: dict[str, Any], start: float, tolerance: float):
    for shift in (0.0, 0.9 * tolerance, -0.9 * tolerance):
        assert not failures(losing(loss, **{"train/loss": start + shift}))
    assert set(failures(losing(loss, **{"train/loss": start + 2.5 * tolerance}))) == {"initial_loss"}


def test_the_supervised_term_is_not_part_of_what_the_reference_decides():
    loss = {"kind": "apo_zero", "sft_coefficient": 0.5}
    assert not failures(losing(loss, **{"train/loss": 1.0 + 0.5 * 3.0, "dpo/sft_loss": 3.0}))
    check = failures(losing(loss, **{"train/loss": 1.0, "dpo/sft_loss": 3.0}))["initial_loss"]
    assert check.allowed == "apo_zero without margins = 1.000000, and 1.500000 of the supervised term ± 0.00025"


def test_kto_starts_at_half_the_mean_weight_of_its_first_examples():
    loss = {"kind": "kto", "desirable_weight": 2.0, "undesirable_weight": 1.0}
    at_start = 0.5 * (0.25 * 2.0 + 0.75 * 1.0)
    assert not failures(losing(loss, **{"train/loss": at_start, "dpo/desirable_share": 0.25}))
    assert set(failures(losing(loss, **{"train/loss": at_start, "dpo/desirable_share": 0.5}))) == {"initial_loss"}


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_a_loss_without_a_reference_may_start_anywhere(kind: str):
    check = outcomes(losing({"kind": kind}, **{"train/loss": 3.3}))["initial_loss"]
    assert check.outcome is Outcome.SKIPPED


@pytest.mark.parametrize(("metric", "value"), [("approx_kl", 2e-6), ("clip_fraction", 1e-9)])
def test_the_first_minibatch_of_ppo_has_ratio_1(metric: str, value: float):
    assert set(failures(starting(Stage.PPO, **{f"ppo/{metric}": value}))) == {f"initial_{metric}"}


def test_half_precision_is_allowed_its_rounding():
    found = starting(Stage.PPO, **{"ppo/approx_kl": 5e-4, "ppo/clip_fraction": 0.005})
    assert set(failures(found)) == {"initial_approx_kl", "initial_clip_fraction"}
    half = found.manifest.model_copy(update={"execution": {"compute_dtype": "bfloat16"}})
    assert not failures(replace(found, manifest=half))


@pytest.mark.parametrize("row", [None, {"step": 10, "train/loss": 0.5}])
def test_without_the_first_step_nothing_is_claimed(row: dict[str, Any] | None):
    found = outcomes(replace(evidence(Stage.DPO), first_row=row))
    assert found["initial_loss"].outcome is Outcome.SKIPPED


@pytest.mark.parametrize("stage", [Stage.PRETRAIN, Stage.REWARD, Stage.DPO, Stage.PPO])
def test_a_model_with_dropout_starts_anywhere_near_that(stage: Stage):
    off = starting(stage, **{"train/loss": 1.2, "ppo/approx_kl": 0.01, "ppo/clip_fraction": 0.2})
    assert failures(off)
    execution = {**off.manifest.execution, "dropout": 0.1}
    found = outcomes(replace(off, manifest=off.manifest.model_copy(update={"execution": execution})))
    told = {check.found for name, check in found.items() if name.startswith("initial_")}
    assert told == {"the model drops 0.1 of its values at random while it is trained"}
    assert not [check for check in found.values() if check.outcome is Outcome.FAILED]


def test_a_model_that_goes_on_from_a_given_one_knows_something_already():
    found = starting(Stage.PRETRAIN, **{"train/loss": 2.0})
    given = (*found.manifest.inputs, edge("base_model", Stage.SFT))
    continued = replace(found, manifest=found.manifest.model_copy(update={"inputs": given}))
    assert outcomes(continued)["initial_loss"].outcome is Outcome.SKIPPED


def test_an_evaluation_that_left_a_model_out_or_measured_on_other_data_is_found():
    found = evidence(Stage.EVALUATE)
    assert found.report is not None
    for change, name in (
        ({"models": {"sft": {}}}, "models"),
        ({"models": None}, "models"),
        ({"data": {"digest": "other"}}, "heldout_data"),
        ({"reward_fingerprint": None}, "scorer"),
    ):
        assert set(failures(replace(found, report={**found.report, **change}))) == {name}


@pytest.mark.parametrize("stage", GATED)
def test_what_earlier_versions_did_not_record_is_said_and_not_passed(stage: Stage):
    found = evidence(stage)
    older = found.manifest.model_copy(update={"ledger": {}, "version": 0})
    bare = replace(found, manifest=older, first_row=None, meta=None)
    assert not failures(bare)
    named = {name for name, check in outcomes(bare).items() if check.outcome is Outcome.SKIPPED}
    assert named or stage in (Stage.EVALUATE, Stage.SFT)


def test_bounds_are_compared_and_what_is_missing_fails_with_the_nearest_name():
    bounds = ["sft: eval/loss <= 2", "sft: eval/los <= 2", "sft: eval/perplexity < 9", "sft: accept/ece < 1"]
    known = {"eval/loss": 2.5, "eval/perplexity": 8.0}
    found = {check.name: check for check in bound_checks(bounds, known, {"accept/ece": "there are no pairs"})}
    assert {name: check.outcome.value for name, check in found.items()} == {
        "eval/loss": "failed",
        "eval/los": "failed",
        "eval/perplexity": "passed",
        "accept/ece": "failed",
    }
    assert found["accept/ece"].found == "not measured: there are no pairs"
    without = bound_checks(["sft: accept/ece < 1"], {}, {}, no_job="gates.recompute is off")
    assert [check.outcome.value for check in without] == ["skipped"]
    assert (found["eval/loss"].found, found["eval/loss"].allowed) == ("2.5", "<= 2")
    assert "Did you mean 'eval/loss'?" in found["eval/los"].advice


ACCEPTED = ["reward: accept/accuracy_low > 0.5", "reward: accept/balanced_low > 0.5"]
FEW = {"accept/balanced_low": "the chosen answer is longer in 40 held-out pairs and shorter in 2"}


def missed(metrics: dict[str, float], unmeasured: dict[str, str], bounds: list[str] = ACCEPTED) -> dict[str, Check]:
    checks = bound_checks(bounds, metrics, unmeasured)
    return {check.name: check for check in checks if check.outcome is Outcome.FAILED}


def test_a_reward_model_that_nothing_was_measured_of_is_not_accepted():
    why = "there are no held-out preference pairs"
    nothing = {"accept/accuracy_low": why, "accept/balanced_low": why}
    found = missed({}, nothing)
    assert set(found) == set(nothing)
    assert "override_gates=reward and a reason" in found["accept/accuracy_low"].advice
    assert "more held-out preference pairs" in found["accept/accuracy_low"].advice


def test_where_one_side_has_few_pairs_a_reward_model_must_be_better_than_the_best_rule_of_length():
    high = {"accept/accuracy_low": 0.9}
    assert not missed({**high, "accept/over_length_low": 0.01}, FEW)
    found = missed({**high, "accept/over_length_low": 0.0}, FEW)["accept/balanced_low"]
    assert found.found == f"accept/over_length_low is 0; not measured: {FEW['accept/balanced_low']}"
    assert found.allowed == "accept/over_length_low > 0 in its place"
    assert missed(high, FEW)
    # A bound above chance asks for more than that.
    assert missed({**high, "accept/over_length_low": 0.01}, FEW, ["reward: accept/balanced_low > 0.6"])


@pytest.mark.parametrize(
    ("guards", "more", "said"),
    [
        ({"stopped": "", "events": []}, {}, "neither warned nor stopped the training"),
        ({"stopped": "", "events": [{"guard": "kl"}, {"guard": "kl"}]}, {}, "did not stop the training; warned: kl"),
        (
            {"stopped": "kl: above", "events": [{"guard": "kl"}]},
            {"steps": 9, "model_step": 4},
            "stopped training after step 9; the model is that of step 4: kl: above",
        ),
        (
            {"stopped": "kl: above"},
            {"steps": 9},
            "stopped training after step 9; the model is that of step 9: kl: above",
        ),
    ],
)
def test_a_guard_that_stopped_a_training_is_told_and_makes_no_gate_red(guards: Any, more: Any, said: str) -> None:
    good = evidence(Stage.PPO)
    ledger = {**good.manifest.ledger, "guards": guards, **more}
    found = replace(good, manifest=good.manifest.model_copy(update={"ledger": ledger}))
    check = outcomes(found)["guards"]
    assert (check.outcome, check.found) == (Outcome.PASSED, said)
    assert not failures(found)
    assert "guards" not in outcomes(good), "a training without guards has nothing to tell"


@pytest.mark.parametrize(
    ("gain", "high", "margin", "is_red"),
    [
        (0.04, 0.09, 0.02, False),
        (-0.01, -0.005, 0.02, False),  # surely worse, by less than the margin
        (-0.08, 0.01, 0.02, False),  # much worse on few pairs: it may be chance
        (-0.08, -0.01, 0.02, True),
        (-0.08, -0.01, 0.1, False),
    ],
)
def test_a_reward_model_that_lost_clearly_more_than_the_margin_is_red(
    gain: float, high: float, margin: float, is_red: bool
):
    metrics = {
        "accept/earlier_accuracy": 0.8,
        "accept/gain": gain,
        "accept/gain_low": 2 * gain - high,
        "accept/gain_high": high,
    }
    (check,) = earlier_checks(metrics, GatesConfig(earlier_margin=margin))
    assert (check.outcome is Outcome.FAILED) is is_red
    assert f"accuracy {gain:+.4f} [" in check.found
    assert earlier_checks({"accept/accuracy": 0.7}, GatesConfig()) == []
