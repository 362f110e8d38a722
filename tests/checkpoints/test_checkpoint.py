"""Heads on disk: the round trip, whose heads they are, and every damage refused with its sentence."""

import json
import shutil

import pytest
import torch
from models import VOCABULARY, build
from safetensors.torch import load_file, save_file

from caftune.checkpoints import heads_folder as checkpoint
from caftune.checkpoints.fingerprint import base_fingerprint, model_fingerprint
from caftune.checkpoints.heads_folder import load_heads, save_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.files import file_sha256


class Tokenizer:
    """As much of a tokenizer as a fingerprint needs."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}


TOKENIZER = Tokenizer("a", "b", "c")


def base(family="llama", **options):
    return Backbone.of(build(family, **{"dtype": torch.float32, **options}))


def trained(backbone, kind="decoder", count=2):
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(count, kind))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter))
    return heads


@pytest.fixture
def saved(tmp_path):
    save_heads(tmp_path / "heads", trained(base()), base(), TOKENIZER, training={"stage": 1})
    return tmp_path / "heads"


def edit(folder, **changes):
    path = folder / "heads.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["decoder", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_round_trip_bit_for_bit(family, kind, dtype, tmp_path):
    backbone = base(family, dtype=dtype)
    heads = trained(backbone, kind)
    save_heads(tmp_path, heads, backbone, TOKENIZER)
    found = load_heads(tmp_path, base(family, dtype=dtype), TOKENIZER)
    assert found.config == heads.config
    assert found.state_dict().keys() == heads.state_dict().keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, heads.state_dict()[name]), name


def test_the_description_names_what_the_heads_are(saved):
    found = json.loads((saved / "heads.json").read_text())
    assert {key: found[key] for key in ("format", "kind", "horizons", "fork_point", "training")} == {
        "format": 1,
        "kind": "decoder",
        "horizons": [2, 3],
        "fork_point": "input of the last layer",
        "training": {"stage": 1},
    }
    assert found["weights_sha256"] == file_sha256(saved / "heads.safetensors")
    assert sorted(path.name for path in saved.iterdir()) == ["heads.json", "heads.safetensors"]


@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_heads_pass_between_dtypes_of_the_same_base(first, second, tmp_path):
    first, second = getattr(torch, first), getattr(torch, second)
    heads = trained(base(dtype=first))
    save_heads(tmp_path, heads, base(dtype=first), TOKENIZER)
    found = load_heads(tmp_path, base(dtype=second), TOKENIZER)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, heads.state_dict()[name].to(second)), name


@pytest.mark.parametrize("representable", [False, True])
def test_a_way_through_bfloat16_and_back_costs_one_rounding_and_exact_values_nothing(representable, tmp_path):
    wide, narrow = base(dtype=torch.float32), base(dtype=torch.bfloat16)
    heads = trained(wide)
    if representable:
        heads.to(torch.bfloat16).to(torch.float32)
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    save_heads(tmp_path / "wide", heads, wide, TOKENIZER)
    save_heads(tmp_path / "narrow", load_heads(tmp_path / "wide", narrow, TOKENIZER), narrow, TOKENIZER)
    after = load_heads(tmp_path / "narrow", wide, TOKENIZER).state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], tensor.bfloat16().float()) for name, tensor in before.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) is representable


def test_the_dtype_of_a_nested_text_config_does_not_matter():
    one, other = base(), base()
    for backbone, dtype in ((one, "float32"), (other, "bfloat16")):  # as in Gemma 3 and other vision-language models
        backbone.model.config.text_config = {"hidden_size": 16, "dtype": dtype}
    assert base_fingerprint(one) == base_fingerprint(other)


def altered_layer(backbone):
    with torch.no_grad():
        backbone.layer.mlp.down_proj.weight[0, 0] += 1.0


def altered_unembedding(backbone):
    with torch.no_grad():
        backbone.unembedding().weight[0, 0] += 1.0


def altered_config(backbone):
    backbone.model.config.rope_parameters["rope_theta"] = 777.0


@pytest.mark.parametrize(("alter", "named"), [(altered_layer, "last_layer"), (altered_unembedding, "unembedding")])
def test_heads_of_a_base_are_carried_to_its_fine_tuned_child_only_when_asked(alter, named, saved):
    backbone = base()
    alter(backbone)
    with pytest.raises(
        CaftuneError, match=rf"were trained for llama, and .* differs in its {named}\. Use heads of this"
    ):
        load_heads(saved, backbone, TOKENIZER)
    found = load_heads(saved, backbone, TOKENIZER, force=True)
    name = "heads.0.mlp.up_proj.weight"
    assert torch.equal(found.state_dict()[name], load_file(saved / "heads.safetensors")[name])


def test_the_same_weights_under_another_name_are_the_same_base(saved):
    backbone = base()
    backbone.model.config._name_or_path = "owner/renamed"
    load_heads(saved, backbone, TOKENIZER)


def test_the_name_of_the_base_is_recorded_all_the_same(tmp_path):
    backbone = base()
    backbone.model.config._name_or_path = "owner/base"
    save_heads(tmp_path, trained(backbone), backbone, TOKENIZER)
    found = json.loads((tmp_path / "heads.json").read_text())["base"]
    assert (found["name"], found["revision"]) == ("owner/base", None)  # its commit: tests/pipeline/test_hub_base.py


@pytest.mark.parametrize("force", [False, True])
def test_heads_of_another_architecture_are_refused_also_when_forced(force, saved):
    backbone = base()
    altered_config(backbone)
    named = r"its rope_parameters\.rope_theta \(10000\.0 -> 777\.0\)\. Train heads for this model"
    with pytest.raises(CaftuneError, match=named):
        load_heads(saved, backbone, TOKENIZER, force=force)
    with pytest.raises(CaftuneError, match=r"differs in its model_type \(llama -> mistral\)"):
        load_heads(saved, Backbone.of(build("mistral", dtype=torch.float32)), TOKENIZER, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_heads_of_another_tokenizer_are_refused_also_when_forced(force, saved):
    with pytest.raises(CaftuneError, match=r"differs in its tokenizer\. Train heads for this model"):
        load_heads(saved, base(), Tokenizer("a", "c", "b"), force=force)
    load_heads(saved, base())  # no tokenizer to compare


def test_a_configuration_written_by_another_version_of_transformers_is_still_the_same(saved):
    backbone = base()
    backbone.model.config.key_of_a_later_version = True
    load_heads(saved, backbone, TOKENIZER)


def test_a_vocabulary_padded_for_speed_is_the_same_architecture(saved):
    backbone = base()
    backbone.model.resize_token_embeddings(64)
    with pytest.raises(CaftuneError, match=r"differs in its unembedding\. Use heads of this model, or force"):
        load_heads(saved, backbone, TOKENIZER)
    load_heads(saved, backbone, TOKENIZER, force=True)


def test_what_training_may_set_in_a_config_does_not_matter(saved):
    backbone = base()
    backbone.model.config.use_cache = False
    backbone.model.config.pad_token_id = 5
    load_heads(saved, backbone, TOKENIZER)


def test_heads_of_another_shape_are_refused_also_when_forced(saved):
    with pytest.raises(CaftuneError, match=r"differs in its intermediate_size \(24 -> 32\)"):
        load_heads(saved, base(intermediate_size=32), TOKENIZER, force=True)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CaftuneError, match=r"nowhere must be a folder with heads\.json and heads\.safetensors"):
        load_heads(tmp_path / "nowhere", base())


@pytest.mark.parametrize("name", ["heads.pth", "heads.pt", "model.bin", "heads.pkl"])
def test_a_pickle_is_refused_and_not_opened(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_args, **_kwargs: pytest.fail("opened the pickle"))
    (tmp_path / name).write_bytes(b"not even a pickle")
    with pytest.raises(CaftuneError, match=f"got {name}, a pickle, which can run code when opened"):
        load_heads(tmp_path, base())


def test_missing_weights_are_refused(saved):
    (saved / "heads.safetensors").unlink()
    with pytest.raises(CaftuneError, match=r"has heads\.json but no heads\.safetensors"):
        load_heads(saved, base(), TOKENIZER)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_weights_are_refused(damage, saved):
    path = saved / "heads.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[-40:]
    else:
        data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(CaftuneError, match=r"is damaged: its SHA-256 differs from heads\.json"):
        load_heads(saved, base(), TOKENIZER)


def test_a_file_that_is_not_safetensors_is_refused(saved):
    (saved / "heads.safetensors").write_bytes(b"these are not the heads")
    edit(saved, weights_sha256=file_sha256(saved / "heads.safetensors"))
    with pytest.raises(CaftuneError, match="is not a safetensors file"):
        load_heads(saved, base(), TOKENIZER)


@pytest.mark.parametrize("change", ["renamed", "missing", "extra", "shape"])
def test_weights_with_wrong_keys_or_shapes_are_refused(change, saved):
    weights = load_file(saved / "heads.safetensors")
    name = "heads.1.mlp.up_proj.weight"
    tensor = weights[name]
    if change in ("renamed", "missing"):
        del weights[name]
    if change in ("renamed", "extra"):
        weights["heads.1.mlp.up.weight"] = tensor.clone()
    if change == "shape":
        weights[name] = tensor[:-1].clone()
    save_file(weights, saved / "heads.safetensors")
    edit(saved, weights_sha256=file_sha256(saved / "heads.safetensors"))
    with pytest.raises(CaftuneError, match=r"do not fit LlamaForCausalLM: heads\.1\.mlp\.up.* differ in name or shape"):
        load_heads(saved, base(), TOKENIZER)


def test_another_format_is_refused(saved):
    edit(saved, format=2)
    with pytest.raises(CaftuneError, match=r"must hold heads of format 1, got format 2"):
        load_heads(saved, base(), TOKENIZER)


DAMAGED = {
    "cut off": b'{"format": 1, "kind"',
    "empty": b"",
    "not text": b"\xff\xfe\x00\x81",
    "a list": b"[1]",
    "no horizons": b'{"format": 1, "kind": "decoder", "base": {}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_description_is_refused(damage, saved):
    (saved / "heads.json").write_bytes(DAMAGED[damage])
    with pytest.raises(CaftuneError, match=r"heads\.json is damaged"):
        load_heads(saved, base(), TOKENIZER)


def test_horizons_this_version_cannot_have_are_refused(saved):
    edit(saved, horizons=[3, 5])
    with pytest.raises(CaftuneError, match="horizons"):
        load_heads(saved, base(), TOKENIZER)


CRASHES = {
    "while the weights are written": (checkpoint, "save_file"),
    "while they are hashed": (checkpoint, "file_sha256"),
    "before the description": (checkpoint, "write_json"),
    "at the first rename": (checkpoint.Path, "replace"),
}


@pytest.mark.parametrize("moment", CRASHES)
def test_a_crash_leaves_the_old_folder_usable(moment, saved, monkeypatch):
    old = load_file(saved / "heads.safetensors")

    def crash(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*CRASHES[moment], crash)
        with pytest.raises(KeyboardInterrupt):
            save_heads(saved, trained(base()), base(), TOKENIZER)
    found = load_heads(saved, base(), TOKENIZER).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in old.items())


def test_saving_again_replaces_the_old_heads(saved):
    heads = trained(base(), "mlp", 3)
    save_heads(saved, heads, base(), TOKENIZER)
    found = load_heads(saved, base(), TOKENIZER)
    assert found.config == HeadsConfig(3, "mlp")
    assert torch.equal(found.state_dict()["heads.2.up.weight"], heads.state_dict()["heads.2.up.weight"])


def test_loading_runs_with_the_base_it_was_loaded_for(saved):
    backbone = base()
    heads = load_heads(saved, backbone, TOKENIZER)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    with torch.no_grad(), backbone.capture() as call:
        backbone.model(input_ids=ids)
    assert heads.hidden(1, backbone, call).shape == (1, 6, backbone.width)


def test_added_tokens_make_a_relative_of_the_tokenizer(saved):
    longer = Tokenizer("a", "b", "c", "d")
    with pytest.raises(
        CaftuneError, match=r"differs in its tokenizer \(tokens were added\)\. Use heads of this model, or force"
    ):
        load_heads(saved, base(), longer)
    load_heads(saved, base(), longer, force=True)


@pytest.fixture
def model(tmp_path):
    """The embedded base, to be changed."""
    shutil.copytree(BASE, tmp_path / "model")
    return tmp_path / "model"


def test_the_fingerprint_of_a_model_changes_with_every_weight(model):
    file, before = model / "model.safetensors", model_fingerprint(str(model))
    weights, found = load_file(BASE / "model.safetensors"), set()
    for name, tensor in weights.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        save_file(weights | {name: changed}, file, metadata={"format": "pt"})
        found.add(model_fingerprint(str(model)))
    assert len(found - {before}) == len(weights)
    save_file(weights, file, metadata={"format": "pt"})
    assert model_fingerprint(str(model)) == before


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "second_part.safetensors"])
def test_the_fingerprint_of_a_model_changes_with_what_its_answers_depend_on(model, name):
    before = model_fingerprint(str(model))
    (model / name).write_text("{}")
    assert model_fingerprint(str(model)) != before


def test_the_fingerprint_of_a_model_without_safetensors_changes_with_its_pickles(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    before = model_fingerprint(str(model))
    (model / "pytorch_model.bin").write_bytes(b"other")
    assert model_fingerprint(str(model)) != before


def test_the_fingerprint_of_a_model_does_not_depend_on_its_folders_name(model):
    assert model_fingerprint(str(model)) == model_fingerprint(str(BASE))
