"""Supervised fine-tuning: next-token prediction on conversations, loss on the assistant's tokens only."""

import numpy as np

from stages.config.graph import BASE_MODEL
from stages.config.train import SFTConfig
from stages.data.tokens.views import Split, TokensArtifact, require
from stages.job.context import StageContext, StageOutcome
from stages.models.build import load_causal_lm
from stages.models.experts import routing_of
from stages.models.lora import add_adapter
from stages.train.mixture import training_order
from stages.train.next_token import ConversationRows, Extras, NextTokenObjective
from stages.train.run import Prepared, train_stage


def run(context: StageContext) -> StageOutcome:
    return train_stage(context, prepare)


def prepare(context: StageContext, tokens: TokensArtifact) -> Prepared:
    """Start from the pretrained or the given base model."""
    config = context.config
    assert isinstance(config, SFTConfig)
    conversations, heldout = tokens.conversations(Split.TRAIN), tokens.conversations(Split.HELDOUT)
    require(len(conversations), "training conversations", advice="Give instruction data, or `derived`.")
    targets = conversations.num_targets
    mixture = training_order(tokens.conversation_sources(Split.TRAIN), targets, config)
    order = mixture.order
    rows = ConversationRows(conversations, order, tokens.sequence_length)
    start = load_causal_lm(context.model_dir("model", BASE_MODEL), tokens, lora=config.lora)
    policy = add_adapter(start, config.lora, seed=config.seed)
    objective = NextTokenObjective(
        rows,
        np.arange(len(rows)),
        heldout=ConversationRows(heldout, np.arange(len(heldout)), tokens.sequence_length),
        global_batch_size=config.global_batch_size,
        micro_batch_size=context.execution.micro_batch_size,
        eval_items=config.eval_items,
        extras=Extras(
            z_coefficient=config.z_loss_coefficient,
            noise_alpha=config.neftune_alpha,
            seed=config.seed,
            routing=routing_of(policy),
        ),
    )
    return Prepared(
        parts={"policy": policy},
        objective=lambda engine: objective,
        exported="policy",
        ledger={
            "conversations": len(conversations),
            "tokens_available": int(conversations.lengths.sum()),
            "targets_available": int(targets.sum()),
            "conversations_trained": len(order),
            "mixture": mixture.to_dict(),
            "rows": len(rows),
            "row_fill": round(float(conversations.lengths[order].sum()) / (len(rows) * tokens.sequence_length), 4),
        },
    )
