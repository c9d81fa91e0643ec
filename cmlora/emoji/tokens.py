"""The base model's tokenizer: a small byte-pair encoding in CLIP's format, learnt from captions."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 56
"""Tokens per prompt, start and end included; five trigger texts need about 45."""


def train_tokenizer(texts: Iterable[str], size: int = 640) -> CLIPTokenizer:
    """Learn merges from captions.

    Args:
        texts: the captions.
        size: number of entries of the vocabulary, start and end tokens included.

    Returns:
        A tokenizer that pads and cuts at `LENGTH` tokens.
    """
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = Lowercase()
    words = Split(Regex(r"[a-z]+|[^a-z\s]"), behavior="isolated")
    learner.pre_tokenizer = Sequence([WhitespaceSplit(), words])
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    alphabet = [*letters, *(f"{c}</w>" for c in letters)]
    trainer = BpeTrainer(
        vocab_size=size - 2 - len(alphabet),
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = learner.get_vocab()
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    pieces = list(dict.fromkeys([*alphabet, *sorted(learnt, key=learnt.__getitem__)]))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, START, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )
