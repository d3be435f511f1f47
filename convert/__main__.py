"""`python -m convert SRC DST`: a checkpoint to an Orbax one, or with `--export` to Hugging Face's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from convert.checkpoint import configuration
from convert.destination import appearing, check_destination
from convert.exporting import write_hugging_face
from convert.gguf_model import gguf_file
from convert.hub import local_directory
from convert.loading import load, load_config
from convert.orbax_checkpoint import is_orbax, write_orbax
from convert.tokenizer import add_tokenizer, load_tokenizer
from convert.verify import TOLERANCE, verify
from jaxhess.command import one_sentence
from jaxhess.distributed import processes
from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert a Hugging Face checkpoint to an Orbax checkpoint for jaxhess, or back."""

    src: Annotated[str, tyro.conf.Positional]
    """Checkpoint to read: a Hugging Face directory or hub id, a GGUF file, or a directory written by this command."""
    dst: Annotated[Path, tyro.conf.Positional]
    """Directory to write; it appears complete or not at all."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Dtype of the weights written; default: that of the source."""
    mesh: str | None = None
    """Mesh to load on, such as fsdp=4,tensor=2; default: one device, or fsdp over all devices of several processes. The
    result loads onto any mesh."""
    export: bool = False
    """Write Hugging Face safetensors instead of an Orbax checkpoint."""
    verify: bool = False
    """Compare logits with transformers (needs torch) before the result is put in place."""
    overwrite: bool = False
    """Replace a checkpoint that is already at DST."""


def main(args: list[str] | None = None) -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, prog="python -m convert", args=args)
    with one_sentence(several=True):
        run(options)


def run(options: Options) -> None:
    """Converts; when `--verify` finds more than rounding that is an error, and nothing is written."""
    several = processes.count() > 1
    if several and (options.export or options.verify):
        raise InputError("--export and --verify see whole weights: run them in a single process.")
    check_destination(options.dst, options.overwrite)
    source = local_directory(options.src)
    if source.resolve().is_relative_to(options.dst.resolve()):
        raise InputError(f"DST {options.dst} is or contains SRC {source}: choose another destination.")
    if options.verify and not options.export and is_orbax(source):
        raise InputError(f"--verify compares with a Hugging Face checkpoint, but {source} is none.")
    if load_config(source, options.dtype).dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = make_mesh(options.mesh) if options.mesh or several else None
    hf_config, _ = configuration(source)
    # In a GGUF file it is a part of the file; what is missing to read it is better said before hours of conversion.
    tokenizer = load_tokenizer(source) if gguf_file(source) else source
    model = load(source, mesh, options.dtype)
    with appearing(options.dst, options.overwrite) as partial:
        (write_hugging_face if options.export else write_orbax)(model, partial, hf_config)
        processes.on_first(lambda: add_tokenizer(tokenizer, partial))
        num_params, dtype = model.num_params, model.config.dtype
        del model  # the comparison loads what was written: two copies would not always fit
        if options.verify:
            ours, theirs = (source, partial) if options.export else (partial, source)
            agreement = verify(ours, theirs, mesh, dtype=dtype)
            print(
                f"Logits against transformers: largest difference {agreement.absolute:.3g}, "
                f"{agreement.relative:.3g} of the largest logit."
            )
            if not agreement.within_rounding:
                raise InputError(
                    f"The logits differ by more than rounding ({TOLERANCE:g}); {options.dst} is not written."
                )
    if processes.index() == 0:
        print(f"{num_params:,} parameters in {dtype} written to {options.dst}.")


if __name__ == "__main__":
    main()
