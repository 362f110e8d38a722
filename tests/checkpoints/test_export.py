"""export_model writes the base's own kind of checkpoint, whatever the training model carried."""

import json
from argparse import Namespace

import pytest
import torch
from families import config_of
from models import VOCABULARY, build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForConditionalGeneration
from transformers.integrations import deepspeed

from caftune.checkpoints.export import clear_export, copy_adapter, export_model, export_saved, load_trained
from caftune.checkpoints.fingerprint import base_fingerprint
from caftune.core.attach import ATTRIBUTE, attach_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.demo.run import BASE
from caftune.errors import CaftuneError

IDS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(9))


def layout(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def published(folder, family="llama", dtype=torch.float32, lora=None):
    """A base on disk, loaded for training in float32 with heads attached."""
    build(family, dtype=dtype).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(2))
    adapted = model if lora is None else wrapped(model, **lora)  # the trainer's order: built, wrapped, attached
    attach_heads(backbone, heads)
    return adapted


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_an_export_has_the_bases_keys_shapes_and_dtypes(family, dtype, tmp_path):
    model = published(tmp_path, family, dtype)
    export_model(model, tmp_path / "out")
    assert layout(tmp_path / "out") == layout(tmp_path / "base")


def test_weights_the_base_keeps_in_float32_stay_in_float32(tmp_path):
    model = build("llama", dtype=torch.bfloat16)
    model.model.norm.float()  # as DeepSeek and GLM 4.5 keep their routers' biases
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    export_model(model, tmp_path / "out")
    assert layout(tmp_path / "out") == layout(tmp_path / "base")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_export_loads_alone_gives_equal_logits_and_generates(family, tmp_path):
    model = published(tmp_path, family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    export_model(model, tmp_path / "out")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits_of(found), logits_of(model))
    assert found.generate(IDS, max_new_tokens=3).shape == (2, 11)


def test_the_config_has_no_trace_of_heads(tmp_path):
    export_model(published(tmp_path), tmp_path / "out")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "base"))
    assert ours == theirs
    assert ATTRIBUTE not in (tmp_path / "out/config.json").read_text()


def test_an_export_leaves_the_training_model_as_it_was(tmp_path):
    model = published(tmp_path)
    model.config.use_cache = False
    before, keys, logits = dict(vars(model)), list(model.state_dict()), logits_of(model)
    export_model(model, tmp_path / "out")
    assert dict(vars(model)) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(logits_of(model), logits)
    assert model.config.use_cache is False
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model(input_ids=IDS, labels=IDS, auxiliary="add")["auxiliary"]["nll"].isfinite().all()


def test_a_failed_export_leaves_the_training_model_as_it_was(tmp_path, monkeypatch):
    model = published(tmp_path)
    before = dict(vars(model))
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):  # noqa: PT011
        export_model(model, tmp_path / "out")
    assert dict(vars(model)) == before
    assert ATTRIBUTE in model._modules


