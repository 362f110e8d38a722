# ruff: noqa: E501 (tables of answers, one a line)
"""The forms in which molecules and proteins are answered: each is read back exactly, and prose is neither."""

import json
import textwrap

import pytest

from caftune.evals.molecules import MOLECULES, molecule_of, smiles_of
from caftune.evals.proteins import PROTEINS, sequence_of
from caftune.evals.task import Example

pytest.importorskip("rdkit.Chem")

SALT = "[Na+].[Cl-]"
ALANINE = "C[C@H](N)C(=O)O"
SMILES_FORMS = {
    "CCO.": "CCO", "`CCO`.": "CCO", "The SMILES is CCO.": "CCO", "**SMILES:** CCO": "CCO", "SMILES: CCO": "CCO",
    "**SMILES**: CCO": "CCO", "*SMILES:* CCO": "CCO", "SMILES:\nCCO": "CCO", "SMILES:\n\n    CCO\n": "CCO", "SMILES: `CCO`": "CCO",
    "SMILES: **CCO**": "CCO", "**SMILES: CCO**": "CCO", "SMILES = CCO": "CCO", "SMILES=CC=O": "CC=O", "SMILES CC=O": "CC=O",
    "smiles: CCO": "CCO", "SMILES -> CCO": "CCO", "Canonical SMILES: CCO": "CCO", "(SMILES: CCO)": "CCO", 'SMILES: "CCO"': "CCO",
    "The SMILES string for ethanol is CCO.": "CCO", "The SMILES of this molecule would be: CCO": "CCO",
    "The SMILES representation of the molecule is:\n\n```\nCCO\n```\n\nIt has two carbon atoms.": "CCO",
    "The SMILES notation is `CCO`, which is ethanol.": "CCO", "The SMILES is CCO, ethanol.": "CCO",
    "Based on the description, the molecule's SMILES can be written as CC(=O)O.": "CC(=O)O",
    "CCO (ethanol)": "CCO", "CCO (ethanol).": "CCO", "CCO - ethanol": "CCO", "CCO, ethanol": "CCO", "CCO; it is an alcohol": "CCO",
    "CO (methanol)": "CO", "CCO\nThis is ethanol. I am sure.": "CCO", "CC(=O)Oc1ccccc1C(=O)O This is aspirin.": "CC(=O)Oc1ccccc1C(=O)O",
    "Ethanol: CCO": "CCO", "ethanol: CCO.": "CCO", "Answer: CCO": "CCO", "Answer: CO": "CO", "The answer is CCO.": "CCO", "It is CCO.": "CCO", "It's CCO!": "CCO",
    "The molecule is CC(N)=O (acetamide).": "CC(N)=O", "The answer is `CCO`.": "CCO", "Sure!\n\nCCO": "CCO", "Sure, here it is:\nCCO\n": "CCO",
    "Sure! The molecule is:\n\n- CCO\n": "CCO", "1. CCO\n2. CCN": "CCO", "- CCO": "CCO", "> CCO": "CCO", '"CCO"': "CCO", "“CCO”": "CCO", "'CCO'": "CCO", "**CCO**": "CCO", "(CCO)": "CCO",
    "```\nCCO\n```": "CCO", "~~~\nCCO\n~~~": "CCO", "```smiles\nCCO\n```": "CCO", "```SMILES: CCO\n```": "CCO", "```\nSMILES: CCO\n```": "CCO", "1. Here:\n   ```\n   CCO\n   ```\n": "CCO",
    "Here:\n\n```text\nCCO  # ethanol\n```": "CCO", "```CCO": "CCO", "CCO\r\nIt is ethanol.\r\n": "CCO", "```\r\nCCO\r\n```\r\n": "CCO", "\ufeffCCO": "CCO",
    "<SMILES>CCO</SMILES>.": "CCO", "[START_SMILES]CCO[END_SMILES]": "CCO", "<SMILES>The SMILES is CCO.</SMILES>": "CCO",
    SALT: SALT, f"{SALT}.": SALT, f"The SMILES is {SALT}.": SALT, f"`{SALT}`": SALT, "CCO.Cl": "CCO.Cl", "CCO.Cl.": "CCO.Cl", "The answer is CCO.Cl.": "CCO.Cl",
    f"SMILES: {ALANINE}": ALANINE, f"It is **{ALANINE}**.": ALANINE, f"{ALANINE} (L-alanine)": ALANINE, "F/C=C\\F.": "F/C=C\\F", "`F/C=C\\F`": "F/C=C\\F", "SMILES: c1ccc2[nH]ccc2c1": "c1ccc2[nH]ccc2c1",
    "*CCO": "*CCO", "SMILES: *CCO": "*CCO", "*CCO*": "*CCO*", "CC*": "CC*", "[13CH4]": "[13CH4]", "C%12CCCCC%12": "C%12CCCCC%12", "SMILES: [Fe+2]": "[Fe+2]",
    "I": "I", "C": "C", "CO": "CO", "CN": "CN", " CN.": "CN", "`I`": "I", "BIOS": "BIOS", "NO": "NO", "SMILES: C": "C", "The SMILES is CN.": "CN", "O=C=O": "O=C=O", "[H][H]": "[H][H]", "N": "N",
    "CN\nThis is methylamine.": "CN", '{"smiles": "CCO"}': "CCO", '```json\n{"smiles": "CCO"}\n```': "CCO", "| SMILES | CCO |": "CCO", "\\boxed{CCO}": "CCO", "$\\boxed{\\text{CCO}}$": "CCO", "SMILES: CCO</s>": "CCO", "CCO<|im_end|>": "CCO",
    "<answer>CCO</answer>": "CCO", "The SMILES of methanol is CO; with a carbon more it is CCO.\n\nFinal SMILES: CCO": "CCO", "SMILES so far: CO\n**Final canonical SMILES:** CCO": "CCO", "The SMILES is CCO…": "CCO", "SMILES：CCO": "CCO", "We get C1=CC=CC=C1 as the SMILES.": "C1=CC=CC=C1", "```python\nsmiles = 'CCO'\n```": "CCO", "SMILES: CCO\u200b": "CCO", "### SMILES\n\nCCO\n\n### Name\nethanol": "CCO",
}  # fmt: skip

