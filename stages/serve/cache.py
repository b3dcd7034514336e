"""Keys and values of several answers in one cache of transformers: rows join, leave and multiply.

A row's own tokens stand at the right end, padding before them is masked out. The buffers grow by blocks, so that a step
writes one column instead of copying all earlier ones.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

_BLOCK = 256
"""Columns that a buffer grows by."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer as a view of larger buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._grow(key_states, value_states, start, end)
        assert self._buffers is not None
        keys, values = self._buffers
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def _grow(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> None:
        width = -(-end // _BLOCK) * _BLOCK
        made = []
        for states, earlier in ((key_states, self.keys), (value_states, self.values)):
            buffer = states.new_empty(*states.shape[:-2], width, states.shape[-1])
            if start and earlier is not None:
                buffer[..., :start, :] = earlier
            made.append(buffer)
        self._buffers = (made[0], made[1])

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these keys and values from now on."""
        self.keys, self.values, self._buffers = keys, values, None


def new_cache(model: Any) -> Any:
    """An empty cache: of growing layers where the model has plain attention only, else the one it wants."""
    cache: Any = DynamicCache(config=model.config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def is_plain(cache: Any) -> bool:
    """Whether rows can join, leave and multiply. In other caches there is one row, so they never have to."""
    return all(type(layer) is GrowingLayer for layer in cache.layers)


def _layers(cache: Any) -> list[Any]:
    """Those that hold something: layers may share what an earlier one holds."""
    return [layer for layer in cache.layers if layer.get_seq_length()]


def kept_rows(cache: Any, rows: Tensor, *, padding: int) -> None:
    """Keep these rows alone, without their first `padding` columns."""
    for layer in _layers(cache):
        layer.replace(layer.keys[rows][..., padding:, :], layer.values[rows][..., padding:, :])


def joined(cache: Any, other: Any, *, length: int) -> None:
    """Append the rows of another cache; both become `length` columns wide by zeros on the left."""
    for layer, theirs in zip(_layers(cache), _layers(other), strict=True):
        layer.replace(
            torch.cat([_widened(layer.keys, length), _widened(theirs.keys, length)]),
            torch.cat([_widened(layer.values, length), _widened(theirs.values, length)]),
        )


def _widened(states: Tensor, length: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))


def repeated(cache: Any, count: int) -> None:
    """Make `count` equal rows out of one."""
    if count == 1:
        return
    for layer in _layers(cache):
        layer.replace(layer.keys.repeat_interleave(count, dim=0), layer.values.repeat_interleave(count, dim=0))
