"""The small world's tokenizer and text encoder: T5's and UMT5's classes at tiny size."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from refalign_training.data.randomness import numpy_generator
from refalign_training.run.config import OptimizerOptions
from refalign_training.sprites.training import train_part
from refalign_training.sprites.world import Facts, all_captions


MAX_SEQUENCE_LENGTH = 64  # tokens; captions have 20 at most
CONFIG = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
STEPS = 800
OPTIMIZER = OptimizerOptions(lr=3e-3, warmup_steps=20, schedule="linear", weight_decay=0.0)


def make_tokenizer() -> T5Tokenizer:
    """A piece for each word of the captions, and for each character, so that other words are read too."""
    words = set()
    for caption, _ in all_captions():
        words.update(map(_bare, caption.split()))
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in sorted(words)]
    pieces += [(character, -9.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _bare(word: str) -> str:
    return word.strip(",.")


def _numbered(facts: Sequence[Facts]) -> tuple[torch.Tensor, list[int]]:
    """What captions say as numbers `(captions, facts)`, and how many values each fact has."""
    columns, counts = [], []
    for fact in zip(*facts, strict=True):
        values = sorted(set(map(str, fact)))
        columns.append(list(map(values.index, map(str, fact))))
        counts.append(len(values))
    return torch.tensor(columns).T, counts


def train_text_encoder(folder: Path, steps: int = STEPS) -> tuple[T5Tokenizer, UMT5EncoderModel, float]:
    """
    Trains the encoder so that each token of a caption tells what the whole caption says; returns tokenizer, encoder
    and the share of captions that are told entirely right.
    """
    captions, facts = zip(*all_captions(), strict=True)
    tokenizer = make_tokenizer()
    tokens = tokenizer(list(captions), padding=True, return_tensors="pt")
    targets, counts = _numbered(facts)
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **CONFIG))
    heads = nn.ModuleList(nn.Linear(CONFIG["d_model"], count) for count in counts)

    def logits(rows: torch.Tensor) -> list[torch.Tensor]:
        mask = tokens.attention_mask[rows]
        hidden_states = encoder(tokens.input_ids[rows], mask).last_hidden_state[mask.bool()]
        return [head(hidden_states) for head in heads]

    def loss(step: int, half: int) -> torch.Tensor:
        rows = torch.from_numpy(numpy_generator("text batch", step, half).integers(len(captions), size=32))
        repeated = targets[rows].repeat_interleave(tokens.attention_mask[rows].sum(1), 0)
        return sum(map(F.cross_entropy, logits(rows), repeated.unbind(1)), torch.zeros(()))

    train_part(folder, {"text_encoder": encoder, "heads": heads}, loss, OPTIMIZER, steps)
    lengths = tokens.attention_mask.sum(1)
    with torch.no_grad():
        told = [value.argmax(1) for value in logits(torch.arange(len(captions)))]
    is_right = (torch.stack(told, 1) == targets.repeat_interleave(lengths, 0)).all(1)
    captions_right = int(sum(map(torch.all, is_right.split(lengths.tolist()))))
    return tokenizer, encoder.eval(), captions_right / len(captions)
