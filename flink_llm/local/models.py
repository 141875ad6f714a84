"""What a model folder or a deployment file holds, checked as a host would check it."""

from pathlib import Path

from flink_llm.engine.deployment import Traits, Version, check_alike, is_deployment, read_deployment
from flink_llm.engine.model import MB, ModelFolder, open_model_folder
from flink_llm.engine.stock import needed_bytes

HEAD = ("folder", "weight", "model", "hash", "kind", "precision", "context", "MB")


def versions(path: str | Path) -> list[tuple[Version, ModelFolder]]:
    """The versions of a deployment file, or a model folder as the only one, every file compared with its manifest.

    Raises ConfigError for the file, ModelFolderError for a folder, one line.
    """
    path = Path(path)
    given = read_deployment(path).versions if is_deployment(str(path)) else [Version(folder=str(path))]
    opened = [(version, open_model_folder(version.folder)) for version in given]
    check_alike(path, [Traits(model.sha256, model.manifest.kind, model.manifest.labels) for _, model in opened])
    return opened


def table(path: str | Path, slots: int) -> list[str]:
    """Lines to print, the memory of each reckoned for `slots` generations at once. Raises as `versions`."""
    found = versions(path)
    rows = [HEAD, *(_row(version, folder, slots) for version, folder in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    together = sum(needed_bytes(folder.manifest, slots) for _, folder in found)
    lines += [
        f"{Path(version.folder).name} has the adapters {', '.join(folder.manifest.adapters)}"
        for version, folder in found
        if folder.manifest.adapters
    ]
    return [*lines, f"{-(-together // MB)} MB together, for {slots} generations at once"]


def _row(version: Version, folder: ModelFolder, slots: int) -> tuple[str, ...]:
    manifest = folder.manifest
    weight = f"{version.weight} canary" if version.canary else str(version.weight)
    return (
        Path(version.folder).name, weight, manifest.name, folder.sha256[:12], manifest.kind, manifest.precision,
        str(manifest.context_length), str(-(-needed_bytes(manifest, slots) // MB)),
    )  # fmt: skip
