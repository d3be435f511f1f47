"""A model of real size on a small machine: Qwen3-0.6B's shape, converted and run by the main command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

MAKE = """
import sys, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=True,
    dtype="float32",
)
Qwen3ForCausalLM(config).save_pretrained(sys.argv[1])
"""


@pytest.mark.study
def test_qwen3_of_600_million_parameters_completes_its_steps(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("-c", MAKE, str(tmp_path / "model"))
    options = ["--data", "random", "--seq-len", "16", "--sequences", "2", "--microbatch", "2"]
    options += ["--steps", "2", "--probes", "1", "--reorthogonalize", "none", "--no-audit", "--checkpoint-every", "0"]
    options += ["--out", str(tmp_path / "out")]
    run("scripts/spectrum.py", "--model", str(tmp_path / "model"), *options)
    record = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    print(json.dumps({**record["info"]["program"], **record["info"]["timings"], "seconds": record["info"]["seconds"]}))
    assert record["summary"]["dim"] == 596_049_920
    # Random weights and tokens know nothing. Logits are normal with variance 0.02^2 * 1024, so that the mean over 32
    # tokens of log sum exp(logits) - logit is log(vocabulary) + variance / 2, within four standard errors.
    deviation = 0.02 * 1024**0.5
    expected = np.log(151936) + deviation**2 / 2
    np.testing.assert_allclose(record["info"]["loss"], expected, atol=4 * deviation / 32**0.5)
    assert record["summary"]["sizes"] == [2]
