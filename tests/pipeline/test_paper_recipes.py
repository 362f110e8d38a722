"""The paper's experiments: their settings, and each of them cut to a few steps, on a stand-in for the hub."""

import gc
import json
from pathlib import Path

import pytest
import torch
import yaml
from hub import files_in, serve_hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import llama3_1_chat_template

from caftune.checkpoints.heads_folder import describe_heads
from caftune.compare.runner import compare
from caftune.errors import CaftuneError
from caftune.evals.sandbox import check_sandbox
from caftune.evals.tasks import TASKS
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.recipe import load_recipe, trainer_config
from caftune.pipeline.stage_config import stage_two_config
from caftune.pipeline.stage_rows import task_rows

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "paper"
BASE, ROWS, TEXT = (
    "meta-llama/Llama-3.1-8B-Instruct",
    "michaelckj2004/caft-finetuning-datasets",
    "michaelchenkj/CAFT-Auxiliary-Head-Dataset",
)
OF_TASK = {  # by recipe: the task of its evaluation
    **{"code": "humaneval", "maths": "math500", "clinical": "mimic_bhc"},
    **{"molecules": "molecules", "proteins": "proteins"},
}
TASK_RECIPES = [f"{task}-{tuning}" for task in OF_TASK for tuning in ("lora", "full")]
ON_HUB = {  # rows of evaluations: file, and the card where the file's name does not say the split
    "humaneval": ("openai/openai_humaneval", "test.jsonl"),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl"),
    "molecules": ("language-plus-molecules/LPM-24_train", "split_valid.jsonl"),
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# The settings of the reference's README and scripts.
TRAINING = {
    **{"lr_scheduler_type": "cosine", "warmup_steps": 50, "num_train_epochs": 5, "weight_decay": 0},
    **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "optim": "adamw_bnb_8bit", "bf16": True},
    **{
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
    },
    **{"metric_for_best_model": "loss", "greater_is_better": False, "seed": 42, "assistant_only_loss": True},
}
ADAPT = {**TRAINING, "num_train_epochs": 1, "learning_rate": 1e-4, "early_stopping_patience": None}
ADAPT |= {"load_best_model_at_end": False, "metric_for_best_model": None, "greater_is_better": None}
HEADS = {**TRAINING, "learning_rate": 1e-4, "warmup_steps": 300, "early_stopping_patience": 3, "num_heads": 4}
HEADS |= {"aux_weight": 1.0, "aux_schedule": "constant", "aux_decay": 0.8, "head_kind": "decoder"}
HEADS |= {"aux_target_share": 1.0}
HEADS |= {"gradient_accumulation_steps": 4 * 2}  # of one process; the reference has 4 processes of 2
STAGE_TWO = {"aux_weight": 0.01, "aux_schedule": "reflected_sine", "aux_decay": 0.8}


def settings(options, names):
    return {name: getattr(value := getattr(options, name), "value", value) for name in names}


