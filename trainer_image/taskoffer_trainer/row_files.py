"""Which files hold rows or pictures, and in which format, by how they are called."""

from __future__ import annotations

from pathlib import PurePosixPath

from taskoffer.api.contract import FileFormat

__all__ = ["formats_of"]


def formats_of(paths: list[str]) -> dict[FileFormat, list[str]]:
    """Sort the files that can hold rows or pictures by their format; the best to train from comes first.

    ``hf`` are whole folders that ``save_to_disk`` has written, with what they say of themselves.
    """
    order = (FileFormat.PARQUET, FileFormat.JSONL, FileFormat.JSON, FileFormat.CSV, FileFormat.ZIP)
    about = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "dataset.json"}
    found: dict[FileFormat, list[str]] = {}
    if saved := _saved(paths):
        found[FileFormat.HF] = saved
    for file_format in order:
        of_it = [
            path
            for path in paths
            if path.endswith(f".{file_format.value}")
            and PurePosixPath(path).name not in about
            and not any(part.startswith(".") for part in PurePosixPath(path).parts)
        ]
        if of_it:
            found[file_format] = of_it
    return found


def _saved(paths: list[str]) -> list[str]:
    """Return the files of saved data sets: of folders in which Arrow files lie beside the list of them."""
    seen = [path for path in map(PurePosixPath, paths) if not any(part.startswith(".") for part in path.parts)]
    listed = {path.parent for path in seen if path.name == "state.json"}
    folders = listed & {path.parent for path in seen if path.suffix == ".arrow"}
    return [str(path) for path in seen if path.parent in folders and path.suffix in (".arrow", ".json")]
