"""The frozen text tower: encodes captions to unit embeddings with any transformers encoder.

Prefix, length, pooling and the layers behind it are those that the encoder's folder says (models/text_recipe.py), or
what the settings ask for instead. Of Nomic Embed Text v1.5, which Nomic Embed Vision was trained against:
``search_query: `` + caption, cut to 77 tokens; mean of the last hidden states over the real tokens, in float32;
LayerNorm without affine; unit length. v1 has no LayerNorm.

The tower is a constant of the training: it is not an ``nn.Module``, so it cannot land in an optimiser, a checkpoint or
in train mode. Only safetensors are read, and no code from a model folder is ever run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..settings import FREE_ON_RESUME, NOT_EMPTY, Settings, at_least
from .text_folder import first_line, local_folder, read_json, tensors, weight_files
from .text_recipe import FolderRecipe, Pooling, Recipe, load_layers, pool, read_recipe

# No WordPiece or SentencePiece vocabulary in use averages near 64 characters a token, so this cut is only ever
# felt by strings that would otherwise be tokenised for seconds and then thrown away.
_CHARACTERS_PER_TOKEN: Final = 64

# Padded tokens of one forward pass. A GPU wants large matrices; a CPU wants activations that stay in its cache.
_TOKENS_PER_BATCH: Final = {"cuda": 32_768, "cpu": 2_048}

# Not cuDNN's, which torch takes first on Hopper: it builds a plan for every new batch and length, for up to half a
# second each, and hardly two batches of captions have the same shape.
_ATTENTION: Final = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# What a tokenizer without a limit says of itself in transformers is 10^30.
_NO_LIMIT: Final = 2**31


@dataclass(frozen=True, kw_only=True)
class TextConfig(Settings, section="text"):
    """The frozen text tower. What is left out is as the tower's folder says."""

    name: Annotated[str, NOT_EMPTY, FREE_ON_RESUME] = "nomic-ai/nomic-embed-text-v1.5"
    """A transformers or sentence-transformers folder, or a hub name."""
    prefix: str | None = None
    """Written in front of every caption. Left out: the folder's default prompt, or nothing when it has none."""
    max_length: Annotated[int | None, at_least(1)] = None
    """Tokens kept of a caption, prefix included. Left out: what the folder says, 77 for Nomic Embed Text."""
    pooling: Pooling | None = None
    """How token states become one vector. Left out: what the folder says; a folder that does not is refused."""
    layer_norm: bool | None = None
    """LayerNorm without affine before the cut to unit length. Left out: yes for Nomic Embed Text v1.5, else no."""
    dimensions: Annotated[int | None, at_least(1)] = None
    """Leading numbers kept of an embedding, made unit length again: for towers trained so (Matryoshka Representation
    Learning, arXiv:2205.13147). Left out: all."""


@dataclass(frozen=True)
class TextTowerDescription:
    """The model and recipe that text embeddings were computed with, stored next to them."""

    name: str
    """The folder or hub name it was loaded by."""
    revision: str | None
    """Commit of a hub model; None for a folder."""
    recipe: Recipe
    embed_dim: int
    fingerprint: str
    """:meth:`TextTower.fingerprint`: the one field that decides whether embeddings are the same."""

    @staticmethod
    def config_of(stored: Mapping[str, Any]) -> TextConfig:
        """Return the settings that make the tower of a description that was stored as ``asdict``.

        Several poolings stay those of the tower's folder: no setting has more than one.

        Raises KeyError or TypeError when it is none.
        """
        recipe = stored["recipe"]
        [*others, pooling] = recipe["pooling"]
        return TextConfig(
            name=stored["name"],
            prefix=recipe["prefix"],
            max_length=recipe["max_length"],
            pooling=None if others else pooling,
            layer_norm=recipe["layer_norm"],
            dimensions=recipe["dimensions"],
        )

    def difference_from(self, stored: Mapping[str, Any]) -> str | None:
        """Say in words how this tower differs from one that was stored as ``asdict``; None when it is the same."""
        if stored.get("fingerprint") == self.fingerprint:
            return None
        there, here = stored.get("recipe"), json.loads(json.dumps(asdict(self.recipe)))
        there = there if isinstance(there, dict) else {}
        changed = [
            f"{key} is {there.get(key)!r} there and {here[key]!r} here" for key in here if there.get(key) != here[key]
        ]
        return "; ".join(changed) or f"the weights or the tokenizer of {stored.get('name')} are other ones"