SMILES_ATTEMPTS = {
    "C1CC": "C1CC",
    "CC(": "CC(",
    "SMILES: CC(=O": "CC(=O",
    "CCO)": "CCO)",
    "The SMILES is c1ccccc.": "c1ccccc",
    "C[C@H": "C[C@H",
    "[Xx]": "[Xx]",
    "CC1CC.": "CC1CC",
    "CC@H](N)": "CC@H](N)",
}

PROSE = [
    "I cannot provide that.", "I", "I can't help with this request.", "I'm sorry, but I can't assist with that.", "I am an AI and do not know.", "No.", "No, I cannot.", "NO. I will not.",
    "NO\nI cannot do that.", "No answer", "None", "N/A", "n/a", "Unknown", "Unknown.", "Sorry.", "Sorry, no idea.", "In chemistry, many molecules exist.", "In this case I cannot tell.", "IN GENERAL this is hard.",
    "Co is cobalt.", "CO is toxic, so I will not describe it.", "CN is an abbreviation of cyanide.", "Os is a metal.", "BIOS settings are not chemistry.", "The BIOS is old.", "SO sorry", "So the answer is unclear.",
    "On the one hand, it is an acid.", "ON REFLECTION, no.", "If you insist, no.", "OF COURSE not", "As an AI, I do not draw molecules.", "OK", "Okay.", "Sure.", "Yes", "Is it an acid?", "C is the symbol of carbon.", "C. I choose the third.",
    "The SMILES is unknown.", "The SMILES is not available.", "SMILES: N/A", "SMILES: I cannot provide it.", "SMILES: unknown, as I cannot tell.", "The SMILES string cannot be given.", "SMILES is a line notation.",
    "I don't know the SMILES.", "I don't know the SMILES; it is on file.", "A SMILES of this molecule is so long that I leave it out.", "It smiles: no.", "He is so on point.", "The molecule is an acid.", "The answer is NO.", "Answer: NO", "Answer: No",
    "It has a C=O group, and I cannot name it.", "The functional group is C=O.", "C=O groups are common.", "C-C bonds are strong.", "`C=O` groups are polar.", "Its formula is CO.", "Formula: CO", "Formula: C2H6O", "InChI=1S/C2H6O/c1-2-3/h3H,2H2,1H3",
    "SELFIES: [C][C][O]", "Name: ethanol", "IUPAC name: ethanol", "The drug is aspirin.", "Please see a chemist.", "I.", "(C) 2024", "What is it?", "1. First, I look at the rings.\n2. Then I stop.", "Description: an alcohol.", "```\nI cannot do that.\n```",
    "```python\nprint('no')\n```", "<SMILES>I cannot provide that</SMILES>", "**I cannot**", "- I cannot", "Nope", "Poison", "Scoop", "Soon", "Bob", "...", "",
]  # fmt: skip
ALONE = ("I", "I.")  # iodine, where nothing else is said


