"""DeepSpeed ZeRO: optimizer state (zero1), gradients too (zero2) and weights too (zero3) sharded over the ranks.

DeepSpeed partitions, reduces, clips and skips; its launcher, schedules, checkpoints, logs and compiled operations are not
used. This is the only module that imports it, and only when an engine is built.

In every stage the optimizer of a rank steps a few flat fp32 tensors that hold its share of all parameters. A :class:`Piece`
says which part of a parameter lies where in them. State is read and written through pieces alone, because DeepSpeed 0.19's own
access fails: with two parameter groups on zero1 and zero2 (reading the moments), with sizes that the ranks do not divide on
zero3 (writing), and it does not renew the weights of the forward after a write. Frozen parameters are in no flat tensor; they
are kept whole and exact beside.
"""

from __future__ import annotations

import gc
import importlib.metadata
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nepa_dist.config import Config, ConfigError
from nepa_dist.engines.base import (
    NamedStateSource,
    ParameterState,
    StateMismatchError,
    StepResult,
    check_state,
    copy_state,
)
from nepa_dist.engines.census import Census, Part
from nepa_dist.engines.native import images_in_bf16, swap
from nepa_dist.engines.prepare import prepare
from nepa_dist.optim import AdamWEMA, param_groups
from nepa_dist.plan import Plan

if TYPE_CHECKING:
    from nepa_dist.tasks.base import Task

BUCKET_NUMEL = 50_000_000
"""Gradients that are reduced together, in elements; a larger parameter makes the buckets larger."""
WHOLE_NUMEL = 10_000
"""zero3: parameters of at most this many elements (biases, norms) are kept whole on every rank."""


class Piece(NamedTuple):
    """The part of one parameter that this rank keeps; it may be empty."""

    flat: Tensor
    """The optimizer's fp32 tensor; of a frozen parameter, what the forward computes with."""
    offset: int
    """Of the part in ``flat``."""
    start: int
    """Of the part in the flattened parameter."""
    numel: int

    def of_flat(self, tensor: Tensor) -> Tensor:
        """View of the part in ``flat``, or in a tensor laid out like it."""
        return tensor.narrow(0, self.offset, self.numel)

    def of_parameter(self, tensor: Tensor) -> Tensor:
        """View of the part in the whole parameter."""
        return tensor.view(-1).narrow(0, self.start, self.numel)