@pytest.mark.parametrize("name", TASK_RECIPES)
def test_the_settings_are_those_of_the_reference(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model, is_full = recipe.model, name.endswith("full")
    assert (model.name, model.freeze_unembedding, recipe.heads.path) == (BASE, is_full, "runs/paper/heads/heads")
    assert (recipe.data.limit, recipe.data.max_length) == (10_000, 512)
    assert (recipe.compare.seeds, recipe.eval.tasks) == (5, [OF_TASK[name.partition("-")[0]]])
    assert (recipe.output, len(recipe.compare.arms)) == (f"runs/paper/{name}", len({*recipe.compare.arms}))
    assert {"ntp", "caft", "no_pretraining", "beta0"} <= {*recipe.compare.arms}
    if is_full:
        assert model.tuning == "full"
    else:
        lora = model.lora
        assert (model.tuning, lora.r, lora.alpha, lora.dropout, lora.target_modules) == ("lora", 8, 16, 0.1, SEVEN)
    trainer = trainer_config(recipe, "trainer", output_dir="x", heads="y")
    wanted = {**TRAINING, **STAGE_TWO, "learning_rate": 5e-6 if is_full else 1e-5}
    assert settings(trainer, wanted) == wanted
    adapt = trainer_config(recipe, "adapt", output_dir="x", pretrain_heads=True, heads="y")
    assert settings(adapt, ADAPT) == ADAPT
    for options in (trainer, adapt):  # in full fine-tuning weights stay in float32
        assert options.model_init_kwargs == (None if is_full else {"dtype": "bfloat16"})


def test_the_settings_of_the_heads_are_those_of_the_reference():
    recipe = load_recipe(RECIPES / "heads.yaml")
    assert (recipe.model.name, recipe.heads.text, recipe.data.max_length) == (BASE, f"{TEXT}:train", 4096)
    assert recipe.output == "runs/paper/heads"  # whose heads/ the other recipes name
    pretrain = trainer_config(recipe, "pretrain", output_dir="x", pretrain_heads=True)
    assert settings(pretrain, HEADS) == HEADS


def test_recipes_of_one_tuning_differ_in_task_and_data_alone():
    for tuning in ("lora", "full"):
        kept = []
        for task in OF_TASK:
            values = yaml.safe_load((RECIPES / f"{task}-{tuning}.yaml").read_text())
            assert values["data"].pop("train") == f"{ROWS}/{task}:train"
            assert values["data"].pop("eval") == f"{ROWS}/{task}:test"
            values["compare"].pop("concepts")
            kept.append({key: value for key, value in values.items() if key not in ("output", "eval")})
        assert all(values == kept[0] for values in kept)
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"heads", *TASK_RECIPES}


def tokenizer():
    """Bytes, and Llama 3's marks; its chat template, and no padding token, as published."""
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [text for task in OF_TASK.values() for text in map(str, TASKS[task].rows)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=marks[0], eos_token=marks[-1])
    made.chat_template = llama3_1_chat_template
    return made


