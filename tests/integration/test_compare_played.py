"""A comparison of DPO and PPO, played stage by stage as its Ray jobs run it: everything but Airflow, Ray and MLflow."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from operators.compare import (
    AlignedEvaluationOperator,
    AlignOperator,
    comparison_request,
    expanded_tasks,
    store_comparison,
    with_given,
)
from operators.prepare import build_request, pipeline_key
from stages.__main__ import verb_of
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest
from stages.artifacts.store import Store
from stages.config.compare import CompareParams
from stages.config.compare_results import Comparison
from stages.config.expansion import expand
from stages.config.graph import GRAPH, Stage, pipeline_stages
from stages.config.memory import recorded_memory
from stages.config.request import ArtifactRef, RunInfo, sha256_of
from stages.job.runner import execute
from tests.raw_text import WORDS, prose

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

RUN = RunInfo(run_id="compared", name="comparison")
SETTINGS: dict[str, Any] = {
    "tokenize.vocab_size": 320,
    "curate.planted": 0,
    "curate.toxicity": "none",
    "curate.heldout_fraction": 0.2,
}


class Task:
    """A task instance of Airflow, as far as the operators of the comparison ask it."""

    def __init__(self, returned: dict[str, Any], *, map_index: int) -> None:
        self._returned, self.map_index, self.task_id, self.try_number = returned, map_index, "align", 1

    def xcom_pull(self, *, task_ids: str, map_indexes: int | None = None) -> Any:
        value = self._returned.get(task_ids)
        return value.get(map_indexes) if map_indexes is not None and value else value


@dataclass
class Compared:
    store: Store
    home: Path
    shared: dict[Stage, ArtifactRef]
    models: dict[int, ArtifactRef]
    evaluations: dict[int, ArtifactRef]
    page: str
    found: Comparison


def played(store: Store, home: Path, params: CompareParams) -> Compared:
    """What the tasks of `compare_alignment` do, in their order."""
    expanded = expand(params)
    shared, *configs = with_given([expanded.shared, *expanded.configs], params.overrides)
    stored = shared.model_dump_json(indent=1).encode()
    store.write_bytes(pipeline_key(RUN.run_id), stored)
    run = RUN.model_copy(update={"records": {"pipeline.json": sha256_of(stored)}})
    run = store_comparison(store, run, params, expanded.combinations, configs)
    done: dict[Stage, ArtifactRef] = {}
    for stage in pipeline_stages():
        if stage in shared.selected and not (GRAPH[stage].aligned or GRAPH[stage].closing):
            request = build_request(stage, run=run, store=store, config=shared, upstream=done)
            done[stage] = execute(request, store, verb_of).artifact
    returned: dict[str, Any] = {stage.value: ref.model_dump(mode="json") for stage, ref in done.items()}
    models, evaluations = {}, {}
    for number, combination in enumerate(expanded_tasks(store, run)):
        for made, operator in (
            (models, AlignOperator(combination=combination, task_id="align")),
            (evaluations, AlignedEvaluationOperator(combination=combination, task_id="evaluate")),
        ):
            own, ti = operator._run({}), Task({**returned, "align": models}, map_index=number)
            upstream = {source: operator._made_by(ti, source) for source in made_of(operator, own, store)}
            request = build_request(
                Stage(operator.stage),
                run=operator._run_of_instance(ti, own),
                store=store,
                config=loaded(store, own),
                upstream=upstream,
            )
            made[number] = execute(request, store, verb_of).artifact.model_dump(mode="json")
    request = comparison_request(store, run, models=models, evaluations=evaluations)
    folder = fetch(execute(request, store, verb_of).artifact, home / "cache")
    refs = [{n: ArtifactRef.model_validate(ref) for n, ref in made.items()} for made in (models, evaluations)]
    found = Comparison.model_validate_json((folder / "comparison.json").read_text())
    return Compared(store, home, done, refs[0], refs[1], (folder / "comparison.html").read_text(), found)


def loaded(store: Store, run: RunInfo) -> Any:
    from operators.prepare import load_config

    return load_config(store, run)


def made_of(operator: Any, run: RunInfo, store: Store) -> set[Stage]:
    from operators.prepare import input_stages

    return set(input_stages(Stage(operator.stage), loaded(store, run)).values())


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compared]:
    home = tmp_path_factory.mktemp("compared")
    questions = [(f"Where is the {a} of the {b}?", f"By the {b}.") for a in WORDS for b in WORDS]
    data = {
        "documents": [{"text": prose(seed)} for seed in range(60)],
        "instructions": [{"instruction": asked, "response": answer} for asked, answer in questions],
        "preferences": [{"prompt": asked, "chosen": answer, "rejected": "No."} for asked, answer in questions[:60]],
    }
    files = {}
    for name, rows in data.items():
        path = home / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"curate.{name}"] = [str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("ATHANOR_SCRATCH", str(home / "scratch"))
        params = CompareParams(recipe="tiny", betas=[0.2], overrides={**SETTINGS, **files})
        yield played(open_store((home / "store").as_uri()), home, params)


def test_what_is_shared_is_built_once_and_every_combination_starts_from_it(compared: Compared) -> None:
    start = compared.shared[Stage.SFT].fingerprint
    manifests = [read_manifest(ref) for ref in compared.models.values()]
    assert [manifest.stage for manifest in manifests] == [Stage.DPO, Stage.PPO]
    for manifest in manifests:
        assert {entry.fingerprint for entry in manifest.inputs if entry.role == "model"} == {start}
    assert manifests[0].config["loss"]["beta"] == manifests[1].config["kl_coefficient"] == 0.2
    assert {key.split("/")[2] for key in compared.store.list("artifacts/sft-model")} == {start}
    assert read_manifest(compared.shared[Stage.REWARD]).config["half"] == "first"
    assert read_manifest(compared.shared[Stage.GOLD]).config["half"] == "second"


def test_every_model_has_quality_distance_memory_and_cost(compared: Compared) -> None:
    assert [model.failure for model in compared.found.models] == ["", ""]
    assert compared.found.start == "sft"
    for model in compared.found.models:
        assert model.gold is not None
        assert model.gold_gain is not None
        assert model.gold_gain.low <= model.gold_gain.value <= model.gold_gain.high
        assert model.gold_win_rate is not None
        assert 0 <= model.gold_win_rate.value <= 1
        assert model.proxy_gain is not None
        assert model.kl is not None
        assert model.response_length
        assert model.memory == recorded_memory(read_manifest(compared.models[model.number]).execution)
        assert model.memory is not None
        assert model.cost.wall_seconds > 0
    dpo, ppo = (model.memory for model in compared.found.models)
    assert dpo is not None
    assert ppo is not None
    assert dpo.frozen == 0  # its reference is read once, before the first step
    assert ppo.frozen > ppo.parameters * 0.9  # reference, reward model and gold scorer
    assert ppo.parameters == pytest.approx(2 * dpo.parameters, rel=0.1)  # policy and critic


def test_gold_scores_are_those_of_the_evaluation(compared: Compared) -> None:
    for model in compared.found.models:
        folder = fetch(compared.evaluations[model.number], compared.home / "cache")
        suites = json.loads((folder / "metrics.json").read_text())["suites"]
        role = GRAPH[model.combination.stage].role
        assert model.gold is not None
        assert model.gold_gain is not None
        ours, theirs = (suites["gold"]["roles"][one]["value"] for one in (role, "sft"))
        assert model.gold.value == ours
        assert model.gold_gain.value == pytest.approx(ours - theirs, abs=1e-9)  # on the same prompts


def test_the_page_shows_both_and_loads_nothing(compared: Compared) -> None:
    for said in ("dpo, beta 0.2, seed 0", "ppo, beta 0.2, seed 0", "reward hacking", "2 trained, 2 frozen"):
        assert said in compared.page, said
    assert compared.page.count('class="plot"') == 3
    assert not re.search(r"<script|src=|href=\"http", compared.page)