class TextTower:
    """A frozen text encoder with its tokenizer and recipe.

    Args:
        config: the settings it was made by.
        model: a transformers encoder; it becomes ``encoder``.
        tokenizer: that of the encoder, from transformers.
        said: what the folder says of its recipe.
        layers: what comes after pooling.
        recipe: what the two resolve to.
        notes: sentences for the user: where settings and folder differ.
        revision: commit of a hub model.
        device: where the weights live and the embeddings come out.
    """

    def __init__(
        self,
        config: TextConfig,
        model: Any,
        tokenizer: Any,
        said: FolderRecipe,
        layers: nn.Module,
        recipe: Recipe,
        *,
        notes: Sequence[str],
        revision: str | None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.recipe = recipe
        self.notes = tuple(notes)
        self.revision = revision
        self.embed_dim = recipe.dimensions
        self.device = device
        self.encoder = model.requires_grad_(False).eval().to(device)
        self._layers = layers.to(device)
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_padding()
        if recipe.lower_case:
            _lower_case(self._tokenizer)
        self._tokenizer.no_truncation()
        least = len(self._tokenizer.encode(recipe.prefix).ids)
        if recipe.max_length <= least:
            raise ValueError(
                f"{config.flag('max_length')} is {recipe.max_length}, must be above {least}, the tokens of the prefix "
                "and those that every caption gets"
            )
        self._tokenizer.enable_truncation(recipe.max_length, direction=tokenizer.truncation_side)
        self._pad_token_id: int = tokenizer.pad_token_id or 0
        self._prefix_tokens = 0 if recipe.pool_prefix else self._count_prefix(tokenizer.all_special_ids)
        self._said = said
        self._fingerprint: str | None = None

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Return the unit embeddings of the captions in the order given, float32 [N, embed_dim] on ``device``.

        A caption's embedding does not depend on the captions around it beyond rounding. Equal captions are encoded
        once. float32 on a CPU; bfloat16 autocast with float32 pooling on a GPU.
        """
        if not captions:
            return torch.empty(0, self.embed_dim, device=self.device)

        texts = [self._with_prefix(caption) for caption in captions]
        distinct = list(dict.fromkeys(texts))
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(distinct)]
        batches = bucket_by_length([len(ids) for ids in tokens], _TOKENS_PER_BATCH[self.device.type])
        rows = torch.cat([self._encode_tokens([tokens[index] for index in batch]) for batch in batches])

        order = [index for batch in batches for index in batch]
        row_of = {distinct[index]: row for row, index in enumerate(order)}
        return rows[self._on_device(torch.tensor([row_of[text] for text in texts]))]

    def padding_tokenizer(self) -> Tokenizer:
        """Return a copy of the tokenizer that pads on the right: with it, prefix + text is cut and read as here."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.enable_padding(direction="right", pad_id=self._pad_token_id)
        return tokenizer

    @property
    def encoder_folder(self) -> Path:
        """Folder of the encoder's configuration and weights, which may lie inside that of the tower."""
        return self._said.encoder

    def fingerprint(self) -> str:
        """Sha256 (hex) of what the embeddings depend on, so that stored ones can be told from those of another tower.

        Over the tensors of the weight files (names, dtypes, shapes, bytes) of encoder and layers, config.json, the
        tokenizer's files, and the recipe. It is taken from files, so it survives a new transformers version.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                path = self._said.encoder / file
                digest.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
            for folder in (self._said.encoder, *(place for kind, place in self._said.layers if kind != "Normalize")):
                for name, tensor in tensors(folder):
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            digest.update(json.dumps(asdict(self.recipe)).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> TextTowerDescription:
        """Return the model and recipe that the embeddings are computed with."""
        return TextTowerDescription(
            name=self.config.name,
            revision=self.revision,
            recipe=self.recipe,
            embed_dim=self.embed_dim,
            fingerprint=self.fingerprint(),
        )

    def _with_prefix(self, caption: str) -> str:
        # A lone surrogate (an undecodable byte of a file name) is refused by the tokenizer.
        text = caption[: _CHARACTERS_PER_TOKEN * self.recipe.max_length].encode("utf-8", "replace").decode()
        return self.recipe.prefix + text

    def _count_prefix(self, special_ids: Sequence[int]) -> int:
        """Count the tokens of the prefix alone, without a special token that ends every text."""
        ids = self._tokenizer.encode(self.recipe.prefix).ids if self.recipe.prefix else []
        return len(ids) - (1 if ids and ids[-1] in special_ids else 0)

    def _on_device(self, tensor: Tensor) -> Tensor:
        # From pinned memory, or the host would wait for all that the GPU has queued.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _encode_tokens(self, tokens: list[list[int]]) -> Tensor:
        # Padded on the right whatever the tokenizer does elsewhere: positions then start at the first token, and a
        # causal model's last token never sees the padding.
        longest = max(1, *map(len, tokens))
        input_ids = torch.tensor([ids + [self._pad_token_id] * (longest - len(ids)) for ids in tokens])  # [n, T]
        # max(1, ...): a caption without any token is read as one padding token, not as a mean over nothing.
        lengths = torch.tensor([max(1, len(ids)) for ids in tokens])
        mask = torch.arange(longest) < lengths[:, None]
        input_ids, lengths, mask = (self._on_device(tensor) for tensor in (input_ids, lengths, mask))

        # On a CPU this also switches off an autocast of the caller.
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu), sdpa_kernel(_ATTENTION):
            hidden = self.encoder(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state  # [n, T, d]
        with torch.autocast(self.device.type, enabled=False):
            return self.embeddings_of(hidden, lengths)

    def embeddings_of(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Return the unit embeddings, float32 [n, embed_dim], of the encoder's last hidden states.

        Args:
            hidden: [n, T, d] of texts that are padded on the right.
            lengths: [n] int, the tokens of each text, at least 1.
        """
        rows = self._layers(pool(hidden, lengths, self.recipe.pooling, skipped=self._prefix_tokens))
        if self.recipe.layer_norm:
            rows = F.layer_norm(rows, rows.shape[-1:], eps=1e-5)
        return F.normalize(rows[:, : self.embed_dim], dim=-1)


def make_text_tower(config: TextConfig, device: torch.device) -> TextTower:
    """Load the frozen text tower that a config names.

    Args:
        config: it names a folder with config.json, *.safetensors and tokenizer.json; or a folder of
            sentence-transformers, whose modules.json names such a folder, its pooling and what comes after; or the hub
            name of either.
        device: where the weights live and the embeddings come out.

    Raises:
        FileNotFoundError: no such folder or hub model, or the folder lacks its config, weights or tokenizer.
        ValueError: the folder's configuration, weights or recipe cannot be used as they are, or do not say how
            embeddings are made and the config does not either.
    """
    local = local_folder(config.name)
    said = read_recipe(local, config.name)
    folder = said.encoder
    for file, remedy in (
        ("config.json", "give the folder that save_pretrained wrote"),
        ("tokenizer.json", "save the model's fast tokenizer there with tokenizer.save_pretrained"),
    ):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"text tower {folder} has no {file}; {remedy}")
    weight_files(folder)  # the same kind of error, before a slow load

    _require_recipe(config, said, local)

    from .text_encoder import load_encoder, most_tokens  # not above: it takes seconds

    model, tokenizer = load_encoder(folder)
    pooling = said.pooling if config.pooling is None else (config.pooling,)
    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    layers, words, width = load_layers(said, width * len(pooling))
    recipe = Recipe(
        prefix=config.prefix if config.prefix is not None else said.prefix or "",
        pool_prefix=said.pool_prefix,
        lower_case=said.lower_case,
        max_length=_resolve_length(config, said, folder, tokenizer.model_max_length, most_tokens(model)),
        pooling=pooling,
        layers=words,
        layer_norm=bool(said.layer_norm if config.layer_norm is None else config.layer_norm),
        dimensions=config.dimensions or width,
    )
    if recipe.dimensions > width:
        config.refuse("dimensions", f"be at most {width}, the length of the embeddings of {local}")
    revision = local.name if local.parent.name == "snapshots" else None  # how the hub's cache names a commit
    notes = _contradictions(config, said)
    tower = TextTower(config, model, tokenizer, said, layers, recipe, notes=notes, revision=revision, device=device)
    _require_encodes(tower, local)
    return tower


