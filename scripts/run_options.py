"""The options of a run, of `scripts/spectrum.py` and `scripts/plan.py`."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxhess.errors import InputError
from jaxhess.krylov.storage import Storage
from jaxhess.models import LOGIT_CHUNK
from jaxhess.models.config import Remat
from jaxhess.operators.matmul import MatmulPrecision
from jaxhess.vectors import check_seed

TINY = Path(__file__).parent / "tiny"
REMATS: dict[str, Remat] = {"on": True, "feed-forward": "feed-forward", "attention": "attention", "off": False}
"""`DecoderConfig.remat` by the words of `--remat`."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The defaults suit most runs."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id."""
    data: str = str(TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]. Text is
    tokenised without special tokens, with the end-of-text token between documents."""
    seq_len: int = 128
    """Predicted tokens per sequence."""
    sequences: int = 16
    """Sequences taken; the loss is the mean over all their tokens."""
    sample: Literal["start", "random"] = "start"
    """Which sequences: the first ones of the data, or drawn at random from all of it, by --seed. Errors over the data
    are about any text like the first ones, or about all of the data."""
    microbatch: int = 4
    """Sequences whose activations exist at once; changes memory and speed, not the result. Errors over the data come
    from the scatter between microbatches: the more there are, the surer these errors are, and two are needed."""
    operator: Literal["hessian", "gauss-newton", "empirical-fisher", "monte-carlo-fisher"] = "hessian"
    """The matrix whose spectrum is computed. All but the first are positive semi-definite: Gauss-Newton (the Fisher
    matrix of the softmax), the outer products of per-token gradients (empirical), and the same at targets drawn from
    the model (Monte Carlo)."""
    hvp: Literal["exact", "linearized", "finite-difference"] = "exact"
    """How Hessian products are made. `linearized` is exact too: it does the primal pass once and keeps it, faster for
    many times the memory. `finite-difference` is the product of arXiv 2602.00816, for comparison."""
    step: float | Literal["auto"] = "auto"
    """Step of finite differences; `auto` measures gradient noise and third derivative and balances them."""
    step_per: Literal["coordinate", "unit"] = "coordinate"
    """Whether the step is the root mean square of the shift's entries (as in the paper), or its whole length."""
    shift: Literal["realised", "float32"] = "realised"
    """How finite differences in low precision shift the weights: as stored, and divide by what moved, or as float32
    copies."""
    residual_gb: float | None = None
    """GB per device that `linearized` may keep; by default what is left."""
    fisher_samples: int = 1
    """Targets drawn per token, for `monte-carlo-fisher`."""
    restrict: tuple[str, ...] = ()
    """Only these parameters, the others held fixed: words (attention, mlp, norm, embed, head) or shell patterns such as
    'layers/mlp/up/*'. By default all."""
    layers: str | None = None
    """Only these layers, for example 0-3,-1."""
    precondition: Path | None = None
    """The spectrum of D^-1 H, the sharpness that Adam sees, D being what it divides by: from an optimizer.pt of
    PyTorch's Adam or AdamW, the folder of a checkpoint with one (as the Trainer saves it), or an .npz with a positive
    number for every parameter, under its name here."""
    steps: int = 30
    """Lanczos steps per probe: one product each."""
    probes: int = 4
    """Random probes; two or more give standard errors."""
    storage: Annotated[Storage, tyro.conf.arg(name="")] = Storage()
    batch_size: int | None = None
    """Probes that advance together and share primal passes; by default as many as fit into memory."""
    eigenpairs: int = 0
    """Also find this many leading eigenvectors (largest magnitude), and save them in the run folder. After an
    interruption their computation starts again; the spectrum is kept."""
    eigenpair_tolerance: float = 1e-3
    """Residual bound, relative to the largest eigenvalue, at which an eigenpair has converged."""
    eigenpair_steps: int = 100
    """The most Lanczos steps for the eigenpairs. With `full` they go on from those of the last probes."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Storage of the weights; by default the checkpoint's own."""
    compute_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Dtype of matrix products and activations; by default that of the weights. Norms, softmax and loss are in float32
    or wider, and float32 is float32 on a GPU too (no TF32)."""
    matmul_precision: MatmulPrecision = "float32"
    """Precision of matrix products in float32. The others take less time on GPUs (docs/numerics.md has the error of
    each); elsewhere they are emulated, and slower than float32."""
    accumulation_dtype: Literal["float32", "float64"] = "float32"
    """Dtype of the operator's sums over microbatches."""
    audit: bool = True
    """Measure the noise of the products (asymmetry, non-linearity, distance from a wider dtype) for the record: four
    products of the operator, two of the reference."""
    mesh: str | None = None
    """Device mesh, for example fsdp=8 or data=2,fsdp=4 or fsdp=4,tensor=2; by default fsdp over all devices."""
    seed: int = 0
    """Seed of the probes, of random tokens, and of which sequences --sample random draws."""
    probe_distribution: Literal["normal", "rademacher"] = "normal"
    """Entries of the probes: normal ones give weights of known distribution, rademacher a smaller trace variance."""
    query_chunk: int = 256
    """Queries whose attention scores exist at once, in the plain attention."""
    attention: Literal["auto", "plain", "fused"] = "auto"
    """`auto`: a fused kernel in bfloat16 and float16 on NVIDIA GPUs since the A100, plain matrix products elsewhere.
    The kernel is tested on CPUs and compiled for GPUs, but has never run on one: `plain` does without it."""
    logit_chunk: int = LOGIT_CHUNK
    """Logits per device that exist at once: those of all tokens of a microbatch with a slice of the vocabulary."""
    remat: Literal["auto", "on", "feed-forward", "attention", "off"] = "auto"
    """What backward passes compute again instead of storing it: whole layers (on), the feed-forward of each and
    attention's scores, the scores alone, or no matrix product (off). `auto`: by the plan the fastest of on,
    feed-forward and attention that fits into memory, on one CPU also of off; off for linearised products."""
    out: Path | None = None
    """Run folder; by default runs/<date>-<model>."""
    overwrite: bool = False
    """Replace a finished run in that folder; files that no run wrote are never replaced."""
    checkpoint_every: int = 10
    """Steps between saves of an unfinished run (they replace each other, in the run folder); 0 for none. SIGTERM saves
    too."""
    resume: bool = False
    """Resume the unfinished run in --out; if there is none, start one. Model, data and the options that determine the
    numbers must be the same; --mesh, --microbatch, --batch-size, --query-chunk, --logit-chunk, --attention,
    --remat, --residual-gb, --audit and --eigenpairs may differ; what --remat auto chose is kept."""


