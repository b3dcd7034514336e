"""Pretraining: next-token prediction on packed documents, from random weights or on from a base model."""

import math

import numpy as np
from transformers.modeling_utils import PreTrainedModel

from stages.config.graph import BASE_MODEL
from stages.config.train import PretrainConfig
from stages.data.tokens.rows import DocumentRows
from stages.data.tokens.views import Split, TokensArtifact, require
from stages.job.context import StageContext, StageOutcome
from stages.models.build import load_causal_lm, new_causal_lm
from stages.models.experts import routing_of
from stages.train.next_token import Extras, NextTokenObjective
from stages.train.plan import shuffled
from stages.train.run import Prepared, train_stage


def run(context: StageContext) -> StageOutcome:
    return train_stage(context, prepare)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Model from the config, or the given one as it is; rows in an order that follows from the seed."""
    config = context.config
    assert isinstance(config, PretrainConfig)
    row_length = tokens.sequence_length
    rows = DocumentRows(tokens.documents(Split.TRAIN), row_length)
    require(len(rows), "training rows", advice=f"The text must hold at least {row_length} tokens.")
    policy = _start(context, config, tokens)
    order = _order(len(rows), num_rows=_num_rows(len(rows), row_length, config), seed=config.seed)
    ledger = {
        "tokens_available": tokens.documents(Split.TRAIN).num_items,
        "tokens_trained": len(order) * row_length,
        "rows_available": len(rows),
        "rows_trained": len(order),
        "epochs": round(len(order) / len(rows), 3),
    }
    return Prepared(
        parts={"policy": policy},
        objective=lambda engine: NextTokenObjective(
            rows,
            order,
            heldout=DocumentRows(tokens.documents(Split.HELDOUT), row_length),
            global_batch_size=config.global_batch_size,
            micro_batch_size=context.execution.micro_batch_size,
            eval_items=config.eval_items,
            tokens_per_step=config.global_batch_size * row_length,
            extras=Extras(z_coefficient=config.z_loss_coefficient, routing=routing_of(policy)),
        ),
        exported="policy",
        ledger=ledger,
    )


def _start(context: StageContext, config: PretrainConfig, tokens: TokensArtifact) -> PreTrainedModel:
    if context.has_base_model:
        return load_causal_lm(context.given_dir(BASE_MODEL), tokens)
    return new_causal_lm(config.model, tokens, seed=config.seed)


def _num_rows(available: int, row_length: int, config: PretrainConfig) -> int:
    """As many as `max_tokens` and `max_epochs` both allow, and one at least."""
    by_epochs = [math.floor(available * config.max_epochs)] if config.max_epochs else []
    return max(1, min([config.max_tokens // row_length, *by_epochs]))


def _order(available: int, *, num_rows: int, seed: int) -> np.ndarray:
    """Repeat the data, reshuffled, until there are enough rows."""
    orders = [shuffled(available, seed=seed, epoch=epoch) for epoch in range(math.ceil(num_rows / available))]
    return np.concatenate(orders)[:num_rows]
