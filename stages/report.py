"""`report`: one self-contained HTML page about the run, also an artifact of the MLflow pipeline run."""

from stages.config.closing import ReportConfig
from stages.config.errors import DataError
from stages.job.context import StageContext, StageOutcome
from stages.lineage.views import to_json, to_markdown, to_svg
from stages.reporting.items import with_changes
from stages.reporting.page import render_page
from stages.reporting.story import Story, read_story


def run(context: StageContext) -> StageOutcome:
    """Write report.html and the lineage graph as SVG, JSON and Markdown."""
    config = context.config
    if not isinstance(config, ReportConfig):
        raise AssertionError(f"report got a {type(config).__name__}")
    story = read_story(
        context.inputs, context.run, title=config.title, max_samples=config.max_samples, store=context.store
    )
    story = with_changes(story)
    context.progress(1, 2, unit="part", phase="read")
    written = _pages(story)
    for name, text in written.items():
        path = context.output_dir / name
        path.write_text(text, encoding="utf-8")
        context.tracker.log_artifact(
            path, name if name == "report.html" else name.replace("lineage.", "lineage/run."), parent=True
        )
    context.progress(2, 2, unit="part", phase="written")
    return StageOutcome(metrics={"report/bytes": float(len(written["report.html"].encode()))})


def _pages(story: Story) -> dict[str, str]:
    """The files by name. Ledgers, settings and cost are shown as the manifests say, which others may have changed."""
    try:
        written = {"report.html": render_page(story)}
        if story.lineage:
            written |= {
                "lineage.svg": to_svg(story.lineage),
                "lineage.json": to_json(story.lineage),
                "lineage.md": to_markdown(story.lineage),
            }
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            "ledger, settings or cost in a manifest of this run are not as Athanor writes them: "
            f"{type(error).__name__}: {str(error)[:200]}",
            advice=f"Look at manifest.json below {', '.join(story.uris.values())}; build a damaged one's stage again.",
        ) from error
    return written
