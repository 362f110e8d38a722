"""Conversations: rendered as in training, each assistant turn written anew in its place."""

import copy
from importlib import resources

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from caftune.data.prompts import apply_template, conversations
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.generation.answers import AnswerCache, generate_labels
from caftune.generation.backends import Answer, Sampling
from caftune.generation.labels import label_dataset

CALLS = (
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}"
    "{% if m.function_call %}({{ m.function_call.name }}){% endif %}"
)
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + CALLS + "{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
GREEDY = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    chatty = copy.deepcopy(AutoTokenizer.from_pretrained(BASE))
    chatty.chat_template = TEMPLATE
    return chatty


def say(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = [say("user", "C"), say("assistant", "old"), say("user", "N"), say("assistant", "older")]


def talks_of(tokenizer, *rows, **options):
    return dict(enumerate(conversations(Dataset.from_list([{"messages": row} for row in rows]), tokenizer, **options)))


def labelled(tokenizer, talks, tmp_path, answer, *, room=256, sampling=GREEDY):
    def backend(prompts, _seed):
        yield from reversed([(i, answer(item)) for i, item in enumerate(prompts)])  # in another order than asked

    cache = AnswerCache(tmp_path / "cache.jsonl", sampling, seed=0, fingerprint="base")
    return generate_labels(talks, tokenizer, cache, lambda: backend, room=room)


def shout(tokenizer, end="stop"):
    """Answers with as many O as the prompt has messages."""

    def answer(item):
        ids = tokenizer("O" * len(item.messages), add_special_tokens=False)["input_ids"]
        return Answer([*ids, tokenizer.eos_token_id] if end == "stop" else ids, end)

    return answer


def test_each_assistant_turn_is_written_anew_behind_the_models_own_answers(tokenizer, tmp_path):
    found = labelled(tokenizer, talks_of(tokenizer, TALK, TALK[:1]), tmp_path, shout(tokenizer))
    read = [(label.row, label.turn, label.prompt, label.completion) for label in found.labels]
    assert read == [
        (0, 0, "<user>C<assistant>", "O"),
        (0, 1, "<user>C<assistant>O<user>N<assistant>", "OOO"),
        (1, 0, "<user>C<assistant>", "O"),
    ]


def test_a_conversation_that_is_open_is_answered_at_its_end(tokenizer, tmp_path):
    found = labelled(tokenizer, talks_of(tokenizer, TALK[:3]), tmp_path, shout(tokenizer))
    assert [label.completion for label in found.labels] == ["O", "OOO"]


def test_only_the_answer_is_trained_on_in_every_turn(tokenizer, tmp_path):
    found = labelled(tokenizer, talks_of(tokenizer, TALK), tmp_path, shout(tokenizer))
    for row, label in zip(label_dataset(found.labels), found.labels, strict=True):
        trained = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(trained, skip_special_tokens=True) == label.completion
        assert row["input_ids"] == label.prompt_ids + trained


def test_a_conversation_ends_with_an_answer_that_was_cut_off(tokenizer, tmp_path):
    found = labelled(tokenizer, talks_of(tokenizer, TALK), tmp_path, shout(tokenizer, "length"))
    assert [(label.turn, label.finish) for label in found.labels] == [(0, "length")]
    assert found.dropped_turns == 1


def test_later_turns_without_room_are_dropped_and_counted(tokenizer, tmp_path):
    talks = talks_of(tokenizer, TALK, TALK[:2])
    room = len(talks[0].prompt(0, [], tokenizer).ids) + 1
    found = labelled(tokenizer, talks, tmp_path, shout(tokenizer), room=room)
    assert [(label.row, label.turn) for label in found.labels] == [(0, 0), (1, 0)]
    assert found.dropped_turns == 1


def test_a_template_without_a_generation_prompt_gets_the_start_of_an_answer_that_it_writes_in_training(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = TURNS
    asked = talks_of(bare, TALK)[0].prompt(1, ["NN"], bare)
    trained = bare.apply_chat_template([*TALK[:1], say("assistant", "NN"), *TALK[2:]], return_dict=True)["input_ids"]
    assert bare.decode(asked.ids) == "<user>C<assistant>NN<user>N<assistant>"
    assert trained[: len(asked.ids)] == asked.ids
    as_text = apply_template(TALK[:1], {}, bare, add_generation_prompt=True, tokenize=False)
    assert as_text == "<user>C<assistant>"


@pytest.mark.parametrize("start", ["", " "])
def test_a_template_whose_answers_have_no_start_is_not_changed(start, tokenizer):
    bare = copy.deepcopy(tokenizer)
    answer = "{{ '" + start + "' + m.content }}"
    bare.chat_template = "{% for m in messages %}{% if m.role == 'user' %}({{ m.content }}){% else %}" + answer
    bare.chat_template += "{% endif %}{% endfor %}"
    assert apply_template(TALK[:1], {}, bare, add_generation_prompt=True, tokenize=False) == "(C)"


def test_a_finished_conversation_asks_nothing_again(tokenizer, tmp_path):
    first = labelled(tokenizer, talks_of(tokenizer, TALK), tmp_path, shout(tokenizer))
    again = labelled(tokenizer, talks_of(tokenizer, TALK), tmp_path, lambda _: pytest.fail("asked"))
    assert (first.queried, again.queried, again.labels) == (2, 0, first.labels)


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"function_call": {"name": "f", "arguments": {}}},
    ],
    ids=lambda calls: next(iter(calls)),
)
def test_turns_that_call_tools_stay_as_they_are(calls, tokenizer):
    call = say("assistant", "calls", **calls)
    talk = talks_of(tokenizer, [say("user", "C"), call, say("tool", "7"), say("assistant", "old")])[0]
    assert talk.turns == [3]
    assert tokenizer.decode(talk.prompt(0, [], tokenizer).ids) == "<user>C<assistant>calls(f)<tool>7<assistant>"


