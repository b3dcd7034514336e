"""Where this process stands in the grid of processes, and how processes add up and exchange numbers.

The grid has three axes: `data` (other items of the step), `pipeline` (other layers), `tensor` (other slices of each
layer). Rank 0 is the first on all of them.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stages.config.errors import ConfigError

Item = TypeVar("Item")


class Axis:
    """The processes that differ from this one along one axis only."""

    def __init__(self, device: torch.device, *, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        """`group` None stands for all processes."""
        self.device, self.rank, self.size, self.group = device, rank, size, group

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sum each number over the axis, in float64."""
        # float64: token counts above 2**24 are not exact in float32.
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        return self.add_up(tensor).tolist()

    def max(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return float(tensor)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over the axis in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, items: list[Item]) -> list[Item]:
        """Concatenate the items of all, in the order of ranks."""
        if self.size == 1:
            return items
        parts: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items, group=self.group)
        return [item for part in parts for item in part]

    def from_last(self, item: Item) -> Item:
        """Return what the last process of the axis gave."""
        if self.size == 1:
            return item
        box: list[Any] = [item]
        dist.broadcast_object_list(box, group=self.group, group_src=self.size - 1)
        return box[0]

    def peer(self, rank: int) -> int:
        """The global rank of another process on the axis."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class Processes:
    """All processes of a training, talking over a gloo group of their own: usable from another thread than training's,
    and for what lies in main memory."""

    def __init__(self, *, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @staticmethod
    def all() -> "Processes":
        """Every process must call it."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return Processes()
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return Processes(rank=dist.get_rank(), size=dist.get_world_size(), group=group)

    def gather_to_main(self, item: Item) -> list[Item]:
        """Return every process's item, in the order of ranks, on rank 0; nothing elsewhere."""
        if self.size == 1:
            return [item]
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(item, parts, group=self._group, group_dst=0)
        return parts or []

    def gather(self, item: Item) -> list[Item]:
        """Return every process's item, in the order of ranks, everywhere."""
        if self.size == 1:
            return [item]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, item, group=self._group)
        return parts


class Grid:
    """The three axes through this process."""

    def __init__(self, device: torch.device, *, tensor: int = 1, pipeline: int = 1) -> None:
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if size % (tensor * pipeline):
            raise ConfigError(
                f"{size} workers cannot be dealt into tensor_parallel={tensor} x pipeline_parallel={pipeline}",
                advice=f"Use a multiple of {tensor * pipeline} workers.",
            )
        self.is_main = rank == 0
        self.processes = Processes.all()
        self.data_mesh: DeviceMesh | None = None
        """What FSDP shards over; None for all processes."""
        if tensor * pipeline == 1:
            self.data = Axis(device, rank=rank, size=size, group=None)
            self.pipeline = self.tensor = Axis(device, rank=0, size=1, group=None)
            return
        mesh = init_device_mesh(
            device.type, (size // (tensor * pipeline), pipeline, tensor), mesh_dim_names=("data", "pipeline", "tensor")
        )
        self.data_mesh = mesh["data"]
        self.data, self.pipeline, self.tensor = (
            Axis(device, rank=mesh.get_local_rank(name), size=mesh[name].size(), group=mesh.get_group(name))
            for name in ("data", "pipeline", "tensor")
        )