def check(options: Options) -> None:
    """Raises InputError where options make no sense, alone or together; nothing has been read yet."""
    if not options.model or not options.data:
        raise InputError("--model and --data must not be empty.")
    if options.steps < 1 or options.probes < 1:
        raise InputError(f"--steps {options.steps} and --probes {options.probes} must both be at least 1.")
    check_seed(options.seed)
    if options.checkpoint_every < 0:
        raise InputError(f"--checkpoint-every {options.checkpoint_every} must be a number of steps, or 0 for none.")
    if options.resume and options.out is None:
        raise InputError("--resume needs --out, the folder of the unfinished run.")
    if options.resume and not options.checkpoint_every:
        raise InputError(
            "--resume and --checkpoint-every 0 contradict each other: nothing is saved that could be resumed."
        )
    if options.eigenpairs < 0 or options.eigenpairs > options.eigenpair_steps:
        raise InputError(
            f"--eigenpairs {options.eigenpairs} must be from 0 to --eigenpair-steps {options.eigenpair_steps}."
        )
    if not 0 < options.eigenpair_tolerance < 1:
        raise InputError(f"--eigenpair-tolerance {options.eigenpair_tolerance} must be between 0 and 1.")
    if options.fisher_samples < 1:
        raise InputError(f"--fisher-samples {options.fisher_samples} must be at least 1.")
    if options.operator != "hessian" and options.hvp != "exact":
        raise InputError(f"--hvp {options.hvp} works only with --operator hessian; leave --hvp out.")
    if options.precondition is not None and not options.precondition.exists():
        raise InputError(f"--precondition {options.precondition}: there is no such file or folder.")
    if options.residual_gb is not None and not 0 < options.residual_gb < math.inf:
        raise InputError(f"--residual-gb {options.residual_gb} must be a positive number.")
    if isinstance(options.step, float) and not 0 < options.step < math.inf:
        raise InputError(f"--step {options.step} must be a positive number, or auto.")


def layer_numbers(text: str | None, count: int) -> list[int] | None:
    """The layers that a text such as `0-3,-1` names; None: all.

    Raises:
        InputError: It is no such list, or the model has not so many layers.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise InputError(f"--layers {text!r} is not a list of layers and ranges, like 0-3,-1.")
        first, last = int(match[1]), int(match[2] or match[1])
        if match[2] and not 0 <= first <= last < count:
            raise InputError(
                f"--layers {text!r}: a range must go from a lower to a higher layer, within 0 to {count - 1}."
            )
        found.extend(range(first, last + 1))
    return found
