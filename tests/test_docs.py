"""The documentation is true: its code runs, its links lead somewhere, and it names every option there is."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image as Picture
from scipy.ndimage import gaussian_filter

from regkit.cli import run
from regkit.training.fit import Plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", ROOT / "pipelines" / "README.md"]
NO_RUN = re.compile(r"<!-- no-run: \S.* -->")
SPACING, SIZE = 4.0, 30


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str, str, bool]]:
    """(line, language, text, whether it runs) of every fenced block; a no-run comment right before it spares it."""
    found, lines, start = [], page.read_text(encoding="utf-8").splitlines(), None
    for n, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = n
        else:
            runs = not NO_RUN.fullmatch(lines[start - 1] if start else "")
            found.append((start + 1, lines[start][3:].strip(), "\n".join(lines[start + 1: n]) + "\n", runs))
            start = None
    assert start is None, f"{_name(page)}:{start}: a fence is not closed"
    return found


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """The files that the pages speak of: one small head of blobs, seen twice, 8° and a few mm apart."""
    folder = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    at = np.stack(np.meshgrid(*[np.arange(SIZE) - SIZE / 2 + 0.5] * 3, indexing="ij"), -1)
    texture = gaussian_filter(rng.normal(size=(SIZE,) * 3), 1.5)
    head = (((at / [9.5, 12, 8]) ** 2).sum(-1) < 1) * (80 + 25 * texture / texture.std()).clip(20)
    head = gaussian_filter(head, 0.7).astype(np.float32)
    here = np.diag([SPACING, SPACING, SPACING, 1.0])
    here[:3, 3] = -SPACING * (SIZE - 1) / 2
    c, s = np.cos(0.14), np.sin(0.14)
    there = np.array([[c, -s, 0, 6], [s, c, 0, -4], [0, 0, 1, 3], [0, 0, 0, 1.0]]) @ here

    def save(name: str, voxels: np.ndarray, affine: np.ndarray) -> None:
        nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / name)

    for name in ("fixed", "mr", "template"):
        save(f"{name}.nii.gz", head, here)
    for name in ("moving", "ct"):
        save(f"{name}.nii.gz", head ** 0.8, there)
    save("bold.nii.gz", np.stack([head, 0.9 * head, 0.8 * head], -1), there)
    regions = ((head > 40) + (head > 90)).astype(np.uint8)
    save("labels.nii.gz", regions, there)
    save("fixed_labels.nii.gz", regions, here)
    save("ct_labels.nii.gz", regions, there)
    for name in ("fixed", "moving"):
        save(f"{name}_mask.nii.gz", np.ones(head.shape, np.uint8), here if name == "fixed" else there)
    sitk.WriteImage(sitk.ReadImage(str(folder / "moving.nii.gz")), str(folder / "moving.nrrd"))
    index = np.array([[10, 12, 14, 1.0], [18, 16, 15, 1], [15, 9, 12, 1]])
    for names, affine in ((["fixed_points"], here), (["moving_points", "ct_points"], there), (["ct_voxels"], np.eye(4))):
        rows = [f"{x},{y},{z},p{k}" for k, (x, y, z) in enumerate((index @ affine.T)[:, :3])]
        for name in names:
            (folder / f"{name}.csv").write_text("\n".join(["x,y,z,name", *rows]) + "\n")
    (folder / "points.fcsv").write_text("# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n1,5,-10,0,a\n2,-8,4,6,b\n")
    (folder / "pairs.csv").write_text(
        "id,group,fixed,moving,fixed_labels,moving_labels,fixed_points,moving_points\nanna,head,fixed.nii.gz,moving.nii.gz,"
        "fixed_labels.nii.gz,labels.nii.gz,fixed_points.csv,moving_points.csv\n")
    (folder / "runs" / "ants" / "anna").mkdir(parents=True)
    sitk.WriteTransform(sitk.AffineTransform(np.array([c, s, 0, -s, c, 0, 0, 0, 1.0]), (-6.0, 4.0, 3.0)),
                        str(folder / "runs" / "ants" / "anna" / "transform.mat"))
    plane = np.clip(head[:, :, SIZE // 2], 0, 255).astype(np.uint8)
    Picture.fromarray(plane).save(folder / "fixed.png")
    Picture.fromarray(np.roll(plane, 2, 0)).save(folder / "moving.png")
    (folder / "moving_pixels.csv").write_text("x,y\n12,14\n17,20\n")
    (folder / "scans").mkdir()
    for k, name in enumerate(("anna", "ben", "clara", "dora")):
        stretched = np.diag([1 + 0.02 * k, 1 - 0.02 * k, 1, 1]) @ here
        for what, voxels in (("t1", head), ("seg", regions)):
            nibabel.save(nibabel.Nifti1Image(voxels, stretched), folder / "scans" / f"{name}_{what}.nii.gz")
    (folder / "scans.csv").write_text("scan,labels,person,split\n" + "".join(
        f"scans/{name}_t1.nii.gz,scans/{name}_seg.nii.gz,{name},{split}\n"
        for name, split in (("anna", "train"), ("ben", "train"), ("clara", "train"), ("dora", "validation"))))
    (folder / "train.yaml").write_text("scans: scans.csv\noutput: run_yaml\nsteps: 4000\nturn: 60\n")
    return folder


@pytest.fixture
def place(scans, tmp_path, monkeypatch) -> Path:
    """A folder with the files, and a quick walk: what the pages promise about files and directions needs few points."""
    for file in scans.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regkit.registration.steps.POINTS", (500, 1000, 2000), raising=False)
    monkeypatch.setattr("regkit.registration.start.SEARCH_POINTS", (100, 150), raising=False)
    monkeypatch.setattr("regkit.training.train.Plan", _two_steps)
    monkeypatch.setattr("regkit.training.train._CASES", 2)
    monkeypatch.setattr("regkit.training.train._STARTS", ("header",))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def _two_steps(steps: int, *given, **options) -> Plan:
    """Trainings on the pages are as short as can be."""
    return Plan(2, *given, **options | {"look_every": 2})


def commands(text: str) -> list[list[str]]:
    """The command lines of a shell block, continued lines joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_code_runs(page, place, request):
    if _name(page) == "docs/training.md":
        request.getfixturevalue("unjudged")  # every net there is compared with other starts, in dozens of registrations
    space: dict[str, object] = {"__name__": "__docs__"}
    for line, language, text, runs in blocks(page):
        where = f"{_name(page)}:{line}"
        if not runs:
            assert not any(words[0] == "regkit" for words in commands(text)), f"{where}: regkit's own lines must run"
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, where, "exec"), space)
        elif language in ("bash", "console"):
            for words in commands(text):
                assert words[0] == "regkit", f"{where}: {words[0]} does not run here; say why: <!-- no-run: reason -->"
                said = io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    code = run(words[1:])
                assert code == 0, f"{where}: {shlex.join(words)} gave {code}: {said.getvalue()}"
        else:
            assert language == "text", f"{where}: a block in {language or 'no language'}; use python, bash, console or text"
    if _name(page) == "docs/apply.md":
        _same_places(place / "ct_points.csv", place / "ct_points_again.csv")
    if _name(page) == "docs/python.md":
        losses = space["losses"]
        assert isinstance(losses, list) and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])  # the net of the page learns