@pytest.mark.parametrize("answer", SMILES_FORMS)
def test_the_smiles_is_read_from(answer):
    assert smiles_of(answer) == SMILES_FORMS[answer]


@pytest.mark.parametrize("answer", SMILES_ATTEMPTS)
def test_a_smiles_that_is_wrong_stays_as_it_was_written(answer):
    assert smiles_of(answer) == SMILES_ATTEMPTS[answer]
    assert molecule_of(smiles_of(answer)) is None


@pytest.mark.parametrize("answer", [prose for prose in PROSE if prose not in ALONE])
def test_prose_is_no_molecule_and_no_protein(answer):
    assert molecule_of(smiles_of(answer)) is None, smiles_of(answer)
    assert MOLECULES.score(Example("0", "", "CCO"), answer)["valid"] == 0.0
    assert sequence_of(answer) == ""
    assert PROTEINS.score(Example("0", "", "MKTAYIAKQR"), answer)["identity"] == 0.0


def test_the_tables_are_as_large_as_they_should_be():
    assert len(PROSE) >= 50
    assert 3 * (len(PROSE) + len(SMILES_ATTEMPTS)) >= len(SMILES_FORMS) + len(PROTEIN_FORMS)


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        ("The SMILES is OCC.", 1.0), ("The SMILES is CCN.", 0.0), ("CCN. Or rather CCO.", 0.0), ("SMILES: CCN\nSMILES: CCO", 0.0), ("CCO.Cl", 0.0), ("CCO.", 1.0), ("CCO..", 1.0), ("CCO)", 0.0), ("((CCO", 0.0),
        ("C C O", 0.0), ("CC O", 0.0), ("CCO-", 0.0), ("I suggest ethanol.", 0.0), ("ethanol", 0.0), ("```\nCCN\n```\nor\n```\nCCO\n```", 0.0), ("CCN\n```\nCCO\n```", 0.0),
    ],
)  # fmt: skip
def test_only_the_answer_itself_matches(answer, matches):
    assert MOLECULES.score(Example("0", "", "CCO"), answer)["exact_match"] == matches


SMILES_DRESSINGS = [
    "{}.", " {}\nThis molecule has several groups. I hope it helps.", "SMILES: {}", "**SMILES:** `{}`", "The SMILES string of the molecule is {}.", "Sure! Here it is:\n\n```smiles\n{}\n```\n\nIt has a C=O group.",
    "1. The molecule:\n   ```\n   {}\n   ```\n2. Done.", "Sure:\r\n\r\n{}\r\n", "The molecule described is **{}**.",
]  # fmt: skip


@pytest.mark.parametrize("dressing", SMILES_DRESSINGS)
def test_every_smiles_of_chebi_20_is_read_back_exactly_from(dressing, shared):
    smiles = [json.loads(line)["smiles"] for line in (shared / "data/chebi20/test.jsonl").read_text().splitlines()]
    assert len(smiles) == 3300
    differ = [(one, found) for one in smiles if (found := smiles_of(dressing.format(one))) != one]
    assert not differ


# Proteins

ONE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV"


