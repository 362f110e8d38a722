"""The plan's peak against what torch's allocator hands out in a real step."""

from dataclasses import replace

import pytest
from allocations import Allocations
from test_plan import MODES, adapter, planned, small, trainer_of
from transformers import TrainerCallback

from caftune.training.estimate import estimate
from caftune.training.run_setup import Setup


class Watched(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.allocations = Allocations().__enter__()

    def on_step_end(self, *args, **kwargs):
        self.allocations.__exit__()


def planned_and_allocated(
    folder, *, family="llama", vocabulary=512, heads=4, labelled=0.5, lora=False, batch, length=256, **options
):
    """Peak of a step beside weights and an optimizer's states, which were there before."""
    config, lora = small(family, vocabulary=vocabulary, width=256), adapter(family) if lora else None
    shape = {"batch": batch, "length": length, "attention": "sdpa", "heads": heads, "labelled": labelled, "lora": lora}
    trainer = trainer_of(config, folder, max_steps=2, **shape, **options)
    watch = Watched()
    trainer.add_callback(watch)
    trainer.train()
    _, found = planned(config, trainer, **shape)
    memory = found.memory
    return memory.peak - memory.weights - memory.heads - memory.optimizer - memory.process, watch.allocations.bytes


@pytest.mark.parametrize("vocabulary", [32768, 40000])  # TRL's kernel takes 32,768 columns at once
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "stage 1"])
def test_peak_is_what_a_real_step_allocates(mode, vocabulary, tmp_path):
    expected, found = planned_and_allocated(tmp_path, vocabulary=vocabulary, batch=2, **MODES[mode])
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mode", [{"pretrain_heads": True}, {"vocabulary": 32768}])
def test_peak_of_gradients_handed_on_is_what_a_real_step_allocates(mode, accumulation, tmp_path):
    """Rows so short that in stage 1 hardly anything else is there."""
    options = {"gradient_accumulation_steps": accumulation, **mode}
    expected, found = planned_and_allocated(tmp_path, batch=1, length=32, **options)
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_in_the_last_layer_is_what_a_real_step_allocates(family, lora, checkpointing, tmp_path):
    options = {"family": family, "lora": lora, "gradient_checkpointing": checkpointing}
    expected, found = planned_and_allocated(tmp_path, batch=16, labelled=1 / 32, **options)  # hardly any logits
    assert expected == pytest.approx(found, rel=0.06)


@pytest.mark.parametrize("vocabulary", [512, 8192])
@pytest.mark.parametrize("labelled", [0.5, 1.0])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (1, 2), (8, 1)])
def test_peak_of_stage_one_is_what_a_real_step_allocates(vocabulary, labelled, batch, accumulation, tmp_path):
    options = {"labelled": labelled, "vocabulary": vocabulary, "pretrain_heads": True}
    options["gradient_accumulation_steps"] = accumulation
    expected, found = planned_and_allocated(tmp_path, batch=batch, **options)
    assert expected == pytest.approx(found, rel=0.12)


@pytest.mark.parametrize("mode", [{}, {"heads": 0}, {"pretrain_heads": True, "vocabulary": 32768}])
def test_peak_of_an_evaluation_in_larger_batches_is_what_a_real_one_allocates(mode, tmp_path):
    """16 rows of 64 tokens at once, planned for a training on single rows."""
    options = {"heads": 4, "vocabulary": 8192, **mode}
    config = small("llama", vocabulary=options.pop("vocabulary"), width=64)
    shape = {"batch": 16, "length": 64, "attention": "sdpa", "heads": options.pop("heads")}
    trainer = trainer_of(config, tmp_path, per_device_eval_batch_size=16, **shape, **options)
    trainer.eval_dataset = trainer.train_dataset.select(range(16))
    with Allocations() as found:
        trainer.evaluate()
    setup, _ = planned(config, trainer, **shape)
    memory = estimate(config, replace(setup, batch_size=1, eval_batch_size=16)).memory
    expected = memory.peak - memory.weights - memory.heads - memory.optimizer - memory.process
    assert expected == pytest.approx(found.bytes, rel=0.1)


def test_holes_that_temporary_tensors_leave_are_of_blocks_that_the_heap_holds(monkeypatch):
    """A LoRA makes more of them than full fine-tuning; blocks of 32 MiB are mapped, and leave none."""
    monkeypatch.setattr("caftune.training.memory._PROCESS", 0)
    few = Setup(batch_size=4, length=256, mean_length=256, checkpointing=False)
    many = replace(few, batch_size=2048)
    config = small("llama")
    full, lora = (
        estimate(config, each, adapter("llama") if each.tuning == "lora" else None).memory
        for each in (few, replace(few, tuning="lora"))
    )
    assert 2 * full.process < lora.process
    assert estimate(config, replace(few, on_gpu=True)).memory.process == 0
    per_row = [estimate(config, each).memory.process / each.batch_size for each in (few, many)]
    assert per_row[1] < per_row[0] / 20
