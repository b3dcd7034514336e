"""The supervisord configuration says what we mean, for awkward paths too."""

import configparser
import re
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xmlrpc.server import SimpleXMLRPCDispatcher, SimpleXMLRPCRequestHandler

import pytest
import yaml

from infra.components import Component, airflow_components, mlflow_server, ray_head
from infra.environment import client_environment, stack_environment
from infra.layout import Layout, StackRecord, StackSecrets
from infra.ports import PREFERRED
from infra.supervisor import Supervisor, last_lines
from tests.places import REPOSITORY


def stack(root: Path) -> tuple[Layout, StackRecord, StackSecrets]:
    layout = Layout(root)
    record = StackRecord(
        stack_id="abc", ports=dict(PREFERRED), runtime_dir=str(root / "run"), artifact_store="file:///store"
    )
    return layout, record, StackSecrets.load_or_generate(layout)


def parsed(root: Path, components: list[Component]) -> configparser.RawConfigParser:
    layout, record, _ = stack(root)
    text = Supervisor(layout, record)._configuration(components)
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))
    parser.read_string(text)
    return parser


def test_a_command_with_spaces_and_percent_signs_reaches_the_program_as_it_is(tmp_path: Path) -> None:
    component = Component("odd", ("/a b/run", "--rate=5%", "x y"), {"NAME": "50%, really"})
    program = parsed(tmp_path, [component])["program:odd"]
    # supervisord expands %(x)s, hence the doubling, then splits like a shell
    assert shlex.split(program["command"].replace("%%", "%")) == ["/a b/run", "--rate=5%", "x y"]
    assert program["environment"] == 'NAME="50%%, really"'
    assert program["killasgroup"] == "true"


def test_no_secret_is_written_to_the_configuration(tmp_path: Path) -> None:
    layout, record, secrets = stack(tmp_path)
    components = [
        ray_head(ports=record.ports, session_root=record.ray_dir, num_cpus=2),
        mlflow_server(port=5000, home=layout.mlflow),
        *airflow_components(port=8080),
    ]
    text = Supervisor(layout, record)._configuration(components)
    for secret in secrets.model_dump().values():
        assert secret not in text


def test_everything_listens_on_loopback_only(tmp_path: Path) -> None:
    _, record, _ = stack(tmp_path)
    ray = " ".join(ray_head(ports=record.ports, session_root=record.ray_dir, num_cpus=2).command)
    assert "--dashboard-host=127.0.0.1" in ray
    assert "--host 127.0.0.1" in " ".join(mlflow_server(port=5000, home=tmp_path).command)
    for component in airflow_components(port=8080):
        command = " ".join(component.command)
        # log servers listen on all interfaces and have no switch for it
        assert "api-server --host 127.0.0.1" in command or "--skip-serve-logs" in command or "dag-processor" in command


def test_the_users_object_store_and_credentials_reach_every_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "another-cluster:6379")
    monkeypatch.setenv("NO_PROXY", "corp.example")
    layout, record, secrets = stack(tmp_path)
    environment = stack_environment(layout, record, secrets)
    assert environment["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
    assert environment["ARTIFACT_STORE"] == "file:///store"
    assert "RAY_ADDRESS" not in environment
    assert environment["NO_PROXY"] == "corp.example,127.0.0.1,localhost"
    assert environment["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert environment.items() >= client_environment(record, secrets).items()


def test_components_in_other_folders_know_the_same_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed to sources, so it must not mean another place in a job's working folder."""
    layout, record, secrets = stack(tmp_path)
    monkeypatch.setenv("ATHANOR_HOME", "state")
    assert stack_environment(layout, record, secrets)["ATHANOR_HOME"] == str(layout.home.parent)


@pytest.mark.parametrize("length", [0, 1, 240, 241, 250])
def test_airflow_takes_no_run_id_whose_folder_of_task_logs_could_not_be_made(tmp_path: Path, length: int) -> None:
    environment = stack_environment(*stack(tmp_path))
    pattern = environment["AIRFLOW__SCHEDULER__ALLOWED_RUN_ID_PATTERN"]
    assert bool(re.match(pattern, "n" * length)) == (1 <= length <= 240)
    assert re.match(pattern, "nightly+2026:1.~_-")
    assert not any(re.match(pattern, name) for name in (".", "..", "-x", "a/b", "a b", "ä"))
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["x-airflow-environment"]
    assert compose["AIRFLOW__SCHEDULER__ALLOWED_RUN_ID_PATTERN"] == pattern.replace("$", "$$")
    values = yaml.safe_load((REPOSITORY / "infra" / "kubernetes" / "helm" / "airflow-values.yaml").read_text())
    assert values["config"]["scheduler"]["allowed_run_id_pattern"] == pattern


def test_a_programs_shell_gets_no_marker_that_would_end_it_with_the_stack(tmp_path: Path) -> None:
    _, record, secrets = stack(tmp_path)
    assert not any("ATHANOR_STACK" in name for name in client_environment(record, secrets))


def test_last_lines_of_a_long_log_are_its_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert last_lines(log) == "(no log yet)"
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert last_lines(log, 2) == "line 9998\nline 9999"


def test_a_supervisord_that_is_not_there_does_not_answer(tmp_path: Path) -> None:
    layout, record, _ = stack(tmp_path)
    assert not Supervisor(layout, record).answers()


def test_doctor_and_garbage_collection_start_in_images_without_the_stacks_own_libraries() -> None:
    code = "import sys; sys.modules['supervisor'] = sys.modules['rich'] = None; import infra.__main__, infra.garbage"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_supervisord_that_came_back_is_asked_again_over_a_new_connection(tmp_path: Path) -> None:
    layout, record, _ = stack(tmp_path)
    supervisor = Supervisor(layout, record)
    Path(record.runtime_dir).mkdir()
    for _ in range(2):
        assert not supervisor.answers()
        with supervisord(record.supervisor_socket, identification="athanor-abc"):
            assert supervisor.answers()
        record.supervisor_socket.unlink()


@contextmanager
def supervisord(path: Path, *, identification: str) -> Iterator[None]:
    """The part of supervisord's XML-RPC server that says which one it is."""

    class Handler(SimpleXMLRPCRequestHandler):
        rpc_paths = ("/RPC2",)
        disable_nagle_algorithm = False  # there is none on a Unix socket

        def address_string(self) -> str:
            return "unix"

    class Server(socketserver.UnixStreamServer, SimpleXMLRPCDispatcher):
        logRequests = False

    SimpleXMLRPCDispatcher.__init__(server := Server(str(path), Handler))  # pyright: ignore[reportArgumentType]
    server.register_function(lambda: identification, "supervisor.getIdentification")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def test_a_supervisord_that_accepts_and_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.supervisor._ANSWER_SECONDS", 0.2)
    layout, record, _ = stack(tmp_path)
    address = Path(record.supervisor_socket)
    address.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(address))
        silent.listen()
        assert not Supervisor(layout, record).answers()
    assert socket.getdefaulttimeout() is None
