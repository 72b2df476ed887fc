"""Tests run offline on a CPU; what they need, they build."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads that wait for each other cost more than they gain on models this small.
os.environ["OMP_NUM_THREADS"] = "1"
