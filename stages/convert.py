"""From a given GGUF file to a Hugging Face model: weights out of their blocks, tokenizer and chat template from its
header. The other stages of the run read this artifact wherever they would read the given model.
"""

import json
from pathlib import Path

from stages.config.convert import ConvertConfig
from stages.config.graph import BASE_MODEL
from stages.job.context import StageContext, StageOutcome
from stages.models.gguf import convert_gguf
from stages.models.given import gguf_file


def run(context: StageContext) -> StageOutcome:
    """Write the model; the ledger says what the file holds and where it comes from."""
    config = context.config
    assert isinstance(config, ConvertConfig)
    (source,) = (source for source in context.sources if source.role == BASE_MODEL)
    context.progress(0, 1, "model", phase="fetch")
    file = gguf_file(source.uri, context.work_dir.parent / "cache", revision=source.digest)
    context.progress(0, 1, "model", phase="convert")
    facts = convert_gguf(file, context.output_dir, dtype=config.dtype)
    context.progress(1, 1, "model")
    metrics = {
        "convert/parameters": float(count_weights(context.output_dir)),
        "convert/bytes_in": float(file.stat().st_size),
    }
    return StageOutcome(metrics=metrics, ledger=facts)


def count_weights(folder: Path) -> int:
    """Return how many weights the safetensors of a folder hold, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for length in entry["shape"]:
                    size *= length
                total += size
    return total
