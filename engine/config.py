"""The configuration of a run: dataclasses read by tyro, a YAML file flattened to flags before the command line.

One parser reads both, so a wrong key or type in the file gets the same message (with the nearest right key) as on the
command line, and later flags win. Every text below a field is its ``--help``.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from ..data.loader import DataConfig
from ..kernels.contrastive import Mode
from ..models.block import Implementation
from .optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The image tower."""

    name: str = "eva02_base_patch16_224"
    """Architecture; models/vision.py lists them."""
    pooling: Literal["cls", "mean", "map"] = "map"
    """How tokens become one row: the class token, the mean of the patches, or attention pooling."""
    weights: str | None = None
    """Starting weights: a .safetensors file, a folder, a hub name, or None for random ones."""
    block: Implementation = "fused"
    """How the transformer blocks run: with this project's kernels (on a CPU, their references in torch); with torch's
    own operations; or with these under torch.compile, for GPUs that the kernels do not run on."""
    attention: Literal["auto", "triton", "sdpa", "flash-attn", "flash-attn-4", "reference"] = "auto"
    """Kernel of the fused blocks' attention; auto goes by GPU and sequence length."""
    residual: Literal["auto", "fp32"] = "auto"
    """Type of the tokens between the blocks. auto: that of the arithmetic, as in the released code. fp32 beside bf16
    arithmetic rounds less, and takes more memory and time."""
    kept_patches: int | None = None
    """Patches of an image that go through the tower while training, drawn at random (FLIP). None: all, as published."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The frozen text tower."""

    name: str = "nomic-ai/nomic-embed-text-v1.5"
    """A transformers or sentence-transformers folder, or a hub name."""
    layer_norm: bool = True
    """LayerNorm without affine after pooling: True for Nomic Embed Text v1.5, False for v1."""
    prefix: str = "search_query: "
    """Written in front of every caption."""
    max_length: int = 77
    """Tokens kept of a caption, prefix included."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of the global batch."""

    objective: Literal["infonce", "sigmoid", "image_to_text"] = "infonce"
    """infonce: every image chooses its text and every text its image, as published. sigmoid: every pair is a yes-or-no
    question (SigLIP). image_to_text: only the images choose. The last two are exact in one pass over the images,
    whatever the memory, and are other losses: their results are not those of the recipe."""
    mode: Mode = "auto"
    """Implementation of infonce: the table at the top of kernels/contrastive.py. All compute the same loss."""
    initial_logit_scale: float = 1 / 0.07
    """Start of the learnable, unclamped logit scale. SigLIP starts at 10."""
    initial_logit_bias: float = -10.0
    """Start of the learnable bias of the sigmoid objective."""
    mask_duplicates: bool = False
    """Equal captions in one batch are no negatives of each other. Off in the published recipe."""
    text_bank: int = 0
    """Text rows of earlier steps that are further negatives of every image. They cost no encoding and never go stale,
    but the loss is another than that of the recipe, with more candidates. 0: none."""

    def __post_init__(self) -> None:
        """Refuse values that can only fail later, in one sentence each."""
        if self.text_bank < 0:
            raise ValueError(f"--loss.text-bank is {self.text_bank}, must not be negative")
        if self.initial_logit_scale <= 0:
            raise ValueError(f"--loss.initial-logit-scale is {self.initial_logit_scale}, must be positive")
        if self.mode != "auto" and self.objective != "infonce":
            raise ValueError(f"--loss.mode {self.mode} is for the objective infonce; leave it out for {self.objective}")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How one global batch is computed. Changes memory and speed, never the result beyond rounding."""

    micro_batch: int = 512
    """Images per forward pass on one rank."""
    keep: Literal["auto", "all", "no-mlp", "lean", "block", "none"] = "auto"
    """What every micro-batch keeps for its backward: the table at the top of models/block.py, or none, which is to run
    it twice. auto: for each micro-batch what lets the whole step run again the least, in the memory there is."""
    memory_gib: float | None = None
    """Memory for activations in GiB; None asks the device."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the image tower; weights and optimiser stay float32. auto: bf16 on a GPU, fp32 on a CPU."""
    sharding: Literal["replicated", "fsdp"] = "replicated"
    """Where weights, gradients and moments lie. replicated: all on every GPU, the fastest where they fit. fsdp: divided
    among the GPUs, every block gathered where it is needed (FSDP2), for towers that do not fit; under torchrun only."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured during training and at its end."""

    every: int = 1000
    """Steps between evaluations; the last step is always evaluated. 0: only the last."""
    zero_shot: str | None = None
    """Class folder (CLASS NAME/picture.jpg) for zero-shot top-1 and top-5."""
    zero_shot_unseen: str | None = None
    """A second class folder, of classes that no training caption names; reported apart."""
    retrieval: str | None = None
    """Shards for image-text retrieval, recall@1, 5 and 10 both ways."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts of a class; {} is its name. The mean of their text rows stands for the class."""
    batch_size: int = 256
    """Images per forward pass on one rank."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: a folder each, written aside and renamed, with a checksum of every file."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 3
    """Checkpoints kept, the newest ones."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Progress and metrics."""

    every: int = 10
    """Steps between lines in metrics.jsonl and on the terminal."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send the metrics there (optional packages)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an image encoder into the latent space of a frozen text embedder."""

    run_dir: str
    """Folder of this run. Run again with the same folder and it resumes."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    step: StepConfig = field(default_factory=StepConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 42
    """Of the initial weights and of every random draw in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        """Refuse values that can only fail later, in one sentence each."""
        for name, value, least in (
            ("data.batch_size", self.data.batch_size, 2),
            ("step.micro_batch", self.step.micro_batch, 1),
            ("checkpoint.every", self.checkpoint.every, 0),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("evals.every", self.evals.every, 0),
            ("evals.batch_size", self.evals.batch_size, 1),
            ("text.max_length", self.text.max_length, 1),
            ("seed", self.seed, 0),
            ("data.seed", self.data.seed, 0),
            ("log.every", self.log.every, 1),
        ):
            if value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, must be at least {least}")
        for name, value in _leaves(self):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name.replace('_', '-')} is {value}, must be a finite number")
            if isinstance(value, int) and value >= 2**63:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, must be less than 2^63")
        for name, path in (("run-dir", self.run_dir), ("data.shards", self.data.shards), ("text.name", self.text.name)):
            if not path.strip():
                raise ValueError(f"--{name} is empty; name a folder")
        if self.step.sharding == "fsdp" and self.optim.optimizer != "torch":
            raise ValueError(
                f"--optim.optimizer {self.optim.optimizer} knows whole parameters only: with --step.sharding fsdp "
                f"choose --optim.optimizer torch"
            )
        for template in self.evals.templates:
            if "{}" not in template:
                raise ValueError(f"--evals.templates holds {template!r} without {{}} where the class name goes")


