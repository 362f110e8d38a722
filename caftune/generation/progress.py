"""The progress bar of answers."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


class AnswersProgress:
    """A progress bar of answers. The time left is estimated from the average pace of finished answers.

    The bar is drawn every half second (every half minute without a terminal) and not at every answer: answers come a batch
    at a time, and the first answer of a batch would be counted with the time of the whole batch.
    """

    def __init__(self, total: int, done: int, name: str) -> None:
        self.bar = tqdm(total=total, initial=done, desc=name, unit=" answers", smoothing=0, miniters=total + 1)
        self._began, self._tokens, self._failed = time.monotonic(), 0, 0

    def answered(self, tokens: int) -> None:
        """Count a finished answer of `tokens` tokens."""
        self._tokens += tokens
        self.bar.update()

    def failed(self) -> None:
        """Count a prompt that gets no answer."""
        self._failed += 1
        self.bar.total -= 1

    def draw(self) -> None:
        """Draw the bar."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        facts = {"tokens/s": f"{self._tokens / seconds:.0f}"} if self._tokens else {}
        self.bar.set_postfix({**facts, **({"failed": self._failed} if self._failed else {})})


@contextmanager
def answers_progress(total: int, done: int, name: str, *, every_s: float | None = None) -> Iterator[AnswersProgress]:
    """A progress bar for the block, drawn periodically and at the end."""
    found, ended = AnswersProgress(total, done, name), threading.Event()
    pause = every_s or (0.5 if sys.stderr.isatty() else 30.0)

    def draw() -> None:
        while not ended.wait(pause):
            found.draw()

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.draw()
        found.bar.close()
