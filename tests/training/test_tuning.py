"""Every way of tuning: what moves, what stays, and what is exported."""

import copy
from pathlib import Path

import pytest
import torch
from models import build
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from trainers import config, lora, numbers, same, trained, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM, set_seed

from caftune import AuxiliaryHeads, Backbone, CAFTTrainer, HeadsConfig
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.recipe import load_recipe
from caftune.training.trained_heads import make_trainable

SGD = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 1, "aux_weight": 1.0}


def logits_of(model, rows):
    ids = AutoTokenizer.from_pretrained(BASE)(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def untied(folder):
    """The embedded base with an unembedding of its own."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.config.tie_word_embeddings = False
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(state)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)


def pretrained_heads(base, rows, folder):
    trainer = CAFTTrainer(
        base, config(folder / "one", pretrain_heads=True, num_heads=2, max_steps=1), train_dataset=rows
    )
    trained(trainer).export(folder / "heads")
    return str(folder / "heads")


def moved(trainer, before):
    return {name for name, value in trainer.heads.state_dict().items() if not torch.equal(value, before[name])}


def test_a_frozen_unembedding_stays_and_the_rest_learns_as_before(rows, tmp_path):
    base = untied(tmp_path / "base")
    heads = pretrained_heads(base, rows, tmp_path)
    results = []
    for frozen in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.get_output_embeddings().requires_grad_(not frozen)
        args = config(tmp_path / "two", heads=heads, max_grad_norm=0.0, **SGD)
        results.append(weights(trained(CAFTTrainer(model, args, train_dataset=rows))))
    free, frozen = results
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(frozen["lm_head.weight"], start["lm_head.weight"])
    assert not torch.equal(free["lm_head.weight"], start["lm_head.weight"])
    assert all(torch.equal(frozen[key], free[key]) for key in free if key != "lm_head.weight")


@pytest.mark.parametrize("with_heads", [True, False])
def test_the_option_that_freezes_the_unembedding_does_what_freezing_it_before_does(rows, tmp_path, with_heads):
    base = untied(tmp_path / "base")
    arm = {"heads": pretrained_heads(base, rows, tmp_path), "train_heads": True} if with_heads else {"aux_weight": 0.0}
    options = {**SGD, **arm, "max_steps": 2}
    given = AutoModelForCausalLM.from_pretrained(base)
    given.lm_head.requires_grad_(False)
    before = trained(CAFTTrainer(given, config(tmp_path / "a", **options), train_dataset=rows))
    args = config(tmp_path / "b", freeze_unembedding=True, **options)
    trainer = trained(CAFTTrainer(base, args, train_dataset=rows))
    assert same(weights(trainer), weights(before))
    trainer.export(tmp_path / "model")
    exported, start = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "base"))
    assert [name for name in start if torch.equal(start[name], exported[name])] == ["lm_head.weight"]


def test_freezing_a_tied_unembedding_freezes_the_embeddings_and_says_so(rows, tmp_path, caplog):
    args = config(tmp_path, aux_weight=0.0, freeze_unembedding=True, max_steps=1)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows)
    assert "freeze_unembedding also freezes the embeddings" in caplog.text
    trainer.train()
    start = load_file(BASE / "model.safetensors")
    assert torch.equal(trainer.model.get_input_embeddings().weight, start["model.embed_tokens.weight"])


@pytest.mark.parametrize("case", ["lora", "lora that trains it", "frozen before", "stage 1"])
def test_an_unembedding_that_is_not_trained_anyway_cannot_be_frozen(rows, tmp_path, case):
    base, more, message = untied(tmp_path / "base"), {}, "must be False where the output layer is not trained anyway"
    args = {"aux_weight": 0.0, "freeze_unembedding": True}
    if case.startswith("lora"):
        more["peft_config"] = LoraConfig(r=2, modules_to_save=["lm_head"] if "trains" in case else None)
    elif case == "frozen before":
        base = AutoModelForCausalLM.from_pretrained(base)
        base.lm_head.requires_grad_(False)
    else:
        args, message = {"pretrain_heads": True, "freeze_unembedding": True}, "must be False in stage 1"
    with pytest.raises(CaftuneError, match=f"freeze_unembedding {message}"):
        CAFTTrainer(base, config(tmp_path, **args), train_dataset=rows, **more)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_training_the_heads_along_leaves_the_models_first_step_alone(rows, heads, tmp_path, tuning):
    """Their gradients are clipped apart: in one norm with the model's, they would shrink its step."""
    states = []
    for options in ({"train_heads": False}, {}, {"heads_lora_rank": 2 if tuning == "full" else 0}):
        args = config(tmp_path, heads=heads, max_grad_norm=0.1, **SGD, **options)
        peft_config = lora() if tuning == "lora" else None
        states.append(weights(trained(CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=peft_config))))
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def test_the_heads_have_their_own_clip_and_learning_rate(rows, heads, tmp_path):
    options = {"heads_max_grad_norm": 0.05, "heads_learning_rate": 0.3, "max_grad_norm": 1e9}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, heads=heads, **{**SGD, **options}), train_dataset=rows)
    before = {name: value.clone() for name, value in trainer.heads.state_dict().items()}
    trainer.train()
    step = torch.cat([(value - before[name]).flatten() for name, value in trainer.heads.state_dict().items()])
    assert step.norm().item() == pytest.approx(0.3 * 0.05, rel=1e-4)
    rates = {group["initial_lr"]: len(group["params"]) for group in trainer.optimizer.param_groups if group["params"]}
    assert rates.keys() == {0.01, 0.3}


