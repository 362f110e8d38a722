"""Heads of the reference implementation: after the import they compute what their own program computes."""

import json
import os
import pickle

import pytest
import torch
from datasets import Dataset
from hub import serve_hub
from peft import LoraConfig
from trainers import config
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from typer.testing import CliRunner

from caftune import AuxiliaryHeads, Backbone, CAFTTrainer, HeadsConfig, load_heads, save_heads
from caftune.checkpoints.reference_heads import import_heads
from caftune.cli import app
from caftune.compare.control_heads import write_control_heads
from caftune.core import speculative
from caftune.core.attach import attach_heads
from caftune.core.speculative import SpeculativeDecoding
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.files import file_sha256
from caftune.pipeline.head_quality import measure_heads
from caftune.pipeline.heads_choice import HeadsRef

HEADS = 4
DOCUMENTS = [[5, 9, 11, 30, 7, 8, 40], [12, 4, 55, 6, 80, 81, 3, 99], [21, 22, 23, 24, 25, 100]]
NAMES = ("input_ids", "labels", "attention_mask", "position_ids")


@pytest.fixture(scope="module")
def state():
    """What the reference saves: copies of the second to last layer, trained (here: moved) apart."""
    layer = AutoModelForCausalLM.from_pretrained(BASE).model.layers[-2].state_dict()
    torch.manual_seed(1)
    return {
        f"{head}.layers.0.{name}": tensor + 0.01 * torch.randn_like(tensor)
        for head in range(HEADS)
        for name, tensor in layer.items()
    }


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "heads.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    return import_heads(str(file), str(BASE), tmp_path_factory.mktemp("imported") / "heads")


@pytest.fixture
def backbone(monkeypatch):
    """The base in float64, also in its norms, which transformers computes in float32."""

    def norm(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    return Backbone.of(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64))


def output_by_hand(model, state, index, ids):
    """Head `index` on one document, in plain transformers: the last layer's input, the head's layer, and no norm."""
    layer = LlamaDecoderLayer(model.config, 0).to(model.dtype).eval()
    layer.load_state_dict({k.split(".", 3)[3]: v for k, v in state.items() if k.startswith(f"{index}.layers.0.")})
    ids = torch.tensor([ids])
    with torch.no_grad():
        hidden = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
        mask = torch.full((ids.shape[1],) * 2, torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)[None, None]
        phases = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        found = layer(hidden, attention_mask=mask, position_embeddings=phases)
    return found[0] if isinstance(found, tuple) else found


def loss_by_hand(model, state, index):
    """The mean loss of head `index` over all documents."""
    total = []
    for ids in DOCUMENTS:
        ahead = index + 2
        with torch.no_grad():
            logits = model.lm_head(output_by_hand(model, state, index, ids))[0, :-ahead]
        total.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[ahead:]), reduction="none"))
    return float(torch.cat(total).mean())


def rows_of(layout):
    """The documents as one batch."""
    longest = max(map(len, DOCUMENTS))
    if layout == "packed":
        flat = torch.tensor([[token for ids in DOCUMENTS for token in ids]])
        positions = torch.tensor([[t for ids in DOCUMENTS for t in range(len(ids))]])
        return {"input_ids": flat, "labels": flat, "position_ids": positions}
    rows = []
    for ids in DOCUMENTS:
        space = longest - len(ids)
        values = (ids, ids, [1] * len(ids), list(range(len(ids))))
        pads = ([value] * space for value in (0, -100, 0, 0))
        rows.append([pad + value if layout == "left" else value + pad for value, pad in zip(values, pads, strict=True)])
    return {name: torch.tensor(column) for name, column in zip(NAMES, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("layout", ["packed", "left", "right"])
def test_losses_are_the_references_in_every_layout_of_rows(layout, folder, state, backbone):
    attach_heads(backbone, load_heads(folder, backbone))
    with torch.no_grad():
        scores = backbone.model(**rows_of(layout), auxiliary="only")["auxiliary"]
    found = (scores["nll"] / scores["count"]).tolist()
    assert found == pytest.approx([loss_by_hand(backbone.model, state, index) for index in range(HEADS)], abs=1e-9)


def test_some_targets_alone_have_the_references_losses(folder, state, backbone):
    attach_heads(backbone, load_heads(folder, backbone))
    ids = torch.tensor([DOCUMENTS[0]])
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        scores = backbone.model(input_ids=ids, labels=labels, auxiliary="only")["auxiliary"]
        logits = backbone.model.lm_head(output_by_hand(backbone.model, state, 1, DOCUMENTS[0]))[0, 1:-3]
    assert float(scores["nll"][1]) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, ids[0, 4:], reduction="sum"))
    )


