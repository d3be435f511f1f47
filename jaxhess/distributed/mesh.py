"""Device meshes, the table from logical axes to mesh axes, and the shardings that follow from it.

A mesh always has the four axes `data`, `fsdp`, `expert` and `tensor` (size 1 where unused). Batches are cut over all
but `tensor`; parameters and every vector like them over all but `data`. Along `expert` a device has its own experts of
a model that has experts, and its part of everything else, as along `fsdp`.

On several nodes the axes that talk the most lie inside a node: `tensor`, whose collectives are in every layer's way,
then `expert`, then `fsdp`, whose gathers can run ahead; `data` crosses nodes first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxhess.errors import InputError

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
PARAM_AXES = ("fsdp", "expert", "tensor")

AXIS_RULES: dict[str, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "shared_mlp": "tensor",
    "expert_mlp": "tensor",
    "experts": "expert",
    "query_rank": "fsdp",
    "kv_rank": "fsdp",
}
"""Logical axis of a parameter -> mesh axis that cuts it. Axes not named here stay whole."""

WHOLE_BELOW = 2**14


def make_mesh(axes: Mapping[str, int] | str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `axes` (`{"fsdp": 4, "tensor": 2}` or `"fsdp=4,tensor=2"`) over `devices`.

    Examples:
        >>> import jax, jaxhess
        >>> mesh = jaxhess.make_mesh("fsdp=1", devices=jax.devices()[:1])
        >>> dict(mesh.shape)
        {'data': 1, 'fsdp': 1, 'expert': 1, 'tensor': 1}

    Args:
        axes: Sizes by axis; axes not named have size 1. None: `fsdp` over every device, which is the least memory on
            each, and right for any model.
        devices: Defaults to all devices of all processes.

    Warns where `tensor` has to cross nodes: its size should divide the devices of a node.

    Raises:
        InputError: Unknown axis, a size below 1, sizes that do not multiply to the number of devices; nodes
            with different numbers of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"fsdp": len(devices)} if axes is None else parse_axes(axes) if isinstance(axes, str) else dict(axes)
    for name, size in sizes.items():
        if name not in MESH_AXES:
            raise InputError(f"Unknown mesh axis {name!r}; the axes are {', '.join(MESH_AXES)}.")
        if size < 1:
            raise InputError(f"Mesh axis {name}={size}: a size is at least 1.")
    if math.prod(sizes.values()) != len(devices):
        asked = ",".join(f"{k}={v}" for k, v in sizes.items())
        raise InputError(
            f"Mesh {asked} needs {math.prod(sizes.values())} devices, but {len(devices)} are available. "
            f"On CPU, JAX_NUM_CPU_DEVICES={math.prod(sizes.values())} simulates them."
        )
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    if len(nodes(devices)) == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    return Mesh(across_nodes(shape, devices), MESH_AXES, axis_types=types)


def nodes(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by what connects them fast: a slice (of a GPU the machine, or its NVLink domain), or a process."""
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        node = getattr(device, "slice_index", None)
        groups.setdefault(device.process_index if node is None else node, []).append(device)
    return [groups[node] for node in sorted(groups)]


