"""Which pictures of a data file can be had, found without reading them: before a run starts and not in its middle."""

import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from mova_core.io.filesystem import ReadError, open_filesystem, with_retries
from mova_core.io.read import file_version
from mova_core.io.uris import local_path, parent, parse, scheme

THREADS = 16  # folders or files of an object store asked for at a time


def missing_files(locators: Iterable[str]) -> set[str]:
    """Those of the locators whose file is not there or cannot be read: a picture, or the tar or Parquet file that holds it.

    A local file costs two system calls. Of an object store each folder is listed once; of an HTTP server, which lists no
    folder, each file is asked for.
    """
    files: dict[str, list[str]] = {}
    for locator in locators:
        source = parse(locator)
        files.setdefault(source if isinstance(source, str) else source.file, []).append(locator)
    remote = [file for file in files if local_path(file) is None]
    missing = {file for file in files if local_path(file) is not None and not _readable(local_path(file) or "")}
    if remote:
        missing |= _missing_remote(remote)
    return {locator for file in missing for locator in files[file]}


def _readable(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.R_OK)
    except (OSError, ValueError):
        return False


def _missing_remote(files: list[str]) -> set[str]:
    single = [file for file in files if scheme(file) in ("http", "https")]
    by_folder: dict[str, list[str]] = {}
    for file in files:
        if scheme(file) not in ("http", "https"):
            by_folder.setdefault(parent(file), []).append(file)
    with ThreadPoolExecutor(THREADS) as threads:
        present = threads.map(_is_there, single)
        listed = threads.map(_missing_in_folder, by_folder, by_folder.values())
        missing = {file for file, there in zip(single, present, strict=True) if not there}
        return missing.union(*listed)


def _is_there(file: str) -> bool:
    try:
        file_version(file)
    except ReadError:
        return False
    return True


def _missing_in_folder(folder: str, files: list[str]) -> set[str]:
    """Those of the files of one folder that its listing does not name."""

    def names() -> set[str]:
        filesystem, path = open_filesystem(folder)
        return {str(entry).rstrip("/").rpartition("/")[2] for entry in filesystem.ls(path, detail=False)}

    try:
        present = with_retries(names)
    except ReadError:
        return {file for file in files if not _is_there(file)}
    return {file for file in files if file.rpartition("/")[2] not in present and not _is_there(file)}
