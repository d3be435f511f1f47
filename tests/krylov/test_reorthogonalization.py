"""Re-orthogonalisation by windows, Ritz vectors or in full; where its basis lies; runs that advance together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import Diagonal, language_operator, random_vector

from jaxhess import Storage, lanczos_segment, make_mesh, random_probe, spectrum, start_lanczos
from jaxhess.krylov import compile_segment, orthogonality_loss
from jaxhess.krylov.quadrature import quadrature
from jaxhess.plan.collectives import collective_traffic
from jaxhess.plan.hlo import matmul_flops, read_program

N = 2000


def semicircle(n: int = N) -> np.ndarray:
    """Quantiles of Wigner's semicircle on [-1, 1]."""
    x = np.linspace(-1, 1, 100_001)
    distribution = 0.5 + (x * np.sqrt(1 - x**2) + np.arcsin(x)) / np.pi
    return np.interp((np.arange(n) + 0.5) / n, distribution, x)


def marchenko_pastur(n: int = N, ratio: float = 0.5) -> np.ndarray:
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    x = np.linspace(low, high, 100_001)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / x
    return np.interp((np.arange(n) + 0.5) / n, np.cumsum(density) / density.sum(), x)


SPECTRA = {
    "clusters": np.concatenate([np.repeat([-1.0, 0.0, 2.0], 500), np.linspace(6, 6.5, 499), [7.0]]),
    "six decades": np.concatenate([[-1.0, 0.3, 2.0], 1e-6 * np.linspace(-1, 1, N - 3)]),
    "indefinite": np.concatenate([np.linspace(-1, 1, N - 4), [-3.0, 5.0, 5.5, 20.0]]),
    "rank-deficient": np.concatenate([np.zeros(N - 40), np.geomspace(1e-3, 1, 40)]),
    "semicircle": semicircle(),
    "Marchenko-Pastur": np.concatenate([marchenko_pastur(N - 2), [5.0, 9.0]]),
}


def run(eigenvalues: np.ndarray, steps: int, storage: Storage, dtype: str = "float64"):
    operator = Diagonal(jnp.asarray(eigenvalues, dtype))
    probe = random_vector(operator.shape_dtype, 0)
    state = start_lanczos([probe], steps, dataclasses.replace(storage, scalar_dtype=dtype))
    return lanczos_segment(operator, state, steps)


def ritz_values(state) -> np.ndarray:
    return quadrature(*state.tridiagonal()).ritz_values


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", SPECTRA)
def test_full_keeps_a_basis_orthogonal_and_finds_the_extremes(name):
    eigenvalues = SPECTRA[name]
    state = run(eigenvalues, 300, Storage())
    scale = np.abs(eigenvalues).max()
    theta = ritz_values(state)
    assert orthogonality_loss(state) < 1e-12
    np.testing.assert_allclose(theta[[0, -1]], [eigenvalues.min(), eigenvalues.max()], rtol=0, atol=1e-10 * scale)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reorthogonalize", ["none", 2, 9, "full"])
def test_the_last_two_vectors_are_always_orthogonal(reorthogonalize):
    eigenvalues = SPECTRA["six decades"]
    operator = Diagonal(jnp.asarray(eigenvalues))
    state = start_lanczos(
        [random_vector(operator.shape_dtype, 0)], 60, Storage(reorthogonalize, scalar_dtype="float64")
    )
    for end in range(1, 60):
        state = lanczos_segment(operator, state, end)
        previous, current = np.asarray(state.previous)[0], np.asarray(state.current)[0]
        assert abs(previous @ current) < 1e-13
        assert abs(np.linalg.norm(current) - 1) < 1e-13


@pytest.mark.usefixtures("float64")
def test_a_window_keeps_the_last_vectors_orthogonal_and_no_others():
    operator = Diagonal(jnp.asarray(SPECTRA["indefinite"]))
    probe = random_vector(operator.shape_dtype, 0)
    state = start_lanczos([probe], 60, Storage(5, scalar_dtype="float64"))
    vectors = []
    for end in range(1, 60):
        vectors.append(np.asarray(state.current)[0])
        state = lanczos_segment(operator, state, end)
    assert orthogonality_loss(state) < 1e-13
    ring = np.asarray(state.basis)[0]
    kept = [*vectors[-4:], np.asarray(state.current)[0]]
    assert all(np.abs(ring @ q).max() > 1 - 1e-13 for q in kept)  # rows are the last five, in a ring
    products = np.array(vectors) @ np.array(vectors).T
    assert np.abs(np.triu(products, 10)).max() > 1e-6  # long-range orthogonality is lost, as it must be


