"""What an optimiser divides by, out of files: the state of PyTorch's Adam and AdamW, or a diagonal under our names.

Second moments belong to weights entry by entry, so that they are transposed, stacked and cut like these by the tables
of the families. No family rescales or shifts a weight in conversion (norms that multiply by 1 + gain keep the gain).
"""

from __future__ import annotations

import dataclasses
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.configs import family_of, hugging_face_config
from convert.json_files import one_line, shown
from convert.layout import Slices
from convert.loading import read_parameters
from convert.mapping import axis_sizes, mapping_rows
from convert.orbax_checkpoint import parameter_shardings
from convert.source import StoredTensor, as_numpy, check_plain, load_torch
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.models import DecoderConfig, LanguageModel, abstract_params
from jaxhess.operators.adam import adam_threshold
from jaxhess.operators.restriction import leaf_name
from jaxhess.vectors import Vector

OPTIMIZER = "optimizer.pt"

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of parameters that the Trainer of transformers 5 does not decay, beside all of `torch.nn.LayerNorm`."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Whose defaults in `transformers` may be beyond a small vocabulary."""


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """A diagonal D for `LinearOperator.preconditioned`, and what is known of the training that it is from.

    Examples:
        >>> import convert, jax.numpy as jnp
        >>> convert.Preconditioner({"w": jnp.ones(2)}, learning_rate=1e-3, b1=0.9).learning_rate
        0.001

    Attributes:
        diagonal: A tree like the model's parameters, positive, in float32, or float64 where JAX is in 64-bit mode and
            the file has it.
        learning_rate: As saved, which is that of the next step; None: not known, or not the same for all parameters.
        b1: Decay of first moments, likewise.
        steps: That were made, likewise.
    """

    diagonal: Vector
    learning_rate: float | None = None
    b1: float | None = None
    steps: int | None = None

    @property
    def threshold(self) -> float | None:
        """`jaxhess.adam_threshold` of that training; None: not known."""
        if not self.learning_rate or self.b1 is None:
            return None
        return adam_threshold(self.learning_rate, self.b1, self.steps)


def load_preconditioner(
    path: str | Path, model: LanguageModel, *, eps: float | None = None, bias_correction: bool = True
) -> Preconditioner:
    """What an optimiser divides by, on the model's mesh.

    Examples:
        >>> import convert, jax, numpy, pathlib, tempfile
        >>> from jaxhess.operators.restriction import leaf_name
        >>> model = convert.load("scripts/tiny")
        >>> leaves = jax.tree.leaves_with_path(model.params)
        >>> ones = {leaf_name(path): numpy.ones(x.shape, "float32") for path, x in leaves}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.savez(pathlib.Path(folder) / "d.npz", **ones)
        ...     found = convert.load_preconditioner(pathlib.Path(folder) / "d.npz", model)
        >>> found.diagonal["embed"]["kernel"].shape == model.params["embed"]["kernel"].shape
        True

    Args:
        path: One of

            - `optimizer.pt`, or the folder of a checkpoint with it, as the Trainer of `transformers` saves it:
              `torch.save(optimizer.state_dict(), path)` of Adam or AdamW (with AMSGrad too). D is then
              `sqrt(exp_avg_sq / (1 - beta2^step)) + eps`, of each parameter its own step, beta2 and eps. Such a file
              has no names but where the optimiser was made from `named_parameters()`. Without names parameters are
              taken to be in the order of the model in `transformers`: in one group, or those that are decayed first,
              in two, as the Trainer does it. Shapes of all tensors are compared; two of one shape that a program of
              one's own had exchanged could not be told apart.
            - `.npz`: D itself, under our parameters' names (`layers/mlp/up/kernel`), from whatever optimiser. From
              optax it is `jaxhess.adam_preconditioner`.
        model: Whose parameters these are.
        eps: In place of the saved one.
        bias_correction: Divide by `1 - beta2^step`, as Adam does.

    Raises:
        InputError: There is no such file, or it is damaged; it is the state of another optimiser, or of another model
            (names the first tensor that differs, and both shapes); a second moment is missing, negative or not finite;
            D would have a zero; an `.npz` with `eps` or without bias correction.
    """
    path = Path(path).expanduser()
    if eps is not None and not 0 <= eps < math.inf:
        raise InputError(f"eps {eps} must be a finite number, 0 or more.")
    file = path / OPTIMIZER if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"There is no file {file}: a preconditioner is an optimizer.pt, or an .npz.")
    if file.suffix == ".npz":
        if eps is not None or not bias_correction:
            raise InputError(f"{file} holds the diagonal itself: eps and bias correction are no options for it.")
        return Preconditioner(processes.on_every(lambda: _read_npz(file, model)))
    return processes.on_every(lambda: _read_torch(file, model, eps, bias_correction))


