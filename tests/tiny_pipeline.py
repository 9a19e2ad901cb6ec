"""A whole Wan 2.1 pipeline folder of real classes at tiny size with random weights, made in a second without network.

`python -m tests.tiny_pipeline FOLDER` writes it.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel


TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "num_layers": 2,
    "text_dim": 32,
    "freq_dim": 32,
}


def tiny_transformer(cls: type = WanTransformer3DModel, seed: int = 0, **changes) -> torch.nn.Module:
    """A transformer of class `cls` whose weights depend on `seed` alone, in evaluation mode."""
    torch.manual_seed(seed)
    return cls(**{**TRANSFORMER, **changes}).eval()


def tiny_tokenizer() -> T5TokenizerFast:
    """T5's real tokenizer class over single characters."""
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -4.0) for character in characters)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


def tiny_wan_pipeline(seed: int = 0) -> WanPipeline:
    """Plain Wan text-to-video, as the base models on the Hub are."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    text_config = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    vae = AutoencoderKLWan(
        base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config).eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=tiny_transformer(seed=seed),
    )


if __name__ == "__main__":
    tiny_wan_pipeline().save_pretrained(Path(sys.argv[1]))
