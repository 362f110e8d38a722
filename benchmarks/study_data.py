"""The study's tasks: their splits, tokenized once, and the sums of the positive control (docs/study/protocol.md)."""

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from caftune import CAFTConfig
from caftune.core.objective import IGNORED
from caftune.data.readers import raw_rows
from caftune.demo.chemistry import Molecule, completion, molecules, prompt
from caftune.demo.run import BASE, PROMPT_SEED, SUBSTITUENTS, TEST_SEED, TRAIN_SEED
from caftune.evals.task import Example
from caftune.evals.tasks import TASKS
from caftune.training.prepare import prepare

SPLIT_SEED = 2026
TRAINED_ON, VALIDATED, TESTED = 6000, 300, 400  # the most rows of each split
SUMS_TESTED = 1000
Row = dict[str, Any]
NUMBERS, MODULUS = 5, 5  # of the control's sums


@dataclass(frozen=True)
class Splits:
    """The tokenized rows (`input_ids`, `labels`) of a task, and the examples of the test rows, for scores."""

    train: Dataset
    validation: Dataset
    test: Dataset
    examples: list[Example]


@dataclass(frozen=True)
class Model:
    """A base of the study.

    Args:
        place: folder, with {shared} and {models} for the options of those names; empty: built from `control_config`.
        tasks: of this model.
        length: the longest row, in tokens; longer ones are left out.
        batch: rows of a step.
        tunings: full, lora.
        validated, tested: the most rows of these splits.
    """

    place: str
    tasks: tuple[str, ...]
    length: int
    batch: int = 16
    tunings: tuple[str, ...] = ("full",)
    validated: int = 300
    tested: int = 400

    def folder(self, folders: Mapping[str, Path]) -> str:
        """The folder, with the places of data and models filled in."""
        return self.place.format(**folders)


MODELS = {
    "demo": Model(str(BASE), ("names",), 192),
    "smiles-gpt2": Model("{shared}/models/smiles-gpt2-0.5m", ("chebi20",), 72),
    "stories260k": Model("{shared}/models/stories260k", ("gsm8k",), 256),
    "smollm2": Model(
        "{models}/smollm2-135m-instruct", ("names", "gsm8k", "mts_dialog"), 192, 8, ("lora", "full"), 60, 100
    ),
    "control": Model("", ("prefix_sums",), 64, 64),
}
CONCEPTS = {"names": "smiles", "chebi20": "smiles", "gsm8k": "words", "mts_dialog": "words"}
SCORED_BY = {"names": "molecules", "gsm8k": "gsm8k", "mts_dialog": "mts_dialog"}