def test_the_same_weights_with_the_norm_are_other_heads(folder, backbone, tmp_path):
    described = json.loads((folder / "heads.json").read_text())
    del described["final_norm"]  # as in folders of older versions
    (tmp_path / "heads.json").write_text(json.dumps(described))
    (tmp_path / "heads.safetensors").symlink_to(folder / "heads.safetensors")
    losses = []
    for path in (folder, tmp_path):
        heads = load_heads(path, backbone)
        assert heads.config == HeadsRef.find(path).config
        with torch.no_grad(), backbone.capture() as call:
            backbone.model(input_ids=torch.tensor(DOCUMENTS[:1]))
            losses.append((heads.config.final_norm, heads.hidden(0, backbone, call)))
    assert [final for final, _ in losses] == [False, True]
    torch.testing.assert_close(backbone.close(losses[0][1]), losses[1][1])


def test_a_norm_that_is_neither_true_nor_false_is_refused(folder, backbone, tmp_path):
    described = json.loads((folder / "heads.json").read_text())
    (tmp_path / "heads.json").write_text(json.dumps(described | {"final_norm": None}))
    with pytest.raises(CaftuneError, match="heads.json is damaged .final_norm must be true or false, got None"):
        load_heads(tmp_path, backbone)


def test_quality_is_measured_without_the_norm_next_to_copies_with_it(folder, state, backbone):
    rows = Dataset.from_dict({"input_ids": DOCUMENTS, "labels": [[-100, *ids[1:]] for ids in DOCUMENTS]})
    report = measure_heads(backbone, load_heads(folder, backbone), rows, positions=2)
    own = measure_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(HEADS)), rows, positions=2)
    for index in range(HEADS):
        assert report["heads"]["loss"][str(index + 2)] == pytest.approx(loss_by_hand(backbone.model, state, index))
    assert report["untrained"] == own["untrained"]


def test_drafts_are_made_without_the_norm(folder, state, backbone, monkeypatch):
    seen, hidden_of = [], speculative._Drafts._hidden

    def watched(self, index):
        seen.append((index, hidden_of(self, index)))
        return seen[-1][1]

    monkeypatch.setattr(speculative._Drafts, "_hidden", watched)
    decoding = SpeculativeDecoding(backbone, load_heads(folder, backbone), length=HEADS)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor(DOCUMENTS[:1])
    written = decoding.generate(ids, **options)
    assert torch.equal(written, backbone.model.generate(ids, **options))
    # the first draft is made when the model has read the prompt
    for index, hidden in seen[:HEADS]:
        expected = output_by_hand(backbone.model, state, index, DOCUMENTS[0])[:, -1]
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"pretrain_heads": True, "max_steps": 1}, "heads.json"),
        ({"train_heads": True, "max_steps": 1}, "heads/heads.json"),
        ({"train_heads": True, "heads_lora_rank": 2, "max_steps": 1}, "heads/heads.json"),
    ],
)
def test_training_them_further_keeps_what_they_are(options, saved, folder, rows, tmp_path):
    args = config(tmp_path, heads=str(folder), save_strategy="steps", save_steps=1, **options)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows)
    trainer.train()
    kept = HeadsRef.find((tmp_path / "checkpoint-1" / saved).parent)
    assert kept.config == HeadsConfig(HEADS, final_norm=False)
    assert kept.sha256 != HeadsRef.find(folder).sha256


