"""The target's text: documents of this installation, a tokenizer trained on them, token ids."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.corpus import Document, Domain, Source, Split, read, sources, unique
from examples.target_plan import Clock, Plan

SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
END, USER, ASSISTANT = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}\n"
    "{{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT_ONE_IN = 32
"""One document in 32 becomes a chat turn, split at a line end, to train the chat tokens."""

WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen's pre-tokenizer: a token may hold punctuation with its line end, or an indentation."""

READING: tuple[tuple[Domain, float], ...] = (("docs", 0.6), ("c", 0.7), ("python", 1.0))
"""Domains in reading order, each with its share of the time that is left."""


def gather(plan: Plan, pool: ProcessPoolExecutor) -> dict[tuple[Domain, Split], list[Document]]:
    """Documents of every domain and split. No training document contains held-out text."""
    deadline = time.monotonic() + plan.reading_s
    found: dict[tuple[Domain, Split], list[Document]] = {}
    for domain, share_s in READING:
        if domain not in plan.shares:
            continue
        seen: set[bytes] = set()
        until = time.monotonic() + share_s * (deadline - time.monotonic())
        for split in ("heldout", "train"):
            chosen = [source for source in sources(domain) if source.split == split]
            random.Random(0).shuffle(chosen)
            read_ones = read_until(chosen, until, pool)
            found[domain, split] = list(take(unique(domain, read_ones, seen), plan.max_chars))
    return found


def read_until(
    chosen: Sequence[Source], until: float, pool: ProcessPoolExecutor
) -> Iterator[Document]:
    """Documents read in parallel, in order, until the monotonic time ``until``."""
    for start in range(0, len(chosen), 2048):
        if time.monotonic() > until:
            return
        yield from filter(None, pool.map(read, chosen[start : start + 2048], chunksize=16))


def take(found: Iterator[Document], max_chars: int) -> Iterator[Document]:
    num_chars = 0
    for document in found:
        num_chars += len(document.text)
        if num_chars > max_chars:
            return
        yield document


def train_tokenizer(texts: Iterator[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_texts(found: dict[tuple[Domain, Split], list[Document]], plan: Plan) -> Iterator[str]:
    for domain, share in plan.shares.items():
        for document in take(iter(found[domain, "train"]), int(share * plan.tokenizer_chars)):
            yield document.text


def encode(found: Sequence[Document], tokenizer_json: str, pool: ProcessPoolExecutor) -> np.ndarray:
    """Token ids [N] uint16 of all documents in random order, separated by end-of-text tokens."""
    order = random.Random(1).sample(list(found), len(found))
    batches = [order[start : start + 128] for start in range(0, len(order), 128)]
    return np.concatenate(list(pool.map(partial(encode_batch, tokenizer_json), batches)))


def encode_batch(tokenizer_json: str, found: Sequence[Document]) -> np.ndarray:
    tokenizer = _tokenizer(tokenizer_json)
    ids = [END]
    for index, document in enumerate(found):
        as_chat = index % CHAT_ONE_IN == 0
        ids += (
            chat_ids(tokenizer, document.text) if as_chat else plain_ids(tokenizer, document.text)
        )
        ids.append(END)
    return np.array(ids[1:], dtype=np.uint16)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def chat_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The document's first lines as the question, the rest as the answer: see CHAT_TEMPLATE."""
    question = text[: max(text.find("\n", 300), 0) or len(text) // 2]
    answer = text[len(question) :].strip("\n")
    return [
        *(USER, *plain_ids(tokenizer, f"\n{question}\n")),
        *(ASSISTANT, *plain_ids(tokenizer, f"\n{answer}\n")),
    ]


@cache
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # a special token spelled out in a source is plain text
    return tokenizer


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[END],
        eos_token=SPECIAL_TOKENS[END],
        additional_special_tokens=list(SPECIAL_TOKENS[USER:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def prepare(clock: Clock) -> tuple[Tokenizer, dict[tuple[Domain, Split], np.ndarray], dict]:
    """Read, tokenize and encode the text of this installation on all cores.

    It forks, so call it before CUDA is initialised.
    """
    with ProcessPoolExecutor() as pool:
        found = gather(clock.plan, pool)
        sizes = {f"{d} {split}": text_size(texts) for (d, split), texts in found.items()}
        clock.say(f"read: {sizes}")
        tokenizer = train_tokenizer(tokenizer_texts(found, clock.plan), clock.plan.vocab)
        clock.say("tokenizer trained")
        ids = {key: encode(texts, tokenizer.to_str(), pool) for key, texts in found.items()}
        clock.say("encoded: " + ", ".join(f"{key} {len(part):,}" for key, part in ids.items()))
    return tokenizer, ids, sizes


def text_size(found: Sequence[Document]) -> dict[str, float]:
    num_bytes = sum(len(document.text.encode()) for document in found)
    return {"documents": len(found), "MB": round(num_bytes / 1e6, 2)}
