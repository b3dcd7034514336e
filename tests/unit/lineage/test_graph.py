"""Ancestors and descendants over real manifests in a real store, and the tags that everything copies."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.artifacts.manifests import read_manifest
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.lineage.__main__ import main
from stages.lineage.graph import ancestors, ancestors_of_unpublished, descendants
from stages.lineage.svg import Box, draw_graph
from stages.lineage.tags import lineage_tags, slug
from stages.lineage.views import to_json, to_markdown, to_svg
from tests.pipeline_records import RAW_DIGEST, fingerprint_of, publish_run


def test_ancestors_of_the_aligned_model_reach_the_raw_data_and_nothing_beside_its_line(tmp_path: Path) -> None:
    _, made = publish_run(tmp_path)
    graph = ancestors([made[Stage.DPO].uri])
    assert {node.kind for node in graph.nodes} == {
        "raw data",
        "curated",
        "tokens",
        "base-model",
        "sft-model",
        "dpo-model",
    }
    assert graph.roots == (made[Stage.DPO].fingerprint,)
    raw = next(node for node in graph.nodes if node.kind == "raw data")
    assert (raw.uri, raw.digest) == ("installed-docs", RAW_DIGEST)
    assert {(edge.role) for edge in graph.edges if edge.target == made[Stage.DPO].fingerprint} == {"tokens", "model"}


def test_descendants_of_raw_data_by_digest_prefix_are_everything_made_from_it(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    other, _ = publish_run(tmp_path / "elsewhere", salt="b")
    assert other.root_uri != store.root_uri
    for target in (RAW_DIGEST, RAW_DIGEST[:8], f"sha256:{RAW_DIGEST}", "installed-docs"):
        graph = descendants(store, target)
        assert {node.id for node in graph.nodes if node.stage} == {ref.fingerprint for ref in made.values()}


def test_descendants_of_the_reward_model_are_not_the_dpo_model(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    kinds = {node.kind for node in descendants(store, made[Stage.REWARD].uri).nodes}
    assert kinds == {"reward-model", "ppo-model", "evaluation", "promotion"}


def test_descendants_hold_the_models_of_every_run_that_used_the_data(tmp_path: Path) -> None:
    store, first = publish_run(tmp_path)
    _, second = publish_run(tmp_path, salt="b")
    found = {node.id for node in descendants(store, first[Stage.CURATE].uri).nodes}
    assert {first[Stage.PPO].fingerprint, second[Stage.PPO].fingerprint} <= found


def test_an_unfinished_artifact_has_no_part_in_lineage(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    store.delete(f"artifacts/promotion/{made[Stage.PROMOTE].fingerprint}/manifest.json")
    assert made[Stage.PROMOTE].fingerprint not in {node.id for node in descendants(store, RAW_DIGEST).nodes}


@pytest.mark.parametrize("target", ["5eed", "no-such-source", "0" * 64])
def test_unknown_or_too_short_targets_are_refused_with_what_is_allowed(tmp_path: Path, target: str) -> None:
    store, _ = publish_run(tmp_path)
    with pytest.raises(ConfigError, match="neither an artifact nor raw data") as caught:
        descendants(store, target)
    assert "digest" in caught.value.advice


def test_a_missing_ancestor_is_named(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    store.delete(f"artifacts/tokens/{made[Stage.TOKENIZE].fingerprint}/manifest.json")
    with pytest.raises(ConfigError, match=made[Stage.TOKENIZE].fingerprint):
        ancestors([made[Stage.SFT].uri])


def test_lineage_of_a_manifest_before_publication_equals_the_lineage_after(tmp_path: Path) -> None:
    _, made = publish_run(tmp_path)
    ref = made[Stage.PPO]
    assert ancestors_of_unpublished(read_manifest(ref), ref.uri) == ancestors([ref.uri])


def test_tags_name_parents_by_fingerprint_and_data_by_digest(tmp_path: Path) -> None:
    _, made = publish_run(tmp_path)
    tags = lineage_tags(read_manifest(made[Stage.PPO]), made[Stage.PPO].uri)
    assert tags["lineage.parent.model"] == made[Stage.SFT].fingerprint
    assert tags["lineage.parent.reward"] == made[Stage.REWARD].fingerprint
    assert tags["lineage.dataset.tokens"] == made[Stage.TOKENIZE].digest
    assert tags["lineage.fingerprint"] == fingerprint_of(Stage.PPO)
    assert tags["artifact.uri"] == made[Stage.PPO].uri
    assert tags["git.commit"] == "c0ffee"
    assert tags["ray.submission_id"] == "athanor-ppo"
    raw = lineage_tags(read_manifest(made[Stage.CURATE]), made[Stage.CURATE].uri)
    assert raw["lineage.dataset.source.installed-docs"] == RAW_DIGEST


def test_a_source_uri_becomes_a_tag_key_that_mlflow_accepts() -> None:
    assert slug("hf://org/set?split=train") == "hf-org-set-split-train"
    assert slug("??") == "source"


def test_the_three_renderings_hold_every_node(tmp_path: Path) -> None:
    _, made = publish_run(tmp_path)
    graph = ancestors([made[Stage.PROMOTE].uri])
    assert {node["id"] for node in json.loads(to_json(graph))["nodes"]} == {node.id for node in graph.nodes}
    markdown = to_markdown(graph)
    assert all(node.digest in markdown for node in graph.nodes)
    svg = ElementTree.fromstring(to_svg(graph))
    boxes = [element for element in svg.iter() if element.tag.endswith("rect")]
    lines = [element for element in svg.iter() if element.tag.endswith("path") and element.get("marker-end")]
    assert (len(boxes), len(lines)) == (len(graph.nodes), len(graph.edges))


def test_text_in_the_drawing_is_escaped() -> None:
    svg = draw_graph([Box(id="a", title="<script>alert(1)</script>", lines=("a & b",), tooltip='"><b>')], [])
    ElementTree.fromstring(svg)
    assert "<script" not in svg


def test_boxes_of_the_drawing_do_not_overlap_and_data_flows_down() -> None:
    edges = [("a", "b", ""), ("a", "c", ""), ("b", "d", ""), ("c", "d", ""), ("a", "d", "")]
    svg = ElementTree.fromstring(draw_graph([Box(id=name, title=name) for name in "abcd"], edges))
    left, _, width, _ = (float(part) for part in svg.get("viewBox", "").split())
    rects = [element for element in svg.iter() if element.tag.endswith("rect")]
    corners = [(float(rect.get("x", "")), float(rect.get("y", ""))) for rect in rects]
    a, b, c, d = corners
    assert a[1] < b[1] == c[1] < d[1]
    assert abs(b[0] - c[0]) > float(rects[0].get("width", ""))
    assert all(left <= x and x + float(rects[0].get("width", "")) <= left + width for x, _ in corners)


def test_a_cycle_is_refused() -> None:
    with pytest.raises(AssertionError, match="cycle"):
        draw_graph([Box(id="a", title="a"), Box(id="b", title="b")], [("a", "b", ""), ("b", "a", "")])


def test_the_command_line_answers_both_directions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, made = publish_run(tmp_path)
    assert main(["ancestors", made[Stage.SFT].uri]) == 0
    assert RAW_DIGEST in capsys.readouterr().out
    assert main(["descendants", RAW_DIGEST, "--store", store.root_uri, "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["nodes"]) == len(made) + 1
    assert main(["ancestors", f"{store.root_uri}/artifacts/tokens/gone"]) == 2
    assert "manifest is missing" in capsys.readouterr().err


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    _, made = publish_run(tmp_path)
    command = [sys.executable, "-m", "stages.lineage", "ancestors", made[Stage.SFT].uri, "--format", "json"]
    graph = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {node["kind"] for node in graph["nodes"]} == {"raw data", "curated", "tokens", "base-model", "sft-model"}
