"""What the tests of files share."""

import locale

import pytest


@pytest.fixture(autouse=True)
def same_locale():
    """GDCM's DICOM writer leaves the whole process in the C locale."""
    place = locale.setlocale(locale.LC_CTYPE)
    yield
    locale.setlocale(locale.LC_CTYPE, place)
