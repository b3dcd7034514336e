"""The card of a model: what it says of gates, intervals and the decision, how to make it again, what it keeps back."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.artifacts.manifests import publish, read_manifest
from stages.artifacts.store import Store
from stages.config.closing import PromoteConfig
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, SourceEntry, SourceKind
from stages.promote import run
from stages.reporting.evidence import Evidence, evidence_of
from stages.reporting.licences import licences_of
from stages.reporting.model_card import CardFacts, card_summary, model_card
from stages.tracking.client import connect
from tests.pipeline_records import (
    context_for,
    fingerprint_of,
    publish_artifact,
    publish_run,
    refs_for,
    request_for,
    run_info,
)
from tests.unit.reporting.test_suites import DECIDED, GATE, JUDGED

PARAMS = {
    "recipe": "demo",
    "documents": ["/srv/secret-project/books", "hf://org/chats?split=train"],
    "alignment": "ppo",
    "overrides": {"ppo.seed": 3},
    "instructions": [],
    "base_model": None,
}


@pytest.fixture
def world(tmp_path: Path) -> tuple[Store, dict[Stage, ArtifactRef]]:
    """A run whose PPO model was built by it, judged, gated and decided about."""
    store, made = publish_run(tmp_path, evaluation=JUDGED, promotion=DECIDED)
    ref = made[Stage.PPO]
    manifest = read_manifest(ref)
    key = f"artifacts/{ref.kind}/{ref.fingerprint}"
    store.delete(f"{key}/manifest.json")
    publish(store, manifest.model_copy(update={"execution": {**manifest.execution, "run_id": run_info().run_id}}))
    store.write_bytes(f"runs/{run_info().run_id}/params.json", json.dumps(PARAMS).encode())
    return store, made


def gate(store: Store, ref: ArtifactRef, stage: Stage, **changes: Any) -> None:
    record = {**GATE, "artifact": ref.model_dump(mode="json"), **changes}
    store.write_bytes(f"runs/{run_info().run_id}/gate_{stage.value}/gate.json", json.dumps(record).encode())


def card(evidence: Evidence, **options: Any) -> str:
    return model_card(CardFacts("a model", evidence, parameters=1000, **options))


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_has_every_suite_with_its_interval_and_the_champion_next_to_it(world) -> None:
    _, made = world
    text = card(evidence_of(made[Stage.PPO]))
    assert "| questions | accuracy ↑ | 0.52 | 0.46 to 0.58 | 0.25 | 200 |" in text
    assert "| the champion before it | questions | +0.08 | +0.03 to +0.13 | 0.01 | 200 |" in text
    results = header(text)["model-index"][0]["results"]
    assert [one["metrics"][0]["value"] for one in results if one["dataset"]["name"] == "questions"] == [0.52]


def test_the_card_says_whether_it_became_champion_and_by_which_numbers(world) -> None:
    _, made = world
    text = card(evidence_of(made[Stage.PPO]))
    assert "It did not become champion: there is no champion yet" in text
    assert "not held" in text
    assert "It was not proposed as champion; PPO was proposed." in card(evidence_of(made[Stage.DPO]))


def measured_later(store: Store, made: dict[Stage, ArtifactRef], folder: Path) -> ArtifactRef:
    """A later run's evaluation, which has the PPO model as its champion, and its decision for a model of its own."""
    folder.mkdir()
    numbers = json.loads(json.dumps(JUDGED))
    for name, value in (("champion", 0.11), ("ppo", 0.99)):
        numbers["suites"]["questions"]["roles"][name]["value"] = value
    (folder / "metrics.json").write_text(json.dumps(numbers))
    other = made[Stage.DPO].model_copy(update={"digest": "e" * 64})
    inputs = {"ppo": other, "champion": made[Stage.PPO], "base_model": made[Stage.PPO]}
    ref, _ = publish_artifact(
        store, Stage.EVALUATE, inputs, folder, salt="later", created_at="2026-12-24T09:00:00+00:00"
    )
    return ref


