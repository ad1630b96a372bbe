"""What is written whole, what is refused, and what stays: nothing of the user's is lost. Faults are made in a folder of the test's own."""

import os
import signal
import socket
import stat

import pytest

from kvcache_lib import files

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX's kinds of files")


def content(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_new_and_old_files_are_written(tmp_path):
    (tmp_path / "a").write_text("old")
    files.write_whole({tmp_path / "a": "new: é\n", str(tmp_path / "b"): ""})
    assert content(tmp_path) == {"a": "new: é\n", "b": ""}
    assert (tmp_path / "a").read_bytes() == "new: é\n".encode()


@posix
def test_modes_stay_and_new_files_follow_the_umask(tmp_path):
    for mode in (0o600, 0o664, 0o755):
        (tmp_path / "a").write_text("old")
        (tmp_path / "a").chmod(mode)
        files.write_whole({tmp_path / "a": "new"})
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    umask = os.umask(0o027)
    try:
        files.write_whole({tmp_path / "b": "new"})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o640


@posix
def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"there/{name}")  # the second leads to no file yet
        files.check_writable(tmp_path / name)
        files.write_whole({tmp_path / name: "new"})
        assert (tmp_path / name).is_symlink() and (tmp_path / "there" / name).read_text() == "new"
    assert sorted(os.listdir(tmp_path / "there")) == ["new", "old"]


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            s.bind(path.name)
        finally:
            os.chdir(here)


def make_link_to_fifo(path):
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


def make_loop(path):
    path.symlink_to(path.name)


@posix
@pytest.mark.parametrize(
    "make,says",
    [
        (lambda path: path.mkdir(), "it is a folder"),
        (make_fifo, "it is a FIFO"),
        (make_link_to_fifo, "it is a FIFO"),
        (make_socket, "it is a socket"),
        (make_loop, "symbolic links"),
        (lambda path: path.symlink_to("missing/file"), "No such file"),
    ],
)
def test_what_is_no_regular_file_is_refused_and_stays(make, says, tmp_path):
    path = tmp_path / "out"
    make(path)
    (tmp_path / "other").write_text("old")
    before = {name: os.lstat(tmp_path / name) for name in os.listdir(tmp_path)}
    with pytest.raises(ValueError, match=f"expected a file that can be written, got .*out: .*{says}"):
        files.check_writable(tmp_path / "other", path)
    with pytest.raises(ValueError, match=says):
        files.write_whole({tmp_path / "other": "new", path: "new"})
    after = {name: os.lstat(tmp_path / name) for name in os.listdir(tmp_path)}
    same = ("st_ino", "st_mode", "st_size", "st_mtime_ns")
    assert {n: [getattr(s, k) for k in same] for n, s in before.items()} == {
        n: [getattr(s, k) for k in same] for n, s in after.items()
    }


@posix
def test_a_device_is_recognised():  # only looked at: a test must not risk the machine's own
    with pytest.raises(ValueError, match="got /dev/null: it is a device"):
        files.regular_file("/dev/null")


def test_checking_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    before = (tmp_path / "a").stat()
    files.check_writable(tmp_path / "a", tmp_path / "b")
    after = (tmp_path / "a").stat()  # before `content` reads it, which some file systems note as its last access
    assert content(tmp_path) == {"a": "old"} and after == before


@posix
def test_two_names_of_one_file_are_refused(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match="expected paths of different files, got .*a, .*b"):
        files.check_writable(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("path", ["missing/b", "a/b", "x" * 300])
def test_a_failed_write_leaves_the_old_files(path, tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ValueError, match="expected a file that can be written, got .*"):
        files.write_whole({tmp_path / "a": "new", tmp_path / path: "new"})
    assert content(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_failure_between_two_files_puts_the_first_back(links, tmp_path, monkeypatch):
    for name in ("a", "c"):
        (tmp_path / name).write_text("old")
    real, refused = os.replace, str(tmp_path / "c")

    def replace(new, file):
        if str(file) == refused:
            raise PermissionError(13, "Permission denied")
        real(new, file)

    def link(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", link)
    with pytest.raises(ValueError, match="got .*c: Permission denied"):
        files.write_whole({tmp_path / name: "new" for name in "abc"})
    assert content(tmp_path) == {"a": "old", "c": "old"}


def test_text_that_is_no_unicode_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_whole({tmp_path / "a": "\ud800"})
    assert content(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("number", files.signal_numbers())
def test_signals_wait_and_come_once(number):
    came, before = [], signal.signal(number, lambda number, frame: came.append(number))
    try:
        with files.signals_held():
            with files.signals_held():
                signal.raise_signal(number)
            signal.raise_signal(number)
            assert came == []
        assert came == [number]
    finally:
        signal.signal(number, before)
