"""`regkit doctor` as a user meets it: what it prints, its exit codes, its copies, and the same from Python and in `register`."""

import errno
import json
import os

import nibabel as nib
import numpy as np
import pytest

import regkit
from regkit.cli import run
from regkit.registration.mirror import Mirrored

RAS = np.array([[3.0, 0, 0, -30], [0, 3, 0, -30], [0, 0, 3, -30], [0, 0, 0, 1]])


def save(path, *, affine=RAS, q=None, sform=1, qform=1, unit="mm", data=None):
    if data is None:
        draw = np.random.default_rng(3)
        data = np.kron(draw.random((4, 4, 4)), np.ones((5, 5, 5))).astype(np.float32)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine if q is None else q, qform)
    image.header.set_xyzt_units(unit)
    image.to_filename(path)
    return path


def shifted(mm):
    moved = RAS.copy()
    moved[0, 3] += mm
    return moved


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "good.nii.gz")
    save(tmp_path / "apart.nii.gz", q=shifted(7))
    save(tmp_path / "lost.nii", sform=0, qform=0)
    save(tmp_path / "unitless.nii", unit="unknown")
    save(tmp_path / "mask.nii.gz", affine=shifted(4), data=np.ones((20, 20, 20), np.uint8))
    (tmp_path / "text.nii").write_text("no scan")
    return tmp_path


@pytest.mark.parametrize(("files", "code"), [
    (["good.nii.gz"], 0), (["unitless.nii"], 0), (["apart.nii.gz"], 3), (["good.nii.gz", "lost.nii"], 3), (["text.nii"], 2),
    (["apart.nii.gz", "text.nii", "gone.nii"], 2), (["good.nii.gz", "--mask", "good.nii.gz"], 0),
    (["good.nii.gz", "--mask", "mask.nii.gz"], 3),
])
def test_exit_codes(place, files, code, capsys):
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    assert run(["doctor", *files, "--quiet"]) == code
    said = capsys.readouterr()
    assert said.out == "" and (len(said.err.splitlines()) == sum(name in ("text.nii", "gone.nii") for name in files))
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


def test_what_people_read(place, capsys):
    assert run(["doctor", "good.nii.gz", "apart.nii.gz", "lost.nii"]) == 3
    text = capsys.readouterr().out
    good, apart, lost = text.index("good.nii.gz: nothing found"), text.index("apart.nii.gz: 1 finding"), text.index("lost.nii: 2 findings")
    assert good < apart < lost < text.index("doubtful  no-orientation") < text.index("note      mirrored")
    block = text[apart:lost]
    for word in ("doubtful  sform-qform", "what      sform and qform put a corner of the scan up to 7 mm apart", "why ",
                 "regkit    uses the sform", "repair    --fix sets both"):
        assert word in block
    assert all(len(line) <= 120 for line in text.splitlines())


