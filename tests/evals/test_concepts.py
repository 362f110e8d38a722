"""Concepts stand where they are written out here, and whole concepts are scored as plain loops over full logits score them."""

import copy
import json
import math
import random
import re
import sys
from collections import Counter
from itertools import pairwise, takewhile
from types import SimpleNamespace

import pytest
import torch
from bases import load_base
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from models import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from caftune.compare.concept_study import study_concepts, summarise_concepts
from caftune.compare.summary import ArmConcepts, ConceptGroup
from caftune.core.backbone import Backbone
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.evals.concepts import Concept, density, find_concepts, offsets_of, read_terms, token_positions

PARACETAMOL = "CC(=O)Nc1ccc(O)cc1"
CORPUS = ["the ribonucleic acid of a café", "naïve acids and the acid — the the", "😀 über ribonucleic"] * 4
PIECES = ["the ", "acid", "ribonucleic", " café", "naïve", "C(=O)N", "don't"]
PIECES += ["  ", "\n", "😀", "—", "é", "e\u0301", "中文"]
STORY = "Once upon a time, a café — naïve 😀!"
TEXTS = [" ".join(PIECES) * 6, STORY, PARACETAMOL * 4, "", " ", "  a  b "]
TEXTS += ["".join(random.Random(n).choices(PIECES, k=30)) for n in range(20)]
NO_TERMS = [(b"# nothing\n", "hold at least one term, got none"), (b"caf\xe9\n", "be text in UTF-8, got")]
GROUPS = [  # text, group, its characters in each occurrence
    "CC(N)=O fr_amide C(N)=O",
    "CC(NC)=O fr_amide C(N…O",  # a methyl between nitrogen and oxygen
    "O=C1CCCN1 fr_amide O=C1…N1",
    "BrCCCCl fr_alkyl_halide BrC CCl",
    "[H]OC([H])=O fr_COO2 OC…O",
    "[O-]C(=O)C1CC1.[Na+] fr_COO [O-]C(=O)C",
    "CC%12=CC=CC=C%(12) fr_benzene C%12=CC=CC=C%(12)",
    "Cl.c1(N)ccccc1 fr_benzene c1…ccccc1",
    "c(N(C)C)1ccccc1 fr_benzene c…1ccccc1",  # a ring label after its atom's branch
]
LABELLED = [  # parts of a row, and the words found
    ([("the acid", 0), ("ester", 1), ("on", 0), ("ium", 1), ("</s>", 1), ("ether", 1)], "ester ium ether"),
    ([("ethanol acid", 1)], "acid"),
    ([("<s>", 0), ("ethanol acid", 1)], "ethanol acid"),
    ([("<s>", 1), ("ethanol", 1)], "ethanol"),
    ([("the acid", 0), (" 1 2", 1)], ""),
]


def written(text, concept):
    return "…".join(text[start:end] for start, end in concept.ranges)


def named(text, kind="smiles", terms=()):
    if kind == "smiles":
        pytest.importorskip("rdkit")
    return [(concept.name, written(text, concept)) for concept in find_concepts(text, kind, terms)]


def trained(model, trainer, pre_tokenizer, decoder):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers():
    options = {"special_tokens": ["<s>", "</s>", "<unk>"], "show_progress": False}
    by_bytes = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    by_words, pieces = trainers.WordPieceTrainer(vocab_size=60, **options), models.WordPiece(unk_token="<unk>")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "demo": AutoTokenizer.from_pretrained(BASE),
        "bytes": trained(models.BPE(), by_bytes, byte_level, decoders.ByteLevel()),
        "pieces": trained(pieces, by_words, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()),
    }


@pytest.fixture(scope="module")
def real(shared):
    folder = shared / "models"
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in ["stories260k", "smiles-gpt2-0.5m"]}


def test_words_have_a_letter_and_keep_inner_hyphens_and_apostrophes():
    text = "Don’t take 2-methyl-3-pentanol 3.5 times -- well-known_'tis, 1990s 42 e\u0301te\u0301 हिन्दी."
    words = ["Don’t", "take", "2-methyl-3-pentanol", "times", "well-known", "tis", "1990s", "e\u0301te\u0301", "हिन्दी"]
    assert named(text, "words") == [(word, word) for word in words]


def test_identifiers_are_whole_names_without_keywords_strings_and_comments():
    code = "def mean_of(camelCase):\n    x = self.a_b.c  # no\n    return x if 'str' else None\n"
    assert named(code, "code") == [(name, name) for name in ["mean_of", "camelCase", "x", "self", "a_b", "c", "x"]]


