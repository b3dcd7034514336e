"""Names and texts that other people chose, in every page, drawing and line that a person reads."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.artifacts.s3_client import StoreError
from stages.config.closing import ReportConfig
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.request import RunInfo, SourceEntry, SourceKind
from stages.lineage.__main__ import main as lineage_main
from stages.lineage.graph import ancestors
from stages.lineage.views import to_json, to_markdown, to_svg
from stages.report import run
from stages.reporting.page import render_page
from stages.reporting.story import read_story
from tests.pipeline_records import SAMPLES, context_for, publish_artifact, publish_run, refs_for, request_for, tampered

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% for x in y %}",
    "a|b\n\n# heading\n[link](javascript:alert(1))",
    "`code` **bold** ![i](http://evil/x.png)",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m\x00\x08",
    "abc\u202efdp.exe\u2066",
    "x" * 50_000,
]
CONTROLS = [chr(code) for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E, 0x2066)]


def lineage_of(root: Path, name: str):
    store, _ = publish_run(root, without=frozenset(Stage) - {Stage.CURATE})
    folder = root / "content"
    folder.mkdir()
    (folder / "ledger.json").write_text("{}")
    source = SourceEntry(role=f"documents {name}"[:300], kind=SourceKind.DATA, uri=name, digest=name[:80])
    ref, _ = publish_artifact(store, Stage.CURATE, {}, folder, salt="x", sources=(source,))
    return ref, ancestors([ref.uri])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_drawing_is_valid_xml_and_holds_no_element_of_theirs(name: str, tmp_path: Path) -> None:
    _, graph = lineage_of(tmp_path, name)
    drawing = to_svg(graph)
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()}
    assert tags <= {"svg", "style", "defs", "marker", "path", "g", "title", "rect", "text"}
    assert not [control for control in CONTROLS if control in drawing]
    assert len(drawing) < 20_000


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_in_markdown_keeps_its_rows_and_json_its_text(name: str, tmp_path: Path) -> None:
    _, graph = lineage_of(tmp_path, name)
    table = to_markdown(graph)
    assert [len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()] == [6] * (2 + len(graph.nodes))
    # what is escaped, and what stands in a code span, is not obeyed
    marked_up = re.sub(r"`[^`]*`", "", re.sub(r"\\.|<!---->", "", table))
    assert not set("<[]`") & set(marked_up)
    assert not [control for control in CONTROLS if control in table]
    assert name in {node["uri"] for node in json.loads(to_json(graph))["nodes"]}
    assert not [control for control in CONTROLS if control in to_json(graph)]


@pytest.mark.parametrize("form", ["markdown", "json", "svg"])
def test_the_command_line_sends_no_control_code_to_the_terminal(form: str, tmp_path: Path, capsys) -> None:
    ref, _ = lineage_of(tmp_path, "\x1b[2J\x9b31m\u202eabc")
    assert lineage_main(["ancestors", ref.uri, "--format", form]) == 0
    assert lineage_main(["ancestors", "file:///no\x1b[2Jwhere/artifacts/a/b"]) == 2
    shown = capsys.readouterr()
    assert not [control for control in CONTROLS if control in shown.out + shown.err]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_obeys_no_name_and_no_text(name: str, tmp_path: Path) -> None:
    samples = [{"prompt": name, "responses": {"sft": name, name: name}, "scores": {name: 1.0}}]
    promotion = {"promoted": False, "reason": name, "chosen": name, "models": [registered(name)]}
    page = Page(page_of(tmp_path, promotion=promotion, samples=samples, title=name))
    assert not page.tags & {"script", "img", "iframe", "object", "form", "input", "link", "base"}
    assert not [attribute for attribute in page.attributes if attribute.startswith("on")]


def registered(name: str) -> dict[str, object]:
    return {"role": name, "name": name, "version": "3", "model_id": name, "fingerprint": "f", "is_new": True}


def page_of(root: Path, *, title: str = "t", **files: object) -> str:
    store, made = publish_run(root, promotion=files.get("promotion") or {})  # type: ignore[arg-type]
    if "samples" in files or "evaluation" in files:
        folder = root / "other"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(files.get("evaluation", {"models": {}})))
        (folder / "samples.json").write_text(json.dumps(files.get("samples", SAMPLES)))
        made[Stage.EVALUATE], _ = publish_artifact(store, Stage.EVALUATE, {}, folder, salt="y")
    request = request_for(Stage.REPORT, store, refs_for(Stage.REPORT, made))
    context = context_for(request, store, ReportConfig(title=title[:80] or "t"), root)
    run(context)
    context.progress.close()
    return (context.output_dir / "report.html").read_text()


def test_an_empty_reason_is_no_reason(tmp_path: Path) -> None:
    assert 'class="reason"' not in page_of(
        tmp_path, promotion={"promoted": False, "reason": "", "chosen": None, "models": []}
    )


@pytest.mark.parametrize(
    ("evaluation", "samples"),
    [
        ({"models": []}, SAMPLES),
        ({"models": {"sft": {"eval/loss": "low"}}}, SAMPLES),
        ({"models": {"sft": 3}}, SAMPLES),
        ({"models": {}, "reward": [1]}, SAMPLES),
        ({"models": {}}, [1, 2]),
        ({"models": {}}, {"prompt": "x"}),
        ({"models": {}}, [{"prompt": "x", "responses": ["a"]}]),
    ],
)
def test_an_evaluation_of_another_shape_is_data_and_named(evaluation: object, samples: object, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"metrics\.json cannot be read|samples\.json does not hold prompts with answers"
    ):
        page_of(tmp_path, evaluation=evaluation, samples=samples)


@pytest.mark.parametrize(
    "history", ["not json\n", "[1]\n", '{"train/loss": 1}\n', '{"step": "a"}\n', "[" * 9000 + "\n"]
)
def test_a_damaged_history_is_data_and_named(history: str, tmp_path: Path) -> None:
    store, _ = publish_run(tmp_path, without=frozenset(Stage) - {Stage.CURATE})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "history.jsonl").write_text(history)
    model, _ = publish_artifact(store, Stage.SFT, {}, folder)
    with pytest.raises(DataError, match=r"history\.jsonl (cannot be read|is not JSON)"):
        read_story({"sft": model}, RunInfo(run_id="r", name="n"), title="t", max_samples=1)


def test_lineage_that_leads_back_to_itself_is_data_and_the_page_stands(tmp_path: Path, caplog) -> None:
    _, made = publish_run(tmp_path)
    curated, tokens = made[Stage.CURATE], made[Stage.TOKENIZE]
    keys = {"kind", "uri", "fingerprint", "digest"}
    tampered(curated, inputs=[{"role": "evil", **tokens.model_dump(include=keys)}])
    with pytest.raises(DataError, match="was made from itself"):
        ancestors([tokens.uri])
    story = read_story({"curated": curated, "tokens": tokens}, RunInfo(run_id="r", name="n"), title="t", max_samples=1)
    assert story.lineage is None
    assert "no lineage graph" in caplog.text
    page = render_page(story)
    assert "The graph of what this run was made from is missing: " in page
    assert "was made from itself" in page
    assert curated.fingerprint[:16] in page


def test_a_store_that_is_away_ends_the_report_instead_of_a_page_without_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retry finds the store again."""

    def away(uris: object) -> None:
        raise StoreError("the store does not answer")

    _, made = publish_run(tmp_path)
    monkeypatch.setattr("stages.reporting.story.ancestors", away)
    with pytest.raises(StoreError, match="does not answer"):
        read_story({"tokens": made[Stage.TOKENIZE]}, RunInfo(run_id="r", name="n"), title="t", max_samples=1)
