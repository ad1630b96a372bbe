"""A class in which nearly everyone attacks: no pass that is not earned, no harm, and every row there. Needs bubblewrap."""

import io
import json
import os
import shutil
import socket
import stat
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import LONG
from hostile import ATTACKS, HOSTILE, LIES, REPEATED, SOLUTION

from kvcache_lib.classroom import grading
from kvcache_lib.classroom.exercises import EXERCISES
from kvcache_lib.classroom.results import Results
from kvcache_lib.classroom.sandbox import Limits, why_no_sandbox
from kvcache_lib.classroom.solutions import TAKEN, solution_source
from kvcache_lib.classroom.submissions import find_submissions

REASON = why_no_sandbox()
needs_sandbox = pytest.mark.skipif(bool(REASON), reason=REASON)
STEMS = [exercise.notebook for exercise in EXERCISES]
# Those that only the clock ends.
SLOW = ("loops", "loops and ignores signals", "raises what never ends", "matches for ever", "a large power", "a hanging import",
        "cancels its clock")
if not LONG:
    ATTACKS, HOSTILE = ({name: source for name, source in kind.items() if name not in REPEATED} for kind in (ATTACKS, HOSTILE))
    SLOW = tuple(name for name in SLOW if name in HOSTILE)
SOON = (*SLOW, "fills its disk", "recurses in C")  # these may end of themselves, but take their time


def notebook(source: str) -> str:
    "A notebook that exports a source."
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": f"#| export\n{source}"}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def zipped(files: dict, link: str = "") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFLNK | 0o777 if name == link else stat.S_IFREG | 0o644) << 16
            archive.writestr(info, text)
    return data.getvalue()


def nest(folder: Path, depth: int) -> None:
    "Folders in folders, deeper than a path can name."
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 200, dir_fd=here)
        there = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(here)


def unnest(folder: Path) -> None:
    "Take such folders away again, the outermost first: pytest's own way does not get there."
    while (inner := folder / ("d" * 200)).exists():
        for path in list(inner.iterdir()):
            path.rename(folder / "next")
        inner.rmdir()
        if (folder / "next").exists():
            (folder / "next").rename(inner)


FIRST = "02_attention.ipynb"
ODD = {  # name: what to do in the learner's folder, and what the row must say
    "a FIFO": (lambda f: os.mkfifo(f / FIRST), "not a regular file"),
    "a socket": (lambda f: socket.socket(socket.AF_UNIX).bind(os.path.relpath(f / FIRST)), "not a regular file"),
    "a folder": (lambda f: (f / FIRST).mkdir(), "is missing"),
    "a link to a neighbour": (lambda f: (f / FIRST).symlink_to(f.parent / "aaa" / FIRST), "is a link"),
    "a link to a device": (lambda f: (f / FIRST).symlink_to("/dev/zero"), "is a link"),
    "a link to itself": (lambda f: (f / FIRST).symlink_to(f / FIRST), "is a link"),
    "a linked folder": (lambda f: (f / "work").symlink_to(f.parent / "aaa"), "work is a link"),
    "a hidden copy": (lambda f: put(f / ".work" / FIRST, notebook(SOLUTION)), ".work is hidden"),
    "two copies": (lambda f: [put(f / d / FIRST, notebook(SOLUTION)) for d in "ab"], "several notebooks could be meant"),
    "a deep folder": (lambda f: nest(f, 1100), "is missing; "),
    "deep JSON": (lambda f: put(f / FIRST, "[" * 200_000), "not a Jupyter notebook"),
    "large JSON": (lambda f: put(f / FIRST, '{"cells": [' + "[]," * 300_000 + "[]]}"), "not a Jupyter notebook"),
    "too large": (lambda f: sparse(f / FIRST, 2**35), "larger than 32 MiB"),
    "empty": (lambda f: put(f / FIRST, ""), "not a Jupyter notebook"),
    "UTF-16": (lambda f: (f / FIRST).write_bytes(notebook("x").encode("utf-16")), "not a Jupyter notebook"),
    "a mark in front": (lambda f: (f / FIRST).write_bytes(b"\xef\xbb\xbf" + notebook("x = 1").encode()), "defines the class"),
    "cells of another kind": (lambda f: put(f / FIRST, '{"cells": [{"cell_type": [], "source": {}}]}'), "not a Jupyter notebook"),
    "a broken zip": (lambda f: put(f / "work.zip", "PK\3\4 broken"), "work.zip cannot be unpacked"),
    "a zip bomb": (lambda f: (f / "work.zip").write_bytes(zipped({FIRST: "x" * 2**27})), "cannot be unpacked"),
    "a zip with a link": (lambda f: (f / "work.zip").write_bytes(zipped({FIRST: "../aaa/" + FIRST}, link=FIRST)), "is a link"),
    "a zip that climbs": (lambda f: (f / "work.zip").write_bytes(zipped({f"../../aaa/{FIRST}": notebook("x = 1")})), "hidden"),
    "another name": (lambda f: put(f / "02_attention (1).ipynb", notebook("x = 1")), "02_attention (1).ipynb"),
    "=cmd|' -C calc'!A0": (lambda f: None, "is missing"),
    "name\nwith \x1b[31mlines": (lambda f: None, "is missing"),
    os.fsdecode(b"caf\xe9"): (lambda f: None, "is missing"),
}


