"""Self-generated labels: exact tokens, both ways of batching, and resuming."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.data import DataError
from caftune.demo.chemistry import molecules, prompt
from caftune.demo.run import BASE
from caftune.labels import Sampling, encode_prompts, generate_labels, label_dataset, read_labels, refuse_long_prompts

GREEDY = Sampling(max_new_tokens=24, temperature=0, batch_size=4, batching="static")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows = Dataset.from_list([{"prompt": prompt(m)} for m in molecules(10, seed=9, substituents=(0, 2))])
    return dict(enumerate(encode_prompts(rows, tokenizer)))


def alone(model, ids, count=24):
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2, eos_token_id=1)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_greedy_answers_are_those_of_generate_one_by_one(model, tokenizer, prompts, tmp_path, batching):
    sampling = Sampling(max_new_tokens=24, temperature=0, batch_size=4, batching=batching)
    generate_labels(model, tokenizer, prompts, tmp_path / "labels.jsonl", sampling)
    labels = read_labels(tmp_path / "labels.jsonl")
    assert [label.row for label in labels] == list(prompts)
    for label in labels:
        expected = alone(model, prompts[label.row])
        assert label.completion_ids == expected
        assert label.finish == ("stop" if expected[-1] == 1 else "length")


def test_a_cut_off_answer_gets_no_false_end(model, tokenizer, prompts, tmp_path):
    sampling = Sampling(max_new_tokens=3, temperature=0, batching="static")
    generate_labels(model, tokenizer, prompts, tmp_path / "labels.jsonl", sampling)
    labels = read_labels(tmp_path / "labels.jsonl")
    assert {label.finish for label in labels} == {"length"}
    row = label_dataset(labels)[0]
    assert row["labels"] == [-100] * len(prompts[0]) + labels[0].completion_ids
    assert row["input_ids"] == prompts[0] + labels[0].completion_ids
    assert tokenizer.eos_token_id not in row["input_ids"]


def test_sampled_answers_follow_the_seed(model, tokenizer, prompts, tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sampling = Sampling(max_new_tokens=24, temperature=1.5, batching="static", seed=seed)
        generate_labels(model, tokenizer, prompts, tmp_path / name, sampling)
        texts.append([label.completion for label in read_labels(tmp_path / name)])
    assert texts[0] == texts[1] != texts[2]


def test_a_resumed_run_keeps_rows_and_adds_the_missing_ones(model, tokenizer, prompts, tmp_path):
    path = tmp_path / "labels.jsonl"
    generate_labels(model, tokenizer, prompts, path, GREEDY)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:30])  # killed within a line
    generate_labels(model, tokenizer, prompts, path, GREEDY)
    assert path.read_bytes().startswith(b"".join(lines[:6]))
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_finished_run_asks_nothing(tokenizer, prompts, tmp_path, model):
    path = tmp_path / "labels.jsonl"
    generate_labels(model, tokenizer, prompts, path, GREEDY)
    before = path.read_bytes()
    generate_labels(None, tokenizer, prompts, path, GREEDY)
    assert path.read_bytes() == before


def test_a_killed_process_loses_and_repeats_no_row(tmp_path):
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt(m)} for m in molecules(400, seed=9, substituents=(2, 4))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"output: {tmp_path}/run\nmodel: {{name: {BASE}}}\n"
        f"labels: {{prompts: {data}, max_new_tokens: 40, batch_size: 10, temperature: 0}}\n"
    )
    command = [sys.executable, "-m", "caftune.cli", "label", str(tmp_path / "recipe.yaml")]
    path = tmp_path / "run" / "labels" / "labels.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.is_file() and path.read_bytes().count(b"\n") >= 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    assert 20 <= kept.count(b"\n") < 400
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    written = [json.loads(line)["row"] for line in path.read_text().splitlines()]
    assert sorted(written) == list(range(400))
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])


def test_a_prompt_to_be_continued_is_not_closed(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    closing = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    rows = Dataset.from_list([{"prompt": "a b"}, {"prompt": ""}])
    assert encode_prompts(rows, closing) == [[0, 2, 3], [0]]


def test_messages_need_a_chat_template(tokenizer):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(DataError, match="The data has messages, and .* has no chat template"):
        encode_prompts(rows, tokenizer)


def test_a_chat_prompt_ends_where_the_assistant_speaks():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "CCO"}, {"role": "assistant", "content": "no"}]}]
    )
    assert tokenizer.decode(encode_prompts(rows, tokenizer)[0]) == "user: CCO\nassistant:"


def test_long_prompts_are_counted_and_named():
    with pytest.raises(DataError, match=r"1 of 3 prompts \(rows 1, from 0\) are longer than the 4 tokens"):
        refuse_long_prompts([[1], [1] * 5, [1] * 4], 4)


def test_a_line_that_is_no_label_is_named(tmp_path):
    (tmp_path / "x").write_text('{"row": 0}\n')
    with pytest.raises(DataError, match="line 1: not a label"):
        read_labels(tmp_path / "x")


def test_penalties_of_the_base_do_not_enter_the_labels(model, tokenizer, prompts, tmp_path):
    texts = []
    for name, penalty in (("a", None), ("b", 3.0)):
        model.generation_config.repetition_penalty = penalty
        generate_labels(model, tokenizer, prompts, tmp_path / name, GREEDY)
        texts.append([label.completion for label in read_labels(tmp_path / name)])
    assert model.generation_config.repetition_penalty == 3.0
    model.generation_config.repetition_penalty = None
    assert texts[0] == texts[1]


def test_tools_and_conversational_prompts_are_rendered_as_in_training(tokenizer):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ tools | length if tools else 0 }}{% for m in messages %}{{ m.content }}{% endfor %}>"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "CC"}], "tools": tools}])
    assert chatty.decode(encode_prompts(rows, chatty)[0]) == "1CC>"
