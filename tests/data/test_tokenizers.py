"""Tokenizers that are no plain ones: with code of their own, or inside a processor."""

import json
import shutil

import pytest
from opened import load_tokenizer, stage_two_config
from trainers import config
from transformers import AutoTokenizer, ProcessorMixin

from caftune import CAFTTrainer, load_heads
from caftune.core.backbone import Backbone
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.schema import Recipe

OWN = "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"


class TextProcessor(ProcessorMixin):
    """A processor, as models of several media have them, around a tokenizer alone."""

    def __init__(self, tokenizer=None, **options):
        super().__init__(tokenizer, **options)

    def __call__(self, text=None, **options):
        return self.tokenizer([text] if isinstance(text, str) else text, **options)


@pytest.fixture
def own(tmp_path):
    """The embedded base with a tokenizer that brings code."""
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    (folder / "own.py").write_text(OWN)
    file = folder / "tokenizer_config.json"
    described = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    file.write_text(json.dumps(json.loads(file.read_text()) | described))
    return folder


def test_the_trainer_runs_a_tokenizers_code_where_it_is_trusted(own, rows, tmp_path):
    args = config(tmp_path / "out", pretrain_heads=True, trust_remote_code=True)
    trainer = CAFTTrainer(str(own), args, train_dataset=rows)
    assert type(trainer.processing_class).__name__ == "OwnTokenizer"


def test_a_recipe_says_once_whether_code_is_trusted(own, tmp_path):
    values = {"output": str(tmp_path / "run"), "loss": {"weight": 0.0}}
    trusting = Recipe.model_validate({**values, "model": {"name": str(own), "trust_remote_code": True}})
    assert type(load_tokenizer(trusting)).__name__ == "OwnTokenizer"
    assert stage_two_config(trusting, tmp_path).trust_remote_code
    doubting = Recipe.model_validate({**values, "model": {"name": str(own)}})
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(doubting)
    assert not stage_two_config(doubting, tmp_path).trust_remote_code
    twice = Recipe.model_validate({**values, "model": {"name": str(own)}, "trainer": {"trust_remote_code": True}})
    with pytest.raises(CaftuneError, match=r"trainer.trust_remote_code is set by model.trust_remote_code"):
        stage_two_config(twice, tmp_path)


def test_heads_know_the_tokenizer_inside_a_processor(rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    args = config(tmp_path / "out", pretrain_heads=True, max_steps=1)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, processing_class=TextProcessor(tokenizer))
    trainer.train()
    trainer.export(tmp_path / "heads")
    load_heads(tmp_path / "heads", Backbone.of(trainer.model), tokenizer)
