"""Grading: right and wrong, empty, hostile and broken submissions."""

import os
import shutil
import time

import pytest

from kvcache_lib import grading
from kvcache_lib.edition import EXERCISES, class_cell, course_notebook, make_edition, read_notebook, solve, write_notebook
from kvcache_lib.grading import Grade, find_submissions, grade_class, grade_submission, main, read_exercise, run_exercise, table

ATTENTION = EXERCISES[0]
GIVEN = "q, k, v = self.project(x)"  # a line of the solution, to be replaced


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    return make_edition(tmp_path_factory.mktemp("edition") / "exercises")


def write(folder, exercise, old="", new=""):
    "Write the solution of an exercise into a submission, with `new` in place of `old`, as a learner would."
    nb = course_notebook(exercise.notebook)
    source = nb["cells"][class_cell(nb, exercise)]["source"]
    assert old in source
    path = folder / f"{exercise.notebook}.ipynb"
    nb = read_notebook(path)
    nb["cells"][class_cell(nb, exercise)]["source"] = source.replace(old, new)
    write_notebook(path, nb)


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_class(blank, tmp_path, capsys, monkeypatch):
    "One right, one empty, one that never ends, one without its checks, one with a syntax error."
    for learner in ("right", "loop", "untested", "syntax"):
        shutil.copytree(blank, tmp_path / learner)
    (tmp_path / "empty").mkdir()
    for exercise in EXERCISES:
        write(tmp_path / "right", exercise)
    write(tmp_path / "loop", ATTENTION, GIVEN, "while True: print('garbage' * 1000)")
    write(tmp_path / "syntax", ATTENTION, GIVEN, "q, k, v = self.project(x")
    path = tmp_path / "untested" / "02_attention.ipynb"
    nb = read_notebook(path)
    write_notebook(path, nb | {"cells": [cell for cell in nb["cells"] if "check_attention" not in cell["source"]]})
    before = files(tmp_path)

    monkeypatch.setenv("COLUMNS", "200")
    main([str(tmp_path), "--seconds", "12"])
    rows = capsys.readouterr().out.splitlines()[2:]
    said = {tuple(row.split()[:2]): row for row in rows if row[0] != " "}
    assert all(said["right", n].endswith("  pass") for n in "123")
    assert all("is missing" in said["empty", n] for n in "123")
    assert "stopped after 12 s" in said["loop", "1"]
    assert "SyntaxError" in said["syntax", "1"] and "self.project(x" in said["syntax", "1"]
    for learner in ("untested", "loop", "syntax"):
        for n in "123" if learner == "untested" else "23":
            assert f"Exercise {n}" in said[learner, n]
    assert files(tmp_path) == before, "a submission was changed"


@pytest.mark.parametrize(
    "code, result",
    [
        ("print('{\"passed\": true}'); import os; os._exit(0)", "ended its process (exit status 0)"),
        ("raise SystemExit", "SystemExit, in the line: raise SystemExit"),
        ("q, k, v = self.projekt(x)", "has no attribute 'projekt', in the line: q, k, v = self.projekt(x)"),
    ],
)
def test_hostile_and_broken_code(code, result):
    source = grading.solution_source(ATTENTION).replace(GIVEN, code)
    outcome = run_exercise(ATTENTION, {"attention": source})
    assert not outcome["passed"] and result in outcome["result"]


def test_a_process_that_the_code_starts_ends_too(tmp_path):
    "A child that lives on would write the file."
    late = "import time, pathlib; time.sleep(2); pathlib.Path(r'{}').write_text('')".format(tmp_path / "late")
    source = f"import subprocess, sys, os\nsubprocess.Popen([sys.executable, '-c', {late!r}])\nos._exit(3)"
    assert "exit status 3" in run_exercise(ATTENTION, {"attention": source})["result"]
    time.sleep(3)
    assert not (tmp_path / "late").exists() or not hasattr(os, "killpg")


