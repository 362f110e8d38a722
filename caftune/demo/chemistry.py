"""A task that needs no download: systematic chemical names and their SMILES, from one structural description.

A molecule is a parent (chain, cycloalkane or benzene ring), at most one principal group (the name's ending), and substituents
(its prefixes). Names follow the IUPAC rules that such molecules need: seniority of the principal group, longest chain, lowest
locants for the principal group, then for all prefixes, then for the prefix cited first, prefixes in alphabetical order. The
SMILES follows the same numbering, so one name has one SMILES. No stereochemistry, multiple bonds or condensed rings.

    3-chloro-2-methylbutanoic acid    OC(=O)C(C)C(Cl)C
    N,4-dimethylbenzamide             CNC(=O)c1ccc(C)cc1

Source: Nomenclature of Organic Chemistry, IUPAC Recommendations 2013, P-14 (locants, alphabetical order), P-41
(seniority of classes), P-44 (seniority of parents).
"""

import random
from dataclasses import dataclass, replace
from functools import cached_property

from caftune.errors import CaftuneError

STEMS = {3: "prop", 4: "but", 5: "pent", 6: "hex", 7: "hept", 8: "oct", 9: "non", 10: "dec"}
ACID, ESTER, AMIDE, NITRILE, ALDEHYDE = "carboxylic acid", "ester", "amide", "nitrile", "aldehyde"
KETONE, HYDROXYL, THIOL, AMINE, NONE = "ketone", "hydroxyl", "thiol", "amine", "none"
SENIORITY = (ACID, ESTER, AMIDE, NITRILE, ALDEHYDE, KETONE, HYDROXYL, THIOL, AMINE, NONE)
PRINCIPALS = tuple(group for group in SENIORITY if group != THIOL)  # a thiol comes as the prefix "sulfanyl" only
TERMINAL = (ACID, ESTER, AMIDE, NITRILE, ALDEHYDE)  # these bring a carbon: the first of a chain, or one outside a ring
CHAIN, RING, BENZENE = "chain", "cycloalkane ring", "benzene ring"

# Endings; {at} is the principal group's locant between hyphens, or nothing where the name needs none.
CHAIN_ENDINGS = {
    ACID: "anoic acid", ESTER: "anoate", AMIDE: "anamide", NITRILE: "anenitrile", ALDEHYDE: "anal",
    KETONE: "an{at}one", HYDROXYL: "an{at}ol", AMINE: "an{at}amine", NONE: "ane",
}  # fmt: skip
RING_ENDINGS = CHAIN_ENDINGS | {
    ACID: "ane{at}carboxylic acid", ESTER: "ane{at}carboxylate", AMIDE: "ane{at}carboxamide",
    NITRILE: "ane{at}carbonitrile", ALDEHYDE: "ane{at}carbaldehyde",
}  # fmt: skip
BENZENES = {
    ACID: "benzoic acid", ESTER: "benzoate", AMIDE: "benzamide", NITRILE: "benzonitrile", ALDEHYDE: "benzaldehyde",
    HYDROXYL: "phenol", AMINE: "aniline", NONE: "benzene",
}  # fmt: skip
ESTER_ALKYLS = {"methyl": "C", "ethyl": "CC", "propyl": "CCC", "butyl": "CCCC", "propan-2-yl": "CC(C)"}


@dataclass(frozen=True)
class Molecule:
    """A molecule with its systematic name, its SMILES and the functional groups and rings that it holds."""

    name: str
    smiles: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Substituent:
    """A prefix of a name and its branch in the SMILES."""

    name: str  # the prefix, in parentheses where it is a compound one
    smiles: str  # the branch, first atom attached
    groups: tuple[str, ...] = ()  # what it adds to `Molecule.groups`
    element: str = "carbon"  # "carbon", "halogen" or "hetero", the kind of atom that is attached
    senior: str | None = None  # the class which it stands for; the principal group must be senior to it
    reach: int = 0  # chain carbons that must follow on either side, so that the main chain stays the longest

    @cached_property
    def order(self) -> tuple[str, str]:
        """Alphabetical order: the letters without "tert-", which decides only between equals."""
        return "".join(filter(str.isalpha, self.name.removeprefix("tert-"))), self.name


