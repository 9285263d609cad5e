"""Scans found in folders and tables, divided by person, read once and kept: the same numbers however they are stored."""

from __future__ import annotations

import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch

from regkit.errors import FormatError, GeometryError, OptionError
from regkit.image import Image
from regkit.io import read_image
from regkit.sampling import warp
from regkit.space import Grid, Matrix
from regkit.training import scans
from regkit.training.scans import Listed, Scan, canvas_for, common_labels, extents, listed, prepare, split
from tests.training.conftest import SHAPES, affine, voxels, write_labels, write_people, write_scan

both = pytest.mark.parametrize("ndim", [2, 3], ids=["2D", "3D"])


def names(found):
    return [one.path.name for one in found]


def touched(path):
    """Later by a second than it was, without waiting for it."""
    then = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(then, then))


# --------------------------------------------------------------------------------------------------------------- folders

def test_a_folder_is_searched_with_all_below_it(tmp_path):
    for name in ("b.nii.gz", "deep/er/a.nii", "deep/c.png", "notes.txt", ".hidden.nii.gz", "._b.nii.gz", ".git/annex/d.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.nii.gz").mkdir()
    found = listed(tmp_path)
    assert [one.path.relative_to(tmp_path).as_posix() for one in found] == ["b.nii.gz", "deep/c.png", "deep/er/a.nii"]
    assert all(one.labels is None and one.held_out is None for one in found)