def put(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


class Patient(grading.Worker):
    "Short time for those that would use all of it, much for the others: machines are slow at times."

    def check(self, exercise, sources):
        slow = any(HOSTILE.get(name) in sources.values() for name in SOON)
        self.limits = Limits(seconds=1.0 if slow else 120.0, memory=2**29)
        return super().check(exercise, sources)


class Ear:
    "Listens on a port and on an abstract name, and counts what arrives."

    def __init__(self):
        self.heard = []
        self.stream, self.datagram = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port, self.name = self.stream.getsockname()[1], f"kvcache-ear-{os.getpid()}"
        self.datagram.bind(("127.0.0.1", self.port))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0" + self.name)
        self.abstract.listen()
        for listen in (self.stream.accept, self.abstract.accept, lambda: self.datagram.recv(9)):
            threading.Thread(target=lambda listen=listen: self.heard.append(listen()), daemon=True).start()


def states(folder: Path) -> dict:
    "Type, mode, size and content of everything in a folder, as far as paths reach."
    found = {}
    for root, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(root, name)
            info = os.lstat(path)
            small = stat.S_ISREG(info.st_mode) and info.st_size < 2**20
            found[path] = (info.st_mode, info.st_size, info.st_mtime_ns, Path(path).read_bytes() if small else b"")
        if len(root) > 3000:
            folders.clear()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Grade all of them at once, with two honest learners between them: `(rows, facts)`."
    tmp = tmp_path_factory.mktemp("hostile")
    folder, canary, ear = tmp / "class", tmp / "canary", Ear()
    canary.write_text("as it was")
    for learner in ("aaa", "zzz"):
        (folder / learner).mkdir(parents=True)
        for exercise in EXERCISES if learner == "aaa" else EXERCISES[:1]:
            taken = f"{TAKEN.format(n=exercise.key)}\n"
            (folder / learner / f"{exercise.notebook}.ipynb").write_text(notebook(taken + solution_source(exercise)))
    for name, source in {**ATTACKS, **HOSTILE}.items():
        for key, value in {"class": folder, "canary": canary, "port": ear.port, "abstract": ear.name}.items():
            source = source.replace("{%s}" % key, str(value))
        (folder / name).mkdir()
        (folder / name / FIRST).write_text(notebook(source))
    for name, (make, _) in ODD.items():
        (folder / name).mkdir()
        make(folder / name)
    (folder / "lies").mkdir()
    (folder / "lies" / "04_gpt.ipynb").write_text(notebook(LIES))
    before = states(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(grading, "Worker", Patient)
    try:
        with Results(tmp / "results.jsonl") as results:
            grading.grade_class(find_submissions(folder)[0], results, jobs=1, seed=1, hidden=[folder])
    finally:
        patch.undo()
    facts = {"changed": states(folder) != before, "canary": canary.read_text(), "heard": ear.heard, "folder": folder}
    unnest(folder / "a deep folder")
    shutil.rmtree(folder / "a deep folder")
    return results.rows, facts


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_no_pass_that_is_not_earned(run, name):
    row = run[0][name, 1]
    assert row.status in ("fail", "look"), row


@needs_sandbox
def test_lies_about_the_work_are_not_believed_where_numbers_depend_on_the_cache(run):
    assert run[0]["lies", 3].status == "fail", run[0]["lies", 3]


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_learner_has_a_row_and_no_pass(run, name):
    rows = [run[0][name, exercise.key] for exercise in EXERCISES]
    assert rows[0].status in ("fail", "look") and rows[0].result.isprintable(), rows[0]
    assert name in SOON or "stopped after" not in rows[0].result, rows[0]
    assert name not in SLOW or "stopped after 1 s: an endless loop?" in rows[0].result, rows[0]
    assert [row.result for row in rows[1:]] == [f"{stem}.ipynb is missing" for stem in STEMS[1:]]


@needs_sandbox
@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_files_are_named(run, name):
    row = run[0][name, 1]
    assert row.status == "fail" and ODD[name][1] in row.result, row


@needs_sandbox
def test_neighbours_keep_their_grades_and_nothing_is_changed_or_left(run):
    rows, facts = run
    assert {rows["aaa", e.key].result for e in EXERCISES} == {rows["zzz", 1].result} == {"solution taken"}
    assert len(rows) == len(EXERCISES) * (3 + len(ATTACKS) + len(HOSTILE) + len(ODD))
    assert not facts["changed"] and facts["canary"] == "as it was" and facts["heard"] == []
    assert not [row for row in rows.values() if "as it was" in row.result], "the canary was read"
    assert not [row for row in rows.values() if "could not be graded" in row.result], "someone broke a process of the grader's"
    left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and parent(p) == os.getpid()]
    assert not [p for p in left if "kvcache" in (p / "cmdline").read_text(errors="replace")]
    jobs = lambda: {p.name for p in Path("/proc").iterdir() if p.name.isdigit() and 20_000 <= owner(p) < 60_000}
    left, end = jobs(), time.monotonic() + 60  # another test may be grading at the same time: its jobs end by themselves
    while left and time.monotonic() < end:
        time.sleep(0.5)
        left &= jobs()
    assert not left or os.geteuid()


def parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def owner(path: Path) -> int:
    try:
        return path.stat().st_uid
    except OSError:
        return 0


@needs_sandbox
def test_what_is_shown_does_nothing(run):
    from kvcache_lib.classroom.report import as_csv, as_html, table

    grades = sorted(run[0].values(), key=lambda grade: (grade.learner, str(grade.exercise)))
    for text in (table(grades, 100), as_csv(grades), as_html(grades, [])):
        assert text.encode() and all(c.isprintable() or c == "\n" for c in text.replace("\ufeff", ""))
    import csv

    cells = [cell for row in csv.reader(as_csv(grades).splitlines()) for cell in row]
    assert any("=cmd" in cell for cell in cells) and not [cell for cell in cells if cell[:1] in tuple("=+-@")]
