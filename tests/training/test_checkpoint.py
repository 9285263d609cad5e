"""A net while it learns: the average of its weights, and one file from which it goes on as if nothing had happened."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from regkit.errors import CheckpointError
from regkit.io.weights import read_tensors, write_tensors
from regkit.localisation import Detector, KeypointNet
from regkit.training.checkpoint import Learner, read


def small(seed=0, width=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def step(learner, seed):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    learner.optimiser.zero_grad()
    (learner.net(x) - x[:, :2].square()).square().mean().backward()
    learner.optimiser.step()
    learner.averaged()


def learnt(steps, seed=0):
    learner = Learner.of(small(seed), 0.01)
    for k in range(steps):
        step(learner, k)
    return learner


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# -------------------------------------------------------------------------------------------------------------- the average

def test_the_average_weighs_step_t_by_a_power_of_t():
    """Step k of n has the share of the integral of t^γ from k - 1 to k."""
    learner = Learner.of(nn.Linear(2, 3), 0.01)
    steps = []
    for k in range(25):
        for p in learner.net.parameters():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        if k == 0:
            learner.average.double()
        steps.append(copy.deepcopy(learner.net.state_dict()))
        learner.averaged()
        ends = (torch.arange(k + 2, dtype=torch.float64) / (k + 1)) ** 7.94
        for key, value in learner.average.state_dict().items():
            wanted = sum(share * one[key] for share, one in zip(ends.diff(), steps, strict=True))
            torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0)
    assert learner.step == 25


def test_the_averages_width_is_a_tenth_of_the_run():
    """At any time, so that it is good whenever a run ends: of the weights' places in time the standard deviation."""
    learner = Learner.of(nn.Linear(2, 1, bias=False), 0.01)
    for k in range(1, 1001):
        learner.net.weight.data = torch.tensor([[k, k * k]], dtype=torch.float32)
        learner.averaged()
        if k in (300, 1000):
            mean, square = learner.average.weight[0].double().tolist()
            assert (square - mean**2) ** 0.5 / k == pytest.approx(0.1, abs=0.005)


def test_the_average_is_a_net_of_its_own_that_does_not_learn():
    net = small()
    learner = Learner.of(net, 0.01)
    assert learner.net is net and not learner.average.training and learner.net.training
    assert not any(p.requires_grad for p in learner.average.parameters()) and all(p.requires_grad for p in net.parameters())
    step(learner, 0)
    assert same(learner.average.state_dict(), net.state_dict())  # after one step there is nothing else to average
    step(learner, 1)
    assert not same(learner.average.state_dict(), net.state_dict())
    assert [group["lr"] for group in learner.optimiser.param_groups] == [0.01]


# --------------------------------------------------------------------------------------------------------------- the file

@pytest.mark.parametrize("steps", [0, 1, 6])
def test_what_is_loaded_goes_on_to_the_last_bit(steps, tmp_path):
    learner = learnt(steps)
    learner.save(tmp_path / "c.safetensors", {"settings": {"ß": [1, 2.5, None]}, "log": [{"step": 1, "loss": 0.1}]})
    other = learnt(3, seed=1)  # what it held before leaves no trace
    if steps == 0:
        other = Learner.of(small(1), 0.01)
    state = other.load(tmp_path / "c.safetensors")
    assert state == {"settings": {"ß": [1, 2.5, None]}, "log": [{"step": 1, "loss": 0.1}], "step": steps}
    for k in range(steps, steps + 4):
        assert other.step == k
        assert same(other.net.state_dict(), learner.net.state_dict()) and same(other.average.state_dict(), learner.average.state_dict())
        step(learner, k)
        step(other, k)
    assert not any(p.requires_grad for p in other.average.parameters())


def test_a_checkpoint_is_read_without_a_net(tmp_path):
    learner = learnt(2)
    learner.save(tmp_path / "c.safetensors", {"log": []})
    tensors, state = read(tmp_path / "c.safetensors")
    assert state == {"log": [], "step": 2}
    for kind, net in (("net", learner.net), ("average", learner.average)):
        assert torch.equal(tensors[f"{kind}/0.weight"], net[0].weight)
    assert {key.rsplit("/", 1)[1] for key in tensors if key.startswith("optimiser/3/")} == {"step", "exp_avg", "exp_avg_sq"}


def test_buffers_are_kept(tmp_path):
    """As a keypoint net's home."""
    home = torch.rand(4, 2)
    learner = Learner.of(KeypointNet(Detector(4, 2, width=8, depth=1), home), 0.01)
    learner.save(tmp_path / "c.safetensors", {})
    other = Learner.of(KeypointNet(Detector(4, 2, width=8, depth=1), torch.zeros(4, 2)), 0.01)
    other.load(tmp_path / "c.safetensors")
    assert torch.equal(other.net.home, home) and torch.equal(other.average.home, home)


def test_a_new_checkpoint_replaces_the_old_one_whole(tmp_path, monkeypatch):
    learner = learnt(1)
    learner.save(tmp_path / "c.safetensors", {})
    step(learner, 1)
    learner.save(tmp_path / "c.safetensors", {})
    assert read(tmp_path / "c.safetensors")[1] == {"step": 2}
    step(learner, 2)
    def half(path, blob):
        with path.open("wb") as file:
            file.write(blob[:99])
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("pathlib.Path.write_bytes", half)
        learner.save(tmp_path / "c.safetensors", {})
    assert read(tmp_path / "c.safetensors")[1] == {"step": 2} and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------------- faults

def test_the_checkpoint_of_another_net_is_refused(tmp_path):
    learnt(2).save(tmp_path / "c.safetensors", {})
    for net in (small(width=6), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 2)), nn.Conv2d(1, 1, 3)):
        with pytest.raises(CheckpointError, match=r"c.safetensors: is no checkpoint of this net \(.+\); take its own run") as caught:
            Learner.of(net, 0.01).load(tmp_path / "c.safetensors")
        assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    learnt(1).save(path, {})
    tensors, _ = read_tensors(path)
    for header in ({}, {"state": "{"}, {"format": "regkit net 1", "net": json.dumps({})}):
        write_tensors(path, tensors, header, overwrite=True)
        with pytest.raises(CheckpointError, match=r"c.safetensors: is no checkpoint of a training; remove it, or give another output"):
            read(path)
    for content in (b"", b"text " * 50):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"c.safetensors cannot be read as weights"):
            Learner.of(small(), 0.01).load(path)


@pytest.mark.parametrize("spoil", [
    lambda tensors, state: (tensors, []), lambda tensors, state: (tensors, {}), lambda tensors, state: (tensors, {**state, "step": "many"}),
    lambda tensors, state: (tensors, {**state, "step": -1}), lambda tensors, state: (tensors, {**state, "step": None}),
    lambda tensors, state: ({**tensors, "optimiser/0/exp_avg": torch.zeros(7)}, state),
    lambda tensors, state: ({key: value for key, value in tensors.items() if key != "optimiser/1/step"}, state),
], ids=["a list", "no step", "no number", "negative", "null", "other shape", "a part is missing"])
def test_hostile_checkpoints_are_named(tmp_path, spoil):
    learnt(3).save(tmp_path / "c.safetensors", {"seen": 1})
    tensors, state = spoil(*read(tmp_path / "c.safetensors"))
    write_tensors(tmp_path / "c.safetensors", tensors, {"state": json.dumps(state)}, overwrite=True)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: is no checkpoint of"):
        Learner.of(small(), 0.01).load(tmp_path / "c.safetensors")
