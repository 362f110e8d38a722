"""A tiny model that sees, with its processor beside it, and rows with pictures: no download, no torchvision."""

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from caftune.demo.run import BASE

SIDE = 8  # pixels
PATCH = 4
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_llava(folder):
    """Write a Llava of two layers, its processor and its tokenizer into one folder, and return its name."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    crop = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    shape = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = CLIPVisionConfig(hidden_size=16, image_size=SIDE, patch_size=PATCH, projection_dim=16, **shape)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, **shape, **ends)
    token = tokenizer.convert_tokens_to_ids("<image>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def pictured_rows(count=8):
    """Conversations about one-coloured pictures."""
    rows = []
    for index in range(count):
        talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "CC" + "O" * index}]
        rows.append({"images": [Image.new("RGB", (SIDE, SIDE), (30 * index, 0, 0))], "messages": talk})
    return Dataset.from_list(rows)
