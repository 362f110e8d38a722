"""CAFTMixin in a plain Trainer: CAFTTrainer's auxiliary losses, the trainer's own L_1, and plain words for what cannot work."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainers import OPTIONS, config, lora, numbers, same, trained, weights
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from caftune import CAFTMixin, CAFTOptions, CAFTTrainer
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.training.prepare import pair_tokens

ROOT = Path(__file__).parents[2]
SHORT = {name: value for name, value in OPTIONS.items() if name not in ("max_length", "bf16")} | {"max_steps": 2}
HORIZONS = (2, 3, 4)


@dataclass
class Arguments(CAFTOptions, TrainingArguments):
    pass


class Own(CAFTMixin, Trainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def tokens(rows, tokenizer):
    return pair_tokens(rows, tokenizer, "train")


def model(adapted=False):
    torch.manual_seed(0)  # of an adapter's factors
    found = AutoModelForCausalLM.from_pretrained(BASE)
    return get_peft_model(found, lora()) if adapted else found


def own(folder, data, tokenizer, *, kind=Own, adapted=False, collator=None, given=None, **options):
    args = Arguments(str(folder), **{**SHORT, **options})
    collator = collator or DataCollatorForSeq2Seq(tokenizer)
    given = {"processing_class": tokenizer, "data_collator": collator, **(given or {})}
    return kind(model(adapted), args, train_dataset=data, **given)


def logs(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def auxiliary(line):
    return sum(line[f"h{h}_weight"] * line[f"h{h}_loss"] for h in HORIZONS)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_auxiliary_losses_are_those_of_caft_trainer(tokens, tokenizer, heads, tmp_path, adapted):
    options = {"heads": heads, "aux_weight": 1.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    ours = trained(own(tmp_path / "own", tokens, tokenizer, adapted=adapted, **options))
    args = config(tmp_path / "caft", **{**SHORT, **options})
    theirs = CAFTTrainer(model(adapted), args, DataCollatorForSeq2Seq(tokenizer), tokens, processing_class=tokenizer)
    for one, other in zip(logs(ours), logs(trained(theirs)), strict=True):
        names = ["loss", "main_loss", *(f"h{h}_{what}" for h in HORIZONS for what in ("loss", "accuracy", "weight"))]
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4)


@pytest.mark.parametrize("named", [False, True])
def test_weight_0_is_the_trainer_without_the_mixin(tokens, tokenizer, heads, tmp_path, named):
    options = {"heads": heads} if named else {}
    ours = trained(own(tmp_path / "own", tokens, tokenizer, aux_weight=0.0, **options))
    given = {"processing_class": tokenizer, "data_collator": DataCollatorForSeq2Seq(tokenizer)}
    plain = Trainer(model(), TrainingArguments(str(tmp_path / "plain"), **SHORT), train_dataset=tokens, **given)
    assert numbers(ours) == numbers(trained(plain))
    assert same(weights(ours), weights(plain))


class Doubled(Trainer):
    """Its own loss, with what people do to the model in it; it ignores num_items_in_batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        assert self.accelerator.unwrap_model(model).config.vocab_size
        assert "auxiliary_targets" not in inputs
        with torch.no_grad():
            model(inputs["input_ids"], inputs["attention_mask"])  # a teacher's pass
        labels = inputs.pop("labels")
        outputs = model(inputs["input_ids"], inputs["attention_mask"])
        assert "auxiliary" not in outputs
        loss = 2 * torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class DoubledWithHeads(CAFTMixin, Doubled):
    pass


class Penalised(Own):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def doubled(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return 2 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("kind", "plain", "given", "options"),
    [
        (DoubledWithHeads, Doubled, {}, {}),
        (Penalised, Trainer, {}, {}),
        (Own, Trainer, {"compute_loss_func": doubled}, {}),
        (Own, Trainer, {}, {"label_smoothing_factor": 0.5}),
    ],
)
def test_l1_is_the_trainers_own_loss(tokens, tokenizer, heads, tmp_path, kind, plain, given, options):
    shared = {**options, "gradient_accumulation_steps": 2, "max_steps": 1}
    ours = own(tmp_path / "own", tokens, tokenizer, kind=kind, given=given, heads=heads, aux_weight=1.0, **shared)
    given = {"processing_class": tokenizer, "data_collator": DataCollatorForSeq2Seq(tokenizer), **given}
    args = TrainingArguments(str(tmp_path / "plain"), **{**SHORT, **shared})
    theirs = trained(plain(model(), args, train_dataset=tokens, **given))
    (line,) = logs(trained(ours))
    assert line["main_loss"] == pytest.approx(logs(theirs)[0]["loss"], rel=1e-5)
    assert line["loss"] == pytest.approx(line["main_loss"] + auxiliary(line), rel=1e-5)


