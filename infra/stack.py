"""Start, stop and inspect the local stack. `up` may be called at any time: it starts what is missing, replaces ports
that another process took while the stack was down, and ends processes that a crash left behind."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from infra import ports, processes
from infra.components import BIN, airflow_components, installed, mlflow_server, ray_head
from infra.environment import POOL, SLOTS, stack_environment
from infra.health import Health
from infra.layout import (
    DamagedStateError,
    Layout,
    StackRecord,
    StackSecrets,
    choose_runtime_dir,
    write_airflow_passwords,
)
from infra.plain_paths import plain
from infra.private import is_open
from infra.supervisor import ProgramState, Supervisor, last_lines
from stages.config.text import byte_size
from stages.job.scratch import scratch_home, sweep_scratch

START_SECONDS = 300
MOST_RESTARTS = 3
KEPT_RAY_SESSIONS = 3
KEPT_LOG_DAYS = 14
LEAST_FREE_BYTES = 256 * 1024**2  # databases, logs and Ray's session of one start; a stage needs more
FULL_BYTES = 16 * 1024**2  # with less, what failed has most likely failed for that, and could not log why

Say = Callable[[str], None]


class StackError(RuntimeError):
    """The stack could not do what was asked; the message is for the user and says what to do."""


class Stack:
    """One local stack, in the checkout's `.athanor/`."""

    def __init__(self, layout: Layout, say: Say) -> None:
        self.layout = layout
        self.say = say

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One `up` or `down` at a time, in a folder that other users cannot enter."""
        self.layout.close_to_others()
        if is_open(self.layout.home):
            self.say(f"warning: the file system of {self.layout.home} cannot keep others out; the login is in it")
        with (self.layout.home / "lock").open("w") as file:
            self._wait_for_lock(file.fileno(), "another `make up` or `make down` of this checkout is running")
            yield

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """One start at a time on this machine: ports are chosen seconds before they are taken, and two checkouts that
        start at once would choose the same ones."""
        lock = Path(tempfile.gettempdir()) / f"athanor-{os.getuid()}.starting"
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            yield  # another user put it there, who could let us wait for ever
            return
        try:
            if os.fstat(handle).st_uid == os.getuid():
                self._wait_for_lock(handle, "another checkout is starting its stack")
            yield
        finally:
            os.close(handle)

    def _wait_for_lock(self, handle: int, who: str) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.say(f"{who}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)

    def up(self) -> StackRecord:
        """Start whatever does not run and wait until all is healthy. Raises StackError with the reason."""
        with self._locked():
            begin = time.monotonic()
            record = self._own_record()
            runs = record is not None and Supervisor(self.layout, record).answers()
            if not runs and (left := self._end_all(record)):
                self.say(f"ended {len(left)} processes that an earlier stack left behind")
            secrets = StackSecrets.load_or_generate(self.layout)
            if record and runs:
                self._refuse_other_wishes(record)
                record = self._start(record, secrets)
            else:
                with self._starting():
                    record = self._start(self._prepare(secrets, record), secrets)
            self._settle(record, secrets)
            took = time.monotonic() - begin
            self.say(f"all healthy after {took:.0f} s" if took > 3 else "the stack runs and is healthy")
            return record

    def _own_record(self) -> StackRecord | None:
        """The record of the last start here. None also when it is damaged, which is said, and when it came with a copy
        of another checkout: that one's processes are not ours."""
        try:
            record = StackRecord.load(self.layout)
        except DamagedStateError as error:
            self.say(f"{error.what}; processes are found by their environment instead")
            return None
        return None if record and self._is_anothers(record) else record

    def _is_anothers(self, record: StackRecord) -> bool:
        if not record.home or record.home == str(self.layout.home.resolve()):
            return False
        try:  # a checkout that was moved is no longer where its record says
            original = StackRecord.model_validate_json((Path(record.home) / self.layout.record.name).read_bytes())
        except (OSError, ValueError):
            return False
        return original.stack_id == record.stack_id

    def _end_all(self, record: StackRecord | None) -> list[str]:
        """End every process of this stack, also those that no record tells of; what they were."""
        known = {record.stack_id} if record else set()
        homes = {self.layout.home, self.layout.home.resolve()}
        ids = known.union(*(processes.stacks_at(home) for home in homes))
        return [line for stack_id in sorted(ids) for line in processes.end_marked(stack_id)]

    def _refuse_other_wishes(self, record: StackRecord) -> None:
        wanted = os.environ.get("ARTIFACT_STORE", record.artifact_store)
        if wanted != record.artifact_store:
            raise StackError(
                f"the stack runs with ARTIFACT_STORE={record.artifact_store}, you ask for {wanted}; "
                "run `make down`, then `make up`"
            )
        if record.checkout and record.checkout != str(self.layout.checkout):
            raise StackError(
                f"the stack in {self.layout.home} runs the code of {record.checkout}, this is {self.layout.checkout}; "
                "run `make down`, then `make up`, or set another ATHANOR_HOME for this checkout"
            )

    def _prepare(self, secrets: StackSecrets, old: StackRecord | None) -> StackRecord:
        """Directories, ports and the record of a new start; ports stay those of the old one, for people's bookmarks."""
        layout = self.layout
        free = shutil.disk_usage(layout.home).free
        if free < LEAST_FREE_BYTES:
            raise StackError(
                f"the disk of {layout.home} has {byte_size(free)} left, a start needs {byte_size(LEAST_FREE_BYTES)}; "
                "make room, or set ATHANOR_HOME to another disk"
            )
        for directory in (layout.airflow, layout.mlflow / "artifacts", layout.store, layout.logs / "tasks"):
            directory.mkdir(parents=True, exist_ok=True)
        recorded = old.ports if old else {}
        assigned = ports.assign(recorded)
        for name, port in assigned.items():
            wanted = recorded.get(name, ports.PREFERRED[name])
            if port != wanted:
                holder = processes.listener_of(wanted)
                self.say(f"port {wanted} ({name}) is taken{f' by {holder}' if holder else ''}; using {port}")
        record = StackRecord(
            stack_id=uuid.uuid4().hex[:12],
            ports=assigned,
            runtime_dir=str(choose_runtime_dir(layout, old.runtime_dir if old else None)),
            artifact_store=os.environ.get("ARTIFACT_STORE") or layout.store.as_uri(),
            airflow_version=old.airflow_version if old and (layout.airflow / "airflow.db").exists() else "",
            home=str(layout.home.resolve()),
            checkout=str(layout.checkout),
        )
        record.save(layout)
        write_airflow_passwords(layout, secrets.admin_password)
        for database in layout.databases:
            # with a write-ahead log readers and the writer do not block each other, else "database is locked" is near
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        layout.close_to_others()  # again, for what is new
        self._prune(record)
        return record

    def _prune(self, record: StackRecord) -> None:
        """Delete old logs: Ray keeps those of every session and Airflow those of every day for ever."""
        sessions = sorted(d for d in record.ray_dir.glob("session_2*") if d.is_dir() and not d.is_symlink())
        for directory in sessions[: -KEPT_RAY_SESSIONS + 1]:
            shutil.rmtree(directory, ignore_errors=True)
        horizon = time.time() - KEPT_LOG_DAYS * 86_400
        for directory in (self.layout.logs / "dags").glob("20*"):
            if directory.stat().st_mtime < horizon:
                shutil.rmtree(directory, ignore_errors=True)

    def _start(self, record: StackRecord, secrets: StackSecrets) -> StackRecord:
        links = Path(record.runtime_dir)
        layout = self.layout.through_links(links)
        programs = plain(BIN.parent, links=links, name="python") / BIN.name
        environment = stack_environment(layout, record, secrets, programs=programs)
        components = [
            ray_head(
                ports=record.ports,
                session_root=record.ray_dir,
                num_cpus=processes.usable_cpus(),
                programs=programs,
            ),
            mlflow_server(port=record.ports["mlflow"], home=layout.mlflow, programs=programs),
            *airflow_components(port=record.ports["airflow"], programs=programs),
        ]
        supervisor = Supervisor(layout, record)
        if not supervisor.answers():
            supervisor.launch(components, environment, programs=programs)
            deadline = time.monotonic() + 10
            while not supervisor.answers():
                if time.monotonic() > deadline:
                    raise StackError(f"supervisord does not answer:\n{last_lines(self.layout.log_of('supervisord'))}")
                time.sleep(0.05)
        # Ray gives its node 30 s to join, a limit no setting changes: it starts first, next to one process at most
        supervisor.start("ray")
        record = self._migrated(record, environment, programs)
        supervisor.start("mlflow")
        self._wait({"ray"}, record, supervisor, secrets)
        for component in components:
            supervisor.start(component.name)
        self._wait({component.name for component in components}, record, supervisor, secrets)
        return record

    def _migrated(self, record: StackRecord, environment: dict[str, str], programs: Path) -> StackRecord:
        """Bring Airflow's database to the installed version; once per version, since it takes seconds."""
        version = importlib.metadata.version("apache-airflow-core")
        if record.airflow_version == version:
            return record
        self.say("preparing Airflow's database")
        log = self.layout.log_of("airflow-migrate")
        with log.open("w") as output:
            command = installed("airflow", "db", "migrate", programs=programs)
            done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise StackError(f"`airflow db migrate` failed:\n{last_lines(log)}\nfull log: {log}")
        migrated = record.model_copy(update={"airflow_version": version})
        migrated.save(self.layout)
        return migrated

    def _wait(self, waiting: set[str], record: StackRecord, supervisor: Supervisor, secrets: StackSecrets) -> None:
        """Wait until these components are healthy; StackError when one gives up or the time limit is over."""
        health = Health(record, secrets)
        begin = time.monotonic()
        pids: dict[str, set[int]] = {name: set() for name in waiting}
        while waiting:
            programs = [program for program in supervisor.states() if program.name in waiting]
            missing = health.round(programs)
            elapsed = time.monotonic() - begin
            for program in programs:
                name, reason = program.name, missing[program.name]
                pids[name] |= {program.pid} if program.pid else set()
                if reason is None:
                    waiting = waiting - {name}
                    if elapsed > 1:  # otherwise it ran before
                        self.say(f"{name:<14} healthy")
                elif program.state in ("FATAL", "UNKNOWN") or len(pids[name]) > MOST_RESTARTS:
                    raise self._broken(name, reason)
                elif elapsed > START_SECONDS:
                    raise self._broken(name, f"not healthy after {START_SECONDS} s: {reason}")
            time.sleep(0.25 if waiting else 0)

    def _broken(self, name: str, reason: str) -> StackError:
        log = self.layout.log_of(name)
        free = shutil.disk_usage(self.layout.home).free
        full = f"the disk of {self.layout.home} has {byte_size(free)} left; make room, then run `make up` again\n"
        return StackError(
            f"{name} failed: {reason}\n{full if free < FULL_BYTES else ''}last lines of {log}:\n{last_lines(log)}"
        )

    def _settle(self, record: StackRecord, secrets: StackSecrets) -> None:
        """The steps that need a running Airflow: create the pool of heavy stages, check the DAGs."""
        airflow = Health(record, secrets).airflow
        airflow.ensure_pool(POOL, slots=SLOTS, description="heavy stages, as many at a time as there are slots")
        for file, why in airflow.import_errors().items():
            self.say(f"warning: {file} cannot be imported: {why}")

    def down(self) -> None:
        """Stop exactly what `up` started, in whatever state it is."""
        with self._locked():
            record = self._own_record()
            supervisor = Supervisor(self.layout, record) if record else None
            known = processes.marked(record.stack_id) if record else []
            ran = False
            if supervisor and (ran := supervisor.answers()):
                supervisor.stop_everything()
                supervisor.wait_gone(seconds=10)
            left = self._end_all(record)
            for line in left:
                self.say(f"ended {line}")
            processes.wait_gone(known, seconds=10)
            sweep_scratch(scratch_home())
            if record is None:
                self.layout.record.unlink(missing_ok=True)  # damaged, or another checkout's
            self.say("stopped" if ran or left else "nothing to stop")

    def record(self) -> StackRecord:
        """The running stack's record; StackError when it does not run."""
        record = StackRecord.load(self.layout)
        if record is None or self._is_anothers(record) or not Supervisor(self.layout, record).answers():
            raise StackError("the stack does not run; start it with `make up`")
        return record

    def programs(self, record: StackRecord) -> list[tuple[ProgramState, str | None, int]]:
        """For each program its state, what is missing for health (None: nothing), and its memory in bytes."""
        programs = Supervisor(self.layout, record).states()
        missing = Health(record, StackSecrets.load_or_generate(self.layout)).round(programs)
        return [
            (program, missing[program.name], processes.memory_bytes(processes.tree(program.pid)) if program.pid else 0)
            for program in programs
        ]


def login_lines(layout: Layout, record: StackRecord) -> list[str]:
    """The addresses of all servers and how to log in."""
    password = StackSecrets.load_or_generate(layout).admin_password
    kept = relative(layout.airflow_passwords)
    return [
        f"Airflow  {record.airflow_url}   user admin, password {password}  (kept in {kept})",
        f"MLflow   {record.mlflow_url}",
        f"Ray      {record.ray_url}   token: ray_token in {relative(layout.secrets)}",
        f"store    {record.artifact_store}",
        f"logs     {relative(layout.logs)}",
    ]


def relative(path: Path) -> str:
    """A path as the user would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