@pytest.mark.parametrize("rest", ["foo(bar,\n", "s = '''abc", "if x:\n        y\n    z\n  w"])
def test_code_that_stops_short_gives_what_stands_before(rest):
    assert [name for name, _ in named("first = second\r\n" + rest, "code")][:2] == ["first", "second"]


@given(st.text() | st.lists(st.sampled_from([*PIECES, "\r", "\f", "a_b", "'''", "(", "\\", "$"])).map("".join))
def test_any_text_has_words_and_identifiers_where_they_are_written(text):
    for kind in ("words", "code"):
        assert all(name == part for name, part in named(text, kind))


def test_a_term_is_found_as_whole_words_and_takes_the_words_within():
    text = "The Ribonucleic\n acid calms ACID, placid and amino-acid; C++ too."
    expected = [("The", "The"), ("ribonucleic acid", "Ribonucleic\n acid"), ("calms", "calms"), ("acid", "ACID")]
    expected += [("placid", "placid"), ("and", "and"), ("acid", "acid"), ("C++", "C++"), ("too", "too")]
    assert named(text, "words", ["acid", "ribonucleic", "ribonucleic acid", "C++"]) == expected


def test_terms_are_found_beside_identifiers_and_groups():
    assert named("loss_fn(loss) Loss", "code", ["LOSS"]) == [("loss_fn", "loss_fn"), ("LOSS", "loss"), ("LOSS", "Loss")]
    assert {("fr_alkyl_halide", "CCl"), ("is it", "is it")} < {*named("CCCl is it", "smiles", ["is it"])}


def test_an_unknown_kind_and_a_blank_term_are_refused():
    with pytest.raises(ValueError, match=r"kind must be one of words, code, smiles, got 'word'\."):
        find_concepts("text", "word")
    with pytest.raises(ValueError, match="A term must have characters, got a blank one"):
        find_concepts("text", "words", ["acid", " "])


def test_terms_are_read_one_a_line(tmp_path):
    (tmp_path / "terms.txt").write_text("\ufeffribonucleic acid\n\n# a remark\n  amide \r\n", encoding="utf-8")
    assert read_terms(tmp_path / "terms.txt") == ["ribonucleic acid", "amide"]


@pytest.mark.parametrize(("content", "message"), [(None, "be a readable file .* got: No such file"), *NO_TERMS])
def test_a_file_without_terms_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "terms.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"terms\.txt must {message}"):
        read_terms(tmp_path / "terms.txt")


def test_the_groups_of_paracetamol_are_written_out():
    pytest.importorskip("rdkit")
    found = {concept.name: concept.ranges for concept in find_concepts(PARACETAMOL, "smiles")}
    assert found["fr_amide"] == ((1, 7),)  # C(=O)N
    assert found["fr_phenol"] == ((7, 18),)  # c1ccc(O)cc1
    assert found["fr_benzene"] == ((7, 12), (15, 18))  # c1ccc and cc1


@pytest.mark.parametrize("line", GROUPS)
def test_a_group_is_found_however_it_is_written(line):
    smiles, group, *expected = line.split()
    assert [parts for name, parts in named(f" {smiles} remark\n") if name == group] == expected


@pytest.mark.parametrize("text", ["", " \n", "hello world", "C1CC", "CC(", "%%%", "c1cccc1", "Ünï", "C" * 5000])
def test_what_is_no_molecule_has_no_groups(text):
    assert named(text) == []


def test_without_rdkit_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(CaftuneError, match=r"rdkit must be installed .* pip install 'caftune\[eval\]'"):
        find_concepts("CCO", "smiles")


def check_groups(chem, smiles, atom, describe):
    """The atoms in each group's characters, as the pattern `atom` reads them, are those that RDKit matches."""
    from rdkit.Chem import Fragments

    molecule, expected = chem.MolFromSmiles(smiles), Counter()
    for name, count in Fragments.fns:
        matches = molecule.GetSubstructMatches(count.__defaults__[1])
        assert len(matches) == count(molecule)
        expected.update((name, *sorted(describe(molecule.GetAtomWithIdx(i)) for i in match)) for match in matches)
    found = [(name, (m[m.lastindex].capitalize() for m in re.finditer(atom, part))) for name, part in named(smiles)]
    assert Counter((name, *sorted(atoms)) for name, atoms in found) == expected


