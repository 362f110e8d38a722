"""From a file of any format to the tokens trained on, written out; and rows that cannot be trained on, each named."""

import json

import pytest
from datasets import Dataset
from opened import load_tokenizer, stage_two_config, task_rows
from trainers import OPTIONS, config, numbers, same, trained, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from caftune import CAFTTrainer
from caftune.core.objective import IGNORED, horizon_targets
from caftune.data.forms import load_rows
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.preview import preview_rows
from caftune.pipeline.schema import Recipe

# The assistant's turns end in </s>, and that end is theirs.
TEMPLATE = (
    "<s>{% if tools %}[{{ tools | tojson }}]{% endif %}{% if short %}Be brief.{% endif %}"
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def said(role, content):
    return {"role": role, "content": content}


ASKED, ANSWERED = said("user", "1+1?"), said("assistant", "Two.")
TURNS = [said("system", "Add."), ASKED, ANSWERED, said("user", "2+3?"), said("assistant", "Five.")]
WRITTEN = "<s><system>Add.<user>1+1?<assistant>Two.</s><user>2+3?<assistant>Five.</s>"
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = said("assistant", None) | {
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
}
USED = [ASKED, CALL, said("tool", "2"), ANSWERED]
CALLED = '{"name": "add", "arguments": {"a": 2}}</s>'
SHARED = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "Two."}]
SHARED = [
    {"from": "system", "value": "Add."},
    *SHARED,
    {"from": "human", "value": "2+3?"},
    {"from": "gpt", "value": "Five."},
]
AS_TEXT = said("assistant", None) | {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]}
SHARED_CALL = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}


def parts(content):
    return [{"type": "text", "text": piece} for piece in (content[:2], content[2:])]


