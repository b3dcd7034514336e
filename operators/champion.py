"""The champion that a run's models must beat: found when the task `evaluate` starts, and measured by its job.

It is looked up then and not when the run starts, because training may take days, and another run may have promoted in
between. `promote` finds it again; where it has changed since, nothing is promoted.
"""

import logging

from operators.given import find_version, given_artifact
from stages.config.closing import EvaluateConfig, Promotion
from stages.config.decision import CHAMPION
from stages.config.errors import ConfigError, DamagedArtifactError, DataError
from stages.config.evaluation import CHAMPION_ROLE
from stages.config.graph import Stage, aligned_models, registered_name
from stages.config.mlflow import tracking_server
from stages.config.pipeline import PipelineConfig
from stages.config.request import StageRequest

logger = logging.getLogger(__name__)


def asks_for_champion(config: PipelineConfig) -> bool:
    """Whether a run's evaluation decides about the champion: only if the run promotes."""
    return (
        Stage.PROMOTE in config.selected
        and config.promote.promotion is not Promotion.NEVER
        and any(spec.stage in config.selected for spec in aligned_models())
    )


def with_champion(request: StageRequest, config: PipelineConfig) -> StageRequest:
    """Put the champion into the request of `evaluate`, as an input and so into its fingerprint.

    A champion that cannot be read is no reason to lose the run: the evaluation says why, and nothing is promoted by
    numbers. A champion that is one of the run's own aligned models is measured anyway, and is no input of its own, so
    that an identical run finds its evaluation again. Raises StageError, which is retried, while MLflow is away.
    """
    if not asks_for_champion(config):
        return request
    name = registered_name(config.promote.run_name, aligned_models()[0])
    if not tracking_server():
        logger.warning("No MLflow server is configured, so there is no champion to compare with.")
        return request
    version = find_version(f"models:/{name}@{CHAMPION}")
    if version is None:
        logger.info("%s has no champion yet: the models are compared with what they started from.", name)
        return request
    made_here = {spec.role: request.inputs[spec.role] for spec in aligned_models() if spec.role in request.inputs}
    if version.tags.get("lineage.fingerprint") in {ref.fingerprint for ref in made_here.values()}:
        logger.info("The champion, %s, is a model of this run.", version.address)
        return request
    try:
        champion = given_artifact(version.address, field=CHAMPION)
    except (ConfigError, DataError, DamagedArtifactError, FileNotFoundError) as error:
        reason = f"{version.address}: {error}"
        logger.warning("The champion cannot be measured. %s", reason)
        return _with_settings(request, champion=version.address, champion_missing=reason)
    logger.info("The champion, %s, is measured with the run's models.", version.address)
    with_settings = _with_settings(request, champion=version.address)
    return with_settings.model_copy(update={"inputs": {**with_settings.inputs, CHAMPION_ROLE: champion}})


def _with_settings(request: StageRequest, **settings: str) -> StageRequest:
    config = EvaluateConfig.model_validate({**request.config, **settings})
    return request.model_copy(update={"config": config.model_dump(mode="json")})
