"""The command line: one function per command, each one call. torch and transformers are imported inside commands."""

import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from caftune.errors import CaftuneError, system_error

if TYPE_CHECKING:
    from caftune.pipeline.schema import Recipe

console = Console(quiet=os.environ.get("RANK", "0") != "0")  # with several processes one prints; all print errors


class _Commands(TyperGroup):
    """The commands. Errors that a user can fix are printed in one line; others keep their traceback.

    With CAFTUNE_TRACEBACK=1 all keep it.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was given."""
        _quiet_libraries()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.print(
                "\nStopped. Labels and checkpoints written so far are kept; run the same command again to resume."
            )
            sys.exit(130)
        except Exception as error:
            reason = str(error) if isinstance(error, CaftuneError) else system_error(error)
            if reason is None or os.environ.get("CAFTUNE_TRACEBACK"):
                raise
            text = re.sub(r"\s*\n\s*", " ", f"Error: {reason}")  # libraries' messages have line breaks
            Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
            sys.exit(2)


app = typer.Typer(
    cls=_Commands,
    help="Concept-aware fine-tuning of language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as trainer.learning_rate=1e-5.")
]

Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Give prompts as user messages. Default: where there is a chat template."),
]


def _load(path: str, overrides: list[str] | None) -> "Recipe":
    """The recipe. Commands load it before torch is imported, so that a mistake is reported at once."""
    from caftune.pipeline.recipe import load_recipe

    return load_recipe(path, overrides or [])


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="The run folder.")] = "runs/demo",
) -> None:
    """The whole path on a small embedded model and task: offline, on a CPU, under three minutes."""
    from caftune.demo import run

    run.demo(output)


@app.command()
def label(recipe: RecipePath, overrides: Overrides = None) -> None:
    """The base model answers prompts: the data the heads are pretrained on."""
    loaded = _load(recipe, overrides)
    from caftune.pipeline.label import label_prompts

    console.print(f"Labels: {label_prompts(loaded)}", soft_wrap=True)


@app.command()
def pretrain_heads(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Stage 1: pretrain the auxiliary heads on the labels."""
    loaded = _load(recipe, overrides)
    from caftune.checkpoints.cards import print_quality
    from caftune.pipeline import pretrain

    heads = pretrain.pretrain_heads(loaded)
    print_quality(console, heads)
    console.print(f"Heads: {heads}", soft_wrap=True)


@app.command()
def adapt_heads(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train the heads on the task's data before stage 2 (`train` does it where the recipe has `adapt`)."""
    loaded = _load(recipe, overrides)
    from caftune.pipeline import adapt

    console.print(f"Heads: {adapt.adapt_heads(loaded)}", soft_wrap=True)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Stage 2: concept-aware fine-tuning; ends with an ordinary checkpoint."""
    loaded = _load(recipe, overrides)
    from caftune.pipeline.finetune import finetune_model

    console.print(f"Model: {finetune_model(loaded)}", soft_wrap=True)


@app.command(name="eval")
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Evaluate a model on the tasks of `eval`."""
    loaded = _load(recipe, overrides)
    from caftune.pipeline.evaluate import evaluate_model, print_results

    print_results(console, evaluate_model(loaded))


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option(help="Make one run, ARM/SEED or base, so that a scheduler can spread them.")
    ] = None,
) -> None:
    """Did it help? Next-token fine-tuning, CAFT and its controls, each with several seeds, on the tasks of `eval`."""
    loaded = _load(recipe, overrides)
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from caftune.compare.runner import compare as make_runs
    from caftune.compare.runner import print_comparison

    disable_progress_bars()
    logging.disable_progress_bar()
    print_comparison(console, make_runs(loaded, only))


