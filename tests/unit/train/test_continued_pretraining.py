"""Pretraining that goes on from a given model, with a real tiny model."""

import shutil
from pathlib import Path

import torch

from stages import pretrain
from stages.config.curate import CurateConfig
from stages.config.graph import Stage
from stages.config.pipeline import BASE_MODEL
from stages.config.request import ArtifactRef
from stages.config.tokens import TokenizeConfig
from stages.data.tokens.views import TokensArtifact
from stages.models.build import load_causal_lm
from tests.small_world import CONFIGS, make_context, make_models, make_tokens, published, write_curated


def prepared(home: Path, inputs: dict[str, ArtifactRef], **changes: float):
    config = CONFIGS[Stage.PRETRAIN].model_copy(update=changes)
    context = make_context(home, Stage.PRETRAIN, config, inputs)
    tokens = TokensArtifact(context.input_dir("tokens"))
    return pretrain.prepare(context, tokens), context, tokens


def test_it_starts_from_the_given_weights_and_the_model_is_part_of_its_identity(tmp_path: Path):
    data = make_tokens(tmp_path)
    base = make_models(tmp_path, data)[Stage.SFT]["model"]
    fresh, from_scratch, tokens = prepared(tmp_path, {"tokens": data})
    further, context, _ = prepared(tmp_path, {"tokens": data, BASE_MODEL: base})
    given = load_causal_lm(context.input_dir(BASE_MODEL), tokens).state_dict()
    torch.testing.assert_close(dict(further.parts["policy"].state_dict()), dict(given), rtol=0, atol=0)
    assert not torch.equal(
        fresh.parts["policy"].state_dict()["model.embed_tokens.weight"], given["model.embed_tokens.weight"]
    )
    assert context.fingerprint != from_scratch.fingerprint


def test_few_documents_are_not_repeated_more_often_than_max_epochs_allows(tmp_path: Path):
    data = make_tokens(tmp_path)
    unlimited, _, _ = prepared(tmp_path, {"tokens": data}, max_tokens=10**6)
    twice, _, _ = prepared(tmp_path, {"tokens": data}, max_tokens=10**6, max_epochs=2.0)
    assert unlimited.ledger["epochs"] > 10
    assert twice.ledger["rows_trained"] == 2 * twice.ledger["rows_available"]


def test_new_pairs_without_new_text_reach_sft_with_the_base_models_tokenizer(tmp_path: Path):
    from stages import sft, tokenize

    base = make_models(tmp_path, make_tokens(tmp_path))[Stage.SFT]["model"]
    curate = make_context(tmp_path / "later", Stage.CURATE, CurateConfig())
    write_curated(curate.output_dir)
    shutil.rmtree(curate.output_dir / "documents" / "train")
    config = TokenizeConfig(sequence_length=64, max_prompt_length=32)
    context = make_context(tmp_path / "later", Stage.TOKENIZE, config, {"curated": published(curate), BASE_MODEL: base})
    assert tokenize.run(context).metrics["tokens/train"] == 0
    data = published(context)
    later = make_context(tmp_path / "later", Stage.SFT, CONFIGS[Stage.SFT], {"tokens": data, BASE_MODEL: base})
    prepared = sft.prepare(later, TokensArtifact(later.input_dir("tokens")))
    assert prepared.ledger["conversations"] > 0
