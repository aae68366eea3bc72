"""The house: rooms import only from floors below, in no circle, and heavy libraries stay in their rooms."""

import ast
import graphlib
import pathlib
import re

from teq import config
from teq.spec import digest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOORS = {
    **dict.fromkeys(("spec", "statistics", "files"), 1),
    **dict.fromkeys(("models", "data", "device", "grid", "record"), 2),
    **dict.fromkeys(("stage", "console"), 3),
    **dict.fromkeys(("transforms", "quantizers", "evaluate"), 4),
    **dict.fromkeys(("pipeline", "finetune"), 5),
    **dict.fromkeys(("config", "export"), 6),
    "report": 7,
    "verbs": 8,
    "__main__": 9,
}
RUN_KEYS = "5b1be5f03e7e0ed9"  # of all runs of all experiments: moving code changes no key


def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name, parsed."""
    files = sorted((ROOT / "teq").rglob("*.py"))
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files
    ]
    return {name: ast.parse(file.read_text()) for name, file in zip(names, files, strict=True)}


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules that code imports, wherever in it; a name that is a module counts as that module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in inside}
    return found


def room(module: str) -> str:
    """The room of a module of the package: the folder or flat file at the top."""
    return module.split(".")[1] if "." in module else "teq"


def test_a_room_imports_only_from_floors_below():
    trees, wrong = modules(), []
    for name, tree in trees.items():
        for other in imported(tree, set(trees)):
            elsewhere = name != "teq" and other.startswith("teq.") and room(other) != room(name)
            if elsewhere and FLOORS.get(room(other), 99) >= FLOORS.get(room(name), 0):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_inside_a_room():
    trees = modules()
    graph = {
        name: {other for other in imported(tree, set(trees)) if other != name and other in trees}
        for name, tree in trees.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_hydra_is_in_one_room_and_torch_is_not_at_the_top_of_readers_and_settings():
    wrong = []
    for name, tree in modules().items():
        top = {other.partition(".")[0] for other in imported(ast.Module(tree.body, []), set())}
        at_top = {
            other.partition(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for other in imported(node, set())
        }
        if top & {"hydra", "omegaconf"} and room(name) != "config":
            wrong.append(f"{name} imports Hydra")
        if "torch" in at_top and (room(name) in ("record", "report") or name.endswith(".settings")):
            wrong.append(f"{name} imports torch at its top")
    assert not wrong, "\n".join(wrong)


def test_targets_in_conf_are_there():
    trees = modules()
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        for target in re.findall(r"_target_: ([\w.]+)", file.read_text()):
            module, _, name = target.rpartition(".")
            defined = {node.name for node in trees[module].body if isinstance(node, ast.ClassDef)}
            faces = {
                alias.asname or alias.name
                for node in trees[module].body
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            assert name in defined | faces, f"{file}: {target}"


def test_the_keys_of_all_runs_are_the_committed_ones():
    keys = {
        job.run.key()
        for name in config.groups()["experiments"]
        for job in config.jobs([f"experiments={name}"])
    }
    assert digest(sorted(keys)) == RUN_KEYS
