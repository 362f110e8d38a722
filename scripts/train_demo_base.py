"""Train the small base model of `caftune demo` from nothing, on text that the package writes itself.

    python scripts/train_demo_base.py

The base sees names with their SMILES for simple molecules, and names alone and SMILES alone for complex ones, besides a
few pairs with two substituents. So it answers in the format of the demo, knows simple molecules and leaves complex ones
to fine-tuning. No molecule that the demo trains or tests on is in a training document.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from caftune.demo.chemistry import Molecule, completion, molecules, prompt

SIMPLE, COMPLEX = (0, 1), (2, 4)
HELD_OUT_COMPLEX_SEEDS = (1, 2, 3)  # the demo draws its complex molecules with these seeds ...
HELD_OUT_COMPLEX_COUNT = 20_000  # ... up to this many of each
HELD_OUT_SIMPLE_SEED = 4
HELD_OUT_SIMPLE_COUNT = 1_000
TRAINING_SEED = 1_000  # pairs and texts are drawn with this seed and the next ones
BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
CONTEXT = 256  # tokens


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair merges of two letters inside runs of lower-case letters; every other character is a token.

    So "hydroxy" is hy|d|ro|xy and C(=O)O is six tokens. Tokens never cross from the prompt into the completion. One <s>
    is put in front, </s> never.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[^a-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    printable = [chr(code) for code in range(32, 127)]
    special = [BOS, EOS, PAD, UNKNOWN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=special,
        initial_alphabet=["\n", *printable],
        limit_alphabet=len(printable) + 1,
        max_token_length=3,  # tokenizers 0.23 stops one short of it
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("Name:", normalized=False), AddedToken("\nSMILES:", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.9 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def training_documents(args: argparse.Namespace) -> list[str]:
    """Pairs of simple molecules many times, pairs of two substituents, names alone, SMILES alone; shuffled."""
    held_out = {
        molecule.smiles
        for seed in HELD_OUT_COMPLEX_SEEDS
        for molecule in molecules(HELD_OUT_COMPLEX_COUNT, seed=seed, substituents=COMPLEX)
    }
    held_out |= {m.smiles for m in molecules(HELD_OUT_SIMPLE_COUNT, seed=HELD_OUT_SIMPLE_SEED, substituents=SIMPLE)}
    draw = {"exclude": held_out}
    pairs = molecules(args.num_simple_pairs, seed=TRAINING_SEED, substituents=SIMPLE, **draw)
    pairs += molecules(args.num_two_substituent_pairs, seed=TRAINING_SEED + 1, substituents=(2, 2), **draw)
    named = molecules(args.num_texts, seed=TRAINING_SEED + 2, substituents=COMPLEX, **draw)
    written = molecules(args.num_texts, seed=TRAINING_SEED + 3, substituents=COMPLEX, **draw)
    documents = [prompt(molecule) + completion(molecule) for molecule in pairs] * args.num_pair_epochs
    documents += [text for molecule in pairs for text in (molecule.name, molecule.smiles)]
    documents += [molecule.name for molecule in named] + [molecule.smiles for molecule in written]
    random.Random(TRAINING_SEED).shuffle(documents)
    return documents


def batches(rows: list[list[int]], *, batch_size: int, pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of documents of like length, in random order, every document once."""
    rng = random.Random(TRAINING_SEED)
    window = 50 * batch_size
    for start in range(0, len(rows), window):
        by_length = sorted(rows[start : start + window], key=len)
        groups = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(map(len, group))
            inputs = torch.tensor([row + [pad] * (width - len(row)) for row in group])
            labels = torch.tensor([row + [-100] * (width - len(row)) for row in group])
            yield inputs, labels


def train(model: LlamaForCausalLM, rows: list[list[int]], args: argparse.Namespace) -> tuple[int, float]:
    """One pass over the rows; the number of steps and the mean loss of the last hundred."""
    num_steps = sum(
        math.ceil(min(50 * args.batch_size, len(rows) - start) / args.batch_size)
        for start in range(0, len(rows), 50 * args.batch_size)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = min(100, num_steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))),
    )
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, (inputs, labels) in enumerate(batches(rows, batch_size=args.batch_size, pad=model.config.pad_token_id)):
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss  # padding is on the right, out of sight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            mean = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{num_steps}  loss {mean:.4f}  {time.monotonic() - started:.0f} s", flush=True)
    last = losses[-100:]
    return num_steps, sum(last) / len(last)


