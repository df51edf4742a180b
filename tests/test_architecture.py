"""Guards the rules of docs/architecture.md that a reader of the source can check."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rwkv_peft"
FILES = sorted(PACKAGE.rglob("*.py"))
# imports point from a layer to the same or a later one
LAYERS = (
    ("cli",),
    ("api",),
    ("training", "generation", "evaluation"),
    # checkpoint/pth.py opens bases by the layouts of exports, which writes what checkpoint reads
    ("checkpoint", "exports"),
    ("methods", "quant", "data", "loss", "parallel"),
    ("models",),
    ("ops", "state", "device"),
    (
        "config",
        "errors",
        "guard",
        "recognise",
        "printing",
        "writing",
        "terminal",
        "deferred",
        "assets",
        "yaml_file",
        "language",
    ),
)
HEAVY = {"peft", "transformers", "datasets", "triton", "fla", "deepspeed", "bitsandbytes", "wandb"}
HEAVY |= {"lm_eval", "tensorboard", "trackio", "swanlab"}
TRITON_KERNELS = "triton_kernels.py"
# files of code for a library, which is loaded when it was chosen, as functions alone import them
CHOSEN = {TRITON_KERNELS: {"triton"}, "sandbox.py": {"jinja2"}}
# the one place in which nobody knows what a library raises
READS_DAMAGED_FILES = "records.py"
HEAVY |= {
    "gguf",
    "prompt_toolkit",
    "pyrwkv_tokenizer",
    "jsonargparse",
    "yaml",
    "rich",
    "safetensors",
    "jinja2",
    "pyarrow",
}
LINES, KERNEL_LINES, FUNCTION_LINES = 400, 600, 60


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def layer_of(module: str) -> int | None:
    name = module.split(".")[1] if "." in module else ""
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every imported module or name in one, and whether it is imported at the top of the file."""
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for guard in ast.walk(tree):
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING":
            inner.update(ast.walk(guard))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node not in inner) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_keeps_to_its_layer_and_its_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    own = layer_of(module_of(path))
    for name, is_top in imports(tree):
        is_heavy = name.split(".")[0] in HEAVY - CHOSEN.get(path.name, set())
        assert not (is_top and is_heavy), f"{name} is imported at the top"
        is_of_package = name.startswith("rwkv_peft.") and name != "rwkv_peft.__version__"
        if is_of_package and own is not None:
            other = layer_of(name)
            assert other is not None and other >= own, f"{name} is a layer above"
    is_kernel = "ops" in path.parts
    assert text.count("\n") <= (KERNEL_LINES if is_kernel else LINES)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} is too long"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            is_broad = caught in ("", "Exception", "BaseException")
            assert not is_broad or path.name == READS_DAMAGED_FILES, "a broad except"


def test_no_file_imports_itself_through_others() -> None:
    """Imports inside functions count, and those for types."""
    modules = {module_of(path): path for path in FILES}
    imports_of = {
        module: {
            # a name that is not a module is something in the module before its last dot
            name if name in modules else name.rpartition(".")[0]
            for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))
            # a constant, for which nothing else is read
            if name != "rwkv_peft.__version__"
        }
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(imports_of).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_no_file_is_a_drawer_for_anything() -> None:
    drawers = ("utils", "common", "helpers")
    assert not [p for p in PACKAGE.rglob("*") if p.stem in drawers]


def test_importing_the_package_loads_no_other() -> None:
    code = (
        "import sys, rwkv_peft\n"
        "heavy = {'torch', 'numpy', 'peft', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert callable(rwkv_peft.load_model) and callable(rwkv_peft.merge)\n"
        "heavy = {'peft', 'transformers', 'rich', 'yaml', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_function_says_what_it_gives() -> None:
    missing = []
    # the names of the kernels are those of the stages, which are described there
    for path in (p for p in FILES if p.name != TRITON_KERNELS):
        module = ast.parse(path.read_text(encoding="utf-8"))
        classes = [n for n in module.body if isinstance(n, ast.ClassDef)]
        for owner in [module, *(c for c in classes if not c.name.startswith("_"))]:
            for node in owner.body:
                is_public = getattr(node, "name", "_")[0] != "_"
                if is_public and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    missing += [f"{path.name}: {node.name}"] * (ast.get_docstring(node) is None)
    assert not missing


def test_only_the_kernels_of_nvidia_know_the_word_cuda() -> None:
    """Devices go through torch.accelerator; a table of backends may name the one it offers."""
    found = []
    for path in FILES:
        if "cuda" in path.with_suffix("").relative_to(PACKAGE).parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        rows = {
            node.args[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Backend" and node.args
        }
        for node in ast.walk(tree):
            is_use = isinstance(node, ast.Attribute) and node.attr == "cuda"
            is_type = isinstance(node, ast.Constant) and node.value == "cuda" and node not in rows
            is_list_of_flags = path.name == "device.py"
            if is_use or (is_type and not is_list_of_flags):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found


def test_an_optimizer_step_is_read_in_few_files_which_the_page_lists() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("### One optimizer step")[1].split("\n## ")[0]
    paths = [PACKAGE / line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert 8 <= len(paths) <= 12
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in paths) <= 1600