def test_groups_hold_the_atoms_that_rdkit_matches_in_500_molecules(shared):
    """As published, by element; and written anew with a number on each atom, so that the characters say which it is."""
    chem = pytest.importorskip("rdkit.Chem")
    element = r"\[\d*([A-Z][a-z]?|[a-z]{1,2})[^\]]*\]|(Cl|Br|[A-Z]|[a-z])"
    lines = (shared / "data" / "chebi20" / "test.jsonl").read_text().splitlines()
    for number, line in enumerate(random.Random(1).sample(lines, 500)):
        smiles = json.loads(line)["smiles"]
        check_groups(chem, smiles, element, lambda atom: atom.GetSymbol())
        if number % 3 == 0:
            molecule = chem.MolFromSmiles(smiles)
            for atom in molecule.GetAtoms():
                atom.SetAtomMapNum(atom.GetIdx() + 1)
            anew = chem.MolToSmiles(molecule, canonical=False, doRandom=True)
            check_groups(chem, anew, r":(\d+)\]", lambda atom: str(atom.GetAtomMapNum()))


def test_a_concept_has_the_tokens_that_share_a_character_with_it_and_at_least_two():
    offsets = [(0, 0), (0, 3), (3, 6), (6, 6), (6, 8), (8, 11), (11, 12), (12, 13)]  # the| ac|id| is| |x
    word, gap = Concept("acid", ((4, 8),)), Concept("t…x", ((0, 1), (12, 13)))
    concepts = [Concept("the", ((0, 3),)), word, Concept("is", ((9, 11),)), gap]
    assert token_positions(concepts, offsets) == [(word, (2, 4)), (gap, (1, 7))]


def plain_offsets(ids, tokenizer):
    """By the definition: the whole prefix before and after each token, as far as it has its final form."""
    prefixes = [tokenizer.decode(ids[:i], skip_special_tokens=True) for i in range(len(ids) + 1)]
    text, done, offsets = prefixes[-1], 0, []
    for before, after in pairwise(prefixes):
        final = after.rstrip("\ufffd")
        while not text.startswith(final):
            final = final[:-1]
        finished = max(done, len(final))
        whole = len(after) if text.startswith(after) else min(finished + 1, len(text))
        offsets.append((done, done if after == before == final else max(done, whole)))
        done = finished
    return text, offsets


def has_own_offsets(text, tokenizer):
    """Check `offsets_of` with the definition, and with the tokenizer's own where it writes the same tokens, all of the text."""
    ids = tokenizer(text)["input_ids"]
    decoded, offsets = offsets_of(ids, tokenizer)
    assert (decoded, offsets) == plain_offsets(ids, tokenizer)
    plain = [i for i in ids if i not in tokenizer.all_special_ids]
    own = tokenizer(decoded, add_special_tokens=False, return_offsets_mapping=True)
    places = own["offset_mapping"]
    if own["input_ids"] != plain or len({p for start, end in places for p in range(start, end)}) < len(decoded):
        return False
    found = [offset for offset, i in zip(offsets, ids, strict=True) if i in plain]
    lost = int(places != [] and tokenizer.decode(plain[:1]) == "")  # a first space that is in the token only
    assert found[lost:] == places[lost:]
    return True


def test_tokens_have_the_characters_that_their_tokenizer_says(tokenizers):
    shares = {name: sum(has_own_offsets(text, one) for text in TEXTS) / len(TEXTS) for name, one in tokenizers.items()}
    assert shares["bytes"] == 1
    assert shares["demo"] > 0.5  # it has no accents


def test_tokens_of_real_vocabularies_have_the_characters_that_their_tokenizer_says(real):
    assert all(has_own_offsets(text, tokenizer) for text in TEXTS for tokenizer in real.values())


def test_any_tokens_in_a_row_have_the_characters_of_growing_prefixes(tokenizers):
    draw = random.Random(3)
    for tokenizer in [*tokenizers.values()] * 20:
        ids = draw.choices(range(len(tokenizer)), k=draw.randrange(100))
        assert offsets_of(ids, tokenizer) == plain_offsets(ids, tokenizer)


def test_tokens_of_one_character_all_hold_it(tokenizers):
    tokenizer = tokenizers["bytes"]
    ids = tokenizer("a中€")["input_ids"]
    halves = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (2, 3)]
    assert offsets_of([*ids, tokenizer.eos_token_id], tokenizer) == ("a中€", [*halves, (2, 3), (3, 3)])
    assert offsets_of(ids[:-1], tokenizer) == ("a中\ufffd", halves)


