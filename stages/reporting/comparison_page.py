"""The page of `compare_alignment`."""

from stages.artifacts.manifests import utc_now
from stages.config.compare_results import Comparison, best_settings, settings_of
from stages.config.request import RunInfo
from stages.config.servers import is_web_address
from stages.config.text import printable
from stages.reporting import comparison_tables, comparison_views
from stages.reporting.templates import template


def render_comparison(comparison: Comparison, run: RunInfo) -> str:
    """Return the page; its own content policy forbids scripts and requests."""
    settings = settings_of(comparison)
    best = best_settings(settings)
    page = template("comparison.html.jinja").render(
        title=comparison.title,
        run=run,
        airflow_url=run.airflow_url if is_web_address(run.airflow_url) else "",
        made_at=utc_now(),
        verdict=comparison_views.verdict(best),
        reason=comparison_views.reason(comparison, best),
        cautions=comparison_views.cautions(comparison, settings),
        criteria=comparison_views.criteria_table(comparison, best),
        figures=comparison_views.figures(comparison, settings),
        settings=comparison_tables.settings_table(settings, with_judge=bool(comparison.judge)),
        versus=comparison_tables.versus_table(comparison),
        models=comparison_tables.models_table(comparison),
        turned=comparison_tables.turned_table(comparison),
        memory=comparison_tables.memory_table(comparison),
        failures=comparison_tables.failures_table(comparison),
    )
    return printable(page)