def test_heads_can_be_trained_through_a_lora_of_their_own(rows, heads, tmp_path):
    options = {"heads_lora_rank": 2, "max_steps": 3}
    args = config(tmp_path / "run", heads=heads, save_strategy="steps", save_steps=3, **options)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=lora())
    before = {name: value.clone() for name, value in trainer.heads.state_dict().items()}
    trainer.train()
    changed = moved(trainer, before)
    assert changed
    assert all("lora_" in name for name in changed)
    kept = load_file(tmp_path / "run" / "checkpoint-3" / "heads" / "heads.safetensors")
    assert kept.keys() == load_file(Path(heads) / "heads.safetensors").keys()  # ordinary heads, merged
    layer = trainer.heads.heads[0].mlp.up_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(kept["heads.0.mlp.up_proj.weight"], expected, rtol=0, atol=1e-7)
    adapter = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    assert not any("auxiliary_heads" in name for name in adapter)


LIKE_THEIRS = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.25)


@pytest.mark.parametrize(
    ("adapters", "lora_rank", "expected"),
    [
        ({"a": LIKE_THEIRS}, None, (4, 3.0, 0.25)),
        ({"a": LIKE_THEIRS}, 2, (2, 3.0, 0.25)),
        ({"a": LoHaConfig(r=3, alpha=9), "b": LIKE_THEIRS}, None, (4, 3.0, 0.25)),
        ({"a": LoraConfig(r=4, lora_alpha=6, use_rslora=True)}, None, (4, 3.0, 0.0)),
        ({"a": LoHaConfig(r=3, alpha=9)}, None, (8, 1.0, 0.0)),  # no LoRA: PEFT's defaults
        ({}, 2, (2, 1.0, 0.0)),
    ],
)
def test_a_heads_lora_has_rank_scaling_and_dropout_of_the_models(adapters, lora_rank, expected):
    heads, state = AuxiliaryHeads.build(Backbone.of(build("llama")), HeadsConfig(2)), torch.get_rng_state()
    make_trainable(heads, lora_rank=lora_rank, adapters=adapters)
    name = next(iter(adapters), "default")
    layers = [module for module in heads.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert (layer.r[name], layer.scaling[name], getattr(layer.lora_dropout[name], "p", 0.0)) == expected
    assert torch.equal(torch.get_rng_state(), state)  # the model's dropout stays as it is


def named(name):
    set_seed(42)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LIKE_THEIRS, adapter_name=name)