@torch.no_grad()
def greedy_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Molecule]) -> list[str]:
    """The model's SMILES of each name."""
    model.eval()
    answers = []
    for start in range(0, len(asked), 50):
        prompts = [prompt(molecule) for molecule in asked[start : start + 50]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Molecule]) -> dict[str, float]:
    """Share of exact answers and, where RDKit is installed, of valid SMILES."""
    answers = greedy_answers(model, tokenizer, asked)
    pairs = list(zip(answers, asked, strict=True))
    measured = {"exact_match": sum(answer == molecule.smiles for answer, molecule in pairs) / len(asked)}
    if importlib.util.find_spec("rdkit"):
        from rdkit import Chem, RDLogger

        RDLogger.DisableLog("rdApp.*")
        is_valid = [bool(answer) and Chem.MolFromSmiles(answer) is not None for answer in answers]
        measured["valid"] = sum(is_valid) / len(asked)
    return {key: round(value, 4) for key, value in measured.items()}


def main() -> None:
    """Write model, tokenizer and provenance.json into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(__file__).parents[1] / "caftune" / "demo" / "base"
    parser.add_argument("--output", type=Path, default=folder, help="default: caftune/demo/base")
    parser.add_argument("--num-simple-pairs", type=int, default=18_000)
    parser.add_argument("--num-two-substituent-pairs", type=int, default=3_000)
    parser.add_argument("--num-pair-epochs", type=int, default=4)
    parser.add_argument("--num-texts", type=int, default=20_000, help="complex names alone, and as many SMILES alone")
    parser.add_argument("--vocab-size", type=int, default=224, help="at most; merges run out before")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--num-threads", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(TRAINING_SEED)
    torch.set_num_threads(args.num_threads)
    documents = training_documents(args)
    tokenizer = train_tokenizer(documents[:20_000], vocab_size=args.vocab_size)
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]
    num_tokens = sum(map(len, rows))
    model = untrained_model(tokenizer)
    print(f"{len(rows)} documents, {num_tokens} tokens, {model.num_parameters()} parameters", flush=True)
    num_steps, final_loss = train(model, rows, args)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)  # before it pads: tokenizer.json would keep that

    simple = molecules(300, seed=HELD_OUT_SIMPLE_SEED, substituents=SIMPLE)
    hard = molecules(300, seed=HELD_OUT_COMPLEX_SEEDS[0], substituents=COMPLEX)
    measured = {
        "300 held-out names with 0 or 1 substituents": scores(model, tokenizer, simple),
        "300 held-out names with 2 to 4 substituents": scores(model, tokenizer, hard),
    }
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    changed = {key: value for key, value in settings.items() if value != parser.get_default(key)}
    flags = "".join(f" --{key.replace('_', '-')} {value}" for key, value in changed.items())
    provenance = {
        "command": f"python scripts/train_demo_base.py{flags}",
        "date": datetime.date.today().isoformat(),
        "licence": "Apache-2.0",
        "data": "All training text was generated by caftune/demo/chemistry.py; nothing was downloaded.",
        "held_out": (
            f"No training document is of molecules({HELD_OUT_COMPLEX_COUNT}, seed=s, substituents=(2, 4)) "
            f"for s in {HELD_OUT_COMPLEX_SEEDS}, or molecules({HELD_OUT_SIMPLE_COUNT}, seed={HELD_OUT_SIMPLE_SEED}, "
            "substituents=(0, 1))."
        ),
        "seed": TRAINING_SEED,
        "settings": settings,
        "documents": len(rows),
        "tokens": num_tokens,
        "steps": num_steps,
        "final_loss": round(final_loss, 4),
        "parameters": model.num_parameters(),
        "greedy_decoding": measured,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "machine": "2 CPU cores",
    }
    (args.output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