def in_tens(sequence, per_line=6):
    tens = textwrap.wrap(sequence, 10)
    return "\n".join(" ".join(tens[start : start + per_line]) for start in range(0, len(tens), per_line))


def numbered(sequence):
    lines = textwrap.wrap(sequence, 60)
    return "\n".join(f"{60 * number + 1:>9} {in_tens(line)}" for number, line in enumerate(lines)).lower()


PROTEIN_FORMS = {
    "a stop mark": f"{ONE}*", "a stop mark behind a space": f"{ONE} *", "a stop mark on a line of its own": f"{ONE[:20]}\n{ONE[20:]}\n*", "a stop mark, then prose": f"{ONE}*\nIt ends there.",
    "a period": f"{ONE}.", "bold": f"**{ONE}**", "code": f"`{ONE}`.", "quoted": f'"{ONE}"', "a label": f"Sequence: {ONE}", "a bold label": f"**Sequence:** {ONE}", "a bold label and a stop": f"**Sequence**: `{ONE}*`.",
    "a label and a line": f"Sequence:\n{ONE}", "a label with a length": f"Protein sequence (32 aa): {ONE}", "a length behind": f"Sequence: {ONE} (32 aa)", "a sentence": f"The sequence is {ONE}.",
    "a sentence that goes on": f"I suggest {ONE}, which binds calcium.", "a sentence that begins with it": f"{ONE} is my design.", "the word protein": f"The protein is: {ONE}", "a bullet": f"- {ONE}", "a number": f"1. {ONE}",
    "FASTA": f">sp|P01308|INS_HUMAN Insulin\n{ONE}", "FASTA, wrapped": f">designed\n{ONE[:20]}\n{ONE[20:]}\n", "FASTA, small": f">designed\n{ONE.lower()}", "FASTA, two": f">one\n{ONE}\n>two\nGIGAVLKVLT", "FASTA in a block": f"```fasta\n>x\n{ONE}*\n```",
    "small letters": ONE.lower(), "small letters, wrapped": f"{ONE.lower()}\n", "small letters in a block": f"```\n{ONE.lower()}\n```", "soft-masked": ONE[:10] + ONE[10:20].lower() + ONE[20:], "small letters with a label": f"Sequence: {ONE[:12].lower()}\n{ONE[12:].lower()}",
    "tens": in_tens(ONE), "tens, wrapped": in_tens(ONE, 2), "tens with a stop": f"{in_tens(ONE)}*", "tens with a label": f"Sequence: {in_tens(ONE)}", "GenBank": numbered(ONE), "GenBank in a block": f"ORIGIN\n```\n{numbered(ONE)}\n//\n```",
    "numbers behind": f"{in_tens(ONE)}    32", "a ruler": f"        10         20         30\n{in_tens(ONE)}", "letters apart": " ".join(ONE), "wrapped": f"{ONE[:30]}\n{ONE[30:]}", "prose first": f"Here is a protein with these functions.\n\n{ONE}\n\nA PROTEIN SUCH AS THIS BINDS DNA.",
    "a FASTA file in prose": f"A FASTA file:\n{ONE}", "prose in capitals first": f"PLEASE FIND THE DESIGN BELOW\n{ONE}", "tildes": f"~~~\n{ONE}\n~~~", "a list": f"1. It:\n   ```\n   {ONE}\n   ```\n", "not closed": f"```\n{ONE[:16]}\n{ONE[16:]}", "CRLF": f"Sure:\r\n\r\n{ONE[:20]}\r\n{ONE[20:]}\r\n",
    "JSON": f'{{"sequence": "{ONE}"}}', "tags": f"<protein>{ONE}</protein>", "an end mark": f"{ONE}</s>", "Galactica's marks": f"[START_AMINO]{ONE}[END_AMINO]", "a short label": f"seq: {ONE}", "capitals": f"THE SEQUENCE IS {ONE}", "a heading": f"FASTA:\n>x\n{ONE}",
    "another label behind": f"Sequence: {ONE}\nLinker sequence: GGGGSGGGGSGGGGS", "a label of each part behind": f"Sequence: {ONE[:16]}\n{ONE[16:]}\nPeptide: GGGGSGGGGSGG", "an ellipsis": f"Sequence: {ONE}…",
    "a byte order mark": f"\ufeff{ONE}", "code block of another kind first": f"```\nno sequence here\n```\n```\n{ONE}\n```", "a prose block": f"```\nHere it is:\n{ONE}\n```",
}  # fmt: skip

