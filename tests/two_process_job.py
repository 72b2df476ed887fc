"""Run by two processes: one job of `hf-compress distill`, its words given.

python tests/two_process_job.py WORDS...
"""

import sys

from accelerate import debug_launcher

from hf_compress.cli.main import main

if __name__ == "__main__":
    debug_launcher(main, (["distill", *sys.argv[1:]],), num_processes=2)
