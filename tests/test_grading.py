"""Grading: a class from the command line, results that stay, likeness, transport, sandbox, and what is not sandboxed."""

import ast
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import right_solutions
import torch

from kvcache_lib.classroom import grading, sandbox
from kvcache_lib.classroom.edition import make_edition
from kvcache_lib.classroom.exercises import COURSE, EXERCISES
from kvcache_lib.classroom.grading import ALIKE, Course, grade_class, main, pairs_alike
from kvcache_lib.classroom.notebooks import course_notebook, definition_cells, read_notebook, write_notebook
from kvcache_lib.classroom.report import COLUMNS, as_csv, as_html, table
from kvcache_lib.classroom.results import Grade, NotWritten, Results
from kvcache_lib.classroom.review import fingerprint, likeness, reaches_for, written
from kvcache_lib.classroom.sandbox import Limits, why_no_sandbox
from kvcache_lib.classroom.solutions import for_learner, solution_source, solve
from kvcache_lib.classroom.submissions import collect, find_submissions, read_files
from kvcache_lib.classroom.transport import Refused, pack, unpack
from kvcache_lib.classroom.workers import Outcome, Worker

ROOT = Path(__file__).parents[1]
ATTENTION = EXERCISES[0]
REASON = why_no_sandbox()
needs_sandbox = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    return make_edition(tmp_path_factory.mktemp("edition") / "exercises")


def write(folder, exercise, old="", new=""):
    "Write the solution of an exercise into a submission, with `new` in place of `old`, as a learner would."
    nb = course_notebook(exercise.notebook)
    source = for_learner(nb["cells"][definition_cells(nb, exercise)[0]]["source"])
    assert old in source
    path = folder / f"{exercise.notebook}.ipynb"
    nb = read_notebook(path)
    nb["cells"][definition_cells(nb, exercise)[0]]["source"] = source.replace(old, new)
    write_notebook(path, nb)


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


# --- a class


@needs_sandbox
def test_a_class(blank, tmp_path, capsys, monkeypatch):
    "One right, one mistaken, one empty, one zipped without its checks, one with a syntax error; again, and changed."
    folder = tmp_path / "class"
    for learner in ("right", "mistaken", "untested", "syntax"):
        shutil.copytree(blank, folder / learner)
    (folder / "empty").mkdir()
    for exercise in COURSE:
        write(folder / "right", exercise)
    write(folder / "mistaken", ATTENTION, "P:S, :S]", ":T, :S]")
    write(folder / "mistaken", EXERCISES[1])
    solve(3, folder / "mistaken")
    solve("10_text", folder / "mistaken")
    write(folder / "syntax", ATTENTION, "self.project(x)", "self.project(x")
    nb = read_notebook(folder / "untested" / "02_attention.ipynb")
    kept = [cell for cell in nb["cells"] if "check_attention" not in cell["source"]]
    write_notebook(folder / "untested" / "02_attention.ipynb", nb | {"cells": kept})
    (folder / "untested" / "my_kvcache" / "attention.py").write_text("1 / 0")  # what was exported does not count
    shutil.make_archive(folder / "untested", "zip", folder / "untested")
    shutil.rmtree(folder / "untested")
    (folder / "03_block.ipynb").write_text("{}")
    before = files(folder)

    def grade(*options):
        with pytest.raises(SystemExit) as stopped:
            main([str(folder), "--seed", "3", "--jobs", "1", *options])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        rows = [json.loads(line) for line in (tmp_path / "class-grades" / "results.jsonl").read_text().splitlines()]
        return out, {(row["learner"], row["exercise"]): row for row in rows}, len(rows)

    monkeypatch.setenv("COLUMNS", "200")
    out, rows, count = grade()
    said = {key: row["result"] for key, row in rows.items()}
    assert [rows["right", n]["status"] for n in (1, 2, 3)] == ["look", "pass", "look"]
    assert "is like the solution, 100%" in said["right", 1]
    assert all(said["empty", e.key] == f"{e.notebook}.ipynb is missing" for e in EXERCISES)
    assert "SyntaxError" in said["syntax", 1] and "self.project(x" in said["syntax", 1]
    assert "mask" in said["mistaken", 1] and rows["mistaken", 1]["status"] == "fail"
    assert said["mistaken", 2] == "pass (on the course's exercise 1)"
    assert said["mistaken", 3] == "solution taken (on the course's exercise 1)" and rows["mistaken", 3]["status"] == "taken"
    for learner, numbers in {"untested": (1, 2, 3), "syntax": (2, 3)}.items():
        assert all(f"Exercise {n}" in said[learner, n] for n in numbers)
    assert "bubblewrap" in out and "03_block.ipynb: lies beside" in out
    assert files(folder) == before, "a submission was changed"
    page = (tmp_path / "class-grades" / "grades.html").read_text()
    assert "solution taken" in page and "Beyond the course, and not counted: 1." in page
    # beyond the course only what was worked on has a row, whatever was handed in
    assert said["mistaken", "10_text"] == "solution taken" and "10_text, extra" in out
    assert {row["status"] for (learner, _), row in rows.items() if row["extra"]} == {"left", "taken"} and out.count("extra") == 1
    assert (tmp_path / "class-grades" / "grades.csv").read_text().count("\n") == 1 + 5 * len(COURSE) + 1

    # again: nothing is worked out twice; what was handed in anew is
    monkeypatch.setattr(Worker, "check", lambda *args: pytest.fail("a result was there already"))
    assert grade()[2] == count
    monkeypatch.undo()
    write(folder / "syntax", ATTENTION)
    monkeypatch.setattr(Worker, "read", lambda self, found: read_files({"files": found.files, "odd": found.odd}))
    monkeypatch.setattr(Worker, "check", lambda *args: Outcome(True, "pass"))
    _, rows, now = grade()
    assert now == count + len(EXERCISES) and rows["syntax", 1]["status"] == "look"