RESUMED = {
    "full": (lambda: str(BASE), None, {"heads_lora_rank": 2}),
    "lora": (
        lambda: str(BASE),
        LIKE_THEIRS,
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
    ),
    "another name": (lambda: named("mine"), None, {}),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_heads_with_a_lora_resume_bit_for_bit(rows, heads, tmp_path, kind):
    start, peft_config, more = RESUMED[kind]
    options = {"heads_learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2, "heads": heads, **more}
    data = {"train_dataset": rows, "eval_dataset": rows.select(range(4)), "peft_config": peft_config}
    runs = [CAFTTrainer(start(), config(tmp_path / name, **options), **data) for name in ("a", "b")]
    whole = trained(runs[0])
    runs[1].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert numbers(runs[1])[-2:] == numbers(whole)[-2:]
    assert same(runs[1].model.state_dict(), whole.model.state_dict())


ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "token_rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_alone_and_merged_give_the_logits_of_training(rows, tmp_path, kind):
    base = untied(tmp_path / "base")
    args = config(tmp_path / "two", heads=pretrained_heads(base, rows, tmp_path), aux_weight=1.0, learning_rate=1e-2)
    trainer = trained(CAFTTrainer(base, args, train_dataset=rows, peft_config=LoraConfig(r=4, **ADAPTERS[kind])))
    trainer.export(tmp_path / "merged")
    trainer.export(tmp_path / "adapter", merged=False)
    expected = logits_of(trainer.model, rows)
    assert not torch.allclose(expected, logits_of(AutoModelForCausalLM.from_pretrained(base), rows), atol=1e-2)
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits_of(adapter, rows), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits_of(merged, rows), expected, rtol=0, atol=2e-4
    )  # float32: W x + B A x, (W + B A) x
    layout = {key: value.shape for key, value in load_file(tmp_path / "base" / "model.safetensors").items()}
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {key: value.shape for key, value in found.items()} == layout
    assert not any("auxiliary_heads" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("options", [{"aux_weight": 1.0}, {"aux_weight": 0.0}])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_are_trained_where_peft_keeps_them_tied(rows, heads, tmp_path, saved, options):
    options = {**options, **({"heads": heads} if options["aux_weight"] else {})}
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)
    args = config(tmp_path / "run", learning_rate=1e-2, max_steps=2, **options)
    trainer = trained(CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=peft_config))
    trainer.export(tmp_path / "merged")
    trainer.export(tmp_path / "adapter", merged=False)
    expected = logits_of(trainer.model, rows)
    merged, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", BASE))
    torch.testing.assert_close(logits_of(merged, rows), expected, rtol=0, atol=2e-4)  # as above
    assert not torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == load_file(BASE / "model.safetensors").keys()
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter")
    assert torch.equal(logits_of(adapter, rows), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning", "ignore:.*no longer tied:UserWarning")
def test_without_heads_an_untied_copy_is_exported_as_the_model_it_is(rows, tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    args = config(tmp_path / "run", learning_rate=1e-2, aux_weight=0.0)
    trainer = trained(CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=peft_config))
    trainer.export(tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_of(found, rows), logits_of(trainer.model, rows), rtol=0, atol=2e-4)  # as above
    assert found.config.tie_word_embeddings is False


def test_a_trained_copy_of_the_unembedding_hears_the_heads(rows, tmp_path):
    base = untied(tmp_path / "base")
    args = config(tmp_path / "two", heads=pretrained_heads(base, rows, tmp_path))
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = CAFTTrainer(base, args, train_dataset=rows, peft_config=peft_config)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model(**batch, auxiliary="add", fused_lm_head=True)["auxiliary"]["nll"].sum().backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if "lm_head" in name}
    assert gradients["base_model.model.lm_head.modules_to_save.default.weight"].any()
    assert gradients["base_model.model.lm_head.original_module.weight"] is None


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_base_with_added_tokens_is_trained_and_exported(rows, tmp_path, is_tied, tuning):
    base = str(BASE) if is_tied else untied(tmp_path / "base")
    heads = pretrained_heads(base, rows, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 6)
    args = config(tmp_path / "two", heads=heads, force_heads=True, aux_weight=1.0)
    peft_config = lora() if tuning == "lora" else None
    trainer = trained(CAFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config))
    expected = logits_of(trainer.model, rows)
    trainer.export(tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert expected.shape[-1] == found.config.vocab_size == 164
    torch.testing.assert_close(logits_of(found, rows), expected, rtol=0, atol=2e-4)  # as above
    keys = load_file(Path(base) / "model.safetensors").keys()
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == keys


def test_heads_reach_a_fine_tuned_child_only_when_asked(rows, heads, tmp_path):
    args = config(tmp_path / "one", heads=heads, max_steps=2, learning_rate=1e-2)
    trained(CAFTTrainer(str(BASE), args, train_dataset=rows)).export(tmp_path / "child")
    again = {"train_dataset": rows}
    with pytest.raises(
        CaftuneError, match=r"differs in its unembedding, last_layer\. Use heads of this model, or force"
    ):
        CAFTTrainer(str(tmp_path / "child"), config(tmp_path / "two", heads=heads), **again)
    args = config(tmp_path / "three", heads=heads, force_heads=True)
    assert numbers(trained(CAFTTrainer(str(tmp_path / "child"), args, **again)))


@pytest.fixture(scope="module", params=["uint8", "float32"])
def four_bits(request):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install caftune[qlora])")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=request.param, **options)


