"""``--seed N``: replay one run; also by the environment variable FUSEDISK_SEED."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay one random run of tests/differential")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seeds(count, first=0): how many seeds a test runs with")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``seed`` of a test is the one asked for, or each of its ``seeds`` marker."""
    if "seed" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("seeds")
    count, first = (marker.args[0], marker.kwargs.get("first", 0)) if marker is not None else (1, 0)
    asked = metafunc.config.getoption("--seed", default=None)
    if asked is None and "FUSEDISK_SEED" in os.environ:
        asked = int(os.environ["FUSEDISK_SEED"])
    metafunc.parametrize("seed", range(first, first + count) if asked is None else [asked])
