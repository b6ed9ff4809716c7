"""From tokens to an embedding, as a text encoder's own folder says it: prompt, length, pooling, the layers after it.

sentence-transformers writes this next to an encoder: ``modules.json`` (the parts, in order), ``1_Pooling/config.json``,
``sentence_bert_config.json`` (length, lower-casing) and ``config_sentence_transformers.json`` (prompts). All of it is
followed, or refused with the reason. Where a folder does not say it, it is asked for: nothing is guessed, because
embeddings of another recipe look as good as the right ones. Nomic Embed Text, whose recipe stands in its paper and not
in its folder, is known by its name (arXiv:2402.01613; "hamming" in contrastors for the LayerNorm of v1.5).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from .text_folder import first_line, read_json, tensors

Pooling = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]
"""sentence-transformers' names. mean: over the tokens; cls, lasttoken: the first, the last; max: of each dimension;
mean_sqrt_len_tokens: sum over the root of their number; weightedmean: weights 1, 2, 3, ... by position."""

# The order in which sentence-transformers concatenates poolings that are asked for by its old names.
_OLD_ORDER: Final = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_ACTIVATIONS: Final = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Mish", "Softplus")
# Length and lower-casing: the name of today, then those of early versions, which named it after the encoder.
_ENCODER_SETTINGS: Final = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# What it may hold beside length and lower-casing without a say in the embeddings.
_HARMLESS: Final = ("module_output_name", "unpad_inputs", "query_length", "document_length", "query_expansion")
_ARGUMENTS: Final = re.compile(r"(model|config|tokenizer|processor|processing)_(args|kwargs)")
_HARMLESS_ARGUMENTS: Final = ("dtype", "torch_dtype", "attn_implementation", "padding_side", "trust_remote_code")

_NOMIC_NAME: Final = re.compile(r"(.*[/-])?nomic-embed-text-v1(?P<later>\.5)?")
_NOMIC_PREFIX: Final = "search_query: "
_NOMIC_TOKENS: Final = 77  # as Nomic Embed Vision was trained; the text model itself reads 8,192


@dataclass(frozen=True)
class FolderRecipe:
    """What a folder says of its recipe; None and empty where it says nothing."""

    encoder: Path
    """Folder of the encoder: config.json, tokenizer.json, weights."""
    pooling: tuple[Pooling, ...] = ()
    """Concatenated when several."""
    pool_prefix: bool = True
    prefix: str | None = None
    prompts: tuple[str, ...] = ()
    """Names of the prompts of a folder that names none as its default."""
    lower_case: bool = False
    max_length: int | None = None
    layers: tuple[tuple[str, Path], ...] = ()
    """Kind and folder of what comes after pooling, in order: Dense, LayerNorm, Normalize."""
    layer_norm: bool | None = None


@dataclass(frozen=True)
class Recipe:
    """How embeddings are made: what the folder says and what settings ask for instead."""

    prefix: str
    """Written in front of every text."""
    pool_prefix: bool
    """Whether the tokens of the prefix count in pooling."""
    lower_case: bool
    """Lower-cased in front of the tokenizer."""
    max_length: int
    """Tokens kept of a text, prefix and special tokens included."""
    pooling: tuple[Pooling, ...]
    """Concatenated when several."""
    layers: tuple[str, ...]
    """What comes after pooling, in order, in words."""
    layer_norm: bool
    """LayerNorm without affine (eps 1e-5) behind the layers."""
    dimensions: int
    """Leading components kept, then the embedding is made unit length."""

    def __str__(self) -> str:
        before = f"prefix {self.prefix!r}" + (" (not pooled)" if self.prefix and not self.pool_prefix else "")
        steps = [f"{' + '.join(self.pooling)} pooling", *self.layers, *(["LayerNorm"] if self.layer_norm else [])]
        lower = "lower case, " if self.lower_case else ""
        return f"{before}, {lower}{self.max_length:,} tokens, {', '.join(steps)}, {self.dimensions} dimensions"


def read_recipe(folder: Path, name: str) -> FolderRecipe:
    """Read what a folder says of its recipe.

    Args:
        folder: of sentence-transformers or of transformers.
        name: what it was asked for by; it tells Nomic Embed Text, as does the place of a folder in the hub's cache.

    Raises:
        FileNotFoundError: a file that is named in another is missing.
        ValueError: the folder is damaged, or asks for something that cannot be followed.
    """
    if (folder / "modules.json").is_file():
        said = _read_modules(folder)
    else:
        modules = sorted(entry.name for entry in folder.glob("[1-9]_*") if entry.is_dir())
        if len(modules) > 1:
            raise ValueError(
                f"{folder} holds {', '.join(modules)} and no modules.json that says what they do; the folder is "
                "incomplete"
            )
        pooling = _read_pooling(folder / modules[0]) if modules else ((), True)
        said = FolderRecipe(folder, *pooling, **_read_encoder_settings(folder))
    said = _with_prompts(said, folder)
    if nomic := _NOMIC_NAME.fullmatch(_released_name(folder, name)):
        return FolderRecipe(
            said.encoder,
            pooling=said.pooling or ("mean",),
            prefix=_NOMIC_PREFIX,
            max_length=_NOMIC_TOKENS,
            layer_norm=nomic["later"] is not None,
        )
    return said


def load_layers(said: FolderRecipe, width: int) -> tuple[nn.Sequential, tuple[str, ...], int]:
    """Build what comes after pooling.

    Args:
        said: names the layers.
        width: of the pooled hidden states.

    Returns:
        The layers in float32, each in words, and the width of what comes out.

    Raises:
        FileNotFoundError: the weights of a layer are missing.
        ValueError: a layer does not fit, or cannot be built.
    """
    layers, words = nn.Sequential(), []
    for kind, folder in said.layers:
        if kind == "Normalize":
            layers.append(_Normalize())
            words.append("Normalize")
            continue
        settings = read_json(folder / "config.json")
        weights = _read_weights(folder)
        layer: nn.LayerNorm | _Dense
        if kind == "LayerNorm":
            layer, out = nn.LayerNorm(width), width
            words.append("LayerNorm with weights")
        else:
            activation = _activation(settings.get("activation_function", "torch.nn.modules.activation.Tanh"), folder)
            out = int(settings.get("out_features", 0))
            layer = _Dense(width, out, weights, activation, residual=bool(settings.get("use_residual", False)))
            added = ", input added" if layer.adds_input else ""
            words.append(f"Dense {width} to {out} {type(activation).__name__}{added}")
        try:
            layer.load_state_dict({key.removeprefix("norm."): value.float() for key, value in weights.items()})
        except RuntimeError as error:
            raise ValueError(
                f"the weights of {folder} do not fit {width} pooled numbers: {' '.join(str(error).split())}"
            ) from error
        layers.append(layer)
        width = out
    return layers.requires_grad_(False).eval(), tuple(words), width


def pool(hidden: Tensor, lengths: Tensor, modes: Sequence[Pooling], *, skipped: int = 0) -> Tensor:
    """Reduce the last hidden states of right-padded texts to one vector each, as sentence-transformers does.

    Args:
        hidden: [n, T, d], any float type.
        lengths: [n] int, the tokens of each text, at least 1.
        modes: concatenated in this order.
        skipped: leading tokens that do not count. A text that has no others is pooled over all of its tokens.

    Returns:
        float32 [n, len(modes) · d].
    """
    hidden = hidden.float()
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    first = torch.where(lengths > skipped, skipped, 0)  # [n]
    mask = (positions >= first[:, None]) & (positions < lengths[:, None])  # [n, T]
    weight = mask.unsqueeze(-1).float()  # [n, T, 1]
    rows = torch.arange(hidden.shape[0], device=hidden.device)  # no len(): an exported graph would keep this one
    pooled = []
    for mode in modes:
        if mode == "cls":
            pooled.append(hidden[rows, first])
        elif mode == "lasttoken":
            pooled.append(hidden[rows, lengths - 1])
        elif mode == "max":
            pooled.append(hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1))
        elif mode == "weightedmean":
            by_position = weight * (positions + 1).unsqueeze(-1)
            pooled.append((hidden * by_position).sum(dim=1) / by_position.sum(dim=1))
        else:
            count = weight.sum(dim=1)
            pooled.append((hidden * weight).sum(dim=1) / (count if mode == "mean" else count.sqrt()))
    return torch.cat(pooled, dim=-1)


class _Normalize(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1)


class _Dense(nn.Module):
    """A linear layer and an activation, with or without the input added."""

    def __init__(
        self, width: int, out: int, weights: dict[str, Tensor], activation: nn.Module, *, residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias="linear.bias" in weights)
        self.activation = activation
        self.adds_input = residual
        self.residual = nn.Linear(width, out, bias=False) if residual and out != width else None

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.activation(self.linear(rows))
        if self.adds_input:
            result = result + (rows if self.residual is None else self.residual(rows))
        return result


def _released_name(folder: Path, name: str) -> str:
    """Return the name a model was released by: of a folder in the hub's cache, or the last part of what was given."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return Path(name).name


