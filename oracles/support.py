"""A tiny tokenizer and target for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent

EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_LESSON = [
    "def add(left, right):\n    return left + right\n",
    "for item in items: print(item)\n",
    "The drafter proposes, the target decides.\n",
]


def tiny_tokenizer(vocab_size: int = 288) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all 256 bytes, one end token, a few merges and a chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LESSON, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_qwen3_config(vocab_size: int, eos_token_id: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


def save_tiny_target(
    folder: Path, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """Write a random Qwen3 (hidden 32, 4 layers) and its tokenizer to ``folder``, as float32.

    The tokenizer is ``tiny_tokenizer`` unless one is given.

    The weights are larger than at initialisation, so that the top tokens are far apart and differ
    from context to context; near ties would make greedy comparisons depend on rounding.
    """
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    eos_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(tiny_qwen3_config(len(tokenizer), eos_id)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
