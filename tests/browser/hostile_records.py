"""What the pipeline shows to people, made from records in which every text is hostile."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from operators.people.approval import question
from operators.people.rating import body
from operators.plan import Plan, StagePlan
from operators.plan import Verdict as PlanVerdict
from operators.plan_page import as_markdown
from stages.artifacts.hits import find_hit
from stages.artifacts.store import Store
from stages.config.collect import RespondConfig
from stages.config.estimate import Estimate
from stages.config.graph import Stage, pipeline_stages
from stages.config.pipeline import PipelineConfig
from stages.config.request import ArtifactRef, SourceEntry, SourceKind, digests_of
from stages.config.resolve import resolve
from stages.job.runner import identify_sources
from stages.lineage.graph import Edge, Graph, Node
from stages.reporting.shapes import Promoted
from stages.reporting.story import Story, read_story
from tests import pipeline_records
from tests.browser.hostile import HTML, MARKDOWN, PLAIN, RUN, TEXTS
from tests.pipeline_records import (
    EVALUATION,
    content_of,
    publish_artifact,
    publish_run,
    refs_for,
    request_for,
    run_info,
)

ENCODABLE = [text for text in TEXTS.values() if text.encode(errors="ignore").decode() == text]
"""Texts that a manifest can hold: its JSON has no half characters."""
TOLD = [text for text in ENCODABLE if text != PLAIN["long word"]]
"""Texts that stand beside each other on one page; the long word would push the others out of it."""
OPENINGS = (HTML["broken image"], MARKDOWN["Markdown image"], PLAIN["template of Jinja"])
"""How prompts begin, which is all that a title shows of them."""


def samples_of(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Every text once as a prompt and once as a response of each model."""
    roles = ("base", "sft", "ppo", "dpo")
    shifted = [list(islice(cycle(texts), place, place + len(texts))) for place in range(1, 5)]
    return [
        {"prompt": prompt, "responses": dict(zip(roles, answers, strict=True)), "scores": dict.fromkeys(roles, 0.5)}
        for prompt, *answers in zip(texts, *shifted, strict=True)
    ]


def hostile_graph(texts: Sequence[str]) -> Graph:
    """A chain of nodes whose address, digest and role are the texts."""
    nodes = tuple(
        Node(id=f"{place:064x}", kind=("raw data", "base-model")[place % 2], uri=f"file:///data/{text}", digest=text)
        for place, text in enumerate(texts)
    )
    few = nodes[:12]  # an edge to each later layer makes the drawing wide
    edges = tuple(Edge(a.id, b.id, b.digest) for a, b in pairwise(few))
    return Graph(roots=(nodes[0].id,), nodes=nodes, edges=edges)


def hostile_ledger(texts: Sequence[str]) -> dict[str, Any]:
    """What curation would tell of sources, steps and documents with such names."""
    everything = " ".join(texts)
    account = {"formats": list(texts), "in": 2, "kept": 1, "dropped": dict.fromkeys(texts, 1), "changed": {}}
    step = {
        "step": everything,
        "in": {"documents": len(texts), "bytes": 9},
        "kept": {"documents": 0, "bytes": 0},
        "dropped": {text: {"documents": 1, "bytes": 9} for text in texts},
        "samples": {text: [{"id": text, "text": text}] for text in texts},
    }
    return {
        "documents": {"steps": [step]},
        "instructions": {"sources": dict.fromkeys(texts, account)},
        "planted": {text: {"planted": 1, "found": 1, "missed": 0, "dropped_elsewhere": 0} for text in texts},
        "train": {text: {"in": 1, "kept": 1, f"dropped.{text}": 1} for text in texts},
        "mixture": {
            "unit": everything,
            "sources": {
                text: {"asked": 0.5, "realised": 0.5, "examples": 1, "distinct": 1, "epochs": 1, "target_tokens": 1}
                for text in texts
            },
        },
    }


def hostile_story(root: Path) -> Story:
    """A run whose records say nothing but hostile texts, wherever a record may hold a text."""
    _, made = publish_run(root)
    story = read_story(refs_for(Stage.REPORT, made), run_info(), title="t", max_samples=len(TEXTS))
    texts = list(TEXTS.values())
    everything = " ".join(texts)
    changes = {
        "config": dict(zip(texts, reversed(texts), strict=True)),
        "execution": {"git_commit": "<b data-planted>"},
        "ledger": hostile_ledger(texts),
        "digest": "<b data-planted>",
        "mlflow_run_id": everything,
    }
    rewards = {f"reward/{text}": 0.5 for text in texts}
    return replace(
        story,
        title=everything,
        run=run_info(airflow_url=f'https://127.0.0.1/"><script data-planted>{RUN}</script>').model_copy(
            update={"airflow_run_id": everything}
        ),
        manifests={role: manifest.model_copy(update=changes) for role, manifest in story.manifests.items()},
        uris=dict.fromkeys(story.uris, everything),
        samples=samples_of(texts),
        evaluation=story.evaluation.model_copy(update={"reward": {**story.evaluation.reward, **rewards}}),
        promotion=Promoted.model_validate(
            {
                "promoted": False,
                "chosen": "ppo",
                "reason": everything,
                "models": [
                    {"name": text, "version": "1", "role": text, "is_new": True, "model_id": text} for text in texts
                ],
            }
        ),
        lineage=hostile_graph(texts),
    )


