"""Held-out bits per byte of RWKV-7 files: `python evaluate.py heldout.jsonl rwkv-*.pth`."""

import math
import sys

import torch

import rwkv_peft
from rwkv_peft.config import DataConfig
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.device import resolve_device
from rwkv_peft.training.evaluate import evaluate_loss


def bits_per_byte(path: str, data: str) -> tuple[float, float]:
    """Bits per byte of text and nats per token over all documents, each read from its start."""
    device = resolve_device("auto")
    model = rwkv_peft.load_model(path, device=device, dtype=torch.float32, op="torch")
    documents = read_documents(
        DataConfig(data_file=data), rwkv_peft.Tokenizer(model.model_config.vocab_size)
    )
    loss, num_tokens = evaluate_loss(model, documents)
    return loss / math.log(2) / documents.report.num_bytes, loss / num_tokens


if __name__ == "__main__":
    for name in sys.argv[2:]:
        bits, nats = bits_per_byte(name, sys.argv[1])
        print(f"{name}: {bits:.4f} bits per byte, {nats:.4f} nats per token")
