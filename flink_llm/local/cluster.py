"""A standalone Flink cluster on this machine, from the pip package, for tests and benchmarks.

Unlike the mini-cluster it is what a user's cluster is: jobs are submitted by `flink run`, each task
manager is a process, and Python runs in workers below it. Nothing in the pip package is changed: the
cluster's home is a folder of links with a configuration of its own.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

from flink_llm.errors import LocalError
from flink_llm.local import jars, processes
from flink_llm.orphans import WORKER
from flink_llm.secrets import masked

START_S, TASK_MANAGER_S = 90.0, 10.0
"""How long a cluster may take to be up, and each further task manager on the same cores."""
RUNNING_S = 120.0
SAVEPOINT_S = 120.0
STOP_S = 30.0
POLL_S = 0.2
REST_TIMEOUT_S = 10.0
_UNREAD = re.compile(r"Could not parse value '.*?' for key '[^']+'")
_JOB_ID = re.compile(r"JobID ([0-9a-f]{32})")
_SQL_JOB_ID = re.compile(r"Job ID: ([0-9a-f]{32})")
# What a mini-cluster leaves in the environment of its process, and a submission must not inherit.
_OF_A_MINI_CLUSTER = ("_python_worker_execution_mode", "FLINK_LLM_LOCAL", "PYFLINK_GATEWAY_PORT")


class Cluster:
    """A job manager and task managers below `home`. A context manager: up on entry, down on exit.

    `slots` are those of each task manager. `properties` are Flink options, set as they are. With
    `zookeeper`, its port on this machine, jobs outlive the job manager: a server runs at that port too.
    """

    def __init__(
        self, home: Path, *, task_managers: int = 1, slots: int = 2, properties: dict[str, str] | None = None,
        zookeeper: int | None = None,
    ) -> None:  # fmt: skip
        self._home = home.absolute()
        self._task_managers = task_managers
        self._slots = slots
        self._properties = dict(properties or {})
        self._zookeeper = zookeeper
        self._rest = 0

    def __enter__(self) -> "Cluster":
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    @property
    def url(self) -> str:
        """Where Flink's REST interface and web page are."""
        return f"http://127.0.0.1:{self._rest}"

    @property
    def logs(self) -> Path:
        """The folder of the log files."""
        return self._home / "log"

    @property
    def parts(self) -> list[str]:
        """The names of its processes, in the order of their start."""
        workers = [f"taskmanager-{number}" for number in range(self._task_managers)]
        return [*(["zookeeper"] if self._zookeeper else []), "jobmanager", *workers]

    def up(self) -> None:
        """Starts everything and waits until all slots are there. Raises LocalError."""
        if any(self._started()):
            raise LocalError(f"a cluster runs in {self._home} already: call down() first")
        try:
            self._lay_out()
        except OSError as error:
            raise LocalError(f"{self._home} cannot be written: {error.strerror or error}") from error
        for name in self.parts:
            self.start(name)
        wanted = self._task_managers * self._slots
        patience = START_S + TASK_MANAGER_S * (self._task_managers - 1)
        deadline = time.monotonic() + patience
        while self._slots_there() < wanted:
            if len(self._started()) < len(self.parts):
                raise LocalError(f"a process of the cluster ended at its start, see {self.logs}")
            if time.monotonic() > deadline:
                raise LocalError(f"the cluster was not up within {patience:.0f} s, see {self.logs}")
            time.sleep(POLL_S)

    def down(self) -> None:
        """Stops everything that `up` has started, the Python workers among it."""
        workers = self.python_workers()
        for started in self._started():
            processes.stop(started)
        for worker in workers:  # a worker may outlive a task manager that was killed
            _kill(worker)
        for file in self._home.glob("*.pid.json"):
            file.unlink()

    def start(self, name: str) -> None:
        """Starts one of `parts` that is not there, as an orchestrator does with one that died. Does not wait."""
        script = f"{name.partition('-')[0]}.sh"
        command = ["bash", str(self._home / "bin" / script), "start-foreground"]
        command += ["1"] if name == "zookeeper" else []
        file = self._home / f"{name}.pid.json"
        processes.start(command, self.logs / f"{name}.out", self._environ(), file=file)

    def process(self, name: str) -> psutil.Process | None:
        """Of one of `parts`, None when it is not there."""
        started = processes.recall(self._home / f"{name}.pid.json")
        return started.process() if started else None

    def submit(self, job_file: Path, *args: str, savepoint: str | None = None) -> str:
        """Submits a Python job, detached; its job id. Raises LocalError with the client's last words.

        `savepoint` is a path that `savepoint` or `stop_with_savepoint` gave.
        """
        return self.run(
            "-d", *(["-s", savepoint] if savepoint else []),
            "-pyexec", sys.executable, "-pyclientexec", sys.executable, "-py", str(job_file), *args,
        )  # fmt: skip

    def run(self, *arguments: str) -> str:
        """`flink run` with these arguments; the job's id. Raises LocalError with the client's last words."""
        command = ["bash", str(self._home / "bin" / "flink"), "run", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, env=self._environ())
        found = _JOB_ID.search(ran.stdout)
        if ran.returncode or found is None:
            raise LocalError(f"the job was not submitted: {last_words(ran.stdout or ran.stderr)}")
        return found[1]

    def sql(self, file: Path, *arguments: str) -> list[str]:
        """Runs a file of SQL by `sql-client.sh`; the ids of the jobs it has submitted. Raises LocalError."""
        opt = self._home / "opt"  # a folder of links: the pip package's lacks what the client starts with
        shutil.rmtree(opt, ignore_errors=True)
        opt.mkdir()
        for jar in [*(flink_home() / "opt").glob("*.jar"), *jars.jars("sql-client")]:
            (opt / jar.name).symlink_to(jar)
        python = ["-pyexec", sys.executable, "-pyclientexec", sys.executable]
        command = ["bash", str(self._home / "bin" / "sql-client.sh"), "-f", str(file), *python, *arguments]
        environ = {**self._environ(), "FLINK_OPT_DIR": str(opt)}
        ran = subprocess.run(command, capture_output=True, text=True, env=environ, stdin=subprocess.DEVNULL)
        if ran.returncode or "[ERROR]" in ran.stdout:
            raise LocalError(f"the SQL was not run: {last_words(ran.stdout + ran.stderr)}")
        return _SQL_JOB_ID.findall(ran.stdout)

    def wait_running(self, job_id: str, patience: float = RUNNING_S) -> None:
        """Waits until every vertex runs on all its subtasks. Raises LocalError when the job ends instead."""
        deadline = time.monotonic() + patience
        while True:
            job = self.rest(f"/jobs/{job_id}")
            vertices = job["vertices"]
            if job["state"] == "RUNNING" and all(v["tasks"]["RUNNING"] == v["parallelism"] for v in vertices):
                return
            if job["state"] in ("FAILED", "CANCELED", "FINISHED"):
                raise LocalError(f"job {job_id} is {job['state']}: {self._root_cause(job_id)}")
            if time.monotonic() > deadline:
                raise LocalError(f"job {job_id} did not run within {patience:.0f} s: {job['state']}")
            time.sleep(POLL_S)

    def wait_state(self, job_id: str, *states: str, patience: float = RUNNING_S) -> str:
        """Waits until the job is in one of `states`, as Flink names them; which. Raises LocalError."""
        deadline = time.monotonic() + patience
        while True:
            state: str = self.rest(f"/jobs/{job_id}")["state"]
            if state in states:
                return state
            if time.monotonic() > deadline:
                raise LocalError(f"job {job_id} is {state} after {patience:.0f} s, not {' or '.join(states)}")
            time.sleep(POLL_S)

    def cancel(self, job_id: str) -> None:
        """Cancels a job and waits for its end."""
        self.rest(f"/jobs/{job_id}", "PATCH")
        self.wait_state(job_id, "CANCELED", "FINISHED", "FAILED")

    def savepoint(self, job_id: str, folder: Path) -> str:
        """Takes a savepoint of a running job; its path. Raises LocalError."""
        return self._savepoint(job_id, "savepoints", {"target-directory": folder.absolute().as_uri()})

    def stop_with_savepoint(self, job_id: str, folder: Path) -> str:
        """Takes a savepoint and ends the job; the savepoint's path. Raises LocalError."""
        path = self._savepoint(job_id, "stop", {"targetDirectory": folder.absolute().as_uri()})
        self.wait_state(job_id, "FINISHED")
        return path

    def python_workers(self) -> list[psutil.Process]:
        """The Python workers below this cluster's task managers."""
        found = []
        for started in self._started("taskmanager-*"):
            process = started.process()
            try:
                children = process.children(recursive=True) if process else []
            except psutil.Error:
                continue
            found += [child for child in children if WORKER in " ".join(_command_line(child))]
        return found

    def kill_python_workers(self) -> int:
        """kill -9 of every Python worker of this cluster; how many there were."""
        workers = self.python_workers()
        for worker in workers:
            _kill(worker)
        return len(workers)

    def rest(self, path: str, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        """Asks Flink's REST interface. Raises LocalError with its first line when it refuses."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=REST_TIMEOUT_S) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise LocalError(f"{method} {path}: {last_words(error.read().decode(errors='replace'))}") from error
        except OSError as error:
            raise LocalError(f"no cluster answers at {self.url}: {error}") from error

    def _savepoint(self, job_id: str, kind: str, body: dict[str, Any]) -> str:
        trigger = self.rest(f"/jobs/{job_id}/{kind}", "POST", body)["request-id"]
        deadline = time.monotonic() + SAVEPOINT_S
        while time.monotonic() < deadline:
            answer = self.rest(f"/jobs/{job_id}/savepoints/{trigger}")
            if answer["status"]["id"] == "COMPLETED":
                operation = answer["operation"]
                if "location" not in operation:
                    cause = operation.get("failure-cause", {}).get("stack-trace", "no reason given")
                    raise LocalError(f"no savepoint of job {job_id}: {last_words(cause)}")
                return str(operation["location"])
            time.sleep(POLL_S)
        raise LocalError(f"no savepoint of job {job_id} within {SAVEPOINT_S:.0f} s")

    def _lay_out(self) -> None:
        package = flink_home()
        self._home.mkdir(parents=True, exist_ok=True)
        for name in ("bin", "lib", "conf"):
            shutil.rmtree(self._home / name, ignore_errors=True)
            (self._home / name).mkdir()
        for name in ("log", "tmp"):
            (self._home / name).mkdir(exist_ok=True)
        for file in (package / "bin").iterdir():  # a wheel does not always keep the run bit
            Path(shutil.copy(file, self._home / "bin")).chmod(0o755)
        # With flink-python among Flink's own classes a job leaves no class loader behind.
        libraries = [*(package / "lib").glob("*.jar"), *(package / "opt").glob("flink-python-*.jar")]
        for jar in [*libraries, jars.connector_jar()]:
            (self._home / "lib" / jar.name).symlink_to(jar)
        for file in (package / "conf").glob("log*"):
            shutil.copy(file, self._home / "conf")
        self._rest = processes.free_port()
        (self._home / "conf" / "config.yaml").write_text(yaml.safe_dump(self._configuration()))

    def _configuration(self) -> dict[str, Any]:
        local = {
            name: "127.0.0.1"
            for name in ("jobmanager.rpc.address", "jobmanager.bind-host", "taskmanager.bind-host",
                         "taskmanager.host", "rest.address", "rest.bind-address")
        }  # fmt: skip
        shipped = yaml.safe_load((flink_home() / "conf" / "config.yaml").read_text())
        opened = shipped["env"]["java"]["opts"]["all"]  # the --add-opens that Flink needs on Java 17
        return {
            **local,
            "jobmanager.rpc.port": processes.free_port(),
            "rest.port": self._rest,
            "jobmanager.memory.process.size": "768m",
            "jobmanager.memory.jvm-metaspace.size": "192m",
            "taskmanager.memory.process.size": "1800m",
            "taskmanager.memory.managed.size": "256m",
            "taskmanager.memory.network.max": "64m",
            "taskmanager.memory.jvm-metaspace.size": "512m",
            "taskmanager.numberOfTaskSlots": self._slots,
            "heartbeat.interval": 1000,
            "heartbeat.timeout": 10_000,
            "io.tmp.dirs": str(self._home / "tmp"),
            "env.java.opts.all": " ".join([opened, *jars.OPTIONS]),
            **self._high_availability(),
            **self._properties,
        }

    def _high_availability(self) -> dict[str, Any]:
        if self._zookeeper is None:
            return {}
        folder = self._home / "zookeeper"
        server = f"dataDir={folder}\nclientPort={self._zookeeper}\nclientPortAddress=127.0.0.1\ntickTime=2000\n"
        (self._home / "conf" / "zoo.cfg").write_text(f"{server}admin.enableServer=false\n")
        return {
            "high-availability.type": "zookeeper",
            "high-availability.zookeeper.quorum": f"127.0.0.1:{self._zookeeper}",
            "high-availability.storageDir": (self._home / "ha").as_uri(),
            # A job manager that died is its jobs' leader until its session ends.
            "high-availability.zookeeper.client.session-timeout": 10_000,
            "zookeeper.heap.mb": 128,
        }

    def _environ(self) -> dict[str, str]:
        environ = {name: value for name, value in os.environ.items() if name not in _OF_A_MINI_CLUSTER}
        own = {"FLINK_HOME": "", "FLINK_CONF_DIR": "conf", "FLINK_LIB_DIR": "lib", "FLINK_BIN_DIR": "bin",
               "FLINK_LOG_DIR": "log", "FLINK_PID_DIR": "tmp"}  # fmt: skip
        environ |= {name: str(self._home / folder) for name, folder in own.items()}
        # The pip package's own folders: Flink does not look into a linked `opt`.
        environ |= {f"FLINK_{name.upper()}_DIR": str(flink_home() / name) for name in ("opt", "plugins")}
        java = Path(jars.java()[0]).resolve()
        return {**environ, "_FLINK_HOME_DETERMINED": "1", "JAVA_HOME": str(java.parents[1])}

    def _started(self, pattern: str = "*") -> list[processes.Started]:
        found = [processes.recall(file) for file in sorted(self._home.glob(f"{pattern}.pid.json"))]
        return [started for started in found if started is not None]

    def _slots_there(self) -> int:
        try:
            return int(self.rest("/overview")["slots-total"])
        except LocalError:
            return 0

    def _root_cause(self, job_id: str) -> str:
        entries = self.rest(f"/jobs/{job_id}/exceptions")["exceptionHistory"]["entries"]
        return last_words(entries[0]["stacktrace"]) if entries else "no reason given"


def flink_home() -> Path:
    """The folder of the pip package that Flink comes in. Raises LocalError."""
    spec = importlib.util.find_spec("pyflink")  # its place only: importing it is slow
    if spec is None or spec.origin is None:
        raise LocalError("apache-flink is not installed: pip install flink-llm")
    return Path(spec.origin).parent


def flink_script() -> str | None:
    """The pip package's own `flink`, None where it cannot be run: a wheel does not always keep the run bit."""
    return shutil.which(str(flink_home() / "bin" / "flink"))


def last_words(text: str) -> str:
    """The innermost cause of a Java stack trace, a Python error inside it before all, else the last line.

    Where Flink could not read a setting, its key stands before that. Secrets are masked.
    """
    text = re.sub(r"^\s+Suppressed: .*(\n\s.*)*", "", text.replace("\\n", "\n"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("at ", "... "))]
    first = max((number for number, line in enumerate(lines) if line.startswith("Caused by: ")), default=None)
    if first is None:
        words = (lines or ["no reason given"])[-1]
    else:
        python = "Traceback (most recent call last)" in lines[first]
        words = (lines[-1] if python else lines[first]).removeprefix("Caused by: ")
    unread = _UNREAD.search(text)
    if unread is not None and unread[0] not in words:
        words = f"{unread[0]}: {words}"
    return masked(words)[:400]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal.SIGKILL)  # psutil refuses a process id that was given to another
