"""Labels from a real `transformers serve` on loopback, killed in the middle."""

import sys
from pathlib import Path

from served import Served, free_port, labels_with_a_kill


def test_a_real_server_killed_in_the_middle_gives_the_labels_of_this_process(shared, tmp_path):
    base, port = str(shared / "models" / "stories260k"), free_port()
    labels = {"limit": 203, "skip_long_prompts": True, "max_new_tokens": 24, "temperature": 0}
    labels["prompts"] = str(shared / "data" / "instructions" / "alpaca_en_demo.json")
    command = [Path(sys.executable).with_name("transformers"), "serve", base, "--host", "127.0.0.1", "--port", port]
    server = Served([*command, "--device", "cpu"], port, tmp_path / "log")
    try:
        server.wait()
        ours, theirs = labels_with_a_kill(server, base, labels, tmp_path, kill_after=60)
    finally:
        server.stop()
    assert len(ours) >= 200
    for name in ("row", "turn", "prompt_ids", "completion", "finish"):
        assert [getattr(label, name) for label in ours] == [getattr(label, name) for label in theirs]
    # The server gives text. A model that spells a word otherwise than its tokenizer does is told by its text alone.
    spelled = [one.completion_ids == other.completion_ids for one, other in zip(ours, theirs, strict=True)]
    assert sum(spelled) >= 0.98 * len(ours)
