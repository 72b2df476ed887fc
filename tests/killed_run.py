"""Runs `hf-compress` with the given words and kills the process, as the system would, after some steps of a training.

python tests/killed_run.py STEP WORDS...
"""

import os
import signal
import sys

from transformers import TrainerCallback, trainer

from hf_compress.cli.main import main


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    trainer.DEFAULT_CALLBACKS.append(Kill)
    main(sys.argv[2:])
