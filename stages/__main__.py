"""`python -m stages <config uri>`: one stage, start to manifest. This is the entry point of every Ray job.

The exit code tells Airflow the category of a failure even when the object store cannot be reached; the details are in
`failure.json`.
"""

import sys

from stages.config.errors import ExitCode
from stages.config.gate_records import GateRequest
from stages.config.graph import Stage
from stages.job.context import Verb
from stages.job.ending import end
from stages.job.runner import run_stage


def verb_of(stage: Stage) -> Verb:
    """Return the function that does a stage's work.

    Each is imported only when its stage runs: training libraries take seconds, and a cache hit needs none of them.
    """
    match stage:
        case Stage.CONVERT:
            from stages.convert import run
        case Stage.CONSTITUTION:
            from stages.constitution import run
        case Stage.SYNTHESIZE:
            from stages.synthesize import run
        case Stage.CURATE:
            from stages.curate import run
        case Stage.TOKENIZE:
            from stages.tokenize import run
        case Stage.PRETRAIN:
            from stages.pretrain import run
        case Stage.SFT:
            from stages.sft import run
        case Stage.REWARD | Stage.GOLD:  # one objective, on two halves of the pairs
            from stages.reward import run
        case Stage.PPO:
            from stages.ppo import run
        case Stage.DPO:
            from stages.dpo import run
        case Stage.EVALUATE:
            from stages.evaluate import run
        case Stage.PROMOTE:
            from stages.promote import run
        case Stage.REPORT:
            from stages.report import run
        case Stage.RESPOND:
            from stages.respond import run
        case Stage.COMPARE:
            from stages.compare import run
        case Stage.RATE:
            raise AssertionError("stage `rate` has no job: people rate, and an Airflow task publishes their answers")
    return run


def _examine(request: GateRequest) -> None:
    from stages.gate import examine_early

    examine_early(request)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m stages <config uri>\n")
        return ExitCode.CONFIG
    return run_stage(arguments[0], verb_of, examine=_examine)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
