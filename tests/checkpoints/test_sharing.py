"""Heads on a hub: what travels, what the card says, how they are used from there, and every refusal in one sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import files_in, serve_hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from trainers import config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from caftune import Backbone, CAFTTrainer, load_heads
from caftune.checkpoints.heads_folder import describe_heads, find_heads
from caftune.checkpoints.hub import pull_heads, push_heads
from caftune.checkpoints.quality_card import quality_table
from caftune.cli import app
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.files import file_sha256, write_json
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.head_quality import measure_heads
from caftune.pipeline.schema import Recipe

NAME = "tester/heads"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
TRAVELS = {"heads.safetensors", "heads.json", "quality.json", "quality.png"}
STRAYS = {"heads.pkl", "optimizer.pt", "other.safetensors", "notes.txt", "README.md", "checkpoint-2/heads.safetensors"}


@pytest.fixture(autouse=True)
def client(tmp_path, monkeypatch):
    """The hub's client with a cache and a token of its own, and no hub to talk to unless a test serves one."""
    settings = {"HF_HUB_CACHE": tmp_path / "cache", "HF_TOKEN_PATH": tmp_path / "no-token", "ENDPOINT": NOWHERE}
    for name, value in settings.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(value))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", NOWHERE)
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)  # its older name


@pytest.fixture
def hub(client, tmp_path):
    with serve_hub(tmp_path / "hub") as served:
        yield served


@pytest.fixture(scope="module")
def base():
    return Backbone.of(AutoModelForCausalLM.from_pretrained(BASE)), AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def made(base, rows, tmp_path_factory):
    """Heads that know how they were made and how good they are, among files that are nobody's business."""
    folder = tmp_path_factory.mktemp("made")
    options = {"pretrain_heads": True, "num_heads": 2, "max_steps": 2}
    trainer = CAFTTrainer(str(BASE), config(folder / "out", **options), train_dataset=rows)
    trainer.train()
    heads = folder / "heads"
    about = {"command": "caftune pretrain-heads recipe.yaml", "data": {"text": "notes.jsonl", "rows": 40}}
    trainer.export(heads, about=about)
    held_out = trainer.train_dataset.select(range(4))
    quality = measure_heads(base[0], load_heads(heads, *base), held_out, positions=8)
    write_json(heads / "quality.json", quality | {"weights_sha256": describe_heads(heads)["weights_sha256"]})
    (heads / "quality.png").write_bytes(b"\x89PNG and so on")
    for stray in STRAYS:
        (heads / stray).parent.mkdir(exist_ok=True)
        (heads / stray).write_bytes(b"private")
    return heads


@pytest.fixture
def changed(made, tmp_path):
    """The same heads with other weights."""
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    weights = {name: tensor + 1 for name, tensor in load_file(made / "heads.safetensors").items()}
    save_file(weights, folder / "heads.safetensors")
    described = json.loads((made / "heads.json").read_text())
    write_json(folder / "heads.json", described | {"weights_sha256": file_sha256(folder / "heads.safetensors")})
    return folder


def published(hub, files):
    """A model repository that somebody else made."""
    hub.private["tester/other"] = False
    hub.record("tester/other", "by hand", files)
    return "tester/other"


def card_of(hub, name=NAME):
    return ModelCard.load(hub.folder(name) / "README.md")


def are(found, folder):
    expected = load_file(folder / "heads.safetensors")
    state = found.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def in_one_line(error):
    """Whether a message is one line that ends as prose does."""
    return "\n" not in str(error.value) and str(error.value).endswith(".")


def test_pulled_heads_are_the_pushed_ones_byte_for_byte(hub, made, tmp_path):
    push_heads(made, NAME, licence="apache-2.0")
    pulled = pull_heads(NAME, tmp_path / "new" / "heads")
    assert all((pulled / name).read_bytes() == (made / name).read_bytes() for name in TRAVELS)


def test_nothing_but_the_heads_their_quality_and_the_card_is_pushed(hub, made):
    push_heads(made, NAME, licence="apache-2.0")
    sent = files_in(hub.folder(NAME))
    assert sent.keys() == {*TRAVELS, "README.md", ".gitattributes"}
    assert b"private" not in sent["README.md"]


