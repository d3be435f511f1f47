"""What a run would take, before anything is rented: memory, operations, traffic, time; what to change where it is much.

`formula` needs nothing but the model's configuration and the mesh's shape; `compiled` asks the compiler, on simulated
devices. Neither needs weights or data.

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
from jaxhess.plan.job import Job
from jaxhess.plan.verdict import EFFICIENCY, USABLE, Forecast, changes, forecast

__all__ = [
    "EFFICIENCY",
    "USABLE",
    "Compiled",
    "Forecast",
    "Job",
    "Memory",
    "changes",
    "compiled",
    "flops",
    "forecast",
    "gradient_traffic",
    "memory",
    "traffic",
]
