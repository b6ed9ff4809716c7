"""The configuration of a run: the settings of every part, parsed by tyro.

The YAML file becomes flags placed before those of the command line. One parser reads both, so a wrong key or type in
the file gets the same message (with the nearest right key) as on the command line, and later flags win. Every text
below a field is its ``--help``. The settings of a part, with their bounds, are defined next to the part; constraints
between sections, and on the processes that run them, are checked here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
import yaml

from ..data.loader import DataConfig, require_decoder
from ..evals.suite import EvalConfig, read_choices
from ..models.block import tiers_of
from ..models.text import TextConfig
from ..models.vision import ModelConfig
from ..settings import FREE_ON_RESUME, NOT_EMPTY, Settings, at_least
from .checkpoint import CheckpointConfig
from .distributed import World
from .metrics import LogConfig, require_trackers
from .objective import LossConfig
from .optim import OptimConfig, require_optimizer
from .plan import StepConfig


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Train an image encoder into the latent space of a frozen text embedder."""

    run_dir: Annotated[str, NOT_EMPTY, FREE_ON_RESUME]
    """Folder of this run. Run again with the same folder and it resumes."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    step: Annotated[StepConfig, FREE_ON_RESUME] = field(default_factory=StepConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evals: Annotated[EvalConfig, FREE_ON_RESUME] = field(default_factory=EvalConfig)
    checkpoint: Annotated[CheckpointConfig, FREE_ON_RESUME] = field(default_factory=CheckpointConfig)
    log: Annotated[LogConfig, FREE_ON_RESUME] = field(default_factory=LogConfig)
    seed: Annotated[int, at_least(0)] = 42
    """Of the initial weights and of every random draw in training."""
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE_ON_RESUME] = "auto"
    """auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        """Also refuse sections that do not go together."""
        super().__post_init__()
        if self.data.batch_size < 2:
            self.data.refuse("batch_size", "be at least 2: a pair is compared with the others of its batch")
        self.model.shape(self.data.image_size)
        tiers = tiers_of(self.model.block)
        if self.step.keep not in ("auto", "none", *tiers):
            self.step.refuse("keep", f"be one of auto, {', '.join(tiers)}, none with --model.block {self.model.block}")

    def require_world(self, world: World) -> None:
        """Raise ValueError, naming the flag, for what these processes, their devices, packages or data cannot run.

        Nothing is loaded or written for it.
        """
        self.step.micro_batch_of(self.data.local_batch(world.world_size))
        if self.step.sharding == "fsdp" and world.group is None:
            self.step.refuse("sharding", "be replicated in a single process: start with torchrun to divide the weights")
        require_optimizer(self.optim, world.device, sharded=self.step.sharding == "fsdp")
        require_decoder(self.data)
        require_trackers(self.log.trackers)
        read_choices(self.evals)


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
    before = dict(saved.leaves(resume=True))
    changed = [
        f"{name} is {before[name]!r} there and {now!r} here"
        for name, now in current.leaves(resume=True)
        if before[name] != now
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
            for item in value:
                if isinstance(item, dict):
                    raise ValueError(
                        f"{flag} has {item} in the config file: write it without a space after the colon, or in quotes"
                    )
            yield from (flag, *map(str, value))
        elif value is not None:
            yield f"{flag}={value}"
        # null leaves the default, which is None wherever None is allowed; of no field it is refused as an unknown flag.
        elif flag not in _known_flags(Config):
            yield flag


def _known_flags(kind: type[Settings], prefix: str = "--") -> set[str]:
    flags = set()
    hints = get_type_hints(kind)
    for entry in fields(kind):  # type: ignore[arg-type]  # every subclass is a dataclass
        hint, flag = hints[entry.name], f"{prefix}{entry.name}".replace("_", "-")
        is_section = isinstance(hint, type) and issubclass(hint, Settings)
        flags |= {flag} | (_known_flags(hint, f"{flag}.") if is_section else set())
    return flags


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
