"""Curvature along a training: leading eigenvalues, trace, gradient and loss at many checkpoints of one model.

    python scripts/trajectory.py --checkpoints runs/tiny-training/checkpoints
    python scripts/trajectory.py --model EleutherAI/pythia-70m --revisions step1000 step2000

Eigenpairs start from those of the checkpoint before; each finished checkpoint is saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import run_options  # beside this file, as the next
import run_parts
import tyro
from remat_choice import choose_remat
from rich.console import Console

import convert
import jaxhess
from convert.hub import hub_config, local_directory
from convert.orbax_checkpoint import is_orbax
from jaxhess.command import default_folder, one_sentence, parse, terminal
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import json_ready, read_json
from jaxhess.krylov.basis import stacked_sharding
from jaxhess.operators.base import LowRank
from jaxhess.results.trajectory_report import PAGE, TRAJECTORY_FILES, trajectory_files
from jaxhess.slq.checkpoint import Saver, termination
from jaxhess.vectors import named_sharding

UNFINISHED, TRAINER_STATE = "unfinished", "trainer_state.json"
NUMBERS = {"eigenpairs", "eigenpair_tolerance", "eigenpair_steps"}
"""What `scripts/spectrum.py` may change when it resumes, and this may not."""
FREE = (run_parts.FREE - NUMBERS) | {"checkpoints", "beta1"}


@dataclasses.dataclass(frozen=True)
class Options(run_options.Options):
    """The options of a trajectory."""

    model: str = ""
    """Hub id, with --revisions."""
    revisions: tuple[str, ...] = ()
    """Branches, tags or commits of the hub id, with a step at the end of each name: step1000 step2000, or separated by
    commas."""
    checkpoints: tuple[Path, ...] = ()
    """Folders of checkpoints in place of a hub id, with a step at the end of each name (step-000100, checkpoint-500);
    a folder of such folders stands for all of them."""
    data: str = str(run_options.TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]; the same at
    every checkpoint, in the tokens of the first."""
    eigenpairs: int = 3
    """Leading eigenpairs (largest magnitude) that are followed."""
    eigenpair_tolerance: float = 1e-2
    """Residual, relative to the largest eigenvalue, at which an eigenpair has converged. Eigenvalues are better than
    their residuals by the square."""
    eigenpair_steps: int = 100
    """The most Lanczos steps for the eigenpairs of a checkpoint."""
    probes: int = 4
    """Random probes for the trace, a product each; the same at every checkpoint."""
    learning_rate: float | None = None
    """Of all steps, for the lines of stability; by default as `trainer_state.json` beside each checkpoint says."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment, for its line."""
    cold: bool = False
    """Also compute every checkpoint's eigenpairs without a warm start, to compare values and products."""
    resume: bool = False
    """Resume the unfinished run in --out; if there is none, start one. Checkpoints, data and the options that determine
    the numbers must be the same."""
    steps: tyro.conf.Suppress[int] = 1
    audit: tyro.conf.Suppress[bool] = False
    batch_size: tyro.conf.Suppress[int | None] = None
    probe_distribution: tyro.conf.Suppress[Any] = "rademacher"
    checkpoint_every: tyro.conf.Suppress[int] = 1


class Place(NamedTuple):
    """A checkpoint: its step, and where it is."""

    step: int
    source: str
    revision: str | None

    def folder(self) -> Path:
        """On this machine; a revision is downloaded now."""
        return local_directory(self.source, self.revision)

    def config(self, dtype: str | None) -> jaxhess.DecoderConfig:
        """Read from its `config.json` alone, which of a revision is downloaded."""
        file = self.source if self.revision is None else hub_config(self.source, self.revision)
        return processes.on_every(lambda: convert.read_config(file, dtype))


def run(options: Options) -> list[jaxhess.TrajectoryPoint]:
    """The whole job; returns what it also saved."""
    check(options)
    places = found_places(options)
    console = terminal(quiet=processes.index() > 0)
    clock = run_parts.Clock()
    with run_folder(options) as (output, checkpoint):
        check_configs(places, options.dtype)
        options = dataclasses.replace(options, model=str(places[0].folder()))
        config = run_parts.read_config(options)
        mesh = jaxhess.make_mesh(options.mesh)
        blocks = run_parts.read_data(options, config)
        clock.stop("data")
        config = choose_remat(options, config, mesh, checkpoint, console)
        checkpoint = run_parts.identified(checkpoint, options, config, blocks, FREE)
        checkpoint.identity["checkpoints"] = [[place.step, Path(place.source).name, place.revision] for place in places]
        batches = jaxhess.Microbatches(blocks.microbatches(options.microbatch, mesh))
        if options.overwrite and not options.resume:
            checkpoint.remove()
        points, colds, model = followed(options, places, config, mesh, batches, checkpoint, console)
        clock.stop("checkpoints")
        job = run_parts.job_record(options, model, blocks, batches, mesh, clock.seconds)
        record: dict[str, Any] = {"job": dataclasses.asdict(job)}
        if colds:
            record["cold_runs"] = colds
        processes.on_first(lambda: output.write(trajectory_files(points, json_ready(record), options.beta1)))
        checkpoint.remove()
    if colds:
        print_comparison(console, points, colds)
    console.print(f"written to {output.folder}/{PAGE}")
    return points


