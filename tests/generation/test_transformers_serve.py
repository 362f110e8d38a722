"""Labels from a real `transformers serve` on loopback, killed in the middle."""

import sys
from pathlib import Path

from served import Served, labels_with_a_kill


def test_a_real_server_killed_in_the_middle_gives_the_labels_of_this_process(shared, tmp_path):
    base = str(shared / "models" / "stories260k")
    labels = {"limit": 203, "skip_long_prompts": True, "max_new_tokens": 24, "temperature": 0}
    labels["prompts"] = str(shared / "data" / "instructions" / "alpaca_en_demo.json")
    command = [Path(sys.executable).with_name("transformers"), "serve", base, "--device", "cpu"]
    with Served(command, tmp_path / "log") as server:
        ours, theirs = labels_with_a_kill(server, base, labels, tmp_path, kill_after=60)
    assert len(ours) >= 200
    for name in ("row", "turn", "prompt_ids", "completion", "finish"):
        assert [getattr(label, name) for label in ours] == [getattr(label, name) for label in theirs]
    # The server gives text. A model that spells a word otherwise than its tokenizer does is told by its text alone.
    spelled = [one.completion_ids == other.completion_ids for one, other in zip(ours, theirs, strict=True)]
    assert sum(spelled) >= 0.98 * len(ours)