def build_text_tower(path_or_name: str | Path, *, device: str | torch.device = "cpu", **settings: Any) -> TextTower:
    """Load a frozen text tower: `make_text_tower` for those who have no config.

    Args:
        path_or_name: a folder or a hub name.
        device: see `make_text_tower`.
        settings: other fields of `TextConfig`: ``prefix``, ``max_length``, ``pooling``, ``layer_norm``, ``dimensions``.

    Raises:
        FileNotFoundError: no such folder or hub model, or the folder lacks its config, weights or tokenizer.
        ValueError: a setting, or the folder's configuration, weights or recipe, cannot be used.
    """
    return make_text_tower(TextConfig(name=str(path_or_name), **settings), torch.device(device))


def bucket_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Batches of indices of similar length: padding stays under 10 % of the real tokens of every batch.

    Greedy over the sorted lengths. A batch also closes at ``tokens_per_batch`` padded tokens. Where it closes for its
    padding, its lengths have grown by over a tenth, so that rule adds a few tens of batches at most.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        padded = (len(batch) + 1) * length
        if batch and (padded > tokens_per_batch or padded >= 1.1 * (real + length)):
            batches.append(batch)
            batch, real = [], 0
        batch.append(index)
        real += length
    return [*batches, batch] if batch else batches


def _require_recipe(config: TextConfig, said: FolderRecipe, folder: Path) -> None:
    """Raise ValueError, naming the flag, where neither the folder nor the config says how embeddings are made."""
    if not said.pooling and config.pooling is None:
        raise ValueError(
            f"text tower {folder} does not say how token states become one vector (no modules.json, no 1_Pooling): "
            f"give {config.flag('pooling')} as the model's card says, often mean, cls or lasttoken"
        )
    # A copy of Nomic Embed Text under another name looks like any NomicBERT with mean pooling; v1 and v1.5 differ.
    is_nomic_bert = read_json(said.encoder / "config.json").get("model_type") == "nomic_bert"
    silent = is_nomic_bert and said.pooling in ((), ("mean",)) and said.prefix is None and not said.layers
    asked = [config.flag(name) for name in ("prefix", "layer_norm") if getattr(config, name) is None]
    if silent and said.layer_norm is None and asked:
        raise ValueError(
            f"text tower {folder} is a NomicBERT that does not say its prompt and LayerNorm: give "
            f"{' and '.join(asked)} (Nomic Embed Text: 'search_query: ', True for v1.5, False for v1)"
        )


