"""Tests compute as ranks do, with one thread: the same sums in the same order, and no fight for cores."""

import torch

torch.set_num_threads(1)
