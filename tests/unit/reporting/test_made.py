"""The section about data that models made: counts, losses, cost, examples, and the answer of the person who read it."""

from pathlib import Path

import pytest

from stages.config.closing import Approval, ReportConfig, Verdict
from stages.config.errors import DamagedArtifactError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.review import ReviewRecord, review_key
from stages.report import run
from stages.reporting.made_views import made_views, review_line
from stages.reporting.page import render_page
from stages.reporting.story import Story, read_story
from tests.made_records import publish_made
from tests.pipeline_records import context_for, publish_run, refs_for, request_for, run_info

ANSWER = Approval(verdict=Verdict.APPROVED, by="ada", at="2026-11-30T09:30:00+00:00", comment="<b>reads</b> well")


def story_of(home: Path) -> Story:
    _, made = publish_made(home)
    store, all_made = publish_run(home, made_data=made)
    record = ReviewRecord(artifacts={}, answer=ANSWER)
    store.write_bytes(review_key("manual-1"), record.model_dump_json().encode())
    inputs = refs_for(Stage.REPORT, all_made)
    assert not {"constitution", "synthesize"} & inputs.keys(), "what was curated names them"
    return read_story(inputs, run_info(), title="t", max_samples=3, store=store)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return story_of(tmp_path_factory.mktemp("made"))


def test_every_stage_tells_counts_losses_and_cost(story: Story) -> None:
    constitution, synthesis = made_views(story)
    assert (constitution.name, constitution.summary) == (
        "Constitution",
        "2 conversations for SFT, 3 preference pairs",
    )
    told = {table.caption: [[cell.text for cell in row] for row in table.rows] for table in constitution.tables}
    assert told["Step by step"][2] == ["critiques and revisions", "4", "2", "2", "unchanged 2"]
    assert told["By principle"] == [
        ["be-kind", "0", "0", "3", "2", "equal responses 1"],
        ["no-harm", "4", "2", "0", "0", "unchanged 2"],
    ]
    assert told["What its models were asked"] == [
        ["critic: big-model", "28", "1,400", "700", "3.50"],
        ["responder: x", "8", "80", "90", "–"],
    ]
    assert [table.caption for table in synthesis.tables] == ["Step by step", "What its models were asked"]
    assert [cell.text for cell in synthesis.tables[0].rows[0]] == ["sources", "15", "14", "1", "duplicate 1"]


def test_examples_are_as_many_as_other_samples_of_the_page(story: Story) -> None:
    constitution, synthesis = made_views(story)
    assert (constitution.heading, synthesis.heading) == ("3 of 3 accepted examples", "3 of 12 accepted examples")
    names = [[name for name, _ in sample.texts] for sample in constitution.samples]
    assert names[0] == ["Prompt", "Response", "Critique by no-harm (harmless)", "Revision"]
    assert names[1][-1] == "Second response, worse than the first by be-kind (helpful)"
    assert names[2] == ["Prompt", "Response", "Second response, better than the first by be-kind (helpful)"]
    assert dict(constitution.samples[1].texts)["Revision"].endswith("w … 3000 more characters")


def test_the_page_has_the_section_and_the_other_tables_have_these_stages(story: Story) -> None:
    page = render_page(story)
    assert '<section id="made">' in page
    assert "Approved by ada, 2026-11-30 09:30 UTC: &lt;b&gt;reads&lt;/b&gt; well" in page
    assert "<b>reads" not in page
    cost = page[page.index('<section id="cost">') : page.index('<section id="lineage">')]
    assert "constitution" in cost
    assert "synthesize" in cost
    assert "DROPPED" not in page


def test_a_rejection_without_an_answer_is_told_as_one() -> None:
    silent = Approval(verdict=Verdict.TIMED_OUT, at="2026-11-30T09:30:00+00:00")
    line = review_line(Story("t", run_info(), {}, {}, review=silent))
    assert line == "Timed out by an unnamed user, 2026-11-30 09:30 UTC"


def test_a_run_without_made_data_has_no_section(tmp_path: Path) -> None:
    store, made = publish_run(tmp_path)
    story = read_story(refs_for(Stage.REPORT, made), run_info(), title="t", max_samples=1, store=store)
    assert (made_views(story), review_line(story)) == ([], "")
    assert '<section id="made">' not in render_page(story)


def test_what_is_gone_is_left_out_and_what_was_changed_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, made = publish_made(tmp_path)
    _, all_made = publish_run(tmp_path, made_data=made)

    def read() -> Story:
        return read_story(refs_for(Stage.REPORT, all_made), run_info(), title="t", max_samples=1, store=store)

    def key(ref: ArtifactRef, name: str) -> str:
        return f"artifacts/{ref.kind}/{ref.fingerprint}/{name}"

    store.delete(key(made[Stage.SYNTHESIZE], "manifest.json"))
    assert [view.name for view in made_views(read())] == ["Constitution"]
    assert "the report leaves out what synthesize has made" in caplog.text
    store.write_bytes(review_key("manual-1"), b"{}")
    assert review_line(read()) == ""
    store.write_bytes(key(made[Stage.CONSTITUTION], "transcript.jsonl"), b"{}\n")
    with pytest.raises(DamagedArtifactError, match=r"transcript\.jsonl"):
        read()


def test_the_stage_writes_it(tmp_path: Path) -> None:
    _, made = publish_made(tmp_path)
    store, all_made = publish_run(tmp_path, made_data=made)
    config = ReportConfig(title="demo run", max_samples=3)
    request = request_for(Stage.REPORT, store, refs_for(Stage.REPORT, all_made), config)
    context = context_for(request, store, config, tmp_path)
    run(context)
    context.progress.close()
    assert "Data that models made" in (context.output_dir / "report.html").read_text()
