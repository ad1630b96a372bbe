"""The learner's edition: what is in it, what is not, how it is worked with."""

import ast
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LONG
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

import kvcache_lib
from kvcache_lib.checks.report import CheckFailed
from kvcache_lib.classroom import check_exports, export
from kvcache_lib.classroom import edition as editions
from kvcache_lib.classroom.blanks import export_cells, stuck_cell
from kvcache_lib.classroom.edition import main, make_edition
from kvcache_lib.classroom.exercises import COURSE, EXERCISES, NOTEBOOKS, PACKAGE, find_exercise
from kvcache_lib.classroom.handing import NotExported, definitions
from kvcache_lib.classroom.notebooks import (
    course_notebook, definition_cells, exported_source, find_definition, is_exported, read_notebook, write_notebook,
)
from kvcache_lib.classroom.solutions import TAKEN, for_learner, solution_source, solve

ROOT = Path(__file__).parents[1]
BY_NUMBER = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.notebook)


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    "An edition as it is made. Not to be changed."
    return make_edition(tmp_path_factory.mktemp("edition") / "exercises")


@pytest.fixture
def edition(blank, tmp_path):
    "An edition to work in."
    return Path(shutil.copytree(blank, tmp_path / "exercises"))


def run(*command, cwd):
    "Run a Python command in a folder, with this kvcache_lib."
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


def nbdev_test(folder, *stems):
    "`(stderr, stems that failed)` of nbdev_test, on some of the notebooks."
    code = "from nbdev.test import nbdev_test; nbdev_test(file_re=__import__('sys').argv[1], n_workers=0)"  # one process imports torch, not each
    ran = run("-c", code, "|".join(stems), cwd=folder)
    failed = ran.stderr.rpartition("Tests Failed On The Following Notebooks:")[2] if ran.returncode else ""
    return ran.stderr, [stem for stem in stems if stem in failed]


def sources(nb):
    return [cell["source"] for cell in nb["cells"]]


def solution(exercise):
    nb = course_notebook(exercise.notebook)
    return nb["cells"][definition_cells(nb, exercise)[0]]["source"]


def write(folder, exercise, source):
    "Put `source` into the cell of an exercise."
    path = folder / f"{exercise.notebook}.ipynb"
    nb = read_notebook(path)
    nb["cells"][definition_cells(nb, exercise)[0]]["source"] = source
    write_notebook(path, nb)


def shorten(folder):
    "Leave in the exercise notebooks only the code that is exported, checked or locked: the demonstrations take their time."
    for exercise in EXERCISES:
        path = folder / f"{exercise.notebook}.ipynb"
        nb = read_notebook(path)
        kept = [cell for cell in nb["cells"] if cell["source"].startswith("#|") or "nbgrader" in cell["metadata"]]
        write_notebook(path, nb | {"cells": kept})


def body_lines(exercise):
    "The lines of the solution's code: no signatures, no docstrings."
    nb = course_notebook(exercise.notebook)
    source = "\n\n".join(nb["cells"][at]["source"] for at in definition_cells(nb, exercise))
    for name in exercise.checks:
        node = find_definition(source, name)
        for line in source.split("\n")[node.body[1].lineno - 1 : node.end_lineno]:
            yield line.strip()


# --- what is in it


def test_it_is_a_project_with_all_notebooks(blank):
    assert sorted(p.stem for p in blank.glob("*.ipynb")) == sorted(NOTEBOOKS)
    assert {p.name for p in (blank / PACKAGE).iterdir()} == {"__init__.py", *(f"{e.module}.py" for e in EXERCISES)}
    assert {"00_named_tensors", "06_benchmark", "10_text"} <= set(NOTEBOOKS)
    settings = (blank / "settings.ini").read_text()
    assert f"made_by = kvcache_lib {kvcache_lib.__version__}" in settings and f"lib_name = {PACKAGE}" in settings
    for exercise in EXERCISES:
        assert f"#| default_exp {exercise.module}" in "\n".join(sources(course_notebook(exercise.notebook))).splitlines()
        assert f"{exercise.notebook}.ipynb" in (blank / "README.md").read_text()


