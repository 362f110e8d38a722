"""What is asked of every family: the same answers are asserted by test_families.py and printed in docs/models.md.

`examine(family)` builds the family's tiny model and returns one entry per property: "yes", or why not. A property that can
only hold for one kind of head ends in that kind's name.
"""

import copy
import functools
import json
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from models import FAMILIES, VOCABULARY, build
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers.utils import logging

from caftune.checkpoints.export import export_model
from caftune.checkpoints.heads_folder import load_heads, save_heads
from caftune.core import speculative
from caftune.core.attach import attach_heads, detach_heads
from caftune.core.backbone import Backbone, UnsupportedModelError
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.speculative import SpeculativeDecoding

logging.disable_progress_bar()
KINDS = ("decoder", "mlp")
HEADS = 2
# Where PEFT cannot wrap every linear layer (routers, Mamba's output projection), these.
PROJECTIONS = ["q_proj", "v_proj", "q_a_proj", "in_proj", "x_proj"]
TOLERANCE = 2e-5  # of the largest value compared; everything is computed in float32
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, -2:] = 0  # padding on the right
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[0, :2] = -100  # a prompt


def examine(family):
    """Property -> "yes" or the reason why not, and "packing eager", "packing sdpa" -> "yes", "leaks" or "refused"."""
    found = {"model type": FAMILIES[family][0]}
    try:
        backbone = backbone_of(family)
    except UnsupportedModelError as error:
        return {**found, "refused": str(error)}
    found |= {"packing eager": packing(family, "eager"), "packing sdpa": packing(family, "sdpa")}
    found["replay"] = answer(replays, family)
    for kind in KINDS:
        if kind == "decoder" and backbone.copy_refusal is not None:
            found["decoder refused"] = refusal(backbone)
            continue
        for check in (is_causal, has_the_horizons_losses, has_gradients, learns, survives_saving):
            found[f"{check.__name__} {kind}"] = answer(check, family, kind)
    found |= {"exports": answer(exports, family), "lora": lora(family), "drafts": drafts(family)}
    return found


def answer(check, *arguments):
    try:
        check(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "yes"


def lora(family):
    """What LoRA can adapt: "all linear" layers, else the "projections" of attention and state spaces, else why neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on mixtures of experts would be an error in the tests only
        reason = answer(trains_with_lora, family, "all-linear")
        if reason == "yes":
            return "all linear"
        return "projections" if answer(trains_with_lora, family, PROJECTIONS) == "yes" else reason


def refusal(backbone):
    try:
        AuxiliaryHeads.build(backbone, HeadsConfig(1, "decoder"))
    except UnsupportedModelError as error:
        return str(error)
    return "heads were built"


@functools.lru_cache(maxsize=2)
def base(family, attention="eager"):
    """The family's model; copy it before changing it."""
    return build(family, dtype=torch.float32, attention=attention)


@functools.lru_cache(maxsize=1)
def backbone_of(family):
    return Backbone.of(base(family))


def with_heads(family, kind, model=None):
    """A model with perturbed heads attached, and its backbone."""
    backbone = replace(backbone_of(family), model=model or copy.deepcopy(base(family)))
    model = backbone.model
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(HEADS, kind))
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in heads.parameters():
            spread = 0.3 * float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_((spread or 0.05) * torch.randn(parameter.shape, generator=noise))
    attach_heads(backbone, heads)
    return model, backbone


