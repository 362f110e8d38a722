"""What SFTTrainer takes, CAFTTrainer takes with heads too: models with adapters, the user's own loss, pictures, streams."""

from pathlib import Path

import pytest
import torch
from bases import write_biased
from peft import LoraConfig, PeftModel, get_peft_model
from pictures import pictured_rows, write_llava
from safetensors.torch import load_file
from trainers import config, logged, same, stock, trained, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from caftune import CAFTTrainer
from caftune.demo.run import BASE

pytestmark = pytest.mark.filterwarnings("ignore:.*v2.0.0:FutureWarning")  # what TRL still takes

OPTIONS = {"aux_weight": 1.0, "max_steps": 2, "learning_rate": 1e-2}


def plain(**options):
    return AutoModelForCausalLM.from_pretrained(BASE, **options)


def adapted(name="default"):
    set_seed(42)  # as SFTTrainer does before it makes an adapter
    return get_peft_model(plain(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter_name=name)


def lines(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("options", [{}, {"train_heads": False}])
def test_a_peft_model_is_trained_as_a_base_with_a_peft_config(rows, heads, tmp_path, name, options):
    theirs = CAFTTrainer(
        str(BASE),
        config(tmp_path / "a", heads=heads, **OPTIONS, **options),
        train_dataset=rows,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    ours = CAFTTrainer(adapted(name), config(tmp_path / "b", heads=heads, **OPTIONS, **options), train_dataset=rows)
    assert logged(trained(ours)) == logged(trained(theirs))
    assert list(map(torch.equal, weights(ours).values(), weights(theirs).values())) == [True] * len(weights(ours))
    ours.export(tmp_path / "model")
    theirs.export(tmp_path / "other")
    assert same(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "other")))


def test_the_heads_beside_a_peft_model_are_those_of_the_base(rows, heads, tmp_path):
    model = adapted("mine")
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter)  # far from the base
    trainer = CAFTTrainer(model, config(tmp_path, heads=heads, train_heads=False, **OPTIONS), train_dataset=rows)
    assert not any("lora" in key or "base_layer" in key for key in trainer.heads.state_dict())
    assert same(dict(trainer.heads.state_dict()), load_file(Path(heads) / "heads.safetensors"))


def test_a_folder_with_an_adapter_is_trained_further_with_heads(rows, heads, tmp_path):
    model = adapted()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain(), tmp_path / "adapter", is_trainable=True)
    runs = [
        trained(CAFTTrainer(start, config(tmp_path / "run", heads=heads, **OPTIONS), train_dataset=rows))
        for start in (loaded, str(tmp_path / "adapter"))
    ]
    assert logged(runs[0]) == logged(runs[1])
    assert same(*map(weights, runs))
    assert runs[1]._base == (str(BASE), None)


@pytest.mark.parametrize("options", [{}, {"train_heads": False}, {"heads_lora_rank": 0}])
def test_a_model_object_in_half_precision_is_adapted_with_heads(rows, heads, tmp_path, options):
    logs = []
    for dtype in ("float32", "bfloat16"):
        trainer = CAFTTrainer(
            plain(dtype=dtype),
            config(tmp_path, heads=heads, **OPTIONS, **options),
            train_dataset=rows,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )
        logs.append(lines(trained(trainer)))
    for full, half in zip(*logs, strict=True):
        for key in ("main_loss", "h2_loss", "h4_loss"):
            assert half[key] == pytest.approx(full[key], rel=0.05)  # bfloat16 keeps 8 bits


def halved(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return 0.5 * loss / num_items_in_batch


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_loss_of_the_users_takes_the_place_of_the_main_loss_alone(rows, heads, tmp_path, tuning):
    peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if tuning == "lora" else None
    args = config(tmp_path, heads=heads, gradient_accumulation_steps=2, **{**OPTIONS, "aux_weight": 0.3})
    made = {"train_dataset": rows, "peft_config": peft_config, "compute_loss_func": halved}
    trainer = trained(CAFTTrainer(str(BASE), args, **made))
    for entry in lines(trainer):
        auxiliary = sum(entry[f"h{h}_weight"] * entry[f"h{h}_loss"] for h in (2, 3, 4))
        assert entry["main_loss"] == pytest.approx(0.5 * entry["h1_loss"], rel=1e-5)
        assert entry["loss"] == pytest.approx(entry["main_loss"] + auxiliary, rel=1e-5)


def test_with_a_loss_of_the_users_the_heads_gradients_are_what_they_are_without(rows, heads, tmp_path):
    """L_1 as SFTTrainer has it, written as a function: the same steps but for the order of float32 sums."""

    def whole(outputs, labels, num_items_in_batch=None):
        return 2 * halved(outputs, labels, num_items_in_batch)

    states = []
    for loss in (None, whole):
        args = config(tmp_path, heads=heads, optim="sgd", max_grad_norm=0.0, **OPTIONS)
        states.append(weights(trained(CAFTTrainer(str(BASE), args, train_dataset=rows, compute_loss_func=loss))))
    start = plain().state_dict()
    assert max((states[0][key] - start[key]).abs().max() for key in start) > 5e-3
    for key in start:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-5)


