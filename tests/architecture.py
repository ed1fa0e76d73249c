"""The rules that keep this project's house in order, as data, and the checks that read the source against them.

A *room* is what one name under ``nepa_dist/`` covers (a file or a folder), or ``jobs``, or ``data_prep``. Nothing is imported
here: the checks read the syntax trees. docs/architecture.md says why the rules are what they are.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("nepa_dist", "jobs", "data_prep")

_DATA = {"data.classes", "data.containers", "data.device", "data.loader", "data.open", "data.order"}
_MEASURES = {"metrics.collapse", "metrics.registry", "metrics.segmentation", "metrics.spread"}
ARROWS: dict[str, set[str]] = {
    "jobs": {
        "config",
        "config_cluster",
        "config_load",
        "cost",
        "curves",
        "data.augment",
        "data.classes",
        "data.containers",
        "data.decode",
        "data.loader",
        "data.mounts",
        "data.open",
        "data.order",
        "data_prep",
        "guard",
        "memory",
        "metrics.registry",
        "metrics.sinks",
        "metrics.trackers",
        "online_knn",
        "pictures",
        "plan",
        "presets",
        "report",
        "run_folder",
        "step_time",
        "train",
    },
    "data_prep": {"data"},
    "train": {
        "checkpoint",
        "config",
        "curves",
        "data",
        "engines",
        "guard",
        "intake",
        "keyed",
        "metrics.trackers",
        "online_knn",
        "optim",
        "plan",
        "reporting",
        "resume",
        "run",
        "run_folder",
        "saving",
        "state",
        "step_report",
        "tasks",
        "transfer",
        "validation",
        "watchdog",
    },
    "arguments": set(),
    "evaluate": {"arguments", "checkpoint", "config", "metrics.collapse", "model", "probe_report", "tasks", "trained"} | _DATA,
    "probe_report": {"pictures", "run_folder"},
    "online_knn": {"config", "data.classes", "data.containers", "data.open", "online_probe"},
    "online_probe": {"config", "data", "model", "tasks"},
    "intake": {"data", "run"},
    "run": {"checkpoint", "config", "data", "engines", "metrics.profile", "plan", "state", "tasks"},
    "resume": {"checkpoint", "config", "data", "engines.base", "run", "run_folder", "state"},
    "saving": {"checkpoint", "data", "reporting", "run", "run_folder"},
    "labels": set(),
    "transfer": {"checkpoint.portable", "config", "names", "official", "tasks", "trained"},
    "validation": {
        "config",
        "data",
        "engines",
        "guard",
        "labels",
        "provenance",
        "reporting",
        "run",
        "run_folder",
        "tasks",
        "watchdog",
    },
    "score": {"checkpoint", "config", "config_load", "data", "run_folder", "tasks", "trained", "validation"},
    "watchdog": {"guard"},
    "reporting": {"config", "endpoint", "engines", "memory", "metrics", "plan", "run_folder", "state", "step_report"},
    "step_report": {"engines", "metrics.profile"},
    "endpoint": {"config", "engines.mesh", "metrics", "run_folder"},
    "export": {"checkpoint", "config", "labels", "model_card", "official", "provenance", "timm_names", "trained"},
    "model_card": {"config", "provenance", "timm_names"},
    "official": {"config", "model", "names"},
    "provenance": {"checkpoint.manifest", "metrics.sinks"},
    "timm_names": {"config"},
    "names": set(),
    "report": {"config", "cost", "memory", "plan", "step_time"},
    "step_time": {"config", "cost", "memory", "plan"},
    "memory": {"config", "cost", "heads.upernet_cost"},
    "tasks": {"config", "data.mixup", "heads", "keyed", "model"} | _MEASURES,
    "checkpoint": set(),
    "engines": {"attention", "config", "fp8", "fused", "linear", "metrics.registry", "optim", "plan"},
    "optim": {"config", "plan"},
    "curves": {"metrics.sinks", "pictures"},
    "gallery": {"config", "data"},
    "visualize": {"arguments", "curves", "data", "gallery", "maps", "pictures", "tasks", "trained"},
    "maps": {"model", "tasks"},
    "pictures": set(),
    "trained": {"checkpoint", "config", "data.device", "labels", "model", "names", "official", "provenance", "tasks"},
    "guard": {"state"},
    "model": {"attention", "config", "keyed", "linear"},
    "fp8": set(),
    "fused": {"config", "kernels", "linear", "model"},
    "kernels": set(),
    "linear": set(),
    "attention": set(),
    "data": {"config"},
    "metrics": {"config", "run_folder"},
    "config_load": {"config", "plan", "presets"},
    "plan": {"config"},
    "config": {"config_base", "config_cluster", "config_data", "config_model", "config_task"},  # reached through config
    "config_cluster": {"config_base"},
    "config_data": {"config_base"},
    "config_model": {"config_base", "presets"},
    "config_task": {"config_base"},
    "config_base": set(),
    "heads": set(),
    "keyed": set(),
    "cost": {"config_model"},
    "presets": set(),
    "run_folder": set(),
    "state": set(),
}
"""Room -> the rooms, or single modules of them, that it may import when it runs. Imports for types alone are free."""

LIBRARIES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("nepa_dist/engines/zero.py",),
    "torchao": ("nepa_dist/fp8.py",),
    "triton": ("nepa_dist/kernels.py",),
    "prometheus_client": ("nepa_dist/metrics/exporter.py",),
    "tensorboardX": ("nepa_dist/metrics/trackers.py",),
    "wandb": ("nepa_dist/metrics/wandb_process.py",),
    "submitit": ("jobs/",),
    "webdataset": ("nepa_dist/data/", "data_prep/"),
    "streaming": ("nepa_dist/data/", "data_prep/"),
    "ffcv": ("nepa_dist/data/", "data_prep/"),
    "simplejpeg": ("nepa_dist/data/turbo.py",),
    "crc32c": ("nepa_dist/data/prepared.py",),
    "pyarrow": ("data_prep/parquet.py",),
    "torchvision": (),
    "timm": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
}
"""Library -> the only files, or folders, that may import it."""

MAX_LINES = 399

SYSTEM_FOLDERS = {"dev", "proc", "sys", "tmp", "usr", "etc", "var", "opt", "bin"}
EXAMPLE_FOLDERS = {"data", "scratch", "path", "on", "nonexistent", "api", "app"}
"""First parts of absolute paths that a file may name: the system's own, and the placeholders of the documentation."""

