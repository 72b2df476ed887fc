"""The processes that were launched together."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState


def process_state() -> "PartialState":
    """This process among those that were launched together, which the first call of all makes known to accelerate.

    Returns:
        `PartialState`: Of accelerate; there is one of it in a process.
    """
    from accelerate import PartialState

    # Without an accelerator it has to be told, or it takes each process for the only one.
    return PartialState() if torch.accelerator.is_available() else PartialState(cpu=True)


def leave_processes() -> None:
    """Closes this process's connections to the others, as its last act: with open ones, its exit may be an abort."""
    distributed = torch.distributed
    # Other launchers than torchrun and `accelerate launch` close what they opened themselves.
    if distributed.is_available() and distributed.is_torchelastic_launched() and distributed.is_initialized():
        distributed.destroy_process_group()
