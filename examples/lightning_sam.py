"""SAM in Lightning by one callback, with both halves of the Hessian in TensorBoard. The module knows of neither."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import twofold
from twofold.integrations.lightning import CurvatureMonitor, RegularizerCallback


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 5))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


torch.manual_seed(0)
data = TensorDataset(torch.randn(512, 20), torch.randint(5, (512,)))
probe = data[:128]  # the batch that is measured

trainer = Trainer(
    max_epochs=3,
    accelerator="cpu",
    precision="bf16-mixed",
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    logger=TensorBoardLogger("logs"),
    log_every_n_steps=1,
    enable_progress_bar=False,
    callbacks=[
        RegularizerCallback(twofold.SAM(rho=0.05)),  # or GaussNewtonTrace(strength=1e-3), GradientPenalty(rho=0.1), ...
        CurvatureMonitor(nn.CrossEntropyLoss(), probe, rho=0.05),  # every_n_steps=100 for long epochs
    ],
)
trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))

for name in ("curvature/gauss_newton/trace", "curvature/nme/trace", "fidelity/hessian/cosine"):
    print(f"{name:30} {trainer.callback_metrics[name]:8.3f}")