def same(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def replays(family):
    """The last layer called again, what follows it, and the unembedding give the model's own logits."""
    for attention in ("eager", "sdpa"):
        if attention == "sdpa" and not base(family)._supports_sdpa:
            continue
        model = copy.deepcopy(base(family, attention))
        backbone = replace(backbone_of(family), model=model)
        cache = answer(lambda model: model(input_ids=IDS, use_cache=True), model) == "yes"  # else its own code fails
        for training, use_cache, mask in ((False, False, None), (True, cache, None), (False, cache, MASK)):
            model.train(training)
            with torch.no_grad(), backbone.capture() as call:
                logits = model(input_ids=IDS, use_cache=use_cache, attention_mask=mask).logits
                again = call.hidden if backbone.copy_refusal else call.replay(backbone.layer)
                rebuilt = backbone.unembedding().logits(backbone.close(again))
            real = slice(None) if mask is None else mask.bool()
            same(rebuilt[real], logits[real])


def is_causal(family, kind):
    """No head's output moves with a later token, and every later output does."""
    model, backbone = with_heads(family, kind)
    changed = IDS.clone()
    changed[:, 5:] = IDS[:, 5:].flip(0) + (IDS[:, 5:] == IDS[:, 5:].flip(0)).long()
    outputs = []
    for ids in (IDS, changed):
        with torch.no_grad(), backbone.capture() as call:
            model(input_ids=ids, use_cache=False)
            outputs.append([model.auxiliary_heads.hidden(index, backbone, call) for index in range(HEADS)])
    for before, after in zip(*outputs, strict=True):
        same(after[:, :5], before[:, :5])
        assert ((after - before)[:, 5:].abs().amax(-1) > 0).all(), "outputs do not depend on their own token"


def has_the_horizons_losses(family, kind):
    """The auxiliary losses are those of a plain model in whose last layer's place the head stands."""
    model, backbone = with_heads(family, kind)
    with torch.no_grad():
        outputs = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False, auxiliary="add")
        for index, head in enumerate(model.auxiliary_heads.heads):
            logits = logits_with(head, copy.deepcopy(base(family)), backbone, kind)
            targets = LABELS[:, 2 + index :]
            expected = cross_entropy(logits[:, : -2 - index].flatten(0, 1), targets.flatten(), reduction="sum")
            same(outputs.auxiliary["nll"][index], expected)
            assert outputs.auxiliary["count"][index] == (targets != -100).sum()
        only = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False, auxiliary="only")
        same(only["auxiliary"]["nll"], outputs.auxiliary["nll"])


def logits_with(head, model, backbone, kind):
    """The logits of a plain model whose last layer has the head's weights, or whose last output the MLP changes."""
    layer = model.get_submodule(backbone.layer_name)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    if kind == "decoder":
        own = copy.deepcopy(layer)  # parts that several layers share are the last layer's own from here on
        model.set_submodule(backbone.layer_name, own)
        own.load_state_dict(head.state_dict())
        return model(**inputs).logits
    seen = []
    last = model.get_submodule([backbone.layer_name, *backbone.closing_names][-1])
    with last.register_forward_hook(lambda _module, _args, output: seen.append(output)):
        model(**inputs)
    normed = seen[-1] if isinstance(seen[-1], torch.Tensor) else seen[-1][0]
    gate = normed @ head.up.weight.T
    change = (gate * torch.sigmoid(gate)) @ head.down.weight.T

    def changed(_module, _args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = hidden + (change[:, :, None] if hidden.dim() == 4 else change)
        if isinstance(output, tuple | list):
            return type(output)([hidden, *output[1:]])
        if isinstance(output, torch.Tensor):
            return hidden
        output.last_hidden_state = hidden
        return output

    with layer.register_forward_hook(changed):
        return model(**inputs).logits


def has_gradients(family, kind):
    """Gradients reach trunk and heads, and gradient checkpointing changes neither them nor the losses."""
    results = []
    for checkpointing in (False, True):
        model, _ = with_heads(family, kind)
        model.train()
        if checkpointing and not model.supports_gradient_checkpointing:
            break
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        outputs = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False, auxiliary="add")
        loss = outputs.loss + outputs.auxiliary["nll"].sum() / outputs.auxiliary["count"].sum()
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    loss, found = results[0]
    assert torch.isfinite(loss), "the loss is not finite"
    assert all(torch.isfinite(gradient).all() for gradient in found.values()), "gradients are not finite"
    embedding = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    assert found[embedding].any(), "no gradient reaches the input embeddings"
    for index in range(HEADS):
        moved = [name for name in found if name.startswith(f"auxiliary_heads.heads.{index}.") and found[name].any()]
        assert moved, f"no gradient reaches head {index}"
    for again, checkpointed in results[1:]:
        same(again, loss)
        assert checkpointed.keys() == found.keys()
        largest = max(float(gradient.abs().max()) for gradient in found.values())
        for name, gradient in found.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)


def gradients(model):
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def learns(family, kind):
    """Training the heads alone lowers their losses and leaves the trunk without gradients."""
    model, _ = with_heads(family, kind)
    heads = model.auxiliary_heads
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(heads.requires_grad_(True).parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        scores = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False, auxiliary="only")[
            "auxiliary"
        ]
        losses.append(scores["nll"].detach())
        scores["nll"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (losses[-1] < losses[0]).all(), f"the losses went from {losses[0].tolist()} to {losses[-1].tolist()}"
    assert all(name.startswith("auxiliary_heads.") for name in gradients(model))


def survives_saving(family, kind):
    """Heads come back bit for bit."""
    model, backbone = with_heads(family, kind)
    with tempfile.TemporaryDirectory() as folder:
        save_heads(folder, model.auxiliary_heads, backbone)
        loaded = load_heads(folder, backbone_of(family))
    saved = model.auxiliary_heads.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())


