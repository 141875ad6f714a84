"""The jars of a job, of a local broker and of the SQL client, resolved once by Maven into a cache folder.

The cache is `$FLINK_LLM_CACHE`, else `~/.cache/flink-llm`. Coordinates and versions stand in the
`pom.xml` beside this module.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from filelock import FileLock

from flink_llm.errors import LocalError
from flink_llm.secrets import masked

POM = Path(__file__).with_name("pom.xml")
INSTALL = {
    "java": "apt-get install -y openjdk-17-jre-headless",
    "mvn": "apt-get install -y maven",
}
OLDEST_JAVA = 17
OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""Of every Java that is started here, whose life is short and whose cores are few: collector and compiler would
otherwise work on threads beside the job's, on the cores that Python needs (docs/adr/0027)."""
Group = Literal["connector", "broker", "sql-client"]
COMPLETE = ".complete"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where downloads are kept between runs."""
    chosen = environ.get("FLINK_LLM_CACHE")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "flink-llm"


def program(name: str) -> str:
    """The path of `java` or `mvn`. Raises LocalError with the command that installs it."""
    found = shutil.which(name)
    if name == "java" and "JAVA_HOME" in os.environ:
        found = shutil.which(str(Path(os.environ["JAVA_HOME"]) / "bin" / "java")) or found
    if found is None:
        raise LocalError(f"{name} is not installed: run `{INSTALL[name]}` (as root), then try again")
    return found


def java() -> tuple[str, int]:
    """The path of a Java that Flink and Kafka run on, and its version. Raises LocalError."""
    path = program("java")
    try:
        said = subprocess.run([path, "-version"], capture_output=True, text=True).stderr
    except OSError as error:
        raise LocalError(f"{path} cannot be run: {error.strerror or error}") from error
    found = re.search(r'version "(\d+)', said)
    version = int(found[1]) if found else 0
    if version < OLDEST_JAVA:
        raise LocalError(
            f"{path} is Java {version or 'of an unknown version'}, Java {OLDEST_JAVA} or later is needed: "
            f"run `{INSTALL['java']}` (as root), or set JAVA_HOME"
        )
    return path, version


def jars(group: Group) -> list[Path]:
    """The jars of a group, downloaded at the first call. Raises LocalError: no Maven, no network, no room."""
    folder = _folder(group)
    done = folder / COMPLETE
    if not done.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not done.exists():
                    _resolve(group, folder)
                    done.touch()
        except OSError as error:
            raise LocalError(f"the cache folder {folder} cannot be written: {error.strerror or error}") from error
    return sorted(folder.glob("*.jar"))


def all_cached() -> bool:
    """Whether the jars of a job and of a broker are there, so that Maven has nothing left to do for them."""
    needed: tuple[Group, ...] = ("connector", "broker")
    return all((_folder(group) / COMPLETE).exists() for group in needed)


def _folder(group: Group) -> Path:
    version = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    return cache_folder() / "jars" / f"{group}-{version}"


def connector_jar() -> Path:
    """Flink's Kafka SQL connector. Raises LocalError."""
    return jars("connector")[0]


def _resolve(group: Group, folder: Path) -> None:
    maven = program("mvn")
    program("java")
    print(f"flink-llm: fetching the {group} jars with Maven (once) ...", file=sys.stderr, flush=True)
    command = [
        maven, "-q", "-B", "-f", str(POM), "-P", group, "dependency:copy-dependencies",
        f"-DoutputDirectory={folder}", "-DincludeScope=runtime",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ran.returncode:
        lines = [line for line in (ran.stdout + ran.stderr).splitlines() if "ERROR" in line]
        reason = (lines or ["no reason given"])[0].removeprefix("[ERROR] ")[:300]
        raise LocalError(
            f"Maven could not fetch the {group} jars: {masked(reason)}; is there a network? "
            f"A mirror or proxy goes into ~/.m2/settings.xml"
        )