def test_qlora_computes_what_lora_does_on_the_rounded_weights(rows, heads, tmp_path, four_bits):
    """The base's weights, taken back out of their 4 bits, in a plain model: the same losses and gradients."""
    args = config(tmp_path / "four", heads=heads, force_heads=True, aux_weight=1.0)
    peft_config = {"peft_config": lora(), "train_dataset": rows}
    quantised = CAFTTrainer(str(BASE), args, quantization_config=four_bits, **peft_config)
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        for name, module in quantised.model.get_base_model().named_modules():
            if "layers." in name and name.endswith("base_layer") and "auxiliary" not in name:
                plain.get_parameter(f"{name.removesuffix('.base_layer')}.weight").copy_(
                    dequantize_bnb_weight(module.weight)
                )
    rounded = CAFTTrainer(
        plain, config(tmp_path / "full", heads=heads, force_heads=True, aux_weight=1.0), **peft_config
    )
    start = copy.deepcopy(rounded.model.state_dict())
    for one, other in zip(numbers(trained(quantised)), numbers(trained(rounded)), strict=True):
        assert one == pytest.approx(other, rel=5e-3)  # TRL holds the adapter of a quantised base in bfloat16: 8 bits
    assert any(not torch.equal(value, start[key]) for key, value in rounded.model.state_dict().items())


def test_heads_beside_a_base_in_four_bits_are_plain_and_load_from_the_plain_bases_heads(
    rows, heads, tmp_path, four_bits
):
    arguments = {"train_dataset": rows, "peft_config": lora(), "quantization_config": four_bits}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, heads=heads, train_heads=False), **arguments)
    kinds = {type(module) for module in trainer.heads.modules() if hasattr(module, "in_features")}
    assert kinds == {torch.nn.Linear}
    kept = load_file(Path(heads) / "heads.safetensors")
    for name, value in trainer.heads.state_dict().items():
        torch.testing.assert_close(value, kept[name].to(value.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"pretrain_heads": True}, {"aux_weight": 0.0}])
def test_a_quantised_base_is_refused_where_its_weights_would_be_needed(rows, tmp_path, four_bits, options):
    with pytest.raises(ValueError, match="must not be quantised without a peft_config, nor in stage 1"):
        CAFTTrainer(str(BASE), config(tmp_path, **options), train_dataset=rows, quantization_config=four_bits)


def test_a_qlora_export_is_the_plain_base_with_the_adapter_merged(rows, heads, tmp_path, four_bits):
    args = config(tmp_path / "run", heads=heads, learning_rate=1e-2)
    arguments = {"train_dataset": rows, "peft_config": lora(), "quantization_config": four_bits}
    trainer = trained(CAFTTrainer(str(BASE), args, **arguments))
    trainer.export(tmp_path / "model")
    trainer.export(tmp_path / "adapter", merged=False)
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_of(found, rows), logits_of(adapter, rows), rtol=0, atol=2e-4)  # as above
    base = load_file(BASE / "model.safetensors")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in exported.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}


def test_a_qlora_export_ends_its_answers_as_the_training_did(rows, heads, tmp_path, four_bits):
    arguments = {"train_dataset": rows, "peft_config": lora(), "quantization_config": four_bits}
    args = config(tmp_path / "run", heads=heads, eos_token="<unk>", max_steps=1)
    trainer = trained(CAFTTrainer(str(BASE), args, **arguments))
    trainer.export(tmp_path / "model")
    found, live = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), trainer.model
    assert found.config.eos_token_id == live.config.eos_token_id == 3
    assert found.generation_config.eos_token_id == live.generation_config.eos_token_id == [3, 1]