def test_checks_cannot_be_replaced_and_imports_of_the_solution_show():
    cheat = "import kvcache_lib.checks as c\nc.check_attention = lambda cls: None\nclass CausalSelfAttention_kv: pass"
    assert not run_exercise(ATTENTION, {"attention": cheat})["passed"]
    borrowed = "from kvcache_lib.attention import CausalSelfAttention_kv as A\nclass CausalSelfAttention_kv(A): pass"
    assert run_exercise(ATTENTION, {"attention": borrowed}) == {"passed": True, "result": "solution taken, by import"}


def test_one_mistake_costs_one_exercise(blank, tmp_path, monkeypatch):
    "Later exercises are graded on the course's solution; a solution that was taken is named."
    folder = shutil.copytree(blank, tmp_path / "ada")
    write(folder, EXERCISES[0], "P:S, :S]", ":T, :S]")
    write(folder, EXERCISES[1])
    solve(3, folder)
    seen = []

    def run(exercise, sources, seconds):
        seen.append(sources)
        wrong = exercise.number == 1
        return {"passed": not wrong, "result": "the mask" if wrong else "pass"}

    monkeypatch.setattr(grading, "run_exercise", run)
    grades = grade_submission("ada", folder)
    assert [grade.passed for grade in grades] == [False, True, True]
    assert [grade.result for grade in grades] == [
        "the mask", "pass (on the course's exercise 1)", "solution taken (on the course's exercise 1)"
    ]
    assert ":T, :S]" in seen[0]["attention"] and "P:S, :S]" in seen[1]["attention"] == seen[2]["attention"]
    assert set(seen[1]) == {"attention", "block"}


def test_stale_modules_do_not_count(blank, tmp_path):
    folder = shutil.copytree(blank, tmp_path / "ada")
    (folder / "my_kvcache" / "attention.py").write_text("1 / 0")
    source, taken = read_exercise(folder, ATTENTION)
    assert "NotImplementedError" in source and not taken


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a Jupyter notebook"),
        ("[]", "not a Jupyter notebook"),
        ('{"cells": [1]}', "not a Jupyter notebook"),
        ('{"cells": []}', "defines the class CausalSelfAttention_kv"),
    ],
)
def test_notebooks_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "02_attention.ipynb").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_exercise(tmp_path, ATTENTION)


def test_finding_submissions(blank, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        find_submissions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one folder for each learner"):
        find_submissions(tmp_path)
    with pytest.raises(SystemExit, match="kvcache-grade: "):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match="seconds > 0"):
        grade_class(blank, seconds=0)
    assert find_submissions(blank) == {"exercises": blank}
    deep = tmp_path / "ada" / "homework" / "exercises"
    shutil.copytree(blank, deep)
    shutil.copytree(blank, tmp_path / "ada" / ".ipynb_checkpoints")
    assert find_submissions(tmp_path) == {"ada": tmp_path / "ada"}
    assert grading.find_notebook(tmp_path / "ada", ATTENTION) == deep / "02_attention.ipynb"
    shutil.copytree(blank, tmp_path / "ada" / "homework" / "copy")
    with pytest.raises(ValueError, match="several notebooks could be meant"):
        grading.find_notebook(tmp_path / "ada", ATTENTION)


def test_the_table_wraps_and_stays_on_its_lines():
    text = table([Grade("ada", 1, False, "rows 0 to 3 " * 10), Grade("bob", 2, True, "pass")], width=80)
    assert max(map(len, text.splitlines())) <= 80 and text.splitlines()[-1].split() == ["bob", "2", "pass"]
    assert grading.one_line(ValueError("\n\x1b[31mred\nmore")) == "[31mred"


def test_notebooks_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    "Python 3.11's ast.parse fails now and then when two threads call it at once."
    reading, most = [], []

    def read(folder, exercise):
        reading.append(exercise)
        most.append(len(reading))
        time.sleep(0.01)
        reading.pop()
        raise ValueError("nothing here")

    monkeypatch.setattr(grading, "read_exercise", read)
    for learner in "abcd":
        (tmp_path / learner).mkdir()
    assert len(grading.grade_class(tmp_path, jobs=4)) == 4 * len(EXERCISES) == len(most)
    assert max(most) == 1
