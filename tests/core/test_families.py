"""Every family carries heads correctly or is refused, and docs/models.md says which."""

import re
import runpy
from pathlib import Path

import pytest
from examination import KINDS, examine
from families import FAMILIES
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).parents[2]
_REPEAT = "does more between its last layer and its logits than caftune can repeat"
_FORESIGHT = (
    "is not causal: changing a later token changes earlier logits, so heads could see their targets. Use a causal"
)

# Families that carry no heads, and those that carry MLP heads only, with what the user reads.
REFUSED = {
    **dict.fromkeys(["bert", "bert_generation", "xlnet", "cpmant"], _FORESIGHT),
    **dict.fromkeys(["roberta_decoder", "prophetnet_decoder"], f"{_REPEAT}, so it cannot carry auxiliary heads"),
}
MLP_ONLY = {
    **dict.fromkeys(["gemma3n", "inkling2", "big_bird_decoder", "xlm", "reformer"], f"{_REPEAT}.*Use MLP heads"),
    "hrm_text": "has no list of 16 decoder layers that caftune can find, so it cannot carry decoder heads. Use MLP heads",
    "mllama_crossing": "does not call its model.layers.1 in a forward pass, so it cannot carry decoder heads. Use MLP",
}
# Families whose heads cannot draft, because the model cannot check several tokens at once and take some of them back.
DRAFTLESS = {
    "qwen3_next_attention",
    "qwen3_next_linear",
    "qwen3_5_attention",
    "qwen3_5_linear",
    "qwen3_5_moe",
    "olmo_hybrid_attention",
    "olmo_hybrid_linear",
    "granitemoehybrid_attention",
    "granitemoehybrid_mamba",
    "falcon_mamba",
    "falcon_h1",
    "openai_gpt",
    "mamba",
    "mamba2",
    "jamba_attention",
    "jamba_mamba",
    "bamba_attention",
    "bamba_mamba",
    "zamba",
    "zamba2",
    "nemotron_h",
    "minimax_attention",
    "minimax_linear",
    "kimi_linear_attention",
    "kimi_linear_linear",
    "bailing_hybrid",
    "moshi",
    "deepseek_v32",
    "glm_moe_dsa",
    "deepseek_v4",
    "hy_v4",
    "qwen4_exp",
    "axk2",
    "rwkv",
    "zaya",
    "recurrent_gemma_attention",
    "recurrent_gemma_recurrent",
    "xlstm",
    "qwen3_5_multimodal",
    "qwen3_5_moe_multimodal",
    "xlm",
    "reformer",
}
# Families of newer transformers than the installed one are left out.
KNOWN = [family for family in FAMILIES if FAMILIES[family][0] in CONFIG_MAPPING]


@pytest.fixture(scope="module")
def examined():
    """Family -> what `examine` finds; each is examined once."""
    results = {}

    def of(family):
        if family not in results:
            results[family] = examine(family)
        return results[family]

    return of


@pytest.mark.parametrize("family", KNOWN)
def test_a_family_has_every_property_or_is_refused_with_a_sentence(family, examined):
    found = dict(examined(family))
    if family in REFUSED:
        assert re.search(REFUSED[family], found["refused"])
        return
    if family in MLP_ONLY:
        assert re.search(MLP_ONLY[family], found.pop("decoder refused"))
    assert found.pop("drafts") == ("no" if family in DRAFTLESS else "yes")
    for told in ("model type", "packing eager", "packing sdpa", "lora"):
        found.pop(told)
    kinds = KINDS[1:] if family in MLP_ONLY else KINDS
    assert len(found) == 2 + 5 * len(kinds)
    assert {name: said for name, said in found.items() if said != "yes"} == {}


def test_adapters_of_layers_that_share_a_weight_are_not_merged_into_it(examined):
    assert "shares its weight, and would change too. Nothing was written" in examined("zamba")["lora"]


def test_at_least_forty_model_types_carry_heads_of_either_kind(examined):
    both = {FAMILIES[family][0] for family in KNOWN if {"refused", "decoder refused"}.isdisjoint(examined(family))}
    assert len(both) >= 40


def test_the_page_of_models_says_what_was_found(examined):
    table = runpy.run_path(str(ROOT / "scripts" / "models_table.py"))
    page = (ROOT / "docs" / "models.md").read_text()
    if table["versions"]() not in page:
        pytest.skip(f"docs/models.md was made with other versions than {table['versions']()}")
    results = {family: examined(family) for family in FAMILIES}
    said = (table["counts"](results) + "\n" + table["tables"](results)).splitlines()
    missing = [line for line in said if line not in page]
    assert not missing, f"docs/models.md is stale: run python scripts/models_table.py ({missing[0]})"
    assert page.endswith("\n" + table["tables"](results)), (
        "docs/models.md lists more: run python scripts/models_table.py"
    )