def test_a_fourth_exercise_is_graded_too(tmp_path, monkeypatch):
    "All that grading knows of the exercises stands in one table."
    from kvcache_lib.classroom import exercises, submissions

    fourth = exercises.Exercise(4, "02_attention", {"CausalSelfAttention_kv.forward": "check_new", "CausalSelfAttention_kv.backward": "check_attention"}, 1, 5)
    for module in (grading, submissions):
        monkeypatch.setattr(module, "EXERCISES", (*COURSE, fourth))
    cell = {"cell_type": "code", "source": "#| export\n" + solution_source(ATTENTION)}
    (tmp_path / "class" / "ada").mkdir(parents=True)
    (tmp_path / "class" / "ada" / "02_attention.ipynb").write_text(json.dumps({"cells": [cell]}))
    asked = []

    class Here(Worker):
        def read(self, submission):
            return read_files({"files": submission.files, "odd": submission.odd})

        def check(self, exercise, sources):
            asked.append((exercise.number, sorted(sources)))
            return Outcome(True, "pass")

    monkeypatch.setattr(grading, "Worker", Here)
    with Results(tmp_path / "results.jsonl") as results:
        grade_class(find_submissions(tmp_path / "class")[0], results, sandboxed=False, jobs=1)
        assert asked == [(1, ["attention"]), (4, ["attention", "block", "gpt"])]
        assert results.rows["ada", 4].result == "passes, but is like the solution, 100%: look at it (on the course's exercise 2 and 3)"


def test_what_is_seen_in_the_sandbox():
    "What a visible module imports is visible; no solution is, and nothing that holds one."
    seen = {name.removesuffix(".py") for name in sandbox.VISIBLE} - {"__init__"}
    # An exercise beyond the course sees more, and so may its check.
    more = {check.partition(".")[0]: set(sandbox.needed(e)) for e in EXERCISES for check in e.checks.values() if "." in check}
    for name in sandbox.VISIBLE:
        path = ROOT / "kvcache_lib" / name
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            also = {room.removesuffix(".py") for room in more.get(file.stem, ())} if file.parent.name == "checks" else set()
            for node in ast.walk(ast.parse(file.read_text("utf-8"))) if name != "__init__.py" else ():
                up = 1 + len(file.relative_to(ROOT / "kvcache_lib").parts) - 1
                if isinstance(node, ast.ImportFrom) and (node.level == up or (node.module or "").startswith("kvcache_lib")):
                    first = (node.module or node.names[0].name).removeprefix("kvcache_lib.").split(".")[0]
                    assert first in seen | also, (file, node.module)
    assert not seen & {"attention", "block", "gpt", "fast", "buffer", "mistakes", "classroom", "nbs"}
    for exercise in COURSE:
        assert sandbox.needed(exercise) == []
        imported = {n.module for n in ast.walk(ast.parse(solution_source(exercise))) if isinstance(n, ast.ImportFrom)}
        own = {name.removeprefix("kvcache_lib.") for name in imported if name.startswith("kvcache_lib.")}
        assert own <= seen, f"exercise {exercise.key} could not be imported in its room"
    for exercise in EXERCISES[len(COURSE) :]:
        assert not {f"{exercise.module}.py", "mistakes", "classroom"} & set(sandbox.needed(exercise))