def test_label_maps_lie_beside_their_scans_and_are_none(tmp_path):
    for name in ("a.nii.gz", "a_seg.nii.gz", "b.nii.gz", "b_labels.nii", "c_T1.nii.gz", "c_dseg.nii.gz", "d_T1.nii.gz",
                 "d_T1_label.nii.gz", "e.nii.gz", "e_mask.nii.gz", "e_points.nii.gz", "f.nii.gz", "other/f_seg.nii.gz", "other/g.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = {one.path.name: one.labels and one.labels.relative_to(tmp_path).as_posix() for one in listed(tmp_path)}
    assert found == {"a.nii.gz": "a_seg.nii.gz", "b.nii.gz": "b_labels.nii", "c_T1.nii.gz": "c_dseg.nii.gz",
                     "d_T1.nii.gz": "d_T1_label.nii.gz", "e.nii.gz": None, "f.nii.gz": None, "g.nii.gz": None}


def test_in_a_folder_each_scan_is_a_person_of_its_own(tmp_path):
    """Also where every person's folder holds a scan of the same name."""
    for name in ("one/T1.nii.gz", "two/T1.nii.gz", "T1.nii.gz", "T2.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len({one.person for one in listed(tmp_path)}) == 4


@pytest.mark.parametrize("names", [[], ["a.nii.gz"], ["a.nii.gz", "a_seg.nii.gz"], ["a.txt", "b.csv"]], ids=str)
def test_a_training_needs_two_scans(names, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    count = int("a.nii.gz" in names)
    with pytest.raises(FormatError, match=rf"scans: .* holds {count} scan{'' if count else 's'}; a training needs two or more$"):
        listed(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- tables

def table(folder, text):
    path = folder / "scans.csv"
    path.write_text(text)
    return path


def test_a_table_says_more(tmp_path):
    found = listed(table(tmp_path, "\ufeffscan, labels,person,split,note\n".replace(" ", "") +
                         "a.nii.gz,maps/a.nii.gz,Ann,train,x\nsub/b.nii.gz,,Ann,validation,\n c.nii.gz ,,, ,\n/far/d.nii.gz,,,,\n"))
    assert found == [Listed(tmp_path / "a.nii.gz", tmp_path / "maps" / "a.nii.gz", "Ann", False),
                     Listed(tmp_path / "sub" / "b.nii.gz", None, "Ann", True),
                     Listed(tmp_path / "c.nii.gz", None, "c", None),
                     Listed(scans.Path("/far/d.nii.gz"), None, "/far/d", None)]


def test_a_table_of_nothing_but_scans(tmp_path):
    found = listed(table(tmp_path, "scan\none/T1.nii\ntwo/T1.nii\n"))
    assert names(found) == ["T1.nii", "T1.nii"] and len({one.person for one in found}) == 2


@pytest.mark.parametrize(("text", "error", "message"), [
    ("image,person\na.nii,A\nb.nii,B\n", FormatError, r"scans: .*scans.csv has no column scan; expected scan\[,labels\]"),
    ("scan\n", FormatError, "has no column scan"),
    ("", FormatError, "has no column scan"),
    ("scan\na.nii\n", FormatError, "holds 1 scan; a training needs two or more"),
    ("scan,split\na.nii,train\nb.nii,test\n", OptionError, r"scans.csv, line 3: split is 'test'; expected train, validation or nothing"),
], ids=["no column", "no rows", "empty", "one scan", "split"])
def test_tables_that_make_no_sense_are_named(text, error, message, tmp_path):
    with pytest.raises(error, match=message):
        listed(table(tmp_path, text))


def test_what_is_no_table_is_named(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(bytes(range(256)))
    for name in ("nothing", "scan.nii.gz"):
        with pytest.raises(FormatError, match=rf"scans: .*{name} cannot be read: .*; expected a folder, or a table with a column scan$"):
            listed(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ validation

def people(*given):
    """Listed scans of (person, split)."""
    return [Listed(scans.Path(f"{k}.nii"), None, person, held_out) for k, (person, held_out) in enumerate(given)]


def test_no_person_is_on_both_sides():
    found = split(people(*((f"p{k % 10}", None) for k in range(40))), 0.3, 0)
    kept, learning = ({one.person for one in found if one.held_out is side} for side in (True, False))
    assert len(kept) == 3 and len(learning) == 7 and not kept & learning
    assert [one.path for one in found] == [scans.Path(f"{k}.nii") for k in range(40)]


def test_who_is_kept_depends_on_the_seed_alone():
    given = people(*((f"p{k}", None) for k in range(12)))
    first = split(given, 0.25, 3)
    assert split(given, 0.25, 3) == first
    backwards = split(given[::-1], 0.25, 3)
    assert {one.person for one in backwards if one.held_out} == {one.person for one in first if one.held_out}
    drawn = {frozenset(one.person for one in split(given, 0.25, seed) if one.held_out) for seed in range(20)}
    assert len(drawn) > 10 and {len(one) for one in drawn} == {3}


def test_what_a_table_says_counts():
    """Of its rows, and of those of the same person that say nothing."""
    given = people(("A", True), ("A", None), ("B", False), ("B", None), ("C", True), ("C", False), ("D", None), ("E", None), ("F", None))
    for seed in range(6):
        found = split(given, 0.34, seed)
        assert [one.held_out for one in found[:6]] == [True, True, False, False, True, False]
        assert sum(one.held_out for one in found[6:]) == 1


@pytest.mark.parametrize(("count", "share", "kept"), [
    (2, 0.2, 0), (3, 0.2, 1), (4, 0.2, 1), (10, 0.2, 2), (3, 0.01, 1), (10, 0.0, 0), (3, 0.0, 0), (2, 0.5, 1), (1, 0.2, 0), (10, 0.99, 10)])
def test_few_people(count, share, kept):
    found = split(people(*((f"p{k}", None) for k in range(count))), share, 0)
    assert [type(one.held_out) for one in found] == [bool] * count and sum(one.held_out for one in found) == kept


# --------------------------------------------------------------------------------------------------------------- reading

@both
def test_scans_are_read_and_their_extent_is_told(ndim, tmp_path):
    found = listed(write_people(tmp_path, ndim, 3))
    small = nib.Nifti1Image(voxels(ndim)[(slice(4, 12),) * ndim].astype(np.float32), affine(ndim))
    small.to_filename(tmp_path / "p0.nii.gz")
    told = []
    images, extent = extents(found, False, told.append)
    assert [one for one, _ in images] == found and told == []
    assert extent == pytest.approx((96, 100)[ndim - 2])  # the longest edge of most
    assert canvas_for(extent) == pytest.approx(1.3 * extent)
    for one, image in images:
        assert image.ndim == ndim and torch.equal(image.data.float(), read_image(one.path).data.float())


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda path: path.write_bytes(path.read_bytes()[:400]), r"p1.nii.gz"),
    (lambda path: path.unlink(), "p1.nii.gz does not exist"),
    (lambda path: path.write_text("no image"), "p1.nii.gz"),
    (lambda path: nib.Nifti1Image(np.full(SHAPES[2], 7, np.float32), affine(2)).to_filename(path), "every voxel has the value 7"),
    (lambda path: nib.Nifti1Image(np.full(SHAPES[2], np.nan, np.float32), affine(2)).to_filename(path), "every voxel is NaN"),
], ids=["truncated", "absent", "text", "constant", "NaN"])
def test_a_bad_scan_stops_it_or_is_left_out_and_told(spoil, message, tmp_path):
    found = listed(write_people(tmp_path, 2, 3))
    spoil(tmp_path / "p1.nii.gz")
    with pytest.raises(FormatError, match=f"{message}.*; or leave such scans out: --skip-bad$") as caught:
        extents(found, False, lambda text: None)
    assert "p1.nii.gz" in str(caught.value)
    told = []
    images, _ = extents(found, True, told.append)
    assert names(one for one, _ in images) == ["p0.nii.gz", "p2.nii.gz"]
    assert len(told) == 1 and told[0].startswith("left out: ") and "p1.nii.gz" in told[0] and "--skip-bad" not in told[0]


def test_too_few_that_can_be_read(tmp_path):
    found = listed(write_people(tmp_path, 2, 2))
    (tmp_path / "p1.nii.gz").write_text("no image")
    with pytest.raises(FormatError, match="scans: 1 of 2 can be read; a training needs two or more"):
        extents(found, True, lambda text: None)


def test_slices_and_volumes_are_not_mixed(tmp_path):
    write_people(tmp_path, 3, 2)
    write_scan(tmp_path / "slice.nii.gz", 2)
    with pytest.raises(FormatError, match="scans: some are 2D and some 3D; give a table with those of one kind"):
        extents(listed(tmp_path), True, lambda text: None)


# ------------------------------------------------------------------------------------------------------------------ kept

def kept(path, folder, mm=6.0, labels=None):
    one = Listed(path, labels, "P", False)
    return prepare(one, read_image(path), mm, folder)


@both
def test_what_is_kept_is_what_warp_reads(ndim, tmp_path):
    """On canvases of the scan's own voxels, where nothing is smoothed."""
    mm = (3.0, 5.0)[ndim - 2]
    path = write_scan(tmp_path / "a.nii.gz", ndim)
    found = kept(path, tmp_path / "kept", mm)
    assert isinstance(found, Scan) and found.listed == Listed(path, None, "P", False) and found.labels is None
    assert found.values.shape == (1, *found.grid.shape) and found.values.dtype == np.float16
    torch.testing.assert_close(found.grid.spacing, torch.full((1, ndim), 0.7 * mm, dtype=torch.float64))
    image = read_image(path)
    low, high = (float(v) for v in np.quantile(image.data.numpy(), [0.002, 0.998]))
    scaled = image.with_data(((image.data - low) / (high - low)).clamp(0, 1))
    oracle = warp(scaled, Matrix.identity(ndim), found.grid, antialias="none").data[0, 0]
    torch.testing.assert_close(torch.tensor(found.values[0]).float(), oracle, atol=0.02, rtol=0)
    weight = torch.tensor(found.values[0]).double().flatten()
    torch.testing.assert_close(found.middle, weight @ found.grid.points()[0] / weight.sum(), atol=0.05, rtol=0)


@both
def test_coarse_canvases_are_made_of_smoothed_scans(ndim, tmp_path):
    """A pattern of one voxel's width leaves no trace, its mean does."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPES[ndim]], indexing="ij")).sum(0)
    nib.Nifti1Image((index % 2).astype(np.float32), affine(ndim)).to_filename(tmp_path / "a.nii.gz")
    found = kept(tmp_path / "a.nii.gz", tmp_path / "kept", 4 * (3.0, 5.0)[ndim - 2])
    inner = found.values[(0, *[slice(2, -2)] * ndim)].astype(float)
    assert inner.size and abs(inner - 0.5).max() < 0.02


@both
def test_what_is_smoothed_is_as_wide_as_the_canvas_voxels(ndim, tmp_path):
    """A bright voxel becomes a Gaussian, which makes of one voxel's width that of the canvas' (2.35 σ)."""
    data, mm = np.zeros(SHAPES[ndim], np.float32), (3.0, 5.0)[ndim - 2]
    data[(8,) * ndim] = 1
    nib.Nifti1Image(data, affine(ndim)).to_filename(tmp_path / "a.nii.gz")
    found = kept(tmp_path / "a.nii.gz", tmp_path / "kept", 3 * mm)
    weight = torch.tensor(found.values[0].astype(float)).flatten()
    points = found.grid.points()[0] - (8 * mm + torch.tensor(affine(ndim)[:ndim, 3]))
    width = ((weight[:, None] * points.square()).sum(0) / weight.sum()).sqrt()
    torch.testing.assert_close(width, torch.full_like(width, mm * np.sqrt((3**2 - 1) / (8 * np.log(2)))), rtol=0.12, atol=0)


@both
def test_outside_of_an_oblique_field_of_view_there_is_nothing(ndim, tmp_path):
    """On the upright grid around it, though its border is bright."""
    header = affine(ndim)
    turn = np.eye(4)
    turn[:2, :2] = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    nib.Nifti1Image((200 - voxels(ndim)).astype(np.float32), turn @ header).to_filename(tmp_path / "a.nii.gz")
    found = kept(tmp_path / "a.nii.gz", tmp_path / "kept")
    image = read_image(tmp_path / "a.nii.gz")
    index = image.grid.to_index(found.grid.points())[0]
    outside = ((index < -0.6) | (index > torch.tensor(image.grid.shape) - 0.4)).any(1).reshape(found.grid.shape).numpy()
    assert 0.2 < outside.mean() < 0.8 and not found.values[0][outside].any() and found.values[0][~outside].mean() > 0.5


@both
def test_a_scan_is_read_once(ndim, tmp_path, monkeypatch):
    path, marks = write_scan(tmp_path / "a.nii.gz", ndim), write_labels(tmp_path / "a_seg.nii.gz", ndim)
    first = kept(path, tmp_path / "kept", labels=marks)
    monkeypatch.setattr(scans, "read_image", None)
    again = prepare(first.listed, None, 6.0, tmp_path / "kept")
    assert np.array_equal(again.values, first.values) and np.array_equal(again.labels, first.labels)
    assert torch.equal(again.grid.affine, first.grid.affine) and torch.equal(again.middle, first.middle)
    assert isinstance(again.values, np.memmap)  # many scans need no memory


def test_what_was_kept_serves_only_for_what_it_was_made_of(tmp_path):
    """Another size of voxels, a changed scan and changed labels are read anew; without an image that was read already, from the file."""
    path, marks = write_scan(tmp_path / "a.nii.gz", 2), write_labels(tmp_path / "a_seg.nii.gz", 2)
    first = kept(path, tmp_path / "kept", labels=marks)
    assert prepare(first.listed, None, 7.0, tmp_path / "kept").grid.shape != first.grid.shape
    assert prepare(Listed(path), None, 6.0, tmp_path / "kept").labels is None
    write_scan(path, 2, person=3)
    touched(path)
    changed = prepare(first.listed, None, 6.0, tmp_path / "kept")
    assert abs(changed.values.astype(float) - first.values).max() > 0.1 and np.array_equal(changed.labels, first.labels)
    write_labels(marks, 2, person=3)
    touched(marks)
    marked = prepare(first.listed, None, 6.0, tmp_path / "kept")
    assert np.array_equal(marked.values, changed.values) and (marked.labels != first.labels).mean() > 0.02


def test_what_was_kept_in_part_is_made_again(tmp_path):
    """Written last, the record says that all of it is there."""
    path = write_scan(tmp_path / "a.nii.gz", 2)
    first = kept(path, tmp_path / "kept")
    values = np.array(first.values)
    record, = (tmp_path / "kept").glob("*.json")
    array, = (tmp_path / "kept").glob("*.npy")
    record.unlink()
    array.write_bytes(b"half an array")
    assert np.array_equal(prepare(first.listed, None, 6.0, tmp_path / "kept").values, values)
    assert json.loads(record.read_text())["labels"] is False and len(list((tmp_path / "kept").iterdir())) == 2


@both
def test_label_maps_are_carried_by_world_position(ndim, tmp_path):
    """From another grid than the scan's; a label is never mixed of two."""
    path = write_scan(tmp_path / "a.nii.gz", ndim)
    data = (voxels(ndim) > 40).astype(np.uint8) * 3 + (voxels(ndim) > 90) * 40
    cut = (slice(2, None),) * ndim
    moved = affine(ndim)
    moved[:ndim, 3] += 2 * moved[0, 0]
    nib.Nifti1Image(data[cut].astype(np.uint8), moved).to_filename(tmp_path / "a_seg.nii.gz")
    found = kept(path, tmp_path / "kept", labels=tmp_path / "a_seg.nii.gz")
    assert found.labels.shape == found.grid.shape and set(np.unique(found.labels)) == {0, 3, 43}
    oracle = warp(Image(torch.tensor(data[None, None]), Grid(data.shape, read_image(path).grid.affine)), Matrix.identity(ndim), found.grid,
                  kernel="nearest", antialias="none").data[0, 0].numpy()
    there = found.labels > 0
    assert there.any() and np.array_equal(found.labels[there], oracle[there]) and abs(there.sum() / (oracle > 0).sum() - 1) < 0.05


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda path: path.unlink(), "labels: .*a_seg.nii.gz does not exist"),
    (lambda path: path.write_text("no map"), "labels: .*a_seg.nii.gz"),
    (lambda path: nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)).to_filename(path),
     "labels: .*a_seg.nii.gz is 3D, its scan is 2D; give a label map of that scan"),
], ids=["absent", "text", "3D"])
def test_label_maps_that_cannot_be_read_are_named(spoil, message, tmp_path):
    path, marks = write_scan(tmp_path / "a.nii.gz", 2), write_labels(tmp_path / "a_seg.nii.gz", 2)
    spoil(marks)
    with pytest.raises((FormatError, GeometryError), match=message):
        kept(path, tmp_path / "kept", labels=marks)


