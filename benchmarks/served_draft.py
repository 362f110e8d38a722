"""What a server's drafts with an exported head are worth, next to caftune's own decoding with that head.

    python benchmarks/served_draft.py MODEL HEADS --drafting http://127.0.0.1:8001 --alone http://127.0.0.1:8000

MODEL is served by vLLM twice, with and without `--speculative-config` (the commands are in docs/decoding.md). Both servers and
caftune (drafts of one token) answer the same questions greedily, one after another. Prints Markdown: the number of equal
answers, and drafted and accepted tokens with the 95% interval of their share (Wilson's). The servers' counters are read before
and after, so that they may have answered other questions.
"""

import argparse
import json
import math
import re
import urllib.request

import torch
from transformers.utils import logging

from caftune.generation.backends import Sampling
from caftune.generation.server import Server, server_backend
from caftune.pipeline.generate import Writer

QUESTIONS = (
    *("Why do leaves change their colour in autumn?", "How do I boil an egg?", "Describe a harbour at dawn."),
    *("Name three uses of baking soda.", "What is a prime number?", "Write a short thank-you note to a neighbour."),
    *("How does a bicycle stay upright?", "Explain what a budget is to a child.", "List five birds that cannot fly."),
    *("What happens when water freezes?", "Give me a recipe for tomato soup.", "How can I fall asleep faster?"),
    *("What did the Romans build?", "Write a poem of four lines about rain.", "Why is the sky blue?"),
    *("Compare trains and planes for short journeys.", "How do I plant potatoes?", "What is the use of a compiler?"),
    *("Describe the taste of a lemon.", "Suggest a name for a small bookshop and say why."),
)


def counters(url: str) -> tuple[int, int]:
    """The tokens that vLLM has drafted and accepted since its start."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    names = ("draft", "accepted")
    found = [re.search(rf"^vllm:spec_decode_num_{name}_tokens_total\S* (\S+)$", text, re.MULTILINE) for name in names]
    drafted, accepted = (int(float(number[1])) if number else 0 for number in found)
    return drafted, accepted


def interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.96, hits / count
    middle, width = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - width) / (1 + z**2 / count), (middle + width) / (1 + z**2 / count)


def main() -> None:
    """Query both servers and caftune, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("heads")
    parser.add_argument("--drafting", required=True)
    parser.add_argument("--alone", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()

    writer = Writer(options.model, options.heads, length=1)
    prompts = writer.prompts(QUESTIONS, None)
    sampling = Sampling(options.max_new_tokens, 0.0)
    written = list(writer.write(prompts, sampling))
    answers = {"caftune": [one.ids for one in written]}
    drafts = {
        "caftune": tuple(sum(getattr(one.drafting, name)[0] for one in written) for name in ("drafted", "accepted"))
    }
    for name in ("alone", "drafting"):
        url = getattr(options, name)
        before = counters(url)
        server = Server(f"{url}/v1", options.model, concurrency=1)
        found = dict(server_backend(server, writer.tokenizer, sampling, writer.ends)(prompts, [0] * len(prompts)))
        answers[name] = [found[number].ids for number in range(len(prompts))]
        drafts[name] = tuple(now - then for now, then in zip(counters(url), before, strict=True))

    def equal(one: str, other: str) -> int:
        return sum(a == b for a, b in zip(answers[one], answers[other], strict=True))

    print("| | drafted | accepted | share | 95% interval |\n|---|---|---|---|---|")
    for name, label in (("drafting", "vLLM with the exported head"), ("caftune", "caftune, drafts of one token")):
        drafted, accepted = drafts[name]
        low, high = interval(accepted, drafted)
        print(f"| {label} | {drafted} | {accepted} | {accepted / drafted:.3f} | {low:.3f} to {high:.3f} |")
    print(
        f"\nEqual answers of {len(prompts)}: vLLM with and without the head {equal('drafting', 'alone')}, "
        f"vLLM without it and caftune {equal('alone', 'caftune')}."
    )
    print(json.dumps({"drafts": drafts, "tokens": sum(map(len, answers["caftune"]))}))


if __name__ == "__main__":
    main()
