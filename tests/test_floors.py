"""Imports go downwards only, read from the source: who may know whom. Every module has a floor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIDE_FOLDERS = ("kernels", "quantize", "cli")
# A module may import modules of its own floor and below. A folder's floor holds for all in it.
FLOORS = {
    "localmoe.errors": 0,
    "localmoe.device": 0,
    "localmoe.files": 0,
    "localmoe.hub": 0,
    "localmoe.library": 0,
    "localmoe.locks": 0,
    "localmoe.marks": 0,
    "localmoe.memory": 0,
    "localmoe.halves": 0,
    "localmoe.spread": 0,
    "localmoe.kernels": 1,
    "localmoe.backend": 2,
    "localmoe.device_ops": 2,
    "localmoe.ops": 2,
    "localmoe.kernel_choice": 2,
    "localmoe.config": 3,
    "localmoe.formats": 3,
    "localmoe.safetensors_io": 3,
    "localmoe.spelling": 3,
    "localmoe.checkpoint": 3,
    "localmoe.weights": 3,
    "localmoe.site": 3,
    "localmoe.cache": 4,
    "localmoe.tape": 4,
    "localmoe.cuda_graphs": 4,
    "localmoe.sequence": 4,
    "localmoe.snapshot": 4,
    "localmoe.step": 4,
    "localmoe.step_size": 3,
    "localmoe.experts": 4,
    "localmoe.layers": 5,
    "localmoe.models": 6,
    "localmoe.decoder": 7,
    "localmoe.expert_layout": 7,
    "localmoe.loader": 7,
    "localmoe.matching": 7,
    "localmoe.pager": 7,
    "localmoe.gpu_experts": 7,
    "localmoe.gpus": 7,
    "localmoe.placement": 7,
    "localmoe.plan": 7,
    "localmoe.pull": 7,
    "localmoe.tokenizer": 8,
    "localmoe.vocabulary": 8,
    "localmoe.prepared": 8,
    "localmoe.prompt": 8,
    "localmoe.template": 8,
    "localmoe.template_sandbox": 8,
    "localmoe.template_tree": 8,
    "localmoe.chat_format": 8,
    "localmoe.reply": 8,
    "localmoe.constraint": 8,
    "localmoe.guide": 8,
    "localmoe.sampler": 8,
    "localmoe.events": 8,
    "localmoe.reply_request": 8,
    "localmoe.engine": 8,
    "localmoe.session": 8,
    "localmoe.identity": 8,
    "localmoe.transcript": 8,
    "localmoe.conversation": 8,
    "localmoe.resume": 8,
    "localmoe.state_files": 8,
    "localmoe.sessions": 8,
    "localmoe.scheduler": 8,
    "localmoe.shared_prefixes": 8,
    "localmoe.api": 8,
    "localmoe.meter": 8,
    "localmoe.facts": 9,
    "localmoe.batch": 9,
    "localmoe.mini": 9,
    "localmoe.bench": 9,
    "localmoe.quantize": 9,
    "localmoe.cli": 10,
    # Its re-exports are made when they are used.
    "localmoe": 10,
}
SLOW_TO_IMPORT = {
    "torch",
    "numpy",
    "tokenizers",
    "deepseek_recipe",
    "localmoe.api",
    "localmoe.events",
    "localmoe.sampler",
}


def sources() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for folder in ("localmoe", *SIDE_FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[0] == "localmoe" else ("localmoe", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = sources()


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports; `from package import module` gives the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


def floor(module: str) -> int:
    """The floor of a module, or of the folder it is in."""
    room = ".".join(module.split(".")[:2])
    assert room in FLOORS, f"{room} has no floor; add it to FLOORS"
    return FLOORS[room]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downwards(module: str) -> None:
    """Fails if a lower part would need a higher one, or is on no floor."""
    for name in imports(MODULES[module]):
        if name.partition(".")[0] == "localmoe":
            assert floor(name) <= floor(module), (
                f"{module} (floor {floor(module)}) imports {name} (floor {floor(name)})"
            )


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("localmoe.kernels.")))
def test_kernels_know_torch_and_each_other_only(module: str) -> None:
    """A kernel must be readable, testable and replaceable without the rest of the package."""
    for name in imports(MODULES[module]):
        assert not name.startswith("localmoe") or name.startswith("localmoe.kernels."), f"{module} imports {name}"


def test_triton_is_needed_by_its_kernels_and_the_accelerator_only() -> None:
    """Fails if anything else could not be imported where triton is not installed, or a command waited for it."""
    at_once = {module: set(imports(path, top_level_only=True)) for module, path in MODULES.items()}
    needing: set[str] = set()
    more = {module for module, names in at_once.items() if any(name.partition(".")[0] == "triton" for name in names)}
    while more:
        needing |= more
        more = {module for module, names in at_once.items() if names & needing} - needing
    assert "localmoe.kernels.triton.ops" in needing
    allowed = ("localmoe.kernels.triton.", "localmoe.experts.accelerator")
    assert not [module for module in needing if not module.startswith(allowed)]


def test_side_folders_are_imported_by_their_full_name_only() -> None:
    """`import kernels` works in a checkout and shadows or misses elsewhere."""
    files = [*MODULES.values(), *(ROOT / "tests").glob("*.py")]
    named = {(path.name, name) for path in files for name in imports(path) if name.partition(".")[0] in SIDE_FOLDERS}
    assert not named


def test_side_folders_are_no_packages_at_the_top() -> None:
    """With an __init__.py, `kernels` would shadow Hugging Face's package of that name at the root of a checkout."""
    assert not [folder for folder in SIDE_FOLDERS if (ROOT / folder / "__init__.py").exists()]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("localmoe.cli.")))
def test_the_command_line_starts_without_the_engine(module: str) -> None:
    """Fails if --help or a mistyped option would wait for torch."""
    top = set(imports(MODULES[module], top_level_only=True))
    assert not {name for name in top if name in SLOW_TO_IMPORT or name.partition(".")[0] in SLOW_TO_IMPORT}