_IMPORTERS = ("__import__", "import_module", "importlib.import_module")
_TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".cfg", ".ini"}
_TEXT_NAMES = {"Makefile", "Dockerfile", "run", ".pre-commit-config.yaml", ".dockerignore"}
_SKIPPED_FOLDERS = {"build", "runs", "results", "__pycache__", "node_modules"}
_ABSOLUTE = re.compile(r"(?<![\w.:/<>~$}{)*\]-])/(?P<first>[A-Za-z][\w.-]*)/[\w.-]")
_UPWARD = re.compile(r"(?<![\w./])(?:\./)?(?:\.\./)+[\w./-]*")


class Violation(NamedTuple):
    """A place that breaks a rule."""

    file: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}"


class Import(NamedTuple):
    """One imported module: ``line`` in the file, ``module`` with dots."""

    line: int
    module: str


def check(root: Path) -> list[Violation]:
    """All violations in the project at ``root``, in the order of files and lines."""
    violations: list[Violation] = []
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        violations += _check_paths(root, path, name, text)
        if path.suffix != ".py":
            continue
        if (length := len(text.splitlines())) > MAX_LINES:
            violations.append(Violation(name, length, f"a file has fewer than 400 lines, this one {length}; split it by topic"))
        if name.split("/")[0] in PACKAGES:
            tree = ast.parse(text, name)
            imports = list(_imports(root, name, tree))
            violations += _check_arrows(name, imports)
            violations += _check_libraries(name, imports)
            violations += _check_model(name, tree, imports)
            violations += _check_loads(name, tree)
    return sorted(violations)


def unused_arrows(root: Path) -> list[str]:
    """Entries of :data:`ARROWS` that no import of the project at ``root`` needs, as "room -> arrow"."""
    used: dict[str, set[str]] = {}
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and (room := _room(_dotted(name))) is not None:
            tree = ast.parse(path.read_text(encoding="utf-8"), name)
            used.setdefault(room, set()).update(found.module.removeprefix("nepa_dist.") for found in _imports(root, name, tree))
    return [
        f"{room} -> {arrow}"
        for room, arrows in ARROWS.items()
        for arrow in sorted(arrows)
        if not any(_leads_to(arrow, module) for module in used.get(room, ()))
    ]


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        hidden = path.name.startswith(".") and path.name not in (".ci", *_TEXT_NAMES)
        if hidden or path.name in _SKIPPED_FOLDERS or path.name.endswith(".egg-info"):
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.suffix in _TEXT or path.name in _TEXT_NAMES:
            yield path


