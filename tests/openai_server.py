"""A small server with OpenAI's interface on loopback, whose faults are chosen: what other servers do, in the tests.

It answers a prompt with the greedy continuation of a real model, as token ids (like vLLM or llama-server) or as text, and keeps
every request.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a request may meet instead of an answer: a status, or one of these.
DROP, SLOW, EMPTY = "drop", "slow", "empty"


@dataclass
class Replies:
    """How the server behaves, and what it was asked.

    Args:
        answer: token ids of a prompt (ids or text) -> token ids of the answer, end included.
        decode: token ids -> text.
        gives_ids: take prompts as token ids and give the answer's; False: text alone, unknown fields are refused or ignored.
        refuses: fields that get a 400, as strict servers do.
        finish: what is said of why an answer ended; None: the truth.
        parts: of a chat message, beside its content.
        faults: for each request in turn a status, DROP (the connection), SLOW (a second), EMPTY (status 200 without an answer)
            a function that makes another body (bytes, or a value for JSON) of the answer's, or None for an answer; after the
            last, answers.
        behind: prompt (ids or text) and token ids -> text, for servers that decode an answer behind its prompt.
        llama: also llama-server's own /props and /completion.
    """

    answer: Callable[[Any], list[int]]
    decode: Callable[[list[int]], str]
    eos: int
    gives_ids: bool = True
    refuses: tuple[str, ...] = ()
    faults: list[Any] = field(default_factory=list)
    finish: str | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    behind: Callable[[Any, list[int]], str] | None = None
    llama: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Server(ThreadingHTTPServer):
    """Says nothing of connections that a client broke off."""

    daemon_threads = True
    replies: "Replies"

    def handle_error(self, *_: Any) -> None:
        """Nothing: a stopped client is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One request; the server it belongs to holds the `Replies`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        has_props = self.server.replies.llama and self.path == "/props"
        self._send(200 if has_props else 404, {"default_generation_settings": {"n_ctx": 256}, "total_slots": 1})

    def do_POST(self) -> None:
        replies: Replies = self.server.replies
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with replies.lock:
            fault = replies.faults.pop(0) if replies.faults else None
            replies.requests.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
            replies.times.append(time.monotonic())
            replies.at_once += 1
            replies.most_at_once = max(replies.most_at_once, replies.at_once)
        try:
            self._meet(replies, body, fault)
        finally:
            with replies.lock:
                replies.at_once -= 1

    def _meet(self, replies: Replies, body: dict[str, Any], fault: Any) -> None:
        refused = [name for name in replies.refuses if name in body]
        if isinstance(body.get("prompt"), list) and not replies.gives_ids:
            refused.append("prompt")
        if fault == DROP:
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, int) or refused:
            status = fault if isinstance(fault, int) else 400
            self._send(status, {"error": {"message": f"no {' '.join(refused) or status}"}})
        else:
            time.sleep(1.0 if fault == SLOW else 0.0)
            answer = _own_answer if self.path == "/completion" else _answer
            found = {"error": "busy"} if fault == EMPTY else answer(replies, body)
            self._send(200, fault(found) if callable(fault) else found)

    def _send(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0.3")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at the requests kept."""


def _answer(replies: Replies, body: dict[str, Any]) -> dict[str, Any]:
    ids = replies.answer(body["messages"] if "messages" in body else body["prompt"])[: body["max_tokens"]]
    said = [token for token in ids if token != replies.eos]
    text = replies.behind(body["prompt"], said) if replies.behind else replies.decode(said)
    finish = replies.finish or ("stop" if ids[-1] == replies.eos else "length")
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "text": text}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": text, **replies.parts}
    if body.get("return_token_ids") and replies.gives_ids:
        choice["token_ids"] = ids
    usage = {"prompt_tokens": 1, "completion_tokens": len(ids), "total_tokens": 1 + len(ids)}
    return {"id": "x", "object": "o", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def _own_answer(replies: Replies, body: dict[str, Any]) -> dict[str, Any]:
    """What llama-server's own /completion gives: a flat object, ids only where they are asked for, the end among them."""
    ids = replies.answer(body["prompt"])[: body["n_predict"]]
    return {
        "content": replies.decode([token for token in ids if token != replies.eos]),
        "tokens": ids if body.get("return_tokens") else [],
        "stop": True,
        "stop_type": "eos" if ids[-1] == replies.eos else "limit",
        "tokens_predicted": len(ids),
        "truncated": False,
    }


@contextmanager
def serve(replies: Replies) -> Iterator[Replies]:
    """Serve within the block."""
    server = Server(("127.0.0.1", 0), Handler)
    server.replies = replies
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    replies.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield replies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
