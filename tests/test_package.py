"""The shape of the package: which way imports point, and that optimizers are named in one module only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import safe_lr

PACKAGE = Path(safe_lr.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Imports point down this list, never up and never sideways. A subpackage counts as one.
ORDER = (
    "__main__",
    "commands",
    "__init__",
    "integrations",
    "sweeps",
    "scheduler",
    "guard",
    "decider",
    "neighbours",
    "hooks",
    "exits",
    "rewinder",
    "tuner",
    "instrument",
    "cuts",
    "controller",
    "accounts",
    "rates",
    "comparison",
    "report",
    "plots",
    "loggers",
    "trials",
    "measurement",
    "solving",
    "settings",
    "spectrum",
    "sharpness",
    "eigenproblem",
    "movers",
    "ensemble",
    "snapshots",
    "objective",
    "operators",
    "graphs",
    "kinks",
    "processes",
    "closures",
    "preconditioners",
    "differences",
    "deflation",
    "lanczos",
    "rules",
    "stability",
    "drift",
    "rewind",
    "norms",
    "cadence",
    "policies",
    "tuning",
    "advice",
    "decisions",
)

# Pure functions of numbers, tensors and matvecs: they know nothing of ours but what a decision is.
PURE = ("lanczos", "stability", "norms", "cadence", "policies", "tuning", "advice", "decisions")

# What shows and tells; only the stateful modules and the command may know of it.
OUTPUT = {"loggers", "comparison", "report", "plots"}
MAY_TELL = {"__main__", "commands", "__init__", "integrations", "sweeps", "scheduler", "guard", "decider"} | OUTPUT

_OPTIMIZERS = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
NAMES = (_OPTIMIZERS - {"Optimizer"}) | {
    "Adam",
    "AdamW",
    "SGD",
    "RMSprop",
    "Muon",
    "Lion",
    "Shampoo",
    "SOAP",
    "LAMB",
    "LARS",
}
NAMING_IS_MEANT = {"preconditioners", "integrations", "commands"}  # `safe-lr demo` trains with one


def unit(path: Path) -> str:
    """The module's place in ORDER: its own name, or its subpackage's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The units of ours that a module imports, anywhere in it: also inside functions and under TYPE_CHECKING."""
    return {target for node in ast.walk(ast.parse(path.read_text())) for target in _targets(node, path)} - {unit(path)}


def _targets(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path.name} imports relatively; write `from safe_lr.module import name`"
        dotted = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    for name in dotted:
        package, *rest = name.split(".")
        if package == "safe_lr":
            yield rest[0] if rest and rest[0] in ORDER else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    assert unit(path) in ORDER, f"{path.name} is new: give it its place in ORDER"
    allowed = set(ORDER[ORDER.index(unit(path)) + 1 :])
    assert imported(path) <= allowed, f"{unit(path)} imports {sorted(imported(path) - allowed)}, which stands above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_pure_modules_and_output_keep_to_themselves(path):
    if unit(path) in PURE:
        assert imported(path) <= {"decisions"}
    if unit(path) not in MAY_TELL:
        assert not imported(path) & OUTPUT, f"{unit(path)} measures; telling is for the scheduler and the command"
    if unit(path) in OUTPUT:
        allowed = OUTPUT | {"decisions", "advice", "stability"}
        assert imported(path) <= allowed, f"{unit(path)} shows records; it must not reach into the core"


def test_importing_safe_lr_brings_in_no_extra():
    """A bare scheduler needs torch, numpy and scipy; everything else is imported where it is used."""
    heavy = {"wandb", "matplotlib", "tensorboard", "sklearn", "tqdm", "lightning", "transformers", "yaml", "optuna"}
    heavy |= {"rich", "sweeps"}
    for path in SOURCES:
        if unit(path) in {"__main__", "integrations"}:
            continue
        for node in ast.parse(path.read_text()).body:  # top level only
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names} & heavy
            assert not found, f"{path.name} imports {found} at the top; do it inside the function that needs it"


def spoken(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names, attributes and strings of the code, with their lines. Docstrings and other bare strings are prose."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optimizers_are_named_in_one_module_only(path):
    if unit(path) in NAMING_IS_MEANT:
        return
    pattern = re.compile(rf"\b({'|'.join(sorted(NAMES))})\b")
    found = [f"line {line}: {text}" for line, text in spoken(ast.parse(path.read_text())) if pattern.search(text)]
    assert not found, f"{path.name} names an optimizer; what it is belongs into preconditioners.py: {found}"


def test_the_rules_above_can_fail():
    """The walkers see what they are meant to see."""
    tree = ast.parse('"""About Adam."""\nx = torch.optim.Adam\nif name == "AdamW": pass')
    assert [text for _, text in spoken(tree) if "Adam" in text] == ["Adam", "AdamW"]
    assert {"Adam", "AdamW", "SGD", "RMSprop"} <= NAMES
    assert imported(PACKAGE / "preconditioners" / "base.py") == {"stability"}


def test_public_names_exist_and_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", safe_lr.__version__)
    for name in safe_lr.__all__:
        assert hasattr(safe_lr, name)
