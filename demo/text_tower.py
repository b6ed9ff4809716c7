"""A text tower that knows nothing: a NomicBERT of random weights, with a vocabulary for the captions.

    python -m textlock.demo.text_tower --captions captions.txt --output text_tower

The tests lock it, and the demo's figures stand next to those of a run against it. Its folder is read like any other
text tower's (``models/text.py``).
"""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import NomicBertConfig, NomicBertModel, PreTrainedTokenizerFast

from ..data.atomic import atomic_folder
from ..models.text_encoder import quiet_transformers
from ..settings import exit_with

# What says how its embeddings are made, as sentence-transformers writes it.
_MODULES = "sentence_transformers.models"
_RECIPE = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{_MODULES}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{_MODULES}.Normalize"},
    ],
    "1_Pooling/config.json": {"pooling_mode": "mean"},
    "config_sentence_transformers.json": {"prompts": {"caption": ""}, "default_prompt_name": "caption"},
}


def write_random_text_tower(
    folder: str | Path,
    captions: Sequence[str],
    *,
    width: int = 128,
    depth: int = 2,
    heads: int = 2,
    std: float = 0.02,
    seed: int = 0,
) -> None:
    """Write a NomicBERT with random weights and a vocabulary for these captions as a folder of sentence-transformers.

    The vocabulary is the lower-cased words of the captions and of Nomic's prefixes, and the characters they are spelt
    with, so that an unknown word of known letters is spelt out. Linear and embedding weights are normal with ``std``,
    LayerNorms as they start, token types zero. A small ``std`` leaves an embedding close to the mean of its words, so
    that captions that share words are near each other; from 0.1 on attention scrambles that. Equal arguments give
    equal bytes.

    Args:
        folder: folder to write; it must not exist, or be empty.
        captions: texts whose words the vocabulary holds.
        width: width of the transformer and of its embeddings; the inner width is four times as much.
        depth: number of transformer blocks.
        heads: attention heads.
        std: standard deviation of the weights.
        seed: seed of the weights.

    Raises:
        ValueError: ``folder`` is not empty, or ``width / heads`` is not an even whole number.
    """
    if min(width, depth, heads) < 1 or not 0 <= std < math.inf:
        raise ValueError(f"width {width}, depth {depth} and heads {heads} must be positive, std {std} not negative")
    if width % (2 * heads):
        raise ValueError(f"width {width} over {heads} heads is not an even head width, which rotary positions need")

    tokenizer = _build_tokenizer(captions)
    config = NomicBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # its own initialisation is overwritten below
        model = NomicBertModel(config)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    # A random token type would be one large vector added to every word: all captions would come out nearly alike.
    torch.nn.init.zeros_(model.embeddings.token_type_embeddings.weight)

    with atomic_folder(Path(folder)) as draft, quiet_transformers():
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for file, content in _RECIPE.items():
            (draft / file).parent.mkdir(exist_ok=True)
            (draft / file).write_text(json.dumps(content, indent=1) + "\n")


def _build_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a lower-casing WordPiece tokenizer in BERT's manner, over the words of the captions."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = {"search_query: search_document: ", *captions}
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = set("".join(words))
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = specials + sorted(words | letters | {f"##{letter}" for letter in letters})
    vocabulary = {piece: index for index, piece in enumerate(pieces)}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )


def _read_captions(path: Path) -> list[str]:
    """Read one caption per line of a .txt file, or the ``caption`` column of a .tsv file with a header."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no captions file {path}; give a .txt or .tsv file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    if path.suffix != ".tsv":
        return text.splitlines()
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        if "caption" not in (table.fieldnames or ()):
            raise ValueError(f"{path} has no column named caption in its first line; add a header")
        return [row["caption"] or "" for row in table]


def main(
    captions: Path,
    output: Path,
    width: int = 128,
    depth: int = 2,
    heads: int = 2,
    std: float = 0.02,
    seed: int = 0,
) -> None:
    """Write a text tower with random weights and a vocabulary for the captions: a normal transformers folder.

    Args:
        captions: a .txt file with one caption per line, or a .tsv file with a header and a column named caption.
        output: folder to write; it must not exist, or be empty.
        width: width of the transformer and of its embeddings.
        depth: number of transformer blocks.
        heads: attention heads.
        std: standard deviation of the random weights.
        seed: seed of the random weights.
    """
    try:
        write_random_text_tower(
            output, _read_captions(captions), width=width, depth=depth, heads=heads, std=std, seed=seed
        )
    except (ValueError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    tyro.cli(main)
