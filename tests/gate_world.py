"""A run whose every artifact is as a gate wants it, with invented content: what tests of gates break one thing of."""

import json
import math
from pathlib import Path
from typing import Any

from stages.artifacts.store import Store
from stages.config.graph import GRAPH, Stage, gated_stages
from stages.config.request import ArtifactRef
from tests.pipeline_records import publish_artifact, refs_for

VOCABULARY, WIDTH = 512, 32
_ACCOUNT = {"in": 10, "kept": 8, "tokens_in": 100, "target_tokens": 50, "masked_tokens": 30}
_ACCOUNT |= {"dropped.longer_than_context": 2, "dropped_tokens.longer_than_context": 20}
_SPLIT = {
    "documents": {"documents": 5, "bytes": 500, "tokens": 200},
    "conversations": _ACCOUNT,
    "preferences": _ACCOUNT,
    "prompts": {"kept": 7},
}
_EXAMPLES = {"tokens_available": 80, "targets_available": 50}
_STEP = {"in": 9, "kept": 6, "dropped": {"too_short": 3}}
BY_CONSTITUTION: dict[str, Any] = {
    "prompts": {"in": 9, "kept": 9, "dropped": {}},
    **dict.fromkeys(("responses", "rounds", "comparisons"), _STEP),
    "published": {"instructions": 6, "preferences": 12},
}
SYNTHETIC: dict[str, Any] = {
    **dict.fromkeys(("sources", "instructions", "inputs", "responses", "rows"), _STEP),
    "published": {"instructions": 6},
}
CURATED: dict[str, Any] = {
    "instructions": {"sources": {"constitution": {"in": 6}, "synthesize": {"in": 6}}},
    "preferences": {"sources": {"constitution": {"in": 12}}},
    "documents": {
        "steps": [
            {"step": "read", "in": {"documents": 14}, "kept": {"documents": 12}, "dropped": {"bad": {"documents": 2}}},
            {"step": "pii", "in": {"documents": 12}, "kept": {"documents": 10}, "dropped": {"pii": {"documents": 2}}},
        ],
        "published": {split: {"documents": 5, "bytes": 500} for split in ("train", "heldout")},
    },
    "published_pairs": {
        f"{part}/{split}": 10 for part in ("instructions", "preferences") for split in ("train", "heldout")
    },
    "carried": {},
}
TOKENS = {"train": _SPLIT, "heldout": _SPLIT}
SIZES = {
    "documents/{}/bytes.npy": 128 + 5 * 8,
    "documents/{}/tokens-00000.npy": 128 + 200 * 2,
    "documents/{}/tokens-offsets.npy": 128 + 6 * 8,
    "conversations/{}/ids-offsets.npy": 128 + 9 * 8,
    "preferences/{}/chosen-ids-offsets.npy": 128 + 9 * 8,
}
META = {"dtype": "uint16"}
MODEL_FILES = {"tokenizer.json": "a", "tokenizer_config.json": "b", "chat_template.jinja": "c"}


def content(stage: Stage) -> dict[str, bytes]:
    """The files of an artifact, as far as gates read them; weights are none that can be loaded."""
    if stage is Stage.TOKENIZE:
        arrays = {path.format(split): b"\0" * size for path, size in SIZES.items() for split in ("train", "heldout")}
        tokenizer = {f"tokenizer/{name}": text.encode() for name, text in MODEL_FILES.items()}
        return {**arrays, **tokenizer, "meta.json": json.dumps(META).encode()}
    if stage is Stage.EVALUATE:
        return {}
    if not GRAPH[stage].trains:
        return {"ledger.json": b"{}"}
    row = {"step": 1, "train/loss": math.log(2), "ppo/approx_kl": 0.0, "ppo/clip_fraction": 0.0}
    if stage is Stage.PRETRAIN:
        row["train/loss"] = math.log(VOCABULARY)
    files = {name: text.encode() for name, text in MODEL_FILES.items()}
    return {**files, "model.safetensors": stage.value.encode(), "history.jsonl": json.dumps(row).encode() + b"\n"}


def ledger_of(stage: Stage) -> dict[str, Any]:
    """What a stage accounts for; a training says what it found in the tokens."""
    known: dict[Stage, dict[str, Any]] = {
        Stage.CONSTITUTION: BY_CONSTITUTION,
        Stage.SYNTHESIZE: SYNTHETIC,
        Stage.CURATE: CURATED,
        Stage.TOKENIZE: TOKENS,
        Stage.PRETRAIN: {"tokens_available": 200, "rows_available": 20, "rows_trained": 6, "tokens_trained": 60},
        Stage.SFT: {"conversations": 8, **_EXAMPLES},
        Stage.PPO: {"prompts": 7},
        Stage.EVALUATE: {},
    }
    return known.get(stage, {"pairs": 8, **_EXAMPLES})


def settings_of(stage: Stage) -> dict[str, Any]:
    if stage is Stage.TOKENIZE:
        return {"sequence_length": 10}
    return {"model": {"initializer_range": 0.02, "hidden_size": WIDTH}} if stage is Stage.PRETRAIN else {}


def publish_good(
    store: Store, home: Path, *, changed: dict[Stage, dict[str, Any]] | None = None
) -> dict[Stage, ArtifactRef]:
    """Publish every gated stage of a run; `changed` replaces fields of single manifests, or files (`content`)."""
    made: dict[Stage, ArtifactRef] = {}
    for stage in gated_stages():
        fields = dict((changed or {}).get(stage, {}))
        files = {**content(stage), **fields.pop("content", {})}
        inputs = refs_for(stage, made)
        if stage is Stage.EVALUATE:
            files = {"metrics.json": json.dumps(report(made)).encode(), **files}
        folder = home / f"content-{stage.value}"
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        known: dict[str, Any] = {
            "ledger": ledger_of(stage),
            "config": settings_of(stage),
            "execution": {"compute_dtype": "float32"},
            "metrics": {"tokens/vocab_size": VOCABULARY, "curate/documents_kept": 10.0},
        }
        made[stage], _ = publish_artifact(store, stage, inputs, folder, **{**known, **fields})
    return made


def report(made: dict[Stage, ArtifactRef]) -> dict[str, Any]:
    """metrics.json of an evaluation of the models that there are."""
    roles = [GRAPH[stage].role for stage in made if GRAPH[stage].is_language_model]
    return {
        "models": {role: {"eval/loss": 2.0} for role in roles},
        "data": {"digest": made[Stage.TOKENIZE].digest},
        "reward_fingerprint": made[Stage.REWARD].fingerprint,
    }
