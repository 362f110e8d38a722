"""Without heads CAFTTrainer is TRL's SFTTrainer: whatever that takes, with the same losses and weights to the last bit."""

import copy
import functools
import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from bases import write_biased
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from models import build
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from pictures import pictured_rows, write_llava
from trainers import OPTIONS, logged, same, trained
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from caftune import CAFTConfig, CAFTTrainer
from caftune.demo.run import BASE
from caftune.errors import CaftuneError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flash:UserWarning"),  # packing asks for it; none on a CPU
    pytest.mark.filterwarnings("ignore:.*v2.0.0:FutureWarning"),  # what TRL still takes
]

SHORT = {**OPTIONS, "max_steps": 2, "per_device_train_batch_size": 2}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}assistant: {% generation %}{{ m.content }}\n{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WITH_TOOLS = "{% if tools %}{% for tool in tools %}tool {{ tool['function']['name'] }}\n{% endfor %}{% endif %}" + CHAT
TOOLS = [{"type": "function", "function": {"name": "weigh", "description": "d", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def texts(rows):
    return Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows.select(range(12))])


@pytest.fixture(scope="module")
def talks(rows):
    def talk(row):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]

    return Dataset.from_list([{"messages": talk(row) * 2} for row in rows.select(range(8))])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that was trained before: a folder as PEFT writes it."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return write_biased(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


def tokenizer_with(template):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = template
    return tokenizer


def plain():
    return AutoModelForCausalLM.from_pretrained(BASE)


def assert_same_run(ours, theirs):
    assert any("loss" in line or "train_loss" in line for line in logged(theirs))
    assert logged(ours) == logged(theirs)
    assert same(ours.model.state_dict(), theirs.model.state_dict())


@pytest.fixture
def compare(tmp_path):
    """Train as SFTTrainer does, and as CAFTTrainer does: with the same arguments, or (`own`) with a CAFTConfig."""

    def runs(make, /, own=False, **options):
        options = {**SHORT, **options}
        # Made and trained in turn: each begins with the random numbers that its seed gives.
        theirs = trained(make(SFTTrainer, SFTConfig(str(tmp_path / "a"), **options)))
        args = CAFTConfig(str(tmp_path / "b"), aux_weight=0.0, **options) if own else None
        ours = trained(make(CAFTTrainer, args or SFTConfig(str(tmp_path / "b"), **options)))
        assert_same_run(ours, theirs)
        return theirs, ours

    return runs


@pytest.fixture(params=["SFTConfig", "CAFTConfig"])
def compare_both(request, compare):
    """`compare`, once with each kind of arguments."""
    return functools.partial(compare, own=request.param == "CAFTConfig")


# How the trainer is called


def test_the_arguments_are_sft_trainers_in_its_order():
    theirs, ours = (inspect.signature(trainer.__init__).parameters for trainer in (SFTTrainer, CAFTTrainer))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)


def test_no_arguments_mean_those_of_sft_trainer_and_no_heads(texts, tmp_path, monkeypatch):
    """On a CPU SFTTrainer's own default, bfloat16, is refused; CAFTTrainer then computes in float32."""
    monkeypatch.chdir(tmp_path)
    texts = texts.select(range(2))
    theirs = SFTTrainer(plain(), SFTConfig("base-SFT", bf16=False), train_dataset=texts)
    ours = CAFTTrainer(plain(), train_dataset=texts)
    assert ours.heads is None
    assert ours.args.output_dir == theirs.args.output_dir == "base-SFT"
    assert_same_run(trained(ours), trained(theirs))