def test_a_champion_keeps_its_card_when_a_later_run_has_measured_it(world, tmp_path: Path) -> None:
    store, made = world
    gate(store, made[Stage.EVALUATE], Stage.EVALUATE, outcome="passed", override=None, checks=[])
    before = card(evidence_of(made[Stage.PPO]))
    assert "| evaluate | passed |" in before
    measured_later(store, made, tmp_path / "later")
    assert card(evidence_of(made[Stage.PPO])) == before


def test_a_model_that_only_a_later_run_measured_has_its_numbers_as_champion(world, tmp_path: Path) -> None:
    store, made = world
    store.delete(f"artifacts/evaluation/{made[Stage.EVALUATE].fingerprint}/manifest.json")
    measured_later(store, made, tmp_path / "later")
    evidence = evidence_of(made[Stage.PPO])
    assert evidence.role == "champion"
    text = card(evidence)
    assert "| questions | accuracy ↑ | 0.11 |" in text
    assert "It did not become champion: there is no champion yet" in text


def test_only_gates_that_looked_at_exactly_these_artifacts_are_in_the_card(world) -> None:
    store, made = world
    gate(store, made[Stage.PPO], Stage.PPO, outcome="passed", override=None, checks=[])
    gate(store, made[Stage.REWARD], Stage.REWARD)
    gate(store, made[Stage.DPO], Stage.SFT)  # a record about something else
    gate(store, made[Stage.DPO], Stage.DPO)  # no ancestor
    evidence = evidence_of(made[Stage.PPO])
    assert sorted(evidence.gates) == ["ppo", "reward"]
    text = card(evidence)
    assert "accept/accuracy\\_low\\: 0\\.47, allowed\\: \\> 0\\.5".replace("\\>", "&gt;") in text
    assert "A person let it pass\\: a rehearsal" in text


def command_in(text: str) -> list[str]:
    return shlex.split(next(line for line in text.splitlines() if line.startswith("airflow dags trigger")))


def test_the_card_inside_the_house_has_the_exact_command(world) -> None:
    _, made = world
    words = command_in(card(evidence_of(made[Stage.PPO]), is_public=False))
    assert words[:5] == ["airflow", "dags", "trigger", "llm_pipeline", "--conf"]
    assert json.loads(words[5]) == {key: PARAMS[key] for key in ("recipe", "documents", "alignment", "overrides")}


def test_the_card_for_strangers_leaves_addresses_out_and_says_so(world) -> None:
    store, made = world
    reason = "found s3://bucket/team/secret-project/x.jsonl and /srv/secret-project/books/y in it"
    gate(store, made[Stage.PPO], Stage.PPO, override={"by": "ada", "reason": reason})
    text = card(evidence_of(made[Stage.PPO]))
    assert json.loads(command_in(text)[5])["documents"] == ["books", "hf://org/chats?split=train"]
    assert "Folders and buckets are left out" in text
    assert "secret-project" not in text
    assert "found x\\.jsonl and y in it" in text


def test_an_old_model_has_a_card_without_gates_decision_and_command(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path, without=frozenset({Stage.EVALUATE, Stage.PROMOTE}))
    text = card(evidence_of(made[Stage.SFT]))
    assert "No gate has left a record of it." in text
    assert "Champion or not" not in text
    assert "airflow dags trigger" not in text
    assert store is not None