def check(options: Options) -> None:
    """Raises InputError where the options make no sense; nothing has been read yet."""
    if bool(options.revisions) == bool(options.checkpoints):
        raise InputError("Name the checkpoints: --model HUB_ID with --revisions, or --checkpoints with folders.")
    if options.revisions and not options.model:
        raise InputError("--revisions are of a hub id: give it by --model.")
    if options.checkpoints and options.model:
        raise InputError("--model is a hub id for --revisions: leave it out with --checkpoints.")
    if options.eigenpairs < 1:
        raise InputError(f"--eigenpairs {options.eigenpairs} must be at least 1.")
    if options.learning_rate is not None and not 0 < options.learning_rate < math.inf:
        raise InputError(f"--learning-rate {options.learning_rate} must be a positive number.")
    if not 0 <= options.beta1 < 1:
        raise InputError(f"--beta1 {options.beta1} must be from 0 to below 1.")
    run_options.check(dataclasses.replace(options, model=options.model or "folders"))


def found_places(options: Options) -> list[Place]:
    """The checkpoints by ascending steps.

    Raises:
        InputError: A folder is missing or has no checkpoint; a name has no step at its end; two have the same.
    """
    if options.revisions:
        names = [name for text in options.revisions for name in text.split(",") if name]
        places = [Place(step_of(name), options.model, name) for name in names]
    else:
        folders = processes.agreed([str(folder) for top in options.checkpoints for folder in below(top)])
        places = [Place(step_of(Path(folder).name), folder, None) for folder in folders]
    places.sort()
    for one, other in itertools.pairwise(places):
        if one.step == other.step:
            names = [place.revision or place.source for place in (one, other)]
            raise InputError(f"{names[0]} and {names[1]} are both of step {one.step}: leave one out.")
    return places


