"""Eight simulated devices for every test, set before JAX starts."""

import importlib.metadata
import os

import jax  # reads the flags when its first array is made
import pytest

# The default suite is nearly all compilation: leave out LLVM's optimisations, and where XLA has both its older code
# generator, which compiles in a third of the time; that changes speed and not mathematics. Slow tests and the main
# command run in processes of their own, with everything on.
FLAGS = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def float64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield
