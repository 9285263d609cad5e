"""The loop: the numbers of a broken run are those of an unbroken one, of two processes those of one, and what is wrong stops it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from regkit.errors import CheckpointError, OptionError
from regkit.io.weights import read_tensors
from regkit.training.checkpoint import read
from regkit.training.fit import CHECKPOINT, Plan, TrainingError, fit, item_generator

pytest.importorskip("lightning_fabric")


class Lines:
    """Step → items of a batch, each from its number alone; and which were asked for."""

    def __init__(self, seed=0, spoil=None, stop=None):
        self.seed, self.spoil, self.stop, self.asked = seed, spoil, stop, []

    def __call__(self, step, items):
        self.asked.append((step, items))
        if step == self.stop:
            raise KeyboardInterrupt
        x = torch.stack([torch.randn(3, generator=item_generator(self.seed, step, item)) for item in items])
        if step == self.spoil:
            x[0, 0] = math.nan
        return {"x": x, "y": x[:, :2].sin() + 0.1}


def loss(net, batch):
    away = (net(batch["x"]) - batch["y"]).square()
    return {"loss": away.mean(), "first": away[:, 0].mean()}


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def plan(**given):
    return Plan(**{"steps": 11, "rate": 0.01, "warm_up": 3, "device": "cpu", "log_every": 2, "look_every": 4, **given})


def trained(folder, make=None, net=None, settings=None, **given):
    """→ the averaged net, and the rows that were told."""
    rows = []
    options = {key: given.pop(key) for key in ("resume", "look") if key in given}
    folder.mkdir(exist_ok=True)
    average = fit(net or small(), make or Lines(), loss, plan(**given), folder, settings=settings or {"kind": "lines"}, tell=rows.append,
                  **options)
    return average, rows


def same(a, b):
    return all(torch.equal(value, b[key]) for key, value in a.items()) and a.keys() == b.keys()


# --------------------------------------------------------------------------------------------------------------- the items

def test_an_item_is_drawn_from_its_numbers_alone():
    def drawn(*numbers):
        return float(torch.rand((), generator=item_generator(*numbers), dtype=torch.float64))

    every = [(seed, step, item) for seed in range(3) for step in range(40) for item in range(8)]
    found = [drawn(*numbers) for numbers in every]
    assert len(set(found)) == len(every) and found == [drawn(*numbers) for numbers in every]


def test_batches_are_asked_for_one_after_the_other(tmp_path):
    make = Lines()
    trained(tmp_path, make, batch=6)
    assert make.asked == [(step, range(6)) for step in range(11)]


def test_how_a_batch_is_split_does_not_matter():
    """Its items are the same, whichever process makes them."""
    whole = Lines()(5, range(6))["x"]
    assert torch.equal(torch.cat([Lines()(5, range(3))["x"], Lines()(5, range(3, 6))["x"]]), whole)


# ---------------------------------------------------------------------------------------------------------------- the loop

def test_it_learns_and_tells_how(tmp_path):
    net, rows = trained(tmp_path, steps=300, log_every=50, batch=16, rate=0.03)
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"] and set(rows[0]) == {"step", "loss", "first"}
    with torch.no_grad():
        assert float(loss(net, Lines(seed=1)(0, range(64)))["loss"]) < 0.02  # items it has never seen


def test_a_row_holds_means_since_the_row_before(tmp_path):
    told = []

    def kept(net, batch):
        terms = loss(net, batch)
        told.append({key: float(value.detach()) for key, value in terms.items()})
        return terms

    rows = []
    fit(small(), Lines(), kept, plan(), tmp_path, settings={}, tell=rows.append)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 11]
    for row, low in zip(rows, (0, 2, 4, 6, 8, 10), strict=True):
        part = told[low: row["step"]]
        for key in ("loss", "first"):
            assert row[key] == pytest.approx(sum(one[key] for one in part) / len(part))


def test_the_rate_rises_and_falls():
    rates = [plan(steps=100, warm_up=10, rate=0.5).rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (k + 1) * 0.5 * (1 + math.cos(math.pi * k / 100)) for k in range(10)])
    assert rates[50] == pytest.approx(0.25) and rates[100] == pytest.approx(0) and max(rates) == max(rates[9:11])
    constant = [plan(steps=100, warm_up=10, rate=0.5, decay="constant").rate_at(step) for step in range(300)]
    assert constant[:9] == pytest.approx([0.05 * (k + 1) for k in range(9)]) and constant[9:] == [0.5] * 291
    assert plan(warm_up=0, rate=0.5).rate_at(0) == 0.5


def test_steps_are_adams_with_a_gradient_of_no_more_than_its_longest(tmp_path):
    """The same numbers as a loop written out."""
    given = plan(clip=0.05)
    net = small()
    fit(net, Lines(), loss, given, tmp_path, settings={})
    oracle = small()
    optimiser = torch.optim.Adam(oracle.parameters(), given.rate)
    steps, lengths = [], []
    for k in range(given.steps):
        optimiser.param_groups[0]["lr"] = given.rate_at(k)
        optimiser.zero_grad()
        loss(oracle, Lines()(k, range(given.batch)))["loss"].backward()
        lengths.append(float(nn.utils.clip_grad_norm_(oracle.parameters(), 0.05)))
        optimiser.step()
        steps.append(torch.cat([p.detach().flatten() for p in oracle.parameters()]))
    assert min(lengths) > 0.05
    for a, b in zip(net.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_the_averaged_net_is_what_comes_out(tmp_path):
    seen = []

    def kept(net, batch):
        seen.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        return loss(net, batch)

    net = small()
    average = fit(net, Lines(), kept, plan(), tmp_path, settings={})
    steps = [*seen[1:], torch.cat([p.detach().flatten() for p in net.parameters()])]
    shares = ((torch.arange(12, dtype=torch.float64) / 11) ** 7.94).diff()
    wanted = sum(share * one.double() for share, one in zip(shares, steps, strict=True))
    torch.testing.assert_close(torch.cat([p.flatten() for p in average.parameters()]).double(), wanted, atol=1e-6, rtol=0)
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    assert same(average.state_dict(), {key.removeprefix("average/"): value for key, value in read(tmp_path / CHECKPOINT)[0].items()
                                       if key.startswith("average/")})


def test_the_averaged_net_is_looked_at_now_and_then_and_in_the_end(tmp_path):
    steps, first = [], small()[0].weight.detach().clone()

    def look(average, step):
        steps.append(step)
        assert not average.training and not torch.equal(average[0].weight, first)
        return {"validation": float(step)}

    _, rows = trained(tmp_path, look=look)
    assert steps == [4, 8, 11]
    assert {row["step"]: row.get("validation") for row in rows} == {2: None, 4: 4.0, 6: None, 8: 8.0, 10: None, 11: 11.0}
    assert read(tmp_path / CHECKPOINT)[1]["log"] == rows


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("32", torch.float32)])
def test_layers_are_computed_in_the_precision_that_is_asked_for(precision, dtype, tmp_path):
    """Weights, their average and the loss keep theirs."""
    seen, net = set(), small()
    net[0].register_forward_hook(lambda layer, given, found: seen.add(found.dtype))
    average, rows = trained(tmp_path, net=net, precision=precision)
    assert seen == {dtype}
    assert {p.dtype for p in (*net.parameters(), *average.parameters())} == {torch.float32}
    _, exact = trained(tmp_path)
    assert rows[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)


# -------------------------------------------------------------------------------------------------------- broken and resumed

@pytest.mark.parametrize("stop", [3, 6, 10])
def test_a_broken_run_goes_on_with_the_numbers_of_an_unbroken_one(stop, tmp_path):
    look = lambda average, step: {"validation": float(average[0].weight.sum())}  # noqa: E731
    net, made = small(), small()
    average, rows = trained(tmp_path / "whole", net=net, look=look)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", Lines(stop=stop), look=look, save_every=0.0)
    assert read(tmp_path / "broken" / CHECKPOINT)[1]["step"] == stop // 2 * 2  # the last row before
    make = Lines()
    again, told = trained(tmp_path / "broken", make, net=made, look=look, resume=True, save_every=0.0)
    assert make.asked[0][0] == stop // 2 * 2
    assert same(again.state_dict(), average.state_dict()) and same(made.state_dict(), net.state_dict())
    assert read(tmp_path / "broken" / CHECKPOINT)[1]["log"] == rows and told == rows[stop // 2:]
    (tensors, state), (others, other) = (read(tmp_path / name / CHECKPOINT) for name in ("broken", "whole"))
    assert same(tensors, others) and {**state, "seconds": 0} == {**other, "seconds": 0}


def test_a_run_may_be_made_longer(tmp_path):
    """Under a constant rate."""
    whole, _ = trained(tmp_path / "whole", steps=9, decay="constant")
    trained(tmp_path / "short", steps=5, decay="constant")
    longer, _ = trained(tmp_path / "short", steps=9, decay="constant", resume=True, net=small(1))
    assert same(longer.state_dict(), whole.state_dict())


def test_a_finished_run_is_given_back(tmp_path):
    average, rows = trained(tmp_path)
    make = Lines()
    again, told = trained(tmp_path, make, net=small(1), resume=True)
    assert same(again.state_dict(), average.state_dict()) and told == [] == make.asked
    assert read(tmp_path / CHECKPOINT)[1]["log"] == rows


def test_without_resume_a_run_begins_anew(tmp_path):
    first, rows = trained(tmp_path)
    make = Lines()
    again, told = trained(tmp_path, make)
    assert len(make.asked) == 11 and told == rows and same(again.state_dict(), first.state_dict())


def test_to_resume_nothing_is_to_begin(tmp_path):
    assert [row["step"] for row in trained(tmp_path, resume=True)[1]] == [2, 4, 6, 8, 10, 11]


def test_another_run_is_not_gone_on_with(tmp_path):
    trained(tmp_path, settings={"width": 8, "kind": "lines", "old": 1})
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(OptionError, match=rf"resume: {tmp_path}/{CHECKPOINT} was begun with other settings \(new, old, width\); take"):
        trained(tmp_path, resume=True, settings={"width": 9, "kind": "lines", "new": 1})
    with pytest.raises(CheckpointError, match="is no checkpoint of this net"):
        trained(tmp_path, resume=True, net=nn.Linear(3, 2), settings={"width": 8, "kind": "lines", "old": 1})
    (tmp_path / CHECKPOINT).write_bytes(before[:100])
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        trained(tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


# ---------------------------------------------------------------------------------------------------------------- faults

def test_a_loss_that_is_no_number_stops_it_and_its_batch_is_kept(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss of step 7 is not a number; its batch lies in .*bad-batch-7-0.safetensors. Look"):
        trained(tmp_path, Lines(spoil=7), save_every=0.0)
    batch, _ = read_tensors(tmp_path / "bad-batch-7-0.safetensors")
    torch.testing.assert_close(batch["x"], Lines(spoil=7)(7, range(4))["x"], rtol=0, atol=0, equal_nan=True)
    assert set(batch) == {"x", "y"}
    whole, _ = trained(tmp_path / "whole")
    again, _ = trained(tmp_path, resume=True)  # the batch mended, it goes on
    assert same(again.state_dict(), whole.state_dict())


def test_a_gradient_that_is_no_number_stops_it_before_it_does_harm(tmp_path):
    """Of a finite loss: a root's at 0."""
    net = small()

    def rooted(net, batch):
        terms = loss(net, batch)
        return {"loss": terms["loss"] + (0 * terms["loss"]).sqrt() if len(asked.asked) == 6 else terms["loss"]}

    asked = Lines()
    with pytest.raises(TrainingError, match=r"the gradient of step 5 is not a number; its batch lies in .*bad-batch-5-0.safetensors"):
        fit(net, asked, rooted, plan(save_every=0.0, log_every=1), tmp_path, settings={})
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    tensors, state = read(tmp_path / CHECKPOINT)
    assert state["step"] == 5 and all(bool(value.isfinite().all()) for value in tensors.values())


