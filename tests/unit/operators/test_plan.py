"""The plan says what the run then does."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from operators.failures import RunIncomplete
from operators.plan import Plan, StagePlan, Verdict, make_plan
from operators.plan_page import as_markdown, as_table
from operators.plan_task import devices_from_environment, plan_run
from operators.prepare import build_request, find_hit, input_stages, selection
from operators.run import finish_run, start_run
from stages.artifacts.addresses import artifact_uri, open_store
from stages.artifacts.folder import FileStore
from stages.artifacts.manifests import DOUBT, MANIFEST, content_digest, fingerprint, publish, upload_files
from stages.artifacts.store import Store, write_json
from stages.config.errors import Category
from stages.config.estimate import Estimate
from stages.config.graph import GRAPH, Stage
from stages.config.markdown import plain
from stages.config.pipeline import PipelineConfig, stage_config_from_json
from stages.config.request import ArtifactRef, Cost, InputEntry, Manifest, RunInfo, digests_of, run_folder
from stages.config.resolve import resolve
from tests.ray_stand_in import Job, StandInRay
from tests.unit.operators.test_run import Task

RUN = RunInfo(run_id="r", name="n")
CONFIG = resolve({"recipe": "tiny", "alignment": "dpo", "train_reward": True})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def build(store: Store, config: PipelineConfig, tmp_path: Path, *, until: Stage = Stage.REPORT, source: str = "5eed"):
    """Publish what a run would, stage by stage, as its jobs do; return which stages were hits."""
    refs: dict[Stage, ArtifactRef] = {}
    hits: set[Stage] = set()
    folder = tmp_path / "content"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"0" * 4000)
    for stage in Stage:
        if stage not in selection(config):
            continue
        upstream = {needed: refs[needed] for needed in input_stages(stage, config).values()}
        request = build_request(stage, run=RUN, store=store, config=config, upstream=upstream)
        sources = tuple(given.identified(source) for given in request.sources)
        stage_config = stage_config_from_json(stage, request.config)
        identity = fingerprint(
            stage, stage_config, inputs=request.inputs, sources=digests_of(sources), store_uri=store.root_uri
        )
        kind = GRAPH[stage].kind
        if store.exists(f"artifacts/{kind}/{identity}/manifest.json"):
            hits.add(stage)
        files = upload_files(store, folder, kind=kind, fingerprint=identity)
        manifest = Manifest(
            kind=kind,
            stage=stage,
            version=GRAPH[stage].version,
            fingerprint=identity,
            digest=content_digest(files),
            files=files,
            inputs=tuple(
                InputEntry(role=role, kind=ref.kind, uri=ref.uri, fingerprint=ref.fingerprint, digest=ref.digest)
                for role, ref in request.inputs.items()
            ),
            sources=sources,
            config=request.config,
            execution={**request.execution.model_dump(mode="json"), "git_commit": "c0ffee"},
            ledger={"train": {"conversations": {"kept": 30, "tokens": 900}, "preferences": {"kept": 20}}},
            metrics={"tokens/vocab_size": 512.0},
            cost=Cost(wall_seconds=90.0, cpu_seconds=80.0, peak_memory_bytes=2**30),
            created_at="2026-11-23T09:00:00+00:00",
        )
        publish(store, manifest)
        refs[stage] = manifest.ref(artifact_uri(store, kind, identity))
        if not request.sources:
            assert find_hit(store, request) is not None
        if stage is until:
            break
    return hits


def verdicts(store: Store, config: PipelineConfig = CONFIG) -> dict[Stage, Verdict]:
    return {stage.stage: stage.verdict for stage in make_plan(config, run=RUN, store=store).stages}


def test_in_an_empty_store_everything_runs_and_nothing_was_ever_built(store: Store):
    plan = make_plan(CONFIG, run=RUN, store=store)
    assert [stage.stage for stage in plan.stages] == [stage for stage in Stage if stage in selection(CONFIG)]
    assert {(stage.verdict, stage.why) for stage in plan.stages} == {(Verdict.RUN, "never built in this store")}


def test_after_a_run_the_same_run_hits_if_the_outside_data_is_unchanged(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    assert set(verdicts(store).values()) == {Verdict.HIT_IF_UNCHANGED}
    assert build(store, CONFIG, tmp_path) == selection(CONFIG)  # and that is what happens
    why = make_plan(CONFIG, run=RUN, store=store).of(Stage.SFT).why
    assert why == "built 2026-11-23T09:00, if `installed-docs` is as it was 2026-11-23T09:00 (its job will see)"


@pytest.mark.parametrize(
    ("overrides", "first_to_run", "why"),
    [
        ({"sft.num_epochs": 2}, Stage.SFT, "num_epochs: 0.5 -> 2.0"),
        ({"curate.profile": "web"}, Stage.CURATE, "profile: docs -> web"),
        ({"dpo.beta": 0.5, "execution.dpo.micro_batch_size": 1}, Stage.DPO, "beta: 0.1 -> 0.5"),
        ({"evaluate.max_prompts": 9}, Stage.EVALUATE, "max_prompts: 8 -> 9"),
    ],
)
def test_a_change_runs_its_stage_and_what_depends_on_it_as_the_run_then_does(
    store: Store, tmp_path: Path, overrides: dict[str, Any], first_to_run: Stage, why: str
):
    build(store, CONFIG, tmp_path)
    config = resolve({"recipe": "tiny", "alignment": "dpo", "train_reward": True, "overrides": overrides})
    plan = make_plan(config, run=RUN, store=store)
    planned = {stage.stage for stage in plan.stages if stage.verdict is Verdict.HIT_IF_UNCHANGED}
    assert {stage.verdict for stage in plan.stages} <= {Verdict.HIT_IF_UNCHANGED, Verdict.RUN}
    assert why in plan.of(first_to_run).why
    assert planned == build(store, config, tmp_path)
    assert first_to_run not in planned


def test_what_depends_on_a_new_stage_says_so(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    config = resolve({"recipe": "tiny", "alignment": "dpo", "train_reward": True, "overrides": {"sft.num_epochs": 2}})
    why = make_plan(config, run=RUN, store=store).of(Stage.DPO).why
    assert why.startswith("unlike ")
    assert "input model: " in why
    elsewhere = resolve(
        {"recipe": "tiny", "alignment": "dpo", "train_reward": True, "overrides": {"curate.profile": "web"}}
    )
    plan = make_plan(elsewhere, run=RUN, store=store)
    for stage in (Stage.TOKENIZE, Stage.SFT, Stage.REPORT):
        assert plan.of(stage).why.count("-> built anew") == min(3, len(GRAPH[stage].inputs))


def test_resources_change_nothing(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    config = resolve(
        {"recipe": "tiny", "alignment": "dpo", "train_reward": True, "overrides": {"execution.sft.micro_batch_size": 1}}
    )
    assert verdicts(store, config) == verdicts(store)


def test_a_run_that_stopped_half_way_goes_on_from_there(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path, until=Stage.SFT)
    runs = {stage for stage, verdict in verdicts(store).items() if verdict is Verdict.RUN}
    assert runs == {Stage.REWARD, Stage.DPO, Stage.EVALUATE, Stage.PROMOTE, Stage.REPORT}
    assert runs == selection(CONFIG) - build(store, CONFIG, tmp_path)


def test_a_damaged_artifact_runs_again_and_the_plan_leaves_it_where_it_is(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    (key,) = (key for key in store.list("artifacts/sft-model") if key.endswith("model.safetensors"))
    store.write_bytes(key, b"short")
    plan = make_plan(CONFIG, run=RUN, store=store).of(Stage.SFT)
    assert plan.verdict is Verdict.RUN
    assert "damaged: " in plan.why
    assert "has 5 bytes" in plan.why
    assert store.exists(key.replace("model.safetensors", "manifest.json"))


def test_what_was_made_from_a_damaged_artifact_is_a_hit_only_if_the_same_is_made_again(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    (key,) = (key for key in store.list("artifacts/sft-model") if key.endswith(MANIFEST))
    store.write_bytes(key, b"{")
    plan = make_plan(CONFIG, run=RUN, store=store)
    assert plan.of(Stage.SFT).verdict is Verdict.RUN
    assert "damaged: " in plan.of(Stage.SFT).why
    assert plan.of(Stage.DPO).verdict is Verdict.HIT_IF_UNCHANGED
    assert "sft makes the same again" in plan.of(Stage.DPO).why


def test_what_was_made_from_other_content_runs_and_says_so(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    (key,) = (key for key in store.list("artifacts/sft-model") if key.endswith(MANIFEST))
    rebuilt = json.loads(store.read_bytes(key)) | {"digest": "e" * 64}  # as a GPU may build it after damage
    store.write_bytes(key, json.dumps(rebuilt).encode())
    plan = make_plan(CONFIG, run=RUN, store=store)
    assert plan.of(Stage.SFT).verdict is Verdict.HIT_IF_UNCHANGED
    for stage in (Stage.REWARD, Stage.DPO):
        assert plan.of(stage).verdict is Verdict.RUN
        assert "content of model: " in plan.of(stage).why
        assert "-> eeeeeeeeeeee" in plan.of(stage).why


def test_an_artifact_that_a_reader_found_damaged_is_looked_at_by_its_job(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    (key,) = (key for key in store.list("artifacts/sft-model") if key.endswith(MANIFEST))
    write_json(store, key.replace(MANIFEST, DOUBT), {"damaged": "model.safetensors"})
    plan = make_plan(CONFIG, run=RUN, store=store).of(Stage.SFT)
    assert plan.verdict is Verdict.RUN
    assert "damaged: a reader found" in plan.why


def test_earlier_builds_give_pace_and_data_of_what_runs(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path)
    config = resolve({"recipe": "tiny", "alignment": "dpo", "train_reward": True, "overrides": {"sft.num_epochs": 1}})
    took = make_plan(config, run=RUN, store=store).of(Stage.SFT).estimate
    assert took is not None
    assert took.tokens == 900
    # 1000 stored weights stand for the earlier model: 90 s for half an epoch of 1/34.976 the size
    assert took.seconds == pytest.approx(90 * 2 * 34.976)
    assert "data as counted in tokens" in took.basis[1]


def test_a_manifest_that_cannot_be_read_is_named_and_passed_over(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    build(store, CONFIG, tmp_path)
    store.write_bytes("artifacts/curated/bad/manifest.json", b"{}")
    assert set(verdicts(store).values()) == {Verdict.HIT_IF_UNCHANGED}
    assert "artifacts/curated/bad/manifest.json is not a valid manifest" in caplog.text


def test_the_page_and_the_log_hold_every_stage_its_reason_and_the_total(store: Store, tmp_path: Path):
    build(store, CONFIG, tmp_path, until=Stage.SFT)
    plan = make_plan(CONFIG, run=RUN, store=store)
    log, page = "\n".join(as_table(plan)), as_markdown(plan)
    for text, spelled in ((log, str), (page, plain)):
        assert all(spelled(stage.stage) in text and spelled(stage.why) in text for stage in plan.stages)
        assert "5 of 9 stages run: " in text
        assert "cost" not in text
    assert "| stage | plan | parameters |" in page


def test_what_may_be_among_too_many_builds_is_unknown_and_so_is_what_depends_on_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build(store, CONFIG, tmp_path)
    monkeypatch.setattr("stages.artifacts.explain.MAX_BUILDS", 0)
    plan = make_plan(CONFIG, run=RUN, store=store)
    assert {stage.verdict for stage in plan.stages} == {Verdict.UNKNOWN}
    assert plan.of(Stage.CURATE).why == "`installed-docs` is identified by the job, where it lies"
    assert plan.of(Stage.SFT).why == "depends on pretrain, tokenize, which is unknown"


class Unreadable(FileStore):
    def list(self, prefix: str):
        raise OSError("the store is away")


def plan_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **params: Any) -> tuple[bool, RunInfo]:
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    run = start_run({"ti": Task(), "params": {"recipe": "tiny", **params}})
    return plan_run({"ti": Task(run=run)}), RunInfo.model_validate(run)


def test_the_task_lets_a_run_go_on_and_ends_a_dry_run_after_storing_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert plan_task(tmp_path, monkeypatch)[0] is True
    goes_on, run = plan_task(tmp_path, monkeypatch, dry_run=True)
    assert goes_on is False
    stored = json.loads((tmp_path / "runs" / run.run_id / "plan.json").read_text())
    assert stored["dry_run"] is True
    assert "this is a dry run" in (tmp_path / "runs" / run.run_id / "plan.md").read_text()
    states = dict.fromkeys(Stage, "skipped")
    finish_run({"ti": Task({**states, "plan": "success"}, run.model_dump())})  # green
    with pytest.raises(RunIncomplete, match=r"plan failed\."):
        finish_run({"ti": Task({**states, "plan": "failed"}, run.model_dump())})


def test_the_plan_names_the_runs_whose_jobs_hold_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ray: StandInRay
):
    caplog.set_level("INFO")
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    plan_task(tmp_path, monkeypatch)
    assert "Other runs" not in caplog.text
    names = {"airflow.dag_id": "llm_pipeline", "airflow.run_id": "manual__before", "airflow.task_id": "pretrain"}
    ray.jobs["b"] = Job("b", "true", body={"metadata": names})
    report = {"done": 120, "total": 500, "unit": "step", "eta_seconds": 200, "at": time.time()}
    key = f"runs/{run_folder('llm_pipeline', 'manual__before')}/pretrain/progress.json"
    FileStore(tmp_path).write_bytes(key, json.dumps(report).encode())
    plan_task(tmp_path, monkeypatch)
    said = caplog.text
    assert "Unless the pool `gpu` has another free slot, curate waits at `queued` until they end" in said
    assert "pretrain of llm_pipeline, run manual__before: 120/500 steps (24 %), 3 min 20 s left" in said
    assert "/dags/llm_pipeline/runs/manual__before" in said
    caplog.clear()
    plan_task(tmp_path, monkeypatch, dry_run=True)
    assert "Other runs" not in caplog.text
    ray.down = True
    assert plan_task(tmp_path, monkeypatch)[0] is True
    assert "Whether other runs hold the cluster is unknown" in caplog.text


def test_a_plan_that_cannot_be_made_stops_a_dry_run_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("stages.artifacts.folder.FileStore.list", Unreadable.list)
    assert plan_task(tmp_path, monkeypatch)[0] is True
    assert "No plan, the run goes on without: OSError: the store is away" in caplog.text
    with pytest.raises(RunIncomplete, match="could not be made: OSError: the store is away"):
        plan_task(tmp_path, monkeypatch, dry_run=True)
    assert RunIncomplete.category is Category.INFRASTRUCTURE


def test_speed_and_prices_come_from_the_environment_and_a_wrong_one_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("ATHANOR_GPU_TFLOPS", "400")
    monkeypatch.setenv("ATHANOR_GPU_HOUR_PRICE", "2.5")
    monkeypatch.setenv("ATHANOR_CPU_HOUR_PRICE", "cheap")
    devices = devices_from_environment()
    assert (devices.gpu_flops, devices.gpu_hour_price, devices.cpu_hour_price) == (400e12, 2.5, None)
    assert "ATHANOR_CPU_HOUR_PRICE='cheap' is not a usable number" in caplog.text


def test_what_a_reason_quotes_is_no_mark_up_on_the_page():
    """MLflow loads the images of a description, and whoever triggers a run chooses addresses of sources."""
    why = "unlike 0123: documents: a -> ['s3://b/![x](http://evil.example/leak)<img src=//evil.example>']"
    took = Estimate(basis=("as in [x](javascript:alert(1))",))
    page = as_markdown(
        Plan(
            recipe="tiny",
            dry_run=True,
            stages=(StagePlan(stage=Stage.CURATE, verdict=Verdict.RUN, why=why, estimate=took),),
        )
    )
    assert not re.search(r"(?<!\\)\]\(|<img", page)
    assert f"- {plain(f'curate: run, {why} (as in [x](javascript:alert(1)))')}\n" in page


def test_the_plan_says_which_gates_may_fail_and_why(store: Store):
    config = resolve({"recipe": "tiny", "override_gates": ["reward", "ppo"], "override_reason": "few pairs"})
    assert "gates that may fail: reward, ppo, because few pairs" in make_plan(config, run=RUN, store=store).remarks


def test_the_plan_says_that_a_person_is_waited_for(store: Store):
    made = {"base_model": "/models/x", "synthesis": "distillation", "synthesis_sources": ["/s.jsonl"]}
    config = resolve(
        {"recipe": "tiny", **made, "instructions": ["/i"], "preferences": ["/p"], "review_made_data": True}
    )
    told = "review: waits up to 168 hours for a person to read what synthesize made (review_made_data)"
    assert told in make_plan(config, run=RUN, store=store).remarks


def test_the_plan_says_what_a_run_is_given_and_what_it_does_without(store: Store):
    given = {"base_model": "/models/policy", "reward_model": "/models/reward", "first_stage": "ppo", "alignment": "ppo"}
    config = resolve({"recipe": "tiny", **given, "instructions": ["/chats"], "last_stage": "evaluate"})
    remarks = make_plan(config, run=RUN, store=store).remarks
    assert remarks == (
        "base_model: `/models/policy` is given, read by tokenize, ppo, evaluate",
        "reward_model: `/models/reward` is given, read by ppo, evaluate",
        "pretrain: skipped, base_model is given in its place",
        "sft: skipped, the run starts with ppo (first_stage): base_model is given in its place",
        "reward: skipped, reward_model is given in its place",
        "gold: skipped, no gold scorer is asked for (gold_scorer)",
        "dpo: skipped, alignment=ppo",
        "promote, report: skipped, the run ends with evaluate (last_stage)",
        "documents: none are read, no stage of this run needs them",
        "preferences: none are read, no stage of this run needs them",
    )
    plan = make_plan(config, run=RUN, store=store)
    assert set(remarks) <= set(as_table(plan))
    assert all(plain(line) in as_markdown(plan) for line in remarks)
    whole = make_plan(resolve({"recipe": "tiny"}), run=RUN, store=store)
    assert whole.remarks == ("gold: skipped, no gold scorer is asked for (gold_scorer)",)
    ppo = plan.of(Stage.PPO).estimate
    assert ppo is not None
    assert "takes reward_model to be as large as the policy" in ppo.basis
