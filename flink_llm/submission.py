"""What a job is checked for against the cluster it is submitted to: its name, and slots for its subtasks."""

import json
import logging
import urllib.request
from typing import Any

from py4j.protocol import Py4JError
from pyflink.datastream import StreamExecutionEnvironment
from pyflink.java_gateway import get_gateway

from flink_llm.errors import ConfigError

log = logging.getLogger(__name__)
PATIENCE_S = 10


def check(env: StreamExecutionEnvironment, name: str) -> None:
    """Raises ConfigError where the job would disturb one of the same name, or never get its slots.

    Call it last before `env.execute(name)`, in a program that `flink run` has started. A cluster that
    cannot be asked, as it comes with the job (application mode) or answers nobody, is not checked.
    """
    configuration = env._j_stream_execution_environment.getConfiguration()
    try:
        jobs, url = _asked(configuration)
        overview = _read(f"{url}/overview")
        settings = {each["key"]: each["value"] for each in _read(f"{url}/jobmanager/config")}
    except (Py4JError, OSError, ValueError) as error:
        log.info("the cluster was not asked for its jobs and slots: %s", error)
        return
    check_name(name, jobs)
    if configuration.getString("execution.target", "") == "remote":  # others start task managers as they are needed
        adaptive = "adaptive" in settings.get("jobmanager.scheduler", "").lower() or "scheduler-mode" in settings
        check_slots(env.get_parallelism(), overview["slots-total"], adaptive=adaptive)


def check_name(name: str, jobs: list[tuple[str, str, str]]) -> None:
    """`jobs` are name, id and state of those that have not ended. Raises ConfigError when one has that name."""
    for found, identifier, state in jobs:
        if found == name:
            raise ConfigError(
                f"name: a job {name!r} is on this cluster already ({identifier}, {state}), and both would use the same "
                f"transactions and shut each other out: stop it with a savepoint first, or give this one another name"
            )


def check_slots(parallelism: int, slots: int, *, adaptive: bool) -> None:
    """Raises ConfigError when a job of this parallelism would wait for slots that the cluster does not have."""
    if slots < parallelism and not adaptive:
        raise ConfigError(
            f"flink.parallelism is {parallelism}, the cluster has {slots} slots: lower it, or add task managers or "
            f"slots (taskmanager.numberOfTaskSlots)"
        )


def _asked(configuration: Any) -> tuple[list[tuple[str, str, str]], str]:
    """Name, id and state of the cluster's jobs that have not ended, and where its REST interface is."""
    jvm = get_gateway().jvm
    loader = jvm.org.apache.flink.client.deployment.DefaultClusterClientServiceLoader()
    factory = loader.getClusterClientFactory(configuration)
    client = factory.createClusterDescriptor(configuration).retrieve(factory.getClusterId(configuration))
    client = client.getClusterClient()
    try:
        found = client.listJobs().get(PATIENCE_S, jvm.java.util.concurrent.TimeUnit.SECONDS)
        live = [job for job in found if not job.getJobState().isGloballyTerminalState()]
        jobs = [(job.getJobName(), str(job.getJobId()), str(job.getJobState())) for job in live]
        return jobs, str(client.getWebInterfaceURL())
    finally:
        client.close()


def _read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return json.load(answer)
