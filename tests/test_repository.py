"""House rules as code: what README and docs say is true."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def blocks(language, page=README):
    """The contents of the fenced blocks of a language; "" is a fence that names none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_packages_in_the_architecture_are_the_packages():
    shown = re.findall(r"^(\w+(?:/|\.py)) ", blocks("", ARCHITECTURE)[0], flags=re.MULTILINE)
    packages = {path.parent.name for path in (ROOT / "caftune").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "caftune").glob("[!_]*.py")}
    assert sorted(shown) == sorted({f"{package}/" for package in packages} | modules)
    described = re.findall(r"^\*\*(\w+)\*\*", ARCHITECTURE, flags=re.MULTILINE)
    assert sorted(described) == sorted(packages)


def test_the_files_that_the_architecture_names_exist():
    named, package = set(), ""
    for paragraph in ARCHITECTURE.split("\n\n"):
        described = re.match(r"\*\*(\w+)\*\*", paragraph)
        package = described[1] if described else ""
        for file in re.findall(r"`([\w/]+\.(?:py|html))`", paragraph):
            named.add(file if "/" in file else f"{package}/{file}")
    assert len(named) > 40
    missing = sorted(file for file in named if not any((top / file).is_file() for top in (ROOT / "caftune", ROOT)))
    assert missing == []


def test_the_commands_in_the_readme_exist():
    from typer.main import get_command

    from caftune.cli import app

    known = set(get_command(app).commands)
    shown = "\n".join(blocks(""))
    assert {"label", "train"} <= set(re.findall(r"^caftune ([\w-]+)", shown, flags=re.MULTILINE)) <= known
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", shown, flags=re.MULTILINE)) <= targets


def test_the_commands_in_the_documents_exist():
    from typer.main import get_command

    from caftune.cli import app

    known = set(get_command(app).commands)
    for page in PAGES:
        assert set(re.findall(r"`caftune ([a-z][\w-]*)", page.read_text())) <= known, page.name


def test_links_in_the_documents_lead_somewhere():
    for page in PAGES:
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def test_the_index_of_the_documents_leads_to_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = index + (ROOT / "docs" / "results.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"({page.relative_to(ROOT / 'docs')})" in linked or page.name == "README.md", page.name


@pytest.mark.parametrize(
    "text",
    [path.read_text() for path in (ROOT / "recipes").glob("*.yaml")]
    # docs/axolotl.md shows Axolotl's configurations: tests/integrations/test_axolotl_section.py
    + [text for page in PAGES if page.name != "axolotl.md" for text in blocks("yaml", page.read_text())],
)
def test_recipes_are_valid(text, tmp_path):
    from caftune.pipeline.recipe import load_recipe, trainer_config

    recipe = {"output": "run", "model": {"name": "base"}} | yaml.safe_load(
        text
    )  # the documents also show single sections
    (tmp_path / "recipe.yaml").write_text(text if "output" in yaml.safe_load(text) else yaml.safe_dump(recipe))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    trainer_config(recipe, "pretrain", output_dir="x", pretrain_heads=True)
    trainer_config(recipe, "trainer", output_dir="x", aux_weight=0.0)


def test_the_ten_lines_of_the_readme_run_and_so_do_those_of_the_documents(tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import AutoTokenizer

    import caftune.training.config
    from caftune.demo.chemistry import completion, molecules, prompt
    from caftune.demo.run import BASE

    rows = [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(8, seed=7, substituents=(0, 1))]
    code = blocks("python")[0].replace("Qwen/Qwen3-0.6B", str(BASE))
    # the snippet as printed, made small: two steps on a CPU
    small = {"max_steps": 2, "use_cpu": True, "report_to": [], "dataloader_pin_memory": False}
    original = caftune.training.config.CAFTConfig.__init__
    monkeypatch.setattr(
        caftune.training.config.CAFTConfig,
        "__init__",
        lambda self, *args, **kwargs: original(self, *args, **{**kwargs, **small}),
    )
    monkeypatch.chdir(tmp_path)
    names = {
        "my_dataset_of_the_models_own_answers": Dataset.from_list(rows),
        "my_task_dataset": Dataset.from_list(rows),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "heads" / "heads.json").is_file()

    (tmp_path / "terms.txt").write_text("ribonucleic acid\n")
    for page in (ROOT / "docs").rglob("*.md"):
        for text in blocks("python", page.read_text()):
            text = text.replace("max_new_tokens=200", "max_new_tokens=8")
            exec(compile(text, str(page), "exec"), {"name": BASE, "tokenizer": AutoTokenizer.from_pretrained(BASE)})


def test_the_example_without_trl_runs_and_imports_none(tmp_path):
    code = (
        "import sys, runpy; sys.path.insert(0, 'examples'); import own_loop; "
        "from pathlib import Path; import caftune; "
        f"losses = own_loop.main(str(Path(caftune.__file__).parent / 'demo' / 'base'), {str(tmp_path / 'out')!r}); "
        "assert losses[-1] < losses[0]; assert 'trl' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_layers_of_the_design_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.is_file():
        pytest.skip("import-linter is not installed (pip install .[check])")
    subprocess.run([str(lint)], check=True, cwd=ROOT, capture_output=True, timeout=120)


def test_the_embedded_base_is_small_and_its_origin_recorded():
    base = ROOT / "caftune" / "demo" / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) < 5_000_000
    assert json.loads((base / "provenance.json").read_text())["licence"] == "Apache-2.0"


def test_constraints_pin_torch_as_the_makefile_does():
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in (ROOT / "Makefile").read_text()


def test_ci_calls_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
