"""Packed training is refused where a model sees across documents, and only there."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from models import build
from peft import LoraConfig
from trainers import config, numbers, trained
from transformers import AttentionInterface, AutoTokenizer
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from caftune import AuxiliaryHeads, Backbone, CAFTTrainer, HeadsConfig, save_heads
from caftune.core.backbone import UnsupportedModelError
from caftune.demo.run import BASE
from caftune.training.checks import _movement

KEEPS_APART = ["llama", "qwen3", "gpt2", "mixtral"]
LEAKS = ["bloom", "mpt", "mamba"]


def trainer_of(family, rows, folder, *, attention="eager", **options):
    model = build(family, dtype=torch.float32, attention=attention, vocab_size=158).train()
    args = config(folder, aux_weight=0.0, max_steps=1, **options)
    return CAFTTrainer(model, args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(BASE))


@pytest.fixture
def short(rows):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = [tokenizer(row["prompt"])["input_ids"][:9] for row in rows]
    return Dataset.from_list([{"input_ids": i, "labels": i} for i in ids])


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning", "ignore:.*attention implementation:UserWarning")
@pytest.mark.parametrize("options", [{"packing": True, "max_length": 30}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("family", LEAKS)
def test_a_model_that_sees_across_documents_is_refused_before_the_first_step(family, options, short, tmp_path):
    trainer = trainer_of(family, short, tmp_path, **options)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="packing and padding_free must be False for this model with attention"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", KEEPS_APART)
def test_a_model_that_keeps_documents_apart_is_trained(family, attention, short, tmp_path):
    trainer = trainer_of(family, short, tmp_path, attention=attention, packing=True, max_length=30)
    moved, tolerance = _movement(trainer)
    assert moved < tolerance / 10  # by rounding at most
    assert trainer.model.training
    assert numbers(trained(trainer))


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning", "ignore:.*attention implementation:UserWarning")
@pytest.mark.parametrize("family", LEAKS)
def test_a_leak_is_no_matter_of_rounding(family, short, tmp_path):
    moved, tolerance = _movement(trainer_of(family, short, tmp_path, packing=True, max_length=30))
    assert moved > 10 * tolerance


def test_a_padded_run_of_a_model_that_would_leak_is_trained(short, tmp_path):
    assert numbers(trained(trainer_of("bloom", short, tmp_path)))


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_an_adapted_embedding_can_be_asked_too(short, tmp_path):
    model = build("llama", dtype=torch.float32, attention="eager", vocab_size=158)
    args = config(tmp_path, aux_weight=0.0, max_steps=1, packing=True, max_length=30)
    peft_config = LoraConfig(r=2, target_modules=["embed_tokens"])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    trainer = CAFTTrainer(model, args, train_dataset=short, processing_class=tokenizer, peft_config=peft_config)
    assert numbers(trained(trainer))


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_the_probe_of_float32_weights_is_in_float32_and_training_in_bfloat16(short, tmp_path):
    """A small leak drowns in bfloat16's rounding; accelerate's autocast is back in place afterwards."""
    trainer = trainer_of("llama", short, tmp_path, packing=True, max_length=30, bf16=True)
    seen = []
    layer = trainer.model.model.layers[0].mlp.up_proj
    handle = layer.register_forward_hook(lambda _module, _args, output: seen.append((output.dtype, layer.training)))
    trainer.train()
    handle.remove()
    assert set(seen) == {(torch.float32, False), (torch.bfloat16, True)}


def _half_alone(module, query, key, value, attention_mask, **options):
    """Attention that, like the flash kernels, computes in half precision alone, with transformers' own casts around it."""
    target = get_target_dtype(query, module)
    query, key, value = (x if target is None else x.to(target) for x in (query, key, value))
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@pytest.fixture
def with_flash(monkeypatch):
    """Models that call it under a name of a flash kernel, and refuse to see later tokens by `mask` alone."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "a_flash_kernel", _half_alone)

    def make(family, mask=sdpa_mask):
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "a_flash_kernel", mask)
        model = build(family, dtype=torch.float32, attention="sdpa", vocab_size=158)
        model.config._attn_implementation = "a_flash_kernel"  # set_attn_implementation would load a kernel of this name
        return model

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_float32_weights_with_flash_attention_are_probed_in_bfloat16(with_flash, family):
    expected = Backbone.of(build(family, dtype=torch.float32, attention="sdpa"))
    assert expected.mixer is not None
    assert replace(Backbone.of(model := with_flash(family)), model=None) == replace(expected, model=None)
    assert not torch.is_autocast_enabled("cpu")
    assert model.dtype == torch.float32


def test_a_model_that_sees_later_tokens_is_refused_with_flash_attention_too(with_flash):
    model = with_flash("llama", mask=lambda *_args, **_kwargs: None)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="changing a later token changes earlier logits"):
        Backbone.of(model)


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
@pytest.mark.parametrize("tuning", ["heads", "full"])
def test_packed_rows_with_flash_attention_are_trained_in_bfloat16(with_flash, short, tmp_path, tuning):
    model, tokenizer = with_flash("llama"), AutoTokenizer.from_pretrained(BASE)
    if tuning == "full":
        backbone = Backbone.of(model)
        save_heads(tmp_path / "heads", AuxiliaryHeads.build(backbone, HeadsConfig(1)), backbone, tokenizer)
    heads = {"heads": str(tmp_path / "heads")} if tuning == "full" else {"pretrain_heads": True, "num_heads": 1}
    args = config(tmp_path, packing=True, max_length=30, bf16=True, max_steps=1, **heads)
    trainer = trained(CAFTTrainer(model.train(), args, train_dataset=short, processing_class=tokenizer))
    assert 0 < trainer.state.log_history[0]["h2_loss"] < 100


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_on_a_cpu_is_looked_at_without_its_flash_kernel(with_flash, family, monkeypatch):
    def needs_a_gpu(*_args, **_kwargs):
        raise NotImplementedError("FlashAttention only supports CUDA tensors")

    model = with_flash(family)
    monkeypatch.setitem(AttentionInterface._global_mapping, "a_flash_kernel", needs_a_gpu)
    expected = Backbone.of(build(family, dtype=torch.float32, attention="sdpa"))
    assert replace(Backbone.of(model), model=None) == replace(expected, model=None)
    assert model.config._attn_implementation == "a_flash_kernel"
    assert all(
        part.config._attn_implementation == "a_flash_kernel" for part in model.modules() if hasattr(part, "config")
    )
