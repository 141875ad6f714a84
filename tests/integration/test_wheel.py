"""From a wheel to a standalone cluster: `pip install`, `flink-llm package`, the printed line; no clone.

Without the demo model a tiny random one takes its place: it says nothing sensible, and everything else is tested.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "models" / "support-chat"
DRIVER = """
import importlib.metadata, json, os, re, subprocess, sys, time
from pathlib import Path
import yaml
from kafka import KafkaConsumer, KafkaProducer
import flink_llm
from flink_llm.local import demo_job
from flink_llm.local.broker import Broker
from flink_llm.local.cluster import Cluster

assert "site-packages" in flink_llm.__file__, flink_llm.__file__
home = Path.cwd()
broker = Broker(home / "broker")
broker.up()
try:
    demo_job.prepare(home / "state")
    kafka = {"bootstrap_servers": "${KAFKA}", "group": "packed"}
    models = {"support-chat": sys.argv[1]}
    raw = demo_job.configuration(home / "state", name="packed", kafka=kafka, models=models)
    raw["flink"]["parallelism"] = 2
    (home / "job.yaml").write_text(yaml.safe_dump(raw))
    tool = [str(Path(sys.executable).with_name("flink-llm")), "package", "--config", "job.yaml", "--to", "packed"]
    line = subprocess.run(tool, check=True, stdout=subprocess.PIPE, text=True).stdout
    pinned = {row.split("==")[0] for row in (home / "packed" / "requirements.txt").read_text().splitlines()[1:]}
    installed = {re.sub("[._]", "-", each.name).lower() for each in importlib.metadata.distributions()}
    assert pinned == installed - {"flink-llm"}, pinned ^ installed
    with Cluster(home / "cluster", slots=2) as cluster:
        there = {"FLINK_CONF_DIR": str(home / "cluster" / "conf"), "KAFKA": broker.bootstrap_servers}
        ran = subprocess.run(line, shell=True, env={**os.environ, **there}, stdout=subprocess.PIPE, text=True)
        [job] = re.findall("JobID ([0-9a-f]{32})", ran.stdout) or sys.exit(ran.stdout)
        cluster.wait_running(job)
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
        for i in range(20):
            messages = [{"role": "user", "content": "Where is order 1042?"}]
            request = {"request_id": f"r{i}", "session_id": f"s{i}", "user_id": "user-1", "messages": messages}
            producer.send("chat.requests", value=json.dumps(request).encode())
        producer.close()
        consumer = KafkaConsumer(
            "chat.responses", "chat.failures", bootstrap_servers=broker.bootstrap_servers,
            auto_offset_reset="earliest", group_id=None,
        )
        seen, deadline = [], time.monotonic() + 90
        while len(seen) < 20 and time.monotonic() < deadline:
            for records in consumer.poll(timeout_ms=200).values():
                seen += [json.loads(record.value) for record in records]
        consumer.close()
        cluster.cancel(job)
    print(json.dumps(seen))
finally:
    broker.wipe()
"""


@pytest.mark.timeout(480)
def test_a_job_is_submitted_with_nothing_of_the_clone(tmp_path: Path) -> None:
    trained = (DEMO_MODEL / "manifest.json").exists()
    model = DEMO_MODEL if trained else tiny_model(tmp_path)
    uv = str(Path(sys.executable).with_name("uv"))
    venv = tmp_path / "venv"
    subprocess.run([uv, "build", "-q", "--wheel", "-o", str(tmp_path), str(ROOT)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    install = [uv, "pip", "install", "-q", "--python", python, "-c", str(ROOT / "constraints.txt"), f"{wheel}[cpu]"]
    subprocess.run(install, check=True)
    work = tmp_path / "work"
    work.mkdir()
    (work / "driver.py").write_text(DRIVER)
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYFLINK", "VIRTUAL", "_python", "FLINK_LLM_LOCAL"))
    }
    ran = subprocess.run([python, "driver.py", str(model)], cwd=work, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers = json.loads(ran.stdout.splitlines()[-1])
    assert sorted(answer["request_id"] for answer in answers) == sorted(f"r{i}" for i in range(20))
    assert all(answer["text"] for answer in answers), answers
    if trained:
        assert {answer.get("finish_reason") for answer in answers} == {"stop"}
        assert all("1042" in answer["text"] for answer in answers)


def tiny_model(folder: Path) -> Path:
    from flink_llm.engine.export import export_decoder

    export_decoder(tiny.llama(folder / "llama"), folder / "tiny", name="support-chat", precision="fp32")
    return folder / "tiny"