def exports(family):
    """The exported checkpoint has the keys, shapes and dtypes of the base's own, and loads to the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        published, result = Path(folder, "base"), Path(folder, "result")
        copy.deepcopy(base(family)).to(torch.bfloat16).save_pretrained(published)
        model, _ = with_heads(family, "mlp", load(published, family))
        export_model(model, result)
        assert contents(result) == contents(published)
        kind = type(base(family))
        model_again, report = kind.from_pretrained(result, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values()), f"loading reports {report}"
        model_again.set_attn_implementation("eager")
        logits_equal(model_again, model)


def trains_with_lora(family, targets):
    """Adapters train beside the heads, and the export with them merged computes what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        published, result = Path(folder, "base"), Path(folder, "result")
        copy.deepcopy(base(family)).save_pretrained(published)
        model = load(published, family)
        backbone = replace(backbone_of(family), model=model)
        heads = AuxiliaryHeads.build(backbone, HeadsConfig(HEADS, "mlp" if backbone.copy_refusal else "decoder"))
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        attach_heads(backbone, heads.requires_grad_(False))
        optimizer = torch.optim.Adam([value for value in adapted.parameters() if value.requires_grad], lr=0.05)
        for _ in range(2):
            outputs = adapted(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False, auxiliary="add")
            outputs.auxiliary["nll"].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any(value.any() for name, value in adapted.named_parameters() if "lora_B" in name), "no adapter moved"
        export_model(adapted, result, base_name=str(published))
        assert contents(result) == contents(published)
        logits_equal(load(result, family), adapted, tolerance=1e-3)


def drafts(family):
    """ "yes" where decoding with heads writes what `generate` writes; "no" where it is refused."""
    kind = "mlp" if backbone_of(family).copy_refusal else "decoder"
    model, backbone = with_heads(family, kind)
    heads = detach_heads(model)
    if kind == "decoder":  # as the model itself: these drafts are sometimes right
        heads.heads[0].load_state_dict(model.get_submodule(backbone.layer_name).state_dict())
    try:
        decoding = SpeculativeDecoding(backbone, heads, length=HEADS)
    except UnsupportedModelError:
        return "no"
    return answer(writes_the_same, decoding, model)


def writes_the_same(decoding, model):
    """Greedy texts are those of the model alone, and heads say behind a cache what they say without one."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with heads_said() as said:
        for ids in (IDS[:1], IDS[1:, :5]):
            said.clear()
            output = decoding.generate(ids, **options)
            alone = model.generate(ids, **options)
            assert torch.equal(output, alone), f"{output.tolist()} instead of {alone.tolist()}"
            with torch.no_grad(), decoding.backbone.capture() as call:
                model(input_ids=output, use_cache=False)
                whole = [decoding.heads.hidden(index, decoding.backbone, call) for index in range(HEADS)]
            for index, length, hidden in said:  # the last token of the text is the model's latest, which none has read
                same(hidden[0], whole[index][0, length - 2], 1e-4)
    assert decoding.total.passes <= decoding.total.tokens == 24


@contextmanager
def heads_said():
    """Within the block, collect (head, tokens of the text, hidden states) of every draft."""
    said, length = [], None
    drafted, hidden = speculative._Drafts._drafted, speculative._Drafts._hidden

    def begin(self, ids, count):
        nonlocal length
        length = ids.shape[1]
        return drafted(self, ids, count)

    def keep(self, index):
        said.append((index, length, hidden(self, index)))
        return said[-1][-1]

    speculative._Drafts._drafted, speculative._Drafts._hidden = begin, keep
    try:
        yield said
    finally:
        speculative._Drafts._drafted, speculative._Drafts._hidden = drafted, hidden


def load(folder, family):
    return type(base(family)).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def contents(folder):
    """Key -> dtype and shape of a checkpoint's tensors."""
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in list(file.keys())}
        found |= {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    assert found
    assert json.loads(Path(folder, "config.json").read_text())
    return found


def logits_equal(found, expected, tolerance=TOLERANCE):
    with torch.no_grad():
        same(*(model.eval()(input_ids=IDS, use_cache=False).logits for model in (found, expected)), tolerance)


def packing(family, attention):
    """Two documents in one row, told apart by positions alone: does the second stay when the first changes?"""
    if attention == "sdpa" and not base(family)._supports_sdpa:
        return "-"
    first, second = IDS[:, :4], IDS[1:, 4:]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model, logits = base(family, attention), []
    for document in first:
        ids = torch.cat([document[None], second], dim=1)
        try:
            with torch.no_grad():
                logits.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:])
        except Exception:
            return "refused"
    changed = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    return "leaks" if changed > TOLERANCE else "yes"
