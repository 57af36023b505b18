"""The import direction of docs/architecture.md, the public names, and a light `import gdn2`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gdn2
import gdn2.layers
import gdn2.ops

SOURCE = Path(gdn2.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# What each part may import of ours, besides itself.
ALLOWED = {
    "ops": set(),
    "layers": {"ops"},
    "config": set(),
    "model": {"config", "layers", "ops"},
    "presets": {"config"},
    "info": {"config", "model", "layers"},
    "decoding": {"layers", "model", "ops"},
    "generate": {"decoding", "layers", "model"},
    "data": set(),
    "training": {"config", "data", "generate", "info", "layers", "model", "ops"},
    "evaluation": {"data", "generate", "model"},
    "integrations": {"__init__", "config", "data", "evaluation", "generate", "layers", "model"},
    "report": {"config", "data", "evaluation", "inference", "layers", "model", "training"},
    "inference": {"data", "decoding", "generate", "layers", "model", "ops"},
    "selftest": {"config", "decoding", "layers", "model", "ops"},
    "serving": {"__init__", "data", "inference", "layers", "model"},
    "__init__": {"config", "model", "presets"},
    "__main__": {"cli"},
}
# Top-level packages that may be imported at module level; anything else is imported where it is used.
THIRD_PARTY = {"torch", "numpy", "safetensors"}
WITH_TERMINAL = {"cli"}
WITH_VERSION = {"training", "integrations", "serving"}  # `import gdn2`, for what a file says it was written by


def part(path):
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imported(tree, everywhere=True):
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from gdn2 import model` reaches the module as well as `import gdn2.model` does
            yield from (f"gdn2.{alias.name}" for alias in node.names) if node.module == "gdn2" else (node.module,)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    own = part(path)
    if own == "cli":
        return
    for name in imported(ast.parse(path.read_text())):
        if name == "gdn2":
            assert own in WITH_VERSION, f"{own} must not import the whole package"
        if name.startswith("gdn2."):
            target = name.split(".")[1]
            assert target == own or target in ALLOWED[own], f"{own} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    if "kernels" in path.parts or part(path) in ("integrations", "serving"):  # they are themselves imported on demand
        return
    for name in imported(ast.parse(path.read_text()), everywhere=False):
        top = name.split(".")[0]
        allowed = THIRD_PARTY | ({"rich", "typer"} if part(path) in WITH_TERMINAL else set())
        assert top in allowed | {"gdn2"} | set(sys.stdlib_module_names), f"{name} at module level"


def test_public_names_are_pinned():
    assert set(gdn2.__all__) == {"LanguageModel", "ModelConfig", "__version__", "preset"}
    assert set(gdn2.ops.__all__) == {
        "gated_delta_rule_2", "kda", "gated_delta_rule", "delta_rule", "mamba2", "mamba3", "Mamba3Memory",
        "debug_checks", "rule_from_projections",
    }  # fmt: skip
    assert set(gdn2.layers.__all__) == {
        "GatedDeltaNet2", "KimiDeltaAttention", "LinearAttention", "GatedDeltaNet", "DeltaNet", "Mamba2", "Mamba3",
        "SlidingWindowAttention", "RMSNorm", "SwiGLU", "DeltaState", "Mamba2State", "Mamba3State", "AttentionState",
    }  # fmt: skip
    for module in (gdn2, gdn2.ops, gdn2.layers):
        assert all(hasattr(module, name) for name in module.__all__)


def test_import_needs_torch_alone_and_touches_no_gpu():
    program = """
import sys, time, torch
start = time.perf_counter()
import gdn2
seconds = time.perf_counter() - start
print(seconds, torch.cuda.is_initialized())
"""
    others = ["rich", "typer", "matplotlib", "pyarrow", "tokenizers", "transformers", "triton", "yaml", "numpy"]
    others += ["safetensors"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({others}))"  # importing a None entry is an ImportError
    result = subprocess.run([sys.executable, "-c", blocked + program], capture_output=True, text=True, check=True)
    seconds, initialised = result.stdout.split()
    assert initialised == "False"
    assert float(seconds) < 2  # the promise to users; measured around 0.1