@pytest.mark.parametrize(("given", "message"), [
    ({"steps": 0}, "steps: 0; expected 1 or more"), ({"batch": 0}, "batch: 0; expected 1 or more"),
    ({"log_every": 0}, "log_every: 0; expected 1 or more"), ({"look_every": -1}, "look_every: -1; expected 1 or more"),
    ({"rate": 0.0}, r"rate: 0.0; expected a number above 0"), ({"rate": math.inf}, "rate: inf"), ({"rate": math.nan}, "rate: nan"),
    ({"decay": "cosin"}, r"decay: 'cosin' is not known; .*nearest: cosine"), ({"precision": "fp16"}, r"precision: 'fp16' is not known"),
    ({"device": "gpu"}, r"device: 'gpu' is not known; .*auto, cpu, cuda"),
])
def test_plans_that_make_no_sense_are_named(given, message):
    with pytest.raises(OptionError, match=message):
        plan(**given)


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="device: cuda is asked for and torch finds none; use --device cpu"):
        trained(tmp_path, device="cuda")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(OptionError, match=r"train: needs lightning-fabric; pip install 'regkit\[train\]'"):
        trained(tmp_path)


# ------------------------------------------------------------------------------------------------------- several processes

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from regkit.errors import OptionError
from regkit.training.fit import Plan, fit, item_generator

