"""NEFTune: noise on the embeddings of instruction data, which makes answers longer and better.

Jain et al. 2023 (arXiv:2310.05914): uniform in [-1, 1], times alpha / sqrt(L H) for a sequence of L tokens. The noise
of a row is drawn from (seed, place of the row in the training order) alone, so it is the same after a resume and in
every layout.

Shape legend: B rows, T positions, H hidden size.
"""

import numpy as np
import torch
from torch import Tensor

from stages.data.packing import Packed


def embedding_noise(batch: Packed, places_B: Tensor, *, alpha: float, seed: int, hidden_size: int) -> Tensor:
    """Return noise of shape (B, T, H), none on padding; L is the length of the packed sequence, not of its row."""
    device, length = batch.input_ids_BT.device, batch.input_ids_BT.shape[1]
    rows = []
    for place in places_B.tolist():
        key = int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])
        generator = torch.Generator(device).manual_seed(key)
        rows.append(torch.rand(length, hidden_size, generator=generator, device=device))
    noise_BTH = 2 * torch.stack(rows) - 1
    return noise_BTH * (alpha / (_sequence_lengths(batch) * hidden_size).sqrt())[..., None]


def _sequence_lengths(batch: Packed) -> Tensor:
    """Length of the sequence that each token belongs to, shape (B, T); infinite for padding."""
    segments_BT = batch.segment_ids_BT
    is_token = segments_BT >= 0
    lengths_S = torch.bincount(segments_BT[is_token], minlength=batch.num_segments).float()
    lengths_BT = torch.full(segments_BT.shape, torch.inf, device=segments_BT.device)
    lengths_BT[is_token] = lengths_S[segments_BT[is_token]]
    return lengths_BT