def test_nothing_else_that_lies_in_a_repository_is_fetched(hub, made, tmp_path):
    heads = {name: (made / name).read_bytes() for name in TRAVELS}
    strays = dict.fromkeys(("README.md", "model.pkl", "pytorch.bin", "run.py"), b"code")
    pulled = pull_heads(published(hub, heads | strays), tmp_path / "pulled")
    assert {file.name for file in pulled.iterdir()} == {*TRAVELS, "README.md"}
    assert not [request for request in hub.requests if request.endswith((".pkl", ".bin", ".py"))]


def test_pulled_heads_can_be_pushed_on(hub, made, tmp_path):
    push_heads(made, NAME, licence="apache-2.0")
    push_heads(pull_heads(NAME, tmp_path / "pulled"), "tester/again", licence="apache-2.0")
    one, other = files_in(hub.folder(NAME)), files_in(hub.folder("tester/again"))
    assert {name: one[name] for name in TRAVELS} == {name: other[name] for name in TRAVELS}


def test_the_address_of_the_commit_is_returned(hub, made):
    assert push_heads(made, NAME, licence="mit") == f"{hub.url}/{NAME}/commit/{hub.folder(NAME).name}"


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_is_private_when_asked(hub, made, private):
    push_heads(made, NAME, licence="mit", private=private)
    assert hub.private == {NAME: private}


def test_the_card_says_what_the_heads_are_and_how_they_were_made(hub, made):
    push_heads(made, NAME, licence="apache-2.0")
    lines = re.findall(r"^- \*\*(.+?)\*\*: (.+)$", card_of(hub).text, re.MULTILINE)
    facts = {name: value.strip("`") for name, value in lines}
    assert facts["base"] == BASE.name
    assert facts["kind"] == "decoder, branching off the model at the input of the last layer"
    assert facts["horizons"] == "2, 3"
    assert facts["trained on"] == "text notes.jsonl, rows 40"
    assert "steps 2, learning_rate 0.001" in facts["settings"]
    assert facts["command"] == "caftune pretrain-heads recipe.yaml"
    assert facts["SHA-256 of the weights"] == file_sha256(made / "heads.safetensors")
    assert facts["licence"] == "apache-2.0"


def test_the_card_shows_how_good_the_heads_are(hub, made):
    push_heads(made, NAME, licence="apache-2.0")
    assert "\n".join(quality_table(json.loads((made / "quality.json").read_text()))) in card_of(hub).text


def test_the_front_matter_tells_the_hub_the_licence_and_the_tags(hub, made):
    push_heads(made, NAME, licence="llama3.1")
    data = card_of(hub).data
    assert (data.license, data.tags, data.library_name) == ("llama3.1", ["caftune", "caftune-heads"], "caftune")


def test_pushing_changed_heads_leaves_the_first_to_be_had_by_their_commit(hub, made, changed, base):
    first = push_heads(made, NAME, licence="mit").rpartition("/")[2]
    push_heads(changed, NAME, licence="mit")
    assert len(hub.commits[NAME]) == 3  # an empty repository, and two pushes
    assert are(load_heads(f"{NAME}@{first}", *base), made)
    assert are(load_heads(NAME, *base), changed)


def test_the_newest_heads_are_fetched_though_older_ones_are_cached(hub, made, changed, base):
    push_heads(made, NAME, licence="mit")
    load_heads(NAME, *base)
    push_heads(changed, NAME, licence="mit")
    assert are(load_heads(NAME, *base), changed)


def test_fetched_heads_load_when_the_hub_is_gone(made, base, tmp_path):
    with serve_hub(tmp_path / "hub"):
        first = push_heads(made, NAME, licence="mit").rpartition("/")[2]
        find_heads(NAME)
    assert are(load_heads(NAME, *base), made)
    assert are(load_heads(f"{NAME}@{first}", *base), made)


def trains_with(made, rows, folder):
    trainer = CAFTTrainer(str(BASE), config(folder, heads=NAME, max_steps=1), train_dataset=rows)
    assert are(trainer.heads, made)
    trainer.train()
    trainer.export(folder / "model")
    return file_sha256(made / "heads.safetensors") in (folder / "model" / "README.md").read_text()


