"""``--seed N``: replay one run; also by the environment variable FUSEDISK_SEED. ``--first-seed``, ``--seeds`` and
``--batches``: other runs than the usual ones, as many and as long as there is time for::

    scripts/test tests/differential -k some_of_everything --first-seed 1000 --seeds 500 --batches 270
"""

from __future__ import annotations

import os

import pytest

from tests.conftest import require_tool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay one random run of tests/differential")
    parser.addoption("--first-seed", type=int, default=None, help="the first of the random runs")
    parser.addoption("--seeds", type=int, default=None, help="how many random runs")
    parser.addoption("--batches", type=int, default=None, help="how long each is, in batches of some four requests")


@pytest.fixture
def batches(request: pytest.FixtureRequest) -> int | None:
    """How long a run shall be; None leaves it to the scenario."""
    found: int | None = request.config.getoption("--batches")
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "seeds(count, first=0, quick=count): seeds of a test, and how many in quick runs"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``seed`` of a test is the one asked for, or each of its ``seeds`` marker."""
    if "seed" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--seed", default=None)
    if asked is None and "FUSEDISK_SEED" in os.environ:
        asked = int(os.environ["FUSEDISK_SEED"])
    if asked is not None:
        metafunc.parametrize("seed", [asked])
        return
    marker = metafunc.definition.get_closest_marker("seeds")
    count, given = (marker.args[0], marker.kwargs) if marker is not None else (1, {})
    first, quick = given.get("first", 0), given.get("quick", count)
    if (other := metafunc.config.getoption("--first-seed", default=None)) is not None:
        first = other
    if (other := metafunc.config.getoption("--seeds", default=None)) is not None:
        count = quick = other
    slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(first + quick, first + count)]
    metafunc.parametrize("seed", [*range(first, first + quick), *slow])


@pytest.fixture(autouse=True)
def _tools() -> None:
    for tool in ("qemu-img", "qemu-io"):
        require_tool(tool)