class _Denominators:
    """What Adam divides each tensor of a PyTorch model by: a `TensorSource`."""

    def __init__(self, file: Path, states: Mapping[str, _Moment], buffers: Mapping[str, tuple[int, ...]]):
        self.directory = file
        self._states = states
        shapes = {name: tuple(state.moment.shape) for name, state in states.items()} | dict(buffers)
        self.tensors: Mapping[str, StoredTensor] = {n: StoredTensor(file, s, "float64") for n, s in shapes.items()}

    def read(self, name: str, slices: Slices) -> np.ndarray:
        if name not in self._states:  # no parameter there, and without curvature here
            return np.ones([s.stop - s.start for s in slices])
        state = self._states[name]
        moment = as_numpy(state.moment[slices]).astype(np.float64)
        if not np.isfinite(moment).all():
            raise InputError(f"The second moment of {name} in {self.directory} holds NaN or infinite values.")
        if moment.min(initial=0) < 0:
            raise InputError(
                f"The second moment of {name} in {self.directory} has a negative entry, {moment.min():.3g}: it is a "
                "mean of squares."
            )
        found = np.sqrt(moment / state.correction) + state.eps
        if not found.all():
            raise InputError(
                f"The second moment of {name} in {self.directory} has a zero, and eps is 0: nothing can be divided by "
                "it."
            )
        return found


@dataclasses.dataclass(frozen=True)
class _Moment:
    """The second moment of one tensor of a PyTorch model, what it is divided by, and eps."""

    moment: Any
    correction: float
    eps: float


def _read_torch(file: Path, model: LanguageModel, eps: float | None, bias_correction: bool) -> Preconditioner:
    config = model.config
    loaded = load_torch(file, "no plain state of an optimizer")
    state, groups = (loaded.get(key) if isinstance(loaded, dict) else None for key in ("state", "param_groups"))
    if not isinstance(state, dict) or not isinstance(groups, list) or not groups:
        raise InputError(f"{file} is no state of a PyTorch optimizer: it has no state and param_groups.")
    shapes, normalised = _transformers_parameters(config)
    named = _named(file, state, groups, shapes, normalised)
    moments = {n: _moment(file, n, shapes[n], *found, eps, bias_correction) for n, found in named.items()}
    family = family_of(hugging_face_config(config))
    head = family.head_alias or family.head
    rows = mapping_rows(family, config, prefix=family.prefix, head=head, in_memory=True)
    sizes = axis_sizes(config)
    needed = {name: row.layout.shape(sizes) for row in rows for name in row.names}
    buffers = {name: shape for name, shape in needed.items() if name not in shapes}
    source = _Denominators(file, moments, buffers)
    wide = jax.config.read("jax_enable_x64") and all(str(m.moment.dtype) == "torch.float64" for m in moments.values())
    dtype = "float64" if wide else "float32"
    diagonal = read_parameters(dataclasses.replace(config, dtype=dtype), source, rows, model.mesh)
    rates = {_number(group.get("lr")) for group in groups}
    decays = {_betas(file, group)[0] for group in groups}
    made = {int(step) for own, _ in named.values() if (step := _number(own["step"])) is not None}
    rate, b1, steps = (next(iter(x)) if len(x) == 1 else None for x in (rates, decays, made))
    return Preconditioner(diagonal, rate, b1, None if steps is None else int(steps))


