"""What the memory of each training was made of."""

from collections.abc import Sequence

from stages.config.memory import TrainingMemory, recorded_memory
from stages.config.request import Manifest
from stages.config.text import byte_size
from stages.reporting.tables import Cell, Table, shown, text

HEAD = ("parameters", "gradients", "optimizer", "frozen models", "activations and the rest", "peak")
NOTE = (
    "Bytes of the tensors that the main worker held; the peak is what PyTorch's allocator counted on a GPU, and what "
    "the kernel counted for the whole process on a CPU. The rest is what is left of the peak without the libraries: "
    "activations, rollouts, copies while loading. A dash: the process had held more before the training began."
)


def memory_cells(memory: TrainingMemory) -> list[Cell]:
    """One cell for each name in `HEAD`, with its share of the peak where it has one."""
    found = {**memory.components, "peak": memory.peak}
    return [_cell(found.get(name), memory.peak if name != "peak" else 0) for name in HEAD]


def memory_table(manifests: Sequence[Manifest]) -> Table | None:
    """One row for each training that measured it."""
    rows = []
    for manifest in manifests:
        memory = recorded_memory(manifest.execution)
        if memory is not None:
            rows.append((text(manifest.stage.value), text(memory.device), *memory_cells(memory)))
    return Table("Memory of the trainings", ("stage", "device", *HEAD), tuple(rows), NOTE) if rows else None


def _cell(size: int | None, peak: int) -> Cell:
    if size is None:
        return shown("–")
    return shown(byte_size(size), share=min(1.0, size / peak) if peak else None)