def test_a_trainer_takes_heads_from_the_hub(hub, made, rows, tmp_path):
    push_heads(made, NAME, licence="mit")
    assert trains_with(made, rows, tmp_path)


def test_a_trainer_takes_fetched_heads_when_the_hub_is_gone(made, rows, tmp_path):
    with serve_hub(tmp_path / "hub"):
        push_heads(made, NAME, licence="mit")
        find_heads(NAME)
    assert trains_with(made, rows, tmp_path)


@pytest.fixture
def recipe(rows, tmp_path):
    rows.to_json(tmp_path / "data.jsonl")
    values = {
        "output": str(tmp_path / "run"),
        "model": {"name": str(BASE)},
        "heads": {"path": NAME},
        "data": {"train": str(tmp_path / "data.jsonl"), "limit": 16},
        "trainer": {"per_device_train_batch_size": 8, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 2},
    }
    return Recipe.model_validate(values)


def test_a_recipe_names_heads_on_the_hub(hub, made, recipe):
    push_heads(made, NAME, licence="mit")
    model = finetune_model(recipe)
    record = json.loads((Path(recipe.output) / "train" / "provenance.json").read_text())
    assert record["heads"]["weights_sha256"] == file_sha256(made / "heads.safetensors")
    assert record["heads"]["folder"].endswith(hub.folder(NAME).name)  # which commit it was
    assert (model / "model.safetensors").is_file()


def test_a_run_does_not_go_on_with_other_heads_that_were_pushed_meanwhile(hub, made, changed, recipe):
    push_heads(made, NAME, licence="mit")
    finetune_model(recipe)
    push_heads(changed, NAME, licence="mit")
    with pytest.raises(CaftuneError, match="the contents of heads changed"):
        finetune_model(recipe)


def test_heads_on_the_hub_of_another_kind_than_the_recipe_asks_for_are_refused(hub, made, recipe):
    push_heads(made, NAME, licence="mit")
    other = recipe.model_copy(update={"heads": recipe.heads.model_validate({"path": NAME, "count": 7})})
    with pytest.raises(CaftuneError, match=rf"heads\.count must be 2, as in {NAME}, got 7"):
        finetune_model(other)


@pytest.mark.parametrize("name", ["tester/nothing", f"{NAME}@no-such-branch", f"{NAME}@{'0' * 40}"])
def test_a_repository_or_revision_that_does_not_exist_is_refused(hub, made, tmp_path, name):
    push_heads(made, NAME, licence="mit")
    with pytest.raises(CaftuneError, match=f"^{name} must be a folder or heads on the hub, got neither") as error:
        pull_heads(name, tmp_path / "new")
    assert in_one_line(error)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("files", [{".gitattributes"}, {".gitattributes", "README.md", "pytorch.bin"}])
def test_a_repository_without_heads_is_refused(hub, tmp_path, files):
    name = published(hub, dict.fromkeys(files, b"other"))
    with pytest.raises(
        CaftuneError, match=rf"^{name} on the hub must hold heads of caftune, got .* without heads\.json"
    ) as error:
        pull_heads(name, tmp_path / "new")
    assert in_one_line(error)
    assert not (tmp_path / "new").exists()


def test_heads_that_are_not_cached_are_refused_when_the_hub_is_gone(tmp_path):
    with pytest.raises(
        CaftuneError, match=f"{NAME} must be a folder or heads on the hub, got neither .*refused"
    ) as error:
        pull_heads(NAME, tmp_path / "new")
    assert in_one_line(error)


def test_heads_that_are_cached_in_part_are_refused_when_the_hub_is_gone(made, tmp_path):
    with serve_hub(tmp_path / "hub"):
        push_heads(made, NAME, licence="mit")
        cached = find_heads(NAME)
    (cached / "heads.safetensors").unlink()
    with pytest.raises(
        CaftuneError, match=f"{NAME} must be a folder or heads on the hub, got neither .*incomplete"
    ) as error:
        pull_heads(NAME, tmp_path / "new")
    assert in_one_line(error)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def test_damaged_heads_are_not_pushed(hub, changed):
    flip_a_bit(changed / "heads.safetensors")
    with pytest.raises(CaftuneError, match=r"is damaged: its SHA-256 differs from heads\.json") as error:
        push_heads(changed, NAME, licence="mit")
    assert in_one_line(error)
    assert not hub.commits