@both
@pytest.mark.parametrize("how", ["LAS", "permuted", "both"])
def test_how_a_scan_is_stored_changes_nothing(ndim, how, tmp_path):
    path, marks = write_scan(tmp_path / "a.nii.gz", ndim), write_labels(tmp_path / "a_seg.nii.gz", ndim)
    plain = kept(path, tmp_path / "kept", labels=marks)
    for name in ("a", "a_seg"):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        data, header = np.asarray(image.dataobj), image.affine.copy()
        if how != "permuted":
            header[:, 3] += header[:, 0] * (data.shape[0] - 1)
            header[:, 0] *= -1
            data = data[::-1]
        if how != "LAS":
            order = [1, 0] if ndim == 2 else [2, 0, 1]
            data, header[:, :ndim] = data.transpose(order), header[:, order]
        (tmp_path / "other").mkdir(exist_ok=True)
        nib.Nifti1Image(data, header).to_filename(tmp_path / "other" / f"{name}.nii.gz")
    again = kept(tmp_path / "other" / "a.nii.gz", tmp_path / "kept", labels=tmp_path / "other" / "a_seg.nii.gz")
    assert again.grid.shape == plain.grid.shape
    torch.testing.assert_close(again.grid.affine, plain.grid.affine, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.middle, plain.middle, atol=1e-2, rtol=0)
    assert abs(again.values.astype(float) - plain.values).max() < 2e-3 and (again.labels != plain.labels).mean() < 0.01


def test_common_labels_are_those_that_all_have_the_largest_first(tmp_path):
    def marked(counts):
        labels = None if counts is None else np.repeat(list(counts), list(counts.values())).reshape(1, -1)
        return Scan(Listed(tmp_path), np.zeros((1, 1, 1)), labels, Grid((1, 1), torch.eye(3)), torch.zeros(2))

    maps = [{0: 50, 5: 3, 2: 6, 7: 1}, {0: 9, 2: 1, 5: 8, 9: 90}]
    assert common_labels([marked(one) for one in maps]) == [5, 2]
    assert common_labels([marked(one) for one in [*maps, {0: 3, 9: 3}]]) == []
    assert common_labels([marked(maps[0]), marked(None)]) == []
    many = marked({0: 5, **{label: label for label in range(1, 60)}})
    assert common_labels([many, many]) == list(range(59, 19, -1))  # no more than a batch can hold


def test_tables_that_are_hostile(tmp_path):
    for text, reason in (("scan,person\na.nii,anna\n,ben\n", "line 3: names no scan"),
                         ("scan\n" + "a" * 200_000 + "\nb\n", "cannot be read")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(FormatError, match=reason):
            listed(tmp_path / "t.csv")