def _read_modules(folder: Path) -> FolderRecipe:
    path = folder / "modules.json"
    modules = read_json(path, list)
    if not all(isinstance(module, dict) and {"type", "path"} <= module.keys() for module in modules):
        raise ValueError(f"{path} is not a list of modules with a type and a path; the folder is damaged")
    kinds = []
    for module in modules:
        package, _, kind = str(module["type"]).rpartition(".")
        if not package.startswith("sentence_transformers."):
            raise ValueError(f"{path} names code of its own ({module['type']}), which is never run")
        kinds.append(kind)
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "LayerNorm", "Normalize", "Dropout"}:
        raise ValueError(
            f"{path} lists {', '.join(kinds)}; only Transformer, Pooling, and after them Dense, LayerNorm, Normalize "
            "and Dropout, can serve as a text tower"
        )
    for module in modules:
        if Path(str(module["path"])).is_absolute() or ".." in Path(str(module["path"])).parts:
            raise ValueError(f"{path} names the place {module['path']}, which is not in its folder")
    places = [folder / str(module["path"]) for module in modules]
    pooling, pool_prefix = _read_pooling(places[1])
    layers = [(kind, place) for kind, place in zip(kinds[2:], places[2:], strict=True) if kind != "Dropout"]
    for _, place in layers:
        _require_sentence_embedding(place)
    if layers and layers[-1][0] == "Normalize":
        layers.pop()  # every embedding ends at unit length
    return FolderRecipe(places[0], pooling, pool_prefix, layers=tuple(layers), **_read_encoder_settings(places[0]))


