"""Sampling answers from a server with an OpenAI-compatible interface: vLLM, SGLang, `transformers serve`, any other.

Servers differ in what they understand; a word is sent in each *dialect* until one is accepted:

    tokens        prompts as token ids, answers with token ids where the server gives them (vLLM, SGLang): nothing is lost
    transformers  text, and transformers' own generation settings (`transformers serve`); only for servers that refuse fields
                  they do not know, since one that overlooked the settings would draw otherwise than asked
    plain         text, and OpenAI's own fields
    chat          messages, and OpenAI's own fields, for servers that take nothing else

Conversations go as text too, rendered here, where the server's tokenizer will make the same tokens of it: what a chat
endpoint makes of an answer (a thinking part set aside, tool calls) is not what the model wrote. Answers that come as text are
tokenized here, after their prompt, as the text that follows it.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any, Literal, cast

from caftune.errors import CaftuneError
from caftune.generation import Answer, Backend, Failure, Sampling, until_end
from caftune.prompts import Conversation, Prompt, as_written

if TYPE_CHECKING:
    from openai import OpenAI

DIALECTS = ("tokens", "transformers", "plain", "chat")
# What servers answer to a request they do not understand, and to one for an address they do not have.
_REFUSED, _ABSENT = (400, 415, 422), (404, 405, 501)


@dataclass(frozen=True)
class Server:
    """Where the server is and how it is treated.

    Args:
        url: its address up to `/v1`.
        model: the name it serves the base under.
        concurrency: requests under way at a time.
        retries: of one request, after a lost connection, a timeout or an answer 408, 409, 429 or 5xx. The wait doubles from
            half a second to 8 seconds, or is what the server asks for (Retry-After).
        timeout_s: of one request, in seconds.
        requests_per_minute: at most so many, retries included; None: no limit.
        key_variable: the environment variable that holds the API key.
    """

    url: str
    model: str
    concurrency: int = 16
    retries: int = 10
    timeout_s: float = 600.0
    requests_per_minute: float | None = None
    key_variable: str = "OPENAI_API_KEY"


def server_backend(server: Server, tokenizer: Any, sampling: Sampling, eos: Sequence[int]) -> Backend:
    """A backend that asks `server`. A prompt that is given up after its retries is a `Failure`; the others go on.

    Raises:
        CaftuneError: the openai package is missing, or (before the first prompt) the server is not there or refuses to answer.
    """
    client = _client(server)
    dialect: str | None = None

    def answer(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Iterator[tuple[int, Answer | Failure]]:
        nonlocal dialect
        import openai

        def ask(index: int) -> Answer | Failure:
            try:
                return _ask(client, server, str(dialect), prompts[index], tokenizer, sampling, eos, seeds[index])
            except openai.OpenAIError as error:
                return Failure(_reason(error))

        if dialect is None and prompts:
            dialect = _dialect(client, server, prompts[0], tokenizer, sampling, eos)
        yield from _in_parallel(ask, range(len(prompts)), server.concurrency)

    return answer


def _client(server: Server) -> "OpenAI":
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise CaftuneError(
            "labels.backend=server needs the openai package. Install it with `pip install caftune[server]`."
        ) from error
    pace = _pace(server.requests_per_minute)
    return OpenAI(
        base_url=server.url,
        api_key=os.environ.get(server.key_variable) or "none",
        max_retries=server.retries,
        timeout=server.timeout_s,
        http_client=DefaultHttpxClient(event_hooks={"request": [pace]}) if pace else None,
    )


def _pace(requests_per_minute: float | None) -> Callable[[Any], None] | None:
    """A hook that every HTTP request passes, retries too, and that lets so many through a minute."""
    if requests_per_minute is None:
        return None
    lock, gap, due = threading.Lock(), 60 / requests_per_minute, 0.0

    def wait_for_turn(_request: Any) -> None:
        nonlocal due
        with lock:
            turn = max(due, time.monotonic())
            due = turn + gap
        time.sleep(max(0.0, turn - time.monotonic()))

    return wait_for_turn


def _dialect(
    client: "OpenAI", server: Server, prompt: Prompt, tokenizer: Any, sampling: Sampling, eos: Sequence[int]
) -> str:
    """The first dialect in which the server answers one word, asked as `prompt` is: as a text or in a conversation."""
    import openai

    client = client.with_options(max_retries=min(server.retries, 2))  # a wrong address is told soon
    word = Conversation("a") if prompt.messages is None else Conversation(messages=[{"role": "user", "content": "a"}])
    asked, short = word.prompt(0, [], tokenizer), replace(sampling, max_new_tokens=1)
    refusal = ""
    for dialect in DIALECTS:
        try:
            if dialect == "chat" and prompt.messages is None:
                continue
            if dialect == "transformers" and not _refuses_unknown_fields(client, server):
                continue
            _ask(client, server, dialect, asked, tokenizer, short, eos, 0)
            return dialect
        except openai.APIStatusError as error:
            if error.status_code not in _REFUSED + _ABSENT:
                raise CaftuneError(
                    f"{server.url} refuses to answer: {_reason(error)}. {_remedy(error, server)}"
                ) from error
            refusal = _reason(error)
        except openai.OpenAIError as error:
            raise CaftuneError(
                f"{server.url} cannot be reached ({_reason(error)}). Start the server, or mend labels.server.url."
            ) from error
    raise CaftuneError(
        f"{server.url} refuses every request of ours, the last with: {refusal}. Check that it serves a model by the name "
        f"{server.model} (labels.server.model), and that labels.server.url ends in /v1."
    )


def _refuses_unknown_fields(client: "OpenAI", server: Server) -> bool:
    """Whether the server refuses a request with a field that nobody knows."""
    import openai

    try:
        client.completions.create(model=server.model, prompt="a", max_tokens=1, extra_body={"caftune_unknown": 1})
    except openai.APIStatusError as error:
        if error.status_code in _REFUSED + _ABSENT:
            return error.status_code in _REFUSED
        raise
    return False


def _remedy(error: Any, server: Server) -> str:
    if error.status_code in (401, 403):
        return f"Put the key into {server.key_variable} (labels.server.key_variable)."
    return "Look into the server's log."


def _ask(
    client: "OpenAI",
    server: Server,
    dialect: str,
    prompt: Prompt,
    tokenizer: Any,
    sampling: Sampling,
    eos: Sequence[int],
    seed: int,
) -> Answer:
    common: dict[str, Any] = {
        "model": server.model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed % 2**31,
    }
    if dialect == "tokens":
        more = {
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(eos),
            "return_token_ids": True,
        }
        choice = _only(client.completions.create(prompt=prompt.ids, extra_body=more, **common))
        ids = (choice.model_extra or {}).get("token_ids")
        if ids:
            return _closed(list(ids), choice.finish_reason, eos, exact=True)
        return _from_text(choice.text, choice.finish_reason, None, prompt, tokenizer, eos)
    if dialect != "transformers":
        if sampling.top_k:
            raise CaftuneError(
                f"labels.top_k must be 0 with {server.url}, which knows only OpenAI's own fields, got {sampling.top_k}."
            )
        reply = _ask_for_text(client, prompt, tokenizer, common, {}, as_chat=dialect == "chat")
        return _from_text(*reply, prompt, tokenizer, eos)
    # transformers 5.23 says "length" of an answer that ended with the last token it was allowed: it is given one more.
    longer = replace(sampling, max_new_tokens=sampling.max_new_tokens + 1)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = json.dumps(longer.generation_config(eos, pad).to_diff_dict())
    common["max_tokens"] = longer.max_new_tokens
    text, finish, count = _ask_for_text(client, prompt, tokenizer, common, {"generation_config": settings})
    found = _from_text(text, finish, count, prompt, tokenizer, eos)
    is_whole = finish == "stop" and len(found.ids) <= sampling.max_new_tokens
    return found if is_whole else replace(found, ids=found.ids[: sampling.max_new_tokens], finish="length")


def _ask_for_text(
    client: "OpenAI",
    prompt: Prompt,
    tokenizer: Any,
    common: dict[str, Any],
    more: dict[str, Any],
    *,
    as_chat: bool = False,
) -> tuple[str, str, int | None]:
    """The answer's text, why it ended, and its number of tokens where the server says it."""
    written = None if as_chat else _as_text(prompt, tokenizer)
    if written is not None:
        reply = client.completions.create(prompt=written, extra_body=more, **common)
        choice = _only(reply)
        return choice.text, choice.finish_reason, reply.usage.completion_tokens if reply.usage else None
    options = dict(prompt.options)
    tools = options.pop("tools", None)
    if tools:
        common = {**common, "tools": tools}
    if options:
        more = {**more, "chat_template_kwargs": options}
    messages: Any = prompt.messages
    talk = client.chat.completions.create(messages=messages, extra_body=more, **common)
    choice = _only(talk)
    _refuse_parsed(choice.message)
    return choice.message.content or "", choice.finish_reason, talk.usage.completion_tokens if talk.usage else None