def conversations(task, count=10):
    """Rows of the reference's form, the second a failed generation: the first and the last column of the task's own rows."""
    known = [list(row.values()) for row in TASKS[task].rows]
    found = []
    for number in range(count):
        question, *_, answer = map(str, known[number % len(known)])
        turns = [{"role": "human", "content": question[:200]}, {"role": "assistant", "content": answer[:60]}]
        found.append({"id": number, "status": "FAILED" if number == 1 else "OK", "conversation": turns})
    return jsonl(found)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The base and all data sets of the recipes under their names, and the heads that heads.yaml makes of them."""
    folder = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    made = tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    config = LlamaConfig(vocab_size=len(made), num_key_value_heads=2, max_position_embeddings=131072, **shape, **ends)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    card = {"configs": [
        {"config_name": name, "data_files": [
            {"split": split, "path": f"{name}/{split}.jsonl"} for split in ("train", "test")
        ]}
        for name in OF_TASK
    ]}  # fmt: skip
    files = {
        f"{name}/{split}.jsonl": conversations(task) for name, task in OF_TASK.items() for split in ("train", "test")
    }
    splits = {"configs": [{"config_name": "default", "data_files": [{"split": "split_valid", "path": "split_valid*"}]}]}
    trees = {
        BASE: files_in(folder / "base"),
        ROWS: files | {"README.md": f"---\n{yaml.safe_dump(card)}---\n".encode()},
        TEXT: {"train.jsonl": conversations("math500", 20)},
        **{name: {file: jsonl(TASKS[task].rows)} for task, (name, file) in ON_HUB.items()},
    }
    trees["language-plus-molecules/LPM-24_train"]["README.md"] = f"---\n{yaml.safe_dump(splits)}---\n".encode()
    with pytest.MonkeyPatch.context() as patch, serve_hub(folder / "hub") as served:
        patch.chdir(ROOT)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "rows")
        patch.setattr("datasets.config.HF_ENDPOINT", served.url)
        patch.setenv("CAFTUNE_RUN_GENERATED_CODE", "1")
        for name, tree in trees.items():
            served.private[name] = False
            served.record(name, "first", tree)
        recipe = load_recipe(RECIPES / "heads.yaml", [f"output={folder}/heads", *cut("pretrain")])
        gc.freeze()  # or each collection between two stages walks through all that was imported
        yield folder, pretrain_heads(recipe)
        gc.unfreeze()


def cut(*sections):
    """Overrides that make a recipe run on a CPU, in few steps."""
    short = {"optim": "adamw_torch", "gradient_accumulation_steps": 1, "gradient_checkpointing": "false"}
    return [f"{section}.{name}={value}" for section in sections for name, value in short.items()]


def loaded(name, folder, heads, *more):
    """The recipe of a task, with its output and heads in `folder`, cut to a few rows."""
    task = OF_TASK[name.partition("-")[0]]
    rows = folder / f"{task}.jsonl"
    rows.write_bytes(jsonl(TASKS[task].rows))
    overrides = [
        *(f"heads.path={heads}", *cut("adapt", "trainer")),
        *("data.limit=9", "compare.seeds=1", "compare.concepts.limit=2"),
        *("eval.limit=2", "eval.max_new_tokens=4", "eval.structures=null"),
        *([] if task in ON_HUB else [f"eval.data={{{task}: {rows}}}"]),
    ]
    return load_recipe(RECIPES / f"{name}.yaml", [*overrides, *more])


def stages_of(recipe, run):
    lines = Path(recipe.output, "compare", run, "results.jsonl").read_text().splitlines()
    return {stage["stage"]: stage for stage in map(json.loads, lines)}


@pytest.mark.parametrize("name", TASK_RECIPES)
def test_every_recipe_runs_through(hub, name):
    folder, heads = hub
    recipe = loaded(name, folder, heads, f"output={folder / name}", "trainer.num_train_epochs=1")
    if name.startswith("code"):
        try:
            check_sandbox()
        except CaftuneError as error:
            pytest.skip(str(error))
    compare(recipe, only="caft/42")
    stages = stages_of(recipe, "caft/42")
    assert {"adapt", "train", "compare"} <= {*stages}
    assert stages["train"]["rows"] == 8  # one of nine has failed
    assert stages["compare"]["tasks"] == recipe.eval.tasks


def test_a_comparison_of_all_arms_ends_with_the_best_checkpoint_of_each(hub):
    folder, heads = hub
    recipe = loaded("maths-full", folder, heads, f"output={folder / 'all'}", "trainer.num_train_epochs=2")
    found = compare(recipe)
    assert found.missing == []
    assert {measure.task for measure in found.by_measure} >= {*recipe.eval.tasks}
    for arm in recipe.compare.arms:
        stages = stages_of(recipe, f"{arm}/42")
        assert ("adapt" in stages) == (arm in ("caft", "caft_frozen"))
        first, second, exported = (entry["eval_loss"] for entry in stages["train"]["log"] if "eval_loss" in entry)
        assert exported == pytest.approx(min(first, second), rel=1e-4)


def test_the_heads_are_made_of_the_answers_of_the_data_set(hub):
    _, heads = hub
    about = describe_heads(heads)
    assert about["base"]["name"] == BASE
    assert about["training"]["data"]["text"].startswith(f"{TEXT}@")  # and the commit


def test_the_answers_alone_are_trained_on_with_the_end_that_the_model_knows(hub):
    folder, heads = hub
    recipe = loaded("maths-lora", folder, heads)
    base = BaseModel.of(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    args = stage_two_config(recipe, base, folder / "x", heads)
    rows = task_rows(recipe.data, "train", base, base.tokenizer(), args).rows
    answer = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    for row in rows:
        labelled = [token for token in row["labels"] if token != -100]
        text, trained = tokenizer.decode(row["input_ids"]), tokenizer.decode(labelled)
        assert text == f"{text.partition(answer)[0]}{answer}{trained}"
        assert trained.endswith("<|eot_id|>")
        assert trained.count("<|eot_id|>") == 1


def test_the_template_is_that_of_llama(hub):
    ours, tokenizer = (RECIPES / "llama-3.1.jinja").read_text(), AutoTokenizer.from_pretrained(BASE)
    turns = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " What is 2 + 2? "},
        {"role": "assistant", "content": "4 \n"},
        {"role": "user", "content": "And 3?"},
    ]
    for talk in (turns, turns[1:], turns[1:3], turns[:2]):
        for opens in (True, False):
            options = {"tokenize": False, "add_generation_prompt": opens}
            assert tokenizer.apply_chat_template(talk, chat_template=ours, **options) == tokenizer.apply_chat_template(
                talk, **options
            )
