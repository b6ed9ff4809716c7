"""The frozen text tower: encodes captions to unit embeddings with any transformers encoder.

The recipe of Nomic Embed Vision (v1.5): ``search_query: `` + caption, cut to 77 tokens; mean of the last hidden states
over the real tokens, in float32; LayerNorm without affine (the "hamming" option of contrastors); unit length. v1 has no
LayerNorm.

The tower is a constant of the training: it is not an ``nn.Module``, so it cannot land in an optimiser, a checkpoint or
in train mode. Only safetensors are read, and no code from a model folder is ever run.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel, AutoTokenizer, NomicBertConfig
from transformers.utils import logging as transformers_logging

from ..settings import FREE_ON_RESUME, NOT_EMPTY, Settings, at_least

_POOLING: Final = "mean"

# No WordPiece or SentencePiece vocabulary in use averages near 64 characters a token, so this cut is only ever
# felt by strings that would otherwise be tokenised for seconds and then thrown away.
_CHARACTERS_PER_TOKEN: Final = 64

# Padded tokens of one forward pass. A GPU wants large matrices; a CPU wants activations that stay in its cache.
_TOKENS_PER_BATCH: Final = {"cuda": 32_768, "cpu": 2_048}

# Not cuDNN's, which torch takes first on Hopper: it builds a plan for every new batch and length, for up to half a
# second each, and hardly two batches of captions have the same shape.
_ATTENTION: Final = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Weights of a checkpoint that mean pooling does not use: a sentence head, or what pre-training left behind.
_UNUSED_HEADS: Final = re.compile(r"(\w+\.)?(pooler|cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector)\.")

# transformers' names for the fields of NomicBERT, and those of Nomic's own modelling code (a GPT2Config).
_NOMIC_FIELDS: Final = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
}

# Options of Nomic's code that NomicBertModel silently ignores.
_NOMIC_FIXED: Final = {
    "activation_function": "swiglu",
    "prenorm": False,
    "causal": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_scale_base": None,
}


@dataclass(frozen=True, kw_only=True)
class TextConfig(Settings, section="text"):
    """The frozen text tower."""

    name: Annotated[str, NOT_EMPTY, FREE_ON_RESUME] = "nomic-ai/nomic-embed-text-v1.5"
    """A transformers or sentence-transformers folder, or a hub name."""
    layer_norm: bool = True
    """LayerNorm without affine after pooling: True for Nomic Embed Text v1.5, False for v1."""
    prefix: str = "search_query: "
    """Written in front of every caption."""
    max_length: Annotated[int, at_least(1)] = 77
    """Tokens kept of a caption, prefix included."""


@dataclass(frozen=True)
class TextTowerDescription:
    """The model and settings that text embeddings were computed with, stored next to them."""

    name: str
    """The folder or hub name it was loaded by."""
    revision: str | None
    """Commit of a hub model; None for a folder."""
    prefix: str
    max_length: int
    pooling: str
    layer_norm: bool
    embed_dim: int
    fingerprint: str
    """:meth:`TextTower.fingerprint`: the one field that decides whether embeddings are the same."""


class TextTower:
    """A frozen text encoder with its tokenizer, prefix, pooling and normalisation."""

    def __init__(
        self,
        config: TextConfig,
        model: Any,
        tokenizer: Any,
        folder: Path,
        *,
        revision: str | None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.revision = revision
        self.embed_dim: int = model.config.hidden_size
        self.device = device
        self._model = model.requires_grad_(False).eval().to(device)
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(config.max_length, direction=tokenizer.truncation_side)
        self._pad_token_id: int = tokenizer.pad_token_id or 0
        self._folder = folder
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

    def fingerprint(self) -> str:
        """Sha256 (hex) of what the embeddings depend on, so that stored ones can be told from those of another tower.

        Over the tensors of the weight files (names, dtypes, shapes, bytes), config.json, the tokenizer's files, and
        prefix, max_length, layer_norm and pooling. It is taken from files, so it survives a new transformers version.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                path = self._folder / file
                digest.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
            for name, tensor in _tensors(self._folder):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            settings = [self.config.prefix, self.config.max_length, self.config.layer_norm, _POOLING]
            digest.update(json.dumps(settings).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> TextTowerDescription:
        """Return the model and settings that the embeddings are computed with."""
        return TextTowerDescription(
            **asdict(self.config),
            revision=self.revision,
            pooling=_POOLING,
            embed_dim=self.embed_dim,
            fingerprint=self.fingerprint(),
        )

    def _with_prefix(self, caption: str) -> str:
        # A lone surrogate (an undecodable byte of a file name) is refused by the tokenizer.
        text = caption[: _CHARACTERS_PER_TOKEN * self.config.max_length].encode("utf-8", "replace").decode()
        return self.config.prefix + text

    def _on_device(self, tensor: Tensor) -> Tensor:
        # From pinned memory, or the host would wait for all that the GPU has queued.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _encode_tokens(self, tokens: list[list[int]]) -> Tensor:
        longest = max(1, *map(len, tokens))
        input_ids = torch.tensor([ids + [self._pad_token_id] * (longest - len(ids)) for ids in tokens])  # [n, T]
        # max(1, ...): a caption without any token is read as one padding token, not as a mean over nothing.
        lengths = torch.tensor([max(1, len(ids)) for ids in tokens])
        mask = torch.arange(longest) < lengths[:, None]
        input_ids, mask = self._on_device(input_ids), self._on_device(mask)

        # On a CPU this also switches off an autocast of the caller.
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu), sdpa_kernel(_ATTENTION):
            hidden = self._model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state  # [n, T, d]

        weight = mask.unsqueeze(-1).float()  # [n, T, 1]
        rows = (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)  # [n, d]
        if self.config.layer_norm:
            rows = F.layer_norm(rows, (self.embed_dim,), eps=1e-5)
        return F.normalize(rows, dim=-1)


