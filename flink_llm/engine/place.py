"""Where the host of a device listens: the same path for every client of one version and device."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

import msgspec

from flink_llm import __version__
from flink_llm.engine.model import MIXED_MB
from flink_llm.engine.protocol import PROTOCOL_VERSION
from flink_llm.engine.settings import HostSettings, resolve_device
from flink_llm.errors import ConfigError

LONGEST_PATH = 107
"""Bytes that Linux allows for the path of a Unix socket (unix(7))."""


def socket_folder(settings: HostSettings) -> Path:
    """The private folder of sockets, locks and logs. Raises ConfigError when it is somebody else's."""
    chosen = settings.socket_dir or os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(chosen) / f"flink-llm-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"host.socket_dir: {folder} cannot be made: {error.strerror or error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"host.socket_dir: {folder} must be a folder of yours alone: chmod 700, or another one")
    return folder


def _gpu(device: str) -> str:
    """Which GPU a device number means here: `CUDA_VISIBLE_DEVICES` numbers them anew for each process."""
    number = device.partition(":")[2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[int(number)] if number and int(number) < len(visible) else number


def held_file(path: Path) -> Path:
    """The lock that a host of the socket `path` holds while it lives."""
    return path.with_suffix(".held")


def socket_path(settings: HostSettings) -> Path:
    """The socket's path: device, versions, and a digest of what else makes a host another host."""
    device = resolve_device(settings.device)
    sizes = [settings.threads, settings.slots, settings.queue, settings.cache_mb, settings.speculation]
    traits = [_gpu(device), *sizes, settings.launcher, settings.launcher_args]
    if settings.memory_mb is not None:
        traits.append(settings.memory_mb)
    if settings.mixed_mb != MIXED_MB:
        traits.append(f"mixed {settings.mixed_mb}")
    digest = hashlib.sha256(msgspec.json.encode(traits)).hexdigest()[:8]
    name = f"{device.replace(':', '')}-p{PROTOCOL_VERSION}-{__version__}-{digest}.sock"
    path = socket_folder(settings) / name
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(f"host.socket_dir: {path} is longer than {LONGEST_PATH} bytes; choose a shorter folder")
    return path
