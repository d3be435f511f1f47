"""Curvature along a training: leading eigenvalues, trace, gradient and loss at many checkpoints of one model.

    python scripts/trajectory.py --checkpoints runs/tiny-training/checkpoints
    python scripts/trajectory.py --model EleutherAI/pythia-70m --revisions step1000 step2000

Eigenpairs start from those of the checkpoint before; each finished checkpoint is saved.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import run_options  # beside this file, as the next ones
import run_parts
import tyro
from cold_runs import cold_run, print_comparison
from remat_choice import choose_remat
from rich.console import Console

import convert
import jaxhess
from convert.hub import hub_config, local_directory
from convert.orbax_checkpoint import is_orbax
from jaxhess.command import one_sentence, parse, terminal
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready, read_json
from jaxhess.krylov.basis import stacked_sharding
from jaxhess.operators.base import LowRank
from jaxhess.results.trajectory_report import PAGE, TRAJECTORY_FILES, trajectory_files
from jaxhess.slq.checkpoint import Saver, termination
from jaxhess.vectors import checksum, named_sharding

UNFINISHED, TRAINER_STATE = "unfinished", "trainer_state.json"
EACH, PRECONDITIONERS = Path("each"), ("preconditioner.npz", "optimizer.pt")
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
    """Random probes for the trace, a product each; the same at every checkpoint; 0 for no trace."""
    precondition: Path | None = None
    """`each`: follow D^-1/2 H D^-1/2, what Adam sees, each checkpoint with its own D: the preconditioner.npz or
    optimizer.pt in its folder."""
    learning_rate: float | None = None
    """Of all steps, for the lines of stability; by default as `trainer_state.json` beside each checkpoint says."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment, for its line."""
    cold: bool = False
    """Also compute the eigenpairs of every checkpoint after the first from another random vector alone, to compare
    values and products."""
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

    def options(self, options: Options) -> Options:
        """Those of a run on this checkpoint alone, with its own preconditioner.

        Raises:
            InputError: It has none, or is of a hub id that could not be reached.
        """
        folder = self.folder()
        own: Path | None = None
        if options.precondition is not None:
            files = [folder / name for name in PRECONDITIONERS]
            own = next((file for file in files if processes.exists(file)), None)
            if own is None:
                raise InputError(f"--precondition each: {folder} has no {' and no '.join(PRECONDITIONERS)}.")
        return dataclasses.replace(options, model=str(folder), precondition=own)


def run(options: Options) -> list[jaxhess.TrajectoryPoint]:
    """The whole job; returns what it also saved."""
    check(options)
    places = found_places(options)
    console = terminal(quiet=processes.index() > 0)
    clock = run_parts.Clock()
    name = f"{Path(options.model or options.checkpoints[0].absolute()).name}-trajectory"
    with run_parts.run_folder(options, name, TRAJECTORY_FILES, (UNFINISHED,)) as (output, (checkpoint,)):
        check_configs(places, options)
        first = dataclasses.replace(options, model=str(places[0].folder()))
        config = run_parts.read_config(first)
        mesh = jaxhess.make_mesh(options.mesh)
        blocks = run_parts.read_data(first, config)
        clock.stop("data")
        planned = dataclasses.replace(first, probes=max(first.probes, 1))  # there is no plan for none
        config = choose_remat(planned, config, mesh, checkpoint, console)
        checkpoint = run_parts.identified(checkpoint, first, config, blocks, FREE)
        checkpoint.identity["checkpoints"] = [[place.step, Path(place.source).name, place.revision] for place in places]
        checkpoint.identity["precondition"] = options.precondition and str(options.precondition)
        batches = jaxhess.Microbatches(blocks.microbatches(options.microbatch, mesh))
        if options.overwrite and not options.resume:
            checkpoint.remove()
        found, model = followed(options, places, config, mesh, batches, checkpoint, console)
        points, colds = found.points, found.colds
        clock.stop("checkpoints")
        named = dataclasses.replace(options, model=options.model or str(options.checkpoints[0]))
        job = run_parts.job_record(named, model, blocks, batches, mesh, clock.seconds)
        where = [
            {"step": p.step, "source": p.source, "revision": p.revision, "folder": str(p.folder().resolve()), **sums}
            for p, sums in zip(places, found.checksums, strict=True)
        ]
        record: dict[str, Any] = {"job": dataclasses.asdict(job), "checkpoints": where}
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
    if options.probes < 0:
        raise InputError(f"--probes {options.probes} must be a number of probes, or 0 for no trace.")
    if options.precondition is not None and (options.precondition != EACH or options.revisions):
        raise InputError(
            "--precondition each takes the preconditioner.npz or optimizer.pt in each folder of --checkpoints; one "
            "preconditioner for all checkpoints is of none but its own."
        )
    given = dataclasses.replace(options, precondition=None, probes=max(options.probes, 1))
    run_options.check(dataclasses.replace(given, model=options.model or "folders"))


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