@pytest.mark.parametrize("damaged", [b"{", b"[]", b'{"comparisons": 3}'])
def test_a_damaged_evaluation_is_left_out_and_named(world, damaged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store, made = world
    store.write_bytes(f"artifacts/evaluation/{fingerprint_of(Stage.EVALUATE)}/metrics.json", damaged)
    text = card(evidence_of(made[Stage.PPO]))
    assert "questions" not in text.split("## Champion")[0]
    assert "metrics.json" in caplog.text


def test_the_short_card_keeps_whole_sections_and_says_where_the_rest_is(world) -> None:
    _, made = world
    facts = CardFacts("a model", evidence_of(made[Stage.PPO]), parameters=1000, is_public=False)
    whole = card_summary(facts, whole="cards/ppo.md", at_most=100_000)
    short = card_summary(facts, whole="cards/ppo.md", at_most=700)
    assert "| questions |" in whole
    assert "| questions |" not in short
    for text in (whole, short):
        assert "made by Athanor" in text
        assert text.endswith("The whole card: cards/ppo\\.md")


def source(uri: str, kind: SourceKind = SourceKind.DATA) -> SourceEntry:
    return SourceEntry(role="documents", kind=kind, uri=uri, digest="d" * 64)


def test_licences_are_read_where_the_sources_state_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, files in {
        "carded": {"README.md": "---\nlicense: cc-by-4.0\n---\n# Books\n", "a.txt": "x"},
        "filed": {"LICENSE.txt": "\n  Apache License\nVersion 2.0\n", "rows.jsonl": "{}"},
        "silent": {"README.md": "# Books\n"},
        "broken": {"README.md": "---\nlicense: [\n---\n"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text)
    uris = [f"{tmp_path}/carded", f"{tmp_path}/filed/rows.jsonl", f"{tmp_path}/silent", f"{tmp_path}/broken"]
    uris += [f"{tmp_path}/missing", "s3://bucket/books", "installed-docs", "hf://nobody/nothing"]
    found = licences_of(map(source, uris))
    assert found == {uris[0]: "cc-by-4.0", uris[1]: "Apache License"}


def test_the_licences_of_packages_whose_documentation_was_read_are_in_their_metadata() -> None:
    found = licences_of([source("installed-docs")], packages=["pytest", "jinja2", "no-such-package"])
    assert found["installed-docs"] in (
        "BSD License (jinja2), MIT (pytest)",
        "BSD License (jinja2), MIT License (pytest)",
    )
    assert licences_of([source("installed-docs")]) == {}


def test_the_licence_of_a_gguf_file_is_in_its_header(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert licences_of([source(str(path), SourceKind.MODEL)]) == {str(path): "apache-2.0"}


def test_the_cached_card_of_the_hub_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c" * 40
    cached = tmp_path / "datasets--org--chats"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "README.md").write_text("---\nlicense:\n- mit\n- apache-2.0\n---\n")
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    uri = "hf://org/chats?split=train"
    assert licences_of([source(uri)]) == {uri: "mit, apache-2.0"}


@pytest.mark.slow
def test_promote_attaches_the_card_to_every_version_and_leaves_what_people_wrote(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    store, made = world
    gate(store, made[Stage.PPO], Stage.PPO, outcome="passed", override=None)
    config = PromoteConfig(run_name="demo")
    inputs = refs_for(Stage.PROMOTE, made)

    def promote() -> Path:
        context = context_for(request_for(Stage.PROMOTE, store, inputs, config), store, config, tmp_path)
        run(context)
        context.progress.close()
        return context.output_dir

    folder = promote()
    assert sorted(path.stem for path in (folder / "cards").iterdir()) == ["base", "dpo", "gold", "ppo", "reward", "sft"]
    text = (folder / "cards" / "ppo.md").read_text()
    assert "/srv/secret-project/books" in text  # the house's own card
    assert "| ppo | passed |" in text
    client = connect()
    version = next(
        one for one in client.search_model_versions("name = 'demo-aligned'") if one.tags["alignment"] == "ppo"
    )
    described = version.description or ""
    assert len(described) <= 5000
    assert "| questions |" in described
    assert "cards/ppo.md" in described.replace("\\", "")
    client.update_model_version("demo-aligned", version.version, description="Ask Ada before you use it.")
    promote()
    assert client.get_model_version("demo-aligned", version.version).description == "Ask Ada before you use it."
