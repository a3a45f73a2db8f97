"""One of the processes of a distributed Trainer: keeps the weights that it ends with in the folder that it is given."""

import sys
from pathlib import Path

import torch

import twofold
from integrations.test_transformers import problem, train

folder = Path(sys.argv[1])
model, data = problem()
train(model, data, folder, twofold.SAM(rho=0.1), ddp_backend="gloo")
torch.save(model.state_dict(), folder / f"{torch.distributed.get_rank()}.pt")
