"""What a random checkpoint is: shapes by name, and the small files of a published one, configuration and tokenizer."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from executor.prompt import byte_alphabet


class Spec(NamedTuple):
    """One kind of checkpoint. Special tokens take the 22 ids from `first_special` on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    mrope_section: tuple[int, int, int]
    vision_hidden: int
    vision_heads: int
    vision_depth: int
    vision_intermediate: int
    full_attention_blocks: tuple[int, ...]
    first_special: int
    dtype: str
    max_position_embeddings: int


# structure-complete and small: windowed and full-attention blocks, grouped queries, MLP widths that no power of two
# divides (as 3420), vocabulary rows beyond the tokenizer's
_TINY = Spec(
    hidden=64,
    layers=4,
    heads=4,
    kv_heads=2,
    intermediate=180,
    vocabulary=640,
    tied=False,
    mrope_section=(2, 3, 3),
    vision_hidden=64,
    vision_heads=4,
    vision_depth=4,
    vision_intermediate=92,
    full_attention_blocks=(1, 3),
    first_special=600,
    dtype="float32",
    max_position_embeddings=32768,
)
# Qwen2.5-VL-3B-Instruct and -7B-Instruct: their config.json on the Hugging Face hub
_3B = Spec(
    hidden=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    intermediate=11008,
    vocabulary=151936,
    tied=True,
    mrope_section=(16, 24, 24),
    vision_hidden=1280,
    vision_heads=16,
    vision_depth=32,
    vision_intermediate=3420,
    full_attention_blocks=(7, 15, 23, 31),
    first_special=151643,
    dtype="bfloat16",
    max_position_embeddings=128000,
)
_7B = _3B._replace(
    hidden=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    vocabulary=152064,
    tied=False,
)
# large enough for weights to matter beside the process itself, small enough to be made and run in seconds
_SMALL = _3B._replace(
    hidden=1024,
    layers=12,
    heads=8,
    intermediate=4096,
    vocabulary=4096,
    vision_hidden=640,
    vision_heads=8,
    vision_depth=16,
    vision_intermediate=1716,
    full_attention_blocks=(3, 7, 11, 15),
    first_special=4000,
)
# the same widths, a quarter as deep: its weights do not stay in a core's caches either
_MINI = _SMALL._replace(layers=4, vision_depth=4, full_attention_blocks=(1, 3))
SPECS = {
    "tiny": _TINY,
    "tiny-tied": _TINY._replace(tied=True),
    "mini": _MINI,
    "small": _SMALL,
    "3b": _3B,
    "7b": _7B,
}

# in the order of their ids; the first 14 are control tokens, the others ordinary text that is kept whole
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>"),
    *("</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
CONTROL_TOKENS = 14

# Qwen2.5's tokenizer.json
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "system You are a helpful assistant user the this image Describe What is in picture of and to on it with for"
).split()


def as_json(content: object) -> str:
    """The text of a small file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def json_files(spec: Spec, dtype_name: str) -> dict[str, str]:
    """The small files of a published checkpoint, by name."""
    ids = {token: spec.first_special + i for i, token in enumerate(ADDED_TOKENS)}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": spec.max_position_embeddings,
        "max_window_layers": spec.layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": spec.vision_depth,
            "hidden_act": "silu",
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_intermediate,
            "num_heads": spec.vision_heads,
            "in_chans": 3,
            "out_hidden_size": spec.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": list(spec.full_attention_blocks),
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(spec.mrope_section)},
        "vocab_size": spec.vocabulary,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "repetition_penalty": 1.05,
        "temperature": 1e-06,
    }
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    return {
        "config.json": as_json(config),
        "generation_config.json": as_json(generation),
        "preprocessor_config.json": as_json(preprocessor),
        "tokenizer.json": json.dumps(tokenizer(spec.first_special), ensure_ascii=False),
    }


def tokenizer(first_special: int) -> dict[str, Any]:
    """tokenizer.json: 256 bytes, the beginnings of a few words, then made-up words up to the special tokens.

    No text is split into the made-up words (no merge leads to them); they give the noise of the answer a look.
    """
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    merges: list[str] = []
    for word in [*WORDS, *("Ġ" + word for word in WORDS)]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                vocabulary[word[:end]] = len(vocabulary)
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
    number = 0
    while len(vocabulary) < first_special:
        digits, rest = [], number
        for _ in range(3):
            rest, digit = divmod(rest, len(syllables))
            digits.append(syllables[digit])
        vocabulary.setdefault("Ġ" + "".join(digits), len(vocabulary))
        number += 1
    added = []
    for i, token in enumerate(ADDED_TOKENS):
        vocabulary[token] = first_special + i  # also in the vocabulary, so that ids are kept
        added.append(
            {
                "id": first_special + i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": i < CONTROL_TOKENS,
            }
        )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