def test_positional_arguments_are_understood(texts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    seen = []

    def shapes(logits, labels):
        seen.append(logits.shape)
        return logits.argmax(-1)

    def run(trainer, folder):
        args = SFTConfig(str(folder), **SHORT, eval_strategy="steps", eval_steps=1)
        metrics = {"compute_loss_func": None, "compute_metrics": lambda _: {"one": 1.0}}
        return trained(
            trainer(
                str(BASE), args, None, texts, texts, tokenizer, *metrics.values(), [], (None, None),
                (torch.optim.SGD, {"lr": 0.1}), shapes, None, LoraConfig(r=2, target_modules=["q_proj"]), None,
            )
        )  # fmt: skip

    assert_same_run(run(CAFTTrainer, tmp_path / "b"), run(SFTTrainer, tmp_path / "a"))
    assert len(seen) == 2 * 2 * 2  # runs, evaluations, batches of eight


def test_training_arguments_mean_no_heads(texts, tmp_path):
    options = {key: value for key, value in SHORT.items() if key not in ("max_length", "gradient_checkpointing")}
    options |= {"hub_token": "a token", "learning_rate": 1e-2}

    def run(trainer, folder):
        return trained(trainer(str(BASE), TrainingArguments(str(folder), **options), train_dataset=texts))

    ours = run(CAFTTrainer, tmp_path / "b")
    assert_same_run(ours, run(SFTTrainer, tmp_path / "a"))
    assert (ours.args.hub_token, ours.args.max_length, ours.heads) == ("a token", 1024, None)


def test_options_set_after_the_trainer_is_made_count(texts, tmp_path):
    def run(trainer, folder):
        args = SFTConfig(str(folder), **SHORT)
        made = trainer(str(BASE), args, train_dataset=texts)
        args.max_steps = 1
        return trained(made)

    ours = run(CAFTTrainer, tmp_path / "b")
    assert_same_run(ours, run(SFTTrainer, tmp_path / "a"))
    assert ours.state.global_step == 1


def test_a_config_that_asks_for_heads_still_needs_them(texts, tmp_path):
    with pytest.raises(CaftuneError, match="heads must name a folder of pretrained heads, got None"):
        CAFTConfig(str(tmp_path), **SHORT)
    with pytest.raises(TypeError, match="args must be a CAFTConfig, an SFTConfig or TrainingArguments, got dict"):
        CAFTTrainer(str(BASE), {"output_dir": str(tmp_path)}, train_dataset=texts)


def test_the_default_precision_of_an_sft_config_is_kept(texts, tmp_path):
    options = {**SHORT, "bf16": None}
    runs = [
        trained(trainer(str(BASE), SFTConfig(str(tmp_path / trainer.__name__), **options), train_dataset=texts))
        for trainer in (CAFTTrainer, SFTTrainer)
    ]
    assert_same_run(*runs)
    assert runs[0].args.bf16 is True


# Models


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision_are_trained(texts, compare_both, dtype):
    def make(trainer, args):
        return trainer(AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype), args, train_dataset=texts)

    _, ours = compare_both(make, learning_rate=1e-2)
    assert ours.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": torch.float16, "attn_implementation": "eager"}])
def test_a_model_named_by_a_string_is_loaded_with_its_options(texts, compare, options):
    _, ours = compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=texts), model_init_kwargs=options)
    assert str(ours.model.dtype).endswith(str(options["dtype"]).rpartition(".")[2])
    assert ours.args.model_init_kwargs == options


@pytest.mark.parametrize("half", [False, True])
def test_an_adapter_of_a_model_object_is_trained(texts, compare, half):
    def make(trainer, args):
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype="bfloat16" if half else "float32")
        return trainer(model, args, train_dataset=texts, peft_config=LoraConfig(r=2, target_modules="all-linear"))

    compare(make, learning_rate=1e-2, gradient_checkpointing=True)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_trainable_peft_model_is_trained_further(texts, adapter, compare_both, name):
    def make(trainer, args):
        model = PeftModel.from_pretrained(plain(), adapter, adapter_name=name, is_trainable=True)
        return trainer(model, args, train_dataset=texts)

    _, ours = compare_both(make, learning_rate=1e-2)
    assert any("lora_A" in key for key in ours.model.state_dict())


def test_a_folder_with_an_adapter_is_trained_further(texts, adapter, tmp_path):
    """SFTTrainer refuses the folder; the run is that of the adapter which PEFT loads from it."""
    args = [SFTConfig(str(tmp_path / name), **SHORT) for name in "ab"]
    with pytest.raises(ValueError, match="Unrecognized model"):
        SFTTrainer(adapter, args[0], train_dataset=texts)
    model = PeftModel.from_pretrained(plain(), adapter, is_trainable=True)
    theirs = trained(SFTTrainer(model, args[0], train_dataset=texts))
    ours = CAFTTrainer(adapter, args[1], train_dataset=texts)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    assert_same_run(trained(ours), theirs)
    assert {name for name, value in before.items() if not torch.equal(value, ours.model.state_dict()[name])} == {
        name for name in before if "lora_" in name
    }


