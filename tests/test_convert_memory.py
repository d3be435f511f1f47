"""Host memory of a conversion, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from checkpoints import write_checkpoint

# Peak resident memory counts pages of the mapped files too, so it bounds what the conversion itself allocates.
MEASURE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import convert
from jaxhess.mesh import make_mesh

warm_up, checkpoint, axes = sys.argv[1:]
mesh = make_mesh(axes)
convert.load(warm_up, mesh)  # imports and the compiler, which are no part of a conversion's own memory
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = peak()
model = convert.load(checkpoint, mesh)
arrays = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"arrays": arrays, "beyond": peak() - before - arrays}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak resident memory is read from Linux's /proc")
@pytest.mark.parametrize(("axes", "files"), [("fsdp=8", "one"), ("fsdp=4,tensor=2", "many")])
def test_a_gigabyte_is_converted_in_far_less_than_a_gigabyte_beyond_its_arrays(
    axes: str, files: str, tmp_path: Path
) -> None:
    """The promise is under 1 GB plus the largest tensor; see the printed figure for what it takes (`pytest -s`)."""
    write_checkpoint(tmp_path / "warm_up", "llama")
    options = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
               "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
    config = transformers.LlamaConfig(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "large", max_shard_size="5GB" if files == "one" else "200MB")
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "warm_up"), str(tmp_path / "large"), axes]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    print(f"\n{axes}, {files} file(s): arrays {measured['arrays'] / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB, "
          f"peak beyond the arrays {measured['beyond'] / 1e6:.0f} MB")  # fmt: skip
    assert measured["arrays"] > 1e9
    assert measured["beyond"] < 1e9 + largest  # the promise
    assert measured["beyond"] < 3 * largest + 2**28  # what it is: a tensor, its mapped pages, and a block of layers