@BY_NUMBER
def test_signature_and_docstring_stay_and_the_body_is_blank(blank, exercise):
    "The given module is the solution's, but for the bodies of what is to be written."
    blanked, whole = (ast.parse(text) for text in ((blank / PACKAGE / f"{exercise.module}.py").read_text(), solution_source(exercise)))
    homes = {name: find_definition(ast.unparse(whole), name) for name in exercise.checks}
    for name, home in homes.items():
        assert ast.get_docstring(home)
        for tree in (blanked, whole):
            body = tree.body
            for part in name.split("."):
                node = next(n for n in reversed(body) if getattr(n, "name", None) == part)
                body = node.body
            todo = f"raise NotImplementedError('Exercise {exercise.key}: write {name}')"
            assert ([ast.unparse(n) for n in body[1:]] == [todo]) == (tree is blanked)
            del body[1:]
    assert ast.dump(blanked) == ast.dump(whole)


@BY_NUMBER
def test_no_line_of_a_solution_is_in_it(blank, exercise):
    given = "\n".join(p.read_text() for p in blank.rglob("*") if p.is_file())
    given = given.replace('\\"', '"')
    baseline = "\n".join(sources(course_notebook("01_mingpt")))  # a line that the solution shares with it gives nothing away
    # Nor does the head of a loop or a branch, or a return of one name: the decoders beyond the course have such lines too.
    lines = [line for line in body_lines(exercise) if line not in baseline and len(line) > 12 and not line.endswith(":")]
    assert len(lines) >= 2
    assert [line for line in lines if line in given] == []


@BY_NUMBER
def test_outputs_are_cleared_from_the_exercise_on(blank, exercise):
    nb = read_notebook(blank / f"{exercise.notebook}.ipynb")
    at = definition_cells(nb, exercise)[0]
    code = [[cell for cell in cells if cell["cell_type"] == "code"] for cells in (nb["cells"][:at], nb["cells"][at:])]
    assert any(cell["outputs"] for cell in code[0])
    assert len(code[1]) > 3 and not any(cell["outputs"] or cell["execution_count"] for cell in code[1])


def test_later_notebooks_hold_no_outputs_and_use_the_learners_code(blank):
    for stem in ("05_sort", "06_benchmark"):
        nb = read_notebook(blank / f"{stem}.ipynb")
        assert not any(cell.get("outputs") for cell in nb["cells"])
        assert f"from {PACKAGE}.gpt import GPT_kv" in "\n".join(sources(nb))
        assert 'check_exports("attention", "block", "gpt")' in "\n".join(sources(nb))


def test_nothing_imports_the_solutions(blank):
    solved = {f"kvcache_lib.{exercise.module}" for exercise in COURSE}
    for path in blank.glob("*.ipynb"):
        for source in sources(read_notebook(path)):
            assert not [name for name in solved if re.search(rf"{name}\b", source)], (path.name, source)
            assert not re.search(r"from kvcache_lib import .*\b(attention|block|gpt)\b", source), (path.name, source)