def test_labels_are_smoothed_in_the_main_loss_alone(rows, heads, tmp_path):
    options = {**OPTIONS, "max_steps": 1, "label_smoothing_factor": 0.1}
    ours = CAFTTrainer(str(BASE), config(tmp_path / "a", heads=heads, **options), train_dataset=rows, eval_dataset=rows)
    (entry,) = lines(trained(ours))
    del options["aux_weight"]
    theirs = stock(tmp_path / "b", rows, **options)
    assert entry["main_loss"] == lines(theirs)[0]["loss"]
    plain_run = trained(
        CAFTTrainer(str(BASE), config(tmp_path, heads=heads, **{**OPTIONS, "max_steps": 1}), train_dataset=rows)
    )
    for key in ("h1_loss", "h2_loss", "h3_loss", "h4_loss"):
        assert entry[key] == pytest.approx(lines(plain_run)[0][key], rel=1e-6)
    assert ours.evaluate()["eval_h2_loss"] > 0


@pytest.mark.parametrize(
    "options", [{"loss_type": "dft"}, {"neftune_noise_alpha": 5.0}, {"gradient_checkpointing": True}]
)
def test_other_losses_and_noise_leave_the_heads_their_own(rows, heads, tmp_path, options):
    trainer = trained(CAFTTrainer(str(BASE), config(tmp_path, heads=heads, **OPTIONS, **options), train_dataset=rows))
    for entry in lines(trainer):
        auxiliary = sum(entry[f"h{h}_weight"] * entry[f"h{h}_loss"] for h in (2, 3, 4))
        assert entry["loss"] == pytest.approx(entry["main_loss"] + auxiliary, rel=1e-5)


def test_rows_that_stream_are_those_of_the_data_set(rows, heads, tmp_path):
    few = rows.select(range(8))
    runs = [
        trained(
            CAFTTrainer(
                str(BASE),
                config(tmp_path, heads=heads, train_sampling_strategy="sequential", **OPTIONS),
                train_dataset=data,
            )
        )
        for data in (few, few.to_iterable_dataset())
    ]
    for one, other in zip(*map(lines, runs), strict=True):
        assert (one["loss"], one["h2_loss"], one["h4_loss"]) == (other["loss"], other["h2_loss"], other["h4_loss"])


def test_a_model_that_sees_is_trained_with_heads_on_pictures(tmp_path):
    base, rows = write_llava(tmp_path / "base"), pictured_rows()
    one = config(tmp_path / "one", pretrain_heads=True, num_heads=2, max_length=None, max_steps=2, learning_rate=1e-2)
    stage1 = trained(CAFTTrainer(base, one, train_dataset=rows))
    assert type(stage1.processing_class).__name__ == "LlavaProcessor"
    stage1.export(tmp_path / "heads")
    two = config(tmp_path / "two", heads=str(tmp_path / "heads"), max_length=None, **OPTIONS)
    trainer = CAFTTrainer(base, two, train_dataset=rows)
    before = {key: value.clone() for key, value in weights(trainer).items()}
    for entry in lines(trained(trainer)):
        assert 0 < entry["h2_loss"] < 20
        assert entry["loss"] > entry["main_loss"] > 0
    moved = {key for key, value in weights(trainer).items() if not torch.equal(value, before[key])}
    assert any("vision_tower" in key for key in moved)
    trainer.export(tmp_path / "model")
    assert (tmp_path / "model" / "processor_config.json").is_file()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_base_in_four_bits_with_biases_is_adapted_with_heads(rows, tmp_path, compute, bf16):
    """bitsandbytes casts the biases of its layers to its compute dtype; the heads, copies of the layer, keep one dtype."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install caftune[qlora])")
    biased = write_biased(tmp_path / "base")
    one = config(tmp_path / "one", pretrain_heads=True, num_heads=2, max_steps=1)
    trained(CAFTTrainer(biased, one, train_dataset=rows)).export(tmp_path / "heads")
    trainer = CAFTTrainer(
        biased,
        config(tmp_path / "two", heads=str(tmp_path / "heads"), bf16=bf16, **OPTIONS),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    assert {parameter.dtype for parameter in trainer.heads.parameters()} == {torch.float32}
    assert trainer.evaluate()["eval_h2_loss"] > 0
    assert all(entry["h2_loss"] > 0 for entry in lines(trained(trainer)))
