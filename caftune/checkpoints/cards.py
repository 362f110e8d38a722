"""Model cards: what a reader of a heads folder, or of a fine-tuned model, needs to know to use or repeat it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from caftune.checkpoints.heads_folder import QUALITY_FILE, describe_heads, file_name

if TYPE_CHECKING:
    from rich.console import Console

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def heads_card(folder: Path, name: str, *, licence: str) -> str:
    """The card of a heads folder, from its heads.json and quality.json."""
    description = describe_heads(folder)
    base, training = description["base"], dict(description["training"])
    data, command = training.pop("data", None), training.pop("command", None)
    facts = {
        "base": base["name"] or base["model_type"],
        "revision of the base": base.get("revision") or "not recorded",
        "kind": f"{description['kind']}, leaving the model at the {description['fork_point']}",
        "horizons": ", ".join(map(str, description["horizons"])),
        "trained on": _in_words(data) if data else "not recorded",
        "settings": _in_words(training),
        "command": f"`{command}`" if command else "not recorded",
        "SHA-256 of the weights": description["weights_sha256"],
        "made with": f"caftune {description['caftune']}",
        "licence": licence,
    }
    use = _for_drafting(facts["base"]) if training.get("stage") == 2 else _for_training(facts["base"], name)
    lines = [
        f"# {name}",
        "",
        *use,
        "",
        *_listed(facts),
    ]
    quality = read_quality(folder)
    if quality is not None:
        lines += ["", "## Quality", "", *quality_table(quality)]
    return _card(_metadata(base["name"], licence, "caftune-heads"), lines)


def _for_drafting(model: str) -> list[str]:
    return [
        f"Auxiliary heads of {model}, kept from its fine-tuning: they draft for it, so that it writes in fewer passes. They "
        "fit this model, and loading checks that.",
        "",
        "```",
        'caftune generate MODEL HEADS "Once upon a time"',
        "```",
    ]


def _for_training(base: str, name: str) -> list[str]:
    return [
        f"Auxiliary heads for {base}, for concept-aware fine-tuning (CAFT, "
        "[arXiv 2506.07833](https://arxiv.org/abs/2506.07833)): during fine-tuning, head h says which token stands h places "
        "ahead; afterwards the heads are dropped. They fit this base alone, and loading checks that.",
        "",
        "```python",
        "from caftune import CAFTConfig, CAFTTrainer",
        "",
        f'trainer = CAFTTrainer("{base}", CAFTConfig("run", heads="{name}"), train_dataset=task)',
        "```",
    ]


def write_model_card(folder: Path, base: str, options: Any, steps: int, *, heads: Mapping[str, Any] | None) -> None:
    """Write the card of a fine-tuned model into its folder.

    Args:
        options: the CAFTConfig of the training.
        steps: optimizer steps it took.
        heads: the heads.json of the heads it was trained with; None where it had none.
    """
    names = (
        "learning_rate",
        "num_train_epochs",
        "seed",
        *(("aux_weight", "aux_decay", "aux_schedule") if heads else ()),
    )
    settings = {"steps": steps, **{name: getattr(options, name) for name in names}}
    base = file_name(base)
    facts: dict[str, Any] = {"base": base, "settings": _in_words(settings)}
    is_adapter = (folder / "adapter_config.json").is_file()
    if heads is None:
        facts["auxiliary heads"] = "none (plain next-token fine-tuning)"
    else:
        facts["auxiliary heads"] = f"{len(heads['horizons'])} ({heads['kind']}), not part of this checkpoint"
        facts["SHA-256 of the heads"] = heads["weights_sha256"]
        facts["training of the heads"] = _in_words(heads["training"])
    lines = [
        f"# {folder.name}",
        "",
        f"{base}, fine-tuned with [caftune](https://pypi.org/project/caftune)"
        + (" by concept-aware fine-tuning (arXiv 2506.07833)." if heads is not None else "."),
        "An adapter, to be loaded with PEFT. Where its tokenizer ends texts otherwise than the base, give `generate` its "
        "`eos_token_id`."
        if is_adapter
        else "An ordinary checkpoint: its keys are those of the base.",
        "",
        *_listed(facts),
    ]
    card = _card(_metadata(base, None, "caft" if heads is not None else "sft"), lines)
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_quality(folder: Path) -> dict[str, Any] | None:
    """The quality report of a heads folder, None where there is none, or one of other weights."""
    path = folder / QUALITY_FILE
    if not path.is_file():
        return None
    quality = json.loads(path.read_text(encoding="utf-8"))
    return quality if quality.get("weights_sha256") == describe_heads(folder)["weights_sha256"] else None


def print_quality(console: "Console", folder: Path) -> None:
    """Show the quality report of a heads folder, where it has one."""
    from rich.markdown import Markdown  # here, for a training needs none

    quality = read_quality(folder)
    if quality is not None:
        console.print(Markdown("\n".join(quality_table(quality))))


def quality_table(quality: Mapping[str, Any]) -> list[str]:
    """A quality report (see quality.py) as lines of Markdown."""
    horizons = list(quality["targets"])
    names = {"heads": "these heads", "untrained": "untrained copies", "trunk": "the model itself, one token before"}
    lines = [f"| | {' | '.join(f'h = {h}' for h in horizons)} |", f"|---|{'---|' * len(horizons)}"]
    for measure, unit in (
        ("loss", "loss, nats"),
        ("top1", "top-1, %"),
        ("top5", "top-5, %"),
        ("agreement", "agreement, %"),
    ):
        for kind, who in names.items():
            if measure in quality[kind]:
                values = (quality[kind][measure][h] for h in horizons)
                cells = (f"{v:.2f}" if measure == "loss" else f"{100 * v:.1f}" for v in values)
                lines.append(f"| {unit}: {who} | {' | '.join(cells)} |")
    trained, untrained = (quality[kind]["accepted_length"] for kind in ("heads", "untrained"))
    return [
        *lines,
        "",
        f"Measured on {quality['targets'][horizons[0]]:,} targets at h = {horizons[0]} of held-out text. *Agreement*: the "
        f"head's first guess is what the model itself writes, greedily, from {quality['positions']} places. As a draft "
        f"{trained:.2f} of the {len(horizons)} guesses would be accepted on average (untrained copies: {untrained:.2f}).",
    ]


def _metadata(base: str, licence: str | None, tag: str) -> ModelCardData:
    return ModelCardData(
        base_model=base if _HUB_ID.fullmatch(base) else None,
        license=licence,
        library_name="caftune",
        tags=["caftune", tag],
    )


def _card(metadata: ModelCardData, lines: list[str]) -> str:
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _in_words(values: Mapping[str, Any]) -> str:
    given = {key: value for key, value in values.items() if value is not None}
    words = (f"({_in_words(value)})" if isinstance(value, Mapping) else value for value in given.values())
    return ", ".join(f"{key} {word}" for key, word in zip(given, words, strict=True))


def _listed(facts: Mapping[str, Any]) -> list[str]:
    """A list and no table: on a narrow screen a table would cut hashes short."""
    return [f"- **{name}**: {' '.join(str(value).split())}" for name, value in facts.items()]
