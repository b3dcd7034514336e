"""Records that somebody planted to stop a run in a traceback, or to keep it busy for ever."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.screen import samples_panels
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import read_manifest
from stages.artifacts.s3 import S3Store
from stages.config.closing import ReportConfig, read_samples
from stages.config.errors import BadManifestError, ConfigError, DataError, without_logins
from stages.config.evaluation import Evaluation
from stages.config.graph import Stage
from stages.lineage.graph import started_from
from stages.report import run as report
from stages.tracking.session import MlflowSession
from stages.train.checkpoint import Checkpointer, _digest
from stages.train.ranks import Processes
from tests.pipeline_records import context_for, publish_run, refs_for, request_for, tampered
from tests.unit.train.test_checkpoints import IDENTITY, saved

HUGE = 10**400
"""JSON allows it, and no floating-point number holds it."""


@pytest.mark.parametrize(
    "moment", ["", "yesterday", "0001-01-01T00:00:00", "1969-12-31T23:59:59+00:00", "2026-13-01", "9" * 500]
)
def test_a_manifest_says_when_it_was_made(tmp_path: Path, moment: str) -> None:
    _, made = publish_run(tmp_path)
    tampered(made[Stage.SFT], created_at=moment)
    with pytest.raises(BadManifestError, match=r"created_at: .*no date and time"):
        read_manifest(made[Stage.SFT])


def test_a_model_that_was_started_from_itself_is_named(tmp_path: Path) -> None:
    """The inputs in a manifest are not part of the digest that a run carries."""
    _, made = publish_run(tmp_path)
    sft, dpo = made[Stage.SFT], made[Stage.DPO]
    for ours, other in ((sft, dpo), (dpo, sft)):
        given = {"role": "model", **other.model_dump(include={"kind", "uri", "fingerprint", "digest"})}
        tampered(ours, inputs=[given])
    with pytest.raises(DataError, match="was made from itself"):
        started_from(read_manifest(dpo))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (Stage.CURATE, {"ledger": {"documents": 5}}),
        (Stage.CURATE, {"ledger": {"documents": {"steps": [None]}}}),
        (Stage.CURATE, {"ledger": {"planted": {"foreign": {"planted": 1, "found": "x"}}}}),
        (Stage.DPO, {"config": {"optimizer": 5}}),
        (Stage.SFT, {"cost": {"peak_memory_bytes": HUGE}}),
    ],
)
def test_what_a_manifest_says_in_another_shape_ends_a_report_as_data(
    tmp_path: Path, stage: Stage, changes: dict[str, Any]
) -> None:
    store, made = publish_run(tmp_path)
    tampered(made[stage], **changes)
    request = request_for(Stage.REPORT, store, refs_for(Stage.REPORT, made), ReportConfig())
    context = context_for(request, store, ReportConfig(), tmp_path)
    with pytest.raises(DataError, match="are not as Athanor writes them"):
        report(context)
    context.progress.close()


def test_names_in_a_bucket_that_no_key_can_have_are_no_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["p/runs/r/a.json", "p/runs/r//mlflow-spool.jsonl", "p/runs/r/../x/mlflow-spool.jsonl", "p/runs/r/", "p/"]
    found = [{"Key": name, "Size": 1, "ETag": "e", "LastModified": None} for name in names]
    monkeypatch.setattr(S3Store, "_entries", lambda self, folder: iter(found))
    store = S3Store("b", "p")
    assert list(store.list("runs/r")) == [entry.key for entry in store.listing()] == ["runs/r/a.json"]


def test_a_link_in_a_circle_is_refused_as_every_other_link(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    (tmp_path / "runs").mkdir()
    os.symlink(tmp_path / "runs" / "circle", tmp_path / "runs" / "circle")
    for key in ("runs/circle", "runs/circle/x"):
        for reach in (store.exists, store.read_bytes, store.delete):
            with pytest.raises(ConfigError, match="through a link"):
                reach(key)


RECORDS: list[Any] = [
    [],
    7,
    {"record": [], "sha256": "x"},
    {"record": {"step": "4", "trained_on": {}, "files": []}},
    {"record": {"step": 4, "trained_on": [], "files": []}},
    {"record": {"step": 4, "trained_on": {}, "files": 7}},
    {"record": {"step": 4, "trained_on": {}, "files": [{"name": "../../x", "sha256": "0", "pieces": {}}]}},
    {"record": {"step": 4, "trained_on": {}, "files": [{"name": "x", "sha256": "0", "pieces": {"w": 1}}]}},
    {"record": {"step": 4, "trained_on": {}, "files": [], "objective": {}, "guard": {}}},
]


@pytest.mark.parametrize("planted", RECORDS)
def test_a_planted_checkpoint_is_passed_over(tmp_path: Path, planted: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path.as_uri())
    saved(store, 2)
    if isinstance(planted, dict) and "sha256" not in planted:
        planted = {**planted, "sha256": _digest(planted["record"])}
    store.write_bytes(f"checkpoints/{IDENTITY}/step-00000004/checkpoint.json", json.dumps(planted).encode())
    for name in ("step-x", "step--0000003", "step-\u0663\u0663\u0663\u0663\u0663\u0663\u0663\u0663", "checkpoint"):
        store.write_bytes(f"checkpoints/{IDENTITY}/{name}/checkpoint.json", b"{}")
    store.write_bytes(f"checkpoints/{IDENTITY}/step-{'9' * 100}/checkpoint.json", b"{}")
    found = Checkpointer(store, IDENTITY, keep=2, processes=Processes()).latest()
    assert found is not None
    assert found.step == 2
    assert torch.equal(found.objective.tensors["ids"], torch.arange(2))
    assert "is damaged and passed over" in caplog.text


def test_a_number_that_is_too_large_is_left_out_of_an_evaluation() -> None:
    report = {"models": {"sft": {"eval/perplexity": HUGE, "eval/kl": 1.0}}, "reward": {"reward/accuracy": HUGE}}
    found = Evaluation.from_report(report, settings_digest="s")
    assert (found.of("sft"), found.of("reward")) == ({"eval/kl": 1.0}, {})


def test_a_line_of_a_history_with_a_number_that_is_too_large_is_set_aside() -> None:
    refused: list[str] = []
    session = object.__new__(MlflowSession)
    session.run_id = "r"
    session._writer = type("Writer", (), {"refuse": lambda self, line, why: refused.append(line)})()  # type: ignore[assignment]
    session._remember = lambda run_id, keys: None  # type: ignore[method-assign]
    session.log_points = lambda points: None  # type: ignore[method-assign]
    lines = [json.dumps({"step": 1, "train/loss": HUGE}), '{"step": Infinity, "train/loss": 1.0}']
    session._fill_in("\n".join(lines), 0)
    assert refused == lines


@pytest.mark.parametrize(
    "data", [b"{}", b"[1]", b'[{"responses": ["a"]}]', b'[{"prompt": 7}]', b'[{"responses": {"sft": 3}}]', b"[" * 9999]
)
def test_samples_that_are_none_are_data_and_named(data: bytes) -> None:
    with pytest.raises(DataError, match=r"file:///e/samples\.json "):
        read_samples(data, "file:///e")


def test_answers_do_not_steer_the_terminal() -> None:
    (panel,) = samples_panels([{"prompt": "\x1b]0;title\x07", "responses": {"sft": "\x1b[2J"}}])
    assert "\x1b" not in str(panel.title)
    (cell,) = list(panel.renderable.columns[1].cells)  # type: ignore[union-attr]
    assert "\x1b" not in str(cell)


@pytest.mark.parametrize("password", ["pass", "p@ss", "@", "a@b@c", ":", "p?ss", "p#@ss"])
def test_a_password_with_an_at_sign_is_taken_out_whole(password: str) -> None:
    assert without_logins(f"no answer from http://user:{password}@host/x") == "no answer from http://host/x"
    assert without_logins(f"http://a@b:{password}@host/x") == "http://host/x"
    for public in ("https://a.org?to=x@b.c", "https://a.org#x@b.c", "https://token@a.org?to=x@b.c"):
        assert without_logins(public) == public.replace("token@", "")
    assert without_logins("s3://bucket/a@b and 'models:/m@champion'") == "s3://bucket/a@b and 'models:/m@champion'"
