"""A real model host, on a real socket, whose models say what the JSON file of scripts tells them to."""

from pathlib import Path

import msgspec

from flink_llm.engine import host
from flink_llm.engine.fleet import Fleet
from flink_llm.engine.settings import HostSettings
from flink_llm.engine.work import Backend
from flink_llm.errors import ConfigError
from flink_llm.testing.scripts import Script, ScriptedBackend


def _scripted(settings: HostSettings) -> Backend:
    if not settings.launcher_args:
        raise ConfigError("host.launcher_args: name the JSON file of scripts")
    scripts = msgspec.json.decode(Path(settings.launcher_args[0]).read_bytes(), type=dict[str, Script])
    return Fleet(ScriptedBackend(scripts), settings.memory_mb)


if __name__ == "__main__":
    host.command(_scripted, "flink_llm.testing")()
