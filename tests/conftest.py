"""Settings that every test shares: one thread, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import torch

torch.set_num_threads(1)