def test_finding_submissions(blank, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        find_submissions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one folder or zip for each learner"):
        find_submissions(tmp_path)
    with pytest.raises(SystemExit, match="kvcache-grade: "):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match="seconds > 0"):
        grade_class({}, None, seconds=0)
    assert find_submissions(blank) == ({"exercises": blank}, [])
    shutil.copytree(blank, tmp_path / "ada" / "homework" / "exercises")
    shutil.copytree(blank, tmp_path / "ada" / ".ipynb_checkpoints")
    (tmp_path / ".git").mkdir()
    (tmp_path / "02_attention.ipynb").write_text("{}")
    (tmp_path / "bob").symlink_to("ada")
    learners, left_out = find_submissions(tmp_path)
    assert list(learners) == ["ada"] and len(left_out) == 3
    found = collect("ada", learners["ada"])
    assert set(found.files) == {f"homework/exercises/{e.notebook}.ipynb" for e in EXERCISES}
    assert found.odd[".ipynb_checkpoints"] == "is hidden"
    shutil.copytree(blank, tmp_path / "ada" / "homework" / "deep" / "copy")
    found = collect("ada", learners["ada"])
    reading = read_files({"files": found.files, "odd": found.odd})["1"]
    assert "NotImplementedError" in reading["source"] and "homework/deep/copy/02_attention.ipynb" in reading["notes"][0]
    assert found.digest() != collect("ada", blank).digest() == collect("bob", blank).digest()


def test_without_bubblewrap_it_refuses(blank, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    shutil.copytree(blank, tmp_path / "class" / "ada")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "class")])
    assert "bubblewrap is not installed" in str(stopped.value) and "--no-sandbox" in str(stopped.value)
    assert not (tmp_path / "class-grades").exists()