def test_a_decoder_that_looks_far_back_is_given_all_tokens():
    """Every 40th token is a capital."""
    decoder = SimpleNamespace(decode=lambda ids, **_: "".join("A" if n % 40 == 39 else "a" for n in range(len(ids))))
    assert offsets_of([0] * 100, decoder) == (("a" * 39 + "A") * 2 + "a" * 20, [(n, n + 1) for n in range(100)])


def test_density_is_the_share_of_tokens_in_concepts_of_several(tokenizers):
    demo = tokenizers["demo"]
    assert demo.tokenize("the acid!") == ["th", "e", " ", "ac", "id", "!"]
    assert density("the acid!", "words", demo) == 4 / 6
    assert density("the acid!", "words", demo, ["the acid"]) == 5 / 6
    assert density("! 1", "words", demo) == density("", "words", demo) == 0.0


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def studied(request, tokenizers):
    """A model in float64, and rows that go on in its own tokens, every other with one changed."""
    model, draw = build(request.param, vocab_size=158), random.Random(5)
    rows = []
    for number in range(20):
        prompt = draw.choices(range(4, 158), k=draw.randrange(2, 9))
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=draw.randrange(3, 20), do_sample=False)[0].tolist()
        if number % 2:
            ids[-2] = draw.randrange(4, 158)
        answer = list(takewhile(lambda token: token > 3, ids[len(prompt) :]))  # up to a special token
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return model, Dataset.from_list(rows), tokenizers["demo"]


@torch.no_grad()
def plain_study(model, rows, tokenizer, kind, terms=()):
    """Row by row, token by token, from all logits: the concepts, and the log-probabilities of them."""
    found, logs = [], []
    for number, row in enumerate(rows):
        ids, first = row["input_ids"], row["labels"].count(-100)
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        text, offsets = plain_offsets(ids[first:], tokenizer)
        for concept in find_concepts(text, kind, terms):
            held = [any(a < end and b > start for start, end in concept.ranges) for a, b in offsets]
            places = [t for t, is_held in enumerate(held, start=first) if is_held]
            if len(places) > 1:
                exact = all(int(logits[t - 1].argmax()) == ids[t] for t in places)
                part = {"name": concept.name, "text": written(text, concept), "tokens": len(places)}
                found.append({"row": number, **part, "exact": exact})
                logs.append(sum(float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in places))
    return found, logs


def check_study(model, rows, tokenizer, kind="words", *, tolerance, **options):
    expected, logs = plain_study(model, rows, tokenizer, kind, **options)
    found = study_concepts(model, tokenizer, rows, kind, **options)
    assert [{key: value for key, value in c.items() if key != "log_prob"} for c in found] == expected
    assert [c["log_prob"] for c in found] == pytest.approx(logs, rel=tolerance, abs=tolerance)
    return found


def test_whole_concepts_are_scored_as_plain_loops_score_them(studied):
    model, rows, tokenizer = studied
    # Llama's attention weights are float32 in transformers, whatever the model is.
    found = check_study(model, rows, tokenizer, tolerance=1e-9 if model.config.model_type == "gpt2" else 1e-7)
    assert {c["exact"] for c in found} == {True, False}
    assert max(c["tokens"] for c in found) > 2


def test_a_row_alone_gives_what_it_gives_beside_longer_ones(studied):
    model, rows, tokenizer = studied
    backbone = Backbone.of(model)
    together = study_concepts(backbone, tokenizer, rows, "words")
    alone = [study_concepts(backbone, tokenizer, rows.select([n]), "words") for n in range(len(rows))]
    alone = [{**concept, "row": n} for n, concepts in enumerate(alone) for concept in concepts]
    assert alone == [{**c, "log_prob": pytest.approx(c["log_prob"], abs=1e-6)} for c in together]
    few = study_concepts(backbone, tokenizer, rows, "words", limit=9)
    assert [c["text"] for c in few] == [c["text"] for c in together if c["row"] < 9]


