"""Sampling answers from a server with an OpenAI-compatible interface: vLLM, SGLang, `transformers serve`, any other.

Servers differ in what they understand; a short prompt is sent in each *dialect* until one is answered:

    llama.cpp     llama-server's own /completion: prompts and answers as token ids; only for servers with its /props
    tokens        prompts as token ids, answers with token ids where the server gives them (vLLM, SGLang): nothing is lost
    transformers  text, and transformers' own generation settings (`transformers serve`); only for servers that refuse fields
                  they do not know, since one that overlooked the settings would draw otherwise than asked
    plain         text, and OpenAI's own fields
    chat          messages, and OpenAI's own fields, for servers that take nothing else

Conversations go as text too, rendered here, where the server's tokenizer will make the same tokens of it: what a chat
endpoint makes of an answer (a thinking part set aside, tool calls) is not what the model wrote. Answers that come as text are
tokenized here: see spellings.py. A reply that is malformed in any way is a failure of its prompt alone.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any, Literal, cast

from caftune.data.prompts import Conversation, Prompt, apply_template
from caftune.errors import CaftuneError
from caftune.generation.backends import Answer, Backend, Failure, Sampling, padding_token, until_end
from caftune.generation.spellings import Decoding, find_spelling

if TYPE_CHECKING:
    from openai import OpenAI

DIALECTS = ("llama.cpp", "tokens", "transformers", "plain", "chat")
# What servers answer to a request they do not understand, and to one for an address they do not have.
_REFUSED, _ABSENT = (400, 415, 422), (404, 405, 501)
_FIRST_TRIES = 3  # of the test prompt in a dialect, where the reply is malformed
_SHOWN = 80  # characters of a malformed reply
# The fields to which a chat endpoint may move parts of an answer, and the parser that does.
_REASONING = "reasoning parser (vLLM, SGLang: no --reasoning-parser; llama-server: --reasoning-format none)"
_TOOLS = "tool parser (vLLM, SGLang: no --tool-call-parser)"
_PARSERS = {
    "reasoning_content": _REASONING,
    "reasoning": _REASONING,
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
}


class BadReply(Exception):
    """A reply without an answer. `remedy`: what to do, where every reply will be like it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


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
        requests_per_minute: a limit, retries included; None: no limit.
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
    """A backend that asks `server`.

    A prompt that is given up after its retries, or whose reply is malformed, is a `Failure`; the others continue.

    Raises:
        CaftuneError: the openai package is missing, or (before the first prompt) the server is not there or refuses to answer.
    """
    link = _Link(_client(server), server, tokenizer, sampling, eos)
    dialect: _Dialect | None = None

    def answer(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Iterator[tuple[int, Answer | Failure]]:
        nonlocal dialect
        if dialect is None and prompts:
            dialect = _dialect(link, prompts[0])
        chosen = cast(_Dialect, dialect)
        yield from _in_parallel(
            lambda index: _answer_prompt(link, chosen, prompts[index], seeds[index]),
            range(len(prompts)),
            server.concurrency,
        )

    return answer


@dataclass(frozen=True)
class _Link:
    """A server's client, and the settings of every request."""

    client: "OpenAI"
    server: Server
    tokenizer: Any
    sampling: Sampling
    eos: Sequence[int]


@dataclass(frozen=True)
class _Dialect:
    """The kind of requests that a server answers, and how it decodes answers given as text."""

    name: str
    decoding: Decoding = "unknown"


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


def _dialect(link: _Link, prompt: Prompt) -> _Dialect:
    """The first dialect in which the server answers a short prompt of `prompt`'s kind (text or conversation)."""
    is_chat = prompt.messages is not None
    words = "Once upon a"
    said = Conversation(messages=[{"role": "user", "content": words}]) if is_chat else Conversation(words)
    server = link.server
    short = replace(
        link,
        client=link.client.with_options(max_retries=min(server.retries, 2)),  # so that a wrong address is reported soon
        sampling=replace(link.sampling, max_new_tokens=1, temperature=0.0),
    )
    tried = said.prompt(0, [], link.tokenizer)
    refusal: Exception | None = None
    for name in DIALECTS:
        if name == "chat" and not is_chat:
            continue
        found = _try_dialect(short, name, tried)
        if isinstance(found, _Dialect):
            return found
        refusal = found or refusal
    what = "gives no answer to any request" if isinstance(refusal, BadReply) else "refuses every request"
    remedy = (
        f"Check that it serves a model by the name {server.model} (labels.server.model), and that labels.server.url ends in "
        "/v1."
    )
    raise CaftuneError(
        f"{server.url} {what}, the last with: {_reason(refusal)}. {getattr(refusal, 'remedy', '') or remedy}"
    ) from refusal


def _try_dialect(link: _Link, name: str, tried: Prompt) -> "_Dialect | Exception | None":
    """The dialect where the server answers in it; else the error, or None where it was not tried.

    Raises:
        CaftuneError: the server cannot be reached, or refuses every request.
    """
    import openai

    server, refusal = link.server, None
    try:
        if not _is_for(link, name):
            return None
        for _ in range(_FIRST_TRIES):
            try:
                return _Dialect(name, _decoding(name, _request(link, _Dialect(name), tried, 0), tried))
            except BadReply as error:
                refusal = error
    except openai.APIStatusError as error:
        if error.status_code in _REFUSED + _ABSENT:
            return error
        raise CaftuneError(f"{server.url} refuses to answer: {_reason(error)}. {_remedy(error, server)}") from error
    except openai.OpenAIError as error:
        raise CaftuneError(
            f"{server.url} cannot be reached ({_reason(error)}). Start the server, or fix labels.server.url."
        ) from error
    return refusal


def _is_for(link: _Link, name: str) -> bool:
    """Whether a dialect may fit the server."""
    if name == "llama.cpp":
        return _has_props(link)
    return name != "transformers" or _refuses_unknown_fields(link)


def _has_props(link: _Link) -> bool:
    """Whether the server has llama-server's /props."""
    import openai

    once = replace(link, client=link.client.with_options(max_retries=0))
    try:
        return "default_generation_settings" in _read(once, "GET", f"{_root(link.server)}/props")
    except (openai.OpenAIError, BadReply):
        return False


def _root(server: Server) -> str:
    return server.url.rstrip("/").removesuffix("/v1")


def _refuses_unknown_fields(link: _Link) -> bool:
    """Whether the server refuses a request with a field that nobody knows."""
    import openai

    unknown = {"model": link.server.model, "prompt": "a", "max_tokens": 1, "caftune_unknown": 1}
    try:
        _read(link, "POST", "/completions", unknown)
    except openai.APIStatusError as error:
        if error.status_code in _REFUSED + _ABSENT:
            return error.status_code in _REFUSED
        raise
    except BadReply:
        return False
    return False


def _decoding(name: str, reply: "_Reply", tried: Prompt) -> Decoding:
    """How the server decodes, as far as its reply to the short prompt shows.

    `transformers serve` (5.23) decodes an answer alone. A text that begins with a space was decoded together with its prompt.
    """
    if name == "transformers":
        return "alone"
    return "behind" if tried.messages is None and reply.text.startswith(" ") else "unknown"


def _remedy(error: Any, server: Server) -> str:
    if error.status_code in (401, 403):
        return f"Put the key into {server.key_variable} (labels.server.key_variable)."
    return "Look into the server's log."


def _answer_prompt(link: _Link, dialect: _Dialect, prompt: Prompt, seed: int) -> Answer | Failure:
    """The server's answer to a prompt, or why there is none."""
    import openai

    try:
        reply = _request(link, dialect, prompt, seed)
        if dialect.name != "transformers":
            return _answer(link, dialect, prompt, reply)
        return _as_allowed(_answer(link, dialect, prompt, reply), reply, link.sampling.max_new_tokens)
    except BadReply as error:
        return Failure(_reason(error))
    except openai.OpenAIError as error:
        return Failure(_reason(error), is_lost=_is_lost(error))


def _as_allowed(answer: Answer, reply: "_Reply", allowed: int) -> Answer:
    """An answer of `transformers serve`, which was allowed one more token: 5.23 reports "length" if the last one is EOS."""
    is_whole = reply.finish == "stop" and len(answer.ids) <= allowed
    return answer if is_whole else replace(answer, ids=answer.ids[:allowed], finish="length")


@dataclass(frozen=True)
class _Reply:
    """A server's reply: the answer's text, why it ended, its token ids and its number of tokens (None where not given)."""

    text: str
    finish: str
    ids: list[int] | None = None
    count: int | None = None


def _request(link: _Link, dialect: _Dialect, prompt: Prompt, seed: int) -> _Reply:
    """Ask for one answer.

    Raises:
        BadReply: the reply has no answer.
        openai.OpenAIError: no reply, or a refusal.
        CaftuneError: the server does not know a setting of the recipe.
    """
    seed %= 2**31
    if dialect.name == "llama.cpp":
        return _request_llama_server(link, prompt, seed)
    allowed = link.sampling.max_new_tokens + (dialect.name == "transformers")
    body: dict[str, Any] = {
        "model": link.server.model,
        "max_tokens": allowed,
        "temperature": link.sampling.temperature,
        "top_p": link.sampling.top_p,
        "seed": seed,
    }
    if dialect.name == "tokens":
        more = {
            "top_k": link.sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(link.eos),
            "return_token_ids": True,
            "skip_special_tokens": False,  # if the answer comes as text after all, it must have them
        }
        return _completion(_read(link, "POST", "/completions", {**body, **more, "prompt": prompt.ids}))
    if dialect.name == "transformers":
        longer = replace(link.sampling, max_new_tokens=allowed)
        body["generation_config"] = json.dumps(
            longer.generation_config(link.eos, padding_token(link.tokenizer)).to_diff_dict()
        )
    elif link.sampling.top_k:
        raise CaftuneError(
            f"labels.top_k must be 0 with {link.server.url}, which knows only OpenAI's own fields, got {link.sampling.top_k}."
        )
    return _request_text(link, prompt, body, as_chat=dialect.name == "chat")


def _request_text(link: _Link, prompt: Prompt, body: dict[str, Any], *, as_chat: bool) -> _Reply:
    written = None if as_chat else _as_text(prompt, link.tokenizer)
    if written is not None:
        return _completion(_read(link, "POST", "/completions", {**body, "prompt": written}))
    options = dict(prompt.options)
    tools = options.pop("tools", None)
    if tools:
        body = {**body, "tools": tools}
    if options:
        body = {**body, "chat_template_kwargs": options}
    return _chat(_read(link, "POST", "/chat/completions", {**body, "messages": prompt.messages}))


def _request_llama_server(link: _Link, prompt: Prompt, seed: int) -> _Reply:
    """Ask llama-server's own endpoint, which gives the ids of an answer, its end-of-text token included.

    Samplers are set in transformers' order, without the server's defaults. Its prompt cache is off, because an answer would
    depend, by rounding, on earlier prompts.
    """
    sampling = link.sampling
    body = {
        "model": link.server.model,
        "prompt": prompt.ids,
        "n_predict": sampling.max_new_tokens,
        "samplers": ["temperature", "top_k", "top_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": seed,
        "cache_prompt": False,
        "return_tokens": True,
    }
    found = _read(link, "POST", f"{_root(link.server)}/completion", body)
    if found.get("truncated"):
        raise BadReply(
            "the server's context is too small for prompt and answer",
            "Start llama-server with more context for each slot (--ctx-size, --parallel).",
        )
    ids = _token_ids(found.get("tokens"))
    stopped = found.get("stop_type")
    if not ids or stopped not in ("eos", "limit"):
        raise BadReply(f"the reply must hold token ids of an answer, got {_shown(found)}")
    allowed = sampling.max_new_tokens  # it adds some tokens to complete a character
    ended = stopped == "eos" and len(ids) <= allowed
    return _Reply("", "stop" if ended else "length", ids[:allowed], min(len(ids), allowed))


def _read(link: _Link, method: Literal["GET", "POST"], path: str, body: Any = None) -> dict[str, Any]:
    """The JSON object of a reply.

    Raises:
        BadReply: it is something else.
    """
    client = link.client
    reply = client.get(path, cast_to=bytes) if method == "GET" else client.post(path, cast_to=bytes, body=body)
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError) as error:  # cut off, not UTF-8, HTML, nested too deeply
        raise BadReply(f"the reply must be JSON ({_reason(error)}), got {_shown(reply)}") from error
    if not isinstance(found, dict):
        raise BadReply(f"the reply must be a JSON object, got {_shown(found)}")
    return found


def _completion(reply: dict[str, Any]) -> _Reply:
    choice = _only(reply)
    ids = _token_ids(choice.get("token_ids"))
    return _Reply(_text(choice.get("text")), str(choice.get("finish_reason")), ids, _count(reply))


def _chat(reply: dict[str, Any]) -> _Reply:
    choice = _only(reply)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise BadReply(f"the reply must hold a message, got {_shown(choice)}")
    _refuse_parsed(message)
    return _Reply(_text(message.get("content")), str(choice.get("finish_reason")), None, _count(reply))


def _only(reply: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a reply. Some servers report an error with status 200 and without one."""
    choices = reply.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    raise BadReply(f"the reply must hold an answer, got {_shown(reply)}")


def _text(content: Any) -> str:
    """The text of an answer, also given as text parts. An empty text is an answer; a missing one is not."""
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadReply(f"the answer must be text, got {_shown(content)}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadReply(f"the answer must be text, got half a surrogate pair ({_shown(content)})") from error
    return content


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("text", "output_text") and isinstance(part.get("text"), str)


def _token_ids(given: Any) -> list[int] | None:
    """The ids that a server gave, None where it gave none."""
    if given is None:
        return None
    if isinstance(given, list) and all(type(token) is int and token >= 0 for token in given):
        return given
    raise BadReply(f"the answer's token ids must be whole numbers >= 0, got {_shown(given)}")


def _count(reply: dict[str, Any]) -> int | None:
    """The server's count of tokens, usually with the end-of-text token; None where it gives none."""
    usage = reply.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _refuse_parsed(message: dict[str, Any]) -> None:
    """Refuse refusals, and answers that the server's parsers have split: the model's text is then lost."""
    if message.get("refusal"):
        raise BadReply(f"the server gave a refusal instead of an answer: {_shown(message['refusal'])}")
    parts = [part for part in _PARSERS if message.get(part)]
    if parts:
        raise BadReply(
            f"the server set {' and '.join(parts)} apart from the answer; switch its parsers off",
            f"Start the server without its {_PARSERS[parts[0]]}, or let it take texts (/v1/completions).",
        )


def _as_text(prompt: Prompt, tokenizer: Any) -> str | None:
    """A text that a server's tokenizer (which adds BOS) turns into exactly the prompt's tokens; None where there is none."""
    if prompt.text is not None:
        return prompt.text
    rendered = _rendered(prompt, tokenizer)
    bare = rendered.removeprefix(tokenizer.bos_token or "")
    return next((text for text in (bare, rendered) if tokenizer(text)["input_ids"] == prompt.ids), None)


def _answer(link: _Link, dialect: _Dialect, prompt: Prompt, reply: _Reply) -> Answer:
    """The answer of a reply as token ids: the server's, else those that spell its text after the prompt.

    Raises:
        BadReply: it ended in another way than by its end or its length (a content filter, say): not as the model would have it;
            or no tokens write its text.
    """
    if reply.ids:
        found = _closed(reply.ids, reply.finish, link.eos, exact=True)
        # Servers also end at end-of-text tokens that the model's configuration does not name.
        return replace(found, ids=reply.ids) if found.ids[:-1] == reply.ids and reply.count == len(reply.ids) else found
    tokenizer, ended = link.tokenizer, reply.finish == "stop"
    # An answer cut off within a character ends in a replacement character, which the model did not write.
    text = reply.text if ended else reply.text.rstrip("\N{REPLACEMENT CHARACTER}")
    ids = find_spelling(
        text,
        prompt.ids,
        prompt.text if prompt.text is not None else _rendered(prompt, tokenizer),
        tokenizer,
        ends=link.eos,
        lengths=[] if reply.count is None else [reply.count - ended, reply.count],
        decoding=dialect.decoding,
        adds_special=prompt.text is not None,
    )
    if ids is None:
        raise BadReply(
            f"the tokenizer of model.name must be able to spell the server's text, got {_shown(text)}; serve the same model"
        )
    return _closed(ids, reply.finish, _ends_of(prompt, tokenizer, link.eos), exact=False)


def _ends_of(prompt: Prompt, tokenizer: Any, eos: Sequence[int]) -> Sequence[int]:
    """The end-of-text tokens, first the one that ends an answer to this prompt: a conversation's template writes it."""
    if prompt.messages is None or len(eos) < 2:
        return eos
    answered = [*prompt.messages, {"role": "assistant", "content": "a"}]
    ids = apply_template(answered, prompt.options, tokenizer, return_dict=True)["input_ids"]
    first = next((token for token in ids[len(prompt.ids) :] if token in eos), eos[0])
    return [first, *(token for token in eos if token != first)]


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    return apply_template(prompt.messages or [], prompt.options, tokenizer, add_generation_prompt=True, tokenize=False)


def _closed(ids: list[int], finish: str, eos: Sequence[int], *, exact: bool) -> Answer:
    """The answer up to its end-of-text token, which servers leave out of a text."""
    found = until_end(ids, set(eos))
    if found.finish == "stop":
        return Answer(found.ids, "stop", exact)
    if finish not in ("stop", "length"):
        raise BadReply(f"the server ended the answer with {finish!r}")
    return Answer([*ids, eos[0]] if finish == "stop" and eos else ids, cast(Literal["stop", "length"], finish), exact)


def _in_parallel(
    ask: Callable[[int], Answer | Failure], indices: range, concurrency: int
) -> Iterator[tuple[int, Answer | Failure]]:
    """Send `concurrency` requests at a time; stop when the server is lost for twice as many prompts in a row.

    The pool's threads are daemons: when the command is stopped, nobody waits for requests under way.
    """
    lost, lock = 0, threading.Lock()

    def ask_unless_given_up(index: int) -> tuple[int, Answer | Failure]:
        nonlocal lost
        if lost >= 2 * concurrency:
            return index, Failure("not sent, because the server had stopped answering")
        result = ask(index)
        with lock:  # malformed replies do not count: such a server still answers
            lost = lost + 1 if isinstance(result, Failure) and result.is_lost else 0
        return index, result

    with ThreadPool(concurrency) as pool:
        yield from pool.imap_unordered(ask_unless_given_up, indices)


def _is_lost(error: Exception) -> bool:
    """Whether an error is due to the server (gone, busy, broken), not to the prompt."""
    return getattr(error, "status_code", 500) not in (400, 413, 415, 422)


def _reason(error: Exception | None) -> str:
    reply = getattr(error, "response", None)
    said = f"{error} {reply.text}" if reply is not None and reply.text not in str(error) else str(error)
    return _printable(" ".join(said.split())[:300]) or type(error).__name__


def _shown(value: Any) -> str:
    """The beginning of a malformed value, for errors."""
    said = repr(value)
    return _printable(said if len(said) <= _SHOWN else f"{said[:_SHOWN]}...")


def _printable(text: str) -> str:
    """The text with lone surrogates escaped, so that it can be written to files."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
