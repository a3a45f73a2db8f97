"""SAM in the Hugging Face Trainer, with both halves of the Hessian in its logs. The model is a tiny GPT-2."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import twofold
from twofold.integrations.transformers import RegularizedMixin, watch_curvature


class RegularizedTrainer(RegularizedMixin, Trainer):
    """The Trainer with regularizer=."""


torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
ids = torch.randint(64, (96, 16))
data = [{"input_ids": row, "labels": row} for row in ids]

trainer = RegularizedTrainer(
    model,
    TrainingArguments(
        "logs",
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        bf16=True,
        use_cpu=True,
        logging_steps=4,
        learning_rate=1e-3,
        report_to=[],  # or ["tensorboard"], ["wandb"]
        save_strategy="no",
    ),
    train_dataset=data,
    regularizer=twofold.SAM(rho=0.05),  # or GaussNewtonTrace(strength=1e-3), GradientPenalty(rho=0.1), ...
)
watch_curvature(trainer, {"input_ids": ids[:8], "labels": ids[:8]}, every=6, rho=0.05)
trainer.train()

for row in trainer.state.log_history:
    if "curvature/nme/trace" in row:
        gauss_newton, nme = (row[f"curvature/{matrix}/trace"] for matrix in ("gauss_newton", "nme"))
        print(f"step {row['step']}: tr GN {gauss_newton:.2f}, tr NME {nme:.2f}")