@pytest.mark.parametrize("basis_memory", ["device", "host"])
@pytest.mark.parametrize("reorthogonalize", [4, "full"])
def test_a_basis_on_the_host_or_in_bfloat16_gives_the_same_spectrum(reorthogonalize, basis_memory):
    eigenvalues = SPECTRA["indefinite"].astype(np.float32)
    mesh = make_mesh("fsdp=8")
    entries = jax.device_put(jnp.asarray(eigenvalues), NamedSharding(mesh, PartitionSpec("fsdp")))
    operator = Diagonal({"a": entries[:1000].reshape(8, 125), "b": entries[1000:]})
    expected = run(eigenvalues, 30, Storage(), "float32")
    probe = random_probe(jax.random.key(0), Diagonal(entries).shape_dtype)
    probe = {"a": probe[:1000].reshape(8, 125), "b": probe[1000:]}
    for basis_dtype, tolerance in ((None, 1e-5), ("bfloat16", 2e-3)):
        state = start_lanczos([probe], 30, Storage(reorthogonalize, basis_dtype=basis_dtype, basis_memory=basis_memory))
        kind = jax.tree.leaves(state.basis)[0].sharding.memory_kind
        assert kind == ("pinned_host" if basis_memory == "host" else "device")
        state = lanczos_segment(operator, state, 30)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.basis)} == {kind}
        found, wanted = ritz_values(state)[[0, -1]], ritz_values(expected)[[0, -1]]
        np.testing.assert_allclose(found, wanted, rtol=tolerance)
        assert orthogonality_loss(state) < (1e-4 if basis_dtype is None else 1e-2)


@pytest.mark.parametrize(("reorthogonalize", "scalars"), [("none", 4), (2, 6), (7, 16), ("full", 2 + 2 * 12)])
def test_steps_reduce_as_many_scalars_as_they_say(reorthogonalize, scalars):
    sharding = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    operator = Diagonal(jax.device_put(jnp.linspace(-1, 1, 64), sharding))
    state = start_lanczos([random_vector(operator.shape_dtype, 0)], 12, Storage(reorthogonalize))
    traffic = collective_traffic(compile_segment(operator, state), unknown_trips=1)
    assert {t.kind for t in traffic} == {"all-reduce"}
    received = sum(t.received for t in traffic) / (2 * 7 / 8 * 4)  # of a float32 by every device, in a ring of eight
    # The norm's condition, counted at its dearest, may sum again where squares under- or overflowed: 2 more.
    assert received == scalars + 2


@pytest.mark.parametrize(("reorthogonalize", "rows"), [("none", 0), (5, 5), ("full", 12)])
def test_the_state_holds_as_many_vectors_as_it_says(reorthogonalize, rows):
    operator = Diagonal(jnp.linspace(-1, 1, 1000))
    state = start_lanczos([random_vector(operator.shape_dtype, 0)], 12, Storage(reorthogonalize))
    assert sum(x.size for x in jax.tree.leaves(state) if x.size >= 1000) == (2 + rows) * 1000
    memory = compile_segment(operator, state).memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4000 + 20_000  # the product and what it becomes; a pass copies no basis


