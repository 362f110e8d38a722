"""Answers from a server with an OpenAI-compatible interface: vLLM, SGLang, `transformers serve`, any other.

Servers accept different fields. A short prompt is sent in each *dialect* until one is answered:

    llama.cpp     llama-server's own /completion: prompts and answers as token ids; only for servers with its /props
    tokens        prompts as token ids, answers with token ids where the server gives them (vLLM, SGLang)
    transformers  text, and transformers' own generation settings (`transformers serve`); only for servers that refuse unknown
                  fields, since a server that ignored the settings would sample differently
    plain         text, and OpenAI's own fields
    chat          messages, and OpenAI's own fields, for servers that accept nothing else

Conversations are rendered here and sent as text where the server's tokenizer makes the same tokens of it: a chat endpoint
changes answers (it separates a thinking part or tool calls). Answers that come as text are tokenized here: see spellings.py.
To add a server, add a dialect to `DIALECTS`, a condition to `_is_for` if it needs one, and its request to `_request`.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any, Literal, cast

from caftune.data.prompts import Conversation, Prompt, apply_template
from caftune.errors import CaftuneError
from caftune.generation import replies
from caftune.generation.backends import Answer, Backend, Failure, Sampling, padding_token, until_end
from caftune.generation.replies import BadReply, Reply, one_line
from caftune.generation.spellings import Decoding, find_spelling

if TYPE_CHECKING:
    from openai import OpenAI

DIALECTS = ("llama.cpp", "tokens", "transformers", "plain", "chat")
# Statuses for a request that a server does not understand, for an address that it does not have, and of errors that are the
# prompt's and not the server's.
_REFUSED, _ABSENT, _OF_PROMPT = (400, 415, 422), (404, 405, 501), (400, 413, 415, 422)
_FIRST_TRIES = 3  # of the test prompt in a dialect, where the reply is malformed


class RequestError(Exception):
    """No reply (`status` None), or one with an error's status."""

    def __init__(self, error: Exception) -> None:
        reply = getattr(error, "response", None)
        text = f"{error} {reply.text}" if reply is not None and reply.text not in str(error) else str(error)
        super().__init__(one_line(text) or type(error).__name__)
        self.status: int | None = getattr(error, "status_code", None)


@dataclass(frozen=True)
class Server:
    """A server and the limits of its use."""

    url: str  # its address up to `/v1`
    model: str  # the name it serves the base under
    concurrency: int = 16  # requests under way at a time
    # Of one request, after a lost connection, a timeout or an answer 408, 409, 429 or 5xx. The wait doubles from half a second
    # to 8 seconds, or is the server's Retry-After.
    retries: int = 10
    timeout_s: float = 600.0  # of one request
    requests_per_minute: float | None = None  # a limit, retries included; None: no limit
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the API key


