"""Host memory of a conversion, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from checkpoints import write_checkpoint

# Peak resident memory counts pages of mapped files too, so it bounds what the conversion itself allocates.
MEASURE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import convert
from convert.__main__ import main
from jaxhess.distributed.mesh import make_mesh

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def run(source, target):
    if what == "load":
        convert.load(source, make_mesh(axes))
    else:
        main([source, target, "--mesh", axes])

what, axes, folder = sys.argv[1:]
run(f"{folder}/small", f"{folder}/small-orbax")  # imports and compiler, which are no part of a conversion's own memory
before = peak()
run(f"{folder}/large", f"{folder}/large-orbax")
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak resident memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("what", "axes", "shard"),
    [
        pytest.param("load", "fsdp=4,tensor=2", "5GB", marks=pytest.mark.study),
        pytest.param("command", "fsdp=8", "200MB", marks=pytest.mark.slow),
    ],
)
def test_a_gigabyte_is_converted_in_less_than_a_gigabyte_beyond_its_arrays(
    what: str, axes: str, shard: str, tmp_path: Path
) -> None:
    """The promise is 1 GB plus the largest tensor beyond the arrays, 1131 MB here.

    Measured for 1017 MB of float32 on 8 simulated devices: loading 283 MB (216 MB from several files), of which 131 MB
    are the largest tensor and as many its pages in the mapped file; the whole command 550 to 670 MB with Orbax's
    buffers.
    """
    write_checkpoint(tmp_path / "small", "llama")
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "large", max_shard_size=shard)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    del model
    command = [sys.executable, "-c", MEASURE, what, axes, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    beyond = json.loads(result.stdout.splitlines()[-1]) - sum(sizes)
    print(f"\n{what} {axes}: arrays {sum(sizes) / 1e6:.0f} MB, largest tensor {max(sizes) / 1e6:.0f} MB, "
          f"peak beyond the arrays {beyond / 1e6:.0f} MB")  # fmt: skip
    assert sum(sizes) > 1e9
    assert beyond < 1e9 + max(sizes)
    if what == "load":
        assert beyond < 2 * max(sizes) + 2**28  # a tensor, its mapped pages, and what the allocator keeps
