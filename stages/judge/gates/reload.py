"""A published model gives the same numbers in plain transformers as in ours, and the same text as ids.

"Plain" is what users do with the folder: `from_pretrained`, one prompt at a time. "Ours" packs several prompts into one
row with an attention of its own. Both must agree, or what was trained and measured is not what will be served.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.config.gate_records import Check, compared
from stages.data.tokens.packing import TokenSequence, lay_out
from stages.models.ensemble import as_one, member_folders, members_of
from stages.models.folder import check_folder
from stages.models.foreign_code import may_run_code
from stages.models.forward import hidden_states, segment_scores

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest logit where that is above 1."""
QUESTIONS = (
    "What does `sorted` do?",
    "Write one sentence about the sea.",
    "Is 17 a prime number? Say why.",
)
_REPORT = "This is a defect: keep the artifact and report it, with its config.json."


def plain_tokenizer(folder: Path) -> Any:
    """As transformers loads it, without any of our code."""
    from transformers import AutoTokenizer

    check_folder(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def published_tokenizer(folder: Path) -> Any:
    """The tokenizer of a `tokens` artifact, which is no model's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def plain_model(folder: Path, *, scores: bool) -> Any:
    """As transformers loads it, in float32; number of scores and padding are what its own config.json says. Of an
    ensemble, every member."""
    return as_one([_plain(member, scores=scores) for member in member_folders(folder)])


def _plain(folder: Path, *, scores: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    check_folder(folder)
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=may_run_code(folder),
    )
    return model.eval()


def fixed_prompts(tokenizer: Any) -> list[np.ndarray]:
    """Three questions in the tokenizer's own chat template."""
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found.append(np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64))
    return found


def same_text_same_ids(name: str, mine: Any, theirs: Any, *, of_mine: str, of_theirs: str) -> Check:
    """Compare two tokenizers by what they make of the fixed questions, chat template included."""
    for ours, other in zip(fixed_prompts(mine), fixed_prompts(theirs), strict=True):
        if not np.array_equal(ours, other):
            size = min(len(ours), len(other))
            place = int(np.flatnonzero([*(ours[:size] != other[:size]), True])[0])
            return compared(
                name,
                same=False,
                found=f"{of_mine} gives {len(ours)} ids, with {_there(ours, place)} in place {place}",
                allowed=f"{of_theirs} gives {len(other)} ids, with {_there(other, place)} there",
                advice="The chat template or the vocabulary changed on the way. Clear the stage that made the model.",
            )
    return compared(name, same=True, found=f"{of_mine} gives the same ids", allowed=f"as {of_theirs}", advice="")


def _there(ids: np.ndarray, place: int) -> str:
    return str(ids[place]) if place < len(ids) else "nothing"


@torch.no_grad()
def plain_outputs(model: Any, prompts: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Logits of every token, or the score of a classifier, one prompt at a time."""
    return [model(torch.from_numpy(prompt)[None]).logits[0] for prompt in prompts]


@torch.no_grad()
def our_outputs(model: nn.Module, prompts: Sequence[np.ndarray], *, scores: bool, pad_id: int) -> list[torch.Tensor]:
    """The same from prompts that are packed into one row."""
    batch = lay_out([TokenSequence(ids, np.ones(len(ids), dtype=np.int64)) for ids in prompts])
    if scores:
        return list(segment_scores(model, batch, pad_id=pad_id)[:, None])
    logits_TV = model.get_output_embeddings()(hidden_states(model, batch)[0])  # type: ignore[operator]
    return list(torch.split(logits_TV, [len(ids) for ids in prompts]))


def reloaded(plain: Any, model: nn.Module, prompts: Sequence[np.ndarray], *, scores: bool, pad_id: int) -> Check:
    """Compare what both make of the prompts."""
    both = zip(members_of(plain), members_of(model), strict=True)
    outputs = [
        (plain_outputs(one, prompts), our_outputs(other, prompts, scores=scores, pad_id=pad_id)) for one, other in both
    ]
    # Of an ensemble, the outputs of all members one after another.
    return same_outputs("reload", *([out for member in side for out in member] for side in zip(*outputs, strict=True)))


def same_outputs(name: str, plain: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> Check:
    """Compare logits or scores; a model whose outputs are not finite fails."""
    width = min(plain[0].shape[-1], ours[0].shape[-1])  # ours may have grown by rows for added tokens
    pairs = [(one[..., :width].float(), other[..., :width].float()) for one, other in zip(plain, ours, strict=True)]
    # Not Python's `max`, which drops a NaN that is not the first.
    difference = float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())
    largest = float(torch.stack([one.abs().max() for one, _ in pairs]).max())
    allowed = TOLERANCE * max(1.0, largest)
    return compared(
        name,
        math.isfinite(largest) and difference <= allowed,
        f"outputs differ by {difference:.2e} at most",
        f"up to {allowed:.2e}, the largest output is {largest:.3g}",
        "Plain transformers and ours do not compute the same model. " + _REPORT,
    )
