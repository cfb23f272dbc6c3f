"""One training for the faults that need no particular method."""

import pytest

from tests.faults.harness import Training


@pytest.fixture(scope="session")
def sft(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("faults") / "sft", "sft")