def wrapped(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or ".modules_to_save." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


LORAS = {"lora": {}, "modules_to_save": {"modules_to_save": ["lm_head"]}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_export_gives_the_adapters_logits_merged(kind, tmp_path):
    adapted = published(tmp_path, lora=LORAS[kind])
    expected = logits_of(adapted)
    with adapted.disable_adapter():
        assert not torch.allclose(expected, logits_of(adapted), atol=1e-2)
    export_model(adapted, tmp_path / "out")
    assert layout(tmp_path / "out") == layout(tmp_path / "base")
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # float32: W x + B A x against (W + B A) x


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's own pattern
@pytest.mark.parametrize("target", ["all-linear", ["q_proj"]])
def test_lora_on_a_mixture_of_experts_exports_its_experts(target, tmp_path):
    peft = pytest.importorskip("peft")
    build("mixtral", dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=target, r=2)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if "lora_B" in name else 0)
    expected = logits_of(adapted)
    export_model(adapted, tmp_path / "out")
    assert layout(tmp_path / "out") == layout(tmp_path / "base")
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # float32 through two routers


def test_trained_token_rows_are_in_the_export(tmp_path):
    peft = pytest.importorskip("peft")
    build("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices={"embed_tokens": [5, 6]})
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(1.0 if "trainable_tokens" in name else 0.0)
    export_model(adapted, tmp_path / "out")
    assert layout(tmp_path / "out") == layout(tmp_path / "base")
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, logits_of(adapted), rtol=0, atol=2e-5)


def test_weights_of_no_plain_model_are_refused_before_anything_is_written(tmp_path):
    model = build("llama", dtype=torch.float32)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="other weights than a plain LlamaForCausalLM .extra.bias and 1 more"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_is_no_model(tmp_path, monkeypatch):
    model = published(tmp_path)
    monkeypatch.setattr("caftune.checkpoints.export.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_model(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_export_takes_the_place_of_an_earlier_one_of_any_kind(tmp_path):
    model, earlier = (
        published(tmp_path),
        ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"),
    )
    (tmp_path / "out").mkdir()
    for name in (*earlier, "model.safetensors.index.json", "README.md"):
        (tmp_path / "out" / name).write_text("{}")
    export_model(model, tmp_path / "out")
    kept = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == kept


def test_the_processors_of_a_base_of_several_media_go_along(tmp_path):
    model = Qwen3_5ForConditionalGeneration(config_of("qwen3_5_multimodal"))
    model.save_pretrained(tmp_path / "base")
    for name in ("preprocessor_config.json", "notes.json"):
        (tmp_path / "base" / name).write_text('{"size": 7}')
    export_model(model, tmp_path / "out", base_name=str(tmp_path / "base"))
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 7}'
    assert not (tmp_path / "out" / "notes.json").exists()


def test_the_base_is_no_earlier_export(tmp_path):
    published(tmp_path)
    before = sorted((tmp_path / "base").iterdir())
    clear_export(tmp_path / "base", str(tmp_path / "base"))
    assert sorted((tmp_path / "base").iterdir()) == before


def test_a_lora_export_leaves_the_training_model_as_it_was(tmp_path):
    adapted = published(tmp_path, lora={})
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    logits, before = logits_of(adapted), dict(vars(adapted.get_base_model()))
    export_model(adapted, tmp_path / "out")
    assert adapted.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
    assert [name for name, parameter in adapted.named_parameters() if parameter.requires_grad] == trainable
    assert torch.equal(logits_of(adapted), logits)
    assert dict(vars(adapted.get_base_model())) == before


def test_a_saved_adapter_is_merged_without_a_second_copy_of_the_base(tmp_path, monkeypatch):
    adapted = published(tmp_path, lora={})
    adapted.save_pretrained(tmp_path / "saved")
    export_model(adapted, tmp_path / "copied")
    monkeypatch.setattr("caftune.checkpoints.export._merged_copy", lambda _: pytest.fail("copied"))
    export_saved(tmp_path / "saved", tmp_path / "out", None, base_name=str(tmp_path / "base"))
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("copied", "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_exported_lora_model_is_free_of_peft(tmp_path):
    export_model(published(tmp_path, lora={}), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "base").iterdir()
    )


def test_wrapping_in_lora_does_not_change_the_fingerprint_of_the_base():
    model = build("llama", dtype=torch.float32)
    backbone = Backbone.of(model)
    before = base_fingerprint(backbone)
    pytest.importorskip("peft").get_peft_model(model, pytest.importorskip("peft").LoraConfig(target_modules=["q_proj"]))
    assert base_fingerprint(backbone) == before


NATIVE = {
    "deepseek_v3": ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.0.gate_proj.weight"],
    "glm4_moe": ["model.layers.2.shared_head.norm.weight"],
    "qwen3_next_linear": ["mtp.fc.weight", "mtp.layers.0.mlp.experts.0.gate_proj.weight"],
    "mimo_v2_flash": ["model.mtp.layers.0.eh_proj.weight"],
}


@pytest.mark.parametrize("family", NATIVE)
def test_native_multi_token_modules_of_a_family_pass_through_training_and_export(family, tmp_path):
    model = build(family, dtype=torch.float32)
    depth = model.config.num_hidden_layers
    names = [name.replace("layers.2", f"layers.{depth}") for name in NATIVE[family]]
    model.save_pretrained(tmp_path / "base")
    native = {name: torch.randn(3, 5) for name in names}
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | native, file, metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"]
    backbone = Backbone.of(model)
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(1)))
    model(input_ids=IDS, labels=IDS, auxiliary="add")["auxiliary"]["nll"].sum().backward()
    assert export_model(model, tmp_path / "out") == names
    assert layout(tmp_path / "out") == layout(tmp_path / "base")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in native.items())


