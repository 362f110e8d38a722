"""Replies of servers, checked: an answer as text or token ids, why it ended, and its number of tokens.

A malformed reply is a `BadReply`, which fails its prompt alone.
"""

import json
from dataclasses import dataclass
from typing import Any

_SHOWN = 80  # characters of a malformed reply
_REASON = 300  # characters of an error
# The fields to which a chat endpoint may move parts of an answer, and the parser that does.
_REASONING = "reasoning parser (vLLM, SGLang: no --reasoning-parser; llama-server: --reasoning-format none)"
_TOOLS = "tool parser (vLLM, SGLang: no --tool-call-parser)"
_PARSERS = {"reasoning_content": _REASONING, "reasoning": _REASONING, "tool_calls": _TOOLS, "function_call": _TOOLS}


class BadReply(Exception):
    """A reply without an answer. `remedy`: what to do, where every reply will be like it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(one_line(reason))
        self.remedy = remedy


@dataclass(frozen=True)
class Reply:
    """An answer's text, why it ended, its token ids and its number of tokens (None where the server gives none)."""

    text: str
    finish: str
    ids: list[int] | None = None
    count: int | None = None


def json_object(reply: bytes) -> dict[str, Any]:
    """The JSON object that a reply is. Raises BadReply for anything else."""
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError) as error:  # cut off, not UTF-8, HTML, nested too deeply
        raise BadReply(f"the reply must be JSON ({one_line(str(error))}), got {_shown(reply)}") from error
    if not isinstance(found, dict):
        raise BadReply(f"the reply must be a JSON object, got {_shown(found)}")
    return found


def completion(reply: dict[str, Any]) -> Reply:
    """The answer in a reply of /v1/completions."""
    choice = _only_choice(reply)
    ids = _token_ids(choice.get("token_ids"))
    return Reply(_text(choice.get("text")), str(choice.get("finish_reason")), ids, _count(reply))


def chat_completion(reply: dict[str, Any]) -> Reply:
    """The answer in a reply of /v1/chat/completions. Refusals, and answers that parsers have split, raise BadReply."""
    choice = _only_choice(reply)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise BadReply(f"the reply must hold a message, got {_shown(choice)}")
    if message.get("refusal"):
        raise BadReply(f"the server gave a refusal instead of an answer: {_shown(message['refusal'])}")
    parts = [part for part in _PARSERS if message.get(part)]
    if parts:
        raise BadReply(
            f"the server separated {' and '.join(parts)} from the answer; switch its parsers off",
            f"Start the server without its {_PARSERS[parts[0]]}, or let it take texts (/v1/completions).",
        )
    return Reply(_text(message.get("content")), str(choice.get("finish_reason")), None, _count(reply))


def llama_server_completion(reply: dict[str, Any], allowed: int) -> Reply:
    """The answer in a reply of llama-server's /completion, cut to `allowed` tokens: it adds some to complete a character."""
    if reply.get("truncated"):
        raise BadReply(
            "the server's context is too small for prompt and answer",
            "Start llama-server with more context for each slot (--ctx-size, --parallel).",
        )
    ids, stopped = _token_ids(reply.get("tokens")), reply.get("stop_type")
    if not ids or stopped not in ("eos", "limit"):
        raise BadReply(f"the reply must hold token ids of an answer, got {_shown(reply)}")
    is_whole = stopped == "eos" and len(ids) <= allowed
    return Reply("", "stop" if is_whole else "length", ids[:allowed], min(len(ids), allowed))


def unspellable(text: str) -> BadReply:
    """The error for a text that no tokens of the base's tokenizer write."""
    return BadReply(
        f"the tokenizer of model.name must be able to spell the server's text, got {_shown(text)}; serve the same model"
    )


def one_line(message: str) -> str:
    """The beginning of an error in one line, with lone surrogates escaped, so that it can be written to files."""
    return " ".join(message.split())[:_REASON].encode("utf-8", "backslashreplace").decode("utf-8")


def _only_choice(reply: dict[str, Any]) -> dict[str, Any]:
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


def _shown(value: Any) -> str:
    """The beginning of a malformed value."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
