"""Real models for tests of gates: a small world with preference pairs that a tiny reward model learns in seconds.

A chosen answer says `good`, a rejected one `bad`; both are of any length. In the held-out pairs the chosen answer is
longer three times of four, so a model that only measures length is right that often.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.__main__ import verb_of
from stages.artifacts.addresses import artifact_uri
from stages.artifacts.manifests import publish
from stages.config.base import Config
from stages.config.curate import CurateConfig
from stages.config.gate_records import Findings, GateRequest
from stages.config.gates import GatesConfig
from stages.config.graph import Stage
from stages.config.places import local_path
from stages.config.preferences import RewardConfig
from stages.config.request import ArtifactRef, Manifest, RunInfo
from stages.config.tokens import TokenizeConfig
from stages.config.train import OptimizerConfig
from stages.gate import examine
from stages.job.runner import _manifest
from tests.small_world import CONFIGS, _write, make_context, write_curated, write_ledger

PAIRS = {"train": 240, "heldout": 160}
REWARD = RewardConfig(
    num_epochs=1,
    global_batch_size=16,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.1),
    precision="fp32",
    eval_items=32,
)
_REASONS = (" and so on", " as ever", " of all", " for now")


def learnt_by_quality(number: int, rng: random.Random) -> tuple[str, str]:
    """Chosen and rejected answer, of any length."""
    lengths = sorted(rng.sample(range(6), 2))
    longer_is_chosen = rng.random() < 0.5
    return _answer("good", lengths[longer_is_chosen], rng), _answer("bad", lengths[not longer_is_chosen], rng)


def learnt_by_chance(number: int, rng: random.Random) -> tuple[str, str]:
    """The same with shuffled labels."""
    both = learnt_by_quality(number, rng)
    return both if rng.random() < 0.5 else (both[1], both[0])


def learnt_by_length(number: int, rng: random.Random) -> tuple[str, str]:
    """The longer answer is chosen, and nothing else tells the two apart."""
    short, long = sorted(rng.sample(range(6), 2))
    word = rng.choice(("good", "bad"))
    return _answer(word, long, rng), _answer(word, short, rng)


def heldout(number: int, rng: random.Random) -> tuple[str, str]:
    lengths = sorted(rng.sample(range(6), 2))
    longer_is_chosen = number % 4 > 0
    return _answer("good", lengths[longer_is_chosen], rng), _answer("bad", lengths[not longer_is_chosen], rng)


def _answer(word: str, length: int, rng: random.Random) -> str:
    return f"It is {word}{''.join(rng.choice(_REASONS) for _ in range(length))}."


def built(home: Path, stage: Stage, config: Config, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
    """Run a verb and publish what it made with all that the runner records."""
    context = make_context(home, stage, config, inputs)
    # The runner gives each job an empty folder; here a stage is built more than once in one home.
    shutil.rmtree(context.output_dir)
    context.output_dir.mkdir()
    outcome = verb_of(stage)(context)
    return _published(context, _manifest(context, outcome))


def _published(context: Any, manifest: Manifest) -> ArtifactRef:
    publish(context.store, manifest)
    return manifest.ref(artifact_uri(context.store, manifest.kind, manifest.fingerprint))


Rule = Callable[[int, random.Random], tuple[str, str]]
"""Chosen and rejected answer, by number."""


def tokens_of(
    home: Path, rule: Rule, *, held: Rule | None = heldout, lose: Callable[[Path], None] = lambda folder: None
) -> ArtifactRef:
    """Curate by hand, with the account that gates read, and tokenize for real. Without `held` there are no held-out
    pairs; `lose` changes what was curated behind the back of its account."""
    curate = make_context(home, Stage.CURATE, CurateConfig())
    folder = write_curated(curate.output_dir)
    rng = random.Random(7)
    counts = {"train": PAIRS["train"], "heldout": PAIRS["heldout"] if held else 0}
    for split, how in (("train", rule), ("heldout", held or rule)):
        rows = []
        for number in range(counts[split]):
            chosen, rejected = how(number, rng)
            prompt = [{"role": "user", "content": f"How is number {number}?"}]
            kinds = {"kind": "given", "group": "small", "origin": "given"}
            rows.append({"id": f"p{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected, **kinds})
        _write(folder / "preferences" / f"{split}.jsonl.gz", rows)
    ledger = json.loads((write_ledger(folder) / "ledger.json").read_text())
    instructions = {"train": 60, "heldout": 15}
    ledger["published_pairs"] = {
        **{f"instructions/{split}": count for split, count in instructions.items()},
        **{f"preferences/{split}": count for split, count in counts.items()},
    }
    lose(folder)
    from stages.job.context import StageOutcome

    curated = _published(curate, _manifest(curate, StageOutcome(ledger=ledger)))
    config = TokenizeConfig(vocab_size=300, sequence_length=96, max_prompt_length=32, bpe_train_bytes=10_000)
    return built(home, Stage.TOKENIZE, config, {"curated": curated})


def start_of(home: Path, tokens: ArtifactRef) -> ArtifactRef:
    """An untrained language model in the place of the SFT model."""
    from stages.data.tokens.views import TokensArtifact
    from stages.job.context import StageOutcome
    from stages.models.build import new_causal_lm, save_model
    from tests.small_world import MODEL

    context = make_context(home, Stage.SFT, CONFIGS[Stage.SFT], {"tokens": tokens})
    artifact = TokensArtifact(context.input_dir("tokens"))
    model = new_causal_lm(MODEL, artifact, seed=1)
    save_model(model, model.state_dict(), context.output_dir, artifact)
    return _published(context, _manifest(context, StageOutcome()))


def republished(home: Path, ref: ArtifactRef, change: Callable[[Path], None]) -> ArtifactRef:
    """The same artifact with changed files and a manifest that fits them, as if its stage had made it so."""
    from stages.artifacts.addresses import split_artifact_uri
    from stages.artifacts.manifests import content_digest, read_manifest, upload_files

    before = read_manifest(ref)
    folder = home / "changed"
    shutil.copytree(local_path(ref.uri), folder, ignore=shutil.ignore_patterns("manifest.json"))
    change(folder)
    store, _ = split_artifact_uri(ref.uri)
    fingerprint = hashlib.sha256(f"{home}{before.fingerprint}".encode()).hexdigest()
    files = upload_files(store, folder, kind=before.kind, fingerprint=fingerprint)
    update = {"fingerprint": fingerprint, "files": files, "digest": content_digest(files)}
    manifest = before.model_copy(update=update)
    publish(store, manifest)
    return manifest.ref(artifact_uri(store, manifest.kind, fingerprint))


def examined(ref: ArtifactRef, stage: Stage, **fields: Any) -> Findings:
    """What the job of a gate finds about an artifact."""
    store_uri = ref.uri.split("/artifacts/")[0]
    gates = GatesConfig()
    return examine(
        GateRequest(
            stage=stage,
            run=RunInfo(run_id="r", name="n"),
            store_uri=store_uri,
            artifact=ref,
            max_pairs=gates.max_pairs,
            **fields,
        )
    )