def test_gradients_of_lora_reach_the_model_through_frozen_heads(folder, rows, tmp_path):
    args = config(tmp_path, heads=str(folder), max_steps=2)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    trainer.train()
    assert all("h5_loss" in line for line in trainer.state.log_history if "loss" in line)
    assert sum(float(p.detach().abs().sum()) for name, p in trainer.model.named_parameters() if "lora_B" in name) > 0


def test_control_heads_stay_without_the_norm(folder, tmp_path):
    write_control_heads("shuffled_horizons", folder, tmp_path, seed=0)
    assert HeadsRef.find(tmp_path).config == HeadsConfig(HEADS, final_norm=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_folder_holds_the_files_tensors_and_where_they_come_from(dtype, state, tmp_path):
    (tmp_path / "from").mkdir()
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "from" / "heads.pth")
    folder = import_heads(str(tmp_path / "from"), str(BASE), tmp_path / "heads")
    described = HeadsRef.find(folder).description
    assert described["training"] == {
        "imported_from": {"file": "from", "commit": None, "sha256": file_sha256(tmp_path / "from" / "heads.pth")}
    }
    assert (described["final_norm"], described["fork_point"]) == (False, "input of the last layer")
    assert described["base"]["name"] == BASE.name
    loaded = load_heads(folder, Backbone.of(AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype))).state_dict()
    assert loaded.keys() == {f"heads.{name.replace('.layers.0', '')}" for name in state}
    for name, tensor in state.items():
        assert torch.equal(loaded[f"heads.{name.replace('.layers.0', '')}"], tensor.to(dtype))


def test_a_file_without_zip_and_tensors_that_share_memory_are_read_too(state, tmp_path):
    layer = {name: tensor for name, tensor in state.items() if name.startswith("0.")}
    twice = {**layer, **{name.replace("0.", "1.", 1): tensor for name, tensor in layer.items()}}
    torch.save(twice, tmp_path / "heads.pth", _use_new_zipfile_serialization=False)
    assert HeadsRef.find(import_heads(str(tmp_path / "heads.pth"), str(BASE), tmp_path / "heads")).config.count == 2