def control_config() -> LlamaConfig:
    """The control's model, which begins at random."""
    return LlamaConfig(
        vocab_size=len(control_tokenizer()),
        **{"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0},
    )


def control_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: a number, or `=` before the answer."""
    words = ["<pad>", "<end>", "=", *map(str, range(MODULUS))]
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def prefix_sums(rng: random.Random) -> tuple[str, str]:
    """(prompt, answer): random numbers, =; the sums of the first 5, 4, ... 1 of them, modulo 5."""
    numbers = [rng.randrange(MODULUS) for _ in range(NUMBERS)]
    sums = [total % MODULUS for total in accumulate(numbers)]
    return f"{' '.join(map(str, numbers))} =", " ".join(map(str, reversed(sums)))


def control_rows(count: int, seed: int, tokenizer: Any) -> Dataset:
    """Sums as rows of tokens, of which the answer and the end are labelled."""
    rng, known = random.Random(seed), tokenizer.get_vocab()
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for _ in range(count):
        asked, answer = (text.split() for text in prefix_sums(rng))
        ids = [known[word] for word in (*asked, *answer, "<end>")]
        rows["input_ids"].append(ids)
        rows["labels"].append([IGNORED] * len(asked) + ids[len(asked) :])
    return Dataset.from_dict(rows)


def tokenizer_of(model: str, folders: Mapping[str, Path]) -> Any:
    """The tokenizer of a base."""
    if model == "control":
        return control_tokenizer()
    return AutoTokenizer.from_pretrained(MODELS[model].folder(folders))


def splits_of(model: str, task: str, folders: Mapping[str, Path], tokenizer: Any) -> Splits:
    """The task's rows that are short enough for the model."""
    if model == "control":
        test = control_rows(SUMS_TESTED, SPLIT_SEED, tokenizer)
        return Splits(test.select([]), control_rows(VALIDATED, SPLIT_SEED + 1, tokenizer), test, [])
    length, shared = MODELS[model].length, folders["shared"]
    if task == "chebi20":
        train, held = (
            tokens_of_smiles(_smiles(shared / f"data/chebi20/{file}.jsonl"), tokenizer, length)
            for file in ("validation", "test")
        )
        _, drawn = _drawn(range(len(held)), VALIDATED + TESTED)
        return Splits(train, held.select(drawn[:VALIDATED]), held.select(drawn[VALIDATED:]), [])
    parts = ROWS[task](shared, SCORED_BY[task], model == "stories260k")
    made = [_tokens(rows, tokenizer, length, is_chat=model == "smollm2") for rows, _ in parts]
    limits = (TRAINED_ON, min(VALIDATED, MODELS[model].validated), min(TESTED, MODELS[model].tested))
    kept = [(rows.select(range(min(limit, len(rows)))), fits) for (rows, fits), limit in zip(made, limits, strict=True)]
    examples = parts[2][1]
    tested = [examples[number] for number in kept[2][1][: len(kept[2][0])]]
    return Splits(kept[0][0], kept[1][0], kept[2][0], tested)


Part = tuple[list[Row], list[Example]]  # rows of prompt and completion, with their examples


def _held_out_molecules() -> list[Molecule]:
    return molecules(TESTED + VALIDATED, seed=TEST_SEED, substituents=SUBSTITUENTS)


def write_demo_data(folder: Path, count: int) -> None:
    """The files of the demo's recipe: `count` names for stage 1, none of validation or test; one row of each other file."""
    exclude = {molecule.smiles for molecule in _held_out_molecules()}
    files = {"prompts": (PROMPT_SEED, count), "train": (TRAIN_SEED, 1), "test": (TRAIN_SEED, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (seed, rows) in files.items():
        found = molecules(rows, seed=seed, substituents=SUBSTITUENTS, exclude=exclude)
        answers = [{} if name == "prompts" else {"completion": completion(molecule)} for molecule in found]
        made = [{"prompt": prompt(molecule), **answer} for molecule, answer in zip(found, answers, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def _names(_shared: Path, _task: str, _bare: bool) -> list[Part]:
    held_out = _held_out_molecules()
    exclude = {molecule.smiles for molecule in held_out}
    train = molecules(TRAINED_ON, seed=TRAIN_SEED, substituents=SUBSTITUENTS, exclude=exclude)
    parts = []
    for chosen in (train, held_out[TESTED:], held_out[:TESTED]):
        rows = [{"prompt": prompt(molecule), "completion": completion(molecule)} for molecule in chosen]
        examples = [Example(str(n), row["prompt"], row["completion"].strip()) for n, row in enumerate(rows)]
        parts.append((rows, examples))
    return parts


def _gsm8k(shared: Path, task: str, is_bare: bool) -> list[Part]:
    train, test = (
        [dict(row) for row in raw_rows(str(shared / f"data/gsm8k/{part}.jsonl"))] for part in ("train", "test")
    )
    pool, validation = _drawn(train, 4 * VALIDATED)  # most are too long for the smallest model
    _, test = _drawn(test, len(test))
    return [_asked(rows, task, "answer", is_bare) for rows in (pool, validation, test)]


def _mts_dialog(shared: Path, task: str, is_bare: bool) -> list[Part]:
    files = (("TrainingSet",), ("ValidationSet",), ("TestSet-1-MEDIQA-Chat-2023", "TestSet-2-MEDIQA-Sum-2023"))
    parts = [
        [row for name in names for row in _csv(shared / f"data/mts_dialog/MTS-Dialog-{name}.csv")] for names in files
    ]
    return [_asked(rows, task, "section_text", is_bare) for rows in parts]


ROWS: dict[str, Callable[[Path, str, bool], list[Part]]] = {"names": _names, "gsm8k": _gsm8k, "mts_dialog": _mts_dialog}


def _asked(rows: Sequence[Row], task: str, answer: str, is_bare: bool) -> Part:
    """Rows with the task's own prompts (`is_bare`: the question alone, for a model that follows no instruction)."""
    examples = [TASKS[task].read(row, number) for number, row in enumerate(rows)]
    asked = [row["question"] + "\n" if is_bare else example.prompt for row, example in zip(rows, examples, strict=True)]
    pairs = [{"prompt": text, "completion": row[answer]} for text, row in zip(asked, rows, strict=True)]
    return pairs, examples


def _tokens(rows: list[Row], tokenizer: Any, length: int, *, is_chat: bool) -> tuple[Dataset, list[int]]:
    """The rows of at most `length` tokens, and their numbers."""
    if is_chat:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"].strip()}],
            }
            for row in rows
        ]
    args = CAFTConfig("unused", aux_weight=0.0, max_length=None, report_to=[], use_cpu=True)
    made = prepare(Dataset.from_list(rows), tokenizer, args, name="study").rows
    fits = [number for number, ids in enumerate(made["input_ids"]) if len(ids) <= length]
    return made.select(fits), fits


def tokens_of_smiles(smiles: Sequence[str], tokenizer: Any, length: int) -> Dataset:
    """Whole strings between BOS and EOS, all labelled but BOS; those that are too long or hold an unknown atom are left out."""
    every = [tokenizer(text)["input_ids"] for text in smiles]
    kept = [ids for ids in every if len(ids) <= length and tokenizer.unk_token_id not in ids]
    return Dataset.from_dict({"input_ids": kept, "labels": [[IGNORED, *ids[1:]] for ids in kept]})


def smiles_for_heads(shared: Path, count: int) -> list[str]:
    """SMILES for stage 1, none of which is in ChEBI-20's splits."""
    used = {text for file in ("validation", "test") for text in _smiles(shared / f"data/chebi20/{file}.jsonl")}
    with gzip.open(shared / "data/smiles/smiles_canonical.txt.gz", "rt") as lines:
        free = [line.strip() for line in lines if line.strip() not in used]
    return random.Random(SPLIT_SEED).sample(free, count)


def _smiles(path: Path) -> list[str]:
    return [json.loads(line)["smiles"] for line in path.read_text().splitlines()]


def _csv(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _drawn(rows: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    """The other rows, and `count` rows drawn at random, the same each time."""
    order = random.Random(SPLIT_SEED).sample(range(len(rows)), len(rows))
    return [rows[number] for number in order[count:]], [rows[number] for number in order[:count]]
