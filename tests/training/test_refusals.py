"""Wrong things are refused early, with one sentence that names the place and the remedy."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from trainers import config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from caftune import AuxiliaryHeads, Backbone, CAFTConfig, CAFTTrainer, HeadsConfig, save_heads
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.training.checks import refuse_arguments, refuse_lost_adapters, refuse_processes

OPTIONS = {"report_to": [], "bf16": False, "use_cpu": True, "disable_tqdm": True, "max_length": 32, "max_steps": 1}
ROWS = Dataset.from_list([{"prompt": "Name: ethanol\nSMILES:", "completion": " CCO"}] * 4)


def trainer(folder, *, model=None, rows=ROWS, peft_config=None, **options):
    args = CAFTConfig(str(folder), **{**OPTIONS, **options})
    return CAFTTrainer(model or str(BASE), args, train_dataset=rows, peft_config=peft_config)


def heads_of(model, folder, kind="decoder"):
    backbone = Backbone.of(model)
    save_heads(folder, AuxiliaryHeads.build(backbone, HeadsConfig(2, kind)), backbone)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "heads must name a folder of pretrained heads, got None"),
        ({"heads": "x", "aux_weight": -1.0}, r"weight \(beta\) must be a number >= 0, got -1.0"),
        ({"heads": "x", "aux_decay": 1.5}, r"decay \(alpha\) must be in \(0, 1\], got 1.5"),
        (
            {"heads": "x", "aux_schedule": "cosine"},
            r"schedule \(gamma\) must be one of reflected_sine, .* got 'cosine'",
        ),
        ({"pretrain_heads": True, "aux_weight": 0.0}, "aux_weight must be above 0 in stage 1"),
        ({"pretrain_heads": True, "num_heads": 0}, "count must be at least 1, got 0"),
        ({"pretrain_heads": True, "head_kind": "linear"}, "kind must be one of decoder, mlp, got 'linear'"),
        (
            {"heads": "x", "packing": True, "packing_strategy": "wrapped"},
            "packing_strategy must be 'bfd' or 'bfd_split'",
        ),
        ({"pretrain_heads": True, "label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0 in stage 1"),
        (
            {"pretrain_heads": True, "loss_type": "dft"},
            "loss_type must be nll in stage 1 .* got dft: it changes the model",
        ),
        (
            {"pretrain_heads": True, "neftune_noise_alpha": 5.0},
            "neftune_noise_alpha must be None in stage 1 .* adds noise",
        ),
    ],
)
def test_bad_options_are_refused_where_the_config_is_built(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CAFTConfig(str(tmp_path), **{**OPTIONS, **options})


def test_rows_whose_answer_is_cut_away_are_counted_and_named(tmp_path, caplog):
    long = {"prompt": "Name: " + "methyl" * 40 + "\nSMILES:", "completion": " C"}
    rows = Dataset.from_list([ROWS[0], long, ROWS[0], long])
    assert len(trainer(tmp_path, rows=rows, pretrain_heads=True).train_dataset) == 2
    found = "2 of 4 rows of the train data (counted from 0: 1, 3) have no token to train on within max_length=32. They are left"
    assert found in caplog.text


def test_rows_that_only_lose_their_end_are_told(tmp_path, caplog):
    rows = Dataset.from_list([{"prompt": "Name: ethanol\nSMILES:", "completion": " " + "C" * 60}, ROWS[0]])
    trainer(tmp_path, rows=rows, pretrain_heads=True)
    assert "1 of 2 train rows are longer than max_length=32 and lose their end" in caplog.text


def test_horizons_beyond_the_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"leave horizons below the context of 32 tokens, got horizon 33"):
        trainer(tmp_path, pretrain_heads=True, num_heads=32)


def test_the_start_of_rows_counts_with_packing_for_that_is_what_is_packed(tmp_path, caplog):
    long = {"prompt": "Name: " + "methyl" * 40 + "\nSMILES:", "completion": " C"}
    rows = Dataset.from_list([ROWS[0], long])
    options = {"truncation_mode": "keep_end", "pretrain_heads": True, "max_length": 64}
    lost = "1 of 2 rows of the train data (counted from 0: 1) have no token to train on"
    trainer(tmp_path / "padded", rows=rows, **options)
    assert lost not in caplog.text
    trainer(tmp_path / "packed", rows=rows, packing=True, **options)
    assert lost in caplog.text


def test_the_end_that_rows_lose_is_named(tmp_path, caplog):
    rows = Dataset.from_list([{"text": "Name: ethanol" * 40}])
    for mode, end in {"keep_end": "beginning", "keep_start": "end"}.items():
        trainer(tmp_path / mode, rows=rows, truncation_mode=mode, pretrain_heads=True)
        assert f"1 of 1 train rows are longer than max_length=32 and lose their {end}." in caplog.text


def test_one_process_with_several_gpus_is_refused_with_heads_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(CAFTConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="One process must have one GPU with auxiliary heads, got 2"):
        trainer(tmp_path, pretrain_heads=True)
    refuse_processes(CAFTConfig(str(tmp_path), **OPTIONS, aux_weight=0.0))


def test_an_adapter_is_refused_under_fsdps_own_activation_checkpointing(tmp_path):
    """PEFT writes an empty file there; the day it does not, the refusal can go."""
    plugin = SimpleNamespace(activation_checkpointing=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    refuse_lost_adapters(accelerator, plain)
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="fsdp_activation_checkpointing must be false with a peft_config, got true"):
        refuse_lost_adapters(accelerator, model)
    layers = plain.model.layers
    for place, layer in enumerate(layers):
        layers[place] = checkpoint_wrapper(layer)
    assert get_peft_model_state_dict(model) == {}


def test_heads_of_another_base_are_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=158, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=2
    )
    folder = heads_of(LlamaForCausalLM(config), tmp_path / "heads")
    with pytest.raises(CaftuneError, match="were trained for llama, and .* differs in its .*hidden_size .32 -> 128."):
        trainer(tmp_path / "out", heads=folder)


def test_half_precision_weights_are_refused_for_full_fine_tuning(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    folder = heads_of(model, tmp_path / "heads")
    with pytest.raises(ValueError, match="must hold float32 weights for full fine-tuning, got torch.bfloat16"):
        trainer(tmp_path / "out", model=model, heads=folder)


def test_a_model_already_wrapped_by_peft_is_refused(tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="model must be the plain base, got one wrapped by PEFT"):
        trainer(tmp_path, model=model, pretrain_heads=True)


@pytest.mark.parametrize("made_by", ["peft_config", "PeftModel"])
def test_prompt_learning_is_refused_with_heads(made_by, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    folder = heads_of(model, tmp_path / "heads")
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    if made_by == "PeftModel":
        model, peft_config = get_peft_model(model, peft_config), None
    with pytest.raises(CaftuneError, match="peft_config must adapt weights .* with heads, got PromptTuningConfig"):
        trainer(tmp_path / "out", model=model, heads=folder, peft_config=peft_config)


def test_a_frozen_adapter_is_refused_with_heads(tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    folder = heads_of(plain, tmp_path / "heads")
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter")
    with pytest.raises(CaftuneError, match="all are frozen .* load an adapter with is_trainable=True"):
        trainer(tmp_path / "out", model=model, heads=folder)


def test_an_adapter_that_is_no_peft_model_is_refused_with_heads(tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    folder = heads_of(plain, tmp_path / "heads")
    plain.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CaftuneError, match=r"model must be a PeftModel .* Use PeftModel\.from_pretrained"):
        trainer(tmp_path / "out", model=plain, heads=folder)


def test_untying_the_embeddings_is_refused(tmp_path):
    folder = heads_of(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "heads")
    peft_config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save must not hold lm_head: this base ties its embeddings"):
        trainer(tmp_path / "out", heads=folder, peft_config=peft_config)


def test_adapted_rows_of_tied_embeddings_are_refused(tmp_path):
    folder = heads_of(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "heads")
    with pytest.raises(CaftuneError, match=r"leave the unembedding unadapted .* out of trainable_token_indices"):
        trainer(tmp_path / "out", heads=folder, peft_config=LoraConfig(trainable_token_indices=[5, 6]))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            {"train_heads": False},
            {},
            r"\(2 heads trained in full\), got none\. Resume with the earlier train_heads",
        ),
        ({}, {"train_heads": False}, r"\(none\), got 2 heads trained in full"),
        ({}, {"heads_lora_rank": 2}, r"\(2 heads trained by a LoRA of rank 2\), got 2 heads trained in full"),
        (
            {"heads_lora_rank": 2},
            {"heads_lora_rank": 3},
            r"\(2 heads trained by a LoRA of rank 3\), got 2 heads trained by a LoRA of rank 2",
        ),
    ],
)
def test_a_run_does_not_resume_where_heads_were_trained_in_another_way(tmp_path, before, now, message):
    heads = heads_of(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "heads")
    options = {"heads": heads, "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer(tmp_path / "run", **options, **before).train()
    with pytest.raises(CaftuneError, match=f"must hold heads as this run trains them {message}"):
        trainer(tmp_path / "again", **options, **now).train(str(tmp_path / "run" / "checkpoint-1"))


def test_adapters_in_stage_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="peft_config must be None in stage 1"):
        trainer(tmp_path, pretrain_heads=True, peft_config=LoraConfig())


def test_pushing_the_model_of_stage_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="push_to_hub must be False in stage 1"):
        trainer(tmp_path, pretrain_heads=True, push_to_hub=True)


def test_a_loss_function_of_the_users_own_is_refused_in_stage_one(tmp_path):
    args = CAFTConfig(str(tmp_path), **OPTIONS, pretrain_heads=True)
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        CAFTTrainer(str(BASE), args, train_dataset=ROWS, compute_loss_func=print)


def test_heads_trained_with_another_tokenizer_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    backbone = Backbone.of(model)
    save_heads(tmp_path / "heads", AuxiliaryHeads.build(backbone, HeadsConfig(2)), backbone, tokenizer)
    description = json.loads((tmp_path / "heads" / "heads.json").read_text())
    description["tokenizer"] = "0" * 64
    (tmp_path / "heads" / "heads.json").write_text(json.dumps(description))
    with pytest.raises(CaftuneError, match="differs in its tokenizer"):
        trainer(tmp_path / "out", model=model, heads=str(tmp_path / "heads"))


@pytest.mark.parametrize("options", [{"pretrain_heads": True}, {"heads": "h"}])
def test_an_optimizer_made_before_the_heads_is_refused(tmp_path, options):
    args = CAFTConfig(str(tmp_path), **OPTIONS, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="optimizers must not hold an optimizer where heads are trained"):
        CAFTTrainer(str(BASE), args, train_dataset=ROWS, optimizers=(optimizer, None))


@pytest.mark.parametrize("options", [{"train_heads": False}, {"aux_weight": 0.0}])
def test_an_optimizer_of_ones_own_goes_with_heads_that_are_not_trained(tmp_path, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    refuse_arguments(config(tmp_path, heads="h", **options), None, None, None, (optimizer, None))


def test_metrics_of_logits_are_refused_in_stage_one(tmp_path):
    args = CAFTConfig(str(tmp_path), **OPTIONS, pretrain_heads=True)
    with pytest.raises(ValueError, match="compute_metrics must be None in stage 1"):
        CAFTTrainer(str(BASE), args, train_dataset=ROWS, compute_metrics=print)


def test_soft_targets_are_refused_where_deepspeed_partitions_the_weights(tmp_path):
    from accelerate.utils import DeepSpeedPlugin

    args = config(tmp_path, pretrain_heads=True, soft_targets=True)
    args.deepspeed_plugin = DeepSpeedPlugin.__new__(DeepSpeedPlugin)  # without DeepSpeed itself
    args.deepspeed_plugin.zero_stage = 3
    with pytest.raises(ValueError, match=r"soft_targets must be False under DeepSpeed ZeRO-3, got True"):
        CAFTTrainer(str(BASE), args, train_dataset=ROWS)


def test_a_model_loaded_in_parts_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.lm_head.weight.ds_status = "NOT_AVAILABLE"  # as DeepSpeed ZeRO-3 marks it
    with pytest.raises(ValueError, match=r"model must hold whole weights with heads.*got a part"):
        CAFTTrainer(model, config(tmp_path, pretrain_heads=True), train_dataset=ROWS)


@pytest.mark.parametrize("option", ["heads_lora_rank", "heads_learning_rate", "heads_max_grad_norm"])
def test_options_of_training_heads_need_trained_heads(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option} must be None unless stage 2 trains the heads"):
        config(tmp_path, heads="h", train_heads=False, **{option: 1})
    bound = "a number >= 0" if option == "heads_lora_rank" else "above 0"  # rank 0: all their weights
    with pytest.raises(ValueError, match=f"{option} must be {bound}, got -1"):
        config(tmp_path, heads="h", **{option: -1})


def test_fsdp_that_loads_the_base_in_one_process_only_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading must be false with auxiliary heads"):
        CAFTTrainer(str(BASE), CAFTConfig(str(tmp_path), pretrain_heads=True, use_cpu=True), train_dataset=ROWS)


def test_processes_that_would_train_alone_in_one_folder_are_refused(tmp_path, monkeypatch):
    args = CAFTConfig(str(tmp_path), pretrain_heads=True, use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, and each would train alone, in the same folder"):
        CAFTTrainer(str(BASE), args, train_dataset=ROWS)


def test_layers_replicated_by_peft_are_refused(tmp_path):
    peft_config = LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 4)])
    with pytest.raises(ValueError, match="layer_replication must be None"):
        CAFTTrainer(str(BASE), config(tmp_path, heads="heads"), train_dataset=ROWS, peft_config=peft_config)


def test_evaluation_packed_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="eval_packing must not be True without packing"):
        config(tmp_path, heads="heads", eval_packing=True)


def test_a_clip_of_the_heads_without_any_clipping_is_refused(tmp_path):
    with pytest.raises(ValueError, match="heads_max_grad_norm must be None with max_grad_norm=0"):
        config(tmp_path, heads="heads", heads_max_grad_norm=1.0, max_grad_norm=0.0)


def test_a_refused_trainer_leaves_the_options_of_its_model_alone(tmp_path):
    args = config(tmp_path, pretrain_heads=True, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(KeyError):
        CAFTTrainer(str(BASE), args, train_dataset=Dataset.from_list([{"unknown": "a"}]))
    assert args.model_init_kwargs == {"dtype": "float32"}


@pytest.mark.parametrize("last", [{"layers_to_transform": [3]}, {"target_modules": r".*layers\.3\..*proj"}])
def test_training_the_last_layer_alone_is_refused_with_decoder_heads(last, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert len(model.model.layers) == 4
    heads = heads_of(model, tmp_path / "heads")
    adapter = LoraConfig(**{"target_modules": ["q_proj"], **last})
    for train_heads in (True, False):
        with pytest.raises(
            ValueError, match="Only the last layer is trainable, but decoder heads branch off before it"
        ):
            trainer(tmp_path, heads=heads, train_heads=train_heads, peft_config=adapter)
    trainer(tmp_path, heads=heads, peft_config=LoraConfig(target_modules=["q_proj"], layers_to_transform=[2, 3]))
    trainer(tmp_path, heads=heads_of(model, tmp_path / "mlp", "mlp"), peft_config=adapter)
    trainer(tmp_path, heads=heads, aux_weight=0.0, peft_config=adapter)


def test_heads_whose_losses_do_not_count_are_not_trained(tmp_path):
    heads = heads_of(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "heads")
    built = trainer(tmp_path / "run", heads=heads, aux_weight=0.0)
    assert not any(parameter.requires_grad for parameter in built.heads.parameters())
    built.train()
    built.save_model()
    assert not (tmp_path / "run" / "heads").exists()
