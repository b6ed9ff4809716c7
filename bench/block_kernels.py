"""Matrix products and kernels of the transformer block, with what they are compared with."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from textlock.bench.ceilings import COMPARED_ROWS
from textlock.bench.comparison import Comparison, Plain, Prepared, Random, Result, Run, Setting, compiled, ran
from textlock.bench.measure import Unavailable, relative_error
from textlock.kernels.attention import attention, attention_backward, rotate
from textlock.kernels.gelu import gelu, gelu_backward
from textlock.kernels.latent_pool import latent_pool, latent_pool_backward
from textlock.kernels.norm import add_norm, add_norm_backward
from textlock.kernels.patchify import patchify
from textlock.kernels.swiglu import swiglu_norm, swiglu_norm_backward
from textlock.models.block import weight_gradient
from textlock.models.vision import IMAGE_MEAN, IMAGE_STD, VisionConfig, rotary_table

# Tensors that are float32 whatever the type of the products.
TABLES = ("rope", "image_mean", "image_std")
COMPARED_IMAGES = 64  # of a kernel, compared with float64 at a time


def layers_of(config: VisionConfig) -> dict[str, tuple[int, int]]:
    """Return output and input channels of the linear layers of a block."""
    first = ("gate_up", 2 * config.hidden) if config.gated else ("fc1", config.hidden)
    D = config.width
    return {"qkv": (3 * D, D), "out_proj": (D, D), first[0]: (first[1], D), "fc2": (D, config.hidden)}


def compare_products(layer: str, setting: Setting) -> Iterator[Comparison]:
    """Compare the products of a linear layer: forward, and the gradients of its input and of its weight.

    That of the weight is added to a float32 main gradient, as for every micro-batch of a step.
    """
    N, K = layers_of(setting.config)[layer]
    M, size = setting.rows, setting.dtype.itemsize

    @cache
    def data() -> Result:
        random = Random(setting)
        weight = random.normal(N, K, std=0.02)
        # As large as what is added to it, so that losing it cannot pass for an error of rounding.
        main = random.normal(N, K, std=M**0.5, dtype=torch.promote_types(setting.dtype, torch.float32))
        return {"x": random.normal(M, K), "weight": weight, "d_y": random.normal(M, N), "main": main}

    def forward() -> Prepared:
        x, weight = data()["x"], data()["weight"]
        return ran(lambda: {"product": F.linear(x, weight)})

    def d_input() -> Prepared:
        d_y, weight = data()["d_y"], data()["weight"]
        return ran(lambda: {"product": d_y @ weight})

    def d_weight(add: Callable[[Tensor, Tensor, Tensor], object]) -> Prepared:
        d_y, x, main = data()["d_y"], data()["x"], data()["main"].clone()

        def run() -> None:
            add(d_y, x, main)

        run()
        return Prepared(run, {"product": main.clone()})

    def add_rounded(d_y: Tensor, x: Tensor, main: Tensor) -> None:
        main.add_(d_y.mT @ x)

    def errors(truth: Callable[[slice], Tensor]) -> Callable[[Result], dict[str, float]]:
        rows = slice(COMPARED_ROWS)
        return lambda found: {"product": relative_error(found["product"][rows], truth(rows))}

    def true_forward(rows: slice) -> Tensor:
        return data()["x"][rows].double() @ data()["weight"].double().mT

    def true_d_input(rows: slice) -> Tensor:
        return data()["d_y"][rows].double() @ data()["weight"].double()

    def true_d_weight(rows: slice) -> Tensor:
        return data()["main"][rows].double() + data()["d_y"][:, rows].double().mT @ data()["x"].double()

    kinds: dict[str, tuple[dict[str, Callable[[], Prepared]], Callable[[slice], Tensor], int]] = {
        "forward": ({"ours": forward}, true_forward, size * (M * K + N * K + M * N)),
        "d_input": ({"ours": d_input}, true_d_input, size * (M * N + N * K + M * K)),
        "d_weight": (
            {"ours": partial(d_weight, weight_gradient), "round_and_add": partial(d_weight, add_rounded)},
            true_d_weight,
            size * (M * N + M * K) + 2 * 4 * N * K,
        ),
    }
    for kind, (candidates, truth, traffic) in kinds.items():
        name = f"{layer}_{kind}"
        yield Comparison("gemm", name, setting, candidates, errors(truth), traffic=traffic, operations=2 * M * N * K)


@dataclass(frozen=True)
class Backward:
    """The backward pass of a kernel."""

    wrt: tuple[str, ...]
    ours: Callable[[Setting, Result, Result], Run]  # of a setting, the inputs and the gradients of the outputs
    traffic: Callable[[Setting], float]
    operations: Callable[[Setting], float] = lambda setting: 0


@dataclass(frozen=True)
class Kernel:
    """An operation of the block: its data, its definition in plain torch, and what this project runs for it."""

    inputs: Callable[[Setting, Random], Result]
    by_image: tuple[str, ...]  # inputs that have a row for every image
    plain: Callable[..., Result]  # of a setting and the inputs by name
    ours: Callable[[Setting, Result], Result]
    traffic: Callable[[Setting], float]
    operations: Callable[[Setting], float] = lambda setting: 0
    backward: Backward | None = None
    libraries: Callable[[torch.device], dict[str, Callable[[], Plain]]] = lambda device: {}  # peers beside torch


def gradients(function: Plain, inputs: Result, wrt: tuple[str, ...], d_outputs: Result) -> Run:
    """Return a run of the backward pass alone of a function, by autograd; the forward pass is run here."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in wrt}
    # A compiled backward pass would otherwise write into what it has to read again in the next run.
    with functorch_config.patch(donated_buffer=False):
        outputs = function(**(inputs | leaves))

    def run() -> Result:
        found = torch.autograd.grad(
            [outputs[name] for name in d_outputs], list(leaves.values()), list(d_outputs.values()), retain_graph=True
        )
        return {f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}

    return run


