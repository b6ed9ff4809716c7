"""The transformer block and the whole image tower, forward and backward, with their peers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor, nn

from textlock.bench.candidates import Comparison
from textlock.bench.comparison import Prepared, Result, Setting, comparison_of, compiled
from textlock.bench.measure import Unavailable, check_compiler, relative_error
from textlock.kernels.card import Data
from textlock.models.block import Block, ComputeCopies, Implementation, Keep, Stream
from textlock.models.pooling import AttentionPooling
from textlock.models.vision import (
    IMAGE_MEAN,
    IMAGE_STD,
    VisionTower,
    build_vision_tower,
    rotary_table,
)
from textlock.models.weights import from_timm

# Images of a micro-batch whose results are compared with float64.
COMPARED_IMAGES = 8


def jitter(module: nn.Module, generator: torch.Generator) -> None:
    """Move biases, LayerNorms and other vectors away from the zeros and ones that they start with."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.squeeze().ndim <= 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def compared_images(setting: Setting) -> Tensor:
    """Return the numbers of the images whose results are compared: the first and the last."""
    some = min(setting.micro_batch, COMPARED_IMAGES)
    return torch.cat(
        (torch.arange(some // 2), torch.arange(setting.micro_batch - (some - some // 2), setting.micro_batch))
    )


def keep_main_gradients(module: nn.Module) -> None:
    """Let the fused blocks add the gradients of their matrices to float32 tensors, as a training step does."""
    for block in module.modules():
        if isinstance(block, Block):
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]


def take_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters and clear them."""
    taken = {}
    for name, parameter in module.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        main = getattr(parameter, "main_grad", None)
        taken[name] = gradient if main is None else gradient + main
        parameter.grad = None
        if main is not None:
            main.zero_()
    return taken


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def prepare_module(
    module: nn.Module,
    run: Callable[[Result], Result],
    data: Result,
    setting: Setting,
    gradients_of: Callable[[dict[str, Tensor]], Result],
) -> Prepared:
    """Prepare a module's forward and backward pass over all images of ``data``.

    The embeddings of some of these images are compared, and the parameter gradients of a pass over these alone.
    """
    some = compared_images(setting).to(setting.device)
    rows = {name: value[some].clone() for name, value in run(data).items()}
    if len(some) < setting.micro_batch:
        take_gradients(module)
        run({name: value[some] for name, value in data.items()})
    return Prepared(lambda: run(data), rows | gradients_of(take_gradients(module)))


class StreamedBlock(nn.Module):
    """A block with the bias of the layer before it, whose gradient is summed in the block's backward pass."""

    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.block, self.bias_before = block, nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, branch: Tensor, rope: Tensor | None) -> Stream:
        """[b, T, D] each."""
        return self.block(Stream(x, branch, self.bias_before), rope)


def compare_block(setting: Setting) -> Comparison:
    """Compare a block, forward and backward, its stream's gradients included."""
    config = setting.config

    def build(implementation: Implementation) -> StreamedBlock:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(setting.seed)
            block = Block(config, implementation=implementation)
        streamed = StreamedBlock(block, config.width)
        jitter(streamed, torch.Generator().manual_seed(setting.seed))
        return streamed.to(setting.device)

    @cache
    def data() -> Result:
        draw, shape = Data(setting.device, setting.seed), (setting.micro_batch, config.tokens, config.width)
        return {name: draw.normal(*shape, dtype=setting.dtype) for name in ("x", "branch", "d_x", "d_branch")}

    @cache
    def rope() -> Tensor | None:
        return None if config.rotary_grid is None else rotary_table(config).to(setting.device)

    def run(block: StreamedBlock, copies: AbstractContextManager[None], tensors: Result) -> Result:
        x, branch = tensors["x"].detach().requires_grad_(), tensors["branch"].detach().requires_grad_()
        with copies, setting.autocast():
            out = block(x, branch, rope())
            torch.autograd.backward((out.x, out.branch), (tensors["d_x"], tensors["d_branch"]))
        assert x.grad is not None and branch.grad is not None
        return {"x": out.x.detach(), "branch": out.branch.detach(), "d_x": x.grad, "d_branch": branch.grad}

    def parameters(gradients: dict[str, Tensor]) -> Result:
        return {"parameter_grads": flat(gradients)}

    def prepare(implementation: Implementation) -> Prepared:
        block = build(implementation)
        copies: AbstractContextManager[None] = nullcontext()
        if implementation == "fused":
            keep_main_gradients(block)
            copies = ComputeCopies(block, setting.dtype)
        if implementation == "compile":
            check_compiler(setting.device)
        return prepare_module(block, partial(run, block, copies), data(), setting, parameters)

    def errors(found: Result) -> dict[str, float]:
        block, some = build("plain").double(), compared_images(setting).to(setting.device)
        truth = run(block, nullcontext(), {name: value[some].double() for name, value in data().items()})
        return relative_errors(found, truth | parameters(take_gradients(block)))

    return comparison_of(
        "block",
        "block",
        setting,
        {
            "ours": partial(prepare, "fused"),
            "eager": partial(prepare, "plain"),
            "compiled": partial(prepare, "compile"),
        },
        errors,
        operations=3 * setting.micro_batch * sum(config.block_flops(config.tokens).values()),
        many=True,
    )


