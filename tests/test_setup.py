"""`make` and scripts/system.sh on machines that lack something, played by a PATH of small scripts."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JAVA = "echo 'openjdk version \"{}.0.1\" 2021-01-01' >&2"


@pytest.fixture
def machine(tmp_path):
    """Makes a PATH that holds the shell's own tools and the given scripts: `machine(java="exit 0")`."""
    for name in ("sh", "sed", "head", "make", "test"):
        if (found := shutil.which(name)) is not None:
            (tmp_path / name).symlink_to(found)

    def make(**scripts):
        for name, text in scripts.items():
            file = tmp_path / name.replace("_", "-")
            file.write_text(f"#!{shutil.which('sh')}\n{text}\n")
            file.chmod(0o755)
        return {"PATH": str(tmp_path)}

    return make


def system(environ):
    return subprocess.run(["sh", str(ROOT / "scripts" / "system.sh")], env=environ, capture_output=True, text=True)


def test_nothing_is_done_where_all_is_there(machine):
    ran = system(machine(java=JAVA.format(17), mvn="exit 0", apt_get="exit 9"))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("there", [{}, {"java": JAVA.format(11)}, {"java": JAVA.format("1.8")}])
def test_a_system_without_apt_gets_a_hint_of_its_own(machine, there):
    ran = system(machine(mvn="exit 0", **there))
    assert ran.returncode == 1
    assert ran.stderr.startswith("missing: java. Install Java 17 or later") and "apt" not in ran.stderr


@pytest.mark.parametrize(("known", "package"), [("17", "openjdk-17"), ("21", "default")])
def test_root_installs_the_java_that_this_release_has(machine, known, package):
    cache = f'case "$2" in openjdk-{known}-*) echo yes;; esac'
    ran = system(machine(id="echo 0", apt_get="exit 0", apt_cache=cache, mvn="exit 0"))
    assert (ran.returncode, ran.stdout) == (0, f"installing {package}-jre-headless ...\n")


def test_the_java_of_java_home_goes_first(machine, tmp_path):
    environ = machine(java=JAVA.format(11), mvn="exit 0")
    home = tmp_path / "jdk" / "bin"
    home.mkdir(parents=True)
    (home / "java").write_text(f"#!{shutil.which('sh')}\n{JAVA.format(17)}\n")
    (home / "java").chmod(0o755)
    assert system({**environ, "JAVA_HOME": str(home.parent)}).returncode == 0
    assert system({**environ, "JAVA_HOME": "/nowhere"}).returncode == 1


def test_others_are_told_the_command(machine):
    ran = system(machine(id="echo 5", apt_get="exit 9", apt_cache="echo yes", java=JAVA.format(21)))
    assert ran.returncode == 1
    assert ran.stderr == "missing: maven. Run: sudo apt-get update && sudo apt-get install -y maven\n"


@pytest.mark.parametrize(("imports", "wanted"), [("0", False), ("1", True)])
def test_venv_is_installed_only_where_python_lacks_it(machine, imports, wanted):
    python = f'case "$2" in *version_info*) echo python3.11-venv;; *) exit {imports};; esac'
    environ = machine(python=python, id="echo 0", apt_get="exit 0", java=JAVA.format(17), mvn="exit 0")
    ran = system({**environ, "PYTHON": f"{environ['PATH']}/python"})
    assert ran.returncode == 0
    assert ran.stdout == ("installing python3.11-venv ...\n" if wanted else "")


def test_make_without_a_python_says_so(machine, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(ROOT / "Makefile", work)
    ran = subprocess.run(["make", ".venv/.made"], cwd=work, env=machine(), capture_output=True, text=True)
    assert ran.returncode != 0
    assert "flink-llm needs Python 3.11 or 3.12" in ran.stdout
    assert not (work / ".venv").exists()