@app.command()
def export(
    recipe: RecipePath,
    overrides: Overrides = None,
    checkpoint: Annotated[str | None, typer.Option(help="A checkpoint folder; the last one by default.")] = None,
) -> None:
    """Write a checkpoint of stage 2 as an ordinary model (no heads; adapters merged, unless model.lora.merge is false)."""
    loaded = _load(recipe, overrides)
    from caftune.pipeline.finetune import export_checkpoint

    console.print(f"Model: {export_checkpoint(loaded, checkpoint)}", soft_wrap=True)


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="How many rows to show.")] = 3,
) -> None:
    """Show rows of data.train: which tokens are trained on, and the targets of each horizon."""
    loaded = _load(recipe, overrides)
    from caftune.pipeline.preview import preview_rows, print_row

    for number, row in enumerate(preview_rows(loaded, rows)):
        print_row(console, number, *row)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of `caftune compare` or `caftune train`.")
    ],
    output: Annotated[str | None, typer.Option(help="Where to write; the first run folder by default.")] = None,
) -> None:
    """Write report.html, one page to open or to share, and report.md."""
    from caftune.report.render import write_report

    for path in write_report(runs, output):
        console.print(f"Report: {path}", soft_wrap=True)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[
        Literal["train", "heads"], typer.Option(help="The stage to plan: train, or heads (stage 1).")
    ] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and operations.")] = False,
) -> None:
    """What a stage will cost, and whether it fits this machine, before any weight is loaded."""
    loaded = _load(recipe, overrides)
    from datasets import disable_progress_bars

    from caftune.pipeline.plan import plan as plan_of
    from caftune.pipeline.plan import print_plan

    disable_progress_bars()
    found = plan_of(loaded, stage)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_plan(console, found)


heads_app = typer.Typer(
    help="Heads: measure, show, share, import, export.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(heads_app, name="heads")
HeadsName = Annotated[str, typer.Argument(metavar="HEADS", help="A heads folder, or a hub id owner/name[@revision].")]


@heads_app.command()
def info(
    heads: HeadsName,
    measure: Annotated[
        str | None, typer.Option(metavar="PROMPTS", help="Decode with them from these prompts (a file or hub id).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model they draft for; their base by default.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts to use, from the first.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    chat: Chat = None,
) -> None:
    """Show heads: their base, training and quality; with --measure, how much their drafts save."""
    from rich.markdown import Markdown

    from caftune.checkpoints.cards import heads_card
    from caftune.checkpoints.heads_folder import describe_heads, find_heads, read_heads

    folder = find_heads(heads)
    read_heads(folder)
    if measure is None:
        card = heads_card(folder, heads, licence="see the base")
        console.print(Markdown(card.split("\n---\n", 1)[1]))
        return
    from transformers.utils import logging

    from caftune.generation.backends import Sampling
    from caftune.pipeline.generate import Writer, print_drafting

    logging.disable_progress_bar()
    description = describe_heads(folder)
    model, revision = _drafted_model(folder, description["base"], model)
    writer = Writer(model, heads, revision=revision, length=len(description["horizons"]))
    given = writer.prompts([], measure, limit, chat=chat)
    print_drafting(console, list(writer.write(given, Sampling(writer.room(given, max_new_tokens), 0), alone=True)))


def _drafted_model(folder: Path, base: dict[str, Any], model: str | None) -> tuple[str, str | None]:
    """The model that heads draft for, and its revision: the one given, their neighbour (kept heads), or their base."""
    neighbour = folder.parent / "model"
    if model is None:
        model = str(neighbour) if folder.name == "model-heads" and neighbour.is_dir() else base["name"]
        if "/" not in model and base["revision"] is None and not Path(model).is_dir():
            raise CaftuneError(
                f"--model must be given, because the base of these heads, {model}, was a folder. Name the folder."
            )
    return model, base["revision"] if model == base["name"] else None


@heads_app.command()
def measure(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Measure the recipe's heads on its held-out labels, next to untrained copies and the model itself."""
    loaded = _load(recipe, overrides)
    from rich.markdown import Markdown

    from caftune.checkpoints.quality_card import quality_table
    from caftune.pipeline.pretrain import measure_quality

    console.print(Markdown("\n".join(quality_table(measure_quality(loaded)))))


@heads_app.command()
def push(
    heads: HeadsName,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    licence: Annotated[str, typer.Option(help="As the hub names it. The licence of the base applies to its heads.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; main by default.")] = None,
) -> None:
    """Publish heads on the Hugging Face hub, with a card."""
    from caftune.checkpoints.hub import push_heads

    console.print(
        f"Pushed: {push_heads(heads, name, licence=licence, private=private, revision=revision)}", soft_wrap=True
    )


@heads_app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="Heads on the hub.")],
    folder: Annotated[str, typer.Argument(help="A new folder.")],
) -> None:
    """Fetch heads from the Hugging Face hub into a folder. (heads.path takes the hub id itself, too.)"""
    from caftune.checkpoints.hub import pull_heads

    console.print(f"Heads: {pull_heads(name, folder)}", soft_wrap=True)


@heads_app.command(name="import")
def import_heads(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A heads.pth, a folder with one, or a hub id owner/name[@revision].")
    ],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model they were trained for: a folder or a hub id.")],
    folder: Annotated[str, typer.Argument(help="A new folder.")],
    revision: Annotated[str | None, typer.Option(help="Of the base on the hub.")] = None,
) -> None:
    """Convert heads of CAFT's reference implementation (heads.pth) into a heads folder with the same outputs."""
    from caftune.checkpoints.reference_heads import import_heads as convert

    console.print(f"Heads: {convert(source, base, folder, revision=revision)}", soft_wrap=True)


