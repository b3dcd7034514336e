"""The report as one HTML page."""

from stages.artifacts.manifests import utc_now
from stages.config.servers import is_web_address
from stages.config.text import printable
from stages.lineage.views import to_svg
from stages.reporting import (
    answers,
    data_views,
    gate_views,
    gold_views,
    guard_views,
    made_views,
    memory_views,
    mixture_views,
    model_views,
    suite_views,
)
from stages.reporting.names import label_of
from stages.reporting.story import Story
from stages.reporting.templates import template


def render_page(story: Story) -> str:
    """Return the page; its own content policy forbids scripts and requests."""
    from markupsafe import Markup

    commit = next((manifest.execution.get("git_commit", "") for manifest in story.manifests.values()), "")
    page = template("report.html.jinja").render(
        title=story.title,
        run=story.run,
        made_at=utc_now(),
        commit=commit,
        airflow_url=story.run.airflow_url if is_web_address(story.run.airflow_url) else "",
        verdict=verdict(story),
        caution=story.caution,
        promotion=story.promotion,
        facts=model_views.facts(story),
        curves=model_views.curves(story),
        guards=guard_views.guards_table(story),
        guard_figures=guard_views.figures(story),
        suites=suite_views.suites_table(story),
        suite_views=suite_views.suite_views(story),
        judge=suite_views.judge_table(story),
        decision=suite_views.decision_table(story),
        comparisons=suite_views.comparisons_table(story),
        compared=suite_views.comparison_figures(story),
        proxy_and_gold=gold_views.figures(story),
        gates=gate_views.gates_table(story),
        gate_checks=gate_views.gate_checks(story),
        sorted_samples=answers.are_sorted(story),
        evaluation=model_views.evaluation_table(story),
        reward=model_views.reward_table(story),
        by_reason=suite_views.reasons_table(story),
        alignment=model_views.alignment_table(story),
        samples=answers.samples(story),
        made=made_views.made_views(story),
        review=made_views.review_line(story),
        accounts=data_views.accounts(story),
        planted=data_views.planted_table(story),
        sources=mixture_views.sources_table(story),
        tokens=data_views.tokens_table(story),
        mixture=mixture_views.mixture_table(story),
        cost=data_views.cost_table(story),
        memory=memory_views.memory_table(data_views.stages_in_order(story)),
        registered=data_views.registered_table(story),
        artifacts=data_views.artifacts_table(story),
        settings=data_views.settings(story),
        lineage=Markup(to_svg(story.lineage)) if story.lineage else "",  # noqa: S704 - as above
        no_lineage=story.no_lineage,
    )
    return printable(page)


def verdict(story: Story) -> str:
    """The one sentence at the top."""
    if story.promotion is None:
        return "The run ended without a promotion."
    chosen = label_of(story.promotion.chosen or "")
    if not chosen:
        return "The run has no aligned model to promote."
    if story.promotion.promoted:
        return f"The {chosen} model is champion."
    return f"The {chosen} model is a candidate; it did not become champion."