def test_json_and_python_say_the_same(place, capsys):
    files = ["good.nii.gz", "apart.nii.gz", "lost.nii"]
    assert run(["doctor", *files, "--json"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"files": [regkit.doctor(file).record() for file in files], "refused": []}
    assert run(["doctor", "good.nii.gz", "text.nii", "--mask", "mask.nii.gz"]) == 2
    assert "mask: given with 2 files" in capsys.readouterr().err
    assert run(["doctor", "good.nii.gz", "--mask", "mask.nii.gz", "--json"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == [regkit.doctor("good.nii.gz", mask="mask.nii.gz").record()]
    assert [one["code"] for one in printed["files"][0]["findings"]] == ["mask-place"]
    assert run(["doctor", "text.nii", "apart.nii.gz", "--json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert [one["path"] for one in printed["files"]] == ["apart.nii.gz"] and printed["refused"][0]["path"] == "text.nii"


def test_one_copy_equals_that_of_python_and_is_clean(place, capsys):
    before = (place / "apart.nii.gz").read_bytes()
    assert run(["doctor", "apart.nii.gz", "--fix", "copy.nii.gz"]) == 3
    text = capsys.readouterr().out
    assert "corrected sform-qform" in text and "left      nothing" in text and "written   copy.nii.gz" in text
    found = regkit.doctor("apart.nii.gz", fix="python.nii.gz")
    assert (place / "python.nii.gz").read_bytes() == (place / "copy.nii.gz").read_bytes()
    assert (found.copy, found.corrected, found.left) == ("python.nii.gz", ("sform-qform",), ())
    assert run(["doctor", "copy.nii.gz"]) == 0 and (place / "apart.nii.gz").read_bytes() == before
    assert np.array_equal(nib.load("copy.nii.gz").get_fdata(), nib.load("apart.nii.gz").get_fdata())


def test_several_copies_go_into_a_folder(place, capsys):
    (place / "other").mkdir()
    save(place / "other" / "lost.nii", q=shifted(7))
    assert run(["doctor", "apart.nii.gz", "lost.nii", "good.nii.gz", "--fix", "out", "--quiet"]) == 3
    assert sorted(p.name for p in (place / "out").iterdir()) == ["apart.nii.gz", "good.nii.gz", "lost.nii"]
    assert run(["doctor", *(f"out/{p.name}" for p in (place / "out").iterdir()), "--quiet"]) == 0
    whole = (place / "out" / "lost.nii").read_bytes()
    assert run(["doctor", "lost.nii", "apart.nii.gz", "--fix", "out", "--quiet"]) == 2
    assert "lost.nii exists" in capsys.readouterr().err and (place / "out" / "lost.nii").read_bytes() == whole
    assert run(["doctor", "lost.nii", "other/lost.nii", "--fix", "out", "--overwrite", "--quiet"]) == 2
    assert "several files would be copied to out/lost.nii" in capsys.readouterr().err
    assert run(["doctor", "lost.nii", "apart.nii.gz", "--fix", "out", "--overwrite", "--quiet"]) == 3


def test_units_and_straightening_are_asked_for(place, capsys):
    save(place / "metres.nii", affine=np.diag([0.003, 0.003, 0.003, 1]))
    save(place / "sheared.nii", affine=RAS @ (np.eye(4) + 0.3 * np.eye(4, k=1) * [[1], [0], [0], [0]]), qform=0)
    for file, code, option in (("metres.nii", "small-scan", ["--units", "m"]), ("sheared.nii", "shear", ["--straighten"])):
        assert run(["doctor", file, "--fix", "a.nii", "--overwrite", "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["files"][0]["corrected"] == []
        assert run(["doctor", file, "--fix", "a.nii", "--overwrite", "--json", *option]) == 3
        assert json.loads(capsys.readouterr().out)["files"][0]["corrected"] == [code]
        assert regkit.doctor("a.nii").findings == ()
    assert np.allclose(nib.load("a.nii").header.get_zooms(), np.linalg.norm(nib.load("sheared.nii").affine[:3, :3], axis=0))


@pytest.mark.parametrize(("argv", "message"), [
    ([], "FILE is missing"),
    (["good.nii.gz", "--units", "um"], "units: given without --fix"),
    (["good.nii.gz", "--straighten"], "straighten: given without --fix"),
    (["good.nii.gz", "--fix", "o.nii", "--units", "cm"], "use one of mm, um, m"),
    (["good.nii.gz", "--fix", "o.png"], "give a name that ends in .nii or .nii.gz"),
    (["good.nii.gz", "--fix", "good.nii.gz", "--overwrite"], "is the scan itself, which is never touched"),
    (["good.nii.gz", "--fix", "apart.nii.gz"], "apart.nii.gz exists"),
    (["good.nii.gz", "--fix", "text.nii/o.nii"], "output: "),
    (["good.nii.gz", "--mask", "gone.nii"], "mask: gone.nii does not exist"),
    (["good.nii.gz", "--fixed", "gone.nii"], "fixed: gone.nii does not exist"),
    (["good.nii.gz", "--fixed", "flat.nii"], "fixed: is 2D, the scan is 3D"),
    (["gone.nii"], "scan: gone.nii does not exist"),
])
def test_mistakes(place, argv, message, capsys):
    save(place / "flat.nii", data=np.random.default_rng(0).random((20, 20)).astype(np.float32))
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    assert run(["doctor", *argv]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("regkit: error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


@pytest.mark.parametrize("why", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_leaves_nothing_behind(place, capsys, monkeypatch, why):
    def refuse(*_):
        raise OSError(why, os.strerror(why))

    before = {p.name: p.read_bytes() for p in place.iterdir()}
    monkeypatch.setattr("regkit.io.output.os.replace", refuse)
    assert run(["doctor", "apart.nii.gz", "--fix", "new/a.nii.gz", "--quiet"]) == 2
    assert "output: new/a.nii.gz cannot be written" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


def test_mirror_images_are_compared_where_asked(place, capsys, monkeypatch):
    asked = []

    def look(fixed, moving, progress=None, **_):
        asked.append((fixed.source, moving.source))
        return Mirrored(0.5, 0.7)

    monkeypatch.setattr("regkit.registration.doctor.compare", look)
    assert run(["doctor", "good.nii.gz", "--fixed", "unitless.nii"]) == 3
    text = capsys.readouterr().out
    assert asked == [("unitless.nii", "good.nii.gz")]
    assert "doubtful  flip" in text and "mirror    0.500 as it is, 0.700 mirrored left to right (ngf, 1 is equal): mirrored" in text
    monkeypatch.setattr("regkit.registration.doctor.compare", lambda *_, **__: Mirrored(0.7, 0.695))
    assert run(["doctor", "good.nii.gz", "--fixed", "unitless.nii"]) == 0
    assert "too symmetric to tell" in capsys.readouterr().out
    assert run(["doctor", "good.nii.gz", "--fixed", "unitless.nii", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["mirror"] == {
        "measure": "ngf", "as_it_is": 0.7, "mirrored": 0.695, "margin": 0.03, "verdict": "too symmetric to tell"}


def test_a_scan_that_is_refused_is_examined_and_not_compared(place, capsys):
    image = bytearray((place / "lost.nii").read_bytes())
    image[254:256], image[280:328] = b"\x01\x00", np.zeros(12, "<f4").tobytes()
    (place / "broken.nii").write_bytes(image)
    assert run(["doctor", "broken.nii", "--mask", "mask.nii.gz", "--fixed", "good.nii.gz", "--json"]) == 3
    (found,) = json.loads(capsys.readouterr().out)["files"]
    assert [one["code"] for one in found["findings"]] == ["sform-unusable"] and found["mirror"] is None


def test_register_records_all_and_says_the_doubtful(place, capsys):
    command = ["register", "apart.nii.gz", "unitless.nii", "--fixed-mask", "mask.nii.gz", "--start", "header", "--levels", "0",
               "--threads", "1"]
    assert run([*command, "-o", "out", "--json"]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("regkit: ")]
    assert [line.split(": ")[1] for line in lines] == ["fixed", "fixed_mask"]
    assert "doubtful: sform and qform put a corner" in lines[0] and "see regkit doctor apart.nii.gz" in lines[0]
    record = json.loads(said.out)
    codes = {name: [one["code"] for one in item["findings"]] for name, item in record["inputs"].items()}
    assert codes == {"fixed": ["sform-qform"], "moving": ["unit-missing"], "fixed_mask": ["mask-place"]}
    assert record["inputs"]["fixed"]["findings"] == [one.as_dict() for one in regkit.doctor("apart.nii.gz").findings]
    assert run([*command, "-o", "quiet", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert record["matrix"] == json.loads((place / "quiet" / "registration.json").read_text())["matrix"]


def test_scans_in_memory_have_no_findings(place):
    scan = nib.load("apart.nii.gz")
    for given in (scan, (scan.get_fdata(), scan.affine), regkit.read_image("apart.nii.gz")):
        found = regkit.align(given, "good.nii.gz", start="header", levels=0, threads=1)
        assert found.trace["inputs"]["fixed"]["findings"] == found.trace["inputs"]["moving"]["findings"] == []
