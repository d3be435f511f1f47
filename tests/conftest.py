"""Eight simulated devices for every test, set before JAX starts."""

import jax  # reads the flags when its first array is made
import pytest

from jaxhess.command import compile_quickly

# The default suite is nearly all compilation. Slow tests and the main command run in processes of their own, with
# everything on.
compile_quickly()

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def float64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_freed():
    """Each program takes memory maps, of which Linux allows a process 65,530; XLA's compiler crashes beyond them."""
    yield
    jax.clear_caches()  # https://github.com/jax-ml/jax/issues/27201