def server_backend(server: Server, tokenizer: Any, sampling: Sampling, eos: Sequence[int]) -> Backend:
    """A backend that queries `server`.

    A prompt without an answer after its retries, or with a malformed reply, is a `Failure`; the others continue.

    Raises:
        CaftuneError: the openai package is missing, or (before the first prompt) the server cannot be reached or refuses to
            answer.
    """
    link = _Link(_client(server), server, tokenizer, sampling, eos)

    def answer(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Iterator[tuple[int, Answer | Failure]]:
        nonlocal link
        if not link.dialect and prompts:
            link = _with_dialect(link, prompts[0])
        yield from _in_parallel(
            lambda index: _answer_prompt(link, prompts[index], seeds[index]), range(len(prompts)), server.concurrency
        )

    return answer


@dataclass(frozen=True)
class _Link:
    """A server's client, the settings of every request, the dialect of requests, and how answers given as text are decoded."""

    client: "OpenAI"
    server: Server
    tokenizer: Any
    sampling: Sampling
    eos: Sequence[int]
    dialect: str = ""
    decoding: Decoding = "unknown"

    @property
    def root(self) -> str:
        return self.server.url.rstrip("/").removesuffix("/v1")

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """The JSON object of a reply. Raises BadReply or RequestError."""
        return self._read(lambda: self.client.post(path, cast_to=bytes, body=body))

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object of a reply, tried once. Raises BadReply or RequestError."""
        return self._read(lambda: self.client.with_options(max_retries=0).get(path, cast_to=bytes))

    def _read(self, request: Callable[[], bytes]) -> dict[str, Any]:
        import openai

        try:
            return replies.json_object(request())
        except openai.OpenAIError as error:
            raise RequestError(error) from error


def _client(server: Server) -> "OpenAI":
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise CaftuneError(
            "labels.backend=server needs the openai package. Install it with `pip install 'caftune[server]'`."
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
    """A hook for every HTTP request, retries included, that waits so as to keep the limit."""
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


def _with_dialect(link: _Link, prompt: Prompt) -> _Link:
    """The link with the first dialect in which the server answers a short prompt of `prompt`'s kind (text or conversation).

    Raises:
        CaftuneError: the server cannot be reached, or gives no answer in any dialect.
    """
    is_chat, text = prompt.messages is not None, "Once upon a"
    short = Conversation(messages=[{"role": "user", "content": text}]) if is_chat else Conversation(text)
    tried, server = short.prompt(0, [], link.tokenizer), link.server
    probe = replace(
        link,
        client=link.client.with_options(max_retries=min(server.retries, 2)),  # so that a wrong address is reported soon
        sampling=replace(link.sampling, max_new_tokens=1, temperature=0.0),
    )
    refusal: BadReply | RequestError | None = None
    for name in DIALECTS if is_chat else DIALECTS[:-1]:
        try:
            decoding = _try_dialect(replace(probe, dialect=name), tried)
        except BadReply as error:
            refusal = error
        except RequestError as error:
            if error.status not in _REFUSED + _ABSENT:
                raise _unusable(server, error) from error
            refusal = error
        else:
            if decoding is not None:
                return replace(link, dialect=name, decoding=decoding)
    what = "gives no answer to any request" if isinstance(refusal, BadReply) else "refuses every request"
    remedy = (
        f"Check that it serves a model by the name {server.model} (labels.server.model), and that labels.server.url ends in "
        "/v1."
    )
    raise CaftuneError(
        f"{server.url} {what}, the last with: {refusal}. {getattr(refusal, 'remedy', '') or remedy}"
    ) from refusal


def _unusable(server: Server, error: RequestError) -> CaftuneError:
    if error.status is None:
        return CaftuneError(f"{server.url} cannot be reached ({error}). Start the server, or fix labels.server.url.")
    remedy = "Look into the server's log."
    if error.status in (401, 403):
        remedy = f"Put the key into {server.key_variable} (labels.server.key_variable)."
    return CaftuneError(f"{server.url} refuses to answer: {error}. {remedy}")


def _try_dialect(link: _Link, prompt: Prompt) -> Decoding | None:
    """How the server decodes, as far as its reply to a short prompt shows; None where the dialect is not for it.

    Raises:
        BadReply, RequestError: it gives no answer in this dialect.
    """
    if not _is_for(link):
        return None
    reply = _first_reply(link, prompt)
    if link.dialect == "transformers":  # 5.23 decodes an answer alone
        return "alone"
    # A text that begins with a space was decoded together with its prompt.
    return "behind" if prompt.messages is None and reply.text.startswith(" ") else "unknown"


def _first_reply(link: _Link, prompt: Prompt) -> Reply:
    """The reply to a prompt, requested again where it is malformed."""
    for _ in range(_FIRST_TRIES - 1):
        with suppress(BadReply):
            return _request(link, prompt, 0)
    return _request(link, prompt, 0)


def _is_for(link: _Link) -> bool:
    """Whether a dialect may fit the server."""
    if link.dialect == "llama.cpp":
        try:
            return "default_generation_settings" in link.get(f"{link.root}/props")
        except (RequestError, BadReply):
            return False
    return link.dialect != "transformers" or _refuses_unknown_fields(link)


def _refuses_unknown_fields(link: _Link) -> bool:
    unknown = {"model": link.server.model, "prompt": "a", "max_tokens": 1, "caftune_unknown": 1}
    try:
        link.post("/completions", unknown)
    except BadReply:
        return False
    except RequestError as error:
        if error.status not in _REFUSED + _ABSENT:
            raise
        return error.status in _REFUSED
    return False


def _answer_prompt(link: _Link, prompt: Prompt, seed: int) -> Answer | Failure:
    """The server's answer to a prompt, or why there is none."""
    try:
        reply = _request(link, prompt, seed)
        answer = _answer(link, prompt, reply)
    except BadReply as error:
        return Failure(str(error))
    except RequestError as error:
        return Failure(str(error), is_lost=error.status not in _OF_PROMPT)
    allowed = link.sampling.max_new_tokens
    if link.dialect != "transformers" or (reply.finish == "stop" and len(answer.ids) <= allowed):
        return answer
    return replace(answer, ids=answer.ids[:allowed], finish="length")  # one token more was requested


def _request(link: _Link, prompt: Prompt, seed: int) -> Reply:
    """The server's reply to one prompt.

    Raises:
        BadReply: the reply has no answer.
        RequestError: no reply, or a refusal.
        CaftuneError: the server does not know a setting of the recipe.
    """
    seed %= 2**31
    sampling = link.sampling
    if link.dialect == "llama.cpp":
        return _request_llama_server(link, prompt, seed)
    body: dict[str, Any] = {
        "model": link.server.model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
    }
    if link.dialect == "tokens":
        body |= {
            "prompt": prompt.ids,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(link.eos),
            "return_token_ids": True,
            "skip_special_tokens": False,  # if the answer comes as text after all, it must have them
        }
        return replies.completion(link.post("/completions", body))
    if link.dialect == "transformers":  # one token more: 5.23 reports "length" if the last one is EOS
        longer = replace(sampling, max_new_tokens=sampling.max_new_tokens + 1)
        config = longer.generation_config(link.eos, padding_token(link.tokenizer))
        body |= {"max_tokens": longer.max_new_tokens, "generation_config": json.dumps(config.to_diff_dict())}
    elif sampling.top_k:
        raise CaftuneError(
            f"labels.top_k must be 0 with {link.server.url}, which knows only OpenAI's own fields, got {sampling.top_k}."
        )
    return _request_text(link, prompt, body)


def _request_text(link: _Link, prompt: Prompt, body: dict[str, Any]) -> Reply:
    text = None if link.dialect == "chat" else _as_text(prompt, link.tokenizer)
    if text is not None:
        return replies.completion(link.post("/completions", {**body, "prompt": text}))
    options = dict(prompt.options)
    tools = options.pop("tools", None)
    more = {"tools": tools, "chat_template_kwargs": options, "messages": prompt.messages}
    given = {name: value for name, value in more.items() if value or name == "messages"}
    return replies.chat_completion(link.post("/chat/completions", {**body, **given}))


def _request_llama_server(link: _Link, prompt: Prompt, seed: int) -> Reply:
    """Query llama-server's own endpoint, which gives the ids of an answer, its end-of-text token included.

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
    return replies.llama_server_completion(link.post(f"{link.root}/completion", body), sampling.max_new_tokens)


def _as_text(prompt: Prompt, tokenizer: Any) -> str | None:
    """A text that a server's tokenizer (which adds BOS) turns into exactly the prompt's tokens; None where there is none."""
    if prompt.text is not None:
        return prompt.text
    rendered = _rendered(prompt, tokenizer)
    bare = rendered.removeprefix(tokenizer.bos_token or "")
    return next((text for text in (bare, rendered) if tokenizer(text)["input_ids"] == prompt.ids), None)


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    return apply_template(prompt.messages or [], prompt.options, tokenizer, add_generation_prompt=True, tokenize=False)


def _answer(link: _Link, prompt: Prompt, reply: Reply) -> Answer:
    """The answer of a reply as token ids: the server's, else those that spell its text after the prompt.

    Raises:
        BadReply: it ended neither by itself nor by its length (a content filter, for example), or no tokens write its text.
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
        decoding=link.decoding,
        adds_special=prompt.text is not None,
    )
    if ids is None:
        raise replies.unspellable(text)
    return _closed(ids, reply.finish, _ends_of(prompt, tokenizer, link.eos), exact=False)


