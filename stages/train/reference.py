"""Log-probabilities under the frozen reference of a preference loss, computed once and kept in the store.

The policy starts as the reference, so it computes them itself before its first step: no second copy of the model is in
memory. They depend on the model, the tokens, which pairs are used and the number format, and so does their key.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor, nn

from stages.artifacts.manifests import canonical_json
from stages.config.graph import BASE_MODEL
from stages.data.tokens.packing import Packed, TokenSequence
from stages.data.tokens.views import Pair
from stages.job.context import StageContext
from stages.models.forward import target_logprobs
from stages.models.precision import compute_dtype
from stages.train.engine import Engine
from stages.train.pairs import Pairs, PairSteps
from stages.train.plan import batches, in_step, share

logger = logging.getLogger(__name__)

FIELD = "ref_logprobs"
# Bounds the pairs that are packed, and in memory, at once.
_PAIRS_AT_ONCE = 256

Sides = tuple[np.ndarray, np.ndarray]
"""Log-probabilities of the targets of chosen and rejected."""


@dataclass(frozen=True)
class WithReference:
    """Pairs whose tokens carry the reference's log-probabilities in the field `ref_logprobs`."""

    pairs: Pairs
    logprobs: Mapping[int, Sides]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        pair, (chosen, rejected) = self.pairs[index], self.logprobs[index]
        return Pair(_carrying(pair.chosen, chosen), _carrying(pair.rejected, rejected))


@dataclass(frozen=True)
class Reference:
    """Where log-probabilities come from; valid only before the policy's first step, while it is the reference."""

    context: StageContext
    engine: Engine
    steps: PairSteps
    """How pairs become micro-batches."""
    of: str = ""
    """What stands in the place of pairs, where something else does."""

    def carried_by(self, pairs: Pairs, indices: np.ndarray, *, split: str) -> WithReference:
        """Return the pairs with log-probabilities for `indices`."""
        key = f"reference-logprobs/{self._identity(indices, split)}.safetensors"
        store = self.context.store
        # Ranks may look at the store at different moments, and a forward pass needs all of them: all compute, or none.
        if self.engine.max(0.0 if store.exists(key) else 1.0) == 0.0:
            logger.info("the reference's log-probabilities of %d %s pairs are in the store", len(indices), split)
            return WithReference(pairs, _unpacked(load(store.read_bytes(key))))
        found = self._compute(pairs, indices) if len(indices) else {}
        if self.engine.is_main:
            # Whoever lost the lease may be running beside its successor, and must write nothing any more.
            self.context.check_lease()
            store.write_bytes(key, save(_packed(found)))
        return WithReference(pairs, found)

    def _identity(self, indices: np.ndarray, split: str) -> str:
        config: Any = self.context.config
        # Neither engine nor number of ranks: they change the last bits only, and a resume on fewer ranks must find it.
        identity = {
            "model": self.context.content_of("model", BASE_MODEL),
            "tokens": self.context.inputs["tokens"].digest,
            "split": split,
            "pairs": hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest(),
            "dtype": str(compute_dtype(self.engine.device, config.precision)),
            "quantization": config.lora.quantization,
            **({"of": self.of} if self.of else {}),
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    def _compute(self, pairs: Pairs, indices: np.ndarray) -> dict[int, Sides]:
        mine = share(indices, rank=self.engine.rank, world_size=self.engine.world_size)
        found: list[tuple[int, Sides]] = []
        for part, counted in in_step(self.engine, batches(mine, _PAIRS_AT_ONCE), spare=indices[:1]):
            values = self._values(self.steps.micro_batches(pairs, part))
            if counted:
                found += [(int(index), sides) for index, sides in zip(part, values, strict=True)]
        return dict(sorted(self.engine.gather(found), key=lambda item: item[0]))

    def _values(self, micro_batches: list[Packed]) -> list[Sides]:
        """Return the values of each pair's sides, in order."""
        segments: list[np.ndarray] = []
        spare = micro_batches[0]
        for batch, counted in in_step(self.engine, micro_batches, spare=spare):
            logprobs_N = self.engine.infer(_logprobs, batch).float().cpu().numpy()
            # Segments lie one after another in the batch, in order, so their counts cut the flat values apart.
            targets = batch.segment_ids_BT[batch.loss_mask_BT == 1]
            counts_S = torch.bincount(targets, minlength=batch.num_segments).numpy()
            segments += np.split(logprobs_N, np.cumsum(counts_S)[:-1]) if counted else []
        return list(zip(segments[0::2], segments[1::2], strict=True))


def _logprobs(parts: nn.ModuleDict, batch: Packed) -> Tensor:
    return target_logprobs(parts["policy"], batch).logprobs_N


def _carrying(sequence: TokenSequence, logprobs: np.ndarray) -> TokenSequence:
    counted = sequence.loss_mask == 1
    counted[0] = False  # nothing precedes the first token
    # One value a token, although only targets have one: fields are laid out, cut and moved together with the tokens.
    values = np.zeros(len(sequence.ids), dtype=np.float32)
    values[counted] = logprobs
    return replace(sequence, fields={**sequence.fields, FIELD: values})


def _packed(found: Mapping[int, Sides]) -> dict[str, np.ndarray]:
    sides = [side for pair in found.values() for side in pair]
    return {
        "indices": np.array(list(found), dtype=np.int64),
        "lengths": np.array([len(side) for side in sides], dtype=np.int64),
        "logprobs": np.concatenate(sides) if sides else np.zeros(0, dtype=np.float32),
    }


def _unpacked(tensors: dict[str, np.ndarray]) -> dict[int, Sides]:
    sides = np.split(tensors["logprobs"], np.cumsum(tensors["lengths"])[:-1])
    return {int(index): (sides[2 * i], sides[2 * i + 1]) for i, index in enumerate(tensors["indices"])}