def test_what_the_assistant_says_before_the_user_stays(tokenizer):
    talk = talks_of(tokenizer, [say("assistant", "hello"), *TALK[:2]])[0]
    assert talk.turns == [2]
    assert tokenizer.decode(talk.prompt(0, [], tokenizer).ids) == "<assistant>hello<user>C<assistant>"


def test_a_conversation_that_leaves_the_model_nothing_to_say_has_no_turns(tokenizer):
    call = say("assistant", "calls", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    assert talks_of(tokenizer, [say("user", "C"), call])[0].turns == []


def test_a_system_message_goes_where_there_is_none(tokenizer):
    with_own = [say("system", "own"), say("user", "C")]
    talks = talks_of(tokenizer, TALK[:1], with_own, system="ours")
    asked = [tokenizer.decode(talk.prompt(0, [], tokenizer).ids) for talk in talks.values()]
    assert asked == ["<system>ours<user>C<assistant>", "<system>own<user>C<assistant>"]


def test_a_system_message_for_plain_text_is_refused(tokenizer):
    with pytest.raises(CaftuneError, match="labels.system must be used with prompts that are messages"):
        conversations(Dataset.from_list([{"prompt": "C"}]), tokenizer, chat=False, system="ours")


def test_tools_and_conversational_prompts_are_rendered_as_in_training(tokenizer):
    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = "{{ tools | length if tools else 0 }}{% for m in messages %}{{ m.content }}{% endfor %}>"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = Dataset.from_list([{"prompt": [say("user", "CC")], "tools": tools}])
    (talk,) = conversations(rows, with_tools)
    assert with_tools.decode(talk.prompt(0, [], with_tools).ids) == "1CC>"


@pytest.mark.parametrize(
    ("family", "options", "day"),
    [
        ("llama3_2", {}, "26 Jul 2024"),
        ("llama3_2", {"date_string": "1 Jan 2025"}, "1 Jan 2025"),
        ("gptoss", {}, "2024-07-26"),
        ("llama3_2", {"chat_template": "{{ strftime_now('%Y') + messages[0].content }}"}, "2024"),
    ],
)
def test_a_template_that_writes_the_day_asks_the_same_every_day(tokenizer, family, options, day):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text()
    asked = apply_template(TALK[:1], options, dated, tokenize=False)
    assert day in asked
    (talk,) = conversations(Dataset.from_list([{"messages": TALK[:1], "chat_template_kwargs": options}]), dated)
    found = talk.prompt(0, [], dated)
    assert found.ids == apply_template(TALK[:1], options, dated, add_generation_prompt=True)["input_ids"]
