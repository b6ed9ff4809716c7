"""Folders of text encoders with random weights, of the architectures that embedders are made of."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CamembertConfig,
    CamembertModel,
    CLIPTextConfig,
    CLIPTextModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraForPreTraining,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetModel,
    MT5Config,
    MT5EncoderModel,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

CAPTIONS = [
    "a red circle",
    "a blue square on the left of a green dot, and a yellow star above both of them",
    "two dogs",
    "a red circle",
    "",
    "a photo of a small green triangle on a white table near the window of an old house",
    "the quick brown fox " * 40,
    "Red Circle, A",
]
WIDTH = 64
_WORDS = sorted({word for caption in CAPTIONS for word in caption.lower().replace(",", " , ").split()})
_LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyzRCA:"))
# Where RoBERTa and its kin have the padding token, which their positions count from.
_PIECES = ["<s>", "<pad>", "</s>", "<unk>", *_WORDS, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
_SHAPE = {
    "vocab_size": len(_PIECES),
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_CAUSAL = {**_SHAPE, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}

_T5 = {
    "vocab_size": len(_PIECES),
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def _bert(config_class, model_class, **changes):
    return lambda: model_class(config_class(**{**_SHAPE, "max_position_embeddings": 128, **changes}))


ENCODERS = {
    "bert": _bert(BertConfig, BertModel),
    "bert with its MLM head": _bert(BertConfig, BertForMaskedLM),
    "roberta": _bert(RobertaConfig, RobertaModel, max_position_embeddings=130),
    "xlm-roberta": _bert(XLMRobertaConfig, XLMRobertaModel, max_position_embeddings=130),
    "camembert": _bert(CamembertConfig, CamembertModel, max_position_embeddings=130),
    "mpnet": _bert(MPNetConfig, MPNetModel, max_position_embeddings=130),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=len(_PIECES), dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=128,
            initializer_range=0.1, pad_token_id=1,
        )
    ),
    "deberta": _bert(DebertaV2Config, DebertaV2Model, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "electra": _bert(ElectraConfig, ElectraForPreTraining, embedding_size=16),
    "albert with its MLM head": _bert(AlbertConfig, AlbertForMaskedLM, embedding_size=16),
    "modernbert with its MLM head": _bert(
        ModernBertConfig, ModernBertForMaskedLM, cls_token_id=0, sep_token_id=2, local_attention=8
    ),
    "nomic_bert": _bert(NomicBertConfig, NomicBertModel),
    "gpt2": lambda: GPT2Model(
        GPT2Config(
            vocab_size=len(_PIECES), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=128, initializer_range=0.1,
            bos_token_id=0, eos_token_id=2,
        )
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**_CAUSAL)),
    "mistral": lambda: MistralModel(MistralConfig(**_CAUSAL)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**_CAUSAL)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**_CAUSAL)),
    "gemma3, both directions": lambda: Gemma3TextModel(
        Gemma3TextConfig(**_CAUSAL, use_bidirectional_attention=True, sliding_window=8)
    ),
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**{**_SHAPE, "max_position_embeddings": 128})),
    "t5 encoder": lambda: T5EncoderModel(T5Config(**_T5)),
    "mt5 encoder": lambda: MT5EncoderModel(MT5Config(**_T5)),
}  # fmt: skip


def write_tokenizer(folder, *, template="<s> $A </s>", padding_side="right", max_length=128):
    """Write a lower-casing WordPiece tokenizer whose special tokens have RoBERTa's ids."""
    ids = {piece: index for index, piece in enumerate(_PIECES)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if template != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", cls_token="<s>",
        eos_token="</s>", sep_token="</s>", padding_side=padding_side, model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def write_encoder(folder: Path, architecture: str, **tokenizer) -> Path:
    """Write a folder of transformers with random weights and norms away from their start."""
    torch.manual_seed(0)
    model = ENCODERS[architecture]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder, **tokenizer)
    return folder


def write_sentence_folder(folder: Path, encoder: Path, *parts, pooling=None, prompts=None, default=None, **settings):
    """Copy an encoder and write around it what sentence-transformers does.

    ``parts`` are (kind, config, weights) after pooling; ``settings`` go into sentence_bert_config.json.
    """
    shutil.copytree(encoder, folder)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"embedding_dimension": WIDTH, **(pooling or {"pooling_mode": "mean"})})
    )
    for number, (kind, config, weights) in enumerate(parts, 2):
        place = folder / f"{number}_{kind}"
        place.mkdir()
        modules.append((kind, place.name))
        if config:
            (place / "config.json").write_text(json.dumps(config))
        if weights:
            save_file(weights, place / "model.safetensors")
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps({"prompts": prompts, "default_prompt_name": default})
        )
    return folder


def dense(width, out, *, activation="torch.nn.modules.activation.Tanh", bias=True, **more):
    """Return a Dense part with random weights."""
    generator = torch.Generator().manual_seed(width + out)
    weights = {"linear.weight": torch.randn(out, width, generator=generator) / width**0.5}
    if bias:
        weights["linear.bias"] = 0.1 * torch.randn(out, generator=generator)
    if more.get("use_residual") and out != width:
        weights["residual.weight"] = torch.randn(out, width, generator=generator) / width**0.5
    config = {"in_features": width, "out_features": out, "bias": bias, "activation_function": activation, **more}
    return "Dense", config, weights


def edit_json(path, remove=(), **changes):
    """Change fields of a JSON file."""
    settings = json.loads(path.read_text())
    settings = {name: value for name, value in {**settings, **changes}.items() if name not in remove}
    path.write_text(json.dumps(settings))


def edit_weights(folder, remove=(), **changes):
    """Change tensors of model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in {**weights, **changes}.items() if name not in remove}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
