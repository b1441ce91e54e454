"""Sizes of the tiny models for the ``arith`` task."""

from transformers import LlamaConfig


def tiny_llama_config(
    vocab_size: int,
    *,
    hidden_size: int = 128,
    num_hidden_layers: int = 3,
    pad_token_id: int = 0,
    bos_token_id: int = 1,
    eos_token_id: int = 2,
) -> LlamaConfig:
    """A Llama of 0.5 to 3 million parameters: heads of 32, two query heads per key/value head.

    Args:
        vocab_size: rows of the embedding, which is also the head.
        hidden_size: width D, a multiple of 64.
        num_hidden_layers: number of blocks.
        pad_token_id: as in the ``arith`` tokenizer.
        bos_token_id: as in the ``arith`` tokenizer.
        eos_token_id: as in the ``arith`` tokenizer.

    Raises:
        ValueError: ``hidden_size`` is not a multiple of 64.
    """
    if hidden_size < 64 or hidden_size % 64:
        raise ValueError(f"hidden_size={hidden_size}: need a multiple of 64")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