def test_heads_that_were_damaged_on_the_hub_are_not_pulled(hub, made, tmp_path):
    push_heads(made, NAME, licence="mit")
    flip_a_bit(hub.folder(NAME) / "heads.safetensors")
    with pytest.raises(CaftuneError, match=r"is damaged: its SHA-256 differs from heads\.json") as error:
        pull_heads(NAME, tmp_path / "new")
    assert in_one_line(error)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_files_is_left_as_it_is(hub, made, tmp_path):
    push_heads(made, NAME, licence="mit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(
        CaftuneError, match="mine must be an empty or a new folder, got a file or a folder with files"
    ) as error:
        pull_heads(NAME, tmp_path / "mine")
    assert in_one_line(error)
    assert files_in(tmp_path / "mine") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("exists", [False, True])
def test_pushing_without_a_token_is_refused(hub, made, monkeypatch, exists):
    if exists:
        push_heads(made, NAME, licence="mit")
    before = {name: list(commits) for name, commits in hub.commits.items()}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        CaftuneError,
        match=rf"The hub did not accept .* as {NAME}: .*(401|no such repository).* Log in with `hf auth login`",
    ) as error:
        push_heads(made, NAME, licence="mit")
    assert in_one_line(error)
    assert {name: list(commits) for name, commits in hub.commits.items()} == before


def test_a_name_that_no_repository_can_have_is_refused(hub, made):
    with pytest.raises(CaftuneError, match="as no name: .*check the name") as error:
        push_heads(made, "no name", licence="mit")
    assert in_one_line(error)


def test_a_folder_without_heads_is_not_pushed(hub, tmp_path):
    with pytest.raises(CaftuneError, match=r"must be a folder with heads\.json and heads\.safetensors"):
        push_heads(tmp_path, NAME, licence="mit")
    assert not hub.commits


@pytest.fixture(scope="module")
def commands(made, tmp_path_factory):
    """What push, info and pull print, each in a process of its own."""
    folder = tmp_path_factory.mktemp("commands")
    calls = {
        "push": ("push", str(made), NAME, "--licence", "apache-2.0", "--private"),
        "info": ("info", NAME),
        "pull": ("pull", NAME, str(folder / "pulled")),
    }
    own = {"HF_TOKEN": "hf_any", "HF_HOME": str(folder / "home"), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    printed = {}
    with serve_hub(folder / "hub") as served:
        environment = {**os.environ, **served.environment, **own}
        for name, arguments in calls.items():
            command = [sys.executable, "-m", "caftune.cli", "heads", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            printed[name] = done.stdout
    return served, folder, printed


def test_the_command_push_prints_the_address(commands):
    hub, _, printed = commands
    assert f"Pushed: {hub.url}/{NAME}/commit/{hub.folder(NAME).name}" in printed["push"]
    assert hub.private == {NAME: True}
    assert card_of(hub).data.license == "apache-2.0"


def test_the_command_info_shows_the_card(commands, made):
    printed = " ".join(commands[2]["info"].split())
    for part in (NAME, BASE.name, "text notes.jsonl, rows 40", file_sha256(made / "heads.safetensors"), "Quality"):
        assert part in printed
    assert "license:" not in printed  # the front matter is for the hub


def test_the_command_pull_fills_the_folder(commands, made):
    _, folder, printed = commands
    assert f"Heads: {folder / 'pulled'}" in printed["pull"]
    assert files_in(folder / "pulled").keys() == {*TRAVELS, "README.md"}


def test_the_command_push_asks_for_the_licence(hub, made):
    result = CliRunner().invoke(app, ["heads", "push", str(made), NAME])
    assert result.exit_code == 2
    assert "--licence" in result.output
    assert not hub.commits


def test_the_commands_tell_errors_in_one_line(hub, tmp_path):
    result = CliRunner().invoke(app, ["heads", "pull", "tester/nothing", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "Error: tester/nothing must be a folder or heads on the hub, got neither" in result.output
    assert "Traceback" not in result.output
