"""Heads on the Hugging Face hub: push, pull. Only safetensors, JSON, a picture and the card are copied."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from caftune.checkpoints.cards import heads_card, read_quality
from caftune.checkpoints.heads_folder import HUB_ERRORS, SHARED_FILES, find_heads, hub_reason, read_heads
from caftune.errors import CaftuneError
from caftune.files import refuse_filled_folder


def push_heads(
    folder: str | Path, name: str, *, licence: str, private: bool = False, revision: str | None = None
) -> str:
    """Publish a heads folder as the model repository `owner/name`, with a card. Returns its address.

    Args:
        licence: as the hub names licences (apache-2.0, llama3.1, other, ...). Heads begin as a copy of the base's layer, so
            the licence of the base applies to them.
        revision: the branch to push to; None: main.

    Raises:
        CaftuneError: the folder is damaged, or the hub does not accept it.
    """
    source = find_heads(folder)
    read_heads(source)  # checks that the file is whole
    api = HfApi(library_name="caftune")
    with TemporaryDirectory() as staged:
        measured = read_quality(source) is not None
        for file in SHARED_FILES if measured else SHARED_FILES[:2]:
            if (source / file).is_file():
                shutil.copy(source / file, staged)
        Path(staged, "README.md").write_text(heads_card(source, name, licence=licence), encoding="utf-8")
        try:
            api.create_repo(name, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=name,
                folder_path=staged,
                revision=revision,
                commit_message="Auxiliary heads by caftune",
                delete_patterns=list(SHARED_FILES),  # a report of the heads that were there before
            )
        except HUB_ERRORS as error:
            raise CaftuneError(
                f"The hub did not accept {folder} as {name}: {hub_reason(error)}. Log in with `hf auth login` (a token that "
                "may write), and check the name."
            ) from error
    return str(commit.commit_url)


def pull_heads(name: str, folder: str | Path) -> Path:
    """Fetch heads `owner/name[@revision]` from the hub into a folder, checked. Returns the folder.

    Raises:
        CaftuneError: the hub has no such heads, they are damaged, or the folder is not empty.
    """
    target = Path(folder)
    refuse_filled_folder(target)
    found = find_heads(name)
    read_heads(found)
    target.mkdir(parents=True, exist_ok=True)
    for file in (*SHARED_FILES, "README.md"):
        if (found / file).is_file():
            shutil.copy(found / file, target / file)
    return target
