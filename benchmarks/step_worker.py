"""Training steps of one arm, in a process of its own: benchmarks/step.py runs it, the reference's with the reference's Python.

Prints one line of JSON: seconds of every step but the first, operations of the first, peak memory, and memory before. What
only one of the two environments has is imported inside its own functions.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE, DECAY, WEIGHT, RANK = 1e-5, 0.8, 0.01, 8
TRUNK = {"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What is measured. `tuning`: full, lora (frozen heads), full-heads, lora-heads (heads trained along) or stage1.

    `model`: folder of a real one; empty: a random Llama.
    """

    tuning: str
    vocabulary: int
    labelled: float
    heads: int
    batch: int
    length: int
    model: str = ""


@dataclass
class Meter:
    """Time and memory of steps, the first of which makes the optimizer's state, is counted, and is not timed."""

    device: str
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)  # seconds of all threads
    peaks: list[float] = field(default_factory=list)
    imported: float = 0.0  # MiB before the model is built
    before: float = 0.0  # MiB before the last step
    started: tuple[float, float] = (0.0, 0.0)
    counter: Any = None  # of the first step's operations

    def begin(self) -> None:
        """A step begins."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
        self.before = memory(self.device)
        if self.counter is not None and not self.seconds:
            self.counter.__enter__()
        self.started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """A step has ended."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started[0])
        self.processor.append(time.process_time() - self.started[1])
        self.peaks.append(memory(self.device, highest=True))
        if self.counter is not None and len(self.seconds) == 1:
            self.counter.__exit__(None, None, None)

    def result(self) -> dict[str, Any]:
        """What is to be reported."""
        return {
            "seconds": self.seconds[1:],
            "processor": self.processor[1:],
            "peak_mib": max(self.peaks[1:]) - self.imported,
            "growth_mib": self.peaks[-1] - self.before,
            "flops": self.counter.total if self.counter is not None else None,
        }


def memory(device: str, *, highest: bool = False) -> float:
    """MiB of this process on the device, now or at the highest since the step began."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if highest else torch.cuda.memory_allocated()) / MIB
    name = "VmHWM:" if highest else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def model_of(case: Case) -> Any:
    """The case's model in float32, or a Llama with random weights, the same for every arm of an environment."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if case.model:
        return AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=case.vocabulary, max_position_embeddings=32768, **TRUNK, **ends))