@heads_app.command()
def export_eagle3(
    heads: HeadsName,
    folder: Annotated[str, typer.Argument(help="A new folder.")],
    model: Annotated[str | None, typer.Option(help="The model they draft for; their base by default.")] = None,
) -> None:
    """Write the head of horizon 2 as an EAGLE-3 draft model, for vLLM and SGLang (Llama- and Qwen3-shaped layers)."""
    from transformers.utils import logging

    from caftune.checkpoints.eagle3 import export_eagle3 as export
    from caftune.checkpoints.heads_folder import describe_heads, find_heads

    logging.disable_progress_bar()
    found = find_heads(heads)
    description = describe_heads(found)
    model, revision = _drafted_model(found, description["base"], model)
    servers = export(heads, model, folder, revision=revision)
    others = ", ".join(map(str, description["horizons"][1:]))
    left = f" The heads of horizons {others} are not in it: EAGLE-3 has no place for them." if others else ""
    console.print(
        f"EAGLE-3 draft of horizon 2: {folder} (for {' and '.join(servers)}; the commands are in its README.md).{left}",
        soft_wrap=True,
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id.")],
    heads: Annotated[
        str, typer.Argument(metavar="HEADS", help="Its heads: a folder, or a hub id owner/name[@revision].")
    ],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file or hub id with prompts, as labels.prompts.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of rows of --prompts to use, from the first.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 256, or what the context leaves.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=0)] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 42,
    draft: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a draft. Default: chosen by recent acceptance.")
    ] = None,
    chat: Chat = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Let the model write without heads, too, and compare.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each prompt.")] = False,
) -> None:
    """Let a model write in fewer passes: its heads draft tokens, which it checks. The answers are those of the model alone."""
    from transformers.utils import logging

    from caftune.generation.backends import Sampling
    from caftune.pipeline.generate import Writer, print_answer, print_drafting

    logging.disable_progress_bar()
    writer = Writer(model, heads, revision=revision, length=draft)
    given = writer.prompts(texts or [], prompts, limit, chat=chat)
    sampling = Sampling(max_new_tokens or writer.room(given, 256), temperature, top_p, top_k)
    found = []
    penalty, ends = repetition_penalty, stop or []
    for answer in writer.write(given, sampling, seed=seed, repetition_penalty=penalty, stop=ends, alone=alone):
        found.append(answer)
        print_answer(answer, writer, as_json=as_json)
    print_drafting(Console(stderr=True), found)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from caftune.pipeline.schema import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def _quiet_libraries() -> None:
    """Silence messages of libraries that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # huggingface_hub (1.x) reports each of five tries to reach the hub; the error says that it cannot be reached.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    # bitsandbytes (0.50), which PEFT imports, offers a faster kernel for 4-bit weights on CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_kernel_advice)


def _is_not_kernel_advice(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward from kernels-community" not in str(record.msg)


if __name__ == "__main__":
    app()
