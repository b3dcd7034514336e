"""What a gate measures on a published model: the same in plain transformers, the same as in training, and worth using
as a reward model."""
