"""The generated chemistry is right: RDKit and names out of the textbooks agree with it."""

import pytest

from caftune.demo.chemistry import (
    ACID,
    ALDEHYDE,
    AMIDE,
    AMINE,
    BENZENE,
    CHAIN,
    ESTER,
    HYDROXYL,
    KETONE,
    NITRILE,
    NONE,
    RING,
    SUBSTITUENTS,
    Structure,
    completion,
    molecules,
    prompt,
)

SIMPLE, COMPLEX = (0, 1), (2, 4)
BY_NAME = {substituent.name.strip("()"): substituent for substituent in SUBSTITUENTS}

# Numbered the wrong way round on purpose where there is a choice.
TEXTBOOK = [
    (CHAIN, 4, ACID, 1, [(3, "chloro"), (2, "methyl")], "3-chloro-2-methylbutanoic acid", "CC(Cl)C(C)C(=O)O"),
    (CHAIN, 3, ACID, 1, [(3, "phenyl"), (2, "amino")], "2-amino-3-phenylpropanoic acid", "NC(Cc1ccccc1)C(=O)O"),
    (CHAIN, 5, ACID, 1, [(4, "oxo")], "4-oxopentanoic acid", "CC(=O)CCC(=O)O"),
    (CHAIN, 3, ALDEHYDE, 1, [(3, "methylsulfanyl")], "3-(methylsulfanyl)propanal", "CSCCC=O"),
    (CHAIN, 5, HYDROXYL, 4, [], "pentan-2-ol", "CCCC(C)O"),
    (CHAIN, 4, KETONE, 3, [], "butan-2-one", "CCC(C)=O"),
    (CHAIN, 3, AMINE, 3, [(0, "methyl"), (2, "methyl")], "N,2-dimethylpropan-1-amine", "CNCC(C)C"),
    (CHAIN, 6, NONE, 0, [(3, "methyl"), (5, "methyl")], "2,4-dimethylhexane", "CCC(C)CC(C)C"),
    (CHAIN, 7, NONE, 0, [(4, "ethyl"), (6, "methyl")], "4-ethyl-2-methylheptane", "CCCC(CC)CC(C)C"),
    (CHAIN, 4, ESTER, 1, [(3, "hydroxy")], "ethyl 3-hydroxybutanoate", "CCOC(=O)CC(C)O"),
    (BENZENE, 6, ESTER, 1, [(5, "nitro")], "ethyl 3-nitrobenzoate", "CCOC(=O)c1cccc([N+](=O)[O-])c1"),
    (BENZENE, 6, ACID, 1, [(6, "acetyloxy")], "2-(acetyloxy)benzoic acid", "CC(=O)Oc1ccccc1C(=O)O"),
    (BENZENE, 6, ACID, 1, [(5, "bromo"), (3, "chloro")], "3-bromo-5-chlorobenzoic acid", "OC(=O)c1cc(Br)cc(Cl)c1"),
    (BENZENE, 6, HYDROXYL, 1, [(5, "tert-butyl"), (3, "iodo")], "3-tert-butyl-5-iodophenol", "Ic1cc(O)cc(c1)C(C)(C)C"),
    (BENZENE, 6, NITRILE, 1, [(6, "fluoro"), (2, "fluoro")], "2,6-difluorobenzonitrile", "N#Cc1c(F)cccc1F"),
    (BENZENE, 6, AMINE, 1, [(0, "methyl"), (0, "methyl")], "N,N-dimethylaniline", "CN(C)c1ccccc1"),
    (BENZENE, 6, AMIDE, 1, [(0, "phenyl")], "N-phenylbenzamide", "O=C(Nc1ccccc1)c1ccccc1"),
    (BENZENE, 6, NONE, 0, [(4, "chloro")], "chlorobenzene", "Clc1ccccc1"),
    (BENZENE, 6, NONE, 0, [(6, "chloro"), (3, "bromo")], "1-bromo-4-chlorobenzene", "Clc1ccc(Br)cc1"),
    (
        BENZENE, 6, NONE, 0, [(1, "methyl"), (2, "nitro"), (4, "nitro"), (6, "nitro")],
        "2-methyl-1,3,5-trinitrobenzene", "Cc1c(cc(cc1[N+](=O)[O-])[N+](=O)[O-])[N+](=O)[O-]",
    ),
    (
        BENZENE, 6, NONE, 0, [(6, "trifluoromethyl"), (2, "trifluoromethyl")],
        "1,3-bis(trifluoromethyl)benzene", "FC(F)(F)c1cccc(c1)C(F)(F)F",
    ),
    (RING, 6, ACID, 1, [], "cyclohexanecarboxylic acid", "OC(=O)C1CCCCC1"),
    (RING, 6, KETONE, 1, [(5, "methyl")], "3-methylcyclohexan-1-one", "CC1CCCC(=O)C1"),
    (RING, 6, AMIDE, 1, [(0, "methyl")], "N-methylcyclohexanecarboxamide", "CNC(=O)C1CCCCC1"),
    (RING, 5, NONE, 0, [(4, "methyl")], "methylcyclopentane", "CC1CCCC1"),
]  # fmt: skip