def _as_text(prompt: Prompt, tokenizer: Any) -> str | None:
    """A text that a server's tokenizer makes these very tokens of (it adds BOS itself); None where there is none."""
    if prompt.text is not None:
        return prompt.text
    rendered = _rendered(prompt, tokenizer)
    bare = rendered.removeprefix(tokenizer.bos_token or "")
    return next((text for text in (bare, rendered) if tokenizer(text)["input_ids"] == prompt.ids), None)


def _refuse_parsed(message: Any) -> None:
    """A chat endpoint that has taken an answer apart no longer has what the model wrote."""
    import openai

    extra = message.model_extra or {}
    parts = [
        name for name in ("tool_calls", "reasoning_content", "reasoning") if getattr(message, name, extra.get(name))
    ]
    if parts:
        raise openai.OpenAIError(f"the server set {' and '.join(parts)} apart from the answer; switch its parsers off")


def _only(reply: Any) -> Any:
    """The one choice of a reply. Some servers report an error with status 200 and without one."""
    import openai

    choices = getattr(reply, "choices", None)
    if not choices:
        raise openai.OpenAIError(f"the reply holds no answer: {reply}")
    return choices[0]


def _from_text(text: str, finish: str, count: int | None, prompt: Prompt, tokenizer: Any, eos: Sequence[int]) -> Answer:
    """An answer given as text, as the tokens that write it after its prompt.

    Some decoders drop a space before the first word. Where both spellings give this text, the server's own count of tokens
    decides, and where it cannot, whether the prompt ends with a space.
    """
    before = prompt.text if prompt.text is not None else _rendered(prompt, tokenizer)
    gaps = ("", " ") if before[-1:].isspace() else (" ", "")
    width = len(prompt.ids)
    spellings = [
        tokenizer(before + gap + text, add_special_tokens=prompt.text is not None)["input_ids"] for gap in gaps
    ]
    tails = [ids[width:] for ids in spellings if ids[:width] == prompt.ids]
    tails = [ids[:-1] if ids and ids[-1] in eos else ids for ids in tails]  # some tokenizers close every text
    found = [ids for ids in tails if tokenizer.decode(ids, skip_special_tokens=True) == text]
    found = found or [tokenizer(text, add_special_tokens=False)["input_ids"]]
    wanted = None if count is None else count - (finish == "stop")
    ids = next((ids for ids in found if len(ids) == wanted), found[0])
    return _closed(ids, finish, _ends_of(prompt, tokenizer, eos), exact=False)