def test_heads_of_the_hub_come_with_their_commit_and_no_other_file(file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve_hub(tmp_path / "hub") as hub:
        hub.private["owner/Aux-Heads"] = False
        commit = hub.record("owner/Aux-Heads", "first", {"heads.pth": file.read_bytes(), "other.bin": b"x"})
        done = CliRunner().invoke(app, ["heads", "import", "owner/Aux-Heads", str(BASE), str(tmp_path / "heads")])
        assert done.exit_code == 0, done.output
        asked = {request.split("/resolve/")[1].split("/", 1)[1] for request in hub.requests if "/resolve/" in request}
        assert asked == {"heads.pth"}
        with pytest.raises(
            CaftuneError, match=r"owner/Aux-Heads@none must be .* got neither \(the repository has no such"
        ):
            import_heads("owner/Aux-Heads@none", str(BASE), tmp_path / "other")
        hub.private["owner/empty"] = False
        hub.record("owner/empty", "first", {"heads.json": b"{}"})
        with pytest.raises(CaftuneError, match=r"owner/empty must be .* with heads\.pth, got neither"):
            import_heads("owner/empty", str(BASE), tmp_path / "other")
    made = HeadsRef.find(tmp_path / "heads").description["training"]["imported_from"]
    assert made == {"file": "owner/Aux-Heads", "commit": commit, "sha256": file_sha256(file)}
    shown = CliRunner().invoke(app, ["heads", "info", str(tmp_path / "heads")]).output
    assert "without the final norm" in " ".join(shown.split())
    assert commit in "".join(shown.split())


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["torch.save", "in a dict", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_nothing_of_it_runs(kind, state, tmp_path):
    evil, path = Evil(tmp_path / "ran"), tmp_path / "heads.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        value = {**state, "0.layers.0.evil": evil} if kind == "in a dict" else evil
        torch.save(value, path, _use_new_zipfile_serialization=kind != "legacy")
    got = "another or a damaged file" if kind == "pickle" else "a pickle that calls posix.mkdir"
    with pytest.raises(CaftuneError, match=f"got {got}. No code of it was run") as error:
        import_heads(str(path), str(BASE), tmp_path / "heads")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04", None])
def test_a_damaged_file_is_refused(content, file, tmp_path):
    path = tmp_path / "heads.pth"
    path.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(CaftuneError, match=r"heads.pth must hold a dict of tensors .* got another or a damaged file"):
        import_heads(str(path), str(BASE), tmp_path / "heads")


def without(key):
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


def with_tensor(key, tensor):
    return lambda state: {**state, key: tensor}


Q = "2.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "must hold heads numbered from 0 without a gap, got none"),
        (lambda state: list(state.values()), "must hold a dict of tensors, got list"),
        (with_tensor("note", "trained on x"), "note must be a tensor of floating-point numbers, got str"),
        (with_tensor("ids", torch.tensor([1])), "ids must be a tensor of floating-point numbers, got torch.int64"),
        (with_tensor("0.lm_head.weight", torch.ones(1)), r"got '0\.lm_head\.weight'\. Heads with an own unembedding"),
        (with_tensor("model.norm.weight", torch.ones(1)), "must hold keys like .* got 'model.norm.weight'"),
        (with_tensor("1.layers.1.x", torch.ones(1)), r"must hold one layer for each head, got another one in 1\.layers\.1"),
        (
            lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("1.")},
            r"must hold heads numbered from 0 without a gap, got \[0, 2, 3\]",
        ),
        (
            with_tensor(Q, torch.ones(4096, 4096)),
            rf"{Q} has the shape \(4096, 4096\), in the base \(128, 128\)\. Name the base that the heads were trained for",
        ),
        (without(Q), rf"{Q} has the shape none, in the base \(128, 128\)"),
        (
            with_tensor("0.layers.0.self_attn.q_proj.bias", torch.ones(128)),
            r"0\.layers\.0\.self_attn\.q_proj\.bias has the shape \(128,\), in the base none",
        ),
        (
            lambda _state: {"0.layers.0.linear.weight": torch.ones(128, 128)},
            r"0\.layers\.0\.linear\.weight has the shape \(128, 128\), in the base none",
        ),
        (with_tensor(Q, torch.full((128, 128), torch.nan)), f"must hold finite numbers, got NaN or inf in {Q}"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_such_heads_are_refused(change, message, state, tmp_path):
    torch.save(change(state), tmp_path / "heads.pth")
    with pytest.raises(CaftuneError, match=message):
        import_heads(str(tmp_path / "heads.pth"), str(BASE), tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


def test_wrong_names_are_refused_in_one_sentence(file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for source, base, folder, message in [
        (
            tmp_path / "none.pth",
            BASE,
            "heads",
            "none.pth must be a file, a folder with heads.pth or a hub id, got neither",
        ),
        (tmp_path / "full", BASE, "heads", "full must be a file, .* got a folder without heads.pth"),
        (file, tmp_path / "nobase", "heads", "BASE must be a folder with a config.json or a hub id, got .*nobase"),
        (file, BASE, "full", "full must be an empty or a new folder"),
    ]:
        with pytest.raises(CaftuneError, match=message):
            import_heads(str(source), str(base), tmp_path / folder)


def test_a_heads_pth_in_the_place_of_heads_names_the_import(file, backbone):
    with pytest.raises(CaftuneError, match="got heads.pth, a pickle, .* with `caftune heads import`"):
        load_heads(file.parent, backbone)


def test_mlp_heads_need_the_norm():
    with pytest.raises(CaftuneError, match="final_norm must be true for MLP heads"):
        HeadsConfig(4, "mlp", final_norm=False)


def test_heads_of_ones_own_keep_the_norm(backbone, tmp_path):
    save_heads(tmp_path, AuxiliaryHeads.build(backbone, HeadsConfig(2)), backbone)
    assert json.loads((tmp_path / "heads.json").read_text())["final_norm"] is True
