"""A curated folder of invented text and its `tokens` artifact: real files, small enough to train on within a test."""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

from stages.__main__ import verb_of
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fingerprint
from stages.config.base import Config
from stages.config.execution import ExecutionConfig
from stages.config.graph import GRAPH, Stage
from stages.config.preferences import DPOConfig, RewardConfig
from stages.config.request import ArtifactRef, RunInfo, StageRequest
from stages.config.rollouts import PPOConfig
from stages.config.tokens import TokenizeConfig
from stages.config.train import ModelConfig, OptimizerConfig, PretrainConfig, SFTConfig, TrainConfig
from stages.job.context import StageContext
from stages.job.progress import Progress
from stages.tracking.tracker import NullTracker

_SUBJECTS = ("array", "matrix", "tensor", "table", "graph", "string", "queue", "tree")
_VERBS = ("sort", "split", "merge", "scale", "count", "filter", "reverse", "copy")

MODEL = ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
EXPERTS = MODEL.model_copy(update={"num_experts": 4, "num_experts_per_token": 2, "router_loss_coefficient": 0.05})
"""The same with four experts a layer, of which every token passes through two."""


def prepare_of(stage: Stage) -> Any:
    """The function of a training verb that makes ready what is trained."""
    return sys.modules[verb_of(stage).__module__].prepare


def write_curated(folder: Path, *, num_documents: int = 60, seed: int = 0) -> Path:
    """Write what `curate` publishes."""
    rng = random.Random(seed)
    for split, count in (("train", num_documents), ("heldout", num_documents // 4)):
        documents, instructions, preferences = [], [], []
        for number in range(count):
            verb, subject = rng.choice(_VERBS), rng.choice(_SUBJECTS)
            others = [rng.choice(_SUBJECTS) for _ in range(rng.randint(3, 30))]
            text = f"The function {verb}_{subject} will {verb} the {subject}. It works on {' and '.join(others)}."
            documents.append({"id": f"{split}-{number}", "text": text})
            question = f"What does `{verb}_{subject}` do?"
            answer, wrong = f"It will {verb} the {subject}.", f"It will {verb} the"
            turns = [{"role": "user", "content": question}]
            reply = {"role": "assistant", "content": answer}
            origin = {"group": "small", "origin": "derived"}
            instructions.append({"id": f"i{number}", "messages": [*turns, reply], **origin})
            pair = {"prompt": turns, "chosen": answer, "rejected": wrong, "kind": "truncated"}
            preferences.append({"id": f"p{number}", **pair, **origin})
        _write(folder / "documents" / split / "part-00000.jsonl.gz", documents)
        _write(folder / "instructions" / f"{split}.jsonl.gz", instructions)
        _write(folder / "preferences" / f"{split}.jsonl.gz", preferences)
    return write_ledger(folder)


def write_ledger(curated: Path) -> Path:
    """Write the part of curate's ledger that `tokenize` reads: how much text there is."""
    published: dict[str, dict[str, int]] = {}
    for split in ("train", "heldout"):
        sizes: list[int] = []
        for path in (curated / "documents" / split).glob("*.jsonl.gz"):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                sizes += [len(json.loads(line)["text"].encode()) for line in lines]
        published[split] = {"documents": len(sizes), "bytes": sum(sizes)}
    (curated / "ledger.json").write_text(json.dumps({"documents": {"published": published}}))
    return curated


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_context(
    home: Path,
    stage: Stage,
    config: Config,
    inputs: dict[str, ArtifactRef] | None = None,
    execution: ExecutionConfig | None = None,
    store_uri: str = "",
) -> StageContext:
    """A context over a `file://` store in `home`, or another one, without MLflow."""
    home.mkdir(parents=True, exist_ok=True)
    store = open_store(store_uri or (home / "store").as_uri())
    request = StageRequest(
        stage=stage,
        run=RunInfo(run_id="test", name="test"),
        store_uri=store.root_uri,
        config=config.model_dump(mode="json"),
        execution=execution or ExecutionConfig(micro_batch_size=4),
        inputs=inputs or {},
    )
    work_dir = home / "work" / stage.value
    output_dir = work_dir / "output"
    output_dir.mkdir(parents=True, exist_ok=True)
    progress = Progress(store, "test", stage, record=None)
    identity = fingerprint(stage, config, inputs=request.inputs, store_uri=store.root_uri)
    return StageContext(request, config, identity, (), store, work_dir, output_dir, NullTracker(), progress)


def published(context: StageContext) -> ArtifactRef:
    """Publish what lies in the context's output folder."""
    from stages.artifacts.addresses import artifact_uri
    from stages.artifacts.manifests import content_digest, publish, upload_files, utc_now
    from stages.config.request import Manifest

    spec = GRAPH[context.request.stage]
    files = upload_files(context.store, context.output_dir, kind=spec.kind, fingerprint=context.fingerprint)
    manifest = Manifest(
        kind=spec.kind,
        stage=spec.stage,
        version=spec.version,
        fingerprint=context.fingerprint,
        digest=content_digest(files),
        files=files,
        inputs=(),
        config=context.request.config,
        execution={},
        created_at=utc_now(),
    )
    publish(context.store, manifest)
    return manifest.ref(artifact_uri(context.store, spec.kind, context.fingerprint))


def make_tokens(home: Path, store_uri: str = "") -> ArtifactRef:
    """Curate by hand, tokenize for real; by default into the `file://` store in `home`."""
    from stages import tokenize
    from stages.config.curate import CurateConfig

    curate = make_context(home, Stage.CURATE, CurateConfig(), store_uri=store_uri)
    write_curated(curate.output_dir)
    config = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)
    context = make_context(home, Stage.TOKENIZE, config, {"curated": published(curate)}, store_uri=store_uri)
    tokenize.run(context)
    return published(context)


_OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.0)
_COMMON: dict[str, Any] = {"optimizer": _OPTIMIZER, "precision": "fp32", "eval_items": 8}

