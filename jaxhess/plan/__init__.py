"""What a run would take, before anything is rented: memory, operations, traffic, time; what to change where it is much.

`formula` needs nothing but the model's configuration and the mesh's shape; `compiled` asks the compiler, for simulated
CPUs or, with the extra `gpu-plan`, for GPUs that are not there (`gpu_devices`). Neither needs weights or data.

Examples:
    >>> import convert
    >>> from jaxhess import plan
    >>> config = convert.read_config("scripts/tiny/config.json")
    >>> job = plan.Job(config, axes={"fsdp": 8}, seq_len=128, sequences=64, microbatch=8)
    >>> plan.memory(job).total < 40e6, plan.forecast(job, "H100").fits  # bytes on each device
    (True, True)
"""

from jaxhess.plan.compiled import Compiled, compiled, gradient_traffic
from jaxhess.plan.formula import Memory, flops, memory, traffic
from jaxhess.plan.gpu import USABLE, gpu_devices
from jaxhess.plan.job import Job
from jaxhess.plan.roofline import Kernels, Roofline, roofline, whole_copies
from jaxhess.plan.verdict import EFFICIENCY, Forecast, changes, forecast

__all__ = [
    "EFFICIENCY",
    "USABLE",
    "Compiled",
    "Forecast",
    "Job",
    "Kernels",
    "Memory",
    "Roofline",
    "changes",
    "compiled",
    "flops",
    "forecast",
    "gpu_devices",
    "gradient_traffic",
    "memory",
    "roofline",
    "traffic",
    "whole_copies",
]
