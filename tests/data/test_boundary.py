"""What a model is given is what it was trained on, whatever white space stands between prompt and answer."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from opened import load_tokenizer, stage_two_config, task_rows
from tokenizer_kinds import BUILT, REAL, built, save_base, tokenizer_of, with_calls
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from caftune.data.boundary import encode_all, plain_text, split_prompt, tokenize_pairs
from caftune.data.forms import load_rows
from caftune.data.prompts import Conversation, conversations, decoded
from caftune.errors import CaftuneError
from caftune.evals import code
from caftune.evals.tasks import TASKS
from caftune.generation.backends import Answer
from caftune.pipeline import evaluate as evaluation
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.schema import Recipe
from caftune.training.prepare import pair_tokens

# At the end of the prompt, and at the beginning of the completion.
BOUNDARIES = {
    "none": ("", ""),
    "a space in the completion": ("", " "),
    "a space": (" ", ""),
    "a space in both": (" ", " "),
    "two spaces": ("  ", ""),
    "a line break": ("\n", ""),
    "a line break in the completion": ("", "\n"),
    "a blank line": ("\n\n", ""),
    "a tab": ("\t", ""),
    "line break and spaces": ("\n  ", "  "),
    "line breaks on both sides": ("\n", "\n"),
    "a no-break space": ("\u00a0", ""),
    "Windows": ("\r\n", ""),
}
SEPARATORS = ("", " ", "\n", "\n\n", " ->", "\t")
# Columns of each task's own, a prompt, and a right answer.
TASK_ROWS = {
    "exact_match": ({}, "The star of the day:", "sun"),
    "gsm8k": ({"question": "4+4?", "answer": "It is 8.\n#### 8"}, "Question: 4+4?\nAnswer:", "It is 8.\n#### 8"),
    "math500": ({"problem": "$4+4$?", "answer": "8"}, "$4+4$?", "It is $\\boxed{8}$."),
    "molecules": ({"smiles": "CCO"}, "Alcohol:", "CCO"),
    "proteins": ({"functions": ["toxin"], "sequence": "GIGAVLKVLTTG"}, "A toxin", "GIGAVLKVLTTG"),
    "mts_dialog": ({"section_header": "CC", "section_text": "A cough.", "dialogue": "Doctor: So?"}, "CC?", "A cough."),
    "mimic_bhc": ({"input": "A cough.", "target": "She was well."}, "A cough.\nCourse:", "She was well."),
    "mbpp": (
        {"task_id": 1, "text": "Twice.", "test_list": ["assert twice(2) == 4"]},
        '"""Twice, as twice(2)."""',
        "def twice(x):\n    return 2 * x",
    ),
    "humaneval": (
        {"task_id": "1", "entry_point": "twice", "test": "def check(f):\n    assert f(2) == 4\n"},
        'def twice(x):\n    """Twice."""',
        "    return 2 * x",
    ),
}
NEEDS = {
    "gsm8k": "math_verify",
    "math500": "math_verify",
    "molecules": "rdkit",
    "proteins": "Bio",
    "mts_dialog": "rouge_score",
}
NEEDS["mimic_bhc"] = NEEDS["mts_dialog"]


@pytest.fixture
def kind_of(request):
    """A tokenizer by its name, or a skipped test."""
    return lambda kind: tokenizer_of(kind, lambda: request.getfixturevalue("shared"))


def tokenize_pair(prompt, completion, tokenizer):
    (row,) = tokenize_pairs([prompt], [completion], tokenizer)
    return row


def replay(rows):
    """A backend that knows rows by heart: it continues a prompt as the row that begins with it, and answers nothing else."""

    def answer(prompts, seeds):
        for index, prompt in enumerate(prompts):
            count = len(prompt.ids)
            ends = [row[count:] for row in rows if row[:count] == prompt.ids]
            yield index, Answer(ends[0] if ends else [prompt.ids[-1]], "stop" if ends else "length")

    return answer


def recipe_of(folder, name, rows, *, separator="", task="exact_match"):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = [{**row, "prompt": row["prompt"] + separator} for row in rows]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))
    section = {
        "tasks": [task],
        "data": {task: str(folder / "eval.jsonl")},
        "columns": {"prompt": "prompt"},
        "chat": False,
    }
    section |= {"model": "base", "max_new_tokens": 60}
    data = {"train": str(folder / "train.jsonl"), "separator": separator, "chat": False}
    values = {"output": str(folder / "run"), "model": {"name": str(name)}, "loss": {"weight": 0}, "data": data}
    return Recipe.model_validate({**values, "eval": section})


def wrong_after_learning(recipe, folder, tokenizer, monkeypatch):
    """Prompts that a model answers wrongly which has learnt the training rows of the recipe, token for token."""
    monkeypatch.setattr(BaseModel, "tokenizer", lambda _: tokenizer)
    trained = task_rows(recipe, "train", tokenizer, stage_two_config(recipe, folder / "train")).rows
    labelled = [[label for label in row if label != -100] for row in trained["labels"]]
    assert all(ids[-len(answer) :] == answer for ids, answer in zip(trained["input_ids"], labelled, strict=True))
    monkeypatch.setattr(evaluation, "answer_backend", lambda *_, **__: replay(trained["input_ids"]))
    monkeypatch.setattr("caftune.pipeline.base_model.model_fingerprint", lambda *_: "any")
    (result,) = evaluation.evaluate_model(recipe)
    assert result.examples == len(trained)
    measure = TASKS[result.task].primary
    lines = Path(recipe.output, "eval", "base", f"{result.task}.jsonl").read_text().splitlines()
    return [line["prompt"] for line in map(json.loads, lines) if line["scores"][measure] < 1 - 1e-9]


@pytest.mark.parametrize("kind", [*BUILT, *REAL])
def test_rows_learnt_by_heart_are_right_whatever_white_space_stands_at_the_boundary(
    kind, kind_of, tmp_path, monkeypatch
):
    tokenizer = kind_of(kind)
    save_base(tokenizer, tmp_path / "base")
    separators = SEPARATORS[:3] if kind in REAL else SEPARATORS  # with a large vocabulary each takes seconds
    pairs = [
        ("Ask for the weather:", "sun"),
        ("New Yo", "rk"),
        ("7 + 8 =", "15"),
        ("Say <x>", "(y)"),
        ("What?", "a  b\nc"),
    ]
    rows = [
        {"prompt": f"{number}. {prompt}{before}", "completion": after + completion}
        for number, (before, after) in enumerate(BOUNDARIES.values())
        for prompt, completion in pairs
    ]
    for number, separator in enumerate(separators):
        folder = tmp_path / str(number)
        folder.mkdir()
        recipe = recipe_of(folder, tmp_path / "base", rows, separator=separator)
        assert wrong_after_learning(recipe, folder, tokenizer, monkeypatch) == []


@pytest.mark.parametrize("task", TASK_ROWS)
@pytest.mark.parametrize("kind", ["llama-2", "byte-level"])
def test_so_are_they_in_every_task_with_free_prompts(kind, task, kind_of, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS.get(task, "scipy"))
    monkeypatch.setattr(code, "_check_permission", lambda: None)
    if task in ("mbpp", "humaneval"):  # what is judged is the program; the sandbox has tests of its own
        monkeypatch.setattr(code, "passes", runs)
    tokenizer = kind_of(kind)
    save_base(tokenizer, tmp_path / "base")
    columns, prompt, answer = TASK_ROWS[task]
    rows = []
    for number, (before, after) in enumerate(BOUNDARIES.values()):
        if task == "humaneval":  # the head of a function and its body are one text
            before, after = (before, "") if before in ("\n", "\n\n", "\n  ") else ("", "\n")
        if task == "mbpp" and " " in after:  # an indented program is none
            after = ""
        own = answer.removeprefix("  ") if before.endswith("  ") else answer
        names = {"task_id": str(number)} if "task_id" in columns else {}
        rows.append({**columns, **names, "prompt": f"#{number}\n{prompt}{before}", "completion": after + own})
    recipe = recipe_of(tmp_path, tmp_path / "base", rows, task=task)
    assert wrong_after_learning(recipe, tmp_path, tokenizer, monkeypatch) == []


def runs(solution, tests):
    space = {}
    try:
        exec(solution, space)
        exec(tests, space)
    except (SyntaxError, AssertionError, NameError):
        return False
    return True


def test_a_model_that_is_really_trained_is_right(tmp_path):
    tokenizer = built("llama-2")
    config = save_base(tokenizer, tmp_path / "base")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [
        {"prompt": f"Ask for the {w}: ", "completion": c}
        for w, c in (("day", "sun"), ("city", "York"), ("code", "def"))
    ]
    recipe = recipe_of(tmp_path, tmp_path / "base", rows)
    trainer = {
        "max_steps": 60,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "gradient_checkpointing": False,
    }
    trainer |= {"lr_scheduler_type": "constant", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    section = recipe.eval.model_copy(update={"model": None, "max_new_tokens": 8})
    recipe = recipe.model_copy(update={"trainer": trainer, "eval": section})
    finetune_model(recipe)
    (result,) = evaluation.evaluate_model(recipe)
    assert result.measures["exact_match"] == [1.0]


@pytest.mark.parametrize("kind", [*BUILT, *REAL])
def test_a_prompt_has_the_first_tokens_of_its_row_and_the_rest_reads_as_the_answer(kind, kind_of):
    tokenizer = with_calls(kind_of(kind))
    prompts = [
        "Ask:",
        "Ask: ",
        "Ask:  ",
        "Ask:\n",
        "Ask:\n\n",
        "Ask:\t",
        "Ask: \n ",
        "New Yo",
        "is?\n",
        "f(x):\n    ",
        "",
    ]
    prompts += ["Ask: <call>", "It is " * 40]
    for prompt in prompts:
        for completion in ("sun", " sun", "\nsun", "    return x", "\tx", "rk", "42", "(y)", "\n"):
            before, row = split_prompt(prompt, tokenizer), tokenize_pair(prompt, completion, tokenizer)
            assert row.ids[: row.prompt] == before.ids
            assert before.text + before.gap == prompt
            assert not before.gap.strip()
            # Of the first space behind an added token, and of a text, that tokenizer makes nothing.
            if kind != "metaspace-always" or prompt not in ("", "Ask: <call>"):
                assert decoded(row.ids[: row.prompt], row.ids[row.prompt :], tokenizer) == (
                    before.text,
                    before.gap + completion,
                )


@pytest.mark.parametrize("kind", ["llama-2", "byte-level", "byte-level-newlines"])
def test_where_nothing_is_joined_a_row_has_the_tokens_of_its_text(kind, kind_of):
    tokenizer = kind_of(kind)
    row = tokenize_pair("Ask:", "\tsun", tokenizer)
    assert not row.apart
    assert row.ids == encode_all(["Ask:\tsun</s>"], tokenizer)[0]


def test_line_breaks_stay_with_the_mark_that_a_tokenizer_joins_them_to(kind_of):
    assert split_prompt("What is it?\n", kind_of("byte-level-newlines")).text == "What is it?\n"
    assert (
        split_prompt("What is it?\n", kind_of("byte-level")).gap == "\n"
    )  # there a line break is joined to spaces behind it


def test_a_line_break_is_in_the_gap_however_many_spaces_are_behind_it(kind_of):
    for count in (1, 63, 64, 65, 200):
        before = split_prompt("What is it?\n" + " " * count, kind_of("byte-level"))
        assert (before.text, before.gap) == ("What is it?", "\n" + " " * count)


def test_rows_have_the_same_tokens_many_at_a_time_as_alone(kind_of):
    tokenizer = kind_of("byte-level")
    prompts = ["Ask:", "", "Ask: \n ", "New Yo", "<s>", "Ask: ", "What?\n"]
    completions = ["sun", "sun", " sun", "rk", "a</s>", "New York", "\nsun"]
    many = list(tokenize_pairs(prompts, completions, tokenizer))
    assert many == [tokenize_pair(*pair, tokenizer) for pair in zip(prompts, completions, strict=True)]
    assert [pair.apart for pair in many] == [False, False, False, True, False, False, False]
    said = [tokenizer.decode(pair.ids[pair.prompt :]) for pair in many]
    assert said == ["sun</s>", "sun</s>", " \n  sun</s>", "rk</s>", "a</s>", " New York</s>", "\n\nsun</s>"]


def test_an_empty_prompt_is_bos_whether_or_not_the_tokenizer_adds_it_and_else_eos(kind_of):
    for kind in ("byte-level", "llama-2"):
        tokenizer = kind_of(kind)
        assert split_prompt("", tokenizer).ids == [tokenizer.bos_token_id]
        row = tokenize_pair("", "sun", tokenizer)
        assert (row.ids[0], row.prompt, row.apart) == (tokenizer.bos_token_id, 1, False)
        assert row.ids.count(tokenizer.bos_token_id) == 1
    tokenizer = kind_of("byte-level")
    tokenizer.bos_token = None
    assert split_prompt("", tokenizer).ids == [tokenizer.eos_token_id]
    assert tokenize_pair("", "sun", tokenizer).ids[0] == tokenizer.eos_token_id


def test_a_token_that_is_added_later_is_known_from_then_on(kind_of):
    tokenizer = kind_of("llama-2")
    plain_text(tokenizer("sun")["input_ids"], tokenizer)
    with_calls(tokenizer)
    assert plain_text(tokenizer("<call> sun<call>sun", add_special_tokens=False)["input_ids"], tokenizer) == (
        "<call> sun<call>sun"
    )


@pytest.mark.parametrize("bad", [0, 3, 1001])
def test_a_row_that_has_no_tokens_apart_is_named_by_its_number_in_the_data(bad):
    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "sun": 2, "sunflower": 3, "shine": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    said = [" shine"] * 1003
    said[bad] = "flower"
    rows = Dataset.from_dict({"prompt": ["sun"] * len(said), "completion": said})
    with pytest.raises(
        CaftuneError, match=rf"^Row {bad} \(from 0\) of the train data: The prompt and its completion must be"
    ):
        pair_tokens(rows, tokenizer, "train")
    assert len(pair_tokens(rows.select([row for row in range(len(rows)) if row != bad]), tokenizer, "train")) == 1002


def test_a_row_that_is_tokenized_apart_is_reported_once_with_its_number(tmp_path, caplog):
    save_base(built("byte-level"), tmp_path / "base")
    pairs = [("Ask:", " sun"), ("New Yo", "rk"), ("New Yo", "rk")]
    recipe = recipe_of(tmp_path, tmp_path / "base", [{"prompt": p, "completion": c} for p, c in pairs])
    task_rows(recipe, "train", load_tokenizer(recipe), stage_two_config(recipe, tmp_path / "train"))
    (message,) = [record.getMessage() for record in caplog.records if "tokenized separately" in record.getMessage()]
    assert "2 of 3 train rows (the first is row 1, from 0)" in message


@pytest.mark.parametrize("options", [{"shuffle_dataset": True}, {"packing": True, "packing_strategy": "bfd_split"}])
def test_what_the_trainer_does_with_rows_changes_nothing(options, tmp_path):
    save_base(built("byte-level"), tmp_path / "base")
    rows = [{"prompt": f"{word}: ", "completion": "sun"} for word in ("Ask", "New Yo", "def")]
    recipe = recipe_of(tmp_path, tmp_path / "base", rows)
    plain, other = (
        task_rows(each, "train", load_tokenizer(each), stage_two_config(each, tmp_path / "train")).rows
        for each in (recipe, recipe.model_copy(update={"trainer": options}))
    )
    assert plain.to_list() == other.to_list()


def test_the_template_of_another_model_leaves_the_white_space_where_it_is_generated(tmp_path):
    save_base(built("byte-level"), tmp_path / "base")
    chatty = built("byte-level")
    chatty.chat_template = "{{ messages[0].content }}"
    chatty.save_pretrained(tmp_path / "chatty")
    recipe = recipe_of(tmp_path, tmp_path / "base", [{"prompt": "Ask: ", "completion": "sun"}])
    recipe = recipe.model_copy(update={"trainer": {"chat_template_path": str(tmp_path / "chatty")}})
    rows = task_rows(recipe, "train", load_tokenizer(recipe), stage_two_config(recipe, tmp_path / "train")).rows
    tokenizer = load_tokenizer(recipe)
    assert tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])[:3] == tokenizer.tokenize("Ask: sun")
    assert rows[0]["labels"] == [-100, -100, *rows[0]["input_ids"][2:]]


# One BOS


@pytest.mark.parametrize("kind", ["llama-2", "metaspace-never", "byte-level-newlines", "closing"])
@pytest.mark.parametrize("form", ["pair", "text"])
def test_rendered_text_is_trained_on_with_one_bos_and_so_is_its_prompt(kind, form, kind_of, tmp_path, caplog, capsys):
    save_base(kind_of(kind), tmp_path / "base")
    texts = ["Ask:", "<s>Ask:", "<s>Ask: "]
    pairs = [{"prompt": text, "completion": "sun"} for text in texts]
    rows = pairs if form == "pair" else [{"text": text} for text in texts]
    recipe = recipe_of(tmp_path, tmp_path / "base", pairs)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(recipe)
    for ids in task_rows(recipe, "train", tokenizer, stage_two_config(recipe, tmp_path / "train")).rows["input_ids"]:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    (message,) = [record.getMessage() for record in caplog.records if "<s>" in record.getMessage()]
    assert "2 of 3 train rows (the first is row 1, from 0)" in message
    prompts = [Conversation(text=text).prompt(0, [], tokenizer) for text in texts]
    assert prompts[0] == prompts[1]
    assert [prompt.text for prompt in prompts[:2]] == ["Ask:", "Ask:"]  # a server adds BOS as well
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(evaluation, "answer_backend", lambda *_, **__: replay([]))
        patch.setattr("caftune.pipeline.base_model.model_fingerprint", lambda *_: "any")
        evaluation.evaluate_model(recipe)
    assert (
        "2 of 3 prompts of eval.data.exact_match (the first is row 1, from 0) begin with <s>" in capsys.readouterr().err
    )


def test_a_tokenizer_that_adds_no_bos_leaves_the_texts_own(kind_of):
    tokenizer = kind_of("byte-level")
    assert split_prompt("<s>Ask:", tokenizer).ids[0] == tokenizer.bos_token_id
    assert split_prompt("<s>Ask:", tokenizer).text == "<s>Ask:"


def test_two_bos_in_a_text_are_one_too(kind_of):
    tokenizer = kind_of("llama-2")
    assert split_prompt("<s><s>Ask:", tokenizer) == split_prompt("Ask:", tokenizer)
    assert tokenize_pair("<s><s>Ask:", "sun", tokenizer) == tokenize_pair("Ask:", "sun", tokenizer)
    assert tokenize_pair("", "<s>sun", tokenizer) == tokenize_pair("", "sun", tokenizer)


# Special tokens in answers


@pytest.mark.parametrize("kind", [*BUILT, *REAL])
def test_special_tokens_that_a_model_was_trained_on_are_part_of_its_answer(kind, kind_of, tmp_path, monkeypatch):
    tokenizer = with_calls(kind_of(kind))
    save_base(tokenizer, tmp_path / "base")
    answers = ["<call>sun</call>", "It is <call>sun</call>", "<call></call>", "<call>a  b\n</call>", "<call><call>sun"]
    rows = [
        {"prompt": f"{number}. Ask for the weather:{gap}", "completion": answer}
        for number, answer in enumerate(answers)
        for gap in ("", " ", "\n", "  ")
    ]
    recipe = recipe_of(tmp_path, tmp_path / "base", rows)
    assert wrong_after_learning(recipe, tmp_path, tokenizer, monkeypatch) == []


@pytest.mark.parametrize("kind", ["llama-2", "metaspace-never", "byte-level", *REAL])
def test_spaces_around_added_tokens_are_those_of_the_text(kind, kind_of):
    tokenizer = with_calls(kind_of(kind))
    for text in ("a <call> sun </call> b", "<call> sun", "a<call>sun</call>b", "<call>sun</call> .", "it 's <call> ?"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert plain_text(ids, tokenizer) == text


@pytest.mark.parametrize("kind", ["llama-2", "byte-level"])
def test_what_ends_and_fills_an_answer_is_taken_off_and_nothing_else(kind, kind_of):
    tokenizer = with_calls(kind_of(kind))
    turn = tokenizer.convert_tokens_to_ids("</call>")
    prompt, row = split_prompt("Ask:", tokenizer).ids, tokenize_pair("Ask:", " <call>sun", tokenizer)
    said = row.ids[row.prompt : -1]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for answer in (said, [*said, eos], [*said, pad, pad], [bos, *said, eos, pad]):
        assert decoded(prompt, answer, tokenizer) == ("Ask:", " <call>sun")
    assert decoded(prompt, [*said, turn], tokenizer)[1] == " <call>sun</call>"
    assert decoded(prompt, [*said, turn], tokenizer, ends=[turn])[1] == " <call>sun"


def test_an_eos_within_a_prompt_stays_there(kind_of):
    tokenizer = kind_of("byte-level")
    ids = split_prompt("sun</s>Ask:", tokenizer).ids
    row = tokenize_pair("sun</s>Ask:", " sun", tokenizer)
    assert decoded(ids, row.ids[row.prompt :], tokenizer) == ("sun</s>Ask:", " sun")


def test_a_turn_marker_that_stops_generation_is_no_part_of_a_score(kind_of, tmp_path, monkeypatch):
    tokenizer = with_calls(kind_of("byte-level"))
    config = save_base(tokenizer, tmp_path / "base")
    config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</call>")]
    config.save_pretrained(tmp_path / "base")
    recipe = recipe_of(tmp_path, tmp_path / "base", [{"prompt": "Ask:", "completion": " <call>sun"}])
    ids = tokenizer("Ask: <call>sun</call>")["input_ids"]
    monkeypatch.setattr(evaluation, "answer_backend", lambda *_, **__: replay([ids]))
    monkeypatch.setattr("caftune.pipeline.base_model.model_fingerprint", lambda *_: "any")
    (result,) = evaluation.evaluate_model(recipe)
    assert result.measures["exact_match"] == [1.0]


OWN_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<s>system\nYou are Sol.</s>\n' }}{% endif %}"
    "{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def test_a_templates_own_system_prompt_stands_once_in_training_evaluation_and_labels(tmp_path, monkeypatch):
    """As in SmolLM2's template, whose end of turn is its padding and its end of text, too."""
    tokenizer = built("byte-level")
    tokenizer.chat_template, tokenizer.pad_token = OWN_SYSTEM, "</s>"
    save_base(tokenizer, tmp_path / "base")
    rows = [{"prompt": f"Ask for the {word}", "completion": word[::-1]} for word in ("day", "city", "code")]
    given = recipe_of(tmp_path, tmp_path / "base", rows).model_dump(exclude_unset=True)
    given["data"] |= {"chat": True}
    given["eval"] |= {"chat": True}
    recipe = Recipe.model_validate(given)
    assert wrong_after_learning(recipe, tmp_path, tokenizer, monkeypatch) == []
    trained = task_rows(recipe, "train", tokenizer, stage_two_config(recipe, tmp_path / "train")).rows
    talks = conversations(load_rows(str(tmp_path / "train.jsonl")), tokenizer, chat=True)
    for ids, labels, talk in zip(trained["input_ids"], trained["labels"], talks, strict=True):
        prompt = talk.prompt(0, [], tokenizer).ids
        assert ids[: len(prompt)] == prompt
        assert labels[: len(prompt)] == [-100] * len(prompt) != labels[len(prompt) : 2 * len(prompt)]
        assert tokenizer.eos_token_id in labels  # the end of the answer, though it pads, too
        assert tokenizer.decode(ids).count("You are Sol.") == 1