CONFIGS: dict[Stage, TrainConfig] = {
    Stage.PRETRAIN: PretrainConfig(model=MODEL, max_tokens=64 * 4 * 6, global_batch_size=4, **_COMMON),
    Stage.SFT: SFTConfig(num_epochs=2, global_batch_size=2, **_COMMON),
    Stage.REWARD: RewardConfig(num_epochs=1, global_batch_size=10, **_COMMON),
    Stage.DPO: DPOConfig(num_epochs=1, global_batch_size=10, **_COMMON),
    Stage.PPO: PPOConfig(
        num_rollouts=3, rollout_size=8, global_batch_size=4, num_epochs=2, max_response_length=6, **_COMMON
    ),
}
"""One small config per training stage; every one makes at least six optimizer steps."""


def make_models(
    home: Path, tokens: ArtifactRef, model_config: ModelConfig = MODEL
) -> dict[Stage, dict[str, ArtifactRef]]:
    """Publish an untrained base model and a reward model; return the inputs of every training stage."""
    from stages.data.tokens.views import TokensArtifact
    from stages.models.build import load_reward_model, new_causal_lm, save_model

    context = make_context(home, Stage.SFT, CONFIGS[Stage.SFT], {"tokens": tokens})
    artifact = TokensArtifact(context.input_dir("tokens"))
    model = new_causal_lm(model_config, artifact, seed=1)
    save_model(model, model.state_dict(), context.output_dir, artifact)
    sft = published(context)
    reward_context = make_context(home, Stage.REWARD, CONFIGS[Stage.REWARD], {"tokens": tokens, "model": sft})
    reward_model: Any = load_reward_model(reward_context.input_dir("model"), artifact)
    reward_model.score.weight.data.normal_(std=0.5)
    save_model(reward_model, reward_model.state_dict(), reward_context.output_dir, artifact)
    both = {"tokens": tokens, "model": sft}
    return {
        Stage.PRETRAIN: {"tokens": tokens},
        Stage.SFT: both,
        Stage.REWARD: both,
        Stage.DPO: both,
        Stage.PPO: {**both, "reward": published(reward_context)},
    }