def test_a_folder_with_an_adapter_has_the_tokenizer_it_was_trained_with(talks, adapter, tmp_path):
    own = tmp_path / "own"
    PeftModel.from_pretrained(plain(), adapter).save_pretrained(own)
    tokenizer_with(CHAT).save_pretrained(own)
    trainer = CAFTTrainer(str(own), SFTConfig(str(tmp_path / "run"), **SHORT), train_dataset=talks)
    assert trainer.processing_class.chat_template == CHAT
    trainer.train()
    trainer.export(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32
    assert not list((tmp_path / "model").glob("adapter*"))


@pytest.mark.parametrize("made_by", ["peft_config", "PeftModel"])
@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix"])
def test_prompts_are_tuned(texts, compare_both, kind, made_by):
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    kinds = {"prompt": PromptTuningConfig, "p_tuning": PromptEncoderConfig, "prefix": PrefixTuningConfig}

    def make(trainer, args):
        torch.manual_seed(0)
        if made_by == "peft_config":
            return trainer(str(BASE), args, train_dataset=texts, peft_config=kinds[kind](**shape))
        return trainer(get_peft_model(plain(), kinds[kind](**shape)), args, train_dataset=texts)

    compare_both(make, learning_rate=1e-2)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["llama", "biased"])
def test_a_base_in_four_bits_is_trained_through_an_adapter(texts, biased, compare_both, base, compute):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install caftune[qlora])")

    def make(trainer, args):
        options = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
        return trainer(
            biased if base == "biased" else str(BASE),
            args,
            train_dataset=texts,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, **options),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )

    compare_both(make, learning_rate=1e-2, bf16=compute == "bfloat16")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "mamba", "gemma2"])
def test_other_families_are_trained(texts, compare, family):
    model = build(family, dtype=torch.float32, spread=3.0, vocab_size=158)

    def make(trainer, args):
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        return trainer(copy.deepcopy(model), args, train_dataset=texts, processing_class=tokenizer)

    compare(make)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_trained_copies_of_tied_embeddings_are_taken_as_sft_trainer_takes_them(texts, compare):
    def make(trainer, args):
        kind = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        return trainer(str(BASE), args, train_dataset=texts, peft_config=kind)

    compare(make)


# Pictures


def test_a_model_that_sees_is_trained_with_the_processor_beside_it(seeing, compare_both):
    rows = pictured_rows()
    _, ours = compare_both(lambda trainer, args: trainer(seeing, args, train_dataset=rows), max_length=None)
    assert type(ours.processing_class).__name__ == "LlavaProcessor"


def test_text_alone_trains_a_model_that_sees(seeing, texts, compare):
    _, ours = compare(lambda trainer, args: trainer(seeing, args, train_dataset=texts))
    assert type(ours.processing_class).__name__ == "LlavaProcessor"


def test_prompts_and_completions_with_pictures_given_a_processor(seeing, compare):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    def halves(row):
        return {"prompt": row["messages"][:1], "completion": row["messages"][1:]}

    rows = pictured_rows().map(halves, remove_columns="messages")

    def make(trainer, args):
        model = LlavaForConditionalGeneration.from_pretrained(seeing)
        return trainer(model, args, train_dataset=rows, processing_class=AutoProcessor.from_pretrained(seeing))

    compare(make, max_length=None, per_device_train_batch_size=2)


# Data


@pytest.mark.parametrize("evaluated", ["data", "iterable", "dict", "dict of iterables", "DatasetDict", "streamed dict"])
def test_evaluation_sets_of_every_kind(texts, compare, evaluated):
    streamed = texts.to_iterable_dataset()
    sets = {
        "data": texts,
        "iterable": streamed,
        "dict": {"one": texts, "two": texts.select(range(4))},
        "dict of iterables": {"one": streamed},
        "DatasetDict": DatasetDict({"one": texts}),
        "streamed dict": IterableDatasetDict({"one": streamed}),
    }
    options = {"eval_strategy": "steps", "eval_steps": 1}
    theirs, ours = compare(
        lambda trainer, args: trainer(str(BASE), args, train_dataset=texts, eval_dataset=sets[evaluated]), **options
    )
    found, expected = (run.evaluate(sets[evaluated]) for run in (ours, theirs))  # raw rows, given later
    assert {k: v for k, v in found.items() if "loss" in k} == {k: v for k, v in expected.items() if "loss" in k}


@pytest.mark.parametrize("kind", ["to_iterable", "generator"])
def test_rows_that_stream(rows, compare, kind):
    listed = list(rows.select(range(12)))
    streamed = Dataset.from_list(listed).to_iterable_dataset()
    if kind == "generator":
        streamed = IterableDataset.from_generator(lambda: iter(listed))
    compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=streamed))


