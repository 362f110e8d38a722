"""A recipe, its stages and its run folder.

Names: Recipe, load_recipe, Run, label_prompts, pretrain_heads, measure_quality, adapt_heads, finetune_model,
    export_checkpoint, evaluate_model, preview_rows.

schema, recipe, recipe_text    the sections of a recipe; reading and checking one
run, base_model, heads_choice, folder    what a command works on: the base, the heads, the run folder
label, pretrain, adapt, finetune    the stages
stage_config, stage_rows, stage_trainer    the options, the rows and the trainer of a stage
preview, plan                  before a training: its rows, its cost
evaluate, generate, head_quality, structures    after it: tasks, drafts, how good heads are, folded proteins
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "Recipe": "schema",
        "load_recipe": "recipe",
        "Run": "run",
        "label_prompts": "label",
        "pretrain_heads": "pretrain",
        "measure_quality": "pretrain",
        "adapt_heads": "adapt",
        "finetune_model": "finetune",
        "export_checkpoint": "finetune",
        "evaluate_model": "evaluate",
        "preview_rows": "preview",
    },
)