def across_nodes(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of several nodes as an array of this shape, its last axes inside the nodes as far as they fit.

    Neighbours along the last axis share a node where its size and the node's have a common divisor, then those along
    the axis before it in what is left of the node. Warns where the last axis does not fit.

    Raises:
        InputError: The nodes have different numbers of devices.
    """
    groups = nodes(devices)
    counts = {len(group) for group in groups}
    if len(counts) > 1:
        raise InputError(
            f"The nodes have different numbers of devices ({', '.join(map(str, sorted(counts)))}): a mesh needs the "
            "same of each."
        )
    left = counts.pop()
    inside: list[int] = []
    if left % shape[-1]:
        warnings.warn(
            f"tensor={shape[-1]} crosses nodes, which have {left} devices each: every layer then waits for the network "
            f"between them. Sizes that divide {left} stay inside a node.",
            stacklevel=3,
        )
    for size in reversed(shape):
        inside.insert(0, math.gcd(size, left))
        left //= inside[0]
    outside = [size // part for size, part in zip(shape, inside, strict=True)]
    has_slices = getattr(devices[0], "slice_index", None) is not None
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, process_is_granule=not has_slices)


def parse_axes(text: str) -> dict[str, int]:
    """`"fsdp=4,tensor=2"` as a dictionary; an InputError says what is wrong with anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not size.strip().isdigit() or name in sizes:
            raise InputError(f"Mesh {text!r} cannot be read; write axis=size, comma-separated, as in fsdp=4,tensor=2.")
        sizes[name.strip()] = int(size)
    return sizes


def data_shards(mesh: Mesh | None) -> int:
    """Parts a batch is cut into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of a batch whose sequences run along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH_AXES))


def constrain(x: jax.Array, mesh: Mesh | None, *cuts: str | tuple[str, ...] | None) -> jax.Array:
    """x pinned to a sharding: for each dimension the mesh axes that cut it.

    Dimensions not named stay whole, and so does one that does not divide (a single sequence on eight devices).
    """
    if mesh is None or mesh.size == 1:
        return x
    parts = [
        1 if cut is None else math.prod(mesh.shape[a] for a in ((cut,) if isinstance(cut, str) else cut))
        for cut in cuts
    ]
    spec = PartitionSpec(*(cut if n % part == 0 else None for cut, part, n in zip(cuts, parts, x.shape, strict=False)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Activations x [B, ...] pinned to the sharding of the batch, so that GSPMD gathers weights, not activations."""
    return constrain(x, mesh, BATCH_AXES)


def partition_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    """How an array with these logical axes is cut on `mesh`.

    Each mesh axis cuts the dimension that `AXIS_RULES` names for it. Where that is missing or does not divide (one key
    head on two devices, an odd vocabulary), the mesh axis joins another cut of the same array, so that the weight is
    gathered like any `fsdp` weight, or else cuts the largest dimension that divides. What no dimension allows stays
    whole along that mesh axis, and so do arrays of fewer than `WHOLE_BELOW` elements that no rule names: gathering a
    norm's gain costs more than it saves.
    """
    cuts: list[tuple[str, ...]] = [()] * len(shape)
    unplaced = []
    for mesh_axis in PARAM_AXES:
        if mesh.shape[mesh_axis] == 1:
            continue
        named = [i for i, axis in enumerate(axes) if axis is not None and AXIS_RULES.get(axis) == mesh_axis]
        place = next((i for i in named if not cuts[i] and shape[i] % mesh.shape[mesh_axis] == 0), None)
        if place is None:
            unplaced.append(mesh_axis)
        else:
            cuts[place] = (mesh_axis,)
    for mesh_axis in unplaced if math.prod(shape) >= WHOLE_BELOW else ():
        parts = [math.prod(mesh.shape[a] for a in cut) * mesh.shape[mesh_axis] for cut in cuts]
        divides = [i for i, n in enumerate(shape) if n % parts[i] == 0]
        if divides:
            place = max(divides, key=lambda i: (len(cuts[i]), shape[i]))
            cuts[place] = (*cuts[place], mesh_axis)
    return PartitionSpec(*(cut if len(cut) > 1 else cut[0] if cut else None for cut in cuts))


def param_shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
    """`NamedSharding` for every leaf of `abstract` (arrays or `ShapeDtypeStruct`s).

    Warns, naming the leaves, when arrays that no dimension allows to cut leave a device with a tenth more than its
    share: a mesh that divides the model's sizes is then worth choosing.

    Args:
        abstract: A pytree of nested dictionaries.
        axes: The same tree with a tuple of logical axis names at each leaf.
        mesh: Where the arrays shall live.
    """
    shardings = jax.tree.map(lambda x, names: NamedSharding(mesh, partition_spec(x.shape, names, mesh)), abstract, axes)
    parts = math.prod(mesh.shape[axis] for axis in PARAM_AXES)
    whole = local = 0
    uncut = []
    for (path, x), sharding in zip(jax.tree.flatten_with_path(abstract)[0], jax.tree.leaves(shardings), strict=True):
        here = math.prod(sharding.shard_shape(x.shape))
        whole, local = whole + x.size, local + here
        if x.size >= WHOLE_BELOW and here * parts > x.size:
            uncut.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(x.shape)}")
    if local * parts > 1.1 * whole and uncut:
        warnings.warn(
            f"Each device holds {local * parts / whole:.1f} times its share of the parameters, because the mesh "
            f"{dict(mesh.shape)} does not divide {', '.join(uncut)}.",
            stacklevel=2,
        )
    return shardings