def test_rows_that_truncation_empties_are_left_out(rows, compare_both, caplog):
    long = {"prompt": "Name: " + "methyl" * 40 + "\nSMILES:", "completion": " C"}
    mixed = Dataset.from_list([*rows.select(range(20)), long])
    with caplog.at_level(logging.WARNING):
        theirs, ours = compare_both(lambda trainer, args: trainer(str(BASE), args, train_dataset=mixed), max_length=100)
    assert len(theirs.train_dataset) == 20
    assert list(ours.train_dataset["input_ids"]) == list(theirs.train_dataset["input_ids"])
    assert "1 of 21 rows of the train data (counted from 0: 20) have no token to train on" in caplog.text


def test_already_tokenized_rows_with_masks_are_labelled_and_emptied_rows_dropped(compare):
    ids = list(range(10, 30))
    masked = Dataset.from_list(
        [{"input_ids": ids, "assistant_masks": [0] * 10 + [1] * 10}] * 12
        + [{"input_ids": ids, "assistant_masks": [0] * 19 + [1]}]
    )
    theirs, ours = compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=masked), max_length=16)
    assert ours.train_dataset[:] == theirs.train_dataset[:]
    assert len(theirs.train_dataset) == 12


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_rows_are_packed(texts, compare_both, strategy):
    options = {"packing": True, "packing_strategy": strategy, "max_length": 48, "per_device_train_batch_size": 2}
    compare_both(lambda trainer, args: trainer(str(BASE), args, train_dataset=texts), **options)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("eval_packing", [False, True])
def test_evaluation_is_packed_where_asked(texts, compare_both, packing, eval_packing):
    options = {"packing": packing, "eval_packing": eval_packing, "max_length": 64, "eval_strategy": "steps"}
    theirs, ours = compare_both(
        lambda trainer, args: trainer(str(BASE), args, train_dataset=texts, eval_dataset=texts), **options, eval_steps=1
    )
    assert ours.eval_dataset[:] == theirs.eval_dataset[:]


def test_rows_without_padding(texts, compare):
    compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=texts), padding_free=True, max_length=None)


def test_a_model_that_sees_across_packed_documents_is_warned_of_and_trained(texts, tmp_path, caplog):
    model, tokenizer = build("bloom", dtype=torch.float32, vocab_size=158), AutoTokenizer.from_pretrained(BASE)
    options = {**SHORT, "packing": True, "max_length": 64, "max_steps": 1}
    runs = [
        trained(
            trainer(
                copy.deepcopy(model),
                SFTConfig(str(tmp_path / trainer.__name__), **options),
                train_dataset=texts,
                processing_class=tokenizer,
            )
        )
        for trainer in (CAFTTrainer, SFTTrainer)
    ]
    assert_same_run(*runs)
    assert "document change with the document before it (by" in caplog.text


def test_a_function_that_formats_rows(rows, compare):
    def formatted(row):
        return f"{row['prompt']}={row['completion']}"

    renamed = rows.select(range(8)).rename_columns({"prompt": "a", "completion": "b"})
    compare(
        lambda trainer, args: trainer(
            str(BASE), args, train_dataset=renamed, formatting_func=lambda row: f"{row['a']}={row['b']}"
        )
    )
    compare(  # TRL leaves the completions out of the formatted text
        lambda trainer, args: trainer(str(BASE), args, train_dataset=rows.select(range(8)), formatting_func=formatted),
        completion_only_loss=False,
    )


@pytest.mark.parametrize("assistant_only", [False, True])
def test_conversations(talks, compare, assistant_only):
    def make(trainer, args):
        return trainer(str(BASE), args, train_dataset=talks, processing_class=tokenizer_with(MARKED))

    theirs, ours = compare(make, assistant_only_loss=assistant_only, max_length=512)
    assert ours.train_dataset[:] == theirs.train_dataset[:]
    assert any(label == -100 for label in ours.train_dataset[0]["labels"]) == assistant_only


def test_conversations_named_as_sharegpt_names_them(talks, compare):
    def renamed(row):
        return {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]}

    shared = talks.map(renamed, remove_columns="messages")

    def make(trainer, args):
        return trainer(str(BASE), args, train_dataset=shared, processing_class=tokenizer_with(CHAT))

    compare(make, max_length=512)


@pytest.mark.parametrize("as_text", [False, True])
def test_conversations_with_tools(talks, compare, as_text):
    tools = json.dumps(TOOLS) if as_text else TOOLS
    rows = Dataset.from_list([{**row, "tools": tools} for row in talks])

    def make(trainer, args):
        return trainer(str(BASE), args, train_dataset=rows, processing_class=tokenizer_with(WITH_TOOLS))

    _, ours = compare(make, max_length=512)
    assert "weigh" in ours.processing_class.decode(ours.train_dataset[0]["input_ids"])


