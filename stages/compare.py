"""`compare`: one page about the models of a comparison of alignment methods, and the same numbers as JSON.

It reads what the trainings and evaluations published and computes nothing that it would have to load a model for.
"""

from stages.artifacts.manifests import read_manifest
from stages.config.compare import CompareConfig
from stages.config.compare_results import ComparedModel, Comparison
from stages.config.errors import DataError
from stages.config.graph import GRAPH, Stage
from stages.job.context import StageContext, StageOutcome
from stages.judge.alignment import Measured, compared_model, comparison_of
from stages.reporting.comparison_page import render_comparison

DATA = "comparison.json"


def run(context: StageContext) -> StageOutcome:
    """Write the page and the JSON; both are artifacts of the MLflow parent run, too."""
    config = context.config
    assert isinstance(config, CompareConfig)
    comparison = _compared(context, config)
    page = GRAPH[Stage.COMPARE].page
    written = {
        DATA: comparison.model_dump_json(indent=1),
        page: render_comparison(comparison, context.run),
    }
    for name, text in written.items():
        path = context.output_dir / name
        path.write_text(text, encoding="utf-8")
        context.tracker.log_artifact(path, name, parent=True)
    failed = sum(bool(model.failure) for model in comparison.models)
    metrics = {"compare/models": float(len(comparison.models) - failed), "compare/failed": float(failed)}
    return StageOutcome(metrics=metrics | _gains(comparison))


def _compared(context: StageContext, config: CompareConfig) -> Comparison:
    models: list[ComparedModel] = []
    measured: dict[int, Measured] = {}
    for number, combination in enumerate(config.combinations):
        if failure := config.failures.get(number):
            models.append(ComparedModel(number=number, combination=combination, failure=failure))
            continue
        model, evaluation = f"model.{number}", f"evaluation.{number}"
        for role in (model, evaluation):
            if role not in context.inputs:
                raise DataError(
                    f"{combination.name} did not fail and has no input {role!r}",
                    advice="Clear the task `compare`, which asks again which combinations have a result.",
                )
        folder = context.input_dir(evaluation)
        measured[number] = Measured.read(folder, stage=combination.stage, uri=context.inputs[evaluation].uri)
        found = compared_model(number, combination, read_manifest(context.inputs[model]), measured[number])
        models.append(found.model_copy(update={"uri": context.inputs[model].uri}))
        context.progress(number + 1, len(config.combinations), "model")
    return comparison_of(config.title, models, measured)


def _gains(comparison: Comparison) -> dict[str, float]:
    """Gain by gold of each model, under its number."""
    return {
        f"compare/gold_gain/{model.number}": model.gold_gain.value for model in comparison.models if model.gold_gain
    }