def make(step, items):
    x = torch.stack([torch.randn(3, generator=item_generator(0, step, item)) for item in items])
    return {"x": x, "y": x[:, :2].sin() + 0.1, "asked": torch.tensor([[step, item] for item in items])}

def main():
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    torch.manual_seed(rank)  # the processes' nets begin differently: the first one's counts
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    asked, rows = [], []

    def loss(net, batch):
        asked.extend(batch["asked"].tolist())
        return {"loss": (net(batch["x"]) - batch["y"]).square().mean()}

    plan = dict(steps=12, rate=0.01, warm_up=3, device="cpu", log_every=1)
    refused = ""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            fit(net, make, loss, Plan(batch=3, **plan), folder, settings={})
        except OptionError as error:
            refused = str(error)
    average = fit(net, make, loss, Plan(batch=4, workers=int(sys.argv[2]), **plan), folder, settings={}, tell=rows.append)
    said = {"rows": rows, "asked": asked, "refused": refused, "average": average[0].weight.tolist()}
    (folder / f"said-{rank}.json").write_text(json.dumps(said))

if __name__ == "__main__":
    main()
"""


def run(folder, *before, workers=0):
    """What every process said."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *before, str(script), str(folder), str(workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("said-*.json"))]


def run_here(folder, monkeypatch):
    folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["script.py", str(folder), "0"])
    scope = {"__name__": "script"}
    exec(SCRIPT, scope)
    scope["main"]()
    return json.loads((folder / "said-0.json").read_text())


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    """Each takes its share of every batch, and their gradients are averaged."""
    alone = run_here(tmp_path / "one", monkeypatch)
    first, second = run(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert [row["step"] for row in first["rows"]] == list(range(1, 13)) and second["rows"] == []  # one of them tells
    assert [row["loss"] for row in first["rows"]] == pytest.approx([row["loss"] for row in alone["rows"]], abs=1e-4)
    assert alone["asked"] == [[step, item] for step in range(12) for item in range(4)]
    assert first["asked"] == [[step, item] for step in range(12) for item in (0, 1)]
    assert second["asked"] == [[step, item] for step in range(12) for item in (2, 3)]
    for one in (first, second):
        assert one["refused"] == "batch: 3 cannot be shared out to 2 processes; give a multiple"
        torch.testing.assert_close(torch.tensor(one["average"]), torch.tensor(alone["average"]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_process_that_makes_batches_ahead_changes_nothing(tmp_path, monkeypatch):
    alone = run_here(tmp_path / "one", monkeypatch)
    ahead, = run(tmp_path / "ahead", workers=1)
    assert ahead == alone and len(alone["rows"]) == 12