def _imports(root: Path, name: str, tree: ast.Module) -> Iterator[Import]:
    package = name.split("/")[:-1]
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, _resolve(root, module, alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _IMPORTERS and isinstance(node.args[0], ast.Constant):
            yield Import(node.lineno, str(node.args[0].value))


def _resolve(root: Path, module: str, name: str) -> str:
    """``from module import name`` imports the module ``module.name`` where there is one. Of other projects' we assume it."""
    if module.split(".")[0] not in PACKAGES:
        return f"{module}.{name}"
    inner = root.joinpath(*module.split("."), name)
    return f"{module}.{name}" if inner.is_dir() or inner.with_suffix(".py").is_file() else module


def _dotted(name: str) -> str:
    """Module of a file."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _leads_to(arrow: str, module: str) -> bool:
    return module == arrow or module.startswith(arrow + ".")


def _room(dotted: str) -> str | None:
    """Room of a module; None outside the project and for ``nepa_dist`` itself, which holds but the version."""
    package, *inner = dotted.split(".")
    if package == "nepa_dist":
        return inner[0] if inner else None
    return package if package in PACKAGES else None


def _check_arrows(name: str, imports: list[Import]) -> Iterator[Violation]:
    room = _room(_dotted(name))
    if room is None:
        for line, module in imports:
            if _room(module):
                yield Violation(name, line, f"the package itself imports nothing of the project, this imports {module}")
        return
    if room not in ARROWS:
        yield Violation(name, 1, f"room {room!r} has no entry in ARROWS (tests/architecture.py): say there what it may import")
        return
    for line, module in imports:
        target = _room(module)
        inner = module.removeprefix("nepa_dist.")
        if target is None or target == room or any(_leads_to(arrow, inner) for arrow in ARROWS[room]):
            continue
        allowed = ", ".join(sorted(ARROWS[room])) or "no other room"
        yield Violation(name, line, f"{room} must not import {inner}; it may import {allowed}")


def _check_libraries(name: str, imports: list[Import]) -> Iterator[Violation]:
    for line, module in imports:
        library = module.split(".")[0]
        homes = LIBRARIES.get(library)
        if homes is not None and not any(name == home or (home.endswith("/") and name.startswith(home)) for home in homes):
            where = f"only in {' and '.join(homes)}" if homes else "nowhere in this project"
            yield Violation(name, line, f"{library} is imported {where}")


def _check_model(name: str, tree: ast.Module, imports: list[Import]) -> Iterator[Violation]:
    if name != "nepa_dist/model.py":
        return
    lines = [line for line, module in imports if f"{module}.".startswith("torch.distributed.")]
    lines += [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    ]
    for line in lines:
        yield Violation(name, line, "the model knows nothing of torch.distributed; that is the engines' work")


def _check_loads(name: str, tree: ast.Module) -> Iterator[Violation]:
    """Nothing that reads a file may run code that is in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in [alias.name for alias in node.names]:
            yield Violation(name, node.lineno, "write torch.load(..., weights_only=True) in full, so that this check sees it")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            yield Violation(name, node.lineno, "torch.load runs code in the file unless weights_only=True is given")
        if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            yield Violation(name, node.lineno, "numpy.load runs code in the file where allow_pickle is given")


def _check_paths(root: Path, path: Path, name: str, text: str) -> Iterator[Violation]:
    depth = len(path.parent.relative_to(root).parts)
    for number, line in enumerate(text.splitlines(), 1):
        for match in _ABSOLUTE.finditer(line):
            if match["first"] not in SYSTEM_FOLDERS | EXAMPLE_FOLDERS:
                yield Violation(name, number, f"a path of one machine: {line[match.start() :].split()[0]}")
        for match in _UPWARD.finditer(line):
            if match.group().count("../") > depth:
                yield Violation(name, number, f"a path outside the project: {match.group()}")
