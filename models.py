"""The class-conditional diffusion transformer DiT (arXiv:2212.09748): architecture and table of names, nothing else.

    model = DiT_models["DiT-XL/2"](input_size=32, num_classes=1000)   # 32 latents a side: 256 px images
    out = model(x, t, y)                                              # (B, 8, 32, 32): noise, then variance

Names and shapes of the parameters are those of the published checkpoints. In the shapes below B are images, N tokens,
D the width, p the side of a patch, C the input's channels, H the heads.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CHECKPOINTING = ("none", "full", "selective")
FREQUENCIES = 256  # of the timestep embedding
EPS = 1e-6

# What selective checkpointing keeps: the outputs of matrix products and of attention, which are dear to make again.
_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_products(_context, operation, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def timestep_features(t: Tensor) -> Tensor:
    """Cosines, then sines, of t at frequencies falling from 1 to 1/10000: (B,), also fractional -> (B, 256) fp32."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_table(side: int, width: int) -> Tensor:
    """Fixed positions of side x side patches, row by row: (side * side, width) fp32.

    The first half of the width holds the column, the second the row, each as sines and cosines at width / 4
    frequencies from 1 down to 1/10000 (arXiv:2111.06377).
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, width / 4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns = one_axis[None].expand(side, -1, -1)
    rows = one_axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def normalise(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of each token, then the image's own scale and shift: (B, N, D) with (B, D) and (B, D)."""
    # This kernel computes in fp32 and keeps x's dtype; under autocast `F.layer_norm` leaves fp32 for all that follows.
    normed = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)[0]
    return normed * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Cuts images into p x p patches, one token each."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, D, h/p, w/p) -> (B, N, D)


class TimestepEmbedder(nn.Module):
    """The timestep as a vector."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        weight = next(self.mlp.parameters())
        return self.mlp(timestep_features(t).to(weight.dtype))  # (B,) -> (B, D)


class LabelEmbedder(nn.Module):
    """The class as a vector; the row after the last class is the null class, which guidance moves away from."""

    def __init__(self, num_classes: int, width: int, dropout: float):
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def forward(self, y: Tensor, drop: Tensor | None) -> Tensor:
        if drop is None and self.training and self.dropout > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)  # (B,) -> (B, D)


class Attention(nn.Module):
    """Self-attention of all tokens of an image."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS) if qk_norm else nn.Identity()
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D/H) each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


class Mlp(nn.Module):
    """Two layers on each token."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each with scale, shift and gate regressed from the condition; the identity at first."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.attn = Attention(width, num_heads, qk_norm)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.checkpointing = "none"

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D) with conditions (B, D) -> (B, N, D)."""
        # In here rather than around the block, so that a compiled block has it in its graph.
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, c)
        if self.checkpointing == "full":
            return checkpoint(self.compute, x, c, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(self.compute, x, c, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # pyright: ignore[reportReturnType]

    def compute(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(normalise(x, shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(normalise(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """From tokens to the pixels of their patches."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(normalise(x, shift, scale))  # (B, N, D) -> (B, N, p * p * out channels)


class DiT(nn.Module):
    """Predicts the noise in latents and, with `learn_sigma`, where each variance lies between its two bounds.

    Args:
        input_size: side of the latents, a multiple of `patch_size`; pixels / 8 for the published VAE.
        num_classes: real classes 0 ... num_classes - 1; the null class is num_classes.
        class_dropout_prob: share of labels that training replaces by the null class; with 0 there is none.
        qk_norm: RMSNorm on queries and keys, against overflow in long training in 16 bits; not in published weights.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.input_size, self.patch_size, self.num_classes = input_size, patch_size, num_classes
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = position_table(input_size // patch_size, hidden_size)[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, N, D)
        blocks = [DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """Draw the first weights; every block is the identity, and the output is zero (adaLN-Zero)."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        for weight in (self.y_embedder.embedding_table.weight, *self.t_embedder.parameters()):
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        for part in self.modules():
            if isinstance(part, DiTBlock | FinalLayer):
                for parameter in part.adaLN_modulation.parameters():
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.linear.weight)

    def set_checkpointing(self, mode: str) -> None:
        """What the backward pass computes again: `none`, `full` (each block) or `selective` (all but its products)."""
        if mode not in CHECKPOINTING:
            raise ValueError(f"checkpointing {mode!r} does not exist; choose from {', '.join(CHECKPOINTING)}")
        for block in self.modules():
            if isinstance(block, DiTBlock):
                block.checkpointing = mode

    def set_attention(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Use another function of q, k and v, (B, H, N, D/H) each, that gives the same up to rounding."""
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.attend = attend

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile each block at its first call; one graph serves all of them."""
        for block in self.blocks:
            block.compile(backend=backend)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (B, N, p * p * channels) -> (B, channels, h, w)."""
        side, p = self.input_size // self.patch_size, self.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, rows, columns, p, p, channels)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Noise, and behind it the variances' places in [-1, 1]: (B, 2 * C, h, w), or (B, C, h, w).

        Args:
            x: (B, C, h, w), noisy latents.
            t: (B,), timesteps in [0, 1000).
            y: (B,) int64, classes in [0, num_classes].
            drop: (B,) bool, which labels are replaced by the null class; drawn here by default, in training only.
        """
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        # The sum over all blocks may leave the range of fp16, so that only bf16 has it in 16 bits.
        x = x.to(torch.float32 if x.dtype == torch.float16 else x.dtype) + self.pos_embed.to(x.dtype)  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y, drop)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int = 3) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598): uncond + cfg_scale * (cond - uncond), the same in both halves.

        The published results guide only 3 of the 4 noise channels; what is left keeps each half's own prediction.

        Args:
            x: (2 B, C, h, w), of which the first half is used for both.
            t: (2 B,).
            y: (2 B,), the wanted classes, then null classes.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y).float()
        guided, rest = out[:, :guided_channels], out[:, guided_channels:]
        cond, uncond = guided.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}  # depth, width, heads

DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{size}/{patch_size}": partial(DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch_size)
    for size, (depth, width, heads) in SIZES.items()
    for patch_size in (2, 4, 8)
}