def approval_bodies(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Approval pages that show every text as prompt, response and name of a metric between them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, bodies = resolve({"recipe": "tiny", "promotion": "approval"}), []
    samples = samples_of(list(TEXTS.values()))
    models = {role: {**metrics, **dict.fromkeys(TEXTS.values(), 0.5)} for role, metrics in EVALUATION["models"].items()}
    for start in range(0, len(samples), 4):
        monkeypatch.setattr(pipeline_records, "SAMPLES", samples[start : start + 4])
        _, made = publish_run(root / str(start), evaluation={**EVALUATION, "models": models})
        run = run_info().model_copy(update={"name": " ".join(TEXTS.values())})
        bodies.append(question(run, config, made[Stage.EVALUATE])[1])
    return bodies


def rating_bodies() -> list[str]:
    """A question for every text, as prompt and as both responses."""
    return [
        body({"prompt": sample["prompt"], "responses": list(sample["responses"].values())[:2]}, [1, 0])
        for sample in samples_of(list(TEXTS.values()))
    ]


def plan_page() -> str:
    """A plan whose reasons are the texts, as when they are settings or addresses of sources."""
    stages = tuple(
        StagePlan(stage=Stage.CURATE, verdict=PlanVerdict.RUN, why=text, estimate=Estimate(basis=(text,)))
        for text in ENCODABLE
    )
    return as_markdown(Plan(recipe="tiny", dry_run=True, stages=stages))


def long_samples(texts: Sequence[str], openings: Sequence[str] = ("", "", "", "")) -> list[dict[str, Any]]:
    """A few prompts with their responses, each so long that four parts hold every text."""
    parts = ["\n".join(texts[place::4]) for place in range(4)]
    roles = ("base", "sft", "dpo")
    return [
        {
            "prompt": f"{opening}\n{parts[place]}".strip(),
            "responses": {role: parts[(place + step) % 4] for step, role in enumerate(roles, start=1)},
            "scores": dict.fromkeys(roles, 0.5),
        }
        for place, opening in enumerate(openings)
    ]


def plant_run(store: Store, config: PipelineConfig, folder: Path) -> dict[Stage, ArtifactRef]:
    """Publish all that a run of this configuration makes up to `evaluate`, so that it hits: models that are no models,
    and records that say hostile texts. The tasks after that find them and are the real ones."""
    made: dict[Stage, ArtifactRef] = {}
    for stage in (stage for stage in pipeline_stages() if stage in config.selected_until(Stage.EVALUATE)):
        inputs, settings = refs_for(stage, made), config.stage_config(stage)
        request = request_for(stage, store, inputs, settings).model_copy(
            update={"sources": config.stage_sources(stage)}
        )
        known = digests_of(identify_sources(request, settings))
        told: dict[str, Any] = {"config": settings.model_dump(mode="json")}
        if stage is Stage.CURATE:
            sources = (SourceEntry(role=text, kind=SourceKind.DATA, uri=f"/data/{text}", digest=text) for text in TOLD)
            told |= {"ledger": hostile_ledger(TOLD), "sources": tuple(sources)}
        content = folder / stage.value
        content.mkdir(parents=True)
        measured = {role: {**EVALUATION["models"][role], **dict.fromkeys(TOLD, 0.5)} for role in ("base", "sft", "dpo")}
        files = content_of(stage, {**EVALUATION, "models": measured}, {})
        if stage is Stage.EVALUATE:
            files["samples.json"] = json.dumps(long_samples(TOLD))
        for name, text in files.items():
            (content / name).write_text(text, encoding="utf-8")
        identity = find_hit(store, stage, settings, inputs=inputs, sources=known).fingerprint
        made[stage], _ = publish_artifact(store, stage, inputs, content, fingerprint=identity, **told)
    return made


def plant_responses(store: Store, settings: RespondConfig, inputs: Mapping[str, ArtifactRef], folder: Path) -> None:
    """Publish what a model might say, as the stage `respond` would, so that a collection with these settings hits."""
    rows = [
        {"id": f"prompt-{place}", "prompt": sample["prompt"], "responses": list(sample["responses"].values())[:2]}
        for place, sample in enumerate(long_samples(TOLD, OPENINGS))
    ]
    folder.mkdir()
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    identity = find_hit(store, Stage.RESPOND, settings, inputs=inputs).fingerprint
    publish_artifact(
        store, Stage.RESPOND, inputs, folder, fingerprint=identity, config=settings.model_dump(mode="json")
    )