# What may differ when a run is resumed. The shards and the text tower may have moved: their fingerprints, kept in the
# checkpoint, say whether they are the same ones. Stored text embeddings are the rows of that tower, in half precision.
FREE_ON_RESUME = (
    "run_dir",
    "device",
    "step.",
    "evals.",
    "checkpoint.",
    "log.",
    "loss.mode",
    "model.block",
    "model.attention",
    "optim.optimizer",
    "data.shards",
    "data.text_embeddings",
    "data.workers",
    "data.prefetch_batches",
    "data.max_skipped_fraction",
    "data.cache_dir",
    "data.cache_gb",
    "data.fetchers",
    "text.name",
)


def parse_config(arguments: Sequence[str]) -> Config:
    """Read ``--config FILE`` and the flags after it; exits with tyro's message on a wrong flag."""
    flags: list[str] = []
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("--config needs the path of a YAML file")
        flags += _flags_of_file(Path(arguments[at + 1]))
        del arguments[at : at + 2]
    return tyro.cli(Config, args=[*flags, *arguments], config=(tyro.conf.FlagConversionOff,))


def load_config(path: Path) -> Config:
    """Read a saved ``config.yaml`` alone."""
    return parse_config(["--config", str(path)])


def dump_config(config: Config) -> str:
    """Return the YAML text of a resolved config; :func:`load_config` reads it back equal."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, width=120)


def require_same_run(saved: Config, current: Config, run_dir: Path) -> None:
    """Raise ValueError naming every setting that decides the result and is not what the run was started with."""
    before, now = dict(_leaves(saved)), dict(_leaves(current))
    changed = [
        f"{name} is {before[name]!r} there and {now[name]!r} here"
        for name in now
        if before[name] != now[name] and not name.startswith(FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"{run_dir} holds a run with another config: {'; '.join(changed)}. "
            f"Choose another --run-dir, or the values of that run."
        )


def _flags_of_file(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"config file {path} must hold sections and keys, like configs/demo.yaml")
    return list(_flags(tree, "--"))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, where YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, as the parent class does."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _flags(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        flag = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        elif value is not None:  # null leaves the default, which is None wherever None is allowed
            yield f"{flag}={value}"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in fields(node):
        value = getattr(node, entry.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def exit_with(error: Exception) -> None:
    """End a command line on bad input: one sentence on stderr, exit status 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