def test_a_template_in_a_file_and_another_end_of_text(talks, compare, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(CHAT)
    options = {"chat_template_path": str(path), "eos_token": "<unk>", "max_length": 512}
    _, ours = compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=talks), **options)
    assert ours.processing_class.chat_template == CHAT
    assert ours.model.config.eos_token_id == ours.processing_class.eos_token_id


def test_a_collator_of_the_users(texts, compare):
    def collate(examples):
        ids = torch.tensor([example["input_ids"][:16] for example in examples])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

    compare(lambda trainer, args: trainer(str(BASE), args, collate, texts))


def test_rows_that_are_prepared_already(texts, compare):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ready = texts.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns="text")
    ready = ready.map(lambda row: {"labels": row["input_ids"]})
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=ready), **options)


def test_completions_alone_without_completions_are_warned_of_and_trained(texts, compare, caplog):
    compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=texts), completion_only_loss=True)
    assert "completion_only_loss must not be set where rows have no completion" in caplog.text


# Losses and steps


def of_logits(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return 0.5 * loss / (num_items_in_batch if num_items_in_batch is not None else 1)


def test_a_loss_of_the_users(rows, compare_both):
    compare_both(
        lambda trainer, args: trainer(
            str(BASE), args, train_dataset=rows, eval_dataset=rows.select(range(4)), compute_loss_func=of_logits
        ),
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )


CHOICES = {
    "smoothed labels": {"label_smoothing_factor": 0.1},
    "dft": {"loss_type": "dft"},
    "chunked": {"loss_type": "chunked_nll"},
    "noise": {"neftune_noise_alpha": 5.0},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bfloat16": {"bf16": True},
    "shuffled": {"shuffle_dataset": True},
    "end kept": {"max_length": 24, "truncation_mode": "keep_end"},
    "seed": {"seed": 7, "data_seed": 8},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1, "optim": "adafactor"},
    "no liger": {"use_liger_kernel": False},
    "padded": {"pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_options_do_what_they_do(rows, compare, choice, own):
    few = rows.select(range(8))
    compare(lambda trainer, args: trainer(str(BASE), args, train_dataset=few), own=own, **CHOICES[choice])


def test_an_optimizer_of_the_users_and_callbacks(texts, compare):
    steps = []

    class Counting(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    def make(trainer, args):
        model = plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
        return trainer(model, args, train_dataset=texts, callbacks=[Counting()], optimizers=(optimizer, schedule))

    compare(make)
    assert steps == [1, 2] * 2


def test_what_is_saved_is_what_sft_trainer_saves(texts, adapter, compare):
    def make(trainer, args):
        model = PeftModel.from_pretrained(plain(), adapter, is_trainable=True)
        return trainer(model, args, train_dataset=texts)

    runs = compare(make, save_strategy="steps", save_steps=1)
    listed = [sorted(path.name for path in Path(run.args.output_dir, "checkpoint-2").iterdir()) for run in runs]
    assert listed[0] == listed[1]


# Refusals: SFTTrainer's own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": None}, "`train_dataset` is required"),
        ({"train_dataset": "a dict of sets"}, "`train_dataset` must be a `Dataset` or `IterableDataset`"),
        ({"padding_free": True, "max_length": 16}, "`max_length` is not enforced"),
        ({"router_aux_loss_coef": 0.5}, "not a Mixture-of-Experts model"),
        ({"eos_token": "<none>"}, "The specified `eos_token`"),
        ({"train_dataset": "pictures", "max_length": None}, "does not seem to be a vision-language model"),
        ({"assistant_only_loss": True}, "the dataset is not conversational"),
        ({"loss_type": "odd"}, "Invalid `loss_type` odd"),
    ],
)
def test_what_sft_trainer_refuses_is_refused_with_its_words(texts, tmp_path, given, message):
    sets = {"a dict of sets": DatasetDict({"train": texts}), "pictures": pictured_rows(2)}
    rows = given.get("train_dataset", "texts")
    rows = texts if rows == "texts" else sets.get(rows)
    options = {**SHORT, **{key: value for key, value in given.items() if key != "train_dataset"}}
    for trainer in (SFTTrainer, CAFTTrainer):
        with pytest.raises((ValueError, TypeError), match=message):
            trainer(str(BASE), SFTConfig(str(tmp_path), **options), train_dataset=rows)