NO_PROTEIN = [
    "I CANNOT HELP WITH THAT", "SORRY", "SORRY.", "NO", "NONE", "N/A", "NULL", "HELP", "ERROR", "A FASTA file is needed.", "A DNA SEQUENCE IS NEEDED", "THE DESIGN OF PROTEINS NEEDS A LAB", "PLEASE ASK A SPECIALIST", "FASTA", "DNA and RNA", "Sequence: unknown",
    "Sequence: N/A", "Sequence:", "sequence is not known", "The sequence is a secret.", "characteristically", "acetyltransferases", "mktayiak", ">sp|P01308|INS_HUMAN Insulin", "> MKTAYIAK", "10 20 30", "---", "***", "*", "MK", "Met-Lys-Thr-Ala", "I AM A MODEL", "ATP", "YES",
    "SMILES string", "REFUSED", "DNA", "The protein is INSULIN.", "[REDACTED]", "Sequence: [REDACTED]", "It has the motif GXXXXGKT.", "12 characteristics", "THE SEQUENCE IS LACKING",
    "A", "I", "This binds ATP, GTP and NAD.", "```\nI cannot.\n```",
]  # fmt: skip


@pytest.mark.parametrize("form", PROTEIN_FORMS)
def test_the_sequence_is_read_from(form):
    assert sequence_of(PROTEIN_FORMS[form]) == ONE
    assert PROTEINS.score(Example("0", "", ONE), PROTEIN_FORMS[form])["identity"] == 1.0


@pytest.mark.parametrize("answer", NO_PROTEIN)
def test_what_is_no_sequence_is_not_aligned(answer):
    found = PROTEINS.score(Example("0", "", ONE), answer)
    assert (found["identity"], found["valid_residues"]) == (0.0, 0.0)


def test_a_stop_within_a_sequence_stays_and_is_no_residue():
    assert sequence_of("MKT*AYIAK") == "MKT*AYIAK"
    assert PROTEINS.score(Example("0", "", "MKTAYIAK"), "MKT*AYIAK")["identity"] == 8 / 9


def test_a_perfect_answer_with_a_stop_mark_is_perfect():
    row = {"functions": ["toxin activity"], "sequence": "GIGAVLKVLTTGLPALISWIKRKRQQ*"}
    example = PROTEINS.read(row, 0)
    assert example.reference == "GIGAVLKVLTTGLPALISWIKRKRQQ"
    assert PROTEINS.score(example, row["sequence"]) == PROTEINS.score(example, example.reference)


PROTEIN_DRESSINGS = {
    "plain": lambda one: f" {one}\n",
    "a stop mark": lambda one: f"Sequence: {one}*",
    "FASTA": lambda one: f"Here:\n```fasta\n>sp|X|Y designed\n{textwrap.fill(one, 60)}\n```\nI hope it folds.",
    "wrapped": lambda one: f"Here is one.\n\n{textwrap.fill(one, 80)}\n\nIt binds ATP.",
    "tens": lambda one: in_tens(one),
    "GenBank": lambda one: f"ORIGIN\n{numbered(one)}\n//",
    "a sentence": lambda one: f"The protein sequence is **{one}**.",
    "small letters": lambda one: one.lower(),
}


@pytest.mark.parametrize("name", PROTEIN_DRESSINGS)
def test_every_protein_of_the_data_is_read_back_exactly_from(name, shared):
    lines = (shared / "data/protein_go/pairs.jsonl").read_text().splitlines()
    sequences = [json.loads(line)["sequence"] for line in lines]
    assert len(sequences) == 3415
    differ = [one for one in sequences if sequence_of(PROTEIN_DRESSINGS[name](one)) != one]
    assert not differ
