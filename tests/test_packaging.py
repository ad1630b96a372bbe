"""What is declared is what is used; the files that packagers read agree; the wheel and the sdist hold what they need."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]
HOME = f"https://github.com/{SETTINGS['user']}/{SETTINGS['repo']}"


def declared(key) -> set:
    return {canonicalize_name(Requirement(r).name) for r in SETTINGS[key].split()}


def imported(path) -> dict:
    "The packages that a module imports: {name: whether always}, or only when some function is called."
    found = {}

    def visit(node, always):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, (ast.Import, ast.ImportFrom)) and not getattr(inner, "level", 0):
                names = [a.name for a in inner.names] if isinstance(inner, ast.Import) else [inner.module]
                for name in names:
                    found[name.split(".")[0]] = found.get(name.split(".")[0], False) or always
            visit(inner, always and not isinstance(inner, (ast.FunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return {n: always for n, always in found.items() if n not in {*sys.stdlib_module_names, SETTINGS["lib_name"]}}


def test_what_the_modules_import_is_required_and_nothing_else():
    distribution = {name: canonicalize_name(found[0]) for name, found in packages_distributions().items()}
    used, always = set(), set()
    for path in (ROOT / SETTINGS["lib_path"]).rglob("*.py"):
        for name, at_once in imported(path).items():
            package = distribution.get(name, canonicalize_name(name))  # an extra may not be installed
            used.add(package)
            always |= {package} if at_once else set()
    required, optional = declared("requirements"), declared("dev_requirements") | declared("learn_requirements") | declared("peers_requirements")
    assert required - used == set(), "required, but no module imports it"
    assert always - required == set(), "imported by a module, but not required"
    assert used - required - optional == set(), "imported in a function, but in no list"


def test_the_readme_names_what_is_required():
    sentence = re.search(r"^The notebooks export a package\. It needs (.*?)\. ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[1]
    assert set(re.split(r", | and ", sentence)) == declared("requirements")
    lowest = next(r for r in SETTINGS["requirements"].split() if r.startswith("torch"))
    assert f"Any PyTorch from {lowest.split('>=')[1]} on" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_tested_version_would_replace_a_pytorch_that_is_there():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0]: line for line in lines if not line.startswith("#")}
    assert not [name for name in pinned if name.startswith(("torch", "nvidia-", "cuda-", "triton"))]
    for key in ("requirements", "learn_requirements", "dev_requirements", "peers_requirements", "site_requirements", "teach_requirements"):
        for r in map(Requirement, SETTINGS[key].split()):
            version = r.name == "torch" or re.search(r"==([^ ]+)", pinned[canonicalize_name(r.name)])[1]
            assert r.name == "torch" or version in r.specifier, f"{r} is tested with {version}"
    tested = re.search(r"^TORCH \?= torch==(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    assert tested in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"torch=={tested} --index-url" in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")


def test_versions_and_pythons_agree_everywhere():
    version, pythons = SETTINGS["version"], SETTINGS["pythons"].split()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert pythons[0] == SETTINGS["min_python"]
    assert f'requires-python = ">={pythons[0]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"Python {pythons[0]} to {pythons[-1]}." in (ROOT / "README.md").read_text(encoding="utf-8")
    matrix = "python: [" + ", ".join(f'"{p}"' for p in pythons) + "]"
    assert matrix in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")


def test_every_file_that_the_settings_name_is_there():
    for key in ("lib_path", "nbs_path"):
        assert (ROOT / SETTINGS[key]).is_dir()
    assert "readme_nb" not in SETTINGS or (ROOT / SETTINGS["nbs_path"] / SETTINGS["readme_nb"]).is_file()
    for script in SETTINGS["console_scripts"].split():
        module = script.split("=")[1].split(":")[0]
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), script


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "`(wheel, unpacked sdist)`; the wheel is built from the sdist, as `python -m build` does it."
    out, unpacked = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("unpacked")
    source = tmp_path_factory.mktemp("source") / "project"  # building leaves files behind, so it is done in a copy
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").replace("/", "").split()
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "shared", *ignored))
    build(source, "sdist", out)
    shutil.unpack_archive(next(out.glob("*.tar.gz")), unpacked)
    (unpacked,) = unpacked.iterdir()
    build(unpacked, "wheel", out)
    return next(out.glob("*.whl")), unpacked


def build(folder, what, out):
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def metadata(built):
    "The wheel's metadata, and the names of its files."
    with zipfile.ZipFile(built[0]) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode()), set(wheel.namelist())


def test_the_wheel_declares_what_the_settings_say(built):
    message, _ = metadata(built)
    requires = [Requirement(r) for r in message.get_all("Requires-Dist")]
    assert {r.name for r in requires if not r.marker} == declared("requirements")
    in_dev = {r.name for r in requires if r.marker and r.marker.evaluate({"extra": "dev"})}
    assert in_dev == declared("dev_requirements") | declared("learn_requirements")
    assert (message["Name"], message["Version"]) == (SETTINGS["lib_name"], SETTINGS["version"])
    assert (message["License-Expression"], message["Requires-Python"]) == ("Apache-2.0", f">={SETTINGS['min_python']}")
    assert all(url.split(", ")[1].startswith(HOME) for url in message.get_all("Project-URL"))
    classifiers = message.get_all("Classifier")
    for python in SETTINGS["pythons"].split():
        assert f"Programming Language :: Python :: {python}" in classifiers


def test_links_and_pictures_live_on_a_page_elsewhere(built):
    text = metadata(built)[0].get_payload()
    targets = re.findall(r"\]\(([^)]*)\)", text) + re.findall(r'\b(?:src|srcset|href)="([^"]*)"', text)
    assert len(targets) > 20 and all(t.startswith("https://") for t in targets)
    branch = SETTINGS["branch"]
    inside = [t for t in targets if f"/{SETTINGS['user']}/{SETTINGS['repo']}/" in t]
    assert len(inside) > 10
    for target in inside:  # each leads to a file of this repository
        path = re.sub(rf"^https://.*?/{SETTINGS['repo']}/(blob/)?{branch}/", "", target)
        assert (ROOT / path).is_file(), target
        picture = path.endswith((".png", ".svg"))
        assert target.startswith("https://raw.githubusercontent.com/" if picture else HOME) or path.endswith(".txt")


def test_the_wheel_holds_the_whole_package_and_the_courses_notebooks(built):
    _, names = metadata(built)
    lib = SETTINGS["lib_path"]
    want = {p.relative_to(ROOT).as_posix() for p in (ROOT / lib).rglob("*") if p.suffix in (".py", ".js", ".css", ".typed")}
    want |= {p.relative_to(ROOT).as_posix() for p in (ROOT / lib / "text_model").iterdir()}
    want |= {f"{lib}/nbs/{p.name}" for p in (ROOT / "nbs").glob("*.ipynb")}
    assert {n for n in names if ".dist-info/" not in n} == want


def test_the_tests_in_the_sdist_can_run(built):
    _, unpacked = built
    for folder in ("tests", "nbs", "docs", SETTINGS["lib_path"]):
        kinds = (".py", ".ipynb", ".png", ".js", ".css", ".typed", ".txt", ".json", ".safetensors")
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.*") if p.suffix in kinds}
        here = {p for p in here if ".ipynb_checkpoints" not in p.parts}
        assert {p for p in here if not (unpacked / p).is_file()} == set(), "missing in the sdist"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_prose.py", "tests/test_house.py"]
    ran = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]


def test_the_wheel_alone_makes_an_edition(built, tmp_path):
    "Unpacked, with nothing else of the project in reach: the notebooks are in it."
    with zipfile.ZipFile(built[0]) as wheel:
        commands = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
        wheel.extractall(tmp_path / "site")
    assert "kvcache-exercises = kvcache_lib.classroom.edition:main" in commands
    assert "kvcache-grade = kvcache_lib.classroom.grading:main" in commands
    code = """
import sys
sys.path.insert(0, 'site')
sys.modules |= dict.fromkeys(['nbdev', 'execnb', 'fastcore', 'nbconvert', 'nbformat', 'jupyterlab', 'pytest'])  # not there
from kvcache_lib.classroom.edition import main, kvcache_lib as k
print(k.__file__)
main(['new'])
main(['--solve', '2', 'new'])
"""
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(str(tmp_path / "site")) and (tmp_path / "new" / "04_gpt.ipynb").exists()
