"""`python -m stages.gate <config uri>`: what a gate asks of a published model that only the model itself can answer.

A short Ray job, or the last act of the process that trained the model. It reads the artifact as any later stage would,
hashes every file of it and of what it was made from, loads it in plain transformers and in ours, and measures again
what training measured last. A reward model is accepted
or not by its scores on held-out pairs. What was found is a record and no failure: the gate's task in Airflow decides.
"""

import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_manifest
from stages.artifacts.store import Store, write_json
from stages.config.errors import EXIT_CODES, Category, ConfigError, DamagedArtifactError, ExitCode, StageError
from stages.config.gate_records import (
    Check,
    Findings,
    GateRequest,
    Outcome,
    failed,
    findings_key,
    gate_key,
    passed,
    skipped,
)
from stages.config.graph import GRAPH, REWARD_MODEL, Stage, StageSpec
from stages.config.request import Manifest
from stages.job.ending import end
from stages.job.failures import describe_failure
from stages.job.logs import log_for_uri
from stages.job.runner import read_request
from stages.job.scratch import scratch_folder
from stages.job.stopping import raise_stopped

if TYPE_CHECKING:
    from stages.data.tokens.views import TokensArtifact

logger = logging.getLogger("athanor")

_COPIES, _COPIES_OF_SCORER = 1, 2
"""Float32 models on the device at once: what was trained, and with a scorer its plain form, the policy or the gold
scorer. Others wait in main memory."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m stages.gate <config uri>\n")
        return ExitCode.CONFIG
    signal.signal(signal.SIGTERM, raise_stopped)
    uri = arguments[0]
    try:
        log_for_uri(uri)
        request, store = read_request(GateRequest, uri)
    except StageError as error:
        logger.error("%s %s", error.message, error.advice)
        return EXIT_CODES[error.category]
    try:
        findings = examine(request)
    except BaseException as error:  # noqa: BLE001 - every failure becomes an exit code and a file; none is swallowed
        return _record_failure(store, request, error)
    record = findings.model_dump(mode="json")
    write_json(store, findings_key(request), record)
    write_json(store, gate_key(request.run.run_id, request.stage, "result.json"), record)
    return ExitCode.OK


def examine(request: GateRequest) -> Findings:
    """Measure the artifact of a request; damage is a failed check, and whatever needs the damaged file is left out."""
    started = time.monotonic()
    with scratch_folder() as scratch:
        findings = _Examination(request, scratch).findings()
    for check in findings.checks:
        logger.log(logging.ERROR if check.outcome is Outcome.FAILED else logging.INFO, "%s", check.in_words())
    return findings.model_copy(update={"seconds": round(time.monotonic() - started, 3)})


def examine_early(request: GateRequest) -> None:
    """Examine what this process has just trained and published, and keep the findings, so that the gate needs no job.

    The files are read back from the store, as the gate's own job reads them. What is wrong is not kept, and neither is
    an error: then that job looks again, in a process of its own, and its word counts.
    """
    gc.collect()  # what training held, before the model is loaded twice
    try:
        findings = examine(request)
        if not findings.worth_another_look:
            write_json(open_store(request.store_uri), findings_key(request), findings.model_dump(mode="json"))
    except Exception as error:  # noqa: BLE001 - the stage has succeeded, whatever is wrong here
        logger.warning("The model could not be examined here, its gate starts a job: %s", error)


def _record_failure(store: Store, request: GateRequest, error: BaseException) -> int:
    failure = describe_failure(error, request.stage)
    try:
        key = gate_key(request.run.run_id, request.stage, "failure.json")
        write_json(store, key, failure.model_dump(mode="json"))
    except Exception as problem:  # noqa: BLE001 - whatever the store's client raises; the exit code still tells the category
        logger.error("failure.json was not written: %s", problem)
    logger.error(
        "%s",
        f"{request.name} failed [{failure.category}]: {failure.message} {failure.advice}\n{failure.detail}".rstrip(),
    )
    return EXIT_CODES[Category(failure.category)]


class _Examination:
    """One artifact through all that its gate measures."""

    def __init__(self, request: GateRequest, scratch: Path) -> None:
        self._request, self._scratch = request, scratch
        self._spec: StageSpec = GRAPH[request.stage]

    def findings(self) -> Findings:
        try:
            folder = fetch(self._request.artifact, self._scratch)
            manifest = read_manifest(self._request.artifact)
        except (DamagedArtifactError, FileNotFoundError) as error:
            return Findings(checks=(_damaged("files", error),))
        checks = [passed("files", f"{len(manifest.files)} files have the content that the manifest records")]
        # A given scorer may be all that is left of another run: it is asked about what this run would train one on.
        made_from = {entry.role: entry.ref() for entry in manifest.inputs}
        inputs: dict[str, Path] = {}
        for role, ref in (self._request.inputs if self._request.is_given else made_from).items():
            try:
                # Of the tokens only what is held out: training data may be more than a gate should read again.
                inputs[role] = fetch(ref, self._scratch, wanted=_is_no_training_data)
                checks.append(passed(f"files_{role}", f"unchanged since it was read: {ref.digest[:12]}"))
            except (DamagedArtifactError, FileNotFoundError) as error:
                checks.append(_damaged(f"files_{role}", error))
        if "tokens" not in inputs:
            return Findings(checks=(*checks, skipped("reload", "its tokens cannot be read")))
        return self._of_model(checks, manifest, folder, inputs)

    def _of_model(self, checks: list[Check], manifest: Manifest, folder: Path, inputs: dict[str, Path]) -> Findings:
        """Load the model, first as users will, then as stages do; one that cannot be loaded is a failed check."""
        import torch

        from stages.data.tokens.views import TokensArtifact
        from stages.judge.gates import reload
        from stages.judge.gates.acceptance import unaccepted
        from stages.judge.gates.again import measured_again
        from stages.judge.gates.computing import Computing, reserved_device
        from stages.judge.gates.scorer import Scorer, examined_scorer
        from stages.judge.gates.templates import given_template, plain_questions, same_ids
        from stages.models.build import load_causal_lm, load_scorer

        execution, scores = self._request.execution, self._spec.scores
        torch.set_num_threads(max(1, int(execution.cpus_per_worker)))
        tokens = TokensArtifact(inputs["tokens"])
        theirs, why = loaded(lambda: reload.published_tokenizer(tokens.tokenizer_dir))
        if theirs is None:
            return Findings(checks=(*checks, skipped("reload", f"the tokens' tokenizer cannot be loaded: {why}")))
        if self._request.is_given:
            if not_read := _not_read(folder, tokens):
                return unaccepted(not_read.found).model_copy(update={"checks": (*checks, not_read)})
            prompts = None
        else:
            asked = same_ids(folder, theirs)
            checks.append(asked.check)
            prompts = asked.prompts
            if prompts:
                checks += given_template(manifest, theirs, self._scratch)
        plain, why = loaded(lambda: reload.plain_model(folder, scores=scores))
        model, why_not_ours = loaded(lambda: (load_scorer if scores else load_causal_lm)(folder, tokens).eval())
        if plain is None or model is None:
            checks.append(_not_loaded(why, why_not_ours))
        else:
            prompts = prompts or plain_questions(theirs)
            same, why = loaded(lambda: reload.reloaded(plain, model, prompts, scores=scores, pad_id=tokens.pad_id))
            checks.append(same or _not_loaded(why, ""))
        if model is None:
            rest = unaccepted("the model cannot be loaded") if scores else Findings()
            return rest.model_copy(update={"checks": tuple(checks)})
        num_weights = sum(weight.numel() for weight in model.parameters())
        device = reserved_device(execution, num_weights=num_weights, copies=_COPIES_OF_SCORER if scores else _COPIES)
        computing = Computing(device, tokens.sequence_length, max(1, execution.micro_batch_size), tokens.pad_id)
        logger.info("measuring %.3g weights on %s", num_weights, device)
        model.to(device)
        if not scores:
            del plain
            rows = heldout_rows(manifest.stage, tokens)
            checks.append(measured_again(manifest, model, tokens, computing, inputs=inputs, rows=rows))
            return Findings(checks=tuple(checks))
        scorer = Scorer(model, plain, tokens, computing)
        found = examined_scorer(scorer, manifest, self._request, inputs, self._scratch)
        return found.model_copy(update={"checks": (*checks, *found.checks)})


def heldout_rows(stage: Stage, tokens: Any) -> Any:
    """Held-out rows as a training on next tokens evaluates them; none for other stages."""
    import numpy as np

    from stages.data.tokens.rows import DocumentRows
    from stages.data.tokens.views import Split
    from stages.train.next_token import ConversationRows

    match stage:
        case Stage.PRETRAIN:
            return DocumentRows(tokens.documents(Split.HELDOUT), tokens.sequence_length)
        case Stage.SFT:
            conversations = tokens.conversations(Split.HELDOUT)
            return ConversationRows(conversations, np.arange(len(conversations)), tokens.sequence_length)
        case _:
            return ()


def loaded(load: Callable[[], Any]) -> tuple[Any, str]:
    """Return what `load` returns, or None and why; memory, disk and a stop are no fault of the model and are raised."""
    from stages.judge.gates.templates import blames_the_model
    from stages.models.folder import told

    try:
        return load(), ""
    except BaseException as error:
        if not blames_the_model(error):
            raise
        return None, error.message if isinstance(error, StageError) else told(error)


def _not_loaded(why_not_plain: str, why_not_ours: str) -> Check:
    whys = {"plain transformers": why_not_plain, "the stages": why_not_ours}
    told = "; ".join(f"{who} cannot load it: {why}" for who, why in whys.items() if why)
    return failed("reload", told, "a model that both load", "Clear the stage that made it, which builds it again.")


def _not_read(folder: Path, tokens: "TokensArtifact") -> Check | None:
    """A given scorer reads the ids of the run, whatever its own chat template is."""
    from stages.models.same_tokenizer import check_given_scorer

    try:
        check_given_scorer(folder, tokens.tokenizer(), role=REWARD_MODEL)
    except ConfigError as error:
        return failed("same_ids", error.message, "the token ids of the run, and one score", error.advice)
    return None


def _is_no_training_data(path: str) -> bool:
    return "train" not in path.split("/")[:-1]


def _damaged(name: str, error: Exception) -> Check:
    told = error.message if isinstance(error, StageError) else str(error)
    advice = error.advice if isinstance(error, StageError) else ""
    return failed(name, told, "the content that its manifest records", advice or "Clear the stage that made it.")


if __name__ == "__main__":
    end(main(sys.argv[1:]))
