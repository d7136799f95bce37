"""U-Net over three planes with cross-attention between them (figure 2 of the paper; algorithm.md section 4).

Every layer takes a *state*, a list of tensors: one with all three planes if they have one size, else one per plane. In a single
tensor planes are stacked along the channels with independent weights (grouped convolutions), and along the batch with shared
weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tcam_diff.autodecoder.planes import PLANE_AXES, PLANE_NAMES
from tcam_diff.diffusion.config import NetworkConfig
from tcam_diff.diffusion.dct import octaves_of, transform_planes

State = list[Tensor]
Weights = Literal["independent", "shared", "concatenated"]


class Conv(nn.Module):
    """Convolution of each plane, with independent or shared weights."""

    def __init__(self, cin: int, cout: int, kernel: int, weights: Weights, stride: int = 1, zero: bool = False) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        self.copies = copies = 3 if weights == "independent" else 1
        self.weight = nn.Parameter(torch.empty(copies * cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(copies * cout))
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, state: State) -> State:
        if len(state) == 1:
            return [F.conv2d(state[0], self.weight, self.bias, self.stride, self.padding, groups=self.copies)]
        weights, biases = _per_plane(self.weight, self.copies), _per_plane(self.bias, self.copies)
        return [F.conv2d(x, w, b, self.stride, self.padding) for x, w, b in zip(state, weights, biases, strict=True)]


def groups_of(channels: int, most: int) -> int:
    """Groups of a normalisation: the largest number up to ``most`` that divides the channels."""
    return next(g for g in range(min(most, channels), 0, -1) if channels % g == 0)


class Norm(nn.Module):
    """Group normalisation of each plane, with :func:`groups_of` groups."""

    def __init__(self, channels: int, groups: int, weights: Weights) -> None:
        super().__init__()
        self.groups = groups_of(channels, groups)
        self.copies = 3 if weights == "independent" else 1
        self.weight = nn.Parameter(torch.ones(self.copies * channels))
        self.bias = nn.Parameter(torch.zeros(self.copies * channels))

    def forward(self, state: State) -> State:
        if len(state) == 1:
            return [F.group_norm(state[0], self.groups * self.copies, self.weight, self.bias)]
        weights, biases = _per_plane(self.weight, self.copies), _per_plane(self.bias, self.copies)
        return [F.group_norm(x, self.groups, w, b) for x, w, b in zip(state, weights, biases, strict=True)]


class ResidualBlock(nn.Module):
    """Residual block x + conv(dropout(SiLU(norm(conv(SiLU(norm(x))) + time)))), with the last convolution initially zero."""

    def __init__(self, cin: int, cout: int, time: int, config: NetworkConfig) -> None:
        super().__init__()
        w = config.weights
        self.copies = 3 if w == "independent" else 1
        self.norm1, self.conv1 = Norm(cin, config.norm_groups, w), Conv(cin, cout, 3, w)
        self.time = nn.Linear(time, self.copies * cout)
        self.norm2, self.conv2 = Norm(cout, config.norm_groups, w), Conv(cout, cout, 3, w, zero=True)
        self.dropout = nn.Dropout(config.dropout)
        self.skip = Conv(cin, cout, 1, w) if cin != cout else None

    def forward(self, state: State, time: State) -> State:
        shifts = [self.time(F.silu(t)) for t in time]
        if self.copies == 3 and len(state) == 3:
            shifts = list(shifts[0].chunk(3, 1))
        h = self.conv1([F.silu(x) for x in self.norm1(state)])
        h = [x + s[:, :, None, None] for x, s in zip(h, shifts, strict=True)]
        h = self.conv2([self.dropout(F.silu(x)) for x in self.norm2(h)])
        return _add(self.skip(state) if self.skip is not None else state, h)


class TriplaneAttention(nn.Module):
    """Self-attention of every plane, then cross-attention from each plane to the other two.

    With ``cross="full"`` a softmax runs over all texels of both planes. With "axis" it runs over the line of the same
    coordinate in each of them, and the two results are added. With "none" there is only self-attention. All planes are updated
    simultaneously. Positional codes use a third of the channels for each of x, y, z, so that planes agree on shared axes.
    """

    def __init__(self, channels: int, config: NetworkConfig) -> None:
        super().__init__()
        w, groups = config.weights, config.norm_groups
        most = max(1, channels // config.head_channels)
        self.heads = next(h for h in range(most, 0, -1) if channels % h == 0)
        self.channels, self.position = channels, config.position
        self.cross = "none" if w == "concatenated" else config.cross
        self.planes = 1 if w == "concatenated" else 3
        self.batched = w == "shared"
        self.norm1, self.qkv1 = Norm(channels, groups, w), Conv(channels, 3 * channels, 1, w)
        self.out1 = Conv(channels, channels, 1, w, zero=True)
        if self.cross != "none":
            self.norm2, self.q2 = Norm(channels, groups, w), Conv(channels, channels, 1, w)
            self.kv2, self.out2 = Conv(channels, 2 * channels, 1, w), Conv(channels, channels, 1, w, zero=True)

    def forward(self, state: State) -> State:
        attended = [_attend(q, k, v) for q, k, v in self._heads(self.qkv1(self._with_positions(self.norm1(state))), 3)]
        state = _add(state, self.out1(self._images(attended, state)))
        if self.cross == "none":
            return state
        positioned = self._with_positions(self.norm2(state))
        queries = [q for (q,) in self._heads(self.q2(positioned), 1)]
        sources = self._heads(self.kv2(positioned), 2)
        if self.cross == "axis":
            attended = self._lines(queries, sources, state)
        elif len(state) == 1:
            k, v = (torch.cat([t.roll(-1, 0), t.roll(-2, 0)], 3) for t in sources[0])
            attended = [_attend(queries[0], k, v)]
        else:
            attended = []
            for p, q in enumerate(queries):
                a, b = sources[(p + 1) % 3], sources[(p + 2) % 3]
                attended.append(_attend(q, torch.cat([a[0], b[0]], 3), torch.cat([a[1], b[1]], 3)))
        return _add(state, self.out2(self._images(attended, state)))

    def _with_positions(self, state: State) -> State:
        """Add the positional codes of the texels."""
        if self.position == "none":
            return state
        encode = _positions.__wrapped__ if torch.compiler.is_compiling() else _positions  # Dynamo cannot trace lru_cache
        encoded = []
        for i, x in enumerate(state):
            planes = range(self.planes) if len(state) == 1 else [i]
            h, w = x.shape[2:]
            codes = torch.stack([encode(self.channels, p, h, w, x.device) for p in planes]).to(x.dtype)
            if self.batched:
                encoded.append((x.unflatten(0, (len(planes), -1)) + codes[:, None]).flatten(0, 1))
            else:
                encoded.append(x + codes.flatten(0, 1))
        return encoded

    def _heads(self, state: State, parts: int) -> list[tuple[Tensor, ...]]:
        """Split each tensor into ``parts`` tensors (planes, B, heads, N, d), with N texels row by row."""
        split = []
        for x in state:
            planes = self.planes if len(state) == 1 else 1
            tokens = x.flatten(2).transpose(1, 2)  # (.., N, ..)
            shape = (parts, self.heads, self.channels // self.heads)
            if self.batched:
                tokens = tokens.unflatten(2, shape).unflatten(0, (planes, -1))  # planes, B, N, parts, heads, d
            else:
                tokens = tokens.unflatten(2, (planes, *shape)).movedim(2, 0)
            split.append(tokens.transpose(2, 4).unbind(3))  # planes, B, heads, parts, N, d
        return split

    def _images(self, tokens: list[Tensor], like: State) -> State:
        """Tensors (planes, B, heads, N, d) in the layout of ``like``."""
        images = []
        for t, x in zip(tokens, like, strict=True):
            t = t.permute(0, 1, 3, 2, 4).flatten(3)  # planes, B, N, C
            t = t.flatten(0, 1) if self.batched else t.permute(1, 2, 0, 3).flatten(2)
            images.append(t.unflatten(1, tuple(x.shape[2:])).permute(0, 3, 1, 2))
        return images

    def _lines(self, queries: list[Tensor], sources: list[tuple[Tensor, ...]], state: State) -> list[Tensor]:
        """Attention from each texel to the lines of the other two planes with the texel's coordinate on the shared axis."""
        fused = len(state) == 1
        sizes = [tuple(x.shape[2:]) for x in state] * (3 if fused else 1)
        q = [queries[0][p] if fused else queries[p][0] for p in range(3)]  # (B, heads, N, d)
        kv = [[part[p] if fused else part[0] for part in sources[0 if fused else p]] for p in range(3)]
        sums = []
        for p in range(3):
            total: Tensor | None = None
            for o in ((p + 1) % 3, (p + 2) % 3):
                axis = next(a for a in PLANE_AXES[p] if a in PLANE_AXES[o])
                along, across = PLANE_AXES[p].index(axis), PLANE_AXES[o].index(axis)
                k, v = (_by_line(t, sizes[o], across) for t in kv[o])
                read = _softmax(_by_line(q[p], sizes[p], along), k, v)  # (B S, heads, L, d)
                read = read.unflatten(0, (-1, sizes[p][along])).transpose(1, 2)  # (B, heads, S, L, d)
                read = (read if along == 0 else read.transpose(2, 3)).flatten(2, 3)
                total = read if total is None else total + read
            assert total is not None
            sums.append(total)
        return [torch.stack(sums)] if fused else [s.unsqueeze(0) for s in sums]


