"""What stands under a name is whole, whenever the writer dies; what it left is swept away."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenclean import publish
from tokenclean.publish import (
    MANIFEST,
    NotWritten,
    complete_folder,
    publish_file,
    publish_link,
    read_manifest,
    sweep,
    verify,
    write_json,
    write_text,
)

#: Every call that changes a file system and that publishing makes.
CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "symlink")


def in_child(work: Callable[[], None], kill_at: int | None = None) -> int:
    """Run ``work`` in a process of its own, killed before its call number ``kill_at`` of `CALLS`.

    Returns:
        How it ended: 0, or minus the signal that killed it.
    """
    child = os.fork()
    if child == 0:
        made = 0
        for name in CALLS:
            call = getattr(os, name)

            def counted(*args: Any, _call: Callable[..., Any] = call, **options: Any) -> Any:
                nonlocal made
                made += 1
                if made == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _call(*args, **options)

            setattr(os, name, counted)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_thing(folder: Path, text: str) -> None:
    with complete_folder(folder) as partial:
        (partial / "data").write_text(text)
        write_json(partial / MANIFEST, {"kind": "thing"})


def is_whole(folder: Path) -> bool:
    """By a check of our own: size and hash of the one file that the manifest lists."""
    stated = json.loads((folder / MANIFEST).read_text())["files"]
    data = (folder / "data").read_bytes()
    return bool(
        stated == {"data": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    )


def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    folder, found, number = tmp_path / "thing", set(), 0
    ended = -signal.SIGKILL
    while ended:
        number += 1
        sweep(tmp_path, everything=True)
        write_thing(folder, "old")
        ended = in_child(lambda: write_thing(folder, "new"), number)
        # What follows a kill in any run: sweeping, then reading.
        sweep(tmp_path)
        assert is_whole(folder), number
        found.add((folder / "data").read_text())
        assert [p.name for p in tmp_path.iterdir()] == ["thing"], number
    assert number > 10 and found == {"old", "new"}


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, found, number = tmp_path / "value.json", set(), 0
    ended = -signal.SIGKILL
    while ended:
        number += 1
        write_json(path, "old")
        ended = in_child(lambda: write_json(path, "new"), number)
        sweep(tmp_path)
        found.add(json.loads(path.read_text()))
        assert [p.name for p in tmp_path.iterdir()] == ["value.json"], number
    assert number > 3 and found == {"old", "new"}


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    link, found, number = tmp_path / "last", set(), 0
    ended = -signal.SIGKILL
    while ended:
        number += 1
        publish_link(link, Path("old"))
        ended = in_child(lambda: publish_link(link, Path("new")), number)
        sweep(tmp_path)
        found.add(str(link.readlink()))
    assert found == {"old", "new"}


def test_everything_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order that a power cut needs: contents, folder, name, the folder above."""
    done: list[str] = []
    flush, rename = publish.flush, os.rename

    def noted_flush(path: Path) -> None:
        done.append(f"flush {path.name}")
        flush(path)

    def noted_rename(old: Path, new: Path) -> None:
        done.append(f"name {new.name}")
        rename(old, new)

    monkeypatch.setattr(publish, "flush", noted_flush)
    monkeypatch.setattr(os, "rename", noted_rename)
    write_thing(tmp_path / "thing", "new")
    partial = publish.partial_name(tmp_path / "thing").name
    assert done[-2:] == ["name thing", f"flush {tmp_path.name}"]
    assert done[-3] == f"flush {partial}"
    assert {"flush data", f"flush {MANIFEST}"} <= set(done[:-3])


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path) -> None:
    write_thing(tmp_path / "thing", "old")
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "thing") as partial:
        (partial / "data").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    assert (tmp_path / "thing" / "data").read_text() == "old"


def test_a_finished_writer_replaces_the_folder(tmp_path: Path) -> None:
    write_thing(tmp_path / "thing", "old")
    with complete_folder(tmp_path / "thing") as partial:
        write_json(partial / MANIFEST, {"kind": "other"})
        assert (tmp_path / "thing" / "data").exists()
    assert [p.name for p in (tmp_path / "thing").iterdir()] == [MANIFEST]


def test_a_writer_follows_a_link(tmp_path: Path) -> None:
    folder, link = tmp_path / "far" / "thing", tmp_path / "link"
    write_thing(folder, "old")
    link.symlink_to(folder)
    write_thing(link, "new")
    assert link.is_symlink() and (folder / "data").read_text() == "new"
    assert [p.name for p in folder.parent.iterdir()] == ["thing"]


def test_a_file_in_the_way_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("a file")
    refused = pytest.raises(NotWritten, match="thing could not be written: Not a directory")
    with refused, complete_folder(tmp_path / "thing"):
        raise AssertionError("nothing is to be computed for it")
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"name": "naïve"})
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "naïve"}


