"""Which files a data set may name: those inside its own folder; and writing a folder that appears whole."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from clvr_train.data.records import FieldError, check_text, one_line, shown

_ESCAPE = re.compile(r"%(?:2e|2f|5c|00|25)", re.IGNORECASE)  # . / \ NUL, and % itself, which could hide them
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(?:data|pipe|file):", re.IGNORECASE)


def path_inside(value: object, field: str, folder: Path) -> Path:
    """The regular file that a record names, which lies in `folder` even when every link is followed.

    Raises:
        FieldError: for what is no relative path, leads out of the folder, is a URL (which is never fetched), or names
            no file.
    """
    if not isinstance(value, str) or not value:
        raise FieldError(field, "must be a path relative to the folder", "wrong_type")
    check_text(value, field)
    name, windows = shown(value), PureWindowsPath(value)
    if "\0" in value or _ESCAPE.search(value):
        message = f"{name} holds a NUL or an escape such as %2e; write the path plainly"
        raise FieldError(field, message, "outside_root")
    if _URL.match(value):
        raise FieldError(field, f"{name} is a URL; only files inside the folder are read", "url")
    if PurePosixPath(value).is_absolute() or windows.drive or windows.root:
        message = f"{name} is absolute; only files inside the folder are read"
        raise FieldError(field, message, "outside_root")
    path = folder / value
    # Not Path.resolve: it raises RuntimeError at a loop of links.
    real, root = os.path.realpath(path), os.path.realpath(folder)
    if not Path(real).is_relative_to(root) or ("\\" in value and ".." in windows.parts):
        raise FieldError(field, f"{name} leads out of the folder", "outside_root")
    if not os.path.isfile(real):
        # Opening a named pipe would wait for ever.
        message = "not a regular file" if os.path.exists(real) else "no such file"
        raise FieldError(field, f"{one_line(str(path), 200)}: {message}", "missing_image")
    return path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name `folder` once the block has ended well, and is removed otherwise.

    Raises:
        FileExistsError: if there is a folder of this name that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is there already; choose another name or remove it")
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            _sync(path)
        os.rename(staging, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
