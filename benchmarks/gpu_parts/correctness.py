"""Loss and gradients of the first step of real runs, against the textbook's formula in float64 on the CPU.

    L = L_1 + sum over h of w_h L_h,   L_h = the mean over its targets of -log softmax(logits_h)[token t + h]

The reference computes all logits of the model that was trained, after the step (its learning rate is 0), with eager attention;
transformers' norms and softmax are float32 in it too. beta is 1: at 0.01 an error of the heads would hardly show.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, TrainerCallback
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from caftune import CAFTConfig, CAFTTrainer
from caftune.core.objective import horizon_targets
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from gpu_parts.shapes import RANK, options_of, tokenizer, train, untrained_heads
from gpu_parts.step import free_memory

TITLE = "Loss and gradients against float64 on the CPU"
HEADS, MOST_STEPS = 3, 4
_LORA = {"lora": True}
# Name -> options of CAFTConfig and of the run.
ROWS: dict[str, dict[str, Any]] = {
    "float32, sdpa": {"attention": "sdpa"},
    "float32, eager": {"attention": "eager"},
    "bfloat16, sdpa": {"attention": "sdpa", "bf16": True},
    "bfloat16, eager": {"attention": "eager", "bf16": True},
    "bfloat16, flash attention": {"attention": "flash_attention_2", "bf16": True, "needs": "flash_attn"},
    "float32, packed": {"packing": True},
    "bfloat16, packed, flash attention": {
        **{"attention": "flash_attention_2", "bf16": True, "needs": "flash_attn", "packing": True},
    },
    "float32, heads trained in full": {"train_heads": True},
    "bfloat16, heads trained in full": {"train_heads": True, "bf16": True},
    "float32, LoRA": _LORA,
    "float32, LoRA, heads trained through LoRA": {**_LORA, "train_heads": True, "heads_lora_rank": RANK},
    "bfloat16, LoRA, heads trained through LoRA": {**_LORA, "train_heads": True, "heads_lora_rank": RANK, "bf16": True},
    "bfloat16, QLoRA": {**_LORA, "four_bits": True, "bf16": True, "needs": "bitsandbytes"},
    "float32, gradient checkpointing": {"gradient_checkpointing": True, "train_heads": True},
    "float32, torch.compile": {"torch_compile": True},
}


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, after which the run ends; its schedules are those of a longer one."""

    gradients: Mapping[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Gradients are complete."""
        self.gradients = gradients_of(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop."""
        control.should_training_stop = True


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Gradients by the names of their weights, in float64 on the CPU."""
    found = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return {name.replace("_orig_mod.", ""): gradient.double().cpu() for name, gradient in found}


def measured(options: Mapping[str, Any], device: str) -> Any:
    """Relative errors of the loss, the model's gradient and the heads' gradient in one step."""
    options = dict(options)
    package, attention = options.pop("needs", None), options.pop("attention", "sdpa")
    if package and importlib.util.find_spec(package) is None:
        return f"not run: needs {package}"
    if attention == "flash_attention_2" and device == "cpu":
        return "not run: needs a GPU"
    free_memory(device)
    is_lora, four_bits = options.pop("lora", False), options.pop("four_bits", False)
    if options.get("torch_compile"):
        options["torch_compile_backend"] = "inductor" if device == "cuda" else "eager"
    drawn = molecules(16, seed=7, substituents=(0, 2))
    rows = Dataset.from_list([{"prompt": prompt(m), "completion": completion(m)} for m in drawn])
    options = {**options_of(device, MOST_STEPS, 4), "train_heads": False, "bf16": False, "max_length": 128, **options}
    options |= {"learning_rate": 0.0, "max_grad_norm": 0.0, "logging_strategy": "steps", "logging_steps": 1}
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16") if four_bits else None
    with tempfile.TemporaryDirectory() as folder, untrained_heads(HEADS):
        trainer = CAFTTrainer(
            str(BASE),
            CAFTConfig(
                folder,
                heads="untrained",
                aux_weight=1.0,
                model_init_kwargs={"attn_implementation": attention},
                **options,
            ),
            train_dataset=rows,
            processing_class=tokenizer(),
            quantization_config=quantisation,
            peft_config=LoraConfig(r=RANK, target_modules="all-linear") if is_lora else None,
        )
        return errors_of_first_step(trainer)


def errors_of_first_step(trainer: Any) -> dict[str, float]:
    """Run a step of `train()`, then the textbook on its batch and weights."""
    with torch.no_grad():  # LoRA's second factor is 0 at first, and the first one's gradient with it
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    batches, step, watch = [], trainer.training_step, Watch()

    def kept(model: Any, inputs: Any, *others: Any) -> Tensor:
        batches.append({name: x.cpu() for name, x in inputs.items() if isinstance(x, Tensor)})
        return step(model, inputs, *others)

    trainer.training_step = kept
    train(trainer, watch)
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    expected, gradients = textbook(trainer, batches[0])
    errors = {"loss": abs(loss - expected) / expected}
    for part, of_heads in {"gradient": False, "gradient_of_heads": True}.items():
        names = [name for name in gradients if ("auxiliary_heads" in name) is of_heads]
        if names:
            one, other = (torch.cat([x[name].flatten() for name in names]) for x in (watch.gradients, gradients))
            errors[part] = float((one - other).norm() / other.norm())
    return errors


def textbook(trainer: Any, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch by the formula, with the trainer's weights in float64."""
    backbone, heads = trainer.backbone, trainer.heads
    model = trainer.model
    dequantise(model)
    model.cpu().double().zero_grad()
    backbone.model.set_attn_implementation("eager")
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with backbone.capture() as call:
        backbone.trunk(**given, use_cache=False)
    horizons = heads.config.horizons
    hidden = [backbone.close(call.hidden), *(heads.hidden(i, backbone, call) for i in range(len(horizons)))]
    weights = [1.0, *trainer.args.auxiliary_weights.at(0, trainer.state.max_steps, horizons)]
    documents = {name: batch[name] for name in ("position_ids", "attention_mask") if name in batch}
    total = torch.zeros((), dtype=torch.float64)
    for horizon, weight, states in zip([1, *horizons], weights, hidden, strict=True):
        targets = horizon_targets(batch["labels"], horizon, **documents).flatten()
        logits = backbone.unembedding().logits(states).flatten(0, 1)
        total = total + weight * functional.cross_entropy(logits, targets)
    total.backward()
    return total.item(), gradients_of(model)


def dequantise(model: nn.Module) -> None:
    """Replace linear layers in 4 bits by those that they stand for."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and type(layer.weight).__name__ == "Params4bit":
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
                plain.weight.data = dequantize_bnb_weight(layer.weight).float()
                setattr(parent, name, plain)


def rows(small: bool, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:  # noqa: ARG001
    """The rows by name, all on the embedded base."""
    for name, options in ROWS.items():
        yield name, partial(measured, options, device)


def lines(found: Mapping[str, Any], _plans: Mapping[str, Any]) -> list[str]:
    """A row a run."""
    table = ["| run | loss, relative error | gradient of the model | gradient of the heads |", "|---|---|---|---|"]
    for name in ROWS:
        values = found.get(name, "not measured")
        cells = [str(values), "", ""]
        if isinstance(values, dict):
            parts = ("loss", "gradient", "gradient_of_heads")
            cells = [f"{values[part]:.1e}" if part in values else "frozen" for part in parts]
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table