class ZeroEngine:
    """See :class:`nepa_dist.engines.base.Engine`.

    Args:
        task: the module to train; its parameters move to ``device``, and with zero3 are taken apart.
        config: precision, clipping, optimizer; ``engine.name`` zero1, zero2 or zero3.
        plan: micro-batches per update.
        device: of this rank. The default process group must exist.

    Raises:
        ConfigError: DeepSpeed is missing or of another version.
    """

    def __init__(self, task: Task, config: Config, plan: Plan, device: torch.device) -> None:
        check_version()
        prepare(task, config.engine, device)
        self._task = task
        self._device = device
        self._accum = plan.grad_accum_steps
        self._micro = 0
        self._sharded_weights = config.engine.name == "zero3"
        self._shapes = {name: p.shape for name, p in task.named_parameters()}
        # What the task's parts hold by themselves; DeepSpeed adds to it.
        self._attributes = [(vars(part), set(vars(part))) for part in (*task.modules(), *task.parameters())]
        initial = {name: p.detach() for name, p in task.named_parameters()}
        # DeepSpeed rounds frozen weights to bf16 or takes them apart.
        self._frozen = {
            name: p.to(device, copy=True) for name, p in initial.items() if not task.get_parameter(name).requires_grad
        }
        groups = param_groups(task.named_parameters(), config.optim.weight_decay, task.lr_layer)
        # The parameters come after construction: no state is made for them, only for this rank's share.
        self._optimizer = AdamWEMA([{**group, "params": []} for group in groups], config.optim)
        for own, group in zip(self._optimizer.param_groups, groups, strict=True):
            own["params"] = list(group["params"])
        settings = _settings(config, plan, [p.numel() for p in task.parameters()])
        self._engine = _initialize(_Root(task, config.engine.precision, device), self._optimizer, settings, device)
        self._flats, self._pieces = self._lay_out(groups)
        if config.engine.precision == "bf16_params":
            # DeepSpeed's fp32 weights come from its bf16 ones; here the rounded ones come from the exact ones.
            for name, piece in self._pieces.items():
                piece.of_flat(piece.flat.detach()).copy_(piece.of_parameter(initial[name]))
        self._optimizer.begin(self._flats)
        self._optimizer.register_step_pre_hook(lambda *_: self._skip_huge())
        parts = (Part(name, p.flat, p.offset, p.numel) for name, p in self._pieces.items() if name not in self._frozen)
        self._census = Census(parts, device, dist.group.WORLD)
        self._clip = config.optim.clip_grad_norm

    def _lay_out(self, groups: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], dict[str, Piece]]:
        """The optimizer's flat tensors, and where each parameter lies in them."""
        inner = self._engine.optimizer
        pieces = {}
        if self._sharded_weights:
            flats = list(inner.fp32_partitioned_groups_flat)
            for name, parameter in self._task.named_parameters():
                flat, offset = parameter.ds_tensor, 0  # type: ignore[attr-defined]
                numel, share = self._shapes[name].numel(), flat.numel()
                if name not in self._frozen:
                    index, offset, _ = inner.grad_position[inner.get_param_id(parameter)]
                    flat = flats[index]
                start = min(dist.get_rank() * share, numel)  # the shares are equal, so the last ones may be padded
                pieces[name] = Piece(flat, offset, start, min(share, numel - start))
            return flats, pieces
        flats = [group["params"][0] for group in self._optimizer.param_groups]
        flat_of = {id(p): flat for group, flat in zip(groups, flats, strict=True) for p in group["params"]}
        for name, parameter in self._task.named_parameters():
            if name in self._frozen:
                pieces[name] = Piece(parameter.data.view(-1), 0, 0, parameter.numel())
                continue
            link = parameter._hp_mapping  # type: ignore[attr-defined]
            flat = flat_of[id(parameter)]
            if link is None:
                pieces[name] = Piece(flat, 0, 0, 0)
            else:
                there, here = link.hp_fragment_address, link.lp_fragment_address
                pieces[name] = Piece(flat, there.start, here.start, here.numel)
        return flats, pieces

    def model(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward one micro-batch."""
        loss, logs = self._engine(dict(batch))  # hooks of zero3 write to the dictionary
        return loss, logs

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]:
        """Groups whose ``lr`` the loop sets."""
        return self._optimizer.param_groups

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate ``loss / grad_accum_steps``."""
        if last != (self._micro + 1 == self._accum):
            raise RuntimeError(f"micro-batch {self._micro + 1} of {self._accum} was announced with last={last}")
        self._micro += 1
        self._engine.backward(loss / self._accum, scale_wrt_gas=False)

    def step(self, *, observe: bool = False) -> StepResult:
        """Clip, update unless the norm is not finite, clear."""
        self._optimizer.observe = self._census.add if observe else None
        self._engine.step()
        self._micro = 0
        norm = self._norm(self._engine.get_global_grad_norm())
        applied = norm.isfinite() * float(self._engine.was_step_applied())
        return StepResult(norm, applied, self._census.take(norm, self._clip) if observe else {})

    def _norm(self, value: Any) -> Tensor:
        """DeepSpeed's norm, a tensor of either precision or a Python number, as every other engine has it.

        zero3 sums in fp64. Where the sum of squares is too large for fp32, the other engines see infinity and skip the step.
        """
        norm = torch.as_tensor(value, dtype=torch.float32, device=self._device).reshape(())
        return torch.where(norm.square().isfinite(), norm, torch.inf)

    def _skip_huge(self) -> None:
        """Before the update: have the optimizer change nothing if the norm is not finite."""
        norm = self._norm(self._engine.optimizer._global_grad_norm)
        self._optimizer.found_inf = 1 - norm.isfinite().float()

    def _fields(self, flat: Tensor) -> dict[str, Tensor]:
        return {"weight": flat.detach(), **self._optimizer.state[flat]}

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Full state of every parameter, gathered one at a time."""
        for name, piece in self._pieces.items():
            if name in self._frozen:
                yield name, {"weight": self._frozen[name]}
                continue
            fields = self._fields(piece.flat)
            step = fields.pop("step")
            whole = torch.zeros(len(fields), self._shapes[name].numel(), device=self._device)
            for row, flat in zip(whole, fields.values(), strict=True):
                piece.of_parameter(row).copy_(piece.of_flat(flat))
            # Each element comes from one rank and the others have 0: as integers the sum keeps every bit.
            dist.all_reduce(whole.view(torch.int32))
            rows = (row.view(self._shapes[name]) for row in whole)
            yield name, {**dict(zip(fields, rows, strict=True)), "step": step}

    @torch.no_grad()
    def load_named_state(self, source: NamedStateSource, *, keep_average: bool = False) -> None:
        """Set every parameter's state; each rank keeps its share of what it reads."""
        self._optimizer.keep_average = keep_average
        check_state(self._shapes, source)
        loaded: dict[Tensor, tuple[str, Tensor]] = {}
        for name, piece in self._pieces.items():
            if name in self._frozen:
                exact = self._frozen[name]
                copy_state(name, {"weight": exact}, source.read(name))
                piece.of_flat(piece.flat).copy_(piece.of_parameter(exact))
                continue
            fields = self._fields(piece.flat)
            shapes = {field: () if value.dim() == 0 else self._shapes[name] for field, value in fields.items()}
            whole = {field: torch.zeros(shape, device=self._device) for field, shape in shapes.items()}
            copy_state(name, whole, source.read(name))
            first, step = loaded.setdefault(piece.flat, (name, whole["step"]))
            if not torch.equal(step, whole["step"]):
                raise StateMismatchError(
                    f"{name}: step is {whole['step']:g} in the checkpoint, but {step:g} for {first}; with DeepSpeed all "
                    "parameters of a group share one step count, so load this checkpoint with ddp or fsdp2"
                )
            for field, value in fields.items():
                if field == "step":
                    value.copy_(step)
                else:
                    piece.of_flat(value).copy_(piece.of_parameter(whole[field]))
        self._refresh()

    def _refresh(self) -> None:
        """Renew the weights of the forward after the fp32 ones were written. A collective."""
        inner = self._engine.optimizer
        if not self._sharded_weights:
            inner.update_lp_params()
            return
        inner._partition_all_parameters()  # what is gathered is stale
        for index in range(len(self._flats)):
            inner._reassign_or_swap_out_partitioned_parameters(index)
        if inner.persistent_parameters:
            inner.persistent_parameters[0].all_gather(inner.persistent_parameters)

    @torch.no_grad()
    def _swap(self) -> None:
        for flat in self._flats:
            swap(flat, self._optimizer.state[flat]["ema"])
        self._refresh()

    @contextmanager
    def weights(self, *, ema: bool) -> Iterator[None]:
        """Swap the averages in for the duration of the context."""
        if not ema:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def close(self) -> None:
        """Remove DeepSpeed's hooks and let go of all it holds; another engine may follow."""
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.utils import groups

        root = self._engine.module
        self._engine.destroy()
        vars(root).clear()  # zero3 keeps it in a cache for ever, and its hooks lead to all the rest
        for attributes, own in self._attributes:
            for name in attributes.keys() - own:
                del attributes[name]  # they lead to all of DeepSpeed's memory for as long as the task lives
        parameter_offload.FWD_MODULE_STACK.clear()  # zero3 puts the module there and never takes it away
        groups._WORLD_GROUP = None  # belongs to this process group, which may end before the next engine
        del self._engine, self._optimizer, self._census, self._flats, self._pieces, self._frozen, self._task, self._attributes
        gc.collect()


class _Root(nn.Module):
    """The task in the run's precision. DeepSpeed ends an autocast that was entered outside of its own forward."""

    def __init__(self, task: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.task = task
        self._precision = precision
        self._device_type = device.type

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        if self._precision == "bf16_params":
            batch = images_in_bf16(batch)
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._precision == "bf16_autocast"):
            return self.task(batch)


def check_version() -> None:
    """Check that a DeepSpeed is installed whose inner parts this module knows, without importing it.

    Raises:
        ConfigError: it is missing or of another version.
    """
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(["engine.name zero1, zero2 and zero3 need DeepSpeed: pip install 'nepa-dist[deepspeed]'"]) from None
    # Earlier ones apply a NaN and call it a step of norm 1.41; the first of 0.19 drop micro-batches too.
    patch = re.match(r"0\.19\.(\d+)", version)
    if patch is None or int(patch[1]) < 8:
        needed = "engine.name zero1, zero2 and zero3 need deepspeed >=0.19.8,<0.20: pip install 'nepa-dist[deepspeed]'"
        raise ConfigError([f"deepspeed {version} is installed, but {needed}"])


def _settings(config: Config, plan: Plan, numels: Sequence[int]) -> dict[str, Any]:
    """DeepSpeed's configuration, from ours alone.

    Args:
        config: the run.
        plan: size of the micro-batches.
        numels: elements of each parameter.
    """
    engine = config.engine
    # One bucket for a small model; a parameter that is larger than a bucket would go another way.
    bucket = max(max(numels), min(BUCKET_NUMEL, sum(numels)))
    stage: dict[str, Any] = {"stage": int(engine.name[-1]), "reduce_bucket_size": bucket}
    if engine.name == "zero3":
        total = sum(numels)
        stage |= {
            "stage3_param_persistence_threshold": WHOLE_NUMEL,
            # Weights that are gathered ahead of use, and how soon a weight must be used again not to be freed.
            "stage3_max_live_parameters": total // 8 if engine.reshard_after_forward else 2 * total,
            "stage3_max_reuse_distance": 0 if engine.reshard_after_forward else 2 * total,
            "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear for the whole process
        }
    else:
        stage["reduce_scatter"] = False  # that path rounds the fp32 sum of bf16 gradients to bf16; the traffic is the same
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": 1,
        # step() ends the accumulation. Counted by DeepSpeed, zero1 and zero2 would drop all micro-batches but the last.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.clip_grad_norm or 0.0,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "bf16": {
            "enabled": engine.precision == "bf16_params",
            "check_grad_overflow": True,  # without it a NaN is applied and reported as applied
            "immediate_grad_update": True,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": engine.reduce_dtype,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # they wait for the GPU in every step
    }


def _initialize(root: nn.Module, optimizer: AdamWEMA, settings: dict[str, Any], device: torch.device) -> Any:
    """Make DeepSpeed's engine on the process group that exists."""
    # Read at import and later. LOCAL_SIZE saves a call of numactl in each backward on a CPU.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed

    # Would be compiled for a minute; it only speeds up reductions between processes on one CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its own calls, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    try:
        with redirect_stdout(io.StringIO()):  # and prints the memory that zero1 takes with bf16 weights
            engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=settings, dist_init_required=False)
    finally:
        logger.setLevel(logging.WARNING)
    return engine