def test_micro_batches_that_trainer_divides_have_the_whole_steps_auxiliary_loss(tokens, tokenizer, heads, tmp_path):
    class Divided(Own):
        loss_is_scaled_for_ga = False

    found = []
    for kind, size in ((Own, 4), (Divided, 1)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        trainer = own(tmp_path, tokens, tokenizer, kind=kind, heads=heads, aux_weight=1.0, **options)
        (line,) = logs(trained(trainer))
        found.append((line["loss"] - line["main_loss"], auxiliary(line)))
    (whole, expected), (divided, _) = found
    assert whole == pytest.approx(expected, rel=1e-5)
    assert divided == pytest.approx(expected, rel=1e-5)


def test_packed_rows_have_the_losses_of_padded_ones(tokens, tokenizer, heads, tmp_path):
    collators = (None, DataCollatorWithFlattening())
    padded, packed = (
        logs(trained(own(tmp_path, tokens, tokenizer, collator=each, heads=heads, max_steps=1)))[0]
        for each in collators
    )
    names = ["main_loss", *(f"h{h}_loss" for h in HORIZONS)]
    assert [packed[name] for name in names] == pytest.approx([padded[name] for name in names], rel=1e-4)


def test_a_run_with_an_adapter_resumes_by_length_and_saves_no_heads_in_it(tokens, tokenizer, heads, tmp_path):
    options = {"heads": heads, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "group_by_length"}
    given = {"processing_class": None}
    runs = [own(tmp_path, tokens, tokenizer, adapted=True, given=given, **options) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert numbers(runs[0]) == numbers(runs[1])
    assert same(weights(runs[0]), weights(runs[1]))
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert saved
    assert not [name for name in saved if "auxiliary" in name]
    assert (tmp_path / "checkpoint-2" / "heads" / "heads.json").is_file()
    runs[1].export(tmp_path / "adapter", merged=False)
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == saved.keys()


def test_an_evaluation_has_the_models_logits_and_the_heads_losses(tokens, tokenizer, heads, tmp_path):
    seen = []

    def measure(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    few = tokens.select(range(3))
    given = {"eval_dataset": few, "compute_metrics": measure}
    for options in ({"heads": heads}, {"aux_weight": 0.0}):
        seen.append(own(tmp_path, few, tokenizer, given=given, **options).evaluate())
    assert seen[0] == seen[2] == (3, max(map(len, few["input_ids"])), len(tokenizer))
    assert seen[1]["eval_loss"] == seen[3]["eval_loss"]
    assert [name for name in seen[1] if name.endswith("_loss")] == ["eval_loss", *(f"eval_h{h}_loss" for h in HORIZONS)]


@pytest.mark.parametrize("labels", [None, "ignored"])
def test_rows_without_labels_are_refused_in_the_first_step(tokens, tokenizer, heads, tmp_path, labels):
    unlabelled = tokens.remove_columns("labels")
    found = tokens.map(lambda row: {"labels": [-100] * len(row["labels"])}) if labels else unlabelled
    collator = None if labels else (lambda rows: dict(tokenizer.pad(rows, return_tensors="pt")))
    message = "first step must have tokens" if labels else "must hold labels .* got input_ids, attention_mask"
    trainer = own(tmp_path, found, tokenizer, heads=heads, collator=collator)
    with pytest.raises(CaftuneError, match=message):
        trainer.train()


class Silent(Own):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return Trainer.compute_loss(self, model, inputs, return_outputs, **kwargs)


class Inner(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return self.model.model(inputs["input_ids"]).last_hidden_state.sum()


class InnerWithHeads(CAFTMixin, Inner):
    pass


class PartlyOptimised(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.model.parameters(), 0.1)
        return self.optimizer


class PartlyOptimisedWithHeads(CAFTMixin, PartlyOptimised):
    pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Silent, "compute_loss of Silent must call super"),
        (InnerWithHeads, "must be computed with the model that compute_loss is given"),
        (PartlyOptimisedWithHeads, "optimizer must hold the heads' weights"),
    ],
)
def test_a_trainer_that_would_leave_the_heads_out_is_refused(tokens, tokenizer, heads, tmp_path, kind, message):
    trainer = own(tmp_path, tokens, tokenizer, kind=kind, heads=heads, aux_weight=1.0)
    with pytest.raises(CaftuneError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_arguments_without_the_options_or_unchecked_are_refused(tokens, tmp_path, heads):
    @dataclass
    class Unchecked(CAFTOptions, TrainingArguments):
        def __post_init__(self):
            TrainingArguments.__post_init__(self)

    with pytest.raises(CaftuneError, match="class with CAFTOptions, got TrainingArguments"):
        Own(model(), TrainingArguments(str(tmp_path), **SHORT), train_dataset=tokens)
    with pytest.raises(CaftuneError, match="__post_init__ of Unchecked must call"):
        Own(model(), Unchecked(output_dir=str(tmp_path), heads=heads, **SHORT), train_dataset=tokens)
    with pytest.raises(TypeError, match="CAFTOptions must come before TrainingArguments"):
        type("Wrong", (TrainingArguments, CAFTOptions), {})
    with pytest.raises(TypeError, match="CAFTMixin must come before Trainer"):
        type("Wrong", (Trainer, CAFTMixin), {})
    with pytest.raises(CaftuneError, match="heads must name a folder"):
        Arguments(str(tmp_path), **SHORT)
    beyond = Dataset.from_dict({"input_ids": [[1, 2], [1, 9999]]})
    with pytest.raises(CaftuneError, match="Row 1 of the train data .* got a token with id 9999"):
        Own(model(), Arguments(str(tmp_path), heads=heads, **SHORT), train_dataset=beyond)
    with pytest.raises(CaftuneError, match="model_init must be None"):
        Own(model_init=model, args=Arguments(str(tmp_path), heads=heads, **SHORT), train_dataset=tokens)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("where", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [5, 6]}])