def _same_places(one: Path, other: Path) -> None:
    a, b = (np.genfromtxt(path, delimiter=",", skip_header=1, usecols=(0, 1, 2)) for path in (one, other))
    assert np.abs(a - b).max() < 1e-6


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", _prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{_name(page)}: {target} leads nowhere"
        assert not anchor or anchor in _anchors(file), f"{_name(page)}: {target} has no such heading"


@pytest.mark.parametrize("page", [ROOT / "docs" / "architecture.md", ROOT / "docs" / "method.md", *OTHERS[:1]], ids=_name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8").split("## Where it departs")[0]  # which also names what was not built
    names = set(re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|md|toml|txt|yml)|(?:[\w.]+/)+)`", text))
    assert names
    for name in names:
        places = [ROOT / name, ROOT / "regkit" / name, *(ROOT / "regkit").glob(f"*/{name}"), *(ROOT / "docs").glob(name)]
        assert any(p.exists() for p in places) or name in ("evaluation/",), f"{_name(page)} names {name}, which is not there"


def test_every_room_is_on_the_plan():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = text.split("## The rooms")[1].split("## Which way")[0]
    for file in (ROOT / "regkit").iterdir():
        if file.is_dir() and any(file.glob("*.py")):
            assert f"`regkit/{file.name}/`" in rooms, f"{file.name} is a room that docs/architecture.md does not draw"
        elif file.suffix == ".py" and file.name != "__main__.py":
            assert f"`regkit/{file.name}`" in rooms, f"{file.name} is a room that docs/architecture.md does not draw"
    for file in (ROOT / "regkit" / "registration").glob("*.py"):
        assert f"`{file.name}`" in rooms or file.name == "__init__.py", f"docs/architecture.md leaves out {file.name}"


def _options(verb: str) -> set[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run([verb, "--help"]) == 0
    options = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*|-[a-z])(?![\w-])", said.getvalue().split("Parameters")[1]))
    assert options
    return options


@pytest.mark.parametrize("verb", ["register", "apply", "evaluate", "report", "replay", "doctor", "train"])
def test_every_option_is_explained(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = (ROOT / "docs" / ("training.md" if verb == "train" else f"{verb}.md")).read_text(encoding="utf-8")
    shared = _options("register") - {"--output", "-o", "--overwrite", "--quiet"} if verb == "evaluate" else set()
    for option in _options(verb) - shared:  # what goes on to the registration is explained there
        assert re.search(rf"`{option}[` ]", text), f"docs/{verb}.md does not explain {option}"


def test_options_that_are_explained_exist():
    known = set().union(*map(_options, ("register", "apply", "evaluate", "report", "replay", "doctor", "train"))) | {
        "--help", "--version", "--extra-index-url", "--nproc-per-node"}
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"))):
            assert option in known, f"{_name(page)} speaks of {option}, which no verb has"


@pytest.mark.parametrize("names", ["MODEL_NAMES", "SIMILARITY_NAMES", "START_NAMES", "INTERPOLATION_NAMES"])
def test_every_value_is_explained(names):
    from regkit.registration import settings

    text = (ROOT / "docs" / "register.md").read_text(encoding="utf-8")
    for value in getattr(settings, names):
        assert f"`{value}`" in text or f" {value}`" in text, f"docs/register.md does not explain {value}"


def test_figures_of_the_method_are_those_of_the_code():
    from regkit.registration import blocks, guard, level, outline, pose, pyramid, refine, start, steps, turns, walk

    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    (a, b, c, d), (i, j, k, n) = steps.POINTS, steps.ITERATIONS
    for figure in (f"at most {a:,} at the coarsest level, {b:,} at the second, {c:,}\nat the third, {d:,} at finer",
                   f"At most {i} iterations", f"{j} at the second, {k} at the third, {n} at finer", f"more than {pose.MARGIN} of what",
                   f"(at most {walk.FEW_LEVELS} levels, no constant background)",
                   f"at {walk.UNRELATED_FINE} or more ({walk.UNRELATED[2]} with two levels, {walk.UNRELATED[1]} with one",
                   f"more than {level.TURN} (", f"edges / {pyramid._COARSE} (", f"scored at {start.SEARCH_POINTS[0]} points",
                   f"the best {start.SEARCHED} again at {start.SEARCH_POINTS[1]:,} points", f"between {refine.LEAST_BEND} and 1",
                   f"by {pose.SIFT_POINTS:,} points and {pose.SIFT_ITERATIONS} iterations", f"best {pose.SIFTED} that lie apart",
                   f"best {pose.SETTLED} by the",
                   f"below {pose.UNSURE} ({pose.UNSURE_INSIDE} for a turned pose where a background carries no weight), no pose",
                   f"scores {pose.CONVINCING}**",
                   f"scans, if one has a constant background | below {guard.LITTLE_INSIDE} |",
                   f"as many (within {guard.LIKE_MANY}) along an edge | differ by {guard.ODD_VOXELS} and",
                   f"below {guard.DOUBTFUL} | below {guard.UNRELATED} |",
                   f"more than {pose.LEADING} of what the others leave", f"by less than {pose.SAME_POSE} in",
                   f"each of {start.TURNED} rotations",
                   f"at most {blocks.COUNT:,} blocks", f"by {blocks.REACH} voxels", f"below {blocks.ALIKE} is",
                   f"{blocks.SCALE} of the median", f"as {blocks.PRIOR:g} matches", f"more than {walk.COST} of similarity",
                   f"{pose.LOOKED_ALONG} best turns", f"best {pose.STRUCTURED} are refined by MIND",
                   f"more than {outline.TISSUE} of the other",
                   f"{len(turns.rotations(3)):,} rotations", f"{len(turns.rotations(2))} angles",
                   f"below {guard.FEW_OVERLAP:.0%}".replace("%", " %"), f"below {guard.LEAST_OVERLAP:.0%}".replace("%", " %"),
                   f"beyond {guard.ODD_SCALE:g} or", f"beyond {guard.FAR_SCALE:g} or", f"| above {guard.ODD_SHEAR:g} |"):
        assert figure in text, f"docs/method.md does not say {figure!r}: the code has changed"


def test_every_correction_is_in_the_manual():
    """docs/doctor.md says word for word what a corrected copy does, and its figures are the code's."""
    from regkit.io import findings
    from regkit.registration import mirror

    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for code, fix in findings.FIXES.items():
        assert re.search(rf"^\| `{code}` \|.*\| {re.escape(fix)} \|$", text, flags=re.M), f"docs/doctor.md is wrong about {code}"
    for figure in (f"below {findings.SMALL_SCAN:g} mm", f"beyond {findings.LARGE_SCAN / 1000:g} m or voxels",
                   f"voxels beyond {findings.LARGE_VOXEL:g} mm",
                   f"more than {findings.UNEVEN:g} times", f"beyond {findings.SHEAR}°", f"more than {findings.FAR / 1000:g} m from",
                   f"one measure, `{mirror.MEASURE}`", f"{mirror.ACROSS}\nvoxels across", f"by more than {mirror.MARGIN}"):
        assert figure in text, f"docs/doctor.md does not say {figure!r}"


def test_every_format_is_listed():
    from regkit.io.images import FORMATS
    from regkit.io.transforms import _BINARY, _TEXT

    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for suffix, (_, writable) in FORMATS.items():
        rows = [row for row in text.splitlines() if row.startswith("|") and f"`{suffix}`" in row.split("|")[1]]
        assert rows, f"docs/formats.md does not list {suffix}"
        stated = rows[0].split("|")[3].strip()
        assert stated == ("yes" if writable else "no"), f"docs/formats.md is wrong about writing {suffix}"
    for suffix in (*_TEXT, *_BINARY):
        assert f"`{suffix}`" in text


def test_first_screen():
    top = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:42])
    for part in ("make demo", "pip install", "regkit register", "regkit.align", "docs/images/"):
        assert part in top, f"{part} is not on the README's first screen"
    for command in ("make demo", "make test"):
        assert command in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda p: p.name)
def test_pictures_are_small_and_used(picture):
    assert picture.stat().st_size < {".png": 200_000, ".gif": 500_000}[picture.suffix]
    assert any(f"images/{picture.name}" in page.read_text(encoding="utf-8") for page in PAGES)