def test_links_lead_somewhere(blank):
    for path in blank.glob("*.ipynb"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", "\n".join(sources(read_notebook(path)))):
            assert (blank / target).exists(), (path.name, target)
    links = "[02 · One](02_attention.ipynb#Try-it), [99](99_more.ipynb#x), [code](tools/config.ipynb)"
    assert for_learner(links) == "[02 · One](02_attention.ipynb#Try-it), 99 (in the course, not in this folder), code"


def test_the_package_does_not_shadow_the_installed_one(blank):
    code = f"from importlib.util import find_spec; print(find_spec('{PACKAGE}').origin, find_spec('kvcache_lib').origin)"
    ran = run("-c", code, cwd=blank)
    mine, installed = ran.stdout.split()
    assert Path(mine).parent == blank / PACKAGE and Path(installed).parent == Path(kvcache_lib.__file__).parent


def test_course_is_left_alone_and_has_no_markers():
    for exercise in EXERCISES:
        module = (ROOT / "kvcache_lib" / f"{exercise.module}.py").read_text()
        assert not re.search(r"SOLUTION|NotImplementedError|nbgrader", module)


# --- never overwritten


def test_an_existing_folder_is_refused_and_left_as_it_was(edition, capsys):
    (edition / "settings.ini").write_text((edition / "settings.ini").read_text().replace("made_by = kvcache_lib", "made_by = kvcache_lib 0.0.1 not"))
    before = {p: p.read_bytes() for p in edition.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main([str(edition)])
    assert str(edition) in str(stopped.value) and "kvcache_lib 0.0.1" in str(stopped.value)
    assert {p: p.read_bytes() for p in edition.rglob("*") if p.is_file()} == before
    beside = re.search(r"kvcache-exercises (\S+)$", str(stopped.value))[1]
    main([beside])
    assert (Path(beside) / "02_attention.ipynb").exists() and beside in capsys.readouterr().out


def test_a_file_is_refused_and_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes exists already"):
        make_edition(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    make_edition(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="not an edition"):
        solve(1, tmp_path)


def test_a_folder_among_a_projects_notebooks_is_refused(tmp_path):
    "The next export of that project would write over its own modules."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nnbs_path = nbs\nlib_path = lib\n")
    with pytest.raises(ValueError, match="nbdev project"):
        make_edition(tmp_path / "nbs" / "deep" / "exercises")
    assert not (tmp_path / "nbs").exists()
    with pytest.raises(ValueError, match="nbdev project"):
        make_edition(ROOT / "nbs" / "exercises")
    make_edition(tmp_path / "exercises")


def dies_at(moment, code, module=""):
    """Run `code` in a forked child that is killed when it comes to a line of kvcache_lib for the n-th time, n = moment.

    module: one of its files, where only that one writes.

    Whether it got to its end before.
    """
    child = os.fork()
    if child == 0:
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            if not frame.f_code.co_filename.startswith(str(ROOT / "kvcache_lib" / module)):
                return None
            lines += event == "line"
            if lines > moment:
                os.kill(os.getpid(), 9)
            return trace

        sys.settrace(trace)
        code()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_creation_that_is_cut_off_is_no_obstacle(tmp_path, monkeypatch):
    files = editions.edition_files()
    monkeypatch.setattr(editions, "edition_files", lambda: files)  # making them in memory takes the longest
    folder, moment, done = tmp_path / "exercises", 0, False
    while not done:
        if folder.exists():
            shutil.rmtree(folder)
        done = dies_at(moment, lambda: make_edition(folder))
        assert not folder.exists() or {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(files)
        moment += 3
    assert moment > 50 and folder.exists()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match="No space left"):
        main([str(tmp_path / "other")])
    assert [p.name for p in tmp_path.iterdir() if "other" in p.name] == []


# --- no saved work is lost


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_solve_is_whole_at_every_moment(edition):
    "The notebook is the old or the new one, the learner's text is in it, and the same command again completes it."
    attempt = solution(EXERCISES[0]).replace("torch.cat([kv_cache[0], k]", "torch.cat([k, kv_cache[0]]")
    write(edition, EXERCISES[0], attempt)
    path, module = edition / "02_attention.ipynb", edition / PACKAGE / "attention.py"
    os.chmod(path, 0o600)
    old, before, seen, moments = path.read_bytes(), module.read_bytes(), set(), 0
    moment, done = 0, False
    while not done:
        path.write_bytes(old)
        module.write_bytes(before)
        done = dies_at(moment, lambda: solve(1, edition), "files.py")
        state = (path.read_bytes() == old, module.read_bytes() == before)
        moments += 1
        moment += 4
        if state not in seen or done:
            solve(1, edition)
            assert TAKEN.format(n=1) in module.read_text()
        seen.add(state)
        cells = [cell["source"] for cell in read_notebook(path)["cells"]]
        assert attempt in cells and path.stat().st_mode & 0o777 == 0o600
    assert seen == {(True, True), (False, True), (False, False)} and moments >= 25


def test_a_full_disk_leaves_the_old_files(edition, monkeypatch):
    files = {p: p.read_bytes() for p in edition.rglob("*") if p.is_file()}
    seen = []

    def full(number):
        seen.append(number)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left"):
        main(["--solve", "1", str(edition)])
    assert seen and {p: p.read_bytes() for p in edition.rglob("*") if p.is_file()} == files


# --- what is exported


@pytest.mark.parametrize("stem", [exercise.notebook for exercise in EXERCISES])
def test_exported_cells_are_those_that_nbdev_exports(stem):
    from nbdev.process import NBProcessor

    cells = NBProcessor(ROOT / "nbs" / f"{stem}.ipynb", rm_directives=False).nb.cells
    theirs = [cell.source for cell in cells if cell.cell_type == "code" and {"export", "exports", "exporti"} & set(cell.directives_ or {})]
    assert [cell["source"] for cell in course_notebook(stem)["cells"] if is_exported(cell)] == theirs != []


@pytest.mark.parametrize(
    "cell, exported",
    [
        ("x = (7\n%\n2)", "x = (7\n%\n2)"),
        ("!pip install x\ny = 1", "pass\ny = 1"),
        ("%matplotlib inline\ny = 1\ny?", "pass\ny = 1\npass"),
        ("y = 1\nfrom __future__ import annotations", "from __future__ import annotations\n\ny = 1\npass"),
        ("if True:\n    !ls\nα = '%'; y = 1", "if True:\n    pass\nα = '%'; y = 1"),
        ("x = '''\n%not\n!this\n'''", "x = '''\n%not\n!this\n'''"),
    ],
)
def test_what_jupyter_takes_is_exported_as_python(cell, exported):
    source = exported_source({"cells": [{"cell_type": "code", "source": f"#| export\n{cell}"}]})
    assert source.rstrip("\n") == exported
    ast.parse(source)
    timed = exported_source({"cells": [{"cell_type": "code", "source": f"%%time\n#|export\n{cell}"}]})
    assert definitions(timed) == definitions(source)


def test_a_mark_in_front_of_a_notebook_is_no_part_of_it(tmp_path):
    (tmp_path / "a.ipynb").write_bytes(b"\xef\xbb\xbf" + b'{"cells": []}')
    assert read_notebook(tmp_path / "a.ipynb") == {"cells": []}


def test_a_random_py_in_the_folder_is_in_nobodys_way(edition):
    (edition / "random.py").write_text("1 / 0")
    assert "exported" in solve(3, edition)


# --- working in it


def test_nbdev_test_stops_at_the_first_exercise_that_is_not_solved(edition):
    shorten(edition)
    stems = [exercise.notebook for exercise in COURSE]
    said, failed = nbdev_test(edition, stems[0])
    assert failed == stems[:1] and "Exercise 1" in said

    for exercise in COURSE:
        solve(exercise.key, edition)
    said, failed = nbdev_test(edition, *stems)
    assert failed == [], said


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if e.extra], ids=lambda e: e.notebook)
def test_an_exercise_beyond_the_course_stands_alone(edition, exercise, monkeypatch):
    "Blank, its check says so; solved, it passes, with no other exercise done. As in the notebook, here in one process."
    shorten(edition)
    monkeypatch.chdir(edition)

    def run_cells():
        room = {"__name__": "cells"}
        for cell in read_notebook(edition / f"{exercise.notebook}.ipynb")["cells"]:
            if cell["cell_type"] == "code" and not re.match(r"#\| *(slow|eval: false)", cell["source"]):
                exec(compile(cell["source"], "cell", "exec"), room)

    with pytest.raises(CheckFailed, match=f"Exercise {exercise.key} is not written yet: write {next(iter(exercise.checks))}"):
        run_cells()
    main(["--solve", str(exercise.key), "."])
    run_cells()


def test_a_change_that_was_not_exported_is_named(edition, monkeypatch):
    monkeypatch.chdir(edition)
    check_exports("attention", "block", "gpt")
    write(edition, EXERCISES[0], solution(EXERCISES[0]))
    check_exports("block", "gpt")
    with pytest.raises(NotExported, match=r"02_attention\.ipynb has changed since it was exported to .*attention\.py"):
        check_exports("attention")
    with pytest.raises(ValueError, match="expected one of the classes and functions"):
        export(Path)


@contextmanager
def kernel(folder, monkeypatch):
    "A real kernel in a folder: a function that runs cells and returns the outputs of the last one."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    client = NotebookClient(new_notebook(), kernel_name="python3", resources={"metadata": {"path": str(folder)}}, allow_errors=True)

    def execute(sources):
        for source in sources:
            client.nb.cells.append(new_code_cell(source))
            client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)
        return client.nb.cells[-1].outputs

    with client.setup_kernel():
        yield execute