def labelled(tokenizer, *parts):
    """One row from texts and whether they are labelled."""
    read = [(i, on) for text, on in parts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return Dataset.from_list([{"input_ids": [i for i, _ in read], "labels": [i if on else -100 for i, on in read]}])


@pytest.mark.parametrize(("parts", "expected"), LABELLED)
def test_concepts_are_labelled_predicted_and_within_gaps_and_special_tokens(tokenizers, parts, expected):
    found = study_concepts(load_base("llama"), tokenizers["demo"], labelled(tokenizers["demo"], *parts), "words")
    assert " ".join(c["text"] for c in found) == expected


def test_groups_and_terms_are_scored_over_their_own_tokens(tokenizers):
    pytest.importorskip("rdkit")
    model, tokenizer = load_base("llama"), tokenizers["demo"]
    rows = labelled(tokenizer, ("<s>", 0), ("Name: paracetamol\nSMILES:", 0), (f" {PARACETAMOL}", 1))
    found = check_study(model, rows, tokenizer, "smiles", tolerance=1e-5)  # float32
    assert ("c1ccc…cc1", 6) in [(c["text"], c["tokens"]) for c in found]
    found = check_study(model, rows, tokenizer, "words", terms=["O)Nc1ccc"], tolerance=1e-5)
    assert [c["text"] for c in found] == ["CC", "O)Nc1ccc", "cc1"]


def test_the_model_keeps_its_mode_and_is_studied_without_dropout(tokenizers):
    model, rows = build("gpt2", vocab_size=158, resid_pdrop=0.5).train(), labelled(tokenizers["demo"], ("a acid", 1))
    first, second = (study_concepts(model, tokenizers["demo"], rows, "words") for _ in range(2))
    assert first == second != []
    assert model.training


def test_half_precision_is_close_to_the_same_weights_in_full(studied):
    base, rows, tokenizer = studied
    half = build(base.config.model_type, vocab_size=158, dtype=torch.bfloat16, spread=4.0)
    found, full = (study_concepts(model, tokenizer, rows, "words") for model in (half, copy.deepcopy(half).double()))
    for one, other in zip(found, full, strict=True):
        rounding = 0.05 * one["tokens"]  # bf16 keeps 1 in 256
        assert one["log_prob"] == pytest.approx(other["log_prob"], abs=rounding)


def test_real_models_are_scored_as_plain_loops_score_them(shared, real):
    pytest.importorskip("rdkit")
    for name, kind, text in [("stories260k", "words", STORY), ("smiles-gpt2-0.5m", "smiles", PARACETAMOL)]:
        rows = labelled(real[name], (real[name].bos_token, 0), (text, 1))
        model = AutoModelForCausalLM.from_pretrained(shared / "models" / name)
        assert len(check_study(model, rows, real[name], kind, tolerance=1e-4)) >= 2  # float32


def test_concepts_are_summed_up_by_length_and_by_name():
    drawn = [("b", 2, 0.5, True), ("a", 10, 0.25, False), ("b", 10, 0.75, True), ("c", 3, 0.1, False)]
    found = [{"name": name, "tokens": n, "log_prob": math.log(p), "exact": exact} for name, n, p, exact in drawn]
    summary = summarise_concepts([found])
    assert (summary.probability, summary.exact) == ([pytest.approx(0.4)], [0.5])
    assert list(summary.by_tokens) == ["2", "3", "10"]
    assert [part.count for part in summary.by_tokens.values()] == [1, 1, 2]
    assert summary.by_tokens["10"] == ConceptGroup(2, [pytest.approx(0.5)], [0.5])
    assert list(summary.by_name) == ["b", "a", "c"]
    assert summary.by_name["b"] == ConceptGroup(2, [pytest.approx(0.625)], [1.0])
    missed = [{**concept, "exact": False} for concept in found]
    assert summarise_concepts([found, missed]).by_name["b"].exact == [1.0, 0.0]


def test_a_summary_names_the_twelve_most_frequent_and_has_no_numbers_of_nothing():
    found = [{"name": f"n{n:02d}", "tokens": 2, "log_prob": -1.0, "exact": True} for n in [*range(20)] * 2 + [19]]
    assert list(summarise_concepts([found]).by_name) == ["n19", *(f"n{n:02d}" for n in range(11))]
    assert summarise_concepts([[]]) == ArmConcepts([], [], {}, {})


def test_a_term_is_no_part_of_a_word_that_goes_on_with_a_mark():
    assert [c.name for c in find_concepts("\u0915 \u0915\u093f", "words", ["\u0915"])] == ["\u0915", "\u0915\u093f"]
    assert [c.name for c in find_concepts("cafe\u0301 cafe", "words", ["cafe"])] == ["cafe\u0301", "cafe"]


@pytest.mark.parametrize(
    "word", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "co\u00adoperate", "\u0915\u094d\u200d\u0937"]
)
def test_a_joiner_or_soft_hyphen_does_not_end_a_word(word):
    assert [c.name for c in find_concepts(f"- {word} -", "words")] == [word]