RINGS_ONLY = 9  # a reach that no chain has: branched substituents would compete for the main chain
SUBSTITUENTS = (
    Substituent("methyl", "C", reach=1),
    Substituent("ethyl", "CC", reach=2),
    Substituent("propyl", "CCC", reach=3),
    Substituent("butyl", "CCCC", reach=4),
    Substituent("(propan-2-yl)", "C(C)C", reach=RINGS_ONLY),
    Substituent("tert-butyl", "C(C)(C)C", reach=RINGS_ONLY),
    Substituent("(trifluoromethyl)", "C(F)(F)F", ("halide",), reach=RINGS_ONLY),
    Substituent("phenyl", "c1ccccc1", (BENZENE,), senior=NONE),
    Substituent("cyclopropyl", "C1CC1", (RING,), senior=NONE),
    Substituent("fluoro", "F", ("halide",), "halogen"),
    Substituent("chloro", "Cl", ("halide",), "halogen"),
    Substituent("bromo", "Br", ("halide",), "halogen"),
    Substituent("iodo", "I", ("halide",), "halogen"),
    Substituent("methoxy", "OC", ("ether",), "hetero"),
    Substituent("ethoxy", "OCC", ("ether",), "hetero"),
    Substituent("propoxy", "OCCC", ("ether",), "hetero"),
    Substituent("phenoxy", "Oc1ccccc1", ("ether", BENZENE), "hetero", NONE),
    Substituent("(methylsulfanyl)", "SC", ("thioether",), "hetero"),
    Substituent("nitro", "[N+](=O)[O-]", ("nitro",), "hetero"),
    Substituent("amino", "N", (AMINE,), "hetero", AMINE),
    Substituent("(dimethylamino)", "N(C)C", (AMINE,), "hetero", AMINE),
    Substituent("sulfanyl", "S", (THIOL,), "hetero", THIOL),
    Substituent("hydroxy", "O", (HYDROXYL,), "hetero", HYDROXYL),
    Substituent("oxo", "=O", (KETONE,), "hetero", KETONE, reach=1),
    Substituent("cyano", "C#N", (NITRILE,), senior=NITRILE),
    Substituent("acetamido", "NC(C)=O", (AMIDE,), "hetero", AMIDE),
    Substituent("(acetyloxy)", "OC(C)=O", (ESTER,), "hetero", ESTER),
)
NITROGEN = 0  # the locant "N" of amides and amines; it sorts before the numbers, as it should
ON_NITROGEN = {AMIDE: ("methyl", "ethyl", "phenyl"), AMINE: ("methyl", "ethyl")}


