"""Named tensors in files: what is written comes back, the file is whole or not there, and damaged ones are named."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from regkit.errors import CheckpointError, OutputError
from regkit.io.weights import read_tensors, write_tensors

TENSORS = {
    "whole": torch.arange(24.0).reshape(2, 3, 4), "half": torch.tensor([0.1, -3.0]).half(), "double": torch.tensor([0.1]).double(),
    "number": torch.tensor(7.0), "none": torch.zeros(0, 3), "count": torch.tensor([3, -5]), "a.b/c": torch.tensor([True, False]),
}


def test_what_is_written_comes_back_exactly(tmp_path):
    path = tmp_path / "deep" / "er" / "w.safetensors"
    write_tensors(path, TENSORS, {"a": "text", "ß": "θ → T\n"})
    tensors, header = read_tensors(path)
    assert header == {"a": "text", "ß": "θ → T\n"} and set(tensors) == set(TENSORS)
    for key, value in TENSORS.items():
        assert tensors[key].dtype == value.dtype and tensors[key].shape == value.shape and torch.equal(tensors[key], value)
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_no_header_is_an_empty_one(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {})
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")  # by another program
    for name in ("w", "other"):
        assert read_tensors(str(tmp_path / f"{name}.safetensors"))[1] == {}


def test_parameters_views_and_turned_tensors_are_written_as_what_they_hold(tmp_path):
    parameter = torch.nn.Parameter(torch.rand(4, 3))
    given = {"parameter": parameter, "turned": parameter.mT, "every other": torch.arange(8.0)[::2], "spread": torch.ones(1).expand(5)}
    write_tensors(tmp_path / "w.safetensors", given, {})
    tensors, _ = read_tensors(tmp_path / "w.safetensors")
    for key, value in given.items():
        assert torch.equal(tensors[key], value) and not tensors[key].requires_grad


def test_what_was_read_does_not_hang_on_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.ones(1000)}, {})
    found = read_tensors(path)[0]["a"]
    write_tensors(path, {"a": torch.zeros(1000)}, {}, overwrite=True)
    path.unlink()
    assert float(found.sum()) == 1000


def test_others_may_read_what_others_may_read_of_any_new_file(tmp_path):
    (tmp_path / "any").write_bytes(b"")
    write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_an_existing_file_is_kept_unless_it_may_be_overwritten(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"n": "1"})
    with pytest.raises(OutputError, match=r"w.safetensors exists; choose another name or give --overwrite"):
        write_tensors(path, {"a": torch.zeros(3)}, {"n": "2"})
    assert read_tensors(path)[1] == {"n": "1"}
    write_tensors(path, {"a": torch.zeros(3)}, {"n": "2"}, overwrite=True)
    tensors, header = read_tensors(path)
    assert header == {"n": "2"} and not tensors["a"].any()


def test_what_cannot_be_written_changes_nothing(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"n": "1"})
    with pytest.raises(TypeError):
        write_tensors(path, {"a": torch.zeros(3)}, {"n": 2}, overwrite=True)  # a header holds texts
    assert read_tensors(path)[1] == {"n": "1"} and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def _whole(path):
    write_tensors(path, TENSORS, {"a": "text"})
    return path.read_bytes()


def _lying(path):
    """Promises more numbers than there are."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 16


@pytest.mark.parametrize("spoil", [
    lambda path: b"", lambda path: b"these are no weights, but a text of some length\n" * 10, lambda path: _whole(path)[:-5],
    lambda path: _whole(path)[:100], lambda path: _whole(path)[:5], lambda path: struct.pack("<Q", 2**60) + _whole(path)[8:], _lying,
    lambda path: pickle.dumps({"a": [1.0]}),
], ids=["empty", "text", "cut at the end", "cut in the header", "cut in its length", "long header", "lying header", "pickle"])
def test_damaged_files_are_named(spoil, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(spoil(path))
    with pytest.raises(CheckpointError, match=r"w.safetensors cannot be read as weights \(.+\); expected a safetensors file") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


def test_nothing_and_a_folder_are_no_weights(tmp_path):
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path} cannot be read as weights"):
            read_tensors(path)


class _Evil:
    def __reduce__(self):
        return open, ("unpickled", "w")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".pkl"])
def test_pickles_are_refused_and_not_run(tmp_path, suffix, monkeypatch):
    from regkit.registration.nets import load
    from regkit.training.checkpoint import read

    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"w{suffix}"
    torch.save({"a": torch.zeros(1)}, path)
    for blob in (path.read_bytes(), pickle.dumps(_Evil())):
        path.write_bytes(blob)
        for door in (read_tensors, read, load):
            with pytest.raises(CheckpointError, match="expected a safetensors file"):
                door(path)
    assert not (tmp_path / "unpickled").exists()


def test_a_long_complaint_is_shortened(tmp_path):
    header = json.dumps({"a": {"dtype": "9" * 100_000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path / "w.safetensors")
    assert len(str(caught.value)) < 600