def test_no_sandbox_is_said_and_leaves_no_process(tmp_path, capsys):
    "Where it is not sandboxed, limits hold all the same, and orphans are found and ended."
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).write_text('')"
    code = f"import subprocess, sys, os\nsubprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
    code += "import resource\nraise ValueError(resource.getrlimit(resource.RLIMIT_FSIZE)[0] // 2**20)\nclass CausalSelfAttention_kv: pass"
    (tmp_path / "class" / "ada").mkdir(parents=True)
    cell = {"cell_type": "code", "source": "#| export\n" + code}
    (tmp_path / "class" / "ada" / "02_attention.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "class"), "--no-sandbox", "--jobs", "1"])
    out = " ".join(capsys.readouterr().out.split())  # the table breaks lines where the terminal ends
    assert "NO SANDBOX" in out and "ValueError: 64, in the line: raise ValueError" in out
    time.sleep(4.5)
    assert not late.exists() or sys.platform != "linux"


# --- results that stay

STUB = """
import sys, time
from kvcache_lib.classroom import grading
from kvcache_lib.classroom.exercises import COURSE, EXERCISES
from kvcache_lib.classroom.workers import Outcome

class Stub:
    sandboxed = True
    def __init__(self, arguments, limits, seed): self.limits = limits
    def read(self, submission):
        return {str(e.key): dict(source="", taken=False, fingerprint=[-1], reaches=[], notes=[]) for e in EXERCISES}
    def check(self, exercise, sources):
        time.sleep(0.01)
        return Outcome(True, "pass")
    def close(self): pass
    kill = close

grading.Worker, grading.why_no_sandbox = Stub, lambda: ""
grading.main(sys.argv[1:])
"""


def start(folder, limit=None, **options):
    "Grade a class in a process of its own, without the checks. limit: bytes of a file, as a full disk would have it."
    def full():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"}  # a terminal that knows no "−"
    return subprocess.Popen(
        [sys.executable, "-c", STUB, str(folder), "--jobs", "2"], env=env, preexec_fn=full if limit else None,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )


@pytest.fixture
def crowd(tmp_path):
    "A class of forty."
    folder = tmp_path / "class"
    for n in range(40):
        (folder / f"learner{n}").mkdir(parents=True)
        (folder / f"learner{n}" / "02_attention.ipynb").write_text(str(n))
    return folder


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_no_row_is_lost_when_the_run_is_ended(crowd):
    kept, total = crowd.with_name("class-grades") / "results.jsonl", 40 * len(EXERCISES)
    rows, moments = b"", [(signal.SIGINT, 10), (signal.SIGTERM, 30), (signal.SIGKILL, 50), (signal.SIGKILL, 70), (signal.SIGINT, 90)]
    for number, enough in moments:
        run = start(crowd)
        while kept.read_bytes().count(b"\n") < enough if kept.exists() else True:
            assert run.poll() is None, run.communicate()
            time.sleep(0.002)
        run.send_signal(number)
        out, err = run.communicate(timeout=30)
        now = kept.read_bytes()
        assert now.startswith(rows[: rows.rfind(b"\n") + 1]) and now.count(b"\n") >= enough
        rows = now
        if number != signal.SIGKILL:
            assert run.returncode == 128 + number and out.count(" pass") == now.count(b"\n"), (out, err)
            assert f"{total - now.count(bytes([10]))} of {total} results are missing" in out and "Traceback" not in err
    out, err = start(crowd).communicate(timeout=60)
    lines = [json.loads(line) for line in kept.read_bytes().splitlines()]
    assert len({(row["learner"], row["exercise"]) for row in lines}) == len(lines) == total, "none missing, none worked out twice"
    assert "missing" not in out


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_stops_the_run_and_says_so(crowd):
    kept = crowd.with_name("class-grades") / "results.jsonl"
    run = start(crowd, limit=4321)
    out, err = run.communicate(timeout=60)
    rows = [json.loads(line) for line in kept.read_bytes().split(b"\n")[:-1]]
    assert run.returncode == 1 and "results cannot be written" in out + err and len(rows) > 5 and out.count(" pass") == len(rows)
    assert not {row["status"] for row in rows} - {"pass"}, "the grader's disk is not the learner's failure"
    assert start(crowd).wait(60) == 0
    assert len(kept.read_bytes().splitlines()) == 40 * len(EXERCISES)


def test_results_can_not_be_written_twice_at_once_or_inside(crowd, tmp_path):
    with Results(tmp_path / "results.jsonl") as results:
        results.add(Grade("ada", 1, "pass", "pass", digest="a"))
        results.add(Grade("bob", 1, "look", "could not be graded"))
        with pytest.raises(BlockingIOError, match="another run"):
            Results(tmp_path / "results.jsonl")
    with Results(tmp_path / "results.jsonl") as results:
        assert results.get("ada", 1, "a") and not results.get("ada", 1, "b") and ("bob", 1) not in results.rows
    with pytest.raises(NotWritten, match="cannot be written to"):
        Results(tmp_path / "results.jsonl" / "inside")
    with pytest.raises(SystemExit, match="outside of"):
        main([str(crowd), "--no-sandbox", "--out", str(crowd / "grades")])


# --- what is shown


def test_the_table_wraps_and_stays_on_its_lines():
    text = table([Grade("ada", 1, "fail", "rows 0 to 3 " * 10), Grade("bob", 2, "pass", "pass")], width=80)
    assert max(map(len, text.splitlines())) <= 80 and text.splitlines()[-1].split() == ["bob", "2", "pass"]
    odd = Grade("a\n\x1b[31m\udce9", 1, "fail", "=1+1")
    assert "a\\n\\x1b[31m\\udce9" in table([odd]) and as_html([odd], ["<b>"]).count("<b>") == 0
    assert as_csv([odd]).splitlines() == [",".join(COLUMNS), "a\\n\\x1b[31m\\udce9,1,fail,'=1+1,,"]


# --- what a teacher should look at


def test_likeness_of_copies_and_of_right_solutions_written_alone():
    course = Course()
    names = {"kv_cache": "memory", "self.project": "self.project", "layers": "caches", "new_cache": "fresh", "x,": "h,"}
    for exercise in COURSE[::2]:
        source = "".join(line for line in course.solution[exercise.module].splitlines(True) if not line.strip().startswith("#"))
        for old, new in names.items():
            source = source.replace(old, new)
        copy = written(fingerprint(ast.parse(source)), course.given[exercise.key])
        assert likeness(copy, course.prints[exercise.key]) > ALIKE, exercise
    tree = ast.parse(Path(right_solutions.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) > 10
    for node in classes:
        module = ast.Module([*imports, node], [])
        own = fingerprint(module)
        shares = [likeness(written(own, course.given[n]), course.prints[n]) for n in course.prints]
        assert max(share or 0 for share in shares) < ALIKE - 0.2 and reaches_for(module) == [], node.name


def test_learners_who_wrote_the_same_are_named():
    prints = tuple(range(50))
    grades = [Grade(name, 1, "pass", "pass", fingerprint=own) for name, own in
              {"ada": prints, "bob": prints[:-2] + (99, 98), "cleo": tuple(range(30, 80)), "dan": prints[:5]}.items()]
    assert pairs_alike(grades) == [(1, "ada", "bob", 0.96)]
    assert pairs_alike([Grade(g.learner, 1, "taken", "", fingerprint=g.fingerprint) for g in grades]) == []


# --- what crosses over


def test_transport_refuses_whatever_pack_does_not_write():
    tree = {"a": [torch.randn(2, 3), (None, True, 1.5, "−\ud800")], 7: torch.tensor([], dtype=torch.bool), "b": b"\0"}
    data = pack(tree)
    back = unpack(data)
    assert torch.equal(back["a"][0], tree["a"][0]) and back["a"][1] == tree["a"][1] and back["b"] == b"\0"
    for dtype in (torch.bfloat16, torch.complex64, torch.int8):
        assert unpack(pack(torch.ones(2, 1, 0, dtype=dtype))).dtype == dtype
    for bad in (object(), {1, 2}, torch.ones(2, device="meta"), torch.ones(2).to_sparse()):
        with pytest.raises(TypeError):
            pack([bad])
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(Refused):
        pack(deep)
    generator = torch.Generator().manual_seed(0)
    damaged = [pickle.dumps(tree), b"", data[:-1], data + b"\0"]
    for _ in range(300):
        at, value = (torch.randint(n, (1,), generator=generator).item() for n in (len(data), 256))
        damaged.append(data[:at] + bytes([value]) + data[at + 1 :])
    for header in ("[" * 60 + "]" * 60, '{"x": ["float64", [1e9]]}', '{"x": ["float64", [-1]]}', '{"x": ["object", [1]]}', '{"b": true}',
                   '{"d": [[[1], 2]]}', '{"d": 3}', '{"t": {}}', '{"x": ["uint8", [9999999999]]}', "1" * 9999, '{"q": []}', "nan"):
        damaged.append(b"kvt1" + len(header).to_bytes(8, "big") + header.encode())
    refused = 0
    for bytes_ in damaged:
        try:
            unpack(bytes_)
        except Refused:
            refused += 1
    assert refused >= 20


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_a_sandbox_too():
    "Root enters it in another way than everyone else, so both are tried."
    code = "import sys; sys.path.insert(0, sys.argv[1]); from kvcache_lib.classroom import sandbox; print(repr(sandbox.why_no_sandbox()))"
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("no Python that every user may run")
    ran = subprocess.run([python, "-c", code, str(ROOT)], user=65534, group=65534, extra_groups=[], capture_output=True, text=True, cwd="/")
    if "Permission denied" in ran.stderr or "ModuleNotFoundError" in ran.stderr:
        pytest.skip(f"another user cannot read this library: {ran.stderr.strip().splitlines()[-1]}")
    assert ran.stdout.strip() == "''", ran


def test_limits_are_set(monkeypatch):
    seen = {}
    monkeypatch.setattr(sandbox.resource, "setrlimit", lambda kind, value: seen.update({kind: value[0]}))
    Limits(seconds=5, memory=2**30).apply(others=10)
    resource = sandbox.resource
    assert seen[resource.RLIMIT_DATA] == 2**30 and seen[resource.RLIMIT_NPROC] == 74 and seen[resource.RLIMIT_CPU] == 15
    assert seen[resource.RLIMIT_FSIZE] == 2**26 and seen[resource.RLIMIT_CORE] == 0