def below(folder: Path) -> list[Path]:
    """The folder itself where it is a checkpoint; otherwise those in it whose names end in a step."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    if (folder / "config.json").exists() or is_orbax(folder):
        return [folder.absolute()]
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and re.search(r"\d$", path.name)]
    inside = [path for path in inside if not path.name.startswith(".")]
    if not inside:
        raise InputError(f"{folder} is no checkpoint and holds none: folders whose names end in their step, step-100.")
    return [path.absolute() for path in inside]


def step_of(name: str) -> int:
    """The step at the end of a name."""
    match = re.search(r"\d+$", name)
    if match is None:
        raise InputError(f"{name} does not end in a step, as step1000 or checkpoint-500 do, so its step is not known.")
    return int(match[0])


def check_configs(places: list[Place], dtype: str | None) -> None:
    """Raises InputError where a checkpoint is missing, or is of another architecture than the first."""
    first = places[0].config(dtype)
    for place in places[1:]:
        if place.config(dtype) != first:
            names = [x.revision or x.source for x in (place, places[0])]
            raise InputError(
                f"{names[0]} is a checkpoint of another model than {names[1]}: their configurations differ."
            )


@contextlib.contextmanager
def run_folder(options: Options) -> Iterator[tuple[Output, jaxhess.Checkpoint]]:
    """The folder of the run, which no other run writes into until the block ends, and the checkpoint inside it."""
    name = f"{Path(options.model or options.checkpoints[0].absolute()).name}-trajectory"
    out = options.out or Path(processes.agreed(str(default_folder(name))))
    checkpoint = jaxhess.Checkpoint(out / UNFINISHED, 1, options.resume)
    checkpoint.check(discard=options.overwrite)
    output = Output(out, TRAJECTORY_FILES, options.overwrite or (options.resume and checkpoint.unfinished()))
    try:
        processes.on_first(output.claim)
        yield output, checkpoint
    finally:
        output.release()


def followed(
    options: Options,
    places: list[Place],
    config: jaxhess.DecoderConfig,
    mesh: jax.sharding.Mesh,
    batches: jaxhess.Microbatches,
    checkpoint: jaxhess.Checkpoint,
    console: Console,
) -> tuple[list[jaxhess.TrajectoryPoint], list[dict[str, Any]], jaxhess.LanguageModel]:
    """The points, what cold runs found, and the last model; each checkpoint is saved as soon as it is done."""
    saver = Saver(checkpoint, {})
    points: list[jaxhess.TrajectoryPoint] = []
    colds: list[dict[str, Any]] = []
    pairs: Any = None
    try:
        saved = saver.latest()
        if saved is not None:
            points, colds = [jaxhess.TrajectoryPoint.from_dict(x) for x in saved["points"]], saved["colds"]
            console.print(f"{len(points)} of {len(places)} checkpoints are done.")
        remaining = places[len(points) :] or places[-1:]
        with termination() as asked:
            for place in remaining:
                here = dataclasses.replace(options, model=str(place.folder()))
                model = run_parts.load(here, config, mesh)
                if len(points) == len(places):
                    break  # killed while the result was written
                operator = run_parts.build(here, model, batches, console)
                if points and pairs is None:
                    pairs = restored(saver, operator, len(points[-1].eigenvalues))
                point, pairs = jaxhess.trajectory_point(
                    operator,
                    place.step,
                    points,
                    pairs,
                    count=options.eigenpairs,
                    tolerance=options.eigenpair_tolerance,
                    steps=options.eigenpair_steps,
                    probes=options.probes,
                    seed=options.seed,
                    storage=options.storage,
                    learning_rate=options.learning_rate or known_rate(place),
                )
                if options.cold:
                    colds.append(cold_run(options, operator, point))
                points.append(point)
                console.print(str(point))
                record = {"points": [dataclasses.asdict(p) for p in points], "colds": colds}
                saver.save_or_warn(len(points), json.loads(json.dumps(record)), pairs.vectors)
                if processes.any_says(asked.is_set()) and len(points) < len(places):
                    raise jaxhess.Interrupted(f"stopped by SIGTERM after step {place.step}; what was done is saved")
    finally:
        saver.close()
    return points, colds, model


def restored(saver: Saver, operator: jaxhess.LinearOperator, count: int) -> LowRank:
    """The eigenvectors of the last checkpoint that was saved."""

    def like(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(x)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if sharding is None else stacked_sharding(sharding)
        return jax.ShapeDtypeStruct((count, *x.shape), np.promote_types(x.dtype, np.float32), sharding=place)

    vectors = saver.restore(jax.tree.map(like, operator.shape_dtype))
    return LowRank(np.zeros(count, np.float32), vectors)


def known_rate(place: Place) -> float | None:
    """The learning rate of the checkpoint's step, where `trainer_state.json` of `transformers` is beside it."""
    path = place.folder() / TRAINER_STATE
    if not path.is_file():
        return None
    try:
        history = read_json(path)["log_history"]
        rates = [(x["step"], x["learning_rate"]) for x in history if "learning_rate" in x and x["step"] <= place.step]
        return float(max(rates)[1]) if rates else None
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not the trainer's record of learning rates ({error}): remove it.") from None


def cold_run(options: Options, operator: jaxhess.LinearOperator, point: jaxhess.TrajectoryPoint) -> dict[str, Any]:
    """Products of a cold run, and how far its eigenvalues are from the point's, in parts of both residuals."""
    found = jaxhess.leading_eigenpairs(
        operator,
        options.eigenpairs,
        tolerance=options.eigenpair_tolerance,
        steps=options.eigenpair_steps,
        seed=options.seed,
        storage=options.storage,
    )
    count = min(len(found.values), len(point.eigenvalues))
    apart = np.abs(found.values[:count] - np.array(point.eigenvalues[:count]))
    within = found.residuals[:count] + np.array(point.residuals[:count])
    values, residuals = found.values.tolist(), found.residuals.tolist()
    worst = float((apart / within).max())
    return {"products": found.products, "eigenvalues": values, "residuals": residuals, "worst": worst}


def print_comparison(console: Console, points: list[jaxhess.TrajectoryPoint], colds: list[dict[str, Any]]) -> None:
    """Warm against cold, in a line; and where one of them lacks an eigenvalue that the other has."""
    for point, cold in zip(points, colds, strict=True):
        if cold["worst"] > 1:
            found = ", ".join(f"{x:.5g}" for x in cold["eigenvalues"])
            console.print(
                f"step {point.step}: the cold run found {found}: one of the two lacks an eigenvalue of the other; a "
                "lower --eigenpair-tolerance tells which"
            )
    warm, cold = sum(p.products for p in points), sum(c["products"] for c in colds)
    worst = max(c["worst"] for c in colds)
    console.print(
        f"products: {warm} followed, {cold} cold, {warm / cold:.3f} of them; eigenvalues differ by at most {worst:.2g} "
        "of the sum of both residuals"
    )


def main() -> None:
    """Reads the options and runs."""
    options = parse(Options, description=__doc__)
    with one_sentence(several=True):
        run(options)


if __name__ == "__main__":
    main()
