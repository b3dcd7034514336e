"""Whether a model is asked as its tokens were made: the same ids for the same questions, chat template included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts.evidence import read_evidence
from stages.config.errors import Category, StageError
from stages.config.gate_records import Check, failed, skipped
from stages.config.graph import BASE_MODEL
from stages.config.look import GivenModel
from stages.config.request import InputEntry, Manifest
from stages.judge.gates import reload
from stages.models.folder import is_malformed, told
from stages.models.given_tokenizer import given_tokenizer
from stages.models.outline import outlined

SAME_IDS, GIVEN_TEMPLATE = "same_ids", "given_template"


def blames_the_model(error: BaseException) -> bool:
    """Whether an error tells about what was read, so that a check failed; memory, disk, store and stops do not."""
    if isinstance(error, StageError):
        return error.category in (Category.CONFIG, Category.DATA)
    return isinstance(error, FileNotFoundError) or is_malformed(error)


@dataclass(frozen=True)
class Asked:
    """The fixed questions as ids, and whether the model's tokenizer gives the same; no prompts where the run's chat
    template does not take a question."""

    check: Check
    prompts: list[np.ndarray]


def same_ids(folder: Path, theirs: Any) -> Asked:
    """Compare the tokenizer in the model's folder with that of the tokens."""
    try:
        prompts = reload.fixed_prompts(theirs)
    except Exception as error:  # noqa: BLE001 - templates raise what they like about messages they do not take
        return Asked(skipped(SAME_IDS, f"its chat template does not take one question: {told(error)}"), [])
    try:
        mine = reload.plain_tokenizer(folder)
        check = reload.same_text_same_ids(SAME_IDS, mine, theirs, of_mine="the model", of_theirs="the tokens")
    except BaseException as error:
        if not blames_the_model(error):
            raise
        found = error.message if isinstance(error, StageError) else told(error)
        allowed = "a tokenizer with a chat template, as the tokens have"
        check = failed(SAME_IDS, found, allowed, "Clear the stage that made the model, which builds it again.")
    return Asked(check, prompts)


def plain_questions(tokenizer: Any) -> list[np.ndarray]:
    """The fixed questions as text alone, for a run whose chat template does not take them."""
    return [np.asarray(tokenizer(text)["input_ids"], dtype=np.int64) for text in reload.QUESTIONS]


def given_template(manifest: Manifest, theirs: Any, scratch: Path) -> Iterator[Check]:
    """For the stage that starts from a given base model: the run asks as that model is asked."""
    entry = next((entry for entry in (*manifest.inputs, *manifest.sources) if entry.role == BASE_MODEL), None)
    if entry is None:
        return
    tokens = next(entry for entry in manifest.inputs if entry.role == "tokens")
    wanted = read_evidence(tokens.ref()).manifest.config.get("chat_template", "auto")
    if wanted not in ("auto", "own", "infer"):
        yield skipped(GIVEN_TEMPLATE, "the run has a chat template of its own (tokenize.chat_template)")
        return
    artifact = entry.ref() if isinstance(entry, InputEntry) else None
    model = GivenModel(role=BASE_MODEL, uri=entry.uri, artifact=artifact)
    try:
        with outlined(model, scratch / "given", revision=entry.digest) as outline:
            if outline is None:
                yield skipped(GIVEN_TEMPLATE, "the given model is a file elsewhere, which `convert` reads")
                return
            # As `tokenize` takes it over: with the begin token and the end of a turn that the template leaves out.
            given_tokenizer(outline.folder, chat_template=wanted).save(scratch / "given-tokenizer")
            base = reload.published_tokenizer(scratch / "given-tokenizer")
            check = reload.same_text_same_ids(
                GIVEN_TEMPLATE, theirs, base, of_mine="the run", of_theirs="the given model"
            )
    except Exception as error:
        if isinstance(error, StageError) and error.category is Category.PREEMPTED:
            raise
        # The given model may be gone by now, or refuse: what the run made of it is not to blame.
        check = skipped(GIVEN_TEMPLATE, f"the given model cannot be asked: {told(error)}")
    yield check