def test_adapters_that_cannot_be_merged_are_refused_before_training(rows, tmp_path):
    build("zamba", dtype=torch.float32, vocab_size=158).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    rows.to_json(str(tmp_path / "rows.jsonl"))
    (tmp_path / "recipe.yaml").write_text(
        f"output: {tmp_path}/run\nmodel: {{name: {tmp_path}/base, tuning: lora, lora: {{target_modules: [q_proj]}}}}\n"
        f"loss: {{weight: 0}}\ndata: {{train: {tmp_path}/rows.jsonl}}\ntrainer: {{max_steps: 1, use_cpu: true}}\n"
    )
    with pytest.raises(ValueError, match=r"shares its weight, .*Export the adapter alone \(recipe: model\.lora\.merge"):
        finetune_model(load_recipe(tmp_path / "recipe.yaml"))
    assert not list((tmp_path / "run" / "train").glob("checkpoint-*"))
    finetune_model(load_recipe(tmp_path / "recipe.yaml", ["model.lora.merge=false", f"output={tmp_path}/alone"]))
    assert (tmp_path / "alone" / "model" / "adapter_model.safetensors").is_file()


def test_native_multi_token_modules_are_copied_and_named(rows, heads, tmp_path, caplog):
    """As DeepSeek, GLM and Qwen3-Next publish them: tensors that the model class does not load."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(base)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(base)
    native = {"mtp.fc.weight": torch.randn(4, 8), "model.layers.4.eh_proj.weight": torch.randn(3, 3).bfloat16()}
    save_file(load_file(base / "model.safetensors") | native, base / "model.safetensors", metadata={"format": "pt"})
    args = config(tmp_path / "run", heads=heads, max_steps=1)
    trainer = trained(CAFTTrainer(str(base), args, train_dataset=rows, peft_config=lora()))
    assert sorted(trainer.export(tmp_path / "model")) == sorted(native)
    assert "own multi-token modules (2 tensors" in caplog.text
    exported, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", base))
    assert {k: (v.shape, v.dtype) for k, v in exported.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    assert all(torch.equal(exported[key], value) for key, value in native.items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_on_one_of_two_tied_matrices_is_not_merged_into_both(rows, heads, tmp_path):
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    trainer = trained(
        CAFTTrainer(str(BASE), config(tmp_path, heads=heads), train_dataset=rows, peft_config=peft_config)
    )
    with pytest.raises(ValueError, match=r"embed_tokens cannot be merged: \S*lm_head shares its weight"):
        trainer.export(tmp_path / "model")
    trainer.export(tmp_path / "adapter", merged=False)
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter")
    assert torch.equal(logits_of(adapter, rows), logits_of(trainer.model, rows))


def test_a_lora_on_gpt2s_heads_is_merged_the_right_way_round(rows, tmp_path):
    model = build("gpt2", dtype=torch.float32, vocab_size=158, n_positions=128).train()
    tokenizer = {"processing_class": AutoTokenizer.from_pretrained(BASE), "train_dataset": rows}
    stage1 = CAFTTrainer(copy.deepcopy(model), config(tmp_path / "one", pretrain_heads=True, max_steps=1), **tokenizer)
    trained(stage1).export(tmp_path / "heads")
    options = {"heads_lora_rank": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = trained(
        CAFTTrainer(model, config(tmp_path / "two", heads=str(tmp_path / "heads"), **options), **tokenizer)
    )
    kept = load_file(tmp_path / "two" / "checkpoint-4" / "heads" / "heads.safetensors")
    layer = trainer.heads.heads[0].mlp.c_fc
    assert layer.get_delta_weight("default").any()
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(kept["heads.0.mlp.c_fc.weight"], expected, rtol=0, atol=1e-7)


def test_a_model_left_frozen_by_stage_one_is_refused_in_stage_two(rows, heads, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE).requires_grad_(False)
    with pytest.raises(ValueError, match="model must have weights to train, and all are frozen"):
        CAFTTrainer(model, config(tmp_path, heads=heads), train_dataset=rows)


def test_an_adapter_with_another_name_is_exported_alone(rows, heads, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), lora(), adapter_name="task")
    trainer = trained(CAFTTrainer(model, config(tmp_path / "out", heads=heads), train_dataset=rows))
    trainer.export(tmp_path / "adapter", merged=False)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter" / "task")
    assert torch.equal(logits_of(again, rows), logits_of(trainer.model, rows))