def check_configs(places: list[Place], options: Options) -> None:
    """Raises InputError where a checkpoint or its preconditioner is missing, or it is of another architecture than the
    first."""
    first = places[0].config(options.dtype)
    for place in places[1:]:
        if place.config(options.dtype) != first:
            names = [x.revision or x.source for x in (place, places[0])]
            raise InputError(
                f"{names[0]} is a checkpoint of another model than {names[1]}: their configurations differ."
            )
    if options.precondition is not None:
        for place in places:
            place.options(options)


@dataclasses.dataclass
class Followed:
    """What was found at the checkpoints so far; `checksums` are of their weights and preconditioners."""

    points: list[jaxhess.TrajectoryPoint] = dataclasses.field(default_factory=list)
    colds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    checksums: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As it is saved."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def followed(
    options: Options,
    places: list[Place],
    config: jaxhess.DecoderConfig,
    mesh: jax.sharding.Mesh,
    batches: jaxhess.Microbatches,
    checkpoint: jaxhess.Checkpoint,
    console: Console,
) -> tuple[Followed, jaxhess.LanguageModel]:
    """What was found, and the last model; each checkpoint is saved as soon as it is done."""
    saver = Saver(checkpoint, {})
    found = Followed()
    points = found.points
    pairs: Any = None
    model: Any = None
    operator: Any = None
    try:
        saved = saver.latest()
        if saved is not None:
            points = [jaxhess.TrajectoryPoint.from_dict(x) for x in saved["points"]]
            found = Followed(points, saved["colds"], saved["checksums"])
            console.print(f"{len(points)} of {len(places)} checkpoints are done.")
            for number in sorted({0, len(points) - 1}):
                here = places[number].options(options)
                if checksums(here, run_parts.load(here, config, mesh)) != found.checksums[number]:
                    raise InputError(
                        f"{here.model} does not hold the weights or the preconditioner that the unfinished run in "
                        f"{checkpoint.folder} found at step {places[number].step}: --resume with those, or start anew."
                    )
        with termination() as asked:
            for place in places[len(points) :] or places[-1:]:
                here = place.options(options)
                model = operator = None  # before the next one is loaded
                model = run_parts.load(here, config, mesh)
                if len(points) == len(places):
                    break  # killed while the result was written
                sums = checksums(here, model)
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
                if options.cold and points:
                    found.colds.append(cold_run(options, operator, point, len(points)))
                points.append(point)
                found.checksums.append(sums)
                console.print(str(point))
                saver.save_or_warn(len(points), found.record(), pairs.vectors)
                if processes.any_says(asked.is_set()) and len(points) < len(places):
                    raise jaxhess.Interrupted(f"stopped by SIGTERM after step {place.step}; what was done is saved")
    finally:
        saver.close()
    return found, model


def checksums(here: Options, model: jaxhess.LanguageModel) -> dict[str, str]:
    """Of a checkpoint's weights, and of its preconditioner."""
    found = {"weights": checksum(model.params)}
    if here.precondition is not None:
        found["preconditioner"] = checksum(convert.load_preconditioner(here.precondition, model).diagonal)
    return found


def restored(saver: Saver, operator: jaxhess.LinearOperator, count: int) -> LowRank:
    """The eigenvectors of the last checkpoint that was saved."""

    def like(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(x)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if sharding is None else stacked_sharding(sharding)
        return jax.ShapeDtypeStruct((count, *x.shape), np.promote_types(x.dtype, np.float32), sharding=place)

    vectors = saver.restore(jax.tree.map(like, operator.shape_dtype))
    return LowRank(np.zeros(count, np.float32), vectors)


def known_rate(place: Place) -> float | None:
    """The learning rate of the checkpoint's own step, where `trainer_state.json` of `transformers` beside it has it."""
    path = place.folder() / TRAINER_STATE
    if not path.is_file():
        return None
    try:
        history = read_json(path)["log_history"]
        rates = [x["learning_rate"] for x in history if "learning_rate" in x and x["step"] == place.step]
        return float(rates[-1]) if rates else None
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not the trainer's record of learning rates ({error}): remove it.") from None


def main() -> None:
    """Reads the options and runs."""
    options = parse(Options, description=__doc__)
    with one_sentence(several=True):
        run(options)


if __name__ == "__main__":
    main()
