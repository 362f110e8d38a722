"""The vLLM backend against a stand-in with vLLM's interface: what is handed over, and what is made of what comes back."""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from opened import base_of, load_model, load_tokenizer

from caftune.data.prompts import Prompt
from caftune.demo.run import BASE
from caftune.generation.backends import Answer, Sampling, end_tokens, vllm_backend
from caftune.pipeline.base_model import answer_backend, who_answers
from caftune.pipeline.schema import Recipe


@pytest.fixture
def engine(monkeypatch):
    """Stands in for the package: `LLM(**arguments).generate(prompts, params, use_tqdm=False)` as in vLLM 0.30."""
    seen = SimpleNamespace(arguments=None, prompts=[], params=[])

    class SamplingParams(SimpleNamespace):
        pass

    class LLM:
        def __init__(self, model, **arguments):
            seen.arguments = {"model": model, **arguments}

        def generate(self, prompts, sampling_params, *, use_tqdm):
            assert not use_tqdm
            seen.prompts += prompts
            seen.params += sampling_params
            for prompt, params in zip(prompts, sampling_params, strict=True):
                ids = [*reversed(prompt["prompt_token_ids"])][: params.max_tokens]
                yield SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=tuple(ids), finish_reason="stop" if 77 in ids else "length")]
                )

    package = ModuleType("vllm")
    package.LLM, package.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", package)
    return seen


def test_vllm_gets_token_ids_and_our_sampling_alone(engine):
    sampling = Sampling(max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=5)
    backend = vllm_backend("base", "abc", sampling, [1, 2], {"tensor_parallel_size": 2})
    list(backend([Prompt([5, 6]), Prompt([7])], [30, 31]))
    assert engine.arguments == {
        **{"model": "base", "revision": "abc", "generation_config": "vllm", "tensor_parallel_size": 2}
    }
    assert engine.prompts == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7]}]
    first, second = map(vars, engine.params)
    assert (first["seed"], second["seed"]) == (30, 31)
    assert {k: first[k] for k in ("max_tokens", "temperature", "top_p", "top_k", "stop_token_ids")} == {
        **{"max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "stop_token_ids": [1, 2]}
    }


def test_answers_of_vllm_end_where_the_model_ended_them(engine):
    backend = vllm_backend("base", None, Sampling(max_new_tokens=3), [1, 2], {})
    found = dict(backend([Prompt([9, 2, 8]), Prompt([9, 8, 7, 6])], [0, 1]))
    assert found == {0: Answer([8, 2], "stop"), 1: Answer([6, 7, 8], "length")}


def test_an_end_that_only_vllm_knows_is_an_end(engine):
    backend = vllm_backend("base", None, Sampling(max_new_tokens=3), [1, 2], {})
    assert dict(backend([Prompt([77, 9])], [0])) == {0: Answer([9, 77], "stop")}


def test_many_prompts_reach_vllm_in_parts_and_keep_their_numbers(engine):
    prompts = [Prompt([number]) for number in range(2, 2500)]
    found = dict(vllm_backend("base", None, Sampling(max_new_tokens=3), [1], {})(prompts, range(len(prompts))))
    assert [found[index].ids for index in range(len(prompts))] == [prompt.ids for prompt in prompts]


def test_a_missing_vllm_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"needs vLLM. Install it with `pip install 'caftune\[vllm\]'`"):
        vllm_backend("base", None, Sampling(), [1], {})


@pytest.mark.parametrize(("own", "expected"), [(None, [9]), (3, [3]), ([4, 5], [4, 5])])
def test_the_models_own_end_tokens_come_before_the_tokenizers(own, expected):
    assert end_tokens(SimpleNamespace(eos_token_id=own), SimpleNamespace(eos_token_id=9)) == expected


@pytest.fixture
def base(tmp_path):
    """A copy of the demo's base, in the dtype that is asked for, which its configuration may leave out."""

    def made(dtype, *, is_named=True):
        recipe = Recipe.model_validate({"output": "o", "model": {"name": str(BASE)}})
        folder = tmp_path / f"{dtype}-{is_named}"
        load_model(recipe).to(getattr(torch, dtype)).save_pretrained(folder)
        for file in BASE.glob("*token*"):
            shutil.copy(file, folder)
        config = json.loads((folder / "config.json").read_text())
        if not is_named:
            del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return made


def opened(folder, engine, **options):
    """The arguments that vLLM is opened with."""
    labels = {"prompts": "none.jsonl", "backend": "vllm", "vllm": options}
    recipe = Recipe.model_validate({"output": "o", "model": {"name": str(folder)}, "labels": labels})
    answer_backend(base_of(recipe), recipe.labels, load_tokenizer(recipe), Sampling())
    return engine.arguments, recipe


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vllm_runs_a_model_in_the_dtype_that_transformers_would(base, engine, dtype, is_named):
    arguments, recipe = opened(base(dtype, is_named=is_named), engine)
    assert arguments["dtype"] == dtype == str(load_model(recipe).dtype).removeprefix("torch.")
    assert who_answers(recipe.labels) == ""  # so both may share answers


@pytest.mark.parametrize(
    ("options", "dtype"), [({"dtype": "bfloat16"}, "bfloat16"), ({"quantization": "fp8"}, None), ({"model": "b"}, None)]
)
def test_a_dtype_or_a_model_of_vllms_own_is_left_as_it_is_and_shares_no_answers(engine, options, dtype):
    arguments, recipe = opened(BASE, engine, **options)
    assert arguments.get("dtype") == dtype
    assert who_answers(recipe.labels)
