import os

# Before anything imports wandb: tests neither upload nor start its service, except the one that looks at an offline run.
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

# The suite's tensors are small, and tests may share the machine's cores with simulators.
torch.set_num_threads(1)