@dataclass(frozen=True)
class Structure:
    """A parent of `size` carbons, its principal group at carbon `position` (0: none) and its substituents by carbon."""

    parent: str
    size: int
    principal: str
    position: int
    placed: tuple[tuple[int, Substituent], ...] = ()
    alkyl: str = "methyl"

    def at(self, carbon: int) -> list[Substituent]:
        """Substituents of one carbon, in alphabetical order."""
        return sorted((sub for locant, sub in self.placed if locant == carbon), key=lambda sub: sub.order)

    def valences(self, carbon: int) -> int:
        """Bonds that the carbon (or the nitrogen) has left for further substituents."""
        if carbon == NITROGEN:
            return 2 - len(self.at(NITROGEN))
        is_end = self.parent == CHAIN and carbon in (1, self.size)
        free = 3 if is_end else 1 if self.parent == BENZENE else 2
        if carbon == self.position:
            fills = self.principal == KETONE or (self.principal in TERMINAL and self.parent == CHAIN)
            free = 0 if fills else free - 1
        return free - sum(2 if sub.smiles.startswith("=") else 1 for sub in self.at(carbon))

    def admits(self, sub: Substituent, carbon: int) -> bool:
        """Whether the substituent may sit there and the name stay the systematic one."""
        if self.valences(carbon) < (2 if sub.smiles.startswith("=") else 1):
            return False
        if carbon == NITROGEN:
            return sub.name in ON_NITROGEN[self.principal]
        if sub.senior and SENIORITY.index(self.principal) >= SENIORITY.index(sub.senior):
            return False
        if self.parent == CHAIN and min(carbon - 1, self.size - carbon) < sub.reach:
            return False
        others = {other.element for other in self.at(carbon)}
        if carbon == self.position and self.principal in (HYDROXYL, AMINE):
            others.add("hetero")
        clashes = {"carbon": set(), "halogen": {"hetero"}, "hetero": {"hetero", "halogen"}}[sub.element]
        return not others & clashes  # acetals, aminals and the like fall apart

    def numbered(self) -> "Structure":
        """The same structure under the numbering that the rules prescribe."""
        carbons, found = list(range(1, self.size + 1)), list[Structure]()
        for start in [0] if self.parent == CHAIN else range(self.size):
            turned = carbons[start:] + carbons[:start]
            for order in (turned, turned[::-1]):
                number = dict(zip(order, carbons, strict=True)) | {0: 0}  # no principal group, or the nitrogen
                placed = [(number[locant], sub) for locant, sub in self.placed]
                placed.sort(key=lambda item: (item[1].order, item[0]))
                found.append(replace(self, position=number[self.position], placed=tuple(placed)))

        def locants(structure: Structure) -> tuple[int, list[int], list[int]]:
            cited = [locant for locant, _ in structure.placed]
            return structure.position, sorted(cited), cited

        return min(found, key=locants)

    def name(self) -> str:
        """The systematic name of a numbered structure."""
        locants: dict[Substituent, list[int]] = {}
        for locant, sub in self.placed:
            locants.setdefault(sub, []).append(locant)
        is_bare = self.parent != CHAIN and not self.position and len(self.placed) == 1  # chlorobenzene: no locant
        prefixes = []
        for sub, found in locants.items():
            cited = "" if is_bare else ",".join("N" if at == NITROGEN else str(at) for at in found) + "-"
            multipliers = ("", "bis", "tris", "tetrakis") if sub.name.startswith("(") else ("", "di", "tri", "tetra")
            prefixes.append(cited + multipliers[len(found) - 1] + sub.name)
        if self.parent == BENZENE:
            ending = BENZENES[self.principal]
        else:
            is_located = self.parent == CHAIN or any(locant for locant, _ in self.placed)
            at = f"-{self.position}-" if is_located else ""
            endings, cyclo = (CHAIN_ENDINGS, "") if self.parent == CHAIN else (RING_ENDINGS, "cyclo")
            ending = cyclo + STEMS[self.size] + endings[self.principal].format(at=at)
        return (f"{self.alkyl} " if self.principal == ESTER else "") + "-".join(prefixes) + ending

    def smiles(self) -> str:
        """The SMILES of a numbered structure: the principal group, then the carbons by rising locant."""
        on_nitrogen = [sub.smiles for sub in self.at(NITROGEN)]
        amine = "N" + "".join(f"({branch})" for branch in on_nitrogen[:-1]) + "".join(on_nitrogen[-1:])
        leading = "".join(on_nitrogen[:1]) + "N" + "".join(f"({branch})" for branch in on_nitrogen[1:])
        heads = {
            ACID: "OC(=O)", ESTER: f"{ESTER_ALKYLS[self.alkyl]}OC(=O)", AMIDE: f"{leading}C(=O)", NITRILE: "N#C",
            ALDEHYDE: "O=C", KETONE: "O=", HYDROXYL: "O", AMINE: leading, NONE: "",
        }  # fmt: skip
        written = heads[self.principal] if self.position <= 1 else ""
        first = 2 if self.parent == CHAIN and self.principal in TERMINAL else 1
        for carbon in range(first, self.size + 1):
            branches = [sub.smiles for sub in self.at(carbon)]
            if self.parent != CHAIN:
                branches = [branch.replace("1", "2") for branch in branches]  # ring 1 is the parent
            if carbon == self.position > 1:
                branches.insert(0, {KETONE: "=O", HYDROXYL: "O", AMINE: amine}[self.principal])
            written += "c" if self.parent == BENZENE else "C"
            written += "1" if self.parent != CHAIN and carbon in (1, self.size) else ""
            bare = branches.pop() if branches and carbon == self.size else ""
            written += "".join(f"({branch})" for branch in branches) + bare
        return written

    def groups(self) -> tuple[str, ...]:
        """Principal group, parent ring, then what the substituents bring, each once."""
        found = [self.principal, self.parent, *(group for _, sub in self.placed for group in sub.groups)]
        return tuple(dict.fromkeys(group for group in found if group not in (NONE, CHAIN)))


