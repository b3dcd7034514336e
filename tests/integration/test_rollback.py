"""The DAG `rollback` as Airflow runs it, on a small registry; tests/integration/test_mlflow.py has MLflow's own."""

import json
from pathlib import Path

import pytest

from dags.rollback import rollback
from stages.artifacts.addresses import open_store
from stages.config.graph import Stage
from tests.pipeline_records import publish_run
from tests.registry import RegisteredModels, serving

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

NAME = "demo-aligned"


def test_the_form_of_the_dag_moves_the_title_and_records_who_asked(
    airflow_db: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = RegisteredModels()
    for version, salt in (("1", "old"), ("2", "new")):
        _, made = publish_run(tmp_path, salt=salt)
        ref = made[Stage.DPO]
        tags = {"artifact.uri": ref.uri, "lineage.fingerprint": ref.fingerprint, "lineage.digest": ref.digest}
        models.versions[NAME, version] = tags
    models.aliases |= {(NAME, "champion"): "2", (NAME, "previous"): "1"}
    store = open_store((tmp_path / "store").as_uri())
    monkeypatch.setenv("ARTIFACT_STORE", store.root_uri)
    with serving(models) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        unexplained = rollback.test(run_conf={"run_name": "demo", "reason": ""})
        assert str(unexplained.state) == "failed"
        assert models.aliases[NAME, "champion"] == "2"
        done = rollback.test(run_conf={"run_name": "demo", "reason": "answers in the wrong language"})
    assert str(done.state) == "success"
    assert models.aliases == {(NAME, "champion"): "1"}
    (key,) = store.list("rollbacks")
    record = json.loads(store.read_bytes(key))
    assert (record["by"], record["reason"]) == ("dag_test", "answers in the wrong language")
    assert models.versions[NAME, "2"]["rollback.by"] == "dag_test"