def test_export_in_a_kernel(edition, monkeypatch):
    exercise, module = EXERCISES[0], edition / PACKAGE / "attention.py"
    exported = [cell["source"] for cell in read_notebook(edition / "02_attention.ipynb")["cells"] if is_exported(cell)]
    cell = export_cells(exercise)[-1]["source"]
    with kernel(edition, monkeypatch) as execute:
        (unsaved,) = execute([*exported[:-1], solution(exercise), cell])
        assert unsaved.ename == "NotExported" and "Save the notebook" in unsaved.evalue
        assert "NotImplementedError" in module.read_text()

        write(edition, exercise, solution(exercise))
        (saved,) = execute([cell])
    assert saved.text.endswith("Next: 03_block.ipynb\n")
    assert "NotImplementedError" not in module.read_text()


def test_taking_a_solution_keeps_what_was_written_and_says_so(edition, capsys):
    attempt = solution(EXERCISES[0]).replace("torch.cat([kv_cache[0], k]", "torch.cat([k, kv_cache[0]]")
    write(edition, EXERCISES[0], attempt)
    main(["--solve", "1", str(edition)])
    assert "marked as taken" in capsys.readouterr().out
    nb = read_notebook(edition / "02_attention.ipynb")
    assert [cell["source"] for cell in nb["cells"] if cell["cell_type"] == "raw"] == [attempt]
    mark = TAKEN.format(n=1)
    assert mark in exported_source(nb) and mark in (edition / PACKAGE / "attention.py").read_text()
    before = (edition / "02_attention.ipynb").read_bytes()
    assert "already" in solve(1, edition)
    assert (edition / "02_attention.ipynb").read_bytes() == before


