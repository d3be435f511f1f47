"""What backward passes compute again: its operations and memory agree with the compiled program, and what fits."""

import dataclasses

import jax
import pytest

from jaxhess import DecoderConfig, Storage, make_mesh
from jaxhess.errors import InputError
from jaxhess.models.config import Remat
from jaxhess.plan import Job, compiled, flops, memory
from jaxhess.plan.remat import stored_states
from jaxhess.plan.verdict import REMAT_SHARE, fitting_remat

SIZES = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 96, "max_positions": 64}


def job(remat: Remat, *, hvp="exact", query_chunk: int = 64, layers: int = 3, **config) -> Job:
    made = DecoderConfig(
        vocab_size=64, num_layers=layers, **SIZES, remat=remat, query_chunk=query_chunk, attention="plain", **config
    )
    axes = {"fsdp": 2}  # on one CPU all layers may be written out, and their primal pass moved out of the steps
    return Job(made, axes, seq_len=64, sequences=4, microbatch=4, hvp=hvp, steps=2, storage=Storage("none"))


def on_two_devices(planned: Job):
    return compiled(planned, make_mesh("fsdp=2", jax.devices()[:2]))


CHUNKS, PARALLEL = {"query_chunk": 16}, {"gated_mlp": False, "parallel_residual": True}


@pytest.mark.parametrize(
    ("hvp", "remat", "change"),
    [
        ("exact", "feed-forward", CHUNKS),
        ("exact", "attention", PARALLEL),
        pytest.param("exact", False, CHUNKS, marks=pytest.mark.study),
        pytest.param("finite-difference", True, CHUNKS, marks=pytest.mark.study),
        ("finite-difference", "attention", PARALLEL),
    ],
)
def test_operations_are_those_of_the_compiled_program(remat, hvp, change):
    planned = job(remat, hvp=hvp, **change)
    assert flops(planned) == pytest.approx(on_two_devices(planned).flops, rel=0.001)


@pytest.mark.slow
def test_the_less_is_computed_again_the_more_is_stored():
    """Over many layers what is stored, with its tangents, is what temporaries grow by."""
    remats: tuple[Remat, ...] = (True, "feed-forward", "attention")
    operations = [flops(job(remat)) for remat in remats]  # which are those of the program, see above
    assert operations == sorted(operations, reverse=True)
    few, many = ({r: on_two_devices(job(r, layers=n)).temporaries for r in (True, "attention")} for n in (4, 24))
    stored = 2 * (stored_states(job("attention", layers=24)) - stored_states(job("attention", layers=4)))
    assert many["attention"] - few["attention"] - (many[True] - few[True]) == pytest.approx(stored, rel=0.2)


def test_the_fastest_choice_that_fits():
    totals = {remat: memory(job(remat)).total for remat in ("attention", "feed-forward", True)}
    assert totals["attention"] > totals["feed-forward"] > totals[True]
    for remat, total in totals.items():
        assert fitting_remat(job(True), 1.01 * total / REMAT_SHARE) == remat
    assert fitting_remat(job(True), 0.0) is True
    assert fitting_remat(dataclasses.replace(job(True), hvp="linearized"), 0.0) is False


def test_an_unknown_choice_is_refused():
    with pytest.raises(InputError, match="remat is 'all'; it is True, 'feed-forward', 'attention' or False"):
        job("all")