# What a row is -> options, the whole text, and each stretch of it that is trained on.
FORMATS = {
    "text": ({"text": "CCO is ethanol"}, {}, "<s>CCO is ethanol</s>", ["<s>CCO is ethanol</s>"]),
    "prompt and completion": ({"prompt": "1+1?", "completion": " Two."}, {}, "<s>1+1? Two.</s>", [" Two.</s>"]),
    "prompt and completion, both trained on": (
        {"prompt": "1+1?", "completion": " Two."},
        {"completion_only_loss": False},
        "<s>1+1? Two.</s>",
        ["<s>1+1? Two.</s>"],
    ),
    "conversational prompt and completion": (
        {"prompt": TURNS[:4], "completion": TURNS[4:]},
        {},
        WRITTEN,
        ["Five.</s>"],
    ),
    "messages": ({"messages": TURNS}, {}, WRITTEN, [WRITTEN]),
    "messages, assistant only": (
        {"messages": TURNS},
        {"assistant_only_loss": True},
        WRITTEN,
        ["Two.</s>", "Five.</s>"],
    ),
    "tools": (
        {"messages": USED, "tools": TOOLS},
        {"assistant_only_loss": True},
        f"<s>[{json.dumps(TOOLS)}]<user>1+1?<assistant>{CALLED}<tool>2<assistant>Two.</s>",
        [CALLED, "Two.</s>"],
    ),
    "tools as text": (
        {"messages": USED, "tools": json.dumps(TOOLS)},
        {"assistant_only_loss": True},
        f"<s>[{json.dumps(TOOLS)}]<user>1+1?<assistant>{CALLED}<tool>2<assistant>Two.</s>",
        [CALLED, "Two.</s>"],
    ),
    "arguments as text": (
        {"messages": [ASKED, AS_TEXT, said("tool", "2"), ANSWERED]},
        {"assistant_only_loss": True},
        f"<s><user>1+1?<assistant>{CALLED}<tool>2<assistant>Two.</s>",
        [CALLED, "Two.</s>"],
    ),
    "sharegpt with calls": (
        {"conversations": [*SHARED[1:2], SHARED_CALL, {"from": "observation", "value": "2"}, SHARED[2]]},
        {"assistant_only_loss": True},
        f"<s><user>1+1?<assistant>{CALLED}<tool>2<assistant>Two.</s>",
        [CALLED, "Two.</s>"],
    ),
    "contents as parts": (
        {"messages": [{**turn, "content": parts(turn["content"])} for turn in TURNS]},
        {"assistant_only_loss": True},
        WRITTEN,
        ["Two.</s>", "Five.</s>"],
    ),
    "messages as text": ({"messages": json.dumps(TURNS)}, {}, WRITTEN, [WRITTEN]),
    "an input of zero": (
        {"instruction": "Negate.", "input": 0, "output": "Zero."},
        {},
        "<s><user>Negate.\n\n0<assistant>Zero.</s>",
        ["Zero.</s>"],
    ),
    "tools, prompt and completion": (
        {"prompt": [ASKED], "completion": USED[1:], "tools": TOOLS},
        {},
        f"<s>[{json.dumps(TOOLS)}]<user>1+1?<assistant>{CALLED}<tool>2<assistant>Two.</s>",
        [f"{CALLED}<tool>2<assistant>Two.</s>"],
    ),
    "template options": (
        {"messages": [ASKED, ANSWERED], "chat_template_kwargs": {"short": True}},
        {"assistant_only_loss": True},
        "<s>Be brief.<user>1+1?<assistant>Two.</s>",
        ["Two.</s>"],
    ),
    "sharegpt": ({"conversations": SHARED}, {"assistant_only_loss": True}, WRITTEN, ["Two.</s>", "Five.</s>"]),
    "messages named conversations": (
        {"conversations": TURNS},
        {"assistant_only_loss": True},
        WRITTEN,
        ["Two.</s>", "Five.</s>"],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "Two."},
        {},
        "<s><user>Add.\n\n1 1<assistant>Two.</s>",
        ["Two.</s>"],
    ),
    "alpaca without input": (
        {"instruction": "Add.", "input": "", "output": "Two."},
        {},
        "<s><user>Add.<assistant>Two.</s>",
        ["Two.</s>"],
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    """The demo's tokenizer with a chat template. Every character it can be given is one token or part of a known one."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def chat_base(tokenizer, tmp_path_factory):
    """The demo's base as a chat model on disk."""
    folder = tmp_path_factory.mktemp("chat")
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trainer_for(rows, folder, tokenizer, **options):
    weight = None if options.get("pretrain_heads") else 0.0
    args = config(folder, **{"aux_weight": weight, "max_steps": 1, "max_length": 256, **options})
    return CAFTTrainer(str(BASE), args, train_dataset=rows, processing_class=tokenizer)


def decoded(row, tokenizer):
    """The text of a row, and the stretches of it that have labels."""
    stretches, inside = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if inside else [*stretches, [token]]
        inside = label != IGNORED
    return tokenizer.decode(row["input_ids"]), [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("name", FORMATS)
def test_the_tokens_trained_on_are_these(name, tokenizer, tmp_path):
    row, options, text, labelled = FORMATS[name]
    rows = load_rows(write(tmp_path, [row]), chat=True)
    trainer = trainer_for(rows, tmp_path / "run", tokenizer, **options)
    assert decoded(trainer.train_dataset[0], tokenizer) == (text, labelled)


def test_alpaca_rows_of_a_base_without_chat_template_are_plain_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = load_rows(write(tmp_path, [{"instruction": "Add.", "input": "1 1", "output": "Two."}]))
    trainer = trainer_for(rows, tmp_path / "run", tokenizer)
    assert decoded(trainer.train_dataset[0], tokenizer) == ("<s>Add.\n\n1 1\n\nTwo.</s>", ["Two.</s>"])


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packing_keeps_the_labels_of_every_document(strategy, tokenizer, tmp_path):
    rows = load_rows(write(tmp_path, [{"messages": TURNS}, {"messages": [ASKED, ANSWERED]}]))
    options = {"packing": True, "packing_strategy": strategy, "assistant_only_loss": True}
    packed = trainer_for(rows, tmp_path / "run", tokenizer, **options).train_dataset
    assert len(packed) == 1
    assert sum(packed[0]["seq_lengths"]) == len(packed[0]["input_ids"])
    text = f"{WRITTEN}<s><user>1+1?<assistant>Two.</s>"
    assert decoded(packed[0], tokenizer) == (text, ["Two.</s>", "Five.</s>", "Two.</s>"])


def held_to(batch, horizon):
    """Which positions of a packed batch have a target at a horizon, and these targets."""
    targets = horizon_targets(batch["labels"], horizon, position_ids=batch["position_ids"])[0]
    held = (targets != IGNORED).nonzero().flatten()
    return held, targets[held]


@pytest.mark.parametrize("horizon", range(1, 6))
def test_horizons_are_held_to_the_assistants_turns_alone(horizon, tokenizer, tmp_path):
    rows = load_rows(write(tmp_path, [{"messages": TURNS}, {"messages": [ASKED, ANSWERED]}]))
    trainer = trainer_for(rows, tmp_path / "run", tokenizer, packing=True, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    held, targets = held_to(batch, horizon)
    assert targets.tolist() == batch["input_ids"][0][held + horizon].tolist()
    assert tokenizer.decode(targets) == "Two.</s>Five.</s>Two.</s>"


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [(1, "CCO.</s>CN</s>"), (2, "CO.</s>N</s>"), (3, "O.</s></s>"), (4, ".</s>"), (5, "</s>"), (6, "")],
)
def test_horizons_stay_in_their_document(horizon, expected, tokenizer, tmp_path):
    rows = load_rows(write(tmp_path, [{"text": "CCO."}, {"text": "CN"}]))
    trainer = trainer_for(rows, tmp_path / "run", tokenizer, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert tokenizer.decode(held_to(batch, horizon)[1]) == expected


@pytest.mark.parametrize("name", ["messages, assistant only", "tools"])
def test_beta_zero_is_the_stock_trainer_on_conversations(name, tokenizer, tmp_path):
    row, options, *_ = FORMATS[name]
    other = {**row, "messages": [*row["messages"][:3], said("assistant", "Ten.")]}
    rows = load_rows(write(tmp_path, [row, other] * 4))
    ours = trained(trainer_for(rows, tmp_path / "a", tokenizer, max_steps=2, **options))
    args = SFTConfig(str(tmp_path / "b"), **{**OPTIONS, "max_steps": 2, "max_length": 256, **options})
    stock = SFTTrainer(str(BASE), args, train_dataset=rows, processing_class=tokenizer)
    assert numbers(ours) == numbers(trained(stock))
    assert same(weights(ours), weights(stock))


@pytest.mark.parametrize("name", ["sharegpt", "tools", "alpaca", "text"])
def test_a_recipe_trains_on_the_same_tokens(name, chat_base, tokenizer, tmp_path):
    row, options, text, labelled = FORMATS[name]
    recipe = recipe_of([row] * 4, chat_base, tmp_path, options)
    assert finetune_model(recipe) == tmp_path / "out" / "model"
    args = stage_two_config(recipe, tmp_path / "again")
    rows = task_rows(recipe, "train", load_tokenizer(recipe), args).rows
    assert decoded(rows[0], tokenizer) == (text, labelled)
    tokens = preview_rows(recipe, count=1)
    shown, learnt, _ = next(tokens)
    spoken = "".join(token for token, yes in zip(shown, learnt, strict=True) if yes)
    assert spoken.replace("Ġ", " ") == "".join(labelled)


def recipe_of(rows, base, folder, options):
    trainer = {"max_steps": 1, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", **options}
    return Recipe.model_validate(
        {
            "output": str(folder / "out"),
            "model": {"name": base},
            "loss": {"weight": 0.0},
            "data": {"train": write(folder, rows), "max_length": 256},
            "trainer": trainer,
        }
    )


GOOD = {"messages": [ASKED, ANSWERED]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"messages must be a list of messages, got \[\]. Fix or remove the row"),
        ({"messages": None}, "messages must be a list of messages, got None"),
        ({"messages": [said("robot", "x")]}, "a role in messages must be one of system, .* got 'robot'. Fix the row"),
        ({"messages": [{"content": "x"}]}, "a role in messages must be one of .* got None"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "content in messages must be text, got None"),
        ({"messages": [said("user", 3), ANSWERED]}, "content in messages must be text, got 3"),
        (
            {"messages": [said("user", [{"type": "image"}]), ANSWERED]},
            r"parts of a content in messages must be of type text, got \['image'\]",
        ),
        ({**GOOD, "images": ["a.png"]}, "must be text only, got images. Remove the row, or the column"),
        ({"prompt": [ASKED], "completion": []}, r"completion must be a list of messages, got \[\]"),
        ({"prompt": "a", "completion": [ANSWERED]}, "prompt and completion must both be text or both messages"),
        ({"conversations": []}, r"conversations must be a list of messages, got \[\]"),
        ({"conversations": [{"from": "human"}]}, "content in conversations must be text, got None"),
        (
            {"chosen": [ASKED, ANSWERED], "rejected": [ASKED]},
            "must have the columns of a known form, got chosen, rejected \(known: messages",
        ),
        ({"prompt": "a", "completion": "b"}, "must have the columns and types of the rows before it"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(row, message, tmp_path):
    with pytest.raises(CaftuneError, match=rf"rows.jsonl, row 1 \(from 0\):? ({message})"):
        load_rows(write(tmp_path, [GOOD, row]))


def test_text_and_messages_are_not_mixed(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": [ASKED], "completion": [ANSWERED]}]
    with pytest.raises(CaftuneError, match=r"row 1 \(from 0\) must have the columns and types of the rows before it"):
        load_rows(write(tmp_path, rows))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"messages": [ASKED]},
            {"assistant_only_loss": True},
            r"1 of 2 rows of the train data \(counted from 0: 1\) have no assistant turn",
        ),
        (
            GOOD,
            {"completion_only_loss": True, "pretrain_heads": True},
            "completion_only_loss must not be set where rows have no completion",
        ),
    ],
)
def test_conversations_without_the_part_to_train_on_are_refused(row, options, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_for(Dataset.from_list([GOOD, row]), tmp_path, tokenizer, **options)


def test_preference_pairs_are_refused_with_what_to_do(tokenizer, chat_base, tmp_path):
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(ValueError, match=r"must have completions.* columns prompt, chosen, rejected.* chosen ones"):
        trainer_for(Dataset.from_list(pairs), tmp_path, tokenizer)
    recipe = recipe_of(pairs, chat_base, tmp_path, {})
    with pytest.raises(
        CaftuneError, match="data.train must have completions to train on, got prompts only. Name the answers' column"
    ):
        finetune_model(recipe)


def test_the_chosen_answers_of_preference_pairs_can_be_trained_on(tmp_path):
    path = write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert load_rows(path, {"prompt": "prompt", "completion": "chosen"}).to_list() == [
        {"prompt": "a", "completion": "b"}
    ]


def test_images_are_refused_by_the_trainer_too(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="The dataset appears to be vision-related"):
        trainer_for(Dataset.from_list([{**GOOD, "images": ["a.png"]}]), tmp_path, tokenizer)


def test_wrapped_packing_is_refused_with_the_reason(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="got 'wrapped', which cuts documents without marking where"):
        trainer_for(
            Dataset.from_list([GOOD]),
            tmp_path,
            tokenizer,
            packing=True,
            packing_strategy="wrapped",
            pretrain_heads=True,
        )
