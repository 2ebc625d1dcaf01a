"""Flags of XLA for the tests, in their own process and in those that they start."""

from importlib.metadata import version


def flags(devices: int = 1) -> str:
    """So many CPU devices, and quick compilation.

    Most of the suite's time is compilation of tiny programs; optimising them would cost more than it saves.
    """
    quick = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if version("jaxlib").startswith(
        "0.10."
    ):  # later versions know no other emitters, and end on flags they do not know
        quick.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *quick])
