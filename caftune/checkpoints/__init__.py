"""Heads and models on disk and on the hub.

Names: save_heads, load_heads, find_heads, describe_heads, export_model, push_heads, pull_heads.

heads_folder     save, load and find heads
fingerprint      which base heads belong to
provenance       how a run was made
export           a trained model or adapter as an ordinary checkpoint
eagle3           a head as a draft model for servers
hub              push and pull heads
cards            model cards
opening          errors of models that cannot be opened
"""

from caftune._lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "save_heads": "heads_folder",
        "load_heads": "heads_folder",
        "find_heads": "heads_folder",
        "describe_heads": "heads_folder",
        "export_model": "export",
        "push_heads": "hub",
        "pull_heads": "hub",
    },
)
