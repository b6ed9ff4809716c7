"""Load a text encoder with transformers' own classes, from safetensors alone; no code from a model folder is run.

transformers takes seconds to import, so only what loads an encoder imports this module.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, NomicBertConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils import logging as transformers_logging

from .text_folder import first_line, read_json, stored_size

# Weights of a checkpoint that its last hidden states do not depend on: the head of pre-training or of a classifier,
# under the names that transformers' classes give it, and the decoder of an encoder-decoder.
_HEADS: Final = re.compile(
    r"(\w+\.)?(pooler|cls|classifier|score|qa_outputs|lm_head|lm_predictions|mask_predictions|predictions|"
    r"discriminator_predictions|generator_predictions|generator_lm_head|sop_classifier|vocab_transform|"
    r"vocab_layer_norm|vocab_projector|pre_classifier|head|decoder)\."
)

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


def load_encoder(folder: Path) -> tuple[Any, Any]:
    """Load a folder's encoder and tokenizer.

    Args:
        folder: with config.json, *.safetensors and tokenizer.json.

    Returns:
        The model, float32 on the CPU, whose ``last_hidden_state`` is read, and the tokenizer of transformers.

    Raises:
        ValueError: the configuration, the tokenizer or the weights cannot be used as they are.
    """
    with quiet_transformers():
        config = read_config(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the libraries below raise whatever a damaged file makes them trip over
            raise ValueError(f"the tokenizer of text tower {folder} cannot be read: {first_line(error)}") from error
        model = _load_model(folder, config)

    try:
        vocabulary = model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"{folder}/config.json is a {type(model).__name__}, which reads more than texts; save its text model alone"
        ) from None
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= vocabulary:
        raise ValueError(
            f"{folder}/tokenizer.json has token ids up to {largest_id} and the weights only rows for {vocabulary}; "
            "the tokenizer belongs to another model"
        )
    if any(tokenizer.backend_tokenizer.encode("a").type_ids):
        raise ValueError(
            f"the tokenizer of text tower {folder} uses token types, which only pairs of texts should have"
        )
    return model, tokenizer


def most_tokens(model: Any) -> int | None:
    """Return the most tokens an encoder has positions for; None when its positions have no end."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None or longest < 1:  # XLNet says -1
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the padding token's id + 1, so the first rows hold no token.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    return int(longest)


def read_config(folder: Path) -> Any:
    """Read the configuration of an encoder; that of NomicBERT under any names of its fields.

    Raises:
        FileNotFoundError: there is none.
        ValueError: transformers has no class for it, or it asks for a variant that transformers does not compute.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == "nomic_bert":
        return _nomic_config(raw, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for the tokenizer
        raise ValueError(
            f"{path}: transformers has no built-in class for model type {raw.get('model_type')!r}, "
            "and code from a model folder is never run"
        ) from error
    code = raw.get("auto_map")
    if isinstance(code, dict) and "AutoModel" in code:
        raise ValueError(
            f"{path} names code of its own ({code['AutoModel']}), which is never run, and transformers' class for "
            f"{config.model_type!r} may compute something else; if it does not, delete auto_map from config.json"
        )
    if config.is_encoder_decoder and type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        raise ValueError(
            f"{path} is an encoder-decoder ({config.model_type}) whose encoder transformers has no class for; "
            "give an encoder"
        )
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
        raise ValueError(f"{path} describes no model: {first_line(error)}") from error


def _load_model(folder: Path, config: Any) -> Any:
    """Load the weights in float32. Raises ValueError for every key that is missing, left over or of another shape."""
    # Of T5 and its kin the encoder alone, whatever the config says of a decoder.
    family = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    stored = stored_size(folder)
    try:
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in family.from_config(config).parameters())
    except Exception as error:  # as for the tokenizer
        raise ValueError(f"{folder}/config.json describes no model: {first_line(error)}") from error
    # A config that lies about its sizes must not fill the memory before the shapes are compared.
    if needed > 2 * stored + 10**7:
        raise ValueError(f"{folder}/config.json asks for {needed:,} weights and its files hold {stored:,}")
    try:
        model, info = family.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below by name
        )
    except Exception as error:  # as for the tokenizer
        raise ValueError(f"the weights of text tower {folder} cannot be read: {first_line(error)}") from error

    for complaint, keys in (
        ("lacks the weights", [key for key in info["missing_keys"] if not key.startswith("pooler.")]),
        ("has unexpected weights", [key for key in info["unexpected_keys"] if not _HEADS.match(key)]),
        ("has weights of the wrong shape", [f"{key} {list(there)}" for key, there, _ in info["mismatched_keys"]]),
    ):
        if keys:
            named = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ValueError(
                f"text tower {folder} {complaint} {named}: they are not those of the {type(model).__name__} that its "
                "config.json describes"
            )
    return model


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
