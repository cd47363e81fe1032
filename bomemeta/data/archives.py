"""Where archives of arrays (`.npz`) lie, how they are read and written. Pickles are refused:
nothing in a data file is executed.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bomemeta.errors import DataError


def data_folder(dataset: str, root: str | None, prepared: str | None = None) -> Path:
    """`root`, or else the environment's BOMEMETA_DATA. Raises DataError where neither is given,
    which says that `bomemeta data prepare` fills one, under the data set's own name or the name
    `prepared`.
    """
    chosen = root or os.environ.get("BOMEMETA_DATA")
    if not chosen:
        raise DataError(
            f"{dataset}: no data folder is given. Set data.root in the config or BOMEMETA_DATA in the environment; "
            f"`bomemeta data prepare {prepared or dataset} --root FOLDER` fills one"
        )
    return Path(chosen).expanduser()


def find(dataset: str, file: str, root: str | None) -> Path:
    """The path of `file` in the data folder. Raises DataError that says where it looked and how to
    get it.
    """
    path = data_folder(dataset, root) / file
    if not path.is_file():
        where = "data.root" if root else "BOMEMETA_DATA"
        raise DataError(
            f"{dataset}: {path} does not exist (the folder is from {where}). Get it with `bomemeta data prepare {dataset} "
            f"--root {path.parent}`, or point data.root or BOMEMETA_DATA at a folder that has it"
        )
    return path


def read(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of an archive. Raises DataError where the file is damaged, holds pickles or
    lacks one of them.
    """
    try:
        # Opened here, because numpy leaves a file that is no archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
    ) as error:
        raise DataError(
            f"{path} is not a readable archive of the arrays {', '.join(names)}: {error}. Delete it and get it again"
        ) from error


def write(path: Path, arrays: dict[str, NDArray[Any]], *, compress: bool) -> None:
    """Writes the archive whole or not at all, so that a reader or a second writer never meets half
    a file. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save: Any = np.savez_compressed if compress else np.savez
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as part:
        try:
            save(part, **arrays)
            part.close()
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