def _draw(rng: random.Random, num_substituents: int) -> Structure | None:
    """A random structure, or None where a substituent found no place."""
    parent = rng.choices((CHAIN, RING, BENZENE), weights=(5, 2, 3))[0]
    size = {CHAIN: rng.randint(3, 10), RING: rng.randint(3, 8), BENZENE: 6}[parent]
    principal = rng.choice([group for group in PRINCIPALS if parent != BENZENE or group != KETONE])
    position = 0 if principal == NONE else 1
    if parent == CHAIN and principal in (KETONE, HYDROXYL, AMINE):
        position = rng.randint(2, size - 1) if principal == KETONE else rng.randint(1, size)
    structure = Structure(parent, size, principal, position, alkyl=rng.choice(list(ESTER_ALKYLS)))
    carbons = range(0 if principal in ON_NITROGEN else 1, size + 1)
    for _ in range(num_substituents):
        is_repeat = structure.placed and rng.random() < 0.25  # di-, tri-
        sub = structure.placed[-1][1] if is_repeat else rng.choice(SUBSTITUENTS)
        places = [carbon for carbon in carbons if structure.admits(sub, carbon)]
        if not places:
            return None
        structure = replace(structure, placed=(*structure.placed, (rng.choice(places), sub)))
    return structure.numbered()


def molecules(
    count: int, *, seed: int, substituents: tuple[int, int], exclude: frozenset[str] | set[str] = frozenset()
) -> list[Molecule]:
    """Distinct random molecules; a larger count continues the same list.

    Args:
        substituents: the fewest and the most; (0, 1) is simple, (2, 4) is complex.
        exclude: SMILES that must not come up.

    Raises:
        CaftuneError: when no more molecules of this kind can be found.
    """
    rng = random.Random(seed)
    found: dict[str, Molecule] = {}
    num_misses = 0
    while len(found) < count:
        structure = _draw(rng, rng.randint(*substituents))
        smiles = structure.smiles() if structure else ""
        if structure and smiles not in found and smiles not in exclude:
            found[smiles] = Molecule(structure.name(), smiles, structure.groups())
            num_misses = 0
        elif (num_misses := num_misses + 1) > 20_000:
            raise CaftuneError(f"count must be at most {len(found)} for {substituents=}, got {count}. Ask for fewer.")
    return list(found.values())


def prompt(molecule: Molecule | str) -> str:
    """The question: `Name: ethanol` and, on the next line, `SMILES:`."""
    return f"Name: {molecule if isinstance(molecule, str) else molecule.name}\nSMILES:"


def completion(molecule: Molecule) -> str:
    """The answer, after a space, as it follows `prompt`."""
    return f" {molecule.smiles}"