def test_layers_cut_off_a_base_are_no_multi_token_modules(tmp_path):
    build("llama", dtype=torch.float32, num_hidden_layers=3).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", num_hidden_layers=2)
    assert export_model(model, tmp_path / "out") == []
    assert not any("layers.2." in name for name in layout(tmp_path / "out"))


MINE = (
    "adapter_notes.txt",
    "adapter_model.safetensors.bak",
    "model.safetensors.md",
    "model-mine.safetensors",
    "notes.md",
)
EXPORTED = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("model-00001-of-00002.safetensors", "adapter_config.json", "adapter_model.safetensors"),
)


@pytest.mark.parametrize(
    "again", [export_model, lambda model, out: copy_adapter(out.parent / "from", out, model, base_name="x")]
)
def test_an_export_removes_the_files_of_an_earlier_one_and_nothing_else(again, tmp_path):
    out, model = tmp_path / "out", published(tmp_path)
    (out / "adapter_experiments" / "deep").mkdir(parents=True)
    (out / "model-old.safetensors").mkdir()
    (tmp_path / "from").mkdir()
    for name in (*MINE, *EXPORTED, "adapter_experiments/deep/mine.txt"):
        (out / name).write_text("before")
    (tmp_path / "from" / "adapter_config.json").write_text("new")
    save_file({"a": torch.zeros(1)}, tmp_path / "from" / "adapter_model.safetensors")
    again(model, out)
    assert {name for name in (*MINE, "adapter_experiments/deep/mine.txt") if (out / name).read_text() == "before"} == {
        *MINE,
        "adapter_experiments/deep/mine.txt",
    }
    assert (out / "model-old.safetensors").is_dir()
    assert not [name for name in EXPORTED if (out / name).is_file() and (out / name).read_bytes() == b"before"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_with_the_name_of_an_exported_file_is_refused_before_anything_is_removed(name, tmp_path):
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "generation_config.json").write_text("before")
    with pytest.raises(CaftuneError, match=f"{name} must be a file of an earlier export or not exist, got a folder"):
        export_model(published(tmp_path), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["generation_config.json", name])


def test_a_chat_template_of_an_earlier_export_is_gone_and_a_new_one_stays(tmp_path):
    out, model, tokenizer = tmp_path / "out", published(tmp_path), AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{{ messages }}"
    export_model(model, out, tokenizer)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    tokenizer.chat_template = None
    export_model(model, out)  # without a tokenizer its files are the user's
    assert (out / "chat_template.jinja").is_file()
    export_model(model, out, tokenizer)
    assert AutoTokenizer.from_pretrained(out).chat_template is None


def test_an_export_loads_whole_weights_where_deepspeed_partitions_what_is_loaded():
    setting = Namespace(is_zero3=lambda: True, config={})  # what TrainingArguments sets under ZeRO-3
    deepspeed.set_hf_deepspeed_config(setting)
    try:
        model = load_trained(BASE, str(BASE))
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert model.get_input_embeddings().weight.shape == (158, 128)
