"""Model cards of heads and of fine-tuned models: what a reader needs to use or repeat them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from caftune.checkpoints.heads_folder import QUALITY_FILE, config_of, describe_heads, file_name
from caftune.checkpoints.provenance import package_version
from caftune.checkpoints.quality_card import quality_table
from caftune.files import read_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DRAFTING = """\
Auxiliary heads of {base}, kept from its fine-tuning: they draft tokens for it, so that it generates in fewer forward passes.
They fit this model only; loading checks that.

```
caftune generate MODEL HEADS "Once upon a time"
```"""
_TRAINING = """\
Auxiliary heads for {base}, for concept-aware fine-tuning (CAFT, [arXiv 2506.07833](https://arxiv.org/abs/2506.07833)): during
fine-tuning, head h predicts the token h positions ahead; afterwards the heads are dropped. They fit this base only; loading
checks that.

```python
from caftune import CAFTConfig, CAFTTrainer

trainer = CAFTTrainer("{base}", CAFTConfig("run", heads="{name}"), train_dataset=task)
```"""

_EAGLE3 = """\
EAGLE-3 draft model of one layer for {model}: the auxiliary head of horizon 2, written with caftune. It drafts one token a pass,
and the texts stay those of the model. vLLM has run such drafts, SGLang has not: compare the acceptance that the server
reports with that of `caftune heads info HEADS --measure PROMPTS`.

{commands}

One token is right: the layer was trained to predict the token after the next from the model's hidden states, not from its
own."""
_SERVER_COMMANDS = {
    "vLLM": """\
```
vllm serve {model} \\
    --speculative-config '{{"method": "eagle3", "model": "FOLDER", "num_speculative_tokens": 1}}'
```""",
    "SGLang": """\
```
python -m sglang.launch_server --model-path {model} \\
    --speculative-algorithm EAGLE3 --speculative-draft-model-path FOLDER \\
    --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
```""",
}


def heads_card(folder: Path, name: str, *, licence: str) -> str:
    """The card of a heads folder, from its heads.json and quality.json."""
    description = describe_heads(folder)
    base, training = description["base"], dict(description["training"])
    data, command = training.pop("data", None), training.pop("command", None)
    norm = "" if config_of(description).final_norm else ", without the final norm before the unembedding"
    facts = {
        "base": base["name"] or base["model_type"],
        "revision of the base": base.get("revision") or "not recorded",
        "kind": f"{description['kind']}, branching off the model at the {description['fork_point']}{norm}",
        "horizons": ", ".join(map(str, description["horizons"])),
        "trained on": _in_words(data) if data else "not recorded",
        "settings": _in_words(training),
        "command": f"`{command}`" if command else "not recorded",
        "SHA-256 of the weights": description["weights_sha256"],
        "made with": f"caftune {description['caftune']}",
        "licence": licence,
    }
    use = _DRAFTING if training.get("stage") == 2 else _TRAINING
    lines = [f"# {name}", "", use.format(base=facts["base"], name=name), "", *_listed(facts)]
    quality = read_quality(folder)
    if quality is not None:
        lines += ["", "## Quality", "", *quality_table(quality)]
    return _card(base["name"], licence, "caftune-heads", lines)


def eagle3_card(description: Mapping[str, Any], model: str, servers: Sequence[str]) -> str:
    """The card of an EAGLE-3 draft model.

    Args:
        description: the heads.json of its heads.
        model: the model that it drafts for.
        servers: those that can load it, of _SERVER_COMMANDS.
    """
    commands = "\n\n".join(_SERVER_COMMANDS[name].format(model=model) for name in servers)
    facts = {
        "model": model,
        "servers": ", ".join(servers),
        "horizon": 2,
        "horizons left out": ", ".join(map(str, description["horizons"][1:])) or "none",
        "SHA-256 of the heads": description["weights_sha256"],
        "training of the heads": _in_words(description["training"]) or "not recorded",
        "made with": f"caftune {package_version('caftune')}",
        "licence": "see the model",
    }
    lines = [f"# EAGLE-3 draft for {model}", "", _EAGLE3.format(model=model, commands=commands), "", *_listed(facts)]
    return _card(model, None, "eagle3", lines)


def write_model_card(folder: Path, base: str, options: Any, steps: int, *, heads: Mapping[str, Any] | None) -> None:
    """Write the card of a fine-tuned model into its folder.

    Args:
        options: the CAFTConfig of the training.
        steps: optimizer steps it took.
        heads: the heads.json of the heads it was trained with; None where it had none.
    """
    names = ["learning_rate", "num_train_epochs", "seed"]
    names += ["aux_weight", "aux_decay", "aux_schedule", "train_heads", "heads_lora_rank"] if heads else []
    settings = {"steps": steps, **{name: getattr(options, name) for name in names}}
    base = file_name(base)
    facts = {"base": base, "settings": _in_words(settings)}
    dtype = read_json(folder / "config.json").get("dtype")
    if dtype is not None:
        facts["weights"] = f"{dtype}, as the base was published"
    how, tag = ".", "sft"
    if heads is None:
        facts["auxiliary heads"] = "none (plain next-token fine-tuning)"
    else:
        how, tag = " by concept-aware fine-tuning (arXiv 2506.07833).", "caft"
        facts["auxiliary heads"] = f"{len(heads['horizons'])} ({heads['kind']}), not part of this checkpoint"
        facts["SHA-256 of the heads"] = heads["weights_sha256"]
        facts["training of the heads"] = _in_words(heads["training"])
    use = "An ordinary checkpoint: its keys are those of the base."
    if (folder / "adapter_config.json").is_file():
        use = (
            "An adapter: load it with PEFT. If its tokenizer ends texts with another token than the base, pass its "
            "`eos_token_id` to `generate`."
        )
    intro = f"{base}, fine-tuned with [caftune](https://pypi.org/project/caftune){how}"
    card = _card(base, None, tag, [f"# {folder.name}", "", intro, use, "", *_listed(facts)])
    write_text(folder / "README.md", card)


def read_quality(folder: Path, file: Path | None = None) -> dict[str, Any] | None:
    """The quality report of heads, from their folder or another file; None if there is none, or only one of other weights."""
    quality = read_json(file or folder / QUALITY_FILE)
    return quality if quality and quality.get("weights_sha256") == describe_heads(folder)["weights_sha256"] else None


def print_quality(console: "Console", folder: Path) -> None:
    """Show the quality report of a heads folder, where it has one."""
    from rich.markdown import Markdown  # imported here, because training does not need it

    quality = read_quality(folder)
    if quality is not None:
        console.print(Markdown("\n".join(quality_table(quality))))


def _card(base: str, licence: str | None, tag: str, lines: list[str]) -> str:
    linked = base if _HUB_ID.fullmatch(base) else None
    metadata = ModelCardData(base_model=linked, license=licence, library_name="caftune", tags=["caftune", tag])
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _in_words(values: Mapping[str, Any]) -> str:
    """`key value, key value`, without unknown values."""
    return ", ".join(
        f"{key} ({_in_words(value)})" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in values.items()
        if value is not None
    )


def _listed(facts: Mapping[str, Any]) -> list[str]:
    """A list, not a table: on a narrow screen a table would cut hashes short."""
    return [f"- **{name}**: {' '.join(str(value).split())}" for name, value in facts.items()]