def test_an_adapter_of_the_unembedding_is_refused_as_heads_read_its_weight(tokens, heads, tmp_path, where):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=2, **where))
    with pytest.raises(CaftuneError, match="must leave the unembedding unadapted with heads"):
        Own(adapted, Arguments(str(tmp_path), heads=heads, **SHORT), train_dataset=tokens)


def test_half_precision_weights_are_trained_with_a_warning(tokens, tokenizer, heads, tmp_path, caplog):
    args = Arguments(str(tmp_path), heads=heads, **SHORT)
    given = {"processing_class": tokenizer, "data_collator": DataCollatorForSeq2Seq(tokenizer)}
    trainer = trained(Own(model().to(torch.bfloat16), args, train_dataset=tokens, **given))
    assert "updates below about 1/256 of a weight would be lost" in caplog.text
    assert logs(trainer)[1]["h2_loss"] > 0


def test_the_example_runs_where_trl_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['trl'] = None; sys.path.insert(0, 'examples'); import own_trainer; "
        f"logs = own_trainer.main({str(BASE)!r}, {str(tmp_path)!r}); "
        "losses = [line['h2_loss'] for line in logs if 'h2_loss' in line]; assert losses[-1] < losses[0], losses"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "auxiliary" in name]


@pytest.mark.parametrize("found", ["1.9.0", None])
def test_caft_trainer_names_a_trl_that_it_cannot_use(found):
    code = (
        "import importlib.metadata as m\n"
        "def version(name):\n"
        f"    if {found!r} is None: raise m.PackageNotFoundError(name)\n"
        f"    return {found!r}\n"
        "m.version = version\n"
        "import caftune.training._trl"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        f"CaftuneError: TRL must be at least 1.16 for CAFTTrainer and for recipes, got {found or 'none'}." in run.stderr
    )
