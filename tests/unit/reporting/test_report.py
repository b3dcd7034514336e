"""The page from published artifacts: what it says, what it hides, and that it needs nothing but itself."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from stages.artifacts.manifests import is_doubted
from stages.config.closing import ReportConfig
from stages.config.errors import DamagedArtifactError
from stages.config.graph import Stage
from stages.config.request import RunInfo
from stages.report import run
from stages.reporting.data_views import mask, tokens_table
from stages.reporting.line_plot import Series, line_plot, number
from stages.reporting.mixture_views import mixture_table, sources_table
from stages.reporting.story import Story, read_story
from tests.pipeline_records import context_for, publish_run, refs_for, request_for, run_info

PROMOTION = {
    "promoted": True,
    "reason": "there is no champion yet",
    "comparison": "win_rate",
    "chosen": "ppo",
    "models": [
        {"role": "ppo", "name": "demo-aligned", "version": "3", "model_id": "m-1", "fingerprint": "f", "is_new": True}
    ],
}


CSV = "data:text/csv;charset=utf-8;base64,"


class _Page(HTMLParser):
    """Checks nesting and collects what a browser would load or run."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_report(
    root: Path, *, without: frozenset[Stage] = frozenset(), info: RunInfo | None = None, promotion=PROMOTION
):
    store, made = publish_run(root, without=without, promotion=promotion)
    config = ReportConfig(title="demo run", max_samples=3)
    request = request_for(Stage.REPORT, store, refs_for(Stage.REPORT, made), config, info)
    context = context_for(request, store, config, root)
    run(context)
    context.progress.close()
    return context.output_dir


def test_the_page_tells_the_whole_story(tmp_path: Path) -> None:
    text = _Page((make_report(tmp_path) / "report.html").read_text()).text
    for said in (
        "The PPO model is champion.",
        "There is no champion yet.",
        "13 times higher",  # 800 / 60
        "-20% against base (3)",  # (2.4 - 3) / 3
        "score +1.00 SD over SFT, KL 4.2 nats",  # (0.3 + 0.5) / 0.8
        "demo-aligned",
        "What each costs and reaches",
        "DPO trains 1 model and learns from preference pairs.",
        "10 in = 7 kept + 3 dropped ✓ the sums conserve",
        "What does `html.escape` do?",
        "foreign",
        "1.00 GiB",
        "15 min 00 s",  # 10 stages of 90 s
    ):
        assert said in text, said


def test_every_learning_curve_of_the_run_is_drawn(tmp_path: Path) -> None:
    page = (make_report(tmp_path) / "report.html").read_text()
    labels = re.findall(r'class="plot"[^>]*aria-label="([^"]+)"', page)
    assert [label.split(":")[0] for label in labels] == [
        "Base Loss",
        "SFT Loss",
        "Reward model Loss",
        "Reward model Accuracy",
        "Gold scorer Loss",
        "PPO Score",
        "PPO KL to its start (nats a response)",
        "PPO Loss",
        "DPO Loss",
        "DPO Accuracy",
        "DPO Margin",
        "DPO Drift of the chosen (nats a response)",
    ]
    assert "PPO KL to its start (nats a response): sampled from 0.04 to 4" in labels
    assert "PPO Score: sampled from -0.98 to 1; held-out prompts from 0.9 to 0.9" in labels


