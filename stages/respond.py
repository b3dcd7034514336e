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
from tokenizers import Tokenizer

from stages.config.collect import RespondConfig
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.data.tokens.views import Split, TokensArtifact, evenly, require
from stages.job.context import StageContext, StageOutcome
from stages.job.devices import local_device
from stages.job.workers import launch
from stages.models.build import load_causal_lm
from stages.models.generation import generate, uniforms
from stages.models.given_tokenizer import given_tokenizer
from stages.models.precision import autocast

_BATCH_PROMPTS = 16


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
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_dir / "tokenizer.json"))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(prompts), _BATCH_PROMPTS):
        part = prompts[start : start + _BATCH_PROMPTS]
        answers = _answers(model, part, config, tokens, first=start)
        for position, prompt in enumerate(part):
            texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip() for ids in answers[position]]
            different = list(dict.fromkeys(text for text in texts if text))
            account["responses.in"] += len(texts)
            account["responses.dropped.empty"] += sum(not text for text in texts)
            account["responses.dropped.equal"] += sum(bool(text) for text in texts) - len(different)
            if len(different) < 2:
                account["prompts.dropped.nothing_to_compare"] += 1
                account["responses.dropped.alone"] += len(different)
                continue
            account["responses.kept"] += len(different)
            rows.append({"id": f"prompt-{start + position}", "prompt": prompt.text, "responses": different})
        context.progress(start + len(part), len(prompts), "prompt")
    account["prompts.kept"] = len(rows)
    require(len(rows), "prompts with two different responses", advice="Raise temperature or max_response_length.")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (context.output_dir / "responses.jsonl").write_text(lines, encoding="utf-8")
    ledger = {what: _nested(account, f"{what}.") for what in ("prompts", "responses")}
    metrics = {"respond/prompts": float(len(rows)), "respond/responses": float(account["responses.kept"])}
    return StageOutcome(metrics=metrics, ledger=ledger)


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


def _answers(
    model: torch.nn.Module, prompts: list[Prompt], config: RespondConfig, tokens: TokensArtifact, *, first: int
) -> list[list[np.ndarray]]:
    """Responses of each prompt; those of the n-th prompt do not depend on how prompts are batched."""
    each = config.num_responses
    draws = uniforms(
        seed=config.seed,
        stream=1,
        indices=range(first * each, (first + len(prompts)) * each),
        length=config.max_response_length,
    )
    with torch.no_grad(), autocast(local_device()):
        flat = generate(
            model,
            [prompt.ids for prompt in prompts for _ in range(each)],
            max_response_length=config.max_response_length,
            eos_id=tokens.eos_id,
            pad_id=tokens.pad_id,
            temperature=config.temperature,
            uniforms_SR=draws,
        )
    return [flat[start : start + each] for start in range(0, len(flat), each)]


def _nested(account: Counter[str], prefix: str) -> dict[str, Any]:
    part = {name.removeprefix(prefix): count for name, count in account.items() if name.startswith(prefix)}
    dropped = {name.removeprefix("dropped."): count for name, count in part.items() if name.startswith("dropped.")}
    dropped = {reason: count for reason, count in dropped.items() if count}
    kept = part.get("kept", 0)
    if part["in"] != kept + sum(dropped.values()):
        raise AssertionError(f"the ledger of {prefix} does not conserve: {part}")
    return {"in": part["in"], "kept": kept, "dropped": dropped}