def in_type(tensors: Result, dtype: torch.dtype) -> Result:
    """Convert the floating-point tensors but tables."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        return tensor if name in TABLES or not tensor.is_floating_point() else tensor.to(dtype)

    return {name: convert(name, tensor) for name, tensor in tensors.items()}


def compare_kernel(name: str, setting: Setting, *, backward: bool) -> Comparison:
    """Compare a kernel with torch, torch.compile and libraries, forward or backward."""
    kernel = KERNELS[name]
    back = kernel.backward if backward else None

    @cache
    def inputs() -> Result:
        return kernel.inputs(setting, Random(setting))

    @cache
    def d_outputs() -> Result:
        random = Random(replace(setting, seed=setting.seed + 1))
        return {name: random.normal(*value.shape) for name, value in kernel.ours(setting, inputs()).items()}

    def ours() -> Prepared:
        if back is None:
            return ran(lambda: kernel.ours(setting, inputs()))
        return ran(back.ours(setting, inputs(), d_outputs()))

    def peer(make: Callable[[], Plain]) -> Prepared:
        function, tensors = make(), in_type(inputs(), setting.dtype)
        if back is None:
            return ran(lambda: function(**tensors))
        return ran(gradients(function, tensors, back.wrt, d_outputs()))

    def truth_of(images: slice) -> Result:
        exact = partial(kernel.plain, replace(setting, dtype=torch.float64))
        tensors = {name: x[images] if name in kernel.by_image else x for name, x in inputs().items()}
        if back is None:
            return exact(**in_type(tensors, torch.float64))
        d_rows = {name: gradient[images].double() for name, gradient in d_outputs().items()}
        return gradients(exact, in_type(tensors, torch.float64), back.wrt, d_rows)()

    def errors(found: Result) -> dict[str, float]:
        squares: dict[str, Tensor] = {}  # of the error and of the truth
        sums: Result = {}  # over images
        for first in range(0, setting.micro_batch, COMPARED_IMAGES):
            images = slice(first, first + COMPARED_IMAGES)
            for name, true in truth_of(images).items():
                if back is not None and name.removeprefix("d_") not in kernel.by_image:
                    sums[name] = sums[name] + true if name in sums else true
                    continue
                square = torch.stack([(found[name][images].double() - true).norm(), true.norm()]).square()
                squares[name] = squares[name] + square if name in squares else square
        of_rows = {name: (error / true).sqrt().item() for name, (error, true) in squares.items()}
        return of_rows | {name: relative_error(found[name], true) for name, true in sums.items()}

    plain = partial(kernel.plain, setting)
    peers: dict[str, Callable[[], Plain]] = {
        "eager": lambda: plain,
        "compiled": lambda: compiled(plain, setting.device),
        **kernel.libraries(setting.device),
    }
    least = kernel if back is None else back
    return Comparison(
        "kernels",
        f"{name}_backward" if backward else name,
        setting,
        {"ours": ours, **{name: partial(peer, make) for name, make in peers.items()}},
        errors,
        traffic=least.traffic(setting),
        operations=least.operations(setting),
    )


def tokens_of(setting: Setting, random: Random, channels: int) -> Tensor:
    return random.normal(setting.micro_batch, setting.config.tokens, channels)


def add_norm_inputs(setting: Setting, random: Random) -> Result:
    width = setting.config.width
    rows = {name: tokens_of(setting, random, width) for name in ("x", "branch")}
    return rows | {name: random.weight(width) for name in ("branch_bias", "weight", "bias")}


def plain_add_norm(
    setting: Setting, x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor
) -> Result:
    residual = x + (branch + branch_bias)
    return {"residual": residual, "normed": F.layer_norm(residual, weight.shape, weight, bias, setting.config.norm_eps)}


def our_add_norm(setting: Setting, inputs: Result) -> Result:
    residual, normed, *_ = add_norm(**inputs, eps=setting.config.norm_eps, dtype=setting.dtype)
    return {"residual": residual, "normed": normed}


def our_add_norm_backward(setting: Setting, inputs: Result, d: Result) -> Run:
    kept = add_norm(**inputs, eps=setting.config.norm_eps, dtype=setting.dtype)
    statistics = (kept.residual, kept.mean, kept.rstd)

    def run() -> Result:
        weight = inputs["weight"]
        return named(add_norm_backward(d["normed"], d["residual"], *statistics, weight, branch_dtype=setting.dtype))

    return run


def named(found: Any) -> Result:
    """Return a named tuple of tensors by name."""
    return {name: value for name, value in found._asdict().items() if value is not None}


def swiglu_inputs(setting: Setting, random: Random) -> Result:
    hidden = setting.config.hidden
    weights = {name: random.weight(hidden) for name in ("weight", "bias")}
    return {"gate_up": tokens_of(setting, random, 2 * hidden)} | weights


def plain_swiglu(setting: Setting, gate_up: Tensor, weight: Tensor, bias: Tensor) -> Result:
    gate, up = gate_up.chunk(2, dim=-1)
    return {"h": F.layer_norm(F.silu(gate) * up, weight.shape, weight, bias, setting.config.norm_eps)}


def our_swiglu(setting: Setting, inputs: Result) -> Result:
    return {"h": swiglu_norm(**inputs, eps=setting.config.norm_eps).h}


def our_swiglu_backward(setting: Setting, inputs: Result, d: Result) -> Run:
    kept = swiglu_norm(**inputs, eps=setting.config.norm_eps)
    return lambda: named(swiglu_norm_backward(d["h"], mean=kept.mean, rstd=kept.rstd, **inputs))


def gelu_inputs(setting: Setting, random: Random) -> Result:
    return {"fc1": tokens_of(setting, random, setting.config.hidden)}


def plain_gelu(setting: Setting, fc1: Tensor) -> Result:
    return {"h": F.gelu(fc1)}


def patchify_inputs(setting: Setting, random: Random) -> Result:
    statistics = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    tables = {name: torch.tensor(values, device=setting.device) for name, values in statistics.items()}
    return {"images": random.images(setting)} | tables


def plain_patchify(setting: Setting, images: Tensor, image_mean: Tensor, image_std: Tensor) -> Result:
    grid, side = setting.config.grid, setting.config.patch_size
    pixels = images.to(torch.promote_types(setting.dtype, torch.float32))
    normalised = (pixels / 255 - image_mean) / image_std  # [b, H, W, 3]
    patches = normalised.unflatten(2, (grid, side)).unflatten(1, (grid, side))  # [b, grid, side, grid, side, 3]
    return {"patches": patches.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2).to(setting.dtype)}


def our_patchify(setting: Setting, inputs: Result) -> Result:
    side = setting.config.patch_size
    return {"patches": patchify(inputs["images"], side, mean=IMAGE_MEAN, std=IMAGE_STD, dtype=setting.dtype)}


def qkv_inputs(setting: Setting, random: Random) -> Result:
    config = setting.config
    shape = (setting.micro_batch, config.tokens, 3, config.heads, config.head_dim)
    table = {} if config.rotary_grid is None else {"rope": rotary_table(config).to(setting.device)}
    return {"qkv": random.normal(*shape)} | table


def plain_attention(setting: Setting, qkv: Tensor, rope: Tensor | None = None) -> Result:
    query_key, value = qkv.split((2, 1), dim=2)
    if rope is not None:
        query_key = turned(query_key, rope)
    query, key, value = (x.transpose(1, 2) for x in (*query_key.unbind(2), value.squeeze(2)))  # [b, heads, T, head_dim]
    return {"out": F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)}


def turned(x: Tensor, rope: Tensor) -> Tensor:
    """Apply RoPE in the form that is fastest: torch.compile does not fuse complex products, without it they are."""
    if not torch.compiler.is_compiling():
        return rotate(x, rope)
    cosine, sine = rope[:, None, None].unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(x.dtype)


def our_attention(setting: Setting, inputs: Result) -> Result:
    return {"out": attention(inputs["qkv"], inputs.get("rope"))[0]}


def our_attention_backward(setting: Setting, inputs: Result, d: Result) -> Run:
    qkv, rope = inputs["qkv"], inputs.get("rope")
    out, lse = attention(qkv, rope)
    return lambda: {"d_qkv": attention_backward(d["out"], qkv, rope, out, lse)[0]}


def separate_inputs(setting: Setting, random: Random) -> Result:
    """Return queries, keys and values [b, T, heads, head_dim], all views of one tensor, and that tensor."""
    packed = qkv_inputs(setting, random)["qkv"]
    return {"packed": packed} | dict(zip(("query", "key", "value"), packed.unbind(2), strict=True))


def plain_separate(query: Tensor, key: Tensor, value: Tensor, packed: Tensor) -> Result:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [b, heads, T, head_dim]
    return {"out": F.scaled_dot_product_attention(query, key, value).transpose(1, 2)}


def our_separate(setting: Setting, inputs: Result) -> Result:
    return {"out": attention(inputs["packed"], None)[0].unflatten(-1, (setting.config.heads, -1))}


def our_separate_backward(setting: Setting, inputs: Result, d: Result) -> Run:
    packed, d_out = inputs["packed"], d["out"].flatten(2)
    out, lse = attention(packed, None)

    def run() -> Result:
        d_packed, _ = attention_backward(d_out, packed, None, out, lse)
        return dict(zip(("d_query", "d_key", "d_value"), d_packed.unbind(2), strict=True))

    return run


def sdpa_library(device: torch.device, backend: SDPBackend) -> Plain:
    if device.type == "cpu":
        raise Unavailable("the kernels of scaled_dot_product_attention are compared on a GPU only")

    def run(query: Tensor, key: Tensor, value: Tensor, packed: Tensor) -> Result:
        with sdpa_kernel(backend):
            return plain_separate(query, key, value, packed)

    return run


def flash_library(device: torch.device, package: str, module: str) -> Plain:
    if device.type == "cpu":
        raise Unavailable(f"{package} needs a GPU")
    try:
        function = importlib.import_module(module).flash_attn_func
    except ImportError:
        raise Unavailable(f"{package} is not installed") from None

    def run(query: Tensor, key: Tensor, value: Tensor, packed: Tensor) -> Result:
        out = function(query, key, value)
        return {"out": out[0] if isinstance(out, tuple) else out}

    return run


def latent_pool_inputs(setting: Setting, random: Random) -> Result:
    absorbed = random.normal(setting.config.heads, setting.config.width, std=0.05)
    return {"tokens": tokens_of(setting, random, setting.config.width), "absorbed": absorbed}


def plain_latent_pool(setting: Setting, tokens: Tensor, absorbed: Tensor) -> Result:
    scores = tokens @ absorbed.mT  # [b, T, heads]
    weights = scores.softmax(1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(tokens.dtype)
    return {"pooled": weights.mT @ tokens, "first": tokens[:, 0].clone()}


def our_latent_pool(setting: Setting, inputs: Result) -> Result:
    pooled, first, *_ = latent_pool(**inputs)
    return {"pooled": pooled, "first": first}


def our_latent_pool_backward(setting: Setting, inputs: Result, d: Result) -> Run:
    kept, absorbed = latent_pool(**inputs), inputs["absorbed"]

    def run() -> Result:
        gradients = latent_pool_backward(d["pooled"], d["first"], kept.rounded, absorbed, kept.pooled, kept.lse)
        return dict(zip(("d_tokens", "d_absorbed"), gradients, strict=True))

    return run


def attention_libraries(device: torch.device) -> dict[str, Callable[[], Plain]]:
    return {
        "sdpa_cudnn": partial(sdpa_library, device, SDPBackend.CUDNN_ATTENTION),
        "sdpa_flash": partial(sdpa_library, device, SDPBackend.FLASH_ATTENTION),
        "flash_attn": partial(flash_library, device, "flash-attn", "flash_attn"),
        "flash_attn_4": partial(flash_library, device, "flash-attn-4", "flash_attn.cute.interface"),
    }


KERNELS = {
    "add_norm": Kernel(
        add_norm_inputs,
        ("x", "branch"),
        plain_add_norm,
        our_add_norm,
        traffic=lambda setting: 4 * setting.token_bytes,
        backward=Backward(
            ("x", "branch", "branch_bias", "weight", "bias"),
            our_add_norm_backward,
            traffic=lambda setting: 4 * setting.token_bytes,
        ),
    ),
    "swiglu_norm": Kernel(
        swiglu_inputs,
        ("gate_up",),
        plain_swiglu,
        our_swiglu,
        traffic=lambda setting: 3 * setting.hidden_bytes,
        backward=Backward(
            ("gate_up", "weight", "bias"),
            our_swiglu_backward,
            traffic=lambda setting: 6 * setting.hidden_bytes,
        ),
    ),
    "gelu": Kernel(
        gelu_inputs,
        ("fc1",),
        plain_gelu,
        lambda setting, inputs: {"h": gelu(**inputs)},
        traffic=lambda setting: 2 * setting.hidden_bytes,
        backward=Backward(
            ("fc1",),
            lambda setting, inputs, d: lambda: named(gelu_backward(d["h"], **inputs)),
            traffic=lambda setting: 4 * setting.hidden_bytes,
        ),
    ),
    "patchify": Kernel(
        patchify_inputs,
        ("images",),
        plain_patchify,
        our_patchify,
        traffic=lambda setting: setting.micro_batch * 3 * setting.config.image_size**2 * (1 + setting.dtype.itemsize),
    ),
    "attention": Kernel(
        qkv_inputs,
        ("qkv",),
        plain_attention,
        our_attention,
        traffic=lambda setting: 4 * setting.token_bytes,
        operations=lambda setting: 2 * setting.attention_operations,
        backward=Backward(
            ("qkv",),
            our_attention_backward,
            traffic=lambda setting: 8 * setting.token_bytes,
            operations=lambda setting: 5 * setting.attention_operations,
        ),
    ),
    "attention_without_rope": Kernel(
        separate_inputs,
        ("query", "key", "value", "packed"),
        lambda setting, **inputs: plain_separate(**inputs),
        our_separate,
        traffic=lambda setting: 4 * setting.token_bytes,
        operations=lambda setting: 2 * setting.attention_operations,
        backward=Backward(
            ("query", "key", "value"),
            our_separate_backward,
            traffic=lambda setting: 8 * setting.token_bytes,
            operations=lambda setting: 5 * setting.attention_operations,
        ),
        libraries=attention_libraries,
    ),
    "latent_pool": Kernel(
        latent_pool_inputs,
        ("tokens",),
        plain_latent_pool,
        our_latent_pool,
        traffic=lambda setting: setting.token_bytes * (1 + setting.config.heads / setting.config.tokens),
        operations=lambda setting: 2 * setting.pooling_operations,
        backward=Backward(
            ("tokens", "absorbed"),
            our_latent_pool_backward,
            traffic=lambda setting: 2 * setting.token_bytes * (1 + setting.config.heads / setting.config.tokens),
            operations=lambda setting: 5 * setting.pooling_operations,
        ),
    ),
}
