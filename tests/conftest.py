"""Eight simulated devices for every test, set before JAX starts."""

import os

# The default suite is nearly all compilation: leave out LLVM's optimisations, which change speed and not mathematics.
# Slow tests and the main command run in processes of their own, with everything on.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
