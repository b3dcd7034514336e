"""What the tests of the stages that make data share: a model whose responses end, rows that were made, and a kill in
the middle."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.config.base import Config
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.tokens import PLAIN, TokenizeConfig
from stages.data.tokens.views import TokensArtifact
from stages.job.context import StageContext
from stages.models.build import new_causal_lm, save_model
from tests.judge_server import JudgeServer
from tests.judging import make_world
from tests.small_world import CONFIGS, MODEL, make_context, published

_CHILD = """
import sys
from importlib import import_module
from pathlib import Path
from stages.config.graph import Stage
from stages.config.pipeline import CONFIG_CLASSES
from tests.small_world import make_context
home, stage, module, name, settings = sys.argv[1:]
config = CONFIG_CLASSES[Stage(stage)].model_validate_json(Path(settings).read_text())
getattr(import_module(module), name)(make_context(Path(home), Stage(stage), config))
"""


def rows_of(context: StageContext, name: str) -> list[dict[str, Any]]:
    """The lines of a file that the stage has written."""
    return [json.loads(line) for line in (context.output_dir / f"{name}.jsonl").read_text().splitlines()]


def kill_after(
    requests: int,
    server: JudgeServer,
    make: Callable[[StageContext], Any],
    *,
    stage: Stage,
    config: Config,
    home: Path,
) -> int:
    """Run a stage in `home`, in a process of its own, that is killed once the server was asked so often; return how
    often it was."""
    home.mkdir(parents=True, exist_ok=True)
    settings, before = home / "config.json", len(server.asked)
    settings.write_text(config.model_dump_json())
    told = [str(home), stage.value, make.__module__, make.__name__, str(settings)]
    child = subprocess.Popen([sys.executable, "-c", _CHILD, *told])
    while len(server.asked) < before + requests and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return len(server.asked) - before


def random_model(home: Path, *, sequence_length: int, ending: float) -> ArtifactRef:
    """Publish a model of random weights whose responses end: how soon, `ending` says, with 8 to 12 after some ten
    tokens."""
    settings = TokenizeConfig(
        vocab_size=340, sequence_length=sequence_length, bpe_train_bytes=10_000, chat_template=PLAIN
    )
    world = make_world(home, settings)
    context = make_context(home, Stage.DPO, CONFIGS[Stage.DPO], world.inputs)
    tokens = TokensArtifact(context.input_dir("tokens"))
    model = new_causal_lm(MODEL, tokens, seed=7)
    with torch.no_grad():
        weight: Any = model.get_input_embeddings().weight
        shared = torch.full_like(weight[0], 0.02)
        weight += shared
        weight[tokens.eos_id] = ending * shared
    save_model(model, model.state_dict(), context.output_dir, tokens)
    return published(context)
