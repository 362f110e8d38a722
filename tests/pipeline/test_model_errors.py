"""A slip in a model's name, its files, the hub or the disk is one sentence in every command, and from Python what it was."""

import errno
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hub import Hub, Refused, files_in, serve_hub
from opened import load_config, load_model, load_tokenizer
from safetensors import SafetensorError
from trainers import config
from typer.testing import CliRunner

from caftune import CAFTTrainer
from caftune.checkpoints.opening import opening
from caftune.cli import app
from caftune.demo.run import BASE
from caftune.errors import CaftuneError, system_error
from caftune.pipeline.recipe import trainer_config
from caftune.pipeline.schema import Recipe

ROWS = [{"prompt": f"Name: x{i}\n", "completion": "CC"} for i in range(12)]
COMMANDS = {
    "label": ["label", "RECIPE"],
    "pretrain-heads": ["pretrain-heads", "RECIPE", "heads.text=rows.jsonl"],
    "adapt-heads": ["adapt-heads", "RECIPE", "adapt={}", "heads.path=HEADS"],
    "train": ["train", "RECIPE", "loss.weight=0"],
    "eval": ["eval", "RECIPE", "eval.model=base"],
    "compare": ["compare", "RECIPE", "compare.arms=[ntp,no_pretraining]", "compare.seeds=1"],
    "preview": ["preview", "RECIPE"],
    "plan": ["plan", "RECIPE"],
    "heads measure": ["heads", "measure", "RECIPE", "heads.path=HEADS", "heads.text=rows.jsonl"],
    "heads info": ["heads", "info", "HEADS", "--measure", "rows.jsonl", "--model", "MODEL"],
    "generate": ["generate", "MODEL", "HEADS", "Name:"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def run(folder, command, model, heads, *more):
    """The command's exit code and what it wrote to stderr, on a recipe of that model."""
    values = {
        "output": str(folder / "out"),
        "model": {"name": model},
        "labels": {"prompts": "rows.jsonl", "max_new_tokens": 4},
        "heads": {"count": 3},
        "pretrain": {"use_cpu": True, "max_steps": 1},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "trainer": {"use_cpu": True, "max_steps": 1},
        "eval": {"tasks": ["exact_match"], "data": {"exact_match": "rows.jsonl"}, "max_new_tokens": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    names = {"RECIPE": str(folder / "recipe.yaml"), "HEADS": heads, "MODEL": model}
    words = [word.replace("HEADS", heads) if "=" in word else names.get(word, word) for word in COMMANDS[command]]
    ran = CliRunner().invoke(app, [*words, *more])
    return ran, ran.stderr


def is_one_sentence(ran):
    errors = [line for line in ran.stderr.splitlines() if line.startswith("Error: ")]
    said = [
        line for line in ran.stderr.splitlines() if line.strip() and "it/s]" not in line and "examples/s]" not in line
    ]
    return ran.exit_code == 2 and isinstance(ran.exception, SystemExit) and len(errors) == 1 and len(said) <= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_folder_that_is_not_there(folder, heads, command):
    ran, said = run(folder, command, "./models/bse", heads)
    assert is_one_sentence(ran), said
    assert "./models/bse, which does not exist" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_model_that_is_neither_a_folder_nor_on_this_machine(folder, heads, command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ran, said = run(folder, command, "models/bse", heads)
    assert is_one_sentence(ran), said
    assert "models/bse must be a folder or a model in the local cache, got neither; HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"preview", "plan", "compare"}))
def test_every_command_that_loads_weights_names_a_file_that_is_cut_off(folder, heads, command):
    shutil.copytree(BASE, folder / "base")
    whole = (BASE / "model.safetensors").read_bytes()
    (folder / "base/model.safetensors").write_bytes(whole[:-5000])
    ran, said = run(folder, command, str(folder / "base"), heads)
    assert is_one_sentence(ran), said
    assert "base/model.safetensors is damaged or cut off" in said


@pytest.mark.parametrize(
    ("command", "left", "is_refused"),
    [
        ("train", {"quantization_config": {"quant_method": "gguf"}}, True),
        ("label", {"quantization_config": {}}, True),
        ("plan", {"quantization_config": None, "_pre_quantization_dtype": "bfloat16"}, False),
    ],
)
def test_what_a_conversion_from_gguf_left_in_a_configuration_is_refused_where_it_matters(
    folder, heads, command, left, is_refused
):
    """transformers loads such a base, and fails to save what was trained from it."""
    shutil.copytree(BASE, folder / "base")
    file = folder / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | left))
    ran, said = run(folder, command, str(folder / "base"), heads)
    assert is_one_sentence(ran) == is_refused, said
    assert ("base must have no quantization_config of GGUF" in said) == is_refused


def broken(folder, **files):
    """A copy of the base with files removed (None) or with other contents."""
    shutil.copytree(BASE, folder / "base")
    for name, content in files.items():
        path = folder / "base" / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    return Recipe.model_validate({"output": "out", "model": {"name": str(folder / "base")}})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
INDEX = b'{"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("load", "files", "message"),
    [
        (
            load_config,
            {"config__json": None},
            "model.name must be a folder with a config.json or a hub id, got .*/base, which has no",
        ),
        (load_config, {"config__json": b'{"a": '}, "base/config.json is damaged or cut off .Expecting value"),
        (load_config, {"config__json": b"[]"}, "base/config.json is damaged .*it must hold a JSON object, got list"),
        (load_config, {"config__json": b"{}"}, "config.json of .*/base must name a model_type"),
        (
            load_config,
            {"config__json": b'{"model_type": "foo"}'},
            "transformers .* knows, got .*/base of type foo. Update",
        ),
        (
            load_config,
            {"config__json": b'{"model_type": "foo", "auto_map": {"AutoConfig": "x.Y"}}'},
            "runs only with model.trust_remote_code=true",
        ),
        (
            load_tokenizer,
            {"tokenizer__json": None, "tokenizer_config__json": None},
            "must hold a tokenizer .*, got none",
        ),
        (load_tokenizer, {"tokenizer__json": b"{"}, "base/tokenizer.json is damaged or cut off"),
        (load_tokenizer, {"tokenizer_config__json": b"\xff\xfe"}, "base/tokenizer_config.json is damaged or cut off"),
        (load_model, {"model__safetensors": None}, "must hold the weights of a model .*, got none"),
        (load_model, {"model__safetensors": b""}, "base/model.safetensors is damaged or cut off"),
        (load_model, {"model__safetensors": POINTER}, r"base/model.safetensors is damaged or cut off .*git lfs pull"),
        (
            load_model,
            {"model__safetensors": None, "model__safetensors__index__json": INDEX},
            "must hold model-00001-of-00002",
        ),
        (load_model, {"model__safetensors": None, "model__safetensors__index__json": b"{"}, "index.json is damaged"),
        (load_model, {"model__safetensors": None, "pytorch_model__bin": b"PK\x03\x04cut"}, "bin is damaged or cut off"),
        (load_model, {"config__json": b'{"model_type": "clip_vision_model"}'}, "must be a causal language model, got"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(folder, load, files, message):
    recipe = broken(folder, **files)
    with pytest.raises(CaftuneError, match=message) as refused:
        load(recipe)
    assert "\n" not in str(refused.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_CACHE": tmp_path / "cache", "HF_TOKEN_PATH": tmp_path / "no-token"}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(value))
    with serve_hub(tmp_path / "hub") as served:
        served.record("owner/base", "first", files_in(BASE))
        yield served


def test_without_a_connection_a_model_of_the_hub_is_named_and_one_that_is_here_is_opened(hub, monkeypatch):
    load_tokenizer(of_hub("owner/base"))
    monkeypatch.setattr(Hub, "folder", unreachable)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    load_tokenizer(of_hub("owner/base"))
    with pytest.raises(
        CaftuneError,
        match=r"owner/bse must be a folder or a model in the local cache, got neither; the hub cannot be reached",
    ):
        load_tokenizer(of_hub("owner/bse"))


def unreachable(*_):
    raise Refused(503, "Service unavailable", "ServiceUnavailable")


def of_hub(name, revision=None):
    return Recipe.model_validate({"output": "out", "model": {"name": name, "revision": revision}})


def test_a_model_that_the_hub_has_not_and_a_revision_that_it_has_not_are_distinguished(hub):
    load_tokenizer(of_hub("owner/base"))
    with pytest.raises(CaftuneError, match=r"got owner/bse: there is no such folder, and no such model on the hub"):
        load_tokenizer(of_hub("owner/bse"))
    with pytest.raises(CaftuneError, match=r"owner/base on the hub has no revision v2\. Name one of its branches"):
        load_tokenizer(of_hub("owner/base", "v2"))


def test_a_gated_model_is_named_with_where_its_terms_are(hub, monkeypatch):
    def gated(*_):
        raise Refused(403, "Access to model owner/base is restricted", "GatedRepo")

    monkeypatch.setattr(Hub, "folder", gated)
    with pytest.raises(
        CaftuneError, match=r"owner/base is gated on the hub. Accept its terms on https://huggingface.co/owner/base"
    ):
        load_tokenizer(of_hub("owner/base"))


def test_a_model_on_the_hub_without_weights_is_named(hub):
    hub.record(
        "owner/empty", "first", {name: text for name, text in files_in(BASE).items() if "safetensors" not in name}
    )
    with pytest.raises(CaftuneError, match=r"got owner/empty \(.*model.safetensors"):
        load_model(of_hub("owner/empty"))


def test_other_errors_are_not_taken_for_a_slip_in_the_name():
    for error in (
        ValueError("not enough values to unpack"),
        RuntimeError("x"),
        OSError(errno.EIO, "Input/output error"),
    ):
        with pytest.raises(type(error), match=str(error).replace("[", "\\[")), opening(str(BASE)):
            raise error


def test_from_python_an_error_is_what_transformers_raises(tmp_path, rows):
    with pytest.raises(OSError, match="no/such/folder") as raised:
        CAFTTrainer("no/such/folder", config(tmp_path, aux_weight=0.0), train_dataset=rows)
    assert not isinstance(raised.value, CaftuneError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "RECIPE", "loss.weight=0", "data.train=folder"],
            "folder must be a file or a hub id, got a folder. Name a file in it",
        ),
        (["train", "RECIPE", "heads.path=nowhere/at/all"], "nowhere/at/all must be a folder with heads.json"),
        (
            ["train", "RECIPE", "loss.weight=0", "output=rows.jsonl"],
            "rows.jsonl.* cannot be used .(Not a directory|File exists)",
        ),
        (
            ["train", "RECIPE", "loss.weight=0", "trainer.chat_template_path=none.jinja"],
            "none.jinja, which does not exist",
        ),
        (
            ["train", "RECIPE", "loss.weight=0", "trainer.chat_template_path=folder"],
            "chat_template_path .* folder, which has no tokenizer",
        ),
        (
            ["train", "RECIPE", "loss.weight=0", "trainer.chat_template_path=no/such"],
            "chat_template_path: no/such must be a folder or a model in the local cache",
        ),
        (
            ["train", "RECIPE", "loss.weight=0", "trainer.chat_template_path=./no"],
            "chat_template_path .*, which does not exist",
        ),
        (
            ["plan", "RECIPE", "data.max_length=.inf"],
            "data.max_length must be a whole number above 1, auto or null, got inf",
        ),
        (["train", "RECIPE", "loss.weight=0", "trainer.optim_args=foo"], "trainer.optim_args must be key=value"),
        (
            ["label", "RECIPE", "labels.prompts=folder"],
            "folder must be a file or a hub id, got a folder. Name a file in it",
        ),
        (["eval", "RECIPE", "eval.model=./nowhere"], "eval.model must be a folder with a config.json or a hub id"),
        (["export", "RECIPE"], "holds no checkpoint"),
        (["heads", "info", "nowhere/at/all"], "nowhere/at/all must be a folder"),
        (["heads", "push", "nowhere/at/all", "me/heads", "--licence", "mit"], "nowhere/at/all must be a folder"),
        (["heads", "pull", "nowhere/at/all", "new"], "nowhere/at/all must be a folder"),
        (["report", "nowhere"], "nowhere"),
        (["plan", "nowhere.yaml"], "nowhere.yaml must be a recipe file"),
        (["plan", "folder"], "folder must be a recipe file"),
    ],
)
def test_other_slips_are_one_sentence(folder, heads, words, message):
    (folder / "folder").mkdir()
    COMMANDS["other"] = words
    try:
        ran, said = run(folder, "other", str(BASE), heads)
    finally:
        del COMMANDS["other"]
    assert is_one_sentence(ran), said + repr(ran.exception)
    assert re.search(message, said), said


def test_the_base_of_heads_that_was_a_folder_elsewhere_must_be_named(folder, heads):
    """heads.json keeps the folder's last name only."""
    COMMANDS["unnamed"] = ["heads", "info", "HEADS", "--measure", "rows.jsonl"]
    try:
        ran, said = run(folder, "unnamed", str(BASE), heads)
    finally:
        del COMMANDS["unnamed"]
    assert is_one_sentence(ran), said
    assert "--model must be given, because the base of these heads, base, was a folder" in said


@pytest.mark.parametrize("value", ["foo", "a=1,b", "a=b=c", 3])
def test_arguments_of_the_optimizer_that_are_no_pairs_are_refused(value):
    recipe = Recipe.model_validate({"output": "x", "model": {"name": "y"}, "trainer": {"optim_args": value}})
    with pytest.raises(CaftuneError, match=r"trainer.optim_args must be key=value"):
        trainer_config(recipe, "trainer", output_dir="x", aux_weight=0.0)


# The operating system's errors


@contextmanager
def files_of_at_most(size):
    """The nearest to a full disk that needs no rights: larger files cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100_000, 4_000_000])
def test_a_full_disk_while_a_checkpoint_is_written_is_one_sentence(folder, heads, size):
    """At 100 kB the weights do not fit (safetensors), at 4 MB the optimizer's state does not (torch)."""
    with files_of_at_most(size):
        ran, said = run(folder, "train", str(BASE), heads)
    assert ran.exit_code == 2, repr(ran.exception)
    assert "The disk is full" in said.splitlines()[-1]


def test_the_systems_errors_are_shown_with_path_and_remedy(tmp_path):
    def sentence(number, path=None):
        return system_error(OSError(number, os.strerror(number), path))

    assert "The disk is full (No space left on device). Free some space" in sentence(errno.ENOSPC)
    assert "The disk of out/x is full (Disk quota exceeded)" in sentence(errno.EDQUOT, "out/x")
    assert "out/x must be accessible, got: Permission denied. Change its" in sentence(errno.EACCES, "out/x")
    assert "out/x must be accessible, got: Read-only file system" in sentence(errno.EROFS, "out/x")
    assert "rows.jsonl cannot be used (Not a directory). Name another path" in sentence(errno.ENOTDIR, "rows.jsonl")
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "The disk is full" in system_error(rust)
    for other in (
        OSError(errno.ENOENT, "No such file", "x"),
        OSError(errno.EACCES, "Permission denied"),
        SafetensorError("Error while deserializing header: header too small"),
        RuntimeError("The size of tensor a must match"),
        ValueError("os error 28"),
    ):
        assert system_error(other) is None


def test_an_error_of_a_library_keeps_its_traceback_on_the_command_line(folder, heads, monkeypatch):

    def fails(*_, **__):
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr("caftune.pipeline.stage_trainer.task_rows", fails)
    ran, _ = run(folder, "train", str(BASE), heads)
    assert isinstance(ran.exception, ValueError)
    assert Path(ran.exception.__traceback__.tb_frame.f_code.co_filename).exists()