def relative_errors(found: Result, truth: Result) -> dict[str, float]:
    return {name: relative_error(value, truth[name]) for name, value in found.items()}


def timm_trunk(setting: Setting) -> Any:
    """Build timm's model of an EVA02 tower, without its head, at random."""
    config = setting.config
    if not config.gated:
        raise Unavailable("timm's models are compared with EVA02 towers only")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(setting.seed)
        trunk = timm.create_model(
            "eva02_base_patch14_224",
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.hidden / config.width,
            ref_feat_shape=(config.rotary_grid, config.rotary_grid),
            num_classes=0,
        )
    for block in trunk.blocks:
        block.mlp.norm.eps = 1e-5  # that of the released towers; timm uses 1e-6 throughout
    jitter(trunk, torch.Generator().manual_seed(setting.seed))
    return trunk


class TimmTower(nn.Module):
    """timm's trunk with our head, which timm does not have: the same function as our tower."""

    def __init__(self, trunk: Any, pool: nn.Module) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised images [b, 3, S, S]."""
        return self.pool(self.trunk.forward_features(pixels))


def compare_tower(setting: Setting) -> Comparison:
    """Compare a tower, forward and backward, with every tier of ours: ``none`` is two forward passes."""
    config = setting.config

    def build(block: Implementation) -> VisionTower:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(setting.seed)
            tower = build_vision_tower(setting.tower, block=block)
        jitter(tower, torch.Generator().manual_seed(setting.seed))
        if config.gated:
            trunk = from_timm(timm_trunk(setting).state_dict(), final_norm=config.final_norm)
            tower.load_state_dict(tower.state_dict() | trunk)
        return tower.to(setting.device)

    @cache
    def our_tower() -> VisionTower:
        tower = build("fused")
        keep_main_gradients(tower)
        return tower

    @cache
    def data() -> Result:
        draw, side = Data(setting.device, setting.seed), config.image_size
        return {
            "images": draw.integers(256, setting.micro_batch, side, side, 3, dtype=torch.uint8),
            "d": draw.normal(setting.micro_batch, config.width, dtype=setting.dtype),
        }

    def run(forward: Callable[[Tensor], Tensor], copies: AbstractContextManager[None], tensors: Result) -> Result:
        with copies, setting.autocast():
            embeddings = forward(tensors["images"])
            torch.autograd.backward(embeddings, tensors["d"].to(embeddings.dtype))
        return {"embeddings": embeddings.detach()}

    def parameters(gradients: dict[str, Tensor]) -> Result:
        position = {"position_grad": gradients["position"]} if "position" in gradients else {}
        return position | {"parameter_grads": flat(gradients)}

    def ours(keep: Keep | Literal["none"]) -> Prepared:
        tower = our_tower()

        def forward(images: Tensor) -> Tensor:
            if keep != "none":
                return tower(images, keep=keep)
            with torch.no_grad():
                tower(images)
            return tower(images)

        copies = ComputeCopies(tower, setting.dtype)
        return prepare_module(tower, partial(run, forward, copies), data(), setting, parameters)

    def plain(block: Literal["plain", "compile"]) -> Prepared:
        if block == "compile":
            check_compiler(setting.device)
        tower = build(block)
        return prepare_module(tower, partial(run, tower, nullcontext()), data(), setting, parameters)

    def of_timm(*, compile_it: bool, checkpoints: bool) -> Prepared:
        trunk = timm_trunk(setting)
        trunk.set_grad_checkpointing(checkpoints)
        pool = build("plain").pool
        assert isinstance(pool, AttentionPooling)
        tower = TimmTower(trunk, pool).to(setting.device)
        forward = compiled(tower, setting.device) if compile_it else tower
        images = (data()["images"] / 255 - torch.tensor(IMAGE_MEAN, device=setting.device)).div_(
            torch.tensor(IMAGE_STD, device=setting.device)
        )
        pixels = images.permute(0, 3, 1, 2).contiguous()
        return prepare_module(
            tower,
            partial(run, forward, nullcontext()),
            data() | {"images": pixels},
            setting,
            lambda gradients: {"position_grad": gradients["trunk.pos_embed"]},
        )

    @cache
    def truth() -> Result:
        tower, some = build("plain").double(), compared_images(setting).to(setting.device)
        rows = run(tower, nullcontext(), {"images": data()["images"][some], "d": data()["d"][some].double()})
        return rows | parameters(take_gradients(tower))

    timm_settings = {
        "timm": partial(of_timm, compile_it=False, checkpoints=False),
        "timm_compiled": partial(of_timm, compile_it=True, checkpoints=False),
        "timm_checkpoints": partial(of_timm, compile_it=False, checkpoints=True),
        "timm_compiled_checkpoints": partial(of_timm, compile_it=True, checkpoints=True),
    }
    tiers: tuple[Keep | Literal["none"], ...] = (*get_args(Keep), "none")
    return comparison_of(
        "tower",
        "tower",
        setting,
        {
            **{f"ours_{keep}": partial(ours, keep) for keep in tiers},
            "eager": partial(plain, "plain"),
            "compiled": partial(plain, "compile"),
            **timm_settings,
        },
        lambda found: relative_errors(found, truth()),
        operations=setting.micro_batch * config.training_flops(),
        many=True,
    )
