"""`python -m infra up|down|status|logs|env|demo|doctor|gc|backup|restore|rollback`: what the Makefile calls."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from infra.doctor import doctor
from infra.environment import client_environment
from infra.layout import Layout, StackSecrets
from infra.stack import Stack, StackError, login_lines
from stages.config.text import byte_size


def main() -> int:
    arguments = _parser().parse_args()
    stack = Stack(Layout.of_environment(), say=lambda line: print(f"  {line}", flush=True))
    try:
        match arguments.command:
            case "up":
                return up(stack)
            case "down":
                stack.down()
                return 0
            case "status":
                return status(stack)
            case "logs":
                return logs(stack, arguments.component)
            case "env":
                return environment(stack)
            case "doctor":
                return doctor(settings(stack, of_environment=arguments.environment), say=print)
            case "gc":
                os.environ.update(settings(stack, of_environment=arguments.environment))
                return garbage(arguments)
            case "backup" | "restore":
                from infra.backup_command import keep

                keep(stack, arguments.command, arguments.folder, postgres=arguments.postgres)
                return 0
            case "rollback":
                from infra.rollback import rollback

                return rollback(stack, run_name=arguments.run_name, reason=arguments.reason)
            case _:
                from infra.demo import demo

                return demo(stack, recipe=arguments.recipe, params=arguments.params)
    except BrokenPipeError:  # the reader has closed the pipe, as in `make status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        way_out = "; `make up` continues from here, `make down` stops what runs"
        print(f"interrupted{way_out if arguments.command in ('up', 'down', 'demo') else ''}", file=sys.stderr)
        return 130
    except sqlite3.Error as error:
        print(f"error: a database in {stack.layout.home}: {error}; is its disk full?", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _in_words(error: OSError) -> str:
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    match error.errno:
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return f"{what}; set ATHANOR_HOME to a folder that you may write to"
        case errno.ENOSPC | errno.EDQUOT:
            return f"{what}; make room, or set ATHANOR_HOME to a folder on another disk"
        case _:
            return what


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra", description="The local stack.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start what is not running, wait until healthy")
    commands.add_parser("down", help="stop exactly what `up` started")
    commands.add_parser("status", help="state and memory of every component")
    commands.add_parser("logs", help="follow logs").add_argument("component", nargs="?", default="*")
    commands.add_parser("env", help='shell lines that point programs at the stack: eval "$(python -m infra env)"')
    asked = commands.add_parser("doctor", help="check object store, Airflow, Ray and MLflow, and say what to do")
    _may_leave_the_stack(asked)
    garbage = commands.add_parser("gc", help="list what is no longer needed in the store; with --delete, delete it")
    garbage.add_argument("--delete", action="store_true", help="delete what is listed")
    garbage.add_argument("--keep-days", type=float, default=30.0, help="keep younger runs, artifacts and checkpoints")
    garbage.add_argument("--unfinished-hours", type=float, default=24.0, help="keep younger unfinished uploads")
    vouched = "confirm that no model of this store is registered, although some were promoted"
    garbage.add_argument("--nothing-registered", action="store_true", help=vouched)
    _may_leave_the_stack(garbage)
    for name, help_ in (("backup", "copy databases, keys and artifact store"), ("restore", "put a backup back")):
        keeping = commands.add_parser(name, help=help_)
        keeping.add_argument("folder", type=Path)
        postgres = "Postgres by libpq's variables, and ARTIFACT_STORE, instead of the local stack"
        keeping.add_argument("--postgres", action="store_true", help=postgres)
    back = commands.add_parser("rollback", help="make the previous champion of a run name champion again")
    back.add_argument("run_name", help="whose champion is taken back: <run name>-aligned")
    back.add_argument("--reason", required=True, help="why; it is kept with the model")
    demo = commands.add_parser("demo", help="run llm_pipeline and show it live")
    demo.add_argument("--recipe", default="demo")
    demo.add_argument("--params", type=_json_object, default={}, help="JSON object of trigger form fields")
    return parser


def _may_leave_the_stack(parser: argparse.ArgumentParser) -> None:
    help_ = "the servers that the environment names, even if a local stack runs"
    parser.add_argument("--environment", action="store_true", help=help_)


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"alignment": "dpo"}}, got {text!r}')
    return value


def up(stack: Stack) -> int:
    record = stack.up()
    print("\n".join(login_lines(stack.layout, record)))
    return 0


def status(stack: Stack) -> int:
    """Exit status 3 when something is not healthy, as service managers do."""
    record = stack.record()
    total, sick = 0, 0
    for program, missing, memory in stack.programs(record):
        total += memory
        sick += missing is not None
        since = f"since {time.strftime('%H:%M:%S', time.localtime(program.started_at))}" if program.pid else ""
        print(f"{program.name:<14} {missing or 'healthy':<28} {since:<16} {byte_size(memory):>10}")
    print(f"{'':<60} {byte_size(total):>10}")
    print("\n".join(login_lines(stack.layout, record)))
    return 3 if sick else 0


def logs(stack: Stack, component: str) -> int:
    files = sorted(stack.layout.logs.glob(f"{component}.log"))
    if not files:
        names = ", ".join(sorted(file.stem for file in stack.layout.logs.glob("*.log"))) or "none yet"
        raise StackError(f"no log of {component!r}; there are: {names}")
    try:
        return subprocess.call(["tail", "-n", "20", "-F", *map(str, files)])
    except KeyboardInterrupt:
        return 0


def environment(stack: Stack) -> int:
    record = stack.record()
    secrets = StackSecrets.load_or_generate(stack.layout)
    for name, value in client_environment(record, secrets).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def settings(stack: Stack, *, of_environment: bool) -> dict[str, str]:
    """Addresses and logins of the running local stack over those of the environment, or the environment's alone."""
    try:
        record = None if of_environment else stack.record()
    except StackError:
        record = None
    if record is None:
        return dict(os.environ)
    ours = client_environment(record, StackSecrets.load_or_generate(stack.layout))
    return {**os.environ, **ours, "AIRFLOW_API_URL": record.airflow_url}


def garbage(arguments: argparse.Namespace) -> int:
    from infra.garbage import collect
    from stages.artifacts.retention import Policy

    if not os.environ.get("ARTIFACT_STORE"):
        raise StackError(
            "ARTIFACT_STORE is not set and no local stack runs; run `make up`, or set ARTIFACT_STORE to file:///folder "
            "or s3://bucket/prefix"
        )
    policy = Policy(
        keep_days=arguments.keep_days,
        unfinished_hours=arguments.unfinished_hours,
        nothing_registered=arguments.nothing_registered,
    )
    return collect(policy, remove=arguments.delete, say=print)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
