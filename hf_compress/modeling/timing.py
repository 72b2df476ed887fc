"""What every clock needs: an accelerator that has come to its end, and the name of what computed."""

import platform

import torch


def wait_for(device: torch.device) -> None:
    """Returns when a device has done all that it was given.

    Args:
        device (`torch.device`): Any.
    """
    # Kernels of an accelerator run on after Python has returned.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def processor_name(device: torch.device) -> str:
    """What computes on a device: the name of a GPU, or the architecture and the vector instructions of a CPU.

    Args:
        device (`torch.device`): Any.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
