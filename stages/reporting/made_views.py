"""What the report says about data that models of the run have made: counts, losses, cost, examples, and who approved
it."""

from dataclasses import dataclass

from stages.artifacts.made_samples import MadeSample
from stages.config.graph import GRAPH, StageSpec
from stages.config.made_counts import by_principle, made_rows, spent, step_counts
from stages.config.request import Manifest
from stages.reporting.mixture_views import reasons
from stages.reporting.story import Story
from stages.reporting.tables import Cell, Table, num, shown, text

_LONGEST_TEXT = 2_000


@dataclass(frozen=True)
class MadeView:
    """What one stage has made."""

    name: str
    summary: str
    tables: tuple[Table, ...]
    samples: tuple[MadeSample, ...]
    heading: str
    """Of the examples: how many of how many, or why there are none."""


def made_views(story: Story) -> list[MadeView]:
    """One for each stage that made data which the run has curated, in the order of the pipeline."""
    makers = [spec for spec in GRAPH.values() if spec.makes and spec.stage.value in story.made]
    return [_view(story, spec) for spec in makers]


def _view(story: Story, spec: StageSpec) -> MadeView:
    name = spec.stage.value
    manifest, drawn = story.manifests[name], story.made[name]
    tables = (_steps(manifest), _principles(manifest), _spent(manifest))
    heading = f"{len(drawn.samples)} of {drawn.total} accepted examples"
    return MadeView(
        name=name.capitalize(),
        summary=made_rows(manifest.ledger),
        tables=tuple(table for table in tables if table),
        samples=tuple(_shortened(sample) for sample in drawn.samples),
        heading=f"No examples: {drawn.left_out}" if drawn.left_out else heading,
    )


def review_line(story: Story) -> str:
    """Who approved or rejected the data, and why; empty where no person was asked."""
    found = story.review
    if found is None:
        return ""
    told = (
        f"{found.verdict.replace('_', ' ')} by {found.by or 'an unnamed user'}, {found.at.replace('T', ' ')[:16]} UTC"
    )
    return f"{told[0].upper()}{told[1:]}{f': {found.comment}' if found.comment else ''}"


def _steps(manifest: Manifest) -> Table | None:
    rows = tuple(
        (
            text(step.name),
            num(step.entered),
            num(step.kept, share=step.kept / step.entered),
            num(step.entered - step.kept),
            text(reasons(step.dropped)),
        )
        for step in step_counts(manifest.ledger)
    )
    return Table("Step by step", ("step", "in", "kept", "dropped", "why"), rows) if rows else None


def _principles(manifest: Manifest) -> Table | None:
    rows = tuple(
        (
            text(name),
            num(rounds.entered),
            num(rounds.kept, share=rounds.kept / rounds.entered if rounds.entered else 0.0),
            num(compared.entered),
            num(compared.kept, share=compared.kept / compared.entered if compared.entered else 0.0),
            text(reasons({**rounds.dropped, **compared.dropped})),
        )
        for name, (rounds, compared) in by_principle(manifest.ledger).items()
    )
    head = ("principle", "revisions", "accepted", "comparisons", "both orders agree", "why dropped")
    return Table("By principle", head, rows) if rows else None


def _spent(manifest: Manifest) -> Table | None:
    rows = tuple(
        (
            text(f"{one.does}: {one.model}" if one.model else one.does),
            num(one.requests),
            num(one.prompt_tokens),
            num(one.answer_tokens),
            Cell("–", is_number=True) if one.cost is None else shown(f"{one.cost:,.2f}"),
        )
        for one in spent(manifest.ledger)
    )
    head = ("asked", "requests", "prompt tokens", "answer tokens", "cost")
    note = "All attempts together. A model of the stage's own process has no price."
    return Table("What its models were asked", head, rows, note) if rows else None


def _shortened(sample: MadeSample) -> MadeSample:
    return MadeSample(tuple((name, _short(text)) for name, text in sample.texts))


def _short(text: str) -> str:
    more = len(text) - _LONGEST_TEXT
    return f"{text[:_LONGEST_TEXT]} … {more} more characters" if more > 0 else text
