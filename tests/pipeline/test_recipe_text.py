"""The YAML of a recipe: nothing is dropped, and numbers are read as they are written."""

import pytest
import yaml

from caftune.errors import CaftuneError
from caftune.pipeline.recipe import load_recipe

MINIMAL = "output: runs/x\nmodel: {name: some/model}\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text=MINIMAL, overrides=()):
        (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return write


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("loss: {weight: 1}\nseed: 4\nloss: {decay: 0.5}\n", "loss", (5, 3)),
        ("trainer:\n  learning_rate: 5e-3\n  max_steps: 2\n  learning_rate: 2e-5\n", "learning_rate", (6, 4)),
        ("model: {name: other}\n", "model", (3, 2)),
        ("seed: 1\nseed: 1\n", "seed", (4, 3)),
        ("trainer:\n  model_init_kwargs:\n    dtype: float32\n    dtype: bfloat16\n", "dtype", (6, 5)),
        ("'loss': {weight: 1}\nloss: {weight: 2}\n", "loss", (4, 3)),
        ("&l loss: {weight: 1}\n*l : {weight: 2}\n", "loss", (4, 3)),
        ("pretrain: &p {max_steps: 1}\ntrainer:\n  <<: *p\n  <<: *p\n", "<<", (6, 5)),
        ("trainer: {lr_scheduler_kwargs: [{a: 1, a: 2}]}\n", "a", (3, 3)),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(recipe, text, key, lines):
    with pytest.raises(CaftuneError) as refused:
        recipe(MINIMAL + text)
    assert f"recipe.yaml, line {lines[0]}: {key} must be given once, got it twice (first in line {lines[1]})" in str(
        refused.value
    )


def test_a_key_given_twice_in_json_is_refused(recipe):
    with pytest.raises(CaftuneError, match=r"line 2: output must be given once, got it twice \(first in line 1\)"):
        recipe('{"output": "x",\n "output": "y", "model": {"name": "a"}}')


def test_one_key_in_two_sections_and_one_beside_a_merged_one_are_no_repetition(recipe):
    text = "pretrain: &p {max_steps: 1, learning_rate: 1e-3}\ntrainer: {<<: *p, max_steps: 2}\nadapt: *p\n"
    found = recipe(MINIMAL + text)
    assert found.trainer == {"max_steps": 2, "learning_rate": 1e-3}
    assert found.pretrain == found.adapt == {"max_steps": 1, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("overrides", "lost"),
    [
        (["loss.weight=1", "seed=3", "loss.weight=2"], "loss.weight=1"),
        (["loss.decay=0.5", "loss={weight: 2}"], "loss.decay=0.5"),
        (["trainer.model_init_kwargs.dtype=float32", "trainer={}"], "trainer.model_init_kwargs.dtype=float32"),
    ],
)
def test_an_override_that_a_later_one_would_drop_is_refused(recipe, overrides, lost):
    with pytest.raises(CaftuneError) as refused:
        recipe(overrides=overrides)
    assert str(refused.value) == f"{overrides[-1]!r} overrides {lost!r}, which is given before it. Remove one."


def test_an_override_of_a_part_after_its_section_changes_the_part_alone(recipe):
    loss = recipe(overrides=["loss={weight: 2}", "loss.decay=0.5", "loss.target_share=0.5"]).loss
    assert (loss.weight, loss.decay, loss.target_share) == (2, 0.5, 0.5)


def test_a_key_given_twice_within_an_override_is_refused(recipe):
    with pytest.raises(CaftuneError, match="weight must be given once, got it twice"):
        recipe(overrides=["loss={weight: 1, weight: 2}"])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("-2E-3", -2e-3),
        ("1.5e3", 1500.0),
        (".5e-3", 5e-4),
        ("'1e-5'", 1e-5),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o10", 8),
        ("0.5", 0.5),
        ("0", 0),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'010'", "010"),
        ("1e", "1e"),
        ("e5", "e5"),
    ],
)
def test_a_value_is_what_a_reader_takes_it_for(recipe, written, value):
    found = [recipe(MINIMAL + f"trainer: {{x: {written}}}"), recipe(overrides=[f"trainer.x={written}"])]
    assert [(one.trainer["x"], type(one.trainer["x"])) for one in found] == [(value, type(value))] * 2


@pytest.mark.parametrize("written", ["010", "08", "-07", "0_1"])
def test_a_number_with_a_leading_zero_is_refused(recipe, written):
    for text, overrides in ((MINIMAL + f"seed: {written}\n", ()), (MINIMAL, [f"seed={written}"])):
        with pytest.raises(CaftuneError, match=f"{written} must be written without its leading zero"):
            recipe(text, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping of sections .*, got nothing"),
        ("# nothing\n", "got nothing"),
        ("- a\n", "got a list"),
        (f"{MINIMAL}---\n{MINIMAL}", "line 3: must be one YAML document, got a second one"),
        (f"{MINIMAL}trainer:\n\tlearning_rate: 1\n", r"line 4: is not valid YAML \(found character '\\t'"),
        (f"{MINIMAL}trainer: &a {{x: *a}}\n", "line 3: a value must not contain itself"),
        (f"{MINIMAL}trainer: {'[' * 3000}", "must be nested less deeply"),
        (f"{MINIMAL}trainer:\n", r"trainer must be a section .*, got None. Remove it, or give it keys"),
        (f"{MINIMAL}loss:\n", r"loss must be a section \(with weight, .*, got None. Remove it"),
        (f"{MINIMAL}loss: {{weight: null}}\n", "loss.weight must be a valid number, got None"),
        (f"{MINIMAL}'loss ': {{weight: 1}}\n", r"'loss ' is not a key of a recipe. Did you mean loss\?"),
        (f"{MINIMAL}on: 1\n", "A key of the recipe must be text, got True. Put it in quotes"),
        (f"{MINIMAL}trainer: {{on: 1}}\n", "A key of trainer must be text, got True. Put it in quotes"),
        ("output: x\nmodel: {name: no}\n", "model.name must be a valid string, got False. Put it in quotes"),
        ("output: x\nmodel: {name: a, revision: 1234567}\n", "got 1234567. Put it in quotes"),
    ],
)
def test_a_slip_is_named(recipe, text, message):
    with pytest.raises(CaftuneError, match=message):
        recipe(text)


@pytest.mark.parametrize("text", [MINIMAL.encode("utf-16"), MINIMAL.encode() + b"# caf\xe9\n"])
def test_a_recipe_in_another_encoding_is_named(recipe, text):
    with pytest.raises(CaftuneError, match=r"recipe.yaml must be text in UTF-8, got .*Convert it"):
        recipe(text)


def test_a_byte_order_mark_of_utf_8_a_document_mark_and_windows_line_ends_are_taken(recipe):
    text = f"---\n{MINIMAL}loss : {{weight: 2}}\n".replace("\n", "\r\n")
    assert recipe(text.encode("utf-8-sig")).loss.weight == 2


@pytest.mark.parametrize("value", [1e-5, 1.5, 10, "1e-5 ", "010", "1:30", "2026-01-01", "no", None, True])
def test_what_is_written_into_a_run_folder_is_read_as_it_was(recipe, value):
    assert recipe(yaml.safe_dump({**yaml.safe_load(MINIMAL), "trainer": {"x": value}})).trainer == {"x": value}