def _require_encodes(tower: TextTower, folder: Path) -> None:
    """Raise ValueError where a caption cannot be encoded: now, and not after all else of a run is loaded."""
    try:
        rows = tower.encode(["a caption"])
    except Exception as error:  # models that want images too, or give no last hidden states, raise as they like
        raise ValueError(f"text tower {folder} cannot encode a caption: {first_line(error)}") from error
    if rows.shape != (1, tower.embed_dim) or not rows.isfinite().all():
        raise ValueError(
            f"text tower {folder} encodes a caption to {list(rows.shape)} numbers that are not all finite, where "
            f"[1, {tower.embed_dim}] are expected"
        )


def _resolve_length(config: TextConfig, said: FolderRecipe, folder: Path, of_tokenizer: int, most: int | None) -> int:
    if config.max_length is not None:
        if most is not None and config.max_length > most:
            config.refuse("max_length", f"be at most {most}, the tokens that text tower {folder} reads")
        return config.max_length
    limits = [said.max_length or of_tokenizer, most or _NO_LIMIT]
    if min(limits) >= _NO_LIMIT:
        raise ValueError(f"text tower {folder} does not say how many tokens it reads: give {config.flag('max_length')}")
    return min(limits)


def _contradictions(config: TextConfig, said: FolderRecipe) -> list[str]:
    """Say where the settings ask for another recipe than the folder's."""
    notes = []
    for name, theirs in (
        ("prefix", said.prefix),
        ("max_length", said.max_length),
        ("pooling", said.pooling[0] if len(said.pooling) == 1 else said.pooling or None),
        ("layer_norm", said.layer_norm),
    ):
        ours = getattr(config, name)
        if ours is not None and theirs is not None and ours != theirs:
            notes.append(f"{config.flag(name)} is {ours!r} where the folder of the text tower says {theirs!r}")
    if config.prefix is None and said.prefix is None and said.prompts:
        notes.append(
            f"the text tower has the prompts {', '.join(said.prompts)} and names none as its default: captions get "
            f"none of them, {config.flag('prefix')} sets one"
        )
    return notes


def _lower_case(tokenizer: Tokenizer) -> None:
    """Lower-case in front of the tokenizer's own normaliser, unless it does."""
    own = tokenizer.normalizer
    parts = [] if own is None else [own]
    if isinstance(own, normalizers.Sequence):
        parts = list(own)  # type: ignore[call-overload]  # its stub does not say that it is one
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
