"""Labels from servers: what each kind of server understands, faults, limits; and a real `transformers serve`."""

import copy
import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from openai_server import DROP, EMPTY, SLOW, Replies, serve
from tokenizer_kinds import built, with_calls
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.data.prompts import Conversation, Prompt
from caftune.demo.chemistry import molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.generation.backends import Answer, Failure, Sampling
from caftune.generation.labels import read_labels
from caftune.generation.server import Server, server_backend
from caftune.pipeline.label import label_prompts
from caftune.pipeline.schema import Recipe

EOS = 1
GREEDY = Sampling(max_new_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [Conversation(text=prompt(m)).prompt(0, [], tokenizer) for m in molecules(12, seed=9, substituents=(0, 2))]


@pytest.fixture(scope="module")
def greedy(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    known: dict[tuple[int, ...], list[int]] = {}

    def answer(asked):
        ids = tuple(tokenizer(asked)["input_ids"] if isinstance(asked, str) else asked)
        if ids not in known:
            found = model.generate(
                torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=2, eos_token_id=EOS
            )
            known[ids] = found[0, len(ids) :].tolist()
        return known[ids]

    return answer


@pytest.fixture
def replies(greedy, tokenizer):
    return Replies(answer=greedy, decode=tokenizer.decode, eos=EOS)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    """The client waits half a second before its first retry; here a twentieth."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.05)


def ask(replies, tokenizer, prompts, sampling=GREEDY, **server):
    backend = server_backend(Server(url=replies.url, model="m", **server), tokenizer, sampling, [EOS])
    return dict(backend(prompts, range(7, 7 + len(prompts))))


def expected(greedy, prompts, count=16):
    answers = {}
    for i, item in enumerate(prompts):
        ids = greedy(item.ids)[:count]
        answers[i] = (ids, "stop" if ids[-1] == EOS else "length")
    return answers


def as_pairs(found):
    return {index: (answer.ids, answer.finish) for index, answer in found.items()}


@pytest.mark.parametrize(
    ("gives_ids", "refuses", "is_exact", "dialect"),
    [
        (True, (), True, "tokens"),
        (False, ("caftune_unknown", "top_k"), False, "transformers"),
        (False, ("generation_config", "caftune_unknown", "top_k"), False, "plain"),
        (False, (), False, "plain"),  # it overlooks what it does not know
    ],
)
def test_every_kind_of_server_gives_the_same_answers(
    replies, greedy, tokenizer, prompts, gives_ids, refuses, is_exact, dialect
):
    replies.gives_ids, replies.refuses = gives_ids, refuses
    with serve(replies):
        found = ask(replies, tokenizer, prompts)
    assert as_pairs(found) == expected(greedy, prompts)
    assert {answer.finish for answer in found.values()} == {"stop", "length"}
    assert {answer.exact for answer in found.values()} == {is_exact}
    last = replies.requests[-1]
    kind = "tokens" if isinstance(last["prompt"], list) else "transformers" if "generation_config" in last else "plain"
    assert kind == dialect


def test_sampling_reaches_the_server_and_nothing_of_its_own_is_left(replies, tokenizer, prompts):
    with serve(replies):
        ask(replies, tokenizer, prompts[:1], Sampling(9, temperature=0.6, top_p=0.9, top_k=5))
    said = replies.requests[1]  # the first one was a word, to see what the server understands
    assert (said["max_tokens"], said["temperature"], said["top_p"], said["top_k"]) == (9, 0.6, 0.9, 5)
    assert (said["repetition_penalty"], said["min_p"], said["seed"], said["stop_token_ids"]) == (1.0, 0.0, 7, [EOS])
    assert said["skip_special_tokens"] is False


def test_top_k_is_refused_where_the_server_would_overlook_it(replies, tokenizer, prompts):
    replies.gives_ids = False
    with serve(replies), pytest.raises(CaftuneError, match="labels.top_k must be 0 with .* only OpenAI's own fields"):
        ask(replies, tokenizer, prompts[:1], Sampling(9, temperature=0.6, top_k=5))


@pytest.fixture(scope="module")
def chatty():
    found = AutoTokenizer.from_pretrained(BASE)
    turns = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    found.chat_template = turns + "{% if add_generation_prompt %}{{ '\n' }}SMILES:{% endif %}"
    return found


def conversation(chatty, **options):
    messages = [{"role": "user", "content": "Name: ethanol"}]
    rendered = chatty.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return Prompt(rendered["input_ids"], messages=messages, options=options)


def test_conversations_go_as_the_text_that_gives_their_tokens(replies, chatty):
    item = conversation(chatty)
    replies.gives_ids = False
    with serve(replies):
        found = ask(replies, chatty, [item])
    assert found[0].ids == replies.answer(item.ids)[:16]
    said = replies.requests[-1]
    assert (said["path"], chatty(said["prompt"])["input_ids"]) == ("/v1/completions", item.ids)


def test_a_conversation_whose_template_writes_the_day_goes_as_its_text(replies, chatty):
    dated = copy.deepcopy(chatty)
    dated.chat_template = chatty.chat_template.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d') }}")
    item = Conversation(messages=[{"role": "user", "content": "Name: ethanol"}]).prompt(0, [], dated)
    replies.gives_ids = False
    with serve(replies):
        ask(replies, dated, [item])
    assert replies.requests[-1]["prompt"].startswith("26Name")


def test_conversations_go_as_messages_to_servers_that_take_nothing_else(replies, chatty):
    item = conversation(chatty, tools=None, thinking=False)
    answer = replies.answer
    replies.gives_ids, replies.refuses = False, ("prompt",)
    replies.answer = lambda _asked: answer(item.ids)
    with serve(replies):
        found = ask(replies, chatty, [item])
    assert found[0].ids == answer(item.ids)[:16]
    said = replies.requests[-1]
    assert (said["path"], said["messages"]) == ("/v1/chat/completions", item.messages)
    assert said["chat_template_kwargs"] == {"thinking": False}


@pytest.mark.parametrize("part", ["tool_calls", "reasoning_content"])
def test_an_answer_that_the_server_took_apart_is_a_failure(replies, chatty, part):
    item = conversation(chatty)
    answer = replies.answer
    replies.gives_ids, replies.refuses = False, ("prompt",)
    replies.answer = lambda _asked: answer(item.ids)
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), chatty, GREEDY, [EOS])
        dict(backend([item], [0]))  # the word, and an answer, before there are parts
        replies.parts = {part: calls if part == "tool_calls" else "hm"}
        found = dict(backend([item], [0]))
    assert found[0] == Failure(f"the server separated {part} from the answer; switch its parsers off")


def test_an_answer_that_ended_in_another_way_is_a_failure(replies, tokenizer, prompts):
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), tokenizer, Sampling(3, temperature=0), [EOS])
        dict(backend(prompts[:1], [0]))
        replies.finish = "content_filter"
        found = dict(backend(prompts[:1], [0]))
    assert found[0] == Failure("the server ended the answer with 'content_filter'")


def test_a_conversation_ends_with_the_token_that_its_template_writes(replies, chatty):
    item = conversation(chatty)
    answer = replies.answer(item.ids)
    assert answer[-1] == EOS
    replies.gives_ids = False
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), chatty, Sampling(40, temperature=0), [3, EOS])
        found = dict(backend([item], [0]))
    assert found[0].ids == answer


def test_a_prompt_that_is_refused_for_good_does_not_condemn_the_server(replies, tokenizer, prompts):
    replies.faults = [None, 400]
    with serve(replies):
        found = ask(replies, tokenizer, prompts[:3], concurrency=1)
    assert isinstance(found[0], Failure)
    assert [isinstance(found[i], Answer) for i in (1, 2)] == [True, True]


def test_text_is_tokenized_with_the_space_that_decoding_dropped(shared):
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    item = Conversation(text="Once upon").prompt(0, [], stories)
    for written in ("Once upon a time", "Once upon. There"):  # tokens: ' a', ' time'; and '.', ' There'
        ids = stories(written)["input_ids"][len(item.ids) :]
        replies = Replies(answer=lambda _asked, ids=ids: ids, decode=stories.decode, eos=2, gives_ids=False)
        with serve(replies):
            backend = server_backend(Server(url=replies.url, model="m"), stories, GREEDY, [2])
            found = dict(backend([item], [0]))
        assert found[0] == Answer(ids, "length", exact=False)


def first(reply):
    """The choice of a reply, to be changed."""
    return reply["choices"][0]


def changed(**fields):
    """A fault: the answer with other fields in its choice."""

    def change(reply):
        first(reply).update(fields)
        return reply

    return change


def without(*path):
    def change(reply):
        place = reply
        for key in path[:-1]:
            place = place[key]
        place.pop(path[-1])
        return reply

    return change


MALFORMED = {
    "a text that is null": changed(text=None),
    "a text that is a number": changed(text=7),
    "a text that is an object": changed(text={"a": 1}),
    "half a character": changed(text="a\ud800"),
    "no text": without("choices", 0, "text"),
    "no finish": without("choices", 0, "finish_reason"),
    "a finish that is null": changed(finish_reason=None),
    "a finish that nobody knows": changed(finish_reason="tired"),
    "a filtered answer": changed(finish_reason="content_filter"),
    "no choices": lambda reply: {**reply, "choices": []},
    "choices that are null": lambda reply: {**reply, "choices": None},
    "a choice that is null": lambda reply: {**reply, "choices": [None]},
    "choices that are a text": lambda reply: {**reply, "choices": "abc"},
    "an error with status 200": lambda _: {"error": {"message": "busy"}},
    "JSON that is a list": lambda reply: [reply],
    "JSON that is null": lambda _: None,
    "JSON that is cut off": lambda reply: json.dumps(reply).encode()[:-9],
    "nothing": lambda _: b"",
    "a page of HTML": lambda _: b"<!doctype html><html><body>Bad gateway</body></html>",
    "bytes that are no UTF-8": lambda _: b'{"choices": [{"text": "\xff\xfe", "finish_reason": "stop"}]}',
    "JSON nested without end": lambda _: b"[" * 100_000,
}
HARMLESS = {
    "no usage": without("usage"),
    "usage that is null": lambda reply: {**reply, "usage": None},
    "usage of another type": lambda reply: {**reply, "usage": {"completion_tokens": "many"}},
    "usage that is a list": lambda reply: {**reply, "usage": [1]},
}


@pytest.mark.parametrize("gives_ids", [True, False])
def test_a_malformed_reply_is_a_failure_of_its_prompt_alone(replies, greedy, tokenizer, prompts, gives_ids):
    kinds = [*MALFORMED.values(), *HARMLESS.values()]
    many = [prompts[i % len(prompts)] for i in range(2 * len(kinds) + 3)]
    replies.gives_ids = gives_ids
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m", concurrency=1), tokenizer, GREEDY, [EOS])
        dict(backend(prompts[:1], [0]))  # what the server understands
        replies.faults = [fault for kind in kinds for fault in (kind, None)]
        found = dict(backend(many, range(len(many))))
    right = expected(greedy, many)
    names = dict(enumerate([*MALFORMED, *HARMLESS]))
    # Of an answer as ids its text is not needed, but one that is no text tells of a fault.
    for i, answer in found.items():
        name = names.get(i // 2, "an answer") if i % 2 == 0 else "an answer"
        has_ids_that_end = gives_ids and "finish" in name + " finish" * (name == "a filtered answer")
        if name in MALFORMED and not (has_ids_that_end and right[i][1] == "stop"):
            assert isinstance(answer, Failure), name
            assert answer.reason.encode("utf-8")
        else:
            assert (answer.ids, answer.finish) == right[i], name


PARTS = [{"type": "text", "text": "CC"}, {"type": "text", "text": "O"}]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, None),
        ({"content": None, "refusal": "I cannot help with that."}, None),
        ({"content": "CCO", "refusal": "I cannot help with that."}, None),
        ({"content": [*PARTS, {"type": "image_url", "image_url": {"url": "x"}}]}, None),
        ({"content": []}, None),
        ({"content": [{"type": "thinking", "thinking": "hm"}]}, None),
        ({"content": "CCO", "function_call": {"name": "f", "arguments": "{}"}}, None),
        ({"content": PARTS}, "CCO"),
        ({"content": ""}, ""),
        ({"content": "CCO", "refusal": None, "tool_calls": [], "reasoning_content": ""}, "CCO"),
    ],
)
def test_a_message_is_an_answer_where_it_is_text_alone(replies, chatty, message, text):
    item = conversation(chatty)
    answer = replies.answer
    replies.gives_ids, replies.refuses = False, ("prompt",)
    replies.answer = lambda _asked: answer(item.ids)
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), chatty, GREEDY, [EOS])
        dict(backend([item], [0]))
        replies.faults = [changed(message={"role": "assistant", **message}, finish_reason="stop")]
        found = dict(backend([item], [0]))[0]
    if text is None:
        assert isinstance(found, Failure)
    else:
        assert found == Answer(
            [*chatty(text, add_special_tokens=False)["input_ids"], EOS] if text else [EOS], "stop", False
        )


def test_an_empty_answer_is_an_answer(replies, tokenizer, prompts):
    replies.gives_ids = False
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), tokenizer, GREEDY, [EOS])
        dict(backend(prompts[:1], [0]))
        replies.faults = [changed(text="", finish_reason="stop")]
        assert dict(backend(prompts[:1], [0])) == {0: Answer([EOS], "stop", exact=False)}


@pytest.mark.parametrize("given", [["5", "6"], [1.5], [-1], [True], "56", {"0": 5}])
def test_token_ids_that_are_none_are_a_failure(replies, tokenizer, prompts, given):
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), tokenizer, GREEDY, [EOS])
        dict(backend(prompts[:1], [0]))
        replies.faults = [changed(token_ids=given)]
        found = dict(backend(prompts[:1], [0]))
    assert found[0].reason.startswith("the answer's token ids must be whole numbers")


def test_malformed_first_replies_do_not_condemn_the_server(replies, greedy, tokenizer, prompts):
    replies.faults = [MALFORMED["a page of HTML"], MALFORMED["JSON that is cut off"]]
    with serve(replies):
        found = ask(replies, tokenizer, prompts[:3])
    assert as_pairs(found) == expected(greedy, prompts[:3])


def test_a_server_of_pages_is_no_server(replies, tokenizer, prompts):
    replies.faults = [MALFORMED["a page of HTML"]] * 20
    with (
        serve(replies),
        pytest.raises(CaftuneError, match=r"the reply must be JSON .*doctype.* labels.server.url ends in"),
    ):
        ask(replies, tokenizer, prompts)


@pytest.mark.parametrize("part", ["reasoning_content", "reasoning"])
def test_a_server_with_a_reasoning_parser_is_told_so(replies, chatty, part):
    item = conversation(chatty)
    answer = replies.answer
    replies.gives_ids, replies.refuses, replies.parts = False, ("prompt",), {part: "hm", "content": None}
    replies.answer = lambda _asked: answer(item.ids)
    with (
        serve(replies),
        pytest.raises(CaftuneError, match=f"separated {part} from .* without its reasoning parser .*--reasoning"),
    ):
        ask(replies, chatty, [item])


def test_llama_servers_own_endpoint_gives_the_ids(replies, greedy, tokenizer, prompts):
    replies.llama = True
    with serve(replies):
        found = ask(replies, tokenizer, prompts, Sampling(16, temperature=0, top_k=7))
    assert as_pairs(found) == expected(greedy, prompts)
    assert all(answer.exact for answer in found.values())
    said = replies.requests[-1]
    assert (said["path"], said["n_predict"], said["top_k"], said["cache_prompt"]) == ("/completion", 16, 7, False)
    assert said["samplers"] == ["temperature", "top_k", "top_p"]
    assert "dry_multiplier" not in said


def test_a_server_that_only_looks_like_llama_server_is_asked_otherwise(replies, greedy, tokenizer, prompts):
    replies.llama, replies.faults = True, [404]
    with serve(replies):
        found = ask(replies, tokenizer, prompts)
    assert as_pairs(found) == expected(greedy, prompts)
    assert replies.requests[-1]["path"] == "/v1/completions"


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        ({"truncated": True}, None),
        ({"tokens": []}, None),
        ({"tokens": "5"}, None),
        ({"stop_type": "word"}, None),
        ({"stop_type": "none"}, None),
        ({"tokens": [5, 6, 77], "stop_type": "eos"}, Answer([5, 6, 77], "stop")),  # an end that only the server knows
        ({"tokens": [5] * 18, "stop_type": "limit"}, Answer([5] * 16, "length")),  # it ended within a character
        ({"tokens": [5] * 17 + [EOS], "stop_type": "eos"}, Answer([5] * 16, "length")),
    ],
)
def test_what_llama_server_says_of_an_answer(replies, tokenizer, prompts, more, answer):
    replies.llama = True
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), tokenizer, GREEDY, [EOS])
        dict(backend(prompts[:1], [0]))
        replies.faults = [lambda reply: {**reply, **more}]
        found = dict(backend(prompts[:1], [0]))[0]
    assert found == answer if answer else isinstance(found, Failure)


@pytest.mark.parametrize("written", [" <call>sun</call>", "<call></call>", " a <call> b"])
def test_special_tokens_in_a_text_are_tokens_of_the_answer(written):
    tokenizer = with_calls(built("byte-level"))
    item = Conversation(text="Ask:").prompt(0, [], tokenizer)
    ids = tokenizer(f"Ask:{written}")["input_ids"][len(item.ids) :]
    replies = Replies(answer=lambda _asked: ids, decode=tokenizer.decode, eos=1, gives_ids=False)
    with serve(replies):
        backend = server_backend(Server(url=replies.url, model="m"), tokenizer, GREEDY, [1])
        found = dict(backend([item], [0]))
    assert found[0] == Answer(ids, "length", exact=False)


@pytest.mark.parametrize("fault", [500, 503, 429, 408, DROP])
def test_passing_faults_are_tried_again(replies, greedy, tokenizer, prompts, fault):
    replies.faults = [None, *[fault] * 6]
    with serve(replies):
        found = ask(replies, tokenizer, prompts, retries=6, concurrency=4)
    assert as_pairs(found) == expected(greedy, prompts)
    assert len(replies.requests) == 1 + len(prompts) + 6


def test_a_request_that_takes_too_long_is_asked_again(replies, greedy, tokenizer, prompts):
    replies.faults = [None, SLOW]
    with serve(replies):
        found = ask(replies, tokenizer, prompts[:3], retries=2, timeout_s=0.5, concurrency=1)
    assert as_pairs(found) == expected(greedy, prompts[:3])


def test_the_wait_that_a_server_asks_for_is_kept(replies, tokenizer, prompts):
    replies.faults = [None, 429]
    with serve(replies):
        ask(replies, tokenizer, prompts[:2], retries=2, concurrency=1)
    assert replies.times[2] - replies.times[1] >= 0.3


def test_a_prompt_that_stays_without_an_answer_is_a_failure_and_the_others_go_on(replies, greedy, tokenizer, prompts):
    replies.faults = [None, 500, 500]
    with serve(replies):
        found = ask(replies, tokenizer, prompts, retries=1, concurrency=1)
    assert isinstance(found[0], Failure)
    assert "500" in found[0].reason
    rest = {index: answer for index, answer in found.items() if index != 0}
    assert as_pairs(rest) == {index: pair for index, pair in expected(greedy, prompts).items() if index != 0}


def test_a_reply_without_an_answer_is_a_failure(replies, tokenizer, prompts):
    replies.faults = [None, EMPTY]
    with serve(replies):
        found = ask(replies, tokenizer, prompts[:3], retries=0, concurrency=1)
    assert found[0].reason.startswith("the reply must hold an answer, got")
    assert isinstance(found[1], Answer)


def test_nobody_waits_for_requests_under_way_when_the_command_is_stopped(replies, tmp_path):
    first = replies.answer
    replies.answer = lambda asked: (time.sleep(60 if len(replies.requests) > 1 else 0), first(asked))[1]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": "C" * n}) + "\n" for n in range(1, 20)))
    with serve(replies):
        recipe = f"{{output: {tmp_path}/run, model: {{name: {BASE}}}, labels: {{prompts: {tmp_path}/data.jsonl, "
        recipe += f"backend: server, max_new_tokens: 16, server: {{url: '{replies.url}', concurrency: 4}}}}}}"
        (tmp_path / "recipe.yaml").write_text(recipe)
        command = [sys.executable, "-m", "caftune.cli", "label", str(tmp_path / "recipe.yaml")]
        # A shell that started the tests in the background has them, and all that they start, ignore SIGINT.
        heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heard
        )
        while len(replies.requests) < 5:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=50)
    assert process.returncode == 130
    assert "Stopped. Labels" in said


def test_a_server_that_has_died_is_not_asked_to_the_end(replies, tokenizer, prompts):
    replies.faults = [None, *[500] * 100]
    with serve(replies):
        found = ask(replies, tokenizer, prompts, retries=0, concurrency=2)
    assert len(found) == len(prompts)
    assert all(isinstance(answer, Failure) for answer in found.values())
    assert len(replies.requests) <= 1 + 2 * 2 + 1
    assert found[len(prompts) - 1].reason == "not sent, because the server had stopped answering"


def test_so_many_requests_run_at_a_time(replies, tokenizer, prompts):
    slow = replies.answer
    replies.answer = lambda asked: (time.sleep(0.1), slow(asked))[1]
    with serve(replies):
        ask(replies, tokenizer, prompts, concurrency=3)
    assert replies.most_at_once == 3


def test_requests_keep_their_pace_retries_too(replies, tokenizer, prompts):
    replies.faults = [None, 500]
    with serve(replies):
        ask(replies, tokenizer, prompts[:5], requests_per_minute=600, retries=3, concurrency=5)
    gaps = [after - before for before, after in zip(replies.times, replies.times[1:], strict=False)]
    assert len(gaps) == 6
    assert min(gaps) > 0.05  # a tenth of a second between the sending; on a busy machine arrivals scatter
    assert sum(gaps) > 0.55


def test_the_key_comes_from_the_environment(replies, tokenizer, prompts, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "sk-7")
    with serve(replies):
        ask(replies, tokenizer, prompts[:1], key_variable="OUR_KEY")
    assert replies.requests[0]["key"] == "Bearer sk-7"


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([401], "refuses to answer: .*401.* Put the key into OPENAI_API_KEY"),
        (
            [400, 404, 400],
            r"refuses every request, the last with: .*no 400.* by the name m \(labels.server.model\)",
        ),
        ([500], "refuses to answer: .*500.* Look into the server's log"),
        ([DROP], "cannot be reached .* Start the server, or fix labels.server.url"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_before_the_first_prompt(replies, tokenizer, prompts, faults, message):
    replies.faults = list(faults)
    with serve(replies), pytest.raises(CaftuneError, match=message):
        ask(replies, tokenizer, prompts, retries=0)
    assert len(replies.requests) == len(faults)


def test_missing_answers_end_the_stage_and_the_next_run_asks_for_them_alone(replies, greedy, tokenizer, tmp_path):
    rows = [{"prompt": prompt(m)} for m in molecules(6, seed=3, substituents=(0, 2))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies.faults = [None, None, 500]
    with serve(replies):
        server = {"url": replies.url, "retries": 0, "concurrency": 1}
        labels = {"prompts": str(tmp_path / "data.jsonl"), "max_new_tokens": 12, "temperature": 0}
        labels |= {"backend": "server", "server": server}
        values = {"output": str(tmp_path / "run"), "model": {"name": str(BASE)}, "labels": labels}
        recipe = Recipe.model_validate(values)
        with pytest.raises(CaftuneError, match=r"1 prompts have no answer \(the first is row 1, from 0: .*500"):
            label_prompts(recipe)
        assert not (tmp_path / "run" / "labels" / "labels.jsonl").exists()
        assert len(replies.requests) == 7
        label_prompts(recipe)
        assert len(replies.requests) == 9  # a word, and the prompt that had failed
        assert replies.requests[-1]["model"] == str(BASE)
    found = read_labels(tmp_path / "run" / "labels" / "labels.jsonl")
    assert [label.row for label in found] == list(range(6))
    assert [label.completion_ids for label in found] == [greedy(label.prompt_ids)[:12] for label in found]


def test_labels_from_a_server_with_every_fault_lose_and_invent_no_answer(replies, greedy, tokenizer, tmp_path, capsys):
    kinds = list(MALFORMED.values())
    rows = [{"prompt": prompt(m)} for m in molecules(len(kinds) + 8, seed=3, substituents=(0, 2))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies.gives_ids = False
    # tokens, transformers and plain for the first words; then a fault of every kind among answers
    replies.faults = [None, None, None, None, *kinds, 500, *HARMLESS.values(), DROP]
    with serve(replies):
        server = {"url": replies.url, "retries": 0, "concurrency": 1}
        labels = {"prompts": str(tmp_path / "data.jsonl"), "max_new_tokens": 12, "temperature": 0, "skip_failed": True}
        labels |= {"backend": "server", "server": server}
        values = {"output": str(tmp_path / "run"), "model": {"name": str(BASE)}, "labels": labels}
        recipe = Recipe.model_validate(values)
        found = read_labels(label_prompts(recipe))
        missing = {*range(1, len(kinds) + 2), len(kinds) + 6}
        assert {label.row for label in found} == set(range(len(rows))) - missing
        failed = len(missing)
        assert json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])["failed"] == failed
        assert f"{failed} prompts have no answer (the first is row 1, from 0:" in capsys.readouterr().err
        found = read_labels(label_prompts(recipe))
    assert [label.row for label in found] == list(range(len(rows)))
    assert [label.completion_ids for label in found] == [greedy(label.prompt_ids)[:12] for label in found]