def _read_pooling(folder: Path) -> tuple[tuple[Pooling, ...], bool]:
    """Return the poolings, and whether the tokens of the prompt take part."""
    path = folder / "config.json"
    settings = read_json(path)
    modes = settings.get("pooling_mode")
    if modes is None:
        asked = {
            name.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
            for name, value in settings.items()
            if name.startswith("pooling_mode_") and value
        }
        asked = {"mean_sqrt_len_tokens" if mode == "mean_sqrt_len" else mode for mode in asked}
        modes = [mode for mode in _OLD_ORDER if mode in asked] + sorted(asked.difference(_OLD_ORDER))
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [str(mode) for mode in modes if mode not in get_args(Pooling)]
    if unknown or not modes:
        raise ValueError(f"{path} asks for the pooling {', '.join(unknown) or 'of none'}, which is not known")
    return modes, bool(settings.get("include_prompt", True))


def _read_encoder_settings(encoder: Path) -> dict[str, Any]:
    """Return max_length and lower_case of an encoder, under the names of `FolderRecipe`."""
    path = next((encoder / name for name in _ENCODER_SETTINGS if (encoder / name).is_file()), None)
    if path is None:
        return {}
    settings = read_json(path)
    max_length = settings.pop("max_seq_length", None)
    lower_case = bool(settings.pop("do_lower_case", False))
    if settings.pop("transformer_task", "feature-extraction") != "feature-extraction":
        raise ValueError(f"{path} asks for another task than feature-extraction; it cannot serve as a text tower")
    text = settings.pop("modality_config", {"text": {}}).get("text")
    if text is None or text.get("method_output_name", "last_hidden_state") != "last_hidden_state":
        raise ValueError(f"{path} reads texts by other than the encoder's last hidden states; that cannot be followed")
    for name, value in settings.items():
        arguments = value if _ARGUMENTS.fullmatch(name) and isinstance(value, dict) else {name: value}
        max_length = arguments.pop("model_max_length", max_length)
        followed = (*_HARMLESS_ARGUMENTS, *_HARMLESS)
        unknown = [key for key, it in arguments.items() if key not in followed and it not in (None, {}, False)]
        if unknown:
            raise ValueError(
                f"{path} sets {', '.join(unknown)}, which cannot be followed; remove it if it is not needed"
            )
    return {"max_length": max_length, "lower_case": lower_case}


def _with_prompts(said: FolderRecipe, folder: Path) -> FolderRecipe:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return said
    settings = read_json(path)
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if default is None:
        named = tuple(name for name, prompt in prompts.items() if prompt)
        return FolderRecipe(**{**vars(said), "prompts": named})
    if not isinstance(prompts.get(default), str):
        raise ValueError(f"{path} names the prompt {default!r} as its default and has no such prompt")
    return FolderRecipe(**{**vars(said), "prefix": prompts[default]})


def _require_sentence_embedding(folder: Path) -> None:
    """Raise ValueError where a layer reads or writes something else than the pooled vector."""
    path = folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    for name in ("module_input_name", "module_output_name"):
        if settings.get(name) not in (None, "sentence_embedding"):
            raise ValueError(f"{path} has {name} {settings[name]!r}; only layers of the pooled vector can be followed")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return dict(tensors(folder))
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} cannot be read: {first_line(error)}") from error


def _activation(path: str, folder: Path) -> nn.Module:
    package, _, name = path.rpartition(".")
    if not package.startswith("torch.nn.modules.") or name not in _ACTIVATIONS:
        raise ValueError(f"{folder / 'config.json'} asks for the activation {path}, which is not known")
    activation: nn.Module = getattr(nn, name)()
    return activation
