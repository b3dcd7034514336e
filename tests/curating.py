"""Curation of small sources in a folder of a test: runs the real stage, and reads what it published."""

import gzip
import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from stages import curate
from stages.config.curate import CurateConfig
from stages.config.execution import ExecutionConfig
from stages.job.context import StageOutcome

PLAIN: dict[str, Any] = {"planted": 0, "toxicity": "none", "instructions": (), "preferences": ()}
"""Settings of a source whose documents all pass."""


def curated(
    tmp_path: Path, name: str = "out", workers: int = 1, previous: Path | None = None, **settings: Any
) -> tuple[StageOutcome, Path]:
    output, work = tmp_path / name, tmp_path / f"{name}.work"
    output.mkdir()
    context = SimpleNamespace(
        config=CurateConfig.model_validate(settings),
        execution=ExecutionConfig(cpus_per_worker=workers),
        work_dir=work,
        output_dir=output,
        inputs={"previous": SimpleNamespace(fingerprint="earlier")} if previous else {},
        input_dir=lambda role: previous,
        progress=lambda done, total, unit="", **numbers: None,
    )
    return curate.run(cast(Any, context)), output


def rows_of(path: Path) -> list[dict[str, Any]]:
    files = [path] if path.suffix == ".gz" else sorted(path.glob("*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.open(file, "rt", encoding="utf-8")]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


_VOCABULARY = """
river mill letter city house hill winter summer harbour sailor teacher garden window kitchen village bridge market
horse wagon forest church doctor lawyer brother sister mother father captain soldier farmer widow orphan candle
lantern mirror curtain chimney stable barn meadow valley mountain storm thunder shadow silence promise secret journey
supper breakfast morning evening midnight holiday wedding funeral fortune bargain quarrel friend stranger neighbour
carpenter butcher painter singer poet banker clerk servant beggar prince palace prison castle tower island ocean beach
anchor ladder hammer needle button pocket basket bottle barrel saddle feather leather copper silver marble timber
orchard cherry apple potato onion pepper butter cheese honey coffee tobacco pillow blanket jacket collar slipper
"""
_WORDS = _VOCABULARY.split()


def prose(seed: int, sentences: int = 6) -> str:
    """English that no two seeds share and that repeats nothing."""
    rng = random.Random(seed)
    shapes = (
        "The {} of the {} was taken to the {} before anybody in the {} had heard of that {}.",
        "With a {} and some {} they have crossed the {} to be near the {}.",
        "Nobody believes that the {} can be seen from the {} when the {} is closed.",
        "It was her {} who had brought the {} to us, and that is why we never sold the {}.",
    )
    lines = [rng.choice(shapes) for _ in range(sentences)]
    return " ".join(line.format(*rng.sample(_WORDS, line.count("{}"))) for line in lines)