def _ends_of(prompt: Prompt, tokenizer: Any, eos: Sequence[int]) -> Sequence[int]:
    """The end-of-text tokens, first the one that ends an answer to this prompt: a conversation's template writes it."""
    if prompt.messages is None or len(eos) < 2:
        return eos
    answered = [*prompt.messages, {"role": "assistant", "content": "a"}]
    ids = as_written(answered, prompt.options, tokenizer, return_dict=True)["input_ids"]
    first = next((token for token in ids[len(prompt.ids) :] if token in eos), eos[0])
    return [first, *(token for token in eos if token != first)]


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    return as_written(prompt.messages or [], prompt.options, tokenizer, add_generation_prompt=True, tokenize=False)


def _closed(ids: list[int], finish: str | None, eos: Sequence[int], *, exact: bool) -> Answer:
    """The answer up to its end-of-text token, which servers leave out of a text.

    Raises:
        OpenAIError: it ended in another way (a content filter, say): not as the model would have it.
    """
    import openai

    found = until_end(ids, set(eos))
    if found.finish == "stop":
        return Answer(found.ids, "stop", exact)
    if finish not in ("stop", "length"):
        raise openai.OpenAIError(f"the server ended the answer with {finish!r}")
    return Answer([*ids, eos[0]] if finish == "stop" and eos else ids, cast(Literal["stop", "length"], finish), exact)


def _in_parallel(
    ask: Callable[[int], Answer | Failure], indices: range, concurrency: int
) -> Iterator[tuple[int, Answer | Failure]]:
    """Ask with so many requests under way; stop asking while nothing but failures has come for twice as many.

    The pool's threads are daemons: when the command is stopped, nobody waits for requests under way.
    """
    failures = 0

    def ask_unless_given_up(index: int) -> tuple[int, Answer | Failure]:
        nonlocal failures
        if failures >= 2 * concurrency:
            return index, Failure("not asked, because the server had stopped answering")
        result = ask(index)
        failures = failures + 1 if isinstance(result, Failure) else 0
        return index, result

    with ThreadPool(concurrency) as pool:
        yield from pool.imap_unordered(ask_unless_given_up, indices)


def _reason(error: Exception) -> str:
    reply = getattr(error, "response", None)
    said = f"{error} {reply.text}" if reply is not None and reply.text not in str(error) else str(error)
    return " ".join(said.split())[:300] or type(error).__name__