@pytest.mark.parametrize("reorthogonalize", ["none", 4, "full"])
def test_runs_together_are_those_one_by_one(reorthogonalize):
    operator = Diagonal(jnp.asarray(SPECTRA["indefinite"], jnp.float32))
    probes = [random_vector(operator.shape_dtype, k) for k in range(3)]
    together = lanczos_segment(operator, start_lanczos(probes, 8, Storage(reorthogonalize)), 8)
    losses = orthogonality_loss(together)
    for k, probe in enumerate(probes):
        alone = lanczos_segment(operator, start_lanczos([probe], 8, Storage(reorthogonalize)), 8)
        scale = np.abs(ritz_values(alone)).max()
        np.testing.assert_allclose(together.alphas[k], alone.alphas[0], rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(together.betas[k], alone.betas[0], rtol=0, atol=1e-5 * scale)
        np.testing.assert_equal(np.isnan(losses[k]), np.isnan(orthogonality_loss(alone)[0]))
        assert np.isnan(losses[k]) or losses[k] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_eight_runs_together_share_the_primal_pass(remat):
    operator = language_operator(num_layers=2, vocab_size=512, embed_dim=64, head_dim=32, mlp_dim=192, remat=remat)
    probes = [random_vector(operator.shape_dtype, k) for k in range(8)]
    alone, together = (
        matmul_flops(read_program(compile_segment(operator, state)), unknown_trips=4)
        for state in (start_lanczos([probes[0]], 4, Storage("none")), start_lanczos(probes, 4, Storage("none")))
    )
    assert together <= 0.85 * 8 * alone


def test_runs_together_break_down_each_on_its_own():
    # The first probe lies in an invariant subspace of two eigenvectors, the second in one of five.
    entries = jnp.asarray(np.linspace(1, 2, 200), jnp.float32)
    probes = [
        jnp.zeros(200).at[jnp.array(places)].set(1.0) for places in ([3, 150], [0, 50, 100, 150, 199], range(200))
    ]
    state = lanczos_segment(Diagonal(entries), start_lanczos(probes, 12), 12)
    assert list(np.asarray(state.size)) == [2, 5, 12]
    assert list(np.asarray(state.broken)) == [True, True, False]
    found = quadrature(np.asarray(state.alphas)[1, :5], np.asarray(state.betas)[1, :5]).ritz_values
    np.testing.assert_allclose(found, np.asarray(entries)[[0, 50, 100, 150, 199]], rtol=1e-6)


@pytest.mark.parametrize("reorthogonalize", ["none", 4, "full"])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.usefixtures("float64")
def test_low_rank_ends_cleanly_with_exact_eigenvalues(reorthogonalize, rank):
    eigenvalues = np.concatenate([np.arange(1, rank + 1), np.zeros(300)])
    operator = Diagonal(jnp.asarray(eigenvalues))
    result = spectrum(operator, steps=40, probes=2, storage=Storage(reorthogonalize, scalar_dtype="float64"))
    if rank == 1 or reorthogonalize == "full":  # otherwise rounding may go on, with ghosts
        assert (result.sizes <= rank + 2).all()  # rank distinct values and zero
    for p in range(2):
        theta = result.ritz_values[p][~result.ghosts[p]][: result.sizes[p]]
        theta = theta[np.isfinite(theta)]
        distance = np.abs(theta[:, None] - np.append(np.arange(1, rank + 1), 0)).min(1)
        assert distance.max() < 1e-12 * rank
        assert len(theta) >= rank + 1


@pytest.mark.parametrize("reorthogonalize", ["none", 4, "full"])
@pytest.mark.parametrize(("dtype", "outlier", "size"), [("bfloat16", 100.0, 3000), ("float32", 1e4, 30_000)])
def test_an_outlier_that_leaks_back_is_no_breakdown(reorthogonalize, dtype, outlier, size):
    # What rounding lets in of it may be more than the step leaves, and the pass that removes it is no sign of the end.
    rng = np.random.default_rng(0)
    entries = np.append(1e-2 * rng.standard_normal(size) * outlier / 100, outlier).astype(np.float32)
    result = spectrum(
        Diagonal(jnp.asarray(entries)), steps=40, probes=2, storage=Storage(reorthogonalize, vector_dtype=dtype)
    )
    assert (result.sizes == 40).all()
    assert not result.broke_down.any()


def test_batches_are_chosen_from_memory(monkeypatch):
    operator = Diagonal(jnp.linspace(-1, 1, 100_000))
    free = spectrum(operator, steps=3, probes=6)
    assert free.run.lanczos.batch_size == 6
    needed = 8 * 100_000 * 4  # of each probe: three rows, two vectors, the product and temporaries
    monkeypatch.setattr("jaxhess.distributed.memory.available_bytes", lambda _: 3.4 * needed)
    cut = spectrum(operator, steps=3, probes=6)
    assert 1 < cut.run.lanczos.batch_size <= 3
    np.testing.assert_allclose(cut.alphas, free.alphas, atol=1e-6)
    monkeypatch.setattr("jaxhess.distributed.memory.available_bytes", lambda _: 10)
    assert spectrum(operator, steps=3, probes=2).run.lanczos.batch_size == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"storage": Storage(basis_dtype="float64")}, "basis_dtype float64 needs .* JAX_ENABLE_X64"),
        ({"storage": Storage(scalar_dtype="float64")}, "scalar_dtype float64 needs .* JAX_ENABLE_X64"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2, "storage": Storage(basis_memory="host")}, "1 for a basis in the host"),
        ({"storage": Storage(2**50)}, "A window keeps"),
    ],
)
def test_bad_options_are_refused_before_any_product(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        spectrum(Diagonal(jnp.ones(2**20)), steps=3, **options)


def test_a_batch_needs_probes_and_its_basis_on_the_device():
    with pytest.raises(ValueError, match="at least one probe"):
        start_lanczos([], 3)
    with pytest.raises(ValueError, match="one probe after the other"):
        start_lanczos([jnp.ones(3)] * 2, 3, Storage(basis_memory="host"))
    for vector in (jnp.ones(3), np.ones(3, np.float32), {"a": jnp.ones(3)}):
        with pytest.raises(ValueError, match=r"takes a list of them: \[probe\]"):
            start_lanczos(vector, 3)