def _transformers_parameters(config: DecoderConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes by the names of `named_parameters()`, in its order, and which are of a `torch.nn.LayerNorm`."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    described = {**hugging_face_config(config), **dict.fromkeys(_TOKENS)}
    with torch.device("meta"):
        module: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[described["model_type"]].from_dict(described))
    layer_norms = {name for name, part in module.named_modules() if isinstance(part, torch.nn.LayerNorm)}
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    return shapes, {name for name in shapes if name.rpartition(".")[0] in layer_norms}


def _named(
    file: Path, state: dict[Any, Any], groups: list[Any], shapes: Mapping[str, tuple[int, ...]], normalised: set[str]
) -> dict[str, tuple[Any, Any]]:
    """For every parameter the state and the group it is in.

    Raises:
        InputError: They are those of another model.
    """
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise InputError(f"{file} is no state of a PyTorch optimizer: a group has no params.")
    keys = [[*group["params"]] for group in groups]
    told = [group.get("param_names") for group in groups]
    if all(isinstance(key, str) for of_group in keys for key in of_group):
        told = keys
    orders = _orders(shapes, normalised, len(groups))
    if all(isinstance(names, list) and len(names) == len(of) for names, of in zip(told, keys, strict=True)):
        orders = [[[_plain_name(name) for name in names] for names in told]]
    elif not orders:
        raise InputError(
            f"{file} has {len(groups)} groups of parameters without names; one group, or the two of the Trainer, are "
            "understood. Make the optimizer from model.named_parameters(), whose names are kept."
        )
    reasons = []
    for order in orders:
        reason = _difference(order, keys, state, shapes)
        if reason is None:
            return {
                name: (state.get(key), group)
                for names, of_group, group in zip(order, keys, groups, strict=True)
                for name, key in zip(names, of_group, strict=True)
            }
        reasons.append(reason)
    raise InputError(f"{file} is the state of another model: {reasons[0]}.")


def _orders(shapes: Mapping[str, tuple[int, ...]], normalised: set[str], groups: int) -> list[list[list[str]]]:
    """The orders in which parameters without names may be: of each group the names.

    In two groups those that are decayed come first: by the Trainer of transformers 5; by that of earlier ones, which
    left out biases and some classes of norms; or all matrices.
    """
    if groups == 1:
        return [[list(shapes)]]
    rules: list[Callable[[str], bool]] = [
        lambda name: name not in normalised and not _NO_DECAY.search(name.lower()),
        lambda name: name not in normalised and "bias" not in name,
        lambda name: len(shapes[name]) >= 2,
    ]
    if groups != 2:
        return []
    return [[[n for n in shapes if rule(n)], [n for n in shapes if not rule(n)]] for rule in rules]