class Level(nn.Module):
    """Residual block with optional attention and upsampling."""

    def __init__(self, cin: int, cout: int, time: int, config: NetworkConfig, attention: bool, upsample: bool = False) -> None:
        super().__init__()
        self.block = ResidualBlock(cin, cout, time, config)
        self.attention = TriplaneAttention(cout, config) if attention else None
        self.upsample = Conv(cout, cout, 3, config.weights) if upsample else None

    def forward(self, state: State, time: State) -> State:
        state = self.block(state, time)
        if self.attention is not None:
            state = self.attention(state)
        if self.upsample is not None:
            state = self.upsample([F.interpolate(x, scale_factor=2, mode="nearest") for x in state])
        return state


class OctaveGains(nn.Module):
    """Gains of the heads by channel and octave of spatial frequency: T' g(t) T x for the cosine transform T of each plane.

    The gains are g = 1 + linear(SiLU(time)), initially 1. What can be estimated of a plane depends on frequency and time: near
    the noise nothing of the upper octaves, near the planes nothing of the lower ones that x does not say already. Convolutions
    of 3 x 3 texels learn such filters slowly, and what they let through is noise, which gives samples too much energy. The
    octaves are those of :func:`~tcam_diff.diffusion.dct.octaves_of`. The paper has no such gains.
    """

    #: Octaves of planes of 512 texels. Those beyond have the gain of the last one.
    OCTAVES = 10

    def __init__(self, channels: int, time: int, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.linear = nn.Linear(time, copies * channels * self.OCTAVES)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, state: State, time: State) -> State:
        with torch.autocast(state[0].device.type, enabled=False):
            weight, bias = self.linear.weight, self.linear.bias
            changes = [F.linear(F.silu(t.to(weight)), weight, bias).unflatten(1, (-1, self.OCTAVES)) for t in time]
            if self.copies == 3 and len(state) == 3:
                changes = list(changes[0].chunk(3, 1))
            states = []
            for x, change in zip(state, changes, strict=True):
                rows, columns = x.shape[2:]
                memberships = _octaves.__wrapped__ if torch.compiler.is_compiling() else _octaves
                spread = change @ memberships(self.OCTAVES, rows, columns, weight.dtype, x.device)
                x = x.to(weight)
                states.append(x + transform_planes(transform_planes(x) * spread.view_as(x), inverse=True))
        return states