SMARTS = {
    "carboxylic acid": "[CX3](=O)[OX2H1]",
    "ester": "[CX3](=O)[OX2H0][#6]",
    "amide": "[NX3][CX3](=O)",
    "nitrile": "[CX2]#N",
    "aldehyde": "[CX3H1](=O)[#6]",
    "ketone": "[#6][CX3](=O)[#6]",
    "hydroxyl": "[OX2H][#6;!$(C=O)]",
    "thiol": "[SX2H]",
    "amine": "[NX3+0;!$(NC=O)]",
    "ether": "[OX2]([#6;!$(C=O)])[#6;!$(C=O)]",
    "thioether": "[SX2]([#6])[#6]",
    "nitro": "[N+](=O)[O-]",
    "halide": "[F,Cl,Br,I]",
    "benzene ring": "c1ccccc1",
    "cycloalkane ring": "[C;R]",
}


@pytest.fixture(scope="module")
def chem():
    return pytest.importorskip("rdkit.Chem")


@pytest.fixture(scope="module")
def many():
    return molecules(1_000, seed=11, substituents=SIMPLE) + molecules(4_000, seed=11, substituents=COMPLEX)


def structure(parent, size, principal, position, placed):
    return Structure(
        parent, size, principal, position, tuple((at, BY_NAME[name]) for at, name in placed), "ethyl"
    ).numbered()


@pytest.mark.parametrize("case", TEXTBOOK, ids=lambda case: case[5])
def test_names_are_those_of_the_textbook(case):
    *description, name, _ = case
    assert structure(*description).name() == name


@pytest.mark.parametrize("case", TEXTBOOK, ids=lambda case: case[5])
def test_smiles_are_the_molecules_of_the_textbook(case, chem):
    *description, _, smiles = case
    assert chem.CanonSmiles(structure(*description).smiles()) == chem.CanonSmiles(smiles)


def test_every_smiles_is_valid(many, chem):
    assert [molecule.smiles for molecule in many if chem.MolFromSmiles(molecule.smiles) is None] == []


def test_no_molecule_has_two_names_and_no_name_two_molecules(many, chem):
    distinct = {molecule.smiles: molecule for molecule in many}.values()
    canonical = [chem.CanonSmiles(molecule.smiles) for molecule in distinct]
    assert len(set(canonical)) == len({molecule.name for molecule in distinct}) == len(distinct)


def test_groups_agree_with_smarts(many, chem):
    patterns = {group: chem.MolFromSmarts(pattern) for group, pattern in SMARTS.items()}
    for molecule in many[::2]:
        parsed = chem.MolFromSmiles(molecule.smiles)
        matched = {group for group, pattern in patterns.items() if parsed.HasSubstructMatch(pattern)}
        assert set(molecule.groups) == matched, molecule


def test_every_group_comes_up(many):
    assert {group for molecule in many for group in molecule.groups} == set(SMARTS)


def test_the_main_chain_is_the_longest(many, chem):
    stems = ["prop", "but", "pent", "hex", "hept", "oct", "non", "dec"]
    chains = [(m, stem) for m in many for stem in stems if m.name.endswith(f"{stem}ane") and not m.groups]
    assert len(chains) >= 10
    for molecule, stem in chains:
        distances = chem.GetDistanceMatrix(chem.MolFromSmiles(molecule.smiles))
        assert distances.max() + 1 == stems.index(stem) + 3, molecule


def test_a_group_as_senior_as_the_principal_one_is_never_a_prefix():
    phenol = structure(BENZENE, 6, HYDROXYL, 1, [])
    assert phenol.admits(BY_NAME["amino"], 3)
    assert not phenol.admits(BY_NAME["hydroxy"], 3)
    assert not phenol.admits(BY_NAME["cyano"], 3)


def test_a_substituent_never_makes_a_longer_chain():
    heptane = structure(CHAIN, 7, NONE, 0, [])
    assert [at for at in range(1, 8) if heptane.admits(BY_NAME["ethyl"], at)] == [3, 4, 5]


def test_two_heteroatoms_never_share_a_carbon_unless_both_are_halogens():
    assert not structure(CHAIN, 3, HYDROXYL, 1, []).admits(BY_NAME["chloro"], 1)
    assert not structure(CHAIN, 3, NONE, 0, [(1, "methoxy")]).admits(BY_NAME["nitro"], 1)
    assert structure(CHAIN, 3, NONE, 0, [(1, "fluoro")]).admits(BY_NAME["chloro"], 1)


def test_the_same_seed_gives_the_same_molecules():
    assert molecules(50, seed=1, substituents=COMPLEX) == molecules(50, seed=1, substituents=COMPLEX)


def test_another_seed_gives_other_molecules():
    assert molecules(50, seed=1, substituents=COMPLEX) != molecules(50, seed=2, substituents=COMPLEX)


def test_a_larger_count_continues_the_same_list():
    assert molecules(80, seed=1, substituents=COMPLEX)[:50] == molecules(50, seed=1, substituents=COMPLEX)


def test_excluded_molecules_do_not_come_up():
    first = {molecule.smiles for molecule in molecules(200, seed=1, substituents=SIMPLE)}
    again = molecules(200, seed=1, substituents=SIMPLE, exclude=first)
    assert first.isdisjoint(molecule.smiles for molecule in again)


def test_asking_for_more_molecules_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"count must be at most \d+"):
        molecules(100_000, seed=1, substituents=(0, 0))


def test_prompt_and_completion_have_the_format_of_the_task():
    molecule = structure(CHAIN, 3, ACID, 1, [(2, "hydroxy")])
    (found,) = [m for m in molecules(5_000, seed=1, substituents=SIMPLE) if m.name == molecule.name()]
    assert prompt(found) + completion(found) == "Name: 2-hydroxypropanoic acid\nSMILES: OC(=O)C(O)C"


def test_prompt_takes_a_name_too():
    assert prompt("propan-2-ol") == "Name: propan-2-ol\nSMILES:"
