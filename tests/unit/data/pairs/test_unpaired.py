"""Single labelled responses on their way from a file to training: kept single, counted, and apart from pairs."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stages import tokenize
from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.config.gate_evidence import Evidence
from stages.config.gate_ledgers import recounted, tokenized, trained_on
from stages.config.gate_records import Outcome
from stages.config.graph import Stage
from stages.config.preference_losses import KTOLoss
from stages.config.preferences import DPOConfig
from stages.config.request import Manifest
from stages.config.resolve import resolve
from stages.config.sources import parse_source
from stages.config.tokens import TokenizeConfig
from stages.data.curation.ledger import Step
from stages.data.pairs.given import given_unpaired
from stages.data.tokens.views import Split, TokensArtifact
from stages.train.examples import planned_examples
from tests.curating import PLAIN, curated, prose, rows_of, write_jsonl
from tests.small_world import CONFIGS, make_context, published, write_curated


def thumb(prompt: str, response: str, label: object, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": response, "label": label, **more}


THUMBS = [
    thumb("Capital of France?", "Paris.", True),
    thumb("Capital of France?", "Rome.", False),
    thumb("Capital of France?", "Paris.", False),  # another person's label is another example
    thumb("Capital of France?", "Paris.", True),  # the same once more is not
    thumb("Two and two?", "Four, says bob@example.org.", "thumbs up", reason="right"),
    thumb("Two and two?", "", True),
    thumb("Two and two?", "Five.", "perhaps"),
    {"prompt": "A pair?", "chosen": "Yes.", "rejected": "No."},
]


def read(tmp_path: Path, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Step, dict[str, Any]]:
    steps: list[Step] = []
    accounts: dict[str, Any] = {}
    source = parse_source(write_jsonl(tmp_path / "thumbs.jsonl", rows) + "#format=unpaired")
    config = CurateConfig(heldout_fraction=0.0, max_bad_fraction=1.0)
    made = given_unpaired([source], config, steps, accounts)
    steps[0].verify()
    return made, steps[0], accounts


def test_each_row_is_one_response_with_its_label_or_has_a_reason(tmp_path: Path) -> None:
    rows, step, accounts = read(tmp_path, THUMBS)
    assert [(row["response"], row["label"]) for row in rows[:3]] == [
        ("Paris.", True),
        ("Rome.", False),
        ("Paris.", False),
    ]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Capital of France?"}]
    assert {reason: amount.documents for reason, amount in step.dropped.items()} == {
        "side_missing": 1,
        "unknown_label": 1,
        "not_labelled": 1,
    }
    (account,) = accounts.values()
    assert account["formats"] == {"unpaired": 7, "pair": 1}


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A curated folder with one pair and the thumbs."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [THUMBS[-1]])
    thumbs = write_jsonl(tmp_path / "thumbs.jsonl", THUMBS)
    text = tmp_path / "text.txt"
    text.write_text(prose(1))
    settings = {**PLAIN, "documents": (str(text),), "preferences": (pairs, f"{thumbs}#format=unpaired")}
    outcome, folder = curated(tmp_path, **settings, heldout_fraction=0.0, max_bad_fraction=1.0, profile="books")
    return folder, outcome.ledger


def test_curation_publishes_them_apart_from_pairs_and_accounts_for_every_one(
    built: tuple[Path, dict[str, Any]],
) -> None:
    folder, ledger = built
    rows = rows_of(folder / "unpaired" / "train.jsonl.gz")
    assert sorted((row["response"], row["label"]) for row in rows) == [
        ("Four, says <EMAIL>.", True),
        ("Paris.", False),
        ("Paris.", True),
        ("Rome.", False),
    ]
    assert [row["chosen"] for row in rows_of(folder / "preferences" / "train.jsonl.gz")] == ["Yes."]
    assert (ledger["published_pairs"]["unpaired/train"], ledger["published_pairs"]["preferences/train"]) == (4, 1)
    steps = {step["step"]: step for step in ledger["unpaired"]["steps"]}
    assert steps["read"]["in"]["documents"] == len(THUMBS)
    assert steps["duplicates"]["dropped"]["duplicate"]["documents"] == 1
    assert steps["pii"]["kept"]["documents"] == 4


def test_an_increment_takes_them_over_and_knows_them_again(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = built
    again = write_jsonl(tmp_path / "again.jsonl", [*THUMBS[:2], thumb("New?", "Yes.", True)])
    outcome, second = curated(
        tmp_path,
        name="second",
        previous=folder,
        **{**PLAIN, "documents": (), "preferences": (f"{again}#format=unpaired",)},
        heldout_fraction=0.0,
    )
    assert len(rows_of(second / "unpaired" / "train.jsonl.gz")) == 4 + 1
    steps = {step["step"]: step for step in outcome.ledger["unpaired"]["steps"]}
    assert steps["duplicates"]["dropped"]["seen_before"]["documents"] == 2


def test_other_data_has_no_trace_of_them(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [THUMBS[-1], {"prompt": "B?", "chosen": "b", "rejected": "c"}])
    outcome, folder = curated(tmp_path, **{**PLAIN, "documents": (), "preferences": (pairs,)}, heldout_fraction=0.0)
    assert not (folder / "unpaired").exists()
    assert "unpaired" not in json.dumps(outcome.ledger)


def tokens_of(tmp_path: Path) -> tuple[TokensArtifact, dict[str, Manifest], dict[str, Any]]:
    """A real tokens artifact with pairs and unpaired responses, and the manifests of both stages."""
    curate = make_context(tmp_path, Stage.CURATE, CurateConfig())
    write_curated(curate.output_dir, num_documents=20)
    rows = [
        {
            "id": f"u{number}",
            "prompt": [{"role": "user", "content": f"What is {number}?"}],
            "response": answer,
            "label": label,
            "group": "thumbs",
            "origin": "given",
        }
        for number, (answer, label) in enumerate([("A number.", True), ("A cat.", False), ("long " * 80, True)])
    ]
    for split in ("train", "heldout"):
        path = curate.output_dir / "unpaired" / f"{split}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    config = TokenizeConfig(vocab_size=300, sequence_length=64, max_prompt_length=32, bpe_train_bytes=10_000)
    context = make_context(tmp_path, Stage.TOKENIZE, config, {"curated": published(curate)})
    outcome = tokenize.run(context)
    ledger = {"published_pairs": {"unpaired/train": 3, "unpaired/heldout": 3}}
    sizes = {
        path.relative_to(context.output_dir).as_posix(): path.stat().st_size for path in _files(context.output_dir)
    }
    of_curate = manifest_of(Stage.CURATE, ledger, {})
    of_tokenize = manifest_of(Stage.TOKENIZE, outcome.ledger, sizes)
    return TokensArtifact(context.output_dir), {"curated": of_curate, "tokens": of_tokenize}, outcome.metrics


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def manifest_of(stage: Stage, ledger: dict[str, Any], sizes: dict[str, int]) -> Manifest:
    files = [{"path": path, "size": size, "sha256": ""} for path, size in sizes.items()]
    return Manifest.model_validate(
        {
            "kind": "x",
            "stage": stage,
            "version": 99,
            "fingerprint": "f",
            "digest": "d",
            "files": files,
            "inputs": [],
            "config": {"sequence_length": 64},
            "execution": {},
            "created_at": "2026-01-01T00:00:00Z",
            "ledger": ledger,
        }
    )


def test_tokenize_writes_labels_and_masks_and_kto_trains_on_them_next_to_pairs(tmp_path: Path) -> None:
    tokens, manifests, metrics = tokens_of(tmp_path)
    alone = tokens.unpaired(Split.TRAIN)
    assert [alone[index].is_desirable for index in range(len(alone))] == [True, False]  # the third is too long
    text = tokens.tokenizer().decode(alone[1].sequence.ids[alone[1].sequence.loss_mask == 1].tolist())
    assert text.startswith("A cat.")
    account = manifests["tokens"].ledger["train"]["unpaired"]
    assert (account["in"], account["kept"], account["dropped.longer_than_context"], account["desirable"]) == (
        3,
        2,
        1,
        1,
    )
    assert metrics["tokens/unpaired"] == 2
    assert tokens.unpaired_sources(Split.TRAIN).names == ("thumbs",)

    config = CONFIGS[Stage.DPO].model_copy(update={"loss": KTOLoss()})
    assert isinstance(config, DPOConfig)
    planned = planned_examples(tokens, config)
    pairs = len(tokens.pairs(Split.TRAIN))
    assert sorted(planned.order.tolist()) == list(range(2 * pairs + 2))
    assert planned.ledger["unpaired"] == 2

    checks = [
        *tokenized(evidence(manifests["tokens"], curated=manifests["curated"])),
        *recounted(evidence(manifests["tokens"])),
        *trained_on(evidence(manifest_of(Stage.DPO, planned.ledger, {}), tokens=manifests["tokens"])),
    ]
    mine = {check.name: check.outcome for check in checks if "unpaired" in check.name}
    assert mine == dict.fromkeys(
        [
            *(f"ledger_{split}_unpaired" for split in Split),
            *(f"conserves_{split}_unpaired_{unit}" for split in Split for unit in ("rows", "tokens")),
            *(f"files_{split}_unpaired" for split in Split),
            "ledger_unpaired",
        ],
        Outcome.PASSED,
    )
    lost = {**planned.ledger, "unpaired": 1}
    (check,) = (
        check
        for check in trained_on(evidence(manifest_of(Stage.DPO, lost, {}), tokens=manifests["tokens"]))
        if check.name == "ledger_unpaired"
    )
    assert check.outcome is Outcome.FAILED


def evidence(manifest: Manifest, **inputs: Manifest) -> Evidence:
    return Evidence(
        manifest=manifest, inputs=inputs, unreadable={}, first_row=None, report=None, meta={"dtype": "uint16"}
    )


THUMBS_URI = "s3://b/thumbs.jsonl#format=unpaired"


def test_only_kto_may_be_given_single_responses() -> None:
    with pytest.raises(ConfigError, match=r"\['s3://b/thumbs.jsonl'\] have format=unpaired.*dpo.loss.kind='sigmoid'"):
        resolve({"recipe": "tiny", "alignment": "dpo", "preferences": [THUMBS_URI]})
    with pytest.raises(ConfigError, match=r"has no stage dpo"):
        resolve({"recipe": "tiny", "alignment": "ppo", "preferences": [THUMBS_URI, "s3://b/pairs.jsonl"]})
    kto = {"dpo.loss.kind": "kto"}
    config = resolve({"recipe": "tiny", "alignment": "dpo", "preferences": [THUMBS_URI], "overrides": kto})
    assert [source.is_unpaired for source in config.curate.preference_sources] == [True]
    # data for a later run may be made before its loss is chosen
    assert resolve({"recipe": "tiny", "last_stage": "tokenize", "preferences": [THUMBS_URI]})


def test_a_stage_that_trains_on_pairs_needs_some_next_to_them() -> None:
    kto = {"dpo.loss.kind": "kto"}
    with pytest.raises(ConfigError, match=r"all of .* have format=unpaired, and reward trains on pairs"):
        resolve({"recipe": "tiny", "alignment": "both", "preferences": [THUMBS_URI], "overrides": kto})
    assert resolve(
        {"recipe": "tiny", "alignment": "both", "preferences": [THUMBS_URI, "s3://b/pairs.jsonl"], "overrides": kto}
    )


def test_their_weight_counts_in_dpo_alone() -> None:
    config = resolve(
        {
            "recipe": "tiny",
            "alignment": "both",
            "preferences": [f"{THUMBS_URI}&weight=0.3", "s3://b/pairs.jsonl#weight=0.7"],
            "overrides": {"dpo.loss.kind": "kto"},
        }
    )
    assert [(entry.source, entry.weight) for entry in config.dpo.mixture] == [
        ("s3://b/thumbs.jsonl", 0.3),
        ("s3://b/pairs.jsonl", 0.7),
    ]
    assert [entry.source for entry in config.reward.mixture] == ["s3://b/pairs.jsonl"]


def test_labels_of_two_responses_are_no_option_of_theirs() -> None:
    with pytest.raises(ConfigError, match="has format=unpaired, where a label is of one response"):
        resolve({"recipe": "tiny", "preferences": [f"{THUMBS_URI}&first=1&second=0"]})
