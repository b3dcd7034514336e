"""`python -m tests.alignment FOLDER [--seeds 0,1,2] [--methods dpo,ppo] [--threads 1]`: train, measure, print a table.

What is finished in FOLDER is not trained again, so a long measurement can be made in pieces.
"""

import argparse
import logging
import os
from pathlib import Path

import torch

from tests.alignment.task import METHODS, Task, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.alignment")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS), help="empty: the reward model alone")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(chosen.threads)
    os.environ["ATHANOR_SCRATCH"] = str(chosen.folder / "scratch")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    scored, measured = {}, []
    for seed in map(int, chosen.seeds.split(",")):
        task = Task(chosen.folder / f"seed-{seed}", seed)
        scored[seed] = task.score()
        for method in filter(None, chosen.methods.split(",")):
            measured.append(task.measure(method))
            print(table(scored, measured), flush=True)
    print(table(scored, measured))


if __name__ == "__main__":
    main()