def test_taking_a_solution_in_a_notebook(edition, monkeypatch):
    with kernel(edition, monkeypatch) as execute:
        (said,) = execute([stuck_cell(EXERCISES[1])["source"].replace("\n# from", "\nfrom")])
    assert "in the cell below" in said.text and "marked as taken" in said.text


# --- nbgrader


def nbgrader_cells(nb):
    return [(cell["metadata"]["nbgrader"], cell) for cell in nb["cells"] if "nbgrader" in cell["metadata"]]


def test_nbgrader_metadata(blank):
    points = 0
    for path in blank.glob("*.ipynb"):
        found = nbgrader_cells(read_notebook(path))
        assert len({meta["grade_id"] for meta, _ in found}) == len(found)
        for meta, cell in found:
            assert meta["schema_version"] == 3 and meta["cell_type"] == cell["cell_type"] == "code"
            assert meta["locked"] and not meta["solution"] and not meta["task"]
            calls = [c for e in EXERCISES for n, c in e.checks.items() if f"{c.rpartition('.')[2]}({n.partition('.')[0]})" in cell["source"]]
            assert meta["grade"] == ("points" in meta) == (len(calls) == 1)
            points += meta.get("points", 0)
    assert points == sum(exercise.points * len(exercise.checks) for exercise in EXERCISES)


def test_nbdev_clean_keeps_the_metadata(edition):
    path = edition / "02_attention.ipynb"
    before = nbgrader_cells(read_notebook(path))
    ran = run("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=edition)
    assert ran.returncode == 0, ran.stderr
    assert [meta for meta, _ in nbgrader_cells(read_notebook(path))] == [meta for meta, _ in before] != []


def test_nbgrader_takes_it_as_it_is(blank, tmp_path):
    pytest.importorskip("nbgrader", reason="pip install nbgrader==0.9.6 to run this: about a minute")
    source = tmp_path / "source" / "kvcache"
    shutil.copytree(blank, source)
    shorten(source)
    exercises = EXERCISES if LONG else [find_exercise("1"), find_exercise("10_text")]  # each runs in two kernels
    for stem in set(NOTEBOOKS) - {exercise.notebook for exercise in exercises}:
        (source / f"{stem}.ipynb").unlink()
    patience = "c.Execute.timeout, c.Execute.iopub_timeout = 600, 60"  # machines are slow at times
    (tmp_path / "nbgrader_config.py").write_text(f"c = get_config()\nc.CourseDirectory.course_id = 'kv'\n{patience}\n")

    def nbgrader(*args):
        code = "import os, sys; os.environ['PATH'] = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']; "
        ran = run("-c", code + "from nbgrader.apps.nbgraderapp import main; main()", *args, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    nbgrader("generate_assignment", "kvcache", "--create")
    released = tmp_path / "release" / "kvcache"
    assert "Exercise 1: write" in (released / "02_attention.ipynb").read_text()
    for learner in ("ada", "cleo"):
        shutil.copytree(released, tmp_path / "submitted" / learner / "kvcache")
    for exercise in exercises:
        solve(exercise.key, tmp_path / "submitted" / "ada" / "kvcache")
    path = tmp_path / "submitted" / "cleo" / "kvcache" / "02_attention.ipynb"
    path.write_text(path.read_text().replace("check_attention(CausalSelfAttention_kv)", "print('pass')"))
    nbgrader("autograde", "kvcache")
    nbgrader("export")
    rows = [line.split(",") for line in (tmp_path / "grades.csv").read_text().splitlines()]
    student, score = rows[0].index("student_id"), rows[0].index("score")
    assert {row[student]: float(row[score]) for row in rows[1:]} == {"ada": float(sum(e.points * len(e.checks) for e in exercises)), "cleo": 0.0}