def batches(case: Case, count: int) -> list[dict[str, list[list[int]]]]:
    """Random tokens, of which the last part of each row is labelled."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(3, case.vocabulary, (case.batch, case.length), generator=generator)
        labels = ids.clone()
        labels[:, : round(case.length * (1 - case.labelled))] = -100
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


def trained_by_trl(case: Case, arm: str, folder: Path, steps: int, meter: Meter) -> None:
    """SFTTrainer, CAFTTrainer, or SFTTrainer with the textbook's loss."""
    import transformers
    from datasets import Dataset
    from transformers import AutoTokenizer

    from caftune.demo.run import BASE
    from caftune.training.measured_cost import FlopCount

    meter.counter = FlopCount()

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            meter.begin()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            meter.end()

    columns = batches(case, steps + 1)
    rows = Dataset.from_dict({name: [row for b in columns for row in b[name]] for name in ("input_ids", "labels")})
    kind, args, lora = _trainer(case, arm, folder, steps, meter.device)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    meter.imported = memory(meter.device)
    trainer = kind(model_of(case), args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.add_callback(Watch())
    trainer.train()


def _trainer(case: Case, arm: str, folder: Path, steps: int, device: str) -> tuple[Any, Any, Any]:
    """The trainer's class, its options, the adapter."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from caftune import CAFTConfig, CAFTTrainer

    options: dict[str, Any] = {
        **{"max_steps": steps + 1, "per_device_train_batch_size": case.batch, "max_length": None},
        **{"learning_rate": LEARNING_RATE, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
        **{"gradient_checkpointing": False, "logging_strategy": "no", "bf16": device == "cuda"},
        **{"use_cpu": device == "cpu", "dataloader_pin_memory": device == "cuda"},
    }
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = lora if case.tuning.startswith("lora") else None
    output = str(folder.with_name("run"))
    if arm == "sft":
        return SFTTrainer, SFTConfig(output, **options), lora
    if arm == "stacked":
        return _stacked_trainer(case), SFTConfig(output, **options), None
    stage = {"heads": str(folder), "aux_weight": WEIGHT, "train_heads": case.tuning.endswith("-heads")}
    if case.tuning == "stage1":
        stage = {"heads": str(folder), "pretrain_heads": True}
    if arm == "sampled":
        stage["aux_target_share"] = 0.25
    return CAFTTrainer, CAFTConfig(output, **options, **stage), lora


class Stacked(nn.Module):
    """A model and its heads as one would write them down: logits of every horizon at every position, in one tensor.

    The same objective as caftune's: heads are copies of the last layer, called with its input, mask and phases; the final
    norm and the unembedding are the model's; L_k is a mean over its own targets; frozen is what caftune freezes.
    """

    def __init__(self, model: Any, case: Case) -> None:
        super().__init__()
        import copy

        decoder = model.get_decoder()
        self.model, self.case = model, case
        self.heads = nn.ModuleList(copy.deepcopy(decoder.layers[-1]) for _ in range(case.heads))
        self.heads.requires_grad_(case.tuning in ("full-heads", "stage1"))
        self.call: tuple[Any, Any] = ((), {})
        if case.tuning == "stage1":
            model.requires_grad_(False)
        elif case.tuning == "lora":
            from peft import LoraConfig, get_peft_model

            get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        decoder.layers[-1].register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.call = (args, {name: value for name, value in kwargs.items() if name != "past_key_values"})

    def loss(self, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        """L_1 + beta * sum of alpha^(k-1) L_k; in stage 1 the sum alone."""
        decoder, unembedding = self.model.get_decoder(), self.model.get_output_embeddings()
        is_first = self.case.tuning == "stage1"
        with torch.set_grad_enabled(not is_first):
            hidden = [decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state]
        args, kwargs = self.call
        for head in self.heads:
            output = head(*args, **kwargs)
            hidden.append(decoder.norm(output if isinstance(output, Tensor) else output[0]))
        logits = unembedding(torch.stack(hidden[is_first:])).float()
        weights = [1.0, *(WEIGHT * DECAY**k for k in range(1, len(self.heads) + 1))][is_first:]
        total = logits.new_zeros(())
        for index, weight in enumerate(weights):
            ahead = index + 1 + is_first
            targets = labels[:, ahead:].reshape(-1)
            total = total + weight * nn.functional.cross_entropy(logits[index, :, :-ahead].flatten(0, 1), targets)
        return total


def _stacked_trainer(case: Case) -> Any:
    """SFTTrainer's loop, data and optimizer around `Stacked`."""
    from trl import SFTTrainer

    class StackedTrainer(SFTTrainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(model, *args, **kwargs)
            self.textbook = Stacked(self.model, case).to(self.args.device)

        def create_optimizer(self, *_args: Any) -> Any:
            weights = [p for p in self.textbook.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
            return self.optimizer

        def compute_loss(self, _model: Any, inputs: Any, *_args: Any, **_kwargs: Any) -> Tensor:
            return self.textbook.loss(**inputs)

    return StackedTrainer


def trained_by_reference(case: Case, steps: int, meter: Meter) -> None:
    """caft-llm 0.0.1 in a plain loop: its model, its loss, clipping, AdamW."""
    from types import SimpleNamespace

    import transformers.trainer
    from caft import add_auxiliary_heads, add_caft_loss

    is_first = case.tuning == "stage1"
    meter.imported = memory(meter.device)
    model: Any = model_of(case)
    if is_first:
        model.requires_grad_(False)
    trains_heads = case.tuning in ("full-heads", "stage1")
    add_auxiliary_heads(model, caft_num_heads=case.heads, requires_grad=trains_heads, caft_only_heads=is_first)
    if case.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        trunk = r"model\.layers\.\d+\..*_proj"
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=trunk))
    add_caft_loss(
        transformers,
        caft_heads_coefficient=1.0 if is_first else WEIGHT,
        caft_decay_coefficient=DECAY,
        caft_scheduler="constant",
        caft_only_heads=is_first,
    )
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0, max_steps=100))
    model.to(meter.device).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
    for batch in batches(case, steps + 1):
        inputs = {name: torch.tensor(values, device=meter.device) for name, values in batch.items()}
        meter.begin()
        with torch.autocast(meter.device, dtype=torch.bfloat16, enabled=meter.device == "cuda"):
            loss = transformers.trainer.Trainer.compute_loss(trainer, model, inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.end()


def write_heads(case: Case, folder: Path) -> None:
    """Untrained heads for the model of a case."""
    from transformers import AutoTokenizer

    from caftune import AuxiliaryHeads, Backbone, HeadsConfig, save_heads
    from caftune.demo.run import BASE

    backbone = Backbone.of(model_of(case))
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(case.heads))
    save_heads(folder, heads, backbone, AutoTokenizer.from_pretrained(BASE))


def main() -> None:
    """Run the steps of one arm, or write the heads that they need."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=("sft", "exact", "sampled", "stacked", "reference", "write-heads"))
    parser.add_argument("case", help="as JSON")
    parser.add_argument("folder", type=Path, help="of the heads")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case, meter = Case(**json.loads(options.case)), Meter(options.device)
    run: dict[str, Callable[[], None]] = {
        "reference": lambda: trained_by_reference(case, options.steps, meter),
        "write-heads": lambda: write_heads(case, options.folder),
    }
    run.get(options.arm, lambda: trained_by_trl(case, options.arm, options.folder, options.steps, meter))()
    print(json.dumps(meter.result() if meter.seconds else {}))


if __name__ == "__main__":
    main()
