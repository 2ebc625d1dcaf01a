"""Flags of XLA for the tests, in their own process and in those that they start."""

from importlib.metadata import version

_TWO_EMITTERS = version("jaxlib").startswith("0.10.")
"""Later versions know the newer ones alone, and end on a flag that they do not know."""
AS_USERS_DO = {"xla_cpu_use_fusion_emitters": True} if _TWO_EMITTERS else None
"""Compiler options of programs that are to be equal to the bit: the older emitters round by their surroundings."""


def flags(devices: int = 1) -> str:
    """So many CPU devices, and quick compilation.

    Most of the suite's time is compilation of tiny programs; optimising them would cost more than it saves.
    """
    quick = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if _TWO_EMITTERS:
        quick.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *quick])
