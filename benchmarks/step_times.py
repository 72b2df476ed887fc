"""Several trainings in one process whose steps take turns, so that a busy machine slows all of them alike."""

import threading
import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Turn(TrainerCallback):
    """Times each optimizer step of one training, and lets the next training take a step in between.

    A step's time runs from where the turn comes back to the end of the step: it includes fetching and padding the
    batch, the forward and backward passes, clipping, the optimizer and all that the Trainer does besides.
    """

    def __init__(self, clock: str, device: torch.device) -> None:
        self.clock, self.device = CLOCKS[clock], device
        self.mine = self.following = threading.Semaphore(0)
        self.seconds: list[float] = []
        self.error: BaseException | None = None
        self.start = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds.append(self.clock() - self.start)
        self.following.release()
        self.wait()

    def wait(self) -> None:
        self.mine.acquire()
        self.start = self.clock()

    def run(self, train: Callable[[TrainerCallback], None]) -> None:
        """The whole training, in a thread of its own that moves only when it has the turn."""
        self.wait()
        try:
            train(self)
        except BaseException as error:
            self.error = error
        self.following.release()


def step_times(
    trainings: dict[str, Callable[[TrainerCallback], None]], clock: str, device: torch.device, n_warmup: int
) -> dict[str, list[float]]:
    """Runs trainings of equally many steps in turn, step by step.

    Args:
        trainings (`dict`): By name, functions that build a Trainer with the callback that they are given, and train.
        clock (`str`): `"wall"`, or `"cpu"` for the seconds that this process computed, which other processes disturb
            less; then run with one thread, since waiting threads compute too.
        device (`torch.device`): Where they train.
        n_warmup (`int`): First steps of each that are left out.

    Returns:
        `dict[str, list[float]]`: Seconds of each step by name.
    """
    turns = {name: Turn(clock, device) for name in trainings}
    ring = list(turns.values())
    for turn, following in zip(ring, ring[1:] + ring[:1], strict=True):
        turn.following = following.mine
    threads = [
        threading.Thread(target=turns[name].run, args=(train,), daemon=True) for name, train in trainings.items()
    ]
    for thread in threads:
        thread.start()
    ring[0].mine.release()
    for thread in threads:
        while thread.is_alive():
            # The trainings behind one that failed wait for a turn that never comes.
            thread.join(timeout=1.0)
            for turn in ring:
                if turn.error is not None:
                    raise turn.error
    return {name: turn.seconds[n_warmup:] for name, turn in turns.items()}
