"""Eight simulated devices for every test, set before JAX starts."""

import gc
from pathlib import Path

import jax  # reads the flags when its first array is made
import pytest

from jaxhess.command import compile_quickly

# The default suite is nearly all compilation. Slow tests and the main command run in processes of their own, with
# everything on.
compile_quickly()

jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """A tenth of the time went into looking for garbage among modules, which live to the end, and in traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def float64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_freed():
    """Each program takes memory maps, of which Linux allows a process 65,530; XLA's compiler crashes beyond them.

    A module adds some thousands. Half of the limit is left to the next one.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()  # https://github.com/jax-ml/jax/issues/27201
