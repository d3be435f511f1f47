"""Plans of published models: makes each in a process of its own, and prints the table of docs/planning.md.

    python -m scripts.benchmarks.plans

The plans are those of `CONFIGS` on `DEVICES`, exact and by finite differences: 512 sequences of 2,048 tokens, one on
each device at a time, in the checkpoint's dtype, without re-orthogonalisation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from jaxhess.command import one_sentence

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "pythia-160m": "Pythia-160M",
    "qwen3-0.6b": "Qwen3-0.6B",
    "deepseek-r1-distill-qwen-1.5b": "DeepSeek-R1-Distill-Qwen-1.5B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "deepseek-r1-distill-llama-70b": "DeepSeek-R1-Distill-Llama-70B",
    "llama-shaped-109b": "109B, Llama-shaped (our own sizes)",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "gpt-oss-120b": "gpt-oss-120b",
}
"""Published `config.json` values in `configs/`, those of 109B made up; by file name, with what the table calls them."""
SPARSE = ("qwen3-30b-a3b", "gpt-oss-120b")
LARGE = ("deepseek-r1-distill-llama-70b", "llama-shaped-109b")
PRODUCTS = ("exact", "finite-difference")
DEVICES = (1, 8, 64, 512)
Plans = Callable[[str, int, str], dict[str, Any]]
"""The plan of a model, by its name, on so many devices, with a kind of product."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make, and where."""

    folder: Path = Path("runs/plans")
    """Where the plans are; those that are missing are made."""
    overwrite: bool = False
    """Make plans again that are there."""
    compile: bool = True
    """Compile the programs, as `scripts/plan.py` does; the table needs only the formulas, in a tenth of the time."""


def mesh(name: str, devices: int) -> dict[str, int]:
    """The mesh for a model on so many devices: `fsdp` up to 64; beyond, `tensor` in a server for large models, `data`
    for small ones. With experts `expert` in a server, and `fsdp` between them."""
    if name in SPARSE:
        return {"expert": devices} if devices <= 8 else {"fsdp": devices // 8, "expert": 8}
    if devices <= 8:
        return {"fsdp": devices}
    if name in LARGE:
        return {"fsdp": devices // 8, "tensor": 8}
    return {"data": devices // 64, "fsdp": 64} if devices > 64 else {"fsdp": devices}


def arguments(name: str, devices: int, hvp: str) -> list[str]:
    """Options of `scripts/plan.py` for one plan."""
    axes = mesh(name, devices)
    shards = math.prod(size for axis, size in axes.items() if axis != "tensor")
    return [
        *(
            "--model",
            f"scripts/benchmarks/configs/{name}.json",
            "--mesh",
            ",".join(f"{k}={v}" for k, v in axes.items()),
        ),
        *("--hvp", hvp, *(("--step", "0.001") if hvp == "finite-difference" else ()), "--seq-len", "2048"),
        *("--sequences", "512", "--microbatch", str(shards), "--reorthogonalize", "none", "--batch-size", "1"),
        "--no-audit",
    ]


def path(folder: Path, name: str, devices: int, hvp: str) -> Path:
    """Where a plan is kept."""
    return folder / f"{name}-{devices}-{hvp}.json"


def table(plans: Plans) -> str:
    """The table of docs/planning.md: a row for each model and number of devices."""
    lines = [
        "| model | devices | mesh | GB on each, exact (finite differences) | fits | TFLOPs on each, a product "
        "| GB received | GPU-hours, H100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in CONFIGS.items():
        for devices in DEVICES:
            exact, central = (plans(name, devices, hvp) for hvp in PRODUCTS)
            lines.append(f"| {title} | {devices} | {_mesh_text(mesh(name, devices))} | {_row(exact, central)} |")
    return "\n".join(lines)


def _row(exact: dict[str, Any], central: dict[str, Any]) -> str:
    formula, cards = exact["formula"], exact["cards"]
    totals = [_short(plan["formula"]["bytes_per_device"]["total"] / 1e9) for plan in (exact, central)]
    fitting = next((kind for kind in ("A100-80GB", "H200", "B200") if cards[kind]["fits"]), None)
    verdict = {"A100-80GB": "80 GB", "H200": "141 GB", "B200": "180 GB"}[fitting] if fitting else _change(cards["H100"])
    received = _short(sum(formula["traffic_per_product_per_device"].values()) / 1e9)
    hours = _short(cards["H100"]["device_hours"]) if cards["H100"]["fits"] else ""
    tera = _short(formula["flops_per_product_per_device"] / 1e12)
    return f"{totals[0]} ({totals[1]}) | {verdict} | {tera} | {received} | {hours}"


def _short(x: float) -> str:
    """Three digits that count."""
    return f"{float(f'{x:.3g}'):,.10g}"


def _change(found: dict[str, Any]) -> str:
    return f"no; 80 GB with `{found['changes'][0]}`" if found["changes"] else "no"


def _mesh_text(axes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or ""


def made(options: Options, name: str, devices: int, hvp: str) -> dict[str, Any]:
    """The plan, from its file or made now."""
    to = path(options.folder, name, devices, hvp)
    if options.overwrite or not to.exists():
        words = ["scripts/plan.py", *arguments(name, devices, hvp), "--out", str(to.resolve()), "--overwrite"]
        words += [] if options.compile else ["--compiler", "none"]
        print("python", *words, flush=True)
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(to.read_text())


def main() -> None:
    """Reads the options, makes the plans and prints the table."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        print(table(functools.partial(made, options)))


if __name__ == "__main__":
    main()