def test_the_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    page = (make_report(tmp_path) / "report.html").read_text()
    parsed = _Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action"):
                assert value is not None
                assert value.startswith(("#", CSV)), (tag, value[:100])
                if value.startswith(CSV):  # a file for the reader, not a page to open
                    assert (tag, attributes.keys()) == ("a", {"href", "download"})
    assert not re.search(r"url\((?!#)|@import", page)
    policy = next(attributes["content"] for tag, attributes in parsed.tags if attributes.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_model_output_and_raw_data_are_shown_and_never_interpreted(tmp_path: Path) -> None:
    page = (make_report(tmp_path) / "report.html").read_text()
    assert "<script" not in page
    text = _Page(page).text
    assert "</p><script>x()</script>" in text
    assert "<script>alert('raw')</script>" in text


def test_samples_of_offensive_documents_are_masked(tmp_path: Path) -> None:
    page = (make_report(tmp_path) / "report.html").read_text()
    assert "nincompoop" not in page
    assert "blithering" not in page  # missed by the filter, known by its id
    assert "███ █████ ██████████" in page
    assert mask("a b") == "█ █"


@pytest.mark.parametrize(
    "without",
    [
        {Stage.PPO},
        {Stage.DPO},
        {Stage.REWARD, Stage.PPO, Stage.DPO},
        {Stage.PRETRAIN},
        {Stage.PROMOTE},
        {Stage.EVALUATE, Stage.PROMOTE},
        set(Stage),
    ],
    ids=lambda stages: "-".join(sorted(stages)) if len(stages) < 9 else "everything",
)
def test_whatever_a_run_left_out_the_page_still_stands(tmp_path: Path, without: set[Stage]) -> None:
    text = _Page((make_report(tmp_path, without=frozenset(without)) / "report.html").read_text()).text
    assert ("What each costs and reaches" in text) == (not {Stage.PPO, Stage.DPO} & without)
    assert ("without a promotion" in text) == (Stage.PROMOTE in without)


def test_a_link_to_airflow_is_only_a_web_address(tmp_path: Path) -> None:
    good = (make_report(tmp_path / "a", info=run_info(airflow_url="https://airflow/run")) / "report.html").read_text()
    evil = (make_report(tmp_path / "b", info=run_info(airflow_url="javascript:alert(1)")) / "report.html").read_text()
    assert 'href="https://airflow/run"' in good
    assert "javascript:" not in evil


def test_a_candidate_that_lost_is_not_called_champion(tmp_path: Path) -> None:
    promotion = {**PROMOTION, "promoted": False, "reason": "score is lower"}
    text = _Page((make_report(tmp_path, promotion=promotion) / "report.html").read_text()).text
    assert "The PPO model is a candidate; it did not become champion." in text
    assert "is champion." not in text


def test_weights_are_not_read_for_the_report(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    for ref in made.values():
        if ref.kind.endswith("-model"):
            store.delete(f"artifacts/{ref.kind}/{ref.fingerprint}/model.safetensors")
    story = read_story(refs_for(Stage.REPORT, made), run_info(), title="t", max_samples=1)
    assert len(story.histories["ppo"]) == 100


def test_a_changed_evaluation_file_is_refused_by_name(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    ref = made[Stage.EVALUATE]
    store.write_bytes(f"artifacts/evaluation/{ref.fingerprint}/metrics.json", b"{}")
    with pytest.raises(DamagedArtifactError, match=r"metrics\.json"):
        read_story(refs_for(Stage.REPORT, made), run_info(), title="t", max_samples=1)
    # The size differs here; where it does not, only this mark makes `evaluate` run again when it is cleared.
    assert is_doubted(store, "evaluation", ref.fingerprint)


def test_the_lineage_graph_is_published_beside_the_page(tmp_path: Path) -> None:
    folder = make_report(tmp_path)
    graph = json.loads((folder / "lineage.json").read_text())
    assert {node["kind"] for node in graph["nodes"]} >= {"raw data", "base-model", "ppo-model", "promotion"}
    ElementTree.parse(folder / "lineage.svg")
    assert 'class="lineage"' in (folder / "report.html").read_text()


def test_a_plot_keeps_gaps_and_infinities_out() -> None:
    svg = line_plot([Series("a", ((1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)))], label="x")
    ElementTree.fromstring(svg)
    assert "nan" not in svg
    assert line_plot([Series("a", ((1, math.nan),))], label="x") == ""


@pytest.mark.parametrize("values", [[0.0] * 5, [3.0], [1e-9, 2e-9], [1e9, -1e9], list(range(1000))])
def test_any_range_of_values_is_drawn_inside_the_frame(values: list[float]) -> None:
    svg = line_plot([Series("a", tuple((float(step), float(y)) for step, y in enumerate(values)))], label="x")
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(part) for part in root.get("viewBox", "").split())
    lines = [
        element.get("d", "") for element in root.iter() if element.tag == "path" and "line" in element.get("class", "")
    ]
    numbers = [float(value) for line in lines for value in re.findall(r"-?[\d.]+", line)]
    assert all(-0.1 <= x <= width + 0.1 for x in numbers[::2])
    assert all(-0.1 <= y <= height + 0.1 for y in numbers[1::2])
    assert lines or root.find("circle") is not None


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (None, "–"),
        (math.nan, "–"),
        (0.0, "0"),
        (1234.5, "1,234"),
        (0.5, "0.5"),
        (7.0, "7"),
        (0.00005, "5e-05"),
        (1.5e12, "1.5e+12"),
    ],
)
def test_numbers_are_spelled_for_people(value: float | None, spelled: str) -> None:
    assert number(value) == spelled


def test_sources_are_told_with_their_losses_and_shares() -> None:
    account = {"formats": ["alpaca"], "in": 8, "kept": 5, "changed": {"unanswered_last_turn": 2}}
    source = {"s3://b/math": {**account, "dropped": {"tool_role": 1, "empty_response": 2}}}
    share = {"asked": 0.25, "examples": 3, "distinct": 2, "epochs": 1.5, "target_tokens": 40, "realised": 0.2525}
    ledgers = {
        "curated": {"instructions": {"sources": source}},
        "sft": {"mixture": {"unit": "examples", "sources": {"s3://b/math": share, "s3://b/chat": share}}},
        "tokens": {"train": {"conversations": {"in": 5, "kept": 4, "cut": 1, "dropped.longer_than_context": 1}}},
    }
    manifests: Any = {role: SimpleNamespace(ledger=ledger) for role, ledger in ledgers.items()}
    story = Story("t", run_info(), manifests, {})
    sources, mixture, tokens = sources_table(story), mixture_table(story), tokens_table(story)
    assert sources is not None
    assert mixture is not None
    assert tokens is not None
    assert [cell.text for cell in sources.rows[0]][1:] == [
        "instructions: alpaca",
        "8",
        "5",
        "empty response 2, tool role 1",
        "unanswered last turn 2",
    ]
    assert [cell.text for cell in mixture.rows[0]] == [
        "SFT: s3://b/math",
        "25.00 %",
        "25.25 %",
        "examples",
        "3",
        "2",
        "1.5",
        "40",
    ]
    assert "longer than context 1, cut to fit 1" in [cell.text for cell in tokens.rows[0]]


def test_the_policy_closes_what_does_not_fall_back_to_default_src(tmp_path: Path) -> None:
    page = (make_report(tmp_path) / "report.html").read_text()
    assert "base-uri 'none'; form-action 'none'" in page
