"""`respond`: several sampled responses of one model to each prompt, for people to compare.

Responses that are empty or equal to another of the same prompt leave nothing to compare; a prompt with fewer than two
different ones is dropped, and the ledger says so.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.config.collect import RespondConfig
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.data.tokens.views import Split, TokensArtifact, evenly, require
from stages.job.context import StageContext, StageOutcome
from stages.job.devices import local_device
from stages.job.workers import launch
from stages.models.answers import Answerer, InProcess
from stages.models.build import load_causal_lm
from stages.models.generation import Sampling
from stages.models.given_tokenizer import given_tokenizer

_BATCH_PROMPTS = 16
_STREAM = 1
"""Random stream; `evaluate` has 0, so that the same seed does not show people the responses that were scored."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of one user turn."""

    text: str
    ids: np.ndarray


def run(context: StageContext) -> StageOutcome:
    return launch(context, sample_responses)


def sample_responses(context: StageContext) -> StageOutcome:
    """Write responses.jsonl, one prompt a line: `id`, `prompt`, `responses`."""
    config = context.config
    assert isinstance(config, RespondConfig)
    torch.set_num_threads(max(1, int(context.execution.cpus_per_worker)))
    tokens = TokensArtifact(context.input_dir("tokens"))
    account: Counter[str] = Counter()
    prompts = _prompts(config, tokens, given_tokenizer(context.input_dir("model")), account)
    require(len(prompts), "prompts to respond to", advice=f"Give prompts of one short turn; dropped: {dict(account)}.")
    model = load_causal_lm(context.input_dir("model"), tokens).eval()
    torch.nn.Module.to(model, local_device())  # transformers types its own `to` by keywords only
    tokenizer = tokens.tokenizer()
    answerer = Answerer(
        InProcess(model, local_device()),
        Sampling(config.max_response_length, tokens.eos_id, tokens.pad_id, config.temperature),
        seed=config.seed,
        stream=_STREAM,
        batch_size=_BATCH_PROMPTS * config.num_responses,
    )
    rows: list[dict[str, Any]] = []
    done = 0
    for answers in answerer.in_batches([prompt.ids for prompt in prompts for _ in range(config.num_responses)]):
        texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip() for ids in answers]
        for start in range(0, len(texts), config.num_responses):
            different = _different(texts[start : start + config.num_responses], account)
            if different:
                rows.append({"id": f"prompt-{done}", "prompt": prompts[done].text, "responses": different})
            done += 1
        context.progress(done, len(prompts), "prompt")
    account["prompts.kept"] = len(rows)
    require(len(rows), "prompts with two different responses", advice="Raise temperature or max_response_length.")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (context.output_dir / "responses.jsonl").write_text(lines, encoding="utf-8")
    ledger = {what: _nested(account, f"{what}.") for what in ("prompts", "responses")}
    metrics = {"respond/prompts": float(len(rows)), "respond/responses": float(account["responses.kept"])}
    return StageOutcome(metrics=metrics, ledger=ledger)


def _different(texts: list[str], account: Counter[str]) -> list[str]:
    """The different responses to one prompt, in order; none when fewer than two are left to compare."""
    different = list(dict.fromkeys(text for text in texts if text))
    account["responses.in"] += len(texts)
    account["responses.dropped.empty"] += sum(not text for text in texts)
    account["responses.dropped.equal"] += sum(bool(text) for text in texts) - len(different)
    if len(different) < 2:
        account["prompts.dropped.nothing_to_compare"] += 1
        account["responses.dropped.alone"] += len(different)
        return []
    account["responses.kept"] += len(different)
    return different


def _prompts(
    config: RespondConfig, tokens: TokensArtifact, loaded: LoadedTokenizer, account: Counter[str]
) -> list[Prompt]:
    """The prompts that can be answered, at most as many as asked for. Held-out ones with earlier turns are left out,
    because the `tokens` artifact keeps the text of the last turn only."""
    chat = loaded.chat()
    if config.prompts:
        texts, kept_ids = list(dict.fromkeys(config.prompts)), None
        account["prompts.dropped.duplicate"] = len(config.prompts) - len(texts)
        account["prompts.in"] = len(config.prompts)
    else:
        texts = json.loads((tokens.folder / "prompts" / Split.HELDOUT / "texts.json").read_text())
        kept_ids = tokens.prompts(Split.HELDOUT)
        account["prompts.in"] = len(texts)
    usable: list[Prompt] = []
    for index, text in enumerate(texts):
        ids = chat.encode_prompt([{"role": "user", "content": text}])
        if not text.strip():
            account["prompts.dropped.empty"] += 1
        elif len(ids) + config.max_response_length > tokens.sequence_length:
            account["prompts.dropped.too_long"] += 1
        elif kept_ids is not None and not np.array_equal(ids, kept_ids[index]):
            account["prompts.dropped.earlier_turns"] += 1
        else:
            usable.append(Prompt(text, ids))
    chosen = evenly(len(usable), at_most=config.num_prompts)
    account["prompts.dropped.over_num_prompts"] = len(usable) - len(chosen)
    return [usable[int(index)] for index in chosen]


def _nested(account: Counter[str], prefix: str) -> dict[str, Any]:
    part = {name.removeprefix(prefix): count for name, count in account.items() if name.startswith(prefix)}
    dropped = {name.removeprefix("dropped."): count for name, count in part.items() if name.startswith("dropped.")}
    dropped = {reason: count for reason, count in dropped.items() if count}
    kept = part.get("kept", 0)
    if part["in"] != kept + sum(dropped.values()):
        raise AssertionError(f"the ledger of {prefix} does not conserve: {part}")
    return {"in": part["in"], "kept": kept, "dropped": dropped}