def _ends_of(prompt: Prompt, tokenizer: Any, eos: Sequence[int]) -> Sequence[int]:
    """The end-of-text tokens, first the one that ends an answer to this prompt: a conversation's template writes it."""
    if prompt.messages is None or len(eos) < 2:
        return eos
    answered = [*prompt.messages, {"role": "assistant", "content": "a"}]
    ids = apply_template(answered, prompt.options, tokenizer, return_dict=True)["input_ids"]
    first = next((token for token in ids[len(prompt.ids) :] if token in eos), eos[0])
    return [first, *(token for token in eos if token != first)]


def _closed(ids: list[int], finish: str, eos: Sequence[int], *, exact: bool) -> Answer:
    """The answer up to its end-of-text token, which servers leave out of a text."""
    found = until_end(ids, set(eos))
    if found.finish == "stop":
        return Answer(found.ids, "stop", exact)
    if finish not in ("stop", "length"):
        raise BadReply(f"the server ended the answer with {finish!r}")
    return Answer([*ids, eos[0]] if finish == "stop" and eos else ids, cast(Literal["stop", "length"], finish), exact)


def _in_parallel(
    query: Callable[[int], Answer | Failure], indices: range, concurrency: int
) -> Iterator[tuple[int, Answer | Failure]]:
    """Send `concurrency` requests at a time; stop when the server is lost for twice as many prompts in a row.

    The pool's threads are daemons: when the command is stopped, it does not wait for requests under way.
    """
    lost, lock = 0, threading.Lock()

    def query_unless_given_up(index: int) -> tuple[int, Answer | Failure]:
        nonlocal lost
        if lost >= 2 * concurrency:
            return index, Failure("not sent, because the server had stopped answering")
        result = query(index)
        with lock:  # malformed replies do not count: such a server still answers
            lost = lost + 1 if isinstance(result, Failure) and result.is_lost else 0
        return index, result

    with ThreadPool(concurrency) as pool:
        yield from pool.imap_unordered(query_unless_given_up, indices)
