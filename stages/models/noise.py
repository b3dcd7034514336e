"""NEFTune: noise on the embeddings of instruction data, which makes answers longer and better.

Jain et al. 2023 (arXiv:2310.05914): uniform in [-1, 1], times alpha / sqrt(L H) for a sequence of L tokens. The noise
of a row is drawn from (seed, place of the row in the training order) alone, so it is the same after a resume and in
every layout.

Shape legend: B rows (one), T positions, H hidden size.
"""

import numpy as np
import torch
from torch import Tensor

from stages.data.tokens.packing import Packed


def embedding_noise(batch: Packed, places_BT: Tensor, *, alpha: float, seed: int, hidden_size: int) -> Tensor:
    """Return noise of shape (B, T, H); L is the length of the packed sequence, not of its row.

    `places_BT` says for every token which row of the training order it came with.
    """
    device = batch.input_ids_BT.device
    rows = []
    places, lengths = torch.unique_consecutive(places_BT.flatten(), return_counts=True)
    for place, length in zip(places.tolist(), lengths.tolist(), strict=True):
        key = int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])
        generator = torch.Generator(device).manual_seed(key)
        rows.append(torch.rand(length, hidden_size, generator=generator, device=device))
    noise_BTH = 2 * torch.cat(rows)[None] - 1
    segments_BT = batch.segment_ids_BT
    lengths_BT = torch.bincount(segments_BT.flatten(), minlength=batch.num_segments)[segments_BT]
    return noise_BTH * (alpha / (lengths_BT * hidden_size).sqrt())[..., None]
