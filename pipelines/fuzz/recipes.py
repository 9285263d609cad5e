"""Cases: which file, what is done to it, and through which door it goes. Hypothesis draws them; by seed and number they are the same
again."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from itertools import pairwise
from typing import Any

from fixed import DOORS, RECIPES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from seeds import MAKERS, seed

Recipe = dict[str, Any]

WEIGHT = {"nifti": 20, "nrrd": 12, "png": 10, "tfm": 12, "csv": 12, "net": 6, "tensors": 6, "mha": 4, "json": 4}
"""How often a format comes, all its layouts together; 2 for others."""
ROUND = 200  # cases drawn at once
INTS = [0, 1, -1, 2, 3, 4, 7, 8, 16, 64, 127, 128, 255, 256, 512, 1024, 1536, 2304, 32767, -32768, 32768, 65535, 2**24, 2**31 - 1, -(2**31),
        2**31, 2**32 - 1, 2**63 - 1, -(2**63), 10**30]
FLOATS = ["nan", "inf", "-inf", 0.0, -0.0, 1e-45, 1e-38, 1e-10, 0.5, 1.0, -1.0, 1e3, 1e10, 3.4e38, -3.4e38, 1e300]
WORDS = ["", "0", "-1", "1", "2", "3", "5", "1e5", "1e999", "-1e999", "nan", "NaN", "inf", "1_000", "0x10", "1,5", "1.5.5", "٣", "½",
         "9" * 30, "2147483648", "65536", "9" * 400, "true", "null", "a", "é", "\0", "a\0b", "'", '"', "\"x\"", "..", "/etc/passwd",
         "../../../../etc/passwd", "~nobody/x", "file%03d", "%s%n", "{}", "$(id)", "`id`", "; id", "=1+1", "LOCAL", "LIST", "LIST 2D",
         "raw", "gzip", "bzip2", "hex", "ascii", "double", "short", "block", "MET_DOUBLE", "MET_FLOAT_ARRAY", "big", "none",
         "left-posterior-superior-time", "(1,0,0)", "(nan,0,0)", "AffineTransform_double_2_2", "CompositeTransform_double_3_3",
         "DisplacementFieldTransform_double_3_3", "BSplineTransform_double_3_3", "x", "y", "z", "X", "fixed", "moving", "id", "RAS", "lps"]
RAW = ["null", "true", "0", "-1", "1.5", "1e999", "NaN", "-Infinity", "9" * 30, "9" * 400, "1e-400", '""', '"a"', '"\\u0000"', '"\\ud800"',
       '"é"', "[]", "{}", "[[]]", "[1]", "[1,2,3]", '{"a":1}', "2", "3", "64", "1000000000", '"F64"', '"F4"', '"I8"', '"BF16"', '"C64"',
       '"F8_E4M3"', '"../../../etc/passwd"', '"~nobody/x"', "[0, 18446744073709551615]", "[4294967296, 4294967296]"]
FIELDS = ["sizeof_hdr", "dim", "dim", "dim", "pixdim", "pixdim", "datatype", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter",
          "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z", "magic",
          "xyzt_units", "intent_code", "dim_info", "cal_max", "slice_end"]


@cache
def _changes(name: str) -> st.SearchStrategy[list[Any]]:
    """One change that such a file can undergo."""
    at = st.integers(0, 2**20)
    head = st.sampled_from([0, 4, 64, 128, 352, 540])
    word, raw = st.sampled_from(WORDS), st.sampled_from(RAW)
    often = st.sampled_from([1, 1, 1, 1, 1, 300, 100_000])
    every = [
        st.tuples(st.just("cut"), st.integers(0, 65535)),
        st.tuples(st.just("flip"), st.lists(st.integers(0, 2**23), min_size=1, max_size=8), head),
        st.tuples(st.just("fill"), at, st.integers(1, 64), st.sampled_from([0, 0, 32, 255, 255, 300, 301, 302]), head),
        st.tuples(st.just("insert"), at, word, often, head),
        st.tuples(st.just("drop"), at, st.integers(1, 64), head),
        st.tuples(st.just("splice"), st.sampled_from(list(MAKERS)), st.integers(0, 65535)),
    ]
    format, suffix = name.split()[0], seed(name).suffix
    own: list[st.SearchStrategy[Any]] = []
    if format == "nifti":
        number = st.one_of(st.sampled_from(INTS), st.sampled_from(FLOATS), st.integers(-9, 99), st.floats(width=32, allow_nan=False,
                                                                                                          allow_infinity=False))
        own = [st.tuples(st.just("field"), st.sampled_from(FIELDS), st.integers(0, 15), number)] * 4 + [
            st.tuples(st.just("affine"), st.sampled_from(["sform", "qform"]),
                      st.sampled_from(["nan", "inf", "zero", "huge", "tiny", "singular", "flip"])),
            st.tuples(st.just("field"), st.just("magic"), st.just(0), st.sampled_from(["n+1", "ni1", "n+2", "ni2", "", "xxx"])),
            st.tuples(st.just("swap"), st.sampled_from([2, 4, 8]), st.sampled_from([4, 348, 352, 540]))]
    elif format == "png":
        own = [st.tuples(st.just("ihdr"), st.integers(0, 6), st.sampled_from([*INTS, 5, 6, 9, 70, 90])),
               st.tuples(st.just("chunk"), st.sampled_from(["drop", "double", "put", "repack", "repack"]), st.integers(0, 9),
                         st.sampled_from(["tEXt", "zTXt", "iCCP", "tRNS", "PLTE", "IDAT", "IEND", "sBIT", "acTL", "abcd"]),
                         st.integers(0, 40))] * 2
    elif suffix in (".json", ".mrk.json", ".safetensors"):
        own = [st.tuples(st.just("node"), st.integers(0, 999), st.sampled_from(["value", "value", "value", "drop", "nest"]), raw,
                         st.sampled_from([1, 1, 1, 1, 5, 5000, 200_000]))] * 5
        if suffix == ".safetensors":
            own += [st.tuples(st.just("length"), st.sampled_from([*INTS, 100, 1000, 10**8, 10**8 + 1, 2**53]))]
    if suffix not in (".nii", ".nii.gz", ".png", ".safetensors", ".h5", ".mat", ".jpg", ".bmp", ".tif", ".mgh", ".mgz", ".hdr"):
        own += [st.tuples(st.just("word"), at, word, often)] * 3 + [
            st.tuples(st.just("line"), st.sampled_from(["drop", "double", "put", "value", "value", "swap"]), st.integers(0, 40), word),
            st.tuples(st.just("ends"), st.sampled_from(["\r\n", "\r", "\v", "\u2028", "\n\n"])),
            st.tuples(st.just("encode"), st.sampled_from(["utf-16", "utf-8-sig", "latin-1", "utf-32", "utf-7"]))]
    return st.one_of([st.one_of(own)] * 2 + [st.one_of(every)]) if own else st.one_of(every)


def _often(table: dict[str, int]) -> st.SearchStrategy[str]:
    return st.sampled_from([name for name, times in table.items() for _ in range(times)])


_BY_FORMAT = {name.split()[0]: [other for other in MAKERS if other.split()[0] == name.split()[0]] for name in MAKERS}


_FORMATS = _often({format: WEIGHT.get(format, 2) for format in _BY_FORMAT})
_LAYOUTS = {format: st.sampled_from(names) for format, names in _BY_FORMAT.items()}
_DOORS = {kind: _often(table) for kind, table in DOORS.items()}


@cache
def _rows(name: str, least: int, most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(_changes(name), min_size=least, max_size=most)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """One case, as JSON can hold it."""
    name = draw(_LAYOUTS[draw(_FORMATS)])
    packed = seed(name).packed
    made: Recipe = {"seed": name, "door": draw(_DOORS[seed(name).kind]), "inner": [list(c) for c in draw(_rows(name, 1 - packed, 3))],
                    "outer": []}
    if packed and (not made["inner"] or draw(st.booleans())):
        made["outer"] = [list(c) for c in draw(_rows("mat", 1, 2))]  # "mat": what any bytes can undergo
    return made


def numbered(seed: int, count: int) -> list[Recipe]:
    """The first cases are the fixed ones of fixed.py, the others are drawn. Case N of a seed is the same whatever the count."""
    found: list[Recipe] = list(RECIPES)
    known, part = set(), 0
    while len(found) < count:
        for recipe in _drawn(seed * 100_003 + part):
            if (text := json.dumps(recipe)) not in known:
                known.add(text)
                found.append(recipe)
        part += 1
    return found[:count]


def _drawn(seed: int) -> list[Recipe]:
    """Some hundred cases. Hypothesis varies what it has just drawn: of such a row only the first is taken."""
    found: list[Recipe] = []

    @seeded(seed)
    @settings(max_examples=ROUND, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(recipes())
    def draw(recipe: Recipe) -> None:
        found.append(recipe)

    draw()
    return [one for before, one in pairwise(found) if (one["seed"], one["door"]) != (before["seed"], before["door"])]


def told(recipe: Recipe) -> str:
    """A recipe in one line that a terminal can show."""
    text = f"{recipe['seed']} → {recipe['door']}: {[*recipe.get('inner', ()), *recipe.get('outer', ())]}"
    text = "".join(c if not unicodedata.category(c).startswith("C") else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) < 300 else text[:297] + "…"
