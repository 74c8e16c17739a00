"""What an import brings in, and what no run may."""

import ast
import subprocess
import sys
from pathlib import Path

FORBIDDEN = "tensorflow", "torch", "transformers"

RUN = """
import sys
import t5x_lite, t5x_lite.language_model, t5x_lite.training.loop
from t5x_lite.cli.main import main
status = main(sys.argv[1:])
loaded = [name for name in ("tensorflow", "torch", "transformers") if name in sys.modules]
assert not loaded, loaded
sys.exit(status)
"""


def python(code: str, *args: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_framework() -> None:
    names = (*FORBIDDEN, "jax", "flax")
    python(f"import sys, t5x_lite, t5x_lite.config\nassert not [n for n in {names} if n in sys.modules]")


def test_a_training_run_imports_no_other_framework(tiny_settings: list[str], tmp_path: Path) -> None:
    python(RUN, "train", *tiny_settings, f"out={tmp_path}", "train.steps=1")


def test_tensorflow_datasets_works_without_tensorflow() -> None:
    python("import sys, tensorflow_datasets\nassert 'tensorflow' not in sys.modules")


def test_the_data_room_knows_no_jax() -> None:
    python("import sys, t5x_lite.data.recipe, t5x_lite.data.published_tasks\nassert 'jax' not in sys.modules")


FLOORS = (
    ("errors",),
    ("sharding",),
    ("nn",),
    ("models",),
    ("interop",),
    ("config",),
    ("run_directory",),
    ("data",),
    ("decoding", "evaluation"),
    ("training",),
    ("language_model",),
    ("loading",),
    ("report",),
    ("batch_inference",),
    ("benchmarking",),
    ("cli",),
    ("__init__", "__main__"),
)


def test_imports_only_go_down() -> None:
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    package = Path(__file__).parent.parent / "t5x_lite"
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("t5x_lite"):
                parts = (node.module or "").split(".")[1:]
                for used in parts[:1] or [alias.name for alias in node.names if alias.name in floor]:
                    assert floor[used] < floor[room] or used == room, f"{path.name}:{node.lineno} imports {used}"


def test_nothing_below_the_command_line_prints() -> None:
    package = Path(__file__).parent.parent / "t5x_lite"
    for path in sorted(package.rglob("*.py")):
        if "cli" not in path.parts:
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path