def make_text_tower(config: TextConfig, device: torch.device) -> TextTower:
    """Load the frozen text tower that a config names.

    Args:
        config: it names a folder with config.json, *.safetensors and tokenizer.json; or a folder of
            sentence-transformers, whose modules.json names such a folder and mean pooling; or the hub name of either.
        device: where the weights live and the embeddings come out.

    Raises:
        FileNotFoundError: no such folder or hub model, or the folder lacks its config, weights or tokenizer.
        ValueError: the folder's configuration, weights or pooling cannot be used as they are.
    """
    local = _local_folder(config.name)
    folder = _transformer_folder(local)
    for file, remedy in (
        ("config.json", "give the folder that save_pretrained wrote"),
        ("tokenizer.json", "save the model's fast tokenizer there with tokenizer.save_pretrained"),
    ):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"text tower {folder} has no {file}; {remedy}")
    _weight_files(folder)  # the same kind of error, before a slow load

    with quiet_transformers():
        architecture = _read_config(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the libraries below raise whatever a damaged file makes them trip over
            raise ValueError(f"the tokenizer of text tower {folder} cannot be read: {_first_line(error)}") from error
        model = _load_model(folder, architecture)

    longest = getattr(architecture, "max_position_embeddings", config.max_length)
    if config.max_length > longest:
        config.refuse("max_length", f"be at most {longest}, the tokens that text tower {folder} reads")
    largest_id, vocabulary = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest_id >= vocabulary:
        raise ValueError(
            f"{folder}/tokenizer.json has token ids up to {largest_id} and the weights only rows for {vocabulary}; "
            "the tokenizer belongs to another model"
        )
    revision = local.name if local.parent.name == "snapshots" else None  # how the hub's cache names a commit
    return TextTower(config, model, tokenizer, folder, revision=revision, device=device)


def build_text_tower(path_or_name: str | Path, *, device: str | torch.device = "cpu", **settings: Any) -> TextTower:
    """Load a frozen text tower: `make_text_tower` for those who have no config.

    Args:
        path_or_name: a folder or a hub name.
        device: see `make_text_tower`.
        settings: other fields of `TextConfig`: ``layer_norm``, ``prefix``, ``max_length``.

    Raises:
        FileNotFoundError: no such folder or hub model, or the folder lacks its config, weights or tokenizer.
        ValueError: a setting, or the folder's configuration, weights or pooling, cannot be used.
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


def _local_folder(path_or_name: str | Path) -> Path:
    """Return the folder itself, or that of a hub model, fetched or from the local cache."""
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or ("/" in name and folder.parent.is_dir()):
        raise FileNotFoundError(f"there is no text tower folder {name}; give an existing folder or a hub name")
    try:
        wanted = ["*.json", "*.txt", "model*.safetensors", "0_Transformer/model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"text tower {name} is neither a folder here nor a model that the hub gives; "
            f"check the name and the network, or give a folder ({type(error).__name__})"
        ) from error


def _transformer_folder(folder: Path) -> Path:
    """Return the folder of the encoder, which sentence-transformers may place one level down.

    Raises ValueError unless its modules are an encoder, mean pooling over all tokens, and at most a normalisation.
    """
    if not (folder / "modules.json").is_file():
        return folder
    modules = _read_json(folder / "modules.json", list)
    if not all(isinstance(module, dict) and {"type", "path"} <= module.keys() for module in modules):
        raise ValueError(
            f"{folder}/modules.json is not a list of modules with a type and a path; the folder is damaged"
        )
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{folder}/modules.json lists {', '.join(kinds)}; "
            "only Transformer, Pooling and Normalize, in this order, can serve as a text tower"
        )
    encoder, pooling = (folder / module["path"] for module in modules[:2])

    settings = _read_json(pooling / "config.json")
    modes = settings.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_tokens")
        for name, value in settings.items()
        if name.startswith("pooling_mode_") and value
    ]
    if modes not in (_POOLING, [_POOLING]) or not settings.get("include_prompt", True):
        raise ValueError(f"{pooling}/config.json asks for other than mean pooling over all tokens; it cannot be used")
    extra = encoder / "sentence_bert_config.json"
    if extra.is_file() and _read_json(extra).get("do_lower_case"):
        raise ValueError(f"{extra} lower-cases outside the tokenizer (do_lower_case); move that into tokenizer.json")
    return encoder


def _read_config(folder: Path) -> Any:
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") == "nomic_bert":
        return _nomic_config(raw, folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for the tokenizer
        raise ValueError(
            f"{folder}/config.json: transformers has no built-in class for model type {raw.get('model_type')!r}, "
            "and code from a model folder is never run"
        ) from error
    if config.is_encoder_decoder:
        raise ValueError(f"{folder}/config.json is an encoder-decoder ({config.model_type}); give an encoder")
    return config


def _nomic_config(raw: dict[str, Any], path: Path) -> NomicBertConfig:
    """Read a NomicBERT config under transformers' field names, Nomic's old ones, or both (as the hub copies have it).

    transformers ignores the old names and takes its defaults in silence. Raises ValueError for a field that is missing,
    has two different values, or asks for a variant that ``NomicBertModel`` does not compute.
    """
    for name, expected in _NOMIC_FIXED.items():
        if name in raw and (raw[name] or None) != (expected or None):
            raise ValueError(f"{path}: {name}={raw[name]} is a NomicBERT variant that transformers does not compute")

    native = {**raw, **(raw.get("rope_parameters") or {})}
    values = {}
    for name, old_name in _NOMIC_FIELDS.items():
        old = raw.get(old_name)
        if old == "swiglu":
            old = "silu"
        value = native.get(name, old)
        if value is None:
            raise ValueError(f"{path} has neither {name} nor {old_name}; add the one that the weights were made with")
        if old is not None and old != value:
            raise ValueError(f"{path} has {name}={value} but {old_name}={old}; remove the wrong one")
        # Nomic's code writes 3072.0 where a count is meant.
        values[name] = int(value) if isinstance(value, float) and value.is_integer() and name != "rope_theta" else value

    multiple = raw.get("pad_vocab_size_multiple") or 1
    values["vocab_size"] = -(-values["vocab_size"] // multiple) * multiple
    rope_theta = float(values.pop("rope_theta"))
    try:
        return NomicBertConfig(
            **values,
            rope_parameters={"rope_type": "default", **(raw.get("rope_parameters") or {}), "rope_theta": rope_theta},
            head_dim=raw.get("head_dim"),
            type_vocab_size=raw.get("type_vocab_size", 2),
            max_position_embeddings=raw.get("max_position_embeddings") or raw.get("n_positions") or 2048,
        )
    except Exception as error:  # transformers checks types with an error class of its own
        raise ValueError(f"{path} describes no model: {_first_line(error)}") from error


def _load_model(folder: Path, config: Any) -> Any:
    """Load the weights in float32. Raises ValueError for every key that is missing, left over or of another shape."""
    stored = sum(tensor_size for _, tensor_size in _tensor_sizes(folder))
    try:
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    except Exception as error:  # as for the tokenizer
        raise ValueError(f"{folder}/config.json describes no model: {_first_line(error)}") from error
    # A config that lies about its sizes must not fill the memory before the shapes are compared.
    if needed > 2 * stored + 10**7:
        raise ValueError(f"{folder}/config.json asks for {needed:,} weights and its files hold {stored:,}")
    try:
        model, info = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below by name
        )
    except Exception as error:  # as for the tokenizer
        raise ValueError(f"the weights of text tower {folder} cannot be read: {_first_line(error)}") from error

    for kind, keys in (
        ("lacks the weights", [key for key in info["missing_keys"] if not key.startswith("pooler.")]),
        ("has unexpected weights", [key for key in info["unexpected_keys"] if not _UNUSED_HEADS.match(key)]),
        ("has weights of the wrong shape", [f"{key} {list(there)}" for key, there, _ in info["mismatched_keys"]]),
    ):
        if keys:
            named = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ValueError(f"text tower {folder} {kind} {named}; its config.json belongs to another model")
    return model


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(Path(str(name)).name == name for name in names.values()):
            raise ValueError(f"{index} does not map weights to files of its folder; the model folder is damaged")
        return sorted({folder / name for name in names.values()})
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise FileNotFoundError(
        f"text tower {folder} has no model.safetensors; pickled weights (.bin, .pt) are not read, convert them first"
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors by name, in an order that does not depend on how they are split into files."""
    file_of: dict[str, Path] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            file_of |= dict.fromkeys(weights.keys(), file)
    for name in sorted(file_of):
        with safe_open(file_of[name], framework="pt") as weights:
            yield name, weights.get_tensor(name)


def _tensor_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and number of elements of every stored tensor, read from the headers alone."""
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (no mapping)
                    yield name, math.prod(weights.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {_first_line(error)}") from error


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the model folder is incomplete") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the model folder is damaged") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of a {kind.__name__}; the folder is damaged")
    return content


def _first_line(error: Exception) -> str:
    return f"{str(error).strip().partition(chr(10))[0]} ({type(error).__name__})"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and load reports: what they would say is checked here and raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
