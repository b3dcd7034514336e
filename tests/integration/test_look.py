"""The look as a real job on a real Ray head."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from operators.failures import StageConfigFailed
from operators.look import look_at_models
from stages.artifacts.addresses import open_store
from stages.config.request import RunInfo
from stages.config.resolve import resolve
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.tokenizer import CHAT_TEMPLATE, train_tokenizer
from tests.servers import RayServer
from tests.task_state import Memory
from tests.unit.models.test_given import save

pytestmark = pytest.mark.integration


def test_a_real_job_looks_and_refuses(
    ray_head: RayServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = urlsplit(ray_head.url)
    connection = {"conn_type": "ray_jobs", "host": parts.hostname, "port": parts.port, "password": ray_head.token}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    settings = TokenizeConfig(vocab_size=300, sequence_length=64)
    tokenizer = train_tokenizer(iter([Path(__file__).read_text() * 4]), settings).backend
    folder = save(tmp_path / "model", tokenizer, template=CHAT_TEMPLATE)
    store = open_store((tmp_path / "store").as_uri())

    def look(run_id: str, **overrides: Any) -> Any:
        ti = SimpleNamespace(dag_id="d", run_id=run_id, task_id="resolve", map_index=-1, try_number=1)
        context = {"ti": ti, "dag_run": SimpleNamespace(clear_number=0), "task_state_store": Memory()}
        config = resolve({"recipe": "tiny", "base_model": str(folder), "overrides": overrides})
        return look_at_models(context, store, RunInfo(run_id=run_id, name="n"), config)

    caplog.set_level("INFO")
    (facts,) = look("good").models
    assert (facts.architecture, facts.parameters) == ("LlamaForCausalLM", 11440)
    assert facts.summary() in caplog.text
    with pytest.raises(StageConfigFailed, match="sequence_length=4096 but the model has only 2048 positions"):
        look("refused", **{"tokenize.sequence_length": 4096})
