"""What each package loads when it is imported alone: nothing of the layers above it, and no library it does without."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS = [re.split(r"\W+", layer) for layer in CONTRACTS[0]["layers"]]
ABSENT = {  # yaml is not named here: huggingface_hub loads it
    "core": {"trl", "peft", "datasets", "pydantic", "typer"},
    "data": {"torch", "trl", "peft", "pydantic", "typer"},
    "evals": {"torch", "transformers", "datasets", "rdkit", "Bio", "scipy"},
    "checkpoints": {"trl", "peft", "datasets", "pydantic", "typer"},
    "generation": {"trl", "peft", "pydantic", "typer", "openai", "vllm"},
    "training": {"pydantic", "typer"},
    "report": {"torch", "transformers", "trl"},
}
LOAD_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def loaded_by(package):
    command = [sys.executable, "-c", LOAD_ALL, f"caftune.{package}"]
    return set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


@pytest.mark.parametrize("package", [name for layer in LAYERS[1:-1] for name in layer])
def test_a_package_imported_alone_loads_nothing_above_it(package):
    loaded = loaded_by(package)
    number = next(place for place, layer in enumerate(LAYERS) if package in layer)
    above = {f"caftune.{name}" for layer in LAYERS[:number] for name in layer}
    assert loaded & above == set()
    assert loaded & ABSENT.get(package, set()) == set()
    assert f"caftune.{package}" in loaded


def test_every_package_is_in_a_layer():
    packages = {path.parent.name for path in (ROOT / "caftune").glob("*/__init__.py")}
    assert packages <= {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("package", ["core", "checkpoints", "training", "evals", "pipeline", "compare", "generation"])
def test_the_names_that_a_package_shows_exist(package):
    code = f"import caftune.{package} as p; assert p.__all__; [getattr(p, name) for name in p.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True)
    documented = subprocess.run(
        [sys.executable, "-c", f"import caftune.{package} as p; print(all(name in p.__doc__ for name in p.__all__))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert documented.stdout.strip() == "True"