def _difference(
    order: list[list[str]], keys: list[list[Any]], state: dict[Any, Any], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Where the states are not those of these parameters, None: nowhere."""
    names = [name for of_group in order for name in of_group]
    for name in names:
        if name not in shapes:
            return f"it has a parameter {name}, which the model has not"
    for name in shapes:
        if names.count(name) != 1:
            return f"it has {names.count(name)} states of {name}"
    for of_group, own in zip(order, keys, strict=True):
        for name, key in zip(of_group, own, strict=False):
            own_state = state.get(key)
            moment = own_state.get("exp_avg_sq") if isinstance(own_state, dict) else None
            shape = getattr(moment, "shape", None)
            if shape is not None and tuple(shape) != shapes[name]:
                return f"the second moment of {name} has shape {list(shape)}, the parameter {list(shapes[name])}"
        if len(of_group) != len(own):
            first = of_group[len(own)] if len(own) < len(of_group) else of_group[-1]
            where = "there is none of" if len(own) < len(of_group) else "there are more after"
            return f"a group has {len(own)} parameters where the model has {len(of_group)}; {where} {first}"
    return None


def _plain_name(name: Any) -> str:
    """Without what compilation and data parallelism put before it."""
    return re.sub(r"^(?:module\.|_orig_mod\.)+", "", name if isinstance(name, str) else shown(name))


def _moment(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    state: Any,
    group: dict[str, Any],
    eps: float | None,
    bias_correction: bool,
) -> _Moment:
    import torch

    if not isinstance(state, dict) or not state:
        raise InputError(f"{file} has no second moment of {name}: it was frozen, or no step was made.")
    if "amsgrad" not in group:  # NAdam and RAdam keep the same moments and divide by something else
        raise InputError(f"{file} is not the state of Adam or AdamW, whose groups have amsgrad; these have not.")
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    moment, step = state.get(key), _number(state.get("step"))
    if not isinstance(moment, torch.Tensor):
        raise InputError(
            f"{file} has no second moment of {name} ({key}), but {_listed(state)}: it is not the state of Adam."
        )
    check_plain(name, moment, file)
    if tuple(moment.shape) != shape:
        raise InputError(
            f"{file} is the state of another model: the second moment of {name} ({key}) has shape "
            f"{list(moment.shape)}, the parameter {list(shape)}."
        )
    beta2 = _betas(file, group)[1]
    eps = _number(group.get("eps")) if eps is None else eps
    if eps is None or not 0 <= eps < math.inf:
        raise InputError(f"{file} has eps {group.get('eps')} for {name}; it must be a number, 0 or more.")
    if not bias_correction:
        return _Moment(moment, 1.0, eps)
    if step is None or not 1 <= step < math.inf:
        raise InputError(f"{file} has step {step} for {name}; it must be a number, 1 or more.")
    return _Moment(moment, 1 - beta2**step, eps)


def _listed(entries: dict[str, Any]) -> str:
    return ", ".join(map(shown, entries)) or "nothing"


def _betas(file: Path, group: dict[str, Any]) -> tuple[float, float]:
    found = group.get("betas")
    betas = [_number(beta) for beta in found] if isinstance(found, list | tuple) else []
    if len(betas) != 2 or not all(beta is not None and 0 <= beta < 1 for beta in betas):
        raise InputError(f"{file} has betas {shown(found)} in a group; Adam has two, from 0 to below 1.")
    return betas[0], betas[1]  # type: ignore[return-value]


def _number(value: Any) -> float | None:
    """A number, or a tensor of one."""
    if hasattr(value, "numel") and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_npz(file: Path, model: LanguageModel) -> Vector:
    """Arrays under our names, each laid out like its parameter."""
    like = abstract_params(model.config)
    named = [(leaf_name(path), x) for path, x in jax.tree.flatten_with_path(like)[0]]
    shardings = jax.tree.leaves(parameter_shardings(model.config, model.mesh))
    found = []
    try:
        with np.load(file, allow_pickle=False) as stored:
            _check_names(file, stored.files, [name for name, _ in named])
            for (name, x), sharding in zip(named, shardings, strict=True):  # one array in memory at a time
                array = stored[name]
                if array.shape != x.shape or array.dtype.kind != "f":
                    raise InputError(
                        f"{file} is of another model: {name} is {array.dtype} {list(array.shape)}, the parameter has "
                        f"shape {list(x.shape)}."
                    )
                wide = array.astype(jnp.promote_types(array.dtype, jnp.float32), copy=False)
                found.append(jax.make_array_from_callback(wide.shape, sharding, wide.__getitem__))
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} cannot be read as an .npz of arrays ({one_line(error)}).") from error
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _check_names(file: Path, stored: list[str], wanted: list[str]) -> None:
    if extra := sorted(set(stored) - set(wanted)):
        raise InputError(f"{file} is of another model: it has {shown(extra[0])}, which is no parameter of this one.")
    for name in wanted:
        if name not in stored:
            raise InputError(f"{file} has no {name}: it must have a value for every parameter.")
