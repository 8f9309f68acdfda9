"""The address of an MLflow store, and the sqlite file behind it.

MLflow makes its tables in a few hundred statements. A process that is killed in between leaves a
file that no later one can use. So the file is made under a lock, in another place, and renamed.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from filelock import FileLock

from pretrain.config.trackers import sqlite_uri

_LOCK_SECONDS = 120.0
_PROBE_SECONDS = 2.0


def tracking_uri(root: Path, uri: str | None) -> str:
    """Address of the store: `uri`, or the sqlite file that all runs below `root` share."""
    return uri or sqlite_uri(root.absolute() / "mlflow.db")


def sqlite_path(uri: str) -> Path | None:
    """File behind a sqlite address, or None for another store."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None


def prepare_store(uri: str) -> None:
    """Make the sqlite file of this address unless it is there and whole.

    Raises sqlite3.Error where the file is no database or is locked; MLflow would retry for minutes.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_whole(path):
        return
    with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
        if _is_whole(path):  # another run has just made it
            return
        for old in path.parent.glob(f".{path.name}.*.making"):
            shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".making", dir=path.parent))
        try:
            _make(folder / "mlflow.db")
            if path.exists():
                os.replace(path, _free_name(path))
            os.replace(folder / "mlflow.db", path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stray_folder(uri: str) -> None:
    """Remove the empty folder that MLflow makes for the encoded form of a path."""
    path = sqlite_path(uri)
    raw = Path(uri.partition(":///")[2]).parent
    if path is not None and raw != path.parent:
        with suppress(OSError):
            raw.rmdir()


def _is_whole(path: Path) -> bool:
    """True where a store is there: complete, or with runs, whose upgrade is the user's decision."""
    if not path.exists():
        return False
    with closing(sqlite3.connect(path, timeout=_PROBE_SECONDS)) as database:
        names = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
        if not names:
            return False
        with suppress(sqlite3.OperationalError):  # a table is missing
            if database.execute("SELECT 1 FROM runs LIMIT 1").fetchone():
                return True
        try:
            versions = database.execute("SELECT version_num FROM alembic_version").fetchall()
        except sqlite3.OperationalError:
            return False
    from mlflow.store.db.utils import _get_latest_schema_revision

    return versions == [(_get_latest_schema_revision(),)] and "experiments" in names


def _make(path: Path) -> None:
    """Make all tables in a new file."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = sqlite_uri(path)
    store = SqlAlchemyStore(uri, "./mlruns")
    store.engine.dispose()
    remove_stray_folder(uri)


def _free_name(path: Path) -> Path:
    """Name for a half-made file, which is kept: it may be another program's."""
    number = 1
    while (found := path.with_name(f"{path.name}.unusable-{number}")).exists():
        number += 1
    return found
