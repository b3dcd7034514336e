"""`python -m stages.gate <config uri>`: what a gate asks of a published model that only the model itself can answer.

A short Ray job. It reads the artifact as any later stage would, hashes every file of it and of what it was made from,
loads it in plain transformers and in ours, and measures again what training measured last. A reward model is accepted
or not by its scores on held-out pairs. What was found is a record and no failure: the gate's task in Airflow decides.
"""

import logging
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.artifacts.manifests import fetch, read_manifest
from stages.artifacts.store import Store, write_json
from stages.config.errors import EXIT_CODES, Category, DamagedArtifactError, ExitCode, StageError
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
from stages.config.graph import BASE_MODEL, GRAPH, Stage, StageSpec
from stages.config.request import InputEntry, Manifest
from stages.job.failures import describe_failure
from stages.job.logs import log_for_uri
from stages.job.runner import read_request
from stages.job.scratch import scratch_folder
from stages.job.stopping import raise_stopped

logger = logging.getLogger("athanor")


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
        inputs: dict[str, Path] = {}
        for entry in manifest.inputs:
            try:
                # Of the tokens only what is held out: training data may be more than a gate should read again.
                inputs[entry.role] = fetch(entry.ref(), self._scratch, wanted=_is_no_training_data)
                checks.append(passed(f"files_{entry.role}", f"unchanged since it was read: {entry.digest[:12]}"))
            except (DamagedArtifactError, FileNotFoundError) as error:
                checks.append(_damaged(f"files_{entry.role}", error))
        if "tokens" not in inputs:
            return Findings(checks=(*checks, skipped("reload", "its tokens cannot be read")))
        return self._of_model(checks, manifest, folder, inputs)

    def _of_model(self, checks: list[Check], manifest: Manifest, folder: Path, inputs: dict[str, Path]) -> Findings:
        """Load the model, first as users will, then as stages do."""
        import torch

        from stages.data.tokens.views import TokensArtifact
        from stages.job.devices import local_device
        from stages.judge.gates import reload
        from stages.judge.gates.heldout import Computing
        from stages.models.build import load_causal_lm, load_reward_model

        execution = self._request.execution
        torch.set_num_threads(max(1, int(execution.cpus_per_worker)))
        tokens, scores = TokensArtifact(inputs["tokens"]), self._spec.scores
        mine, theirs = reload.plain_tokenizer(folder), reload.published_tokenizer(tokens.tokenizer_dir)
        try:
            prompts = reload.fixed_prompts(theirs)
        except Exception as error:  # noqa: BLE001 - templates raise what they like about messages they do not take
            checks.append(skipped("same_ids", f"its chat template does not take one question: {error}"))
            prompts = []
        else:
            checks.append(
                reload.same_text_same_ids("same_ids", mine, theirs, of_mine="the model", of_theirs="the tokens")
            )
            checks += self._given_tokenizer(manifest, theirs)
        plain = reload.plain_model(folder, scores=scores)
        model: Any = (load_reward_model if scores else load_causal_lm)(folder, tokens).eval()
        if prompts:
            outputs = reload.plain_outputs(plain, prompts)
            packed = reload.our_outputs(model, prompts, scores=scores, pad_id=tokens.pad_id)
            checks.append(reload.same_outputs("reload", outputs, packed))
        device = local_device()
        computing = Computing(device, tokens.sequence_length, max(1, execution.micro_batch_size), tokens.pad_id)
        model.to(device)
        if scores:
            return self._reward(checks, manifest, model, plain.to(device), tokens, computing, inputs)
        del plain
        checks.append(self._heldout(manifest, model, tokens, computing, inputs))
        return Findings(checks=tuple(checks))

    def _given_tokenizer(self, manifest: Manifest, theirs: Any) -> Iterator[Check]:
        """For the stage that starts from a given base model: the run asks as that model is asked."""
        from stages.artifacts.evidence import read_evidence
        from stages.config.look import GivenModel
        from stages.judge.gates import reload
        from stages.models.outline import outlined

        given = [entry for entry in (*manifest.inputs, *manifest.sources) if entry.role == BASE_MODEL]
        if not given:
            return
        tokens = next(entry for entry in manifest.inputs if entry.role == "tokens")
        wanted = read_evidence(tokens.ref()).manifest.config.get("chat_template", "auto")
        if wanted not in ("auto", "own", "infer"):
            yield skipped("given_template", "the run has a chat template of its own (tokenize.chat_template)")
            return
        entry = given[0]
        artifact = entry.ref() if isinstance(entry, InputEntry) else None
        model = GivenModel(role=BASE_MODEL, uri=entry.uri, artifact=artifact)
        with outlined(model, self._scratch / "given") as outline:
            if outline is None:
                yield skipped("given_template", "the given model is a file elsewhere, which `convert` reads")
                return
            try:
                base = reload.plain_tokenizer(outline.folder)
                check = reload.same_text_same_ids(
                    "given_template", theirs, base, of_mine="the run", of_theirs="the given model"
                )
            except Exception as error:  # noqa: BLE001 - one without a chat template, or a template that refuses
                check = skipped("given_template", f"the given model's own template cannot be asked: {error}")
        yield check

    def _heldout(self, manifest: Manifest, model: Any, tokens: Any, computing: Any, inputs: dict[str, Path]) -> Check:
        """What training measured last on held-out data, again."""
        from stages.data.tokens.views import Split, evenly
        from stages.judge.gates import heldout
        from stages.models.build import load_causal_lm

        at_most = int(manifest.config.get("eval_items", 0))
        match manifest.stage:
            case Stage.PRETRAIN | Stage.SFT:
                rows = heldout_rows(manifest.stage, tokens)
                chosen = [rows[int(index)] for index in evenly(len(rows), at_most=at_most)] if len(rows) else []
                size = sum(len(part.ids) for row in chosen for part in row)
                if why := computing.too_much(model, size):
                    return skipped(heldout.CHECK, why)
                found = heldout.next_token_loss(model, chosen, computing)
                return heldout.compare_again(manifest, "eval/loss", found, "there are no held-out items")
            case Stage.PPO:
                return skipped(heldout.CHECK, "what training measures are sampled answers, which are not sampled again")
            case _ if "model" in inputs and "eval/dpo_chosen_drift" in manifest.metrics:
                pairs = tokens.pairs(Split.HELDOUT)
                indices = evenly(len(pairs), at_most=at_most)
                if why := computing.too_much(model, 2 * _size(pairs, indices)):
                    return skipped(heldout.CHECK, why)
                logprobs = heldout.pair_logprobs(model, pairs, indices, computing)
                reference = load_causal_lm(inputs["model"], tokens).eval().to(computing.device)
                before = heldout.pair_logprobs(reference, pairs, indices, computing)
                drift = float((logprobs[:, 0] - before[:, 0]).mean())
                return heldout.compare_again(manifest, "eval/dpo_chosen_drift", drift)
            case _:
                return skipped(heldout.CHECK, "its reference is no artifact, or training measured no drift from it")

    def _reward(
        self,
        checks: list[Check],
        manifest: Manifest,
        model: Any,
        plain: Any,
        tokens: Any,
        computing: Any,
        inputs: dict[str, Path],
    ) -> Findings:
        """A reward model's acceptance, and its probes."""
        from stages.data.tokens.views import Split, evenly
        from stages.judge.gates import heldout
        from stages.judge.gates.acceptance import acceptance
        from stages.judge.gates.pairs import judged_pairs
        from stages.judge.gates.probes import PROBED, probe

        pairs = tokens.pairs(Split.HELDOUT)
        chosen = evenly(len(pairs), at_most=self._request.max_pairs)
        watched = evenly(len(pairs), at_most=int(manifest.config.get("eval_items", 0)))
        if why := computing.too_much(model, _size(pairs, chosen) + _size(pairs, watched)):
            checks.append(skipped(heldout.CHECK, f"{why}; lower gates.max_pairs"))
            chosen = watched = chosen[:0]
        if len(chosen):
            checks += probe(model, plain, pairs, chosen[:PROBED], computing)
            scores = heldout.pair_scores(model, pairs, watched, computing)
            margin = float((scores[:, 0] - scores[:, 1]).mean())
            checks.append(heldout.compare_again(manifest, "eval/reward_margin", margin))
        scored = heldout.pair_scores(model, pairs, chosen, computing)
        found = acceptance(judged_pairs(tokens, pairs, chosen, scored))
        gained = self._best_of(model, tokens, computing, inputs)
        return Findings(
            checks=(*checks, *found.checks, *gained.checks),
            metrics={**found.metrics, **gained.metrics},
            unmeasured={**found.unmeasured, **gained.unmeasured},
            tables={**found.tables, **gained.tables},
        )

    def _best_of(self, model: Any, tokens: Any, computing: Any, inputs: dict[str, Path]) -> Findings:
        """What the best of n by this reward model gains by the gold scorer."""
        from stages.data.tokens.views import Split
        from stages.judge.gates.best_of import METRICS, best_of
        from stages.models.build import load_causal_lm, load_reward_model
        from stages.models.generation import Sampling

        gold = self._request.gold
        if gold is None or "model" not in inputs:
            why = (
                "the run has no gold scorer that is an artifact"
                if gold is None
                else "what it started from is no artifact"
            )
            return Findings(unmeasured=dict.fromkeys(METRICS, why))
        policy = load_causal_lm(inputs["model"], tokens).eval().to(computing.device)
        judge = load_reward_model(fetch(gold, self._scratch), tokens).eval().to(computing.device)
        sampling = Sampling(self._request.max_response_length, eos_id=tokens.eos_id, pad_id=tokens.pad_id)
        return best_of(policy, model, judge, tokens.prompts(Split.HELDOUT), sampling=sampling, computing=computing)


def heldout_rows(stage: Stage, tokens: Any) -> Any:
    """Held-out rows as training evaluates them."""
    import numpy as np

    from stages.data.tokens.rows import DocumentRows
    from stages.data.tokens.views import Split
    from stages.train.next_token import ConversationRows

    if stage is Stage.PRETRAIN:
        return DocumentRows(tokens.documents(Split.HELDOUT), tokens.sequence_length)
    conversations = tokens.conversations(Split.HELDOUT)
    return ConversationRows(conversations, np.arange(len(conversations)), tokens.sequence_length)


def _size(pairs: Any, indices: Any) -> int:
    return int(sum(int(side.lengths[indices].sum()) for side in (pairs.chosen, pairs.rejected)))


def _is_no_training_data(path: str) -> bool:
    return "train" not in path.split("/")[:-1]


def _damaged(name: str, error: Exception) -> Check:
    told = error.message if isinstance(error, StageError) else str(error)
    advice = error.advice if isinstance(error, StageError) else ""
    return failed(name, told, "the content that its manifest records", advice or "Clear the stage that made it.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