class TriplaneUNet(nn.Module):
    """Network that estimates noise and planes from noisy planes, (x_eta, t) -> (eps, x0) (equation 9).

    Args:
        channels: channels C of the planes.
        config: architecture; default: ``NetworkConfig()``.
        classes: number of classes; 0: no labels. Index ``classes`` means no label.
        numbers: count of a volume's numbers, such as voxel sizes, on which the estimates depend; 0: none.
    """

    def __init__(self, channels: int, config: NetworkConfig | None = None, classes: int = 0, numbers: int = 0) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        self.channels, self.classes = channels, classes
        w, base, levels = config.weights, config.base, config.multipliers
        across = 3 if w == "concatenated" else 1
        time = 4 * base
        self.time = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        self.plane = nn.Embedding(3, time) if w == "shared" else None
        self.label = nn.Embedding(classes + 1, time) if classes else None
        self.numbers = nn.Sequential(nn.Linear(numbers, time), nn.SiLU(), nn.Linear(time, time)) if numbers else None
        self.enter = Conv(across * channels * (2 if config.prior_input else 1), base, 3, w)

        self.down = nn.ModuleList()
        skips, c = [base], base
        for i, m in enumerate(levels):
            for _ in range(config.blocks):
                self.down.append(Level(c, base * m, time, config, i in config.attention_levels))
                c = base * m
                skips.append(c)
            if i < len(levels) - 1:
                self.down.append(Conv(c, c, 3, w, stride=2))
                skips.append(c)
        self.middle = nn.ModuleList([Level(c, c, time, config, True), ResidualBlock(c, c, time, config)])
        self.up = nn.ModuleList()
        for i, m in reversed(list(enumerate(levels))):
            for j in range(config.blocks + 1):
                last = i > 0 and j == config.blocks
                self.up.append(Level(c + skips.pop(), base * m, time, config, i in config.attention_levels, upsample=last))
                c = base * m
        heads = 2 if config.heads == "two" else 1
        self.norm, self.leave = Norm(c, config.norm_groups, w), Conv(c, across * heads * channels, 3, w, zero=True)
        copies = 3 if w == "independent" else 1
        self.gains = OctaveGains(across * heads * channels, time, copies) if config.octave_gains else None

    def convolutions(self) -> list[nn.Parameter]:
        """Weights of the convolutions, those of three planes along the first dimension if they are independent."""
        return [m.weight for m in self.modules() if isinstance(m, Conv)]

    def placed(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TriplaneUNet:
        """Move to a device in its fastest layout: channels last on GPUs, channels first on CPUs."""
        self.to(device, dtype)
        return self.to(memory_format=torch.channels_last) if device.type == "cuda" else self

    def forward(
        self,
        planes: Sequence[Tensor],
        t: Tensor,
        labels: Tensor | None = None,
        numbers: Tensor | None = None,
        denoised: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Estimate noise and planes.

        Args:
            planes: xy, yz, xz, (B, C, rows, columns), with rows and columns multiples of 2^(levels - 1).
            t: timesteps (B,) in [0, 1000].
            labels: (B,), 0 to ``classes`` - 1, or ``classes`` for no label; None: no labels.
            numbers: (B, numbers), of a network that takes them.
            denoised: the prior's estimates of the planes, for a network with ``prior_input``.

        Returns:
            Noise and planes, each like ``planes``; with one head, the same tensors twice.

        Raises:
            ValueError: the shapes do not fit the network.
        """
        self.check([tuple(p.shape[1:]) for p in planes])
        e = self.time(_sinusoids(t, self.config.base).to(self.enter.weight.dtype))
        if self.label is not None:
            e = e + self.label(torch.full(t.shape, self.classes, device=t.device) if labels is None else labels)
        if self.numbers is not None:
            if numbers is None:
                raise ValueError("numbers: expected those of each volume, which this network takes; got None")
            e = e + self.numbers(numbers.to(e))
        if self.config.prior_input:
            if denoised is None:
                raise ValueError("denoised: expected the prior's estimates of the planes, which this network takes; got None")
            state = self._enter([torch.cat([p, d.to(p)], 1) for p, d in zip(planes, denoised, strict=True)])
        else:
            state = self._enter(planes)
        if self.plane is None:
            time = [e]
        else:
            time = [e + self.plane.weight[p] for p in range(3)]
            time = [torch.cat(time)] if len(state) == 1 else time
        state = self.enter(state)
        kept = [state]
        for layer in self.down:
            state = layer(state) if isinstance(layer, Conv) else self._run(layer, state, time)
            kept.append(state)
        for layer in self.middle:
            state = self._run(layer, state, time)
        for layer in self.up:
            state = self._run(layer, self._join(state, kept.pop()), time)
        state = self.leave([F.silu(x) for x in self.norm(state)])
        return self._leave(state if self.gains is None else self.gains(state, time), planes)

    def _run(self, layer: nn.Module, state: State, time: State) -> State:
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            result: State = checkpoint(layer, state, time, use_reentrant=False)
            return result
        result = layer(state, time)
        return result

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise ValueError if planes of these shapes, each (C, rows, columns), do not fit the network."""
        for name, shape in zip(PLANE_NAMES, shapes, strict=True):
            if len(shape) != 3 or shape[0] != self.channels:
                raise ValueError(f"planes: expected {name} of {self.channels} channels, rows and columns, got {shape}")
        if problem := self.config.refusal([(rows, columns) for _, rows, columns in shapes]):
            raise ValueError(f"planes: {problem}")

    def _enter(self, planes: Sequence[Tensor]) -> State:
        w = self.config.weights
        if w != "concatenated" and (self.config.execution == "loop" or len({p.shape for p in planes}) > 1):
            return list(planes)
        return [torch.cat(list(planes), 0 if w == "shared" else 1)]

    def _leave(self, state: State, planes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if len(state) == 1:
            state = list(state[0].chunk(3, 0 if self.config.weights == "shared" else 1))
        if self.config.heads == "one":
            return state, state
        halves = [x.chunk(2, 1) for x in state]
        return [h[0] for h in halves], [h[1] for h in halves]

    def _join(self, a: State, b: State) -> State:
        """Concatenate the channels of two states, plane by plane."""
        if len(a) == 1 and self.config.weights == "independent":
            pair = [x.unflatten(1, (3, -1)) for x in (a[0], b[0])]
            return [torch.cat(pair, 2).flatten(1, 2)]
        return [torch.cat([x, y], 1) for x, y in zip(a, b, strict=True)]


def _add(a: State, b: State) -> State:
    return [x + y for x, y in zip(a, b, strict=True)]


def _per_plane(parameter: Tensor, copies: int) -> Sequence[Tensor]:
    """Parameters of the three planes, from three copies or a shared one."""
    return parameter.chunk(3) if copies == 3 else [parameter] * 3


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tensors (planes, B, heads, N, d)."""
    return _softmax(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, tuple(q.shape[:2]))


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of tensors (B, heads, N, d).

    Training on CPUs uses float32, because the backward pass in bfloat16 is slow there, five times slower for few keys.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def _by_line(t: Tensor, size: tuple[int, ...], shared: int) -> Tensor:
    """Move the shared axis of S texels into the batch: (B, heads, h w, d) -> (B S, heads, L, d)."""
    t = t.unflatten(2, size)
    t = t if shared == 0 else t.transpose(2, 3)
    return t.transpose(1, 2).flatten(0, 1)


def _sinusoids(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of timesteps (B,) at frequencies from 1 to 1e-4: (B, width)."""
    half = width // 2
    frequency = torch.exp(-math.log(1e4) / max(1, half - 1) * torch.arange(half, device=t.device))
    angle = t.float()[:, None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, width - 2 * half))


@functools.lru_cache(maxsize=32)
def _octaves(count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memberships (count, rows columns) of a plane's coefficients in octaves, 0 or 1; the last has all octaves beyond it.

    A product with this matrix has a fast backward pass, unlike indices.
    """
    octave = octaves_of(rows, columns).clamp(max=count - 1).flatten()
    return F.one_hot(octave, count).T.to(device, dtype)


@functools.lru_cache(maxsize=256)
def _positions(channels: int, plane: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Positional codes (C, rows, columns) of a plane, with a third of the channels for each of x, y, z.

    The thirds of the plane's two axes have sines and cosines of the coordinates, the other one has zeros. Coordinates cover the
    field of view, so codes agree between levels and sizes.
    """
    width = channels // 3 // 2 * 2
    codes = torch.zeros(channels, rows, columns, device=device)
    if width == 0:
        return codes
    frequency = torch.exp(-math.log(1e4) / max(1, width // 2) * torch.arange(width // 2, device=device))
    for axis, n, along in zip(PLANE_AXES[plane], (rows, columns), (1, 2), strict=True):
        angle = frequency[:, None] * ((torch.arange(n, device=device) + 0.5) / n * 64)
        code = torch.cat([angle.sin(), angle.cos()])  # (width, n)
        codes[axis * width : (axis + 1) * width] = code.unsqueeze(2 if along == 1 else 1)
    return codes
