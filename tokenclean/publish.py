"""Publishing: what stands under a name is whole, is on the disk, and says what it holds.

Everything is written beside its target under a name of its own, flushed to the disk, and renamed;
the directory is flushed after. A folder gets a manifest with the size and SHA-256 of every file,
written last: a folder without one is not a result. A process that dies leaves partial files at
most, which the next one sweeps away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
#: Entry of a manifest: name -> ``bytes`` and ``sha256`` of every other file beside it.
FILES = "files"
#: What a full disk, a quota, a limit or a file system that takes nothing says.
_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG),
)
_PARTIAL = re.compile(r"(?P<old>\.old)?\.partial-(?P<host>.+)-(?P<process>\d{1,10})$")


class NotWritten(ValueError):
    """Something could not be written: the message names it and says what is left."""


def partial_name(path: Path) -> Path:
    """Where to write what becomes ``path``: beside it, named after this process."""
    return path.with_name(f"{path.name}.partial-{_host()}-{os.getpid()}")


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname()) or "host"


@contextmanager
def complete_folder(path: Path, sealed: bool = True) -> Iterator[Path]:
    """A folder to write into that becomes ``path`` only if the block finishes.

    Where ``path`` is a link, what it points to is replaced and the link stays; but nothing that has
    no manifest is replaced behind a link, since nobody of us has made it.

    Args:
        path: the folder. One of that name is replaced.
        sealed: give every manifest in it the sizes and hashes of the files beside it, and a
            manifest to a folder that has none at all; not for layouts that belong to others.

    Raises:
        NotWritten: if the disk takes no more, or the place cannot be written to.
        ValueError: if a link leads to a folder that is not ours.
    """
    if sealed and path.is_symlink() and path.is_dir() and not (path / MANIFEST).is_file():
        refuse_links(path)
    path = path.resolve()
    partial, aside = partial_name(path), partial_name(path.with_name(f"{path.name}.old"))
    with writing_to(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        shutil.rmtree(partial, ignore_errors=True)
        # A process of our number, in a container that was started again, may have left it.
        _put_back(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
        partial.mkdir(parents=True)
        sweep(path.parent, path.name)
    try:
        with writing_to(path):
            yield partial
            if sealed:
                _seal(partial)
            _flush_tree(partial)
            if path.exists():
                path.rename(aside)
            _take_name(partial, path)
            flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path, path: Path) -> None:
    """What was about to be replaced, if nothing has taken its name."""
    if aside.exists() and not path.exists():
        aside.rename(path)


def _take_name(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError:
        # Or else another process has finished the same folder meanwhile.
        if not (path / MANIFEST).is_file():
            raise
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """A file to write that becomes ``path`` only if the block finishes: the old one or the new one.

    Raises:
        NotWritten: if the disk takes no more, or the place cannot be written to.
    """
    partial = partial_name(path)
    try:
        with writing_to(path):
            yield partial
            flush(partial)
            partial.replace(path)
            flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def refuse_links(path: Path) -> None:
    """Refuse to write through a link that is none of ours: a run folder may come from a stranger.

    Raises:
        ValueError: naming it.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, to {os.readlink(path)}; delete the link")


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a torn one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, never a torn one."""
    with publish_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish_link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to ``target``, whatever it was before, in one step."""
    partial = partial_name(path)
    with writing_to(path):
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        partial.replace(path)
        flush(path.parent)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder, whose files have the sizes that it states.

    Raises:
        ValueError: if the folder has none, holds another kind of thing, or is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a {kind}: it has no {MANIFEST}")
    manifest = _manifest(path)
    if manifest.get("kind") != kind:
        raise ValueError(f"{folder} holds a {manifest.get('kind')}, not a {kind}")
    _check_sizes(path, manifest)
    return manifest


def verify(folder: Path) -> None:
    """Read every file that a manifest in the folder vouches for and compare it with its hash.

    Folders made before manifests had hashes are taken as they are.

    Raises:
        ValueError: naming the first file that is not what it was.
    """
    for path in sorted(Path(folder).rglob(MANIFEST)):
        manifest = _manifest(path)
        _check_sizes(path, manifest)
        for name, stated in manifest.get(FILES, {}).items():
            if _facts(path.parent / name)["sha256"] != stated.get("sha256"):
                raise ValueError(
                    f"{path.parent / name} is not what {path} says was written; delete "
                    f"{path.parent}, and the same command makes it anew"
                )


def sweep(folder: Path, name: str | None = None, everything: bool = False) -> None:
    """Remove what dead processes left unfinished.

    Args:
        folder: where to look.
        name: only beside this target, not in folders within; "" beside any.
        everything: also what living processes write, which a lock on the folder excludes.
    """
    pattern = "**/*" if name is None else f"{_escaped(name)}*"
    for path in list(folder.glob(f"{pattern}.partial-*")):
        match = _PARTIAL.search(path.name)
        ours = match is not None and int(match["process"]) == os.getpid()
        if match is None or (ours and match["host"] == _host()):
            continue
        if everything or (match["host"] == _host() and not _lives(int(match["process"]))):
            if match["old"]:
                _put_back(path, path.with_name(path.name[: match.start()]))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the operating system write a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a directory; nothing else is excused.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _seal(folder: Path) -> None:
    manifests = sorted(folder.rglob(MANIFEST))
    if not manifests:
        _write_manifest(folder / MANIFEST, {"kind": "folder"}, sorted(_files(folder)))
    for path in manifests:
        beside = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
        _write_manifest(path, _manifest(path), beside)


def _write_manifest(path: Path, manifest: dict[str, Any], files: list[Path]) -> None:
    facts = {file.relative_to(path.parent).as_posix(): _facts(file) for file in files}
    write_json(path, {**manifest, FILES: facts})


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _flush_tree(folder: Path) -> None:
    for path in _files(folder):
        flush(path)
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush(path)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {str(error)[:200]}") from error
    if not isinstance(manifest, dict) or not _is_listing(manifest.get(FILES, {})):
        raise ValueError(f"{path} is damaged: it is no manifest")
    return manifest


def _is_listing(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(facts, dict)
        and isinstance(facts.get("bytes"), int)
        and isinstance(facts.get("sha256"), str)
        and not {".."} & set(Path(name).parts)
        and not name.startswith("/")
        for name, facts in files.items()
    )


def _check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    for name, stated in manifest.get(FILES, {}).items():
        file = path.parent / name
        size = file.stat().st_size if file.is_file() else None
        if size != stated.get("bytes"):
            raise ValueError(
                f"{file} {'is missing' if size is None else f'has {size} bytes'}, where {path} "
                f"states {stated.get('bytes')}; delete {path.parent}, and the command that made it "
                "makes it anew"
            )


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Say that it was this path that could not be written, and what is left of what was.

    Raises:
        NotWritten: for whatever a disk or a file system refuses.
    """
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        named = None if error.filename is None else str(error.filename)
        ours = named is None or ".partial-" in named or Path(named) in (path, *path.parents)
        if error.errno in _UNWRITABLE and ours:
            raise _not_written(path, error) from error
        raise


def _not_written(path: Path, error: OSError) -> NotWritten:
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = (
        "make room, or choose another place," if full else "choose a place that can be written,"
    )
    return NotWritten(
        f"{path} could not be written: {reason}. What was finished before is whole and stays; "
        f"{remedy} and the same command goes on from there"
    )