def test_every_manifest_vouches_for_the_files_beside_it(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "pool") as partial:
        for name in ("train", "validation"):
            (partial / name).mkdir()
            (partial / name / "data").write_text(name)
            write_json(partial / name / MANIFEST, {"kind": "thing"})
        (partial / "note.txt").write_text("note")
    assert is_whole(tmp_path / "pool" / "train") and is_whole(tmp_path / "pool" / "validation")
    assert not (tmp_path / "pool" / MANIFEST).exists()


def test_a_folder_without_a_manifest_gets_one_unless_it_is_not_ours(tmp_path: Path) -> None:
    for name, sealed in (("ours", True), ("theirs", False)):
        with complete_folder(tmp_path / name, sealed) as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "data").write_text("x")
    stated = json.loads((tmp_path / "ours" / MANIFEST).read_text())
    assert stated["files"] == {
        "deep/data": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    }
    assert not (tmp_path / "theirs" / MANIFEST).exists()


@pytest.mark.parametrize("damage", ["size", "missing", "bits"])
def test_damage_is_noticed_and_named(tmp_path: Path, damage: str) -> None:
    write_thing(tmp_path / "thing", "whole")
    data = tmp_path / "thing" / "data"
    verify(tmp_path)
    if damage == "missing":
        data.unlink()
    else:
        data.write_text("whol" if damage == "size" else "whale")
    with pytest.raises(ValueError, match=r"thing/data"):
        verify(tmp_path)
    if damage != "bits":  # sizes are looked at whenever it is opened
        with pytest.raises(ValueError, match=r"thing/data .*delete .*thing"):
            read_manifest(tmp_path / "thing", "thing")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"files": 3}', '{"files": {"../x": {}}}', "[" * 100_000]
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged") as caught:
        read_manifest(tmp_path, "thing")
    assert len(str(caught.value)) < 500


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    host = publish._host()
    dead, alive = f"a.partial-{host}-{child}", f"b.partial-{host}-{os.getppid()}"
    far, mine = "c.partial-elsewhere-1", publish.partial_name(tmp_path / "d").name
    for name in (dead, alive, far, mine):
        (tmp_path / name).mkdir()
    (tmp_path / "e.partial").write_text("no name of ours")
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {alive, far, mine, "e.partial"}
    sweep(tmp_path, everything=True)
    assert {p.name for p in tmp_path.iterdir()} == {mine, "e.partial"}


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    write_thing(tmp_path / "thing", "old")
    write_text(tmp_path / "note", "old")
    said: list[str] = []

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for work in (
            lambda: write_thing(tmp_path / "thing", "x" * 5000),
            lambda: write_text(tmp_path / "note", "x" * 5000),
        ):
            try:
                work()
            except NotWritten as error:
                said.append(str(error))
        (tmp_path / "said").write_text(json.dumps(said))

    assert in_child(fill) == 0
    said = json.loads((tmp_path / "said").read_text())
    assert [str(tmp_path / n) in text for n, text in zip(("thing", "note"), said, strict=True)]
    assert all(f"{os.strerror(errno.EFBIG)}. What was finished before" in text for text in said)
    assert is_whole(tmp_path / "thing") and (tmp_path / "thing" / "data").read_text() == "old"
    assert (tmp_path / "note").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"thing", "note", "said"}


def test_an_unwritable_place_is_named() -> None:
    for work in (
        lambda: write_thing(Path("/proc/tokenclean/thing"), "x"),
        lambda: write_text(Path("/proc/tokenclean"), "x"),
    ):
        with pytest.raises((NotWritten, FileNotFoundError), match="/proc/tokenclean"):
            work()


def test_an_error_of_reading_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="elsewhere") as caught, publish_file(tmp_path / "note"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/input.jsonl")
    assert not isinstance(caught.value, NotWritten)


def test_nothing_behind_a_link_is_replaced_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years")
    (tmp_path / "scores").symlink_to(tmp_path / "documents")
    with pytest.raises(ValueError, match=r"scores is a link, to .*documents"):
        write_thing(tmp_path / "scores", "new")
    assert (tmp_path / "documents" / "thesis.txt").read_text() == "years"


def test_rests_with_odd_numbers_are_no_processes(tmp_path: Path) -> None:
    host = publish._host()
    for number in ("9999999999", "9" * 23):
        (tmp_path / f"x.partial-{host}-{number}").mkdir()
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f"x.partial-{host}-{'9' * 23}"]


def test_a_place_that_cannot_be_written_is_not_called_full(tmp_path: Path) -> None:
    said = {}
    for number in (errno.EROFS, errno.ENOSPC):
        with pytest.raises(NotWritten) as caught, publish.writing_to(tmp_path / "x"):
            raise OSError(number, os.strerror(number), str(tmp_path / "x"))
        said[number] = str(caught.value)
    assert "make room" in said[errno.ENOSPC] and "make room" not in said[errno.EROFS]
