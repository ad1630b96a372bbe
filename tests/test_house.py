"""The house as CONTRIBUTING.md draws it: who may import whom, no circle, no file that is too long."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvcache_lib"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "_modidx.py" and path != PACKAGE / "__init__.py"
}
TOOLS = ("plots", "tables", "checks", "mistakes", "stepper", "classroom")
MAY_IMPORT = {  # a tool: the tools that it may import; every room may import what people read, and files
    "plots": (), "tables": (), "checks": (), "mistakes": ("checks",), "stepper": ("plots",), "classroom": ("checks",), "measure": ("plots", "tables"),
}  # fmt: skip


def imported(name: str) -> set[str]:
    "The package's modules that a module imports, also inside its functions."
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
            if node.level:
                start = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "kvcache_lib":
                start = []
            else:
                continue
            module = ".".join([*start, *filter(None, (node.module or "").removeprefix("kvcache_lib").lstrip(".").split("."))])
            for alias in node.names:
                whole = f"{module}.{alias.name}".lstrip(".")
                found.add(whole if whole in FILES else module)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("kvcache_lib.") for alias in node.names if alias.name.startswith("kvcache_lib.")}
    return {module for module in found if module in FILES and module != name}


IMPORTS = {name: imported(name) for name in FILES}


def test_the_scan_sees_something():
    assert {"mingpt", "attention"} <= IMPORTS["attention"] | IMPORTS["block"]
    assert any(module.startswith("checks.") for module in IMPORTS["checks"])


def test_no_circle():
    order = list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError with the circle
    assert order.index("mingpt") < order.index("attention") < order.index("block") < order.index("gpt") < order.index("fast")


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    room = name.split(".")[0]
    for module in IMPORTS[name]:
        other = module.split(".")[0]
        if other in TOOLS and other != room:
            assert other in MAY_IMPORT.get(room, ()), f"{name} imports {module}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_too_long(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


def test_every_room_is_on_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {name.split(".")[0] for name in FILES}
    assert [room for room in sorted(rooms) if f"`{room}`" not in text and f"`{room}/`" not in text] == []
