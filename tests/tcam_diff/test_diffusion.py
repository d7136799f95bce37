"""U-Net and diffusion process (algorithm.md sections 2, 4 and 9)."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn, idctn
from tcam_diff.diffusion.config import DiffusionConfig, NetworkConfig
from tcam_diff.diffusion.network import OctaveGains, TriplaneAttention, TriplaneUNet, _add, _attend, _positions
from tcam_diff.diffusion.process import Estimate, decisive, error, flip, mix, pack, timesteps, unpack
from tcam_diff.errors import UserError

import tcam_ext

TINY = {"base": 16, "multipliers": [1, 2], "blocks": 1, "attention_levels": [0, 1], "head_channels": 16, "dropout": 0.0}
SQUARE = [(16, 16)] * 3
OBLONG = [(16, 24), (24, 8), (16, 8)]


def network(channels: int = 6, seed: int = 0, classes: int = 0, **changes) -> TriplaneUNet:
    """Network with random weights also in the layers that are initially zero."""
    torch.manual_seed(seed)
    net = TriplaneUNet(channels, NetworkConfig(**TINY | changes), classes)
    for p in net.parameters():
        if not p.abs().max():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def planes(sizes, channels: int = 6, batch: int = 2, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, h, w, generator=g) for h, w in sizes]


T = torch.tensor([3.5, 700.0])


# ---- the network ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "channels", "millions"),
    [("tiny", 6, 0.60), ("small", 16, 3.84), ("cohort", 8, 4.73), ("brats", 42, 67.4), ("brats-large", 42, 119.7),
     ("pancreas", 42, 71.9), ("colon", 42, 41.5)],
)  # fmt: skip
def test_presets_have_the_designed_parameter_counts(preset, channels, millions):
    config = DiffusionConfig.load(preset)
    with torch.device("meta"):
        net = TriplaneUNet(channels, config.network)
    count = sum(p.numel() for p in net.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if millions > 10 else 0.005)


@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("weights", ["independent", "shared"])
@pytest.mark.parametrize("cross", ["full", "axis", "none"])
def test_output_has_the_shapes_of_the_input(sizes, weights, cross):
    estimates = network(weights=weights, cross=cross)(planes(sizes), T)
    for half in estimates:
        assert [tuple(p.shape) for p in half] == [(2, 6, h, w) for h, w in sizes]


@pytest.mark.parametrize("weights", ["independent", "shared"])
@pytest.mark.parametrize("cross", ["full", "axis", "none"])
def test_grouped_and_looped_execution_agree(weights, cross):
    grouped = network(weights=weights, cross=cross, octave_gains=True).double()
    looped = network(weights=weights, cross=cross, octave_gains=True, execution="loop").double()
    looped.load_state_dict(grouped.state_dict())
    x = [p.double() for p in planes(SQUARE)]
    for a, b in zip(grouped(x, T), looped(x, T), strict=True):
        for p, q in zip(a, b, strict=True):
            assert (p - q).abs().max() < 1e-12


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 20), (12, 3), (1, 1)])
@pytest.mark.parametrize("looped", [False, True])
def test_gains_scale_the_octaves_of_each_channel(rows, columns, looped):
    """Against scipy's transform, with octaves by their definition."""
    torch.manual_seed(0)
    gains = OctaveGains(2, 8, 3).double()
    x, time = torch.randn(2, 6, rows, columns, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    state = list(x.chunk(3, 1)) if looped else [x]
    assert all(torch.equal(a, b) for a, b in zip(gains(state, [time]), state, strict=True))  # before training
    torch.nn.init.normal_(gains.linear.weight)
    torch.nn.init.normal_(gains.linear.bias)
    with torch.no_grad():
        found = torch.cat(gains(state, [time]), 1)
        change = gains.linear(torch.nn.functional.silu(time)).unflatten(1, (6, gains.OCTAVES))
    longest = max(rows, columns)
    for b, k in product(range(2), range(6)):
        coefficients = dctn(x[b, k].numpy(), norm="ortho")
        for i, j in product(range(rows), range(columns)):
            radius = math.hypot(i * longest / rows, j * longest / columns)
            octave = 0 if radius == 0 else 1 + math.floor(math.log2(max(radius, 1)))
            coefficients[i, j] *= 1 + float(change[b, k, octave])
        torch.testing.assert_close(found[b, k], torch.from_numpy(idctn(coefficients, norm="ortho")))


def test_octaves_beyond_the_last_one_have_its_gain():
    gains, x = OctaveGains(1, 4, 1), torch.randn(1, 1, 1, 2000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gains.linear.bias[-1] = -1
        (found,) = gains([x], [torch.zeros(1, 4)])
    before, after = (dctn(t[0, 0].double().numpy(), norm="ortho")[0] for t in (x, found))
    assert abs(after[256:]).max() < 1e-4
    assert abs(after - before)[:256].max() < 1e-4


@pytest.mark.parametrize("cross", ["full", "axis"])
def test_gradients_in_bfloat16_are_near_those_in_float32(cross):
    gradients = []
    for enabled in (False, True):
        net = network(cross=cross, octave_gains=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            halves = net(planes(SQUARE), T)
        sum(p.float().square().mean() for half in halves for p in half).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    exact, rough = gradients
    assert 0 < float((rough - exact).norm()) < 0.05 * float(exact.norm())


@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize(("cross", "dependent"), [("none", False), ("full", True), ("axis", True)])
def test_planes_read_each_other_through_cross_attention_only(sizes, cross, dependent):
    net = network(cross=cross).requires_grad_(False)
    x = planes(sizes)
    before = net(x, T)
    for changed in range(3):
        other = [p if i != changed else p + 1 for i, p in enumerate(x)]
        after = net(other, T)
        for i in range(3):
            moved = max(float((a[i] - b[i]).abs().max()) for a, b in zip(before, after, strict=True))
            assert (moved > 0) == (i == changed or dependent)


def test_concatenated_planes_read_each_other_through_every_layer():
    net = network(weights="concatenated").requires_grad_(False)
    x = planes(SQUARE)
    after = net([x[0], x[1] + 1, x[2]], T)
    assert float((net(x, T)[0][0] - after[0][0]).abs().max()) > 0
    with pytest.raises(ValueError, match="planes of one size"):
        net(planes(OBLONG), T)


@pytest.mark.parametrize("weights", ["independent", "shared", "concatenated"])
def test_heads_begin_at_zero_so_the_loss_begins_at_two(weights):
    torch.manual_seed(0)
    net = TriplaneUNet(6, NetworkConfig(**TINY | {"weights": weights}))
    x0, noise = planes(SQUARE, batch=8, seed=2), planes(SQUARE, batch=8, seed=3)
    t = timesteps("stratified", 8, 0, 0)
    estimates = net([mix(a, b, t) for a, b in zip(x0, noise, strict=True)], t)
    assert float(sum(error(*pair).mean() for pair in zip(estimates, (noise, x0), strict=True)).detach()) == pytest.approx(
        2, abs=0.05
    )


def test_axis_attention_reads_the_line_of_the_shared_coordinate():
    torch.manual_seed(0)
    config = NetworkConfig(**TINY | {"cross": "axis", "position": "none"})
    block = TriplaneAttention(12, config).double().eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    sizes = [(4, 6), (6, 5), (4, 5)]
    x = [p.double() for p in planes(sizes, 12, 1)]
    axes = ("xy", "yz", "xz")
    before = block(x)
    # brute force: every texel of plane p against the texels of the others on its lines
    with torch.no_grad():
        heads = block._heads(block.qkv1(block.norm1(x)), 3)
        state = _add(x, block.out1(block._images([_attend(q, k, v) for q, k, v in heads], x)))
        normed = block.norm2(state)
        q = [t[0][0, 0] for t in block._heads(block.q2(normed), 1)]  # heads, N, d
        kv = [[t[0, 0] for t in pair] for pair in block._heads(block.kv2(normed), 2)]
        for p in range(3):
            want = torch.zeros_like(q[p])
            for o in range(3):
                if o == p:
                    continue
                shared = (set(axes[p]) & set(axes[o])).pop()
                along, across = axes[p].index(shared), axes[o].index(shared)
                for n in range(q[p].shape[1]):
                    at = divmod(n, sizes[p][1])[along]
                    keys = [m for m in range(kv[o][0].shape[1]) if divmod(m, sizes[o][1])[across] == at]
                    k, v = kv[o][0][:, keys], kv[o][1][:, keys]
                    weight = torch.softmax(torch.einsum("hd,hkd->hk", q[p][:, n], k) / k.shape[-1] ** 0.5, 1)
                    want[:, n] += torch.einsum("hk,hkd->hd", weight, v)
            image = want.permute(1, 0, 2).flatten(1).reshape(*sizes[p], -1).permute(2, 0, 1)[None]
            weights = block.out2.weight.chunk(3)[p], block.out2.bias.chunk(3)[p]
            expected = state[p] + torch.nn.functional.conv2d(image, *weights)
            assert (before[p] - expected).abs().max() < 1e-10


def test_positions_agree_on_the_axis_that_planes_share():
    cpu = torch.device("cpu")
    xy, yz, xz = (_positions(24, p, h, w, cpu) for p, (h, w) in enumerate([(4, 6), (6, 5), (4, 5)]))
    assert torch.equal(xy[:8, :, 0], xz[:8, :, 0])  # x
    assert torch.equal(xy[8:16, 0, :], yz[8:16, :, 0])  # y
    assert torch.equal(yz[16:, 0, :], xz[16:, 0, :])  # z
    assert not xy[16:].any()
    assert not yz[:8].any()
    assert not xz[8:16].any()


def test_labels_matter_and_no_label_is_another_label():
    net = network(classes=3)
    x = planes(SQUARE)
    none, explicit, one = (net(x, T, c)[0][0] for c in (None, torch.tensor([3, 3]), torch.tensor([1, 1])))
    assert torch.equal(none, explicit)
    assert not torch.equal(none, one)


def test_checkpointing_changes_memory_not_gradients():
    x = planes(SQUARE)
    gradients = []
    for checkpointing in (False, True):
        net = network(checkpointing=checkpointing).train()
        sum(p.square().sum() for half in net(x, T) for p in half).backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))


def test_compiled_network_agrees():
    net = network()
    x = planes(SQUARE)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for a, b in zip(net(x, T), compiled(x, T), strict=True):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q)
    torch._dynamo.reset()  # otherwise garbage collection fails in the ast module of Python 3.11


@pytest.mark.parametrize(
    ("sizes", "channels", "said"),
    [([(16, 16), (16, 15), (16, 15)], 6, "expected yz"), (SQUARE, 5, "expected xy")],
)
def test_bad_planes_are_refused(sizes, channels, said):
    with pytest.raises(ValueError, match=said):
        network()(planes(sizes, channels), T)


def test_bad_levels_are_refused():
    with pytest.raises(UserError, match="level 4 of 4"):
        DiffusionConfig.load("brats", ["network.attention_levels=[4]"])


# ---- the process ---------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["stratified", "uniform", "integer", "antithetic", "straight", "spectrum"]),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_timesteps_lie_in_their_range(kind, batch, step):
    t = timesteps(kind, batch, 5, step, (0.25, 900.0))
    assert t.shape == (batch,)
    assert float(t.min()) >= 0
    assert float(t.max()) < 1000
    if kind == "stratified":
        assert sorted((t * batch / 1000).floor().int().tolist()) == list(range(batch))
    if kind == "straight":
        tangent = (t.double() * (math.pi / 2000)).tan()
        assert sorted((tangent / (1 + tangent) * batch + 1e-5).floor().int().tolist()) == list(range(batch))
    if kind == "integer":
        assert torch.equal(t, t.round())
    if kind == "spectrum" and batch % 2 == 0:  # half in equal parts of log tan(eta), half in equal parts of t
        low, high = decisive((0.25, 900.0))
        place = ((t.double() * (math.pi / 2000)).tan().log() - low) / (high - low)
        for part in range(batch // 2):
            assert ((place * (batch // 2)).floor() == part).any()
            assert ((t * (batch // 2) / 1000).floor() == part).any()
    if kind == "antithetic" and batch % 2 == 0:
        assert torch.equal(t[: batch // 2] + t[batch // 2 :], torch.full((batch // 2,), 999.0))


def test_mixing_is_undone_by_the_true_estimates():
    x0, noise = planes(SQUARE)[0].double(), planes(SQUARE, seed=9)[0].double()
    for t in (0.0, 123.5, 1000.0):
        eta = t / 1000 * math.pi / 2
        x = mix(x0, noise, torch.tensor([t, t]))
        e = Estimate(x, noise, x0, eta)
        assert e.residual.abs().max() < 1e-12
        ahead = mix(x0, noise, torch.tensor([t + 1e-4] * 2, dtype=torch.float64))
        assert ((ahead - x) / (1e-7 * math.pi / 2) - e.drift).abs().max() < 1e-6


def test_errors_weigh_planes_of_different_sizes_equally():
    x0 = planes(OBLONG)
    zero = [torch.zeros_like(p) for p in x0]
    one_off = [zero[0], zero[1] + 1, zero[2]]
    assert torch.allclose(error(one_off, zero), torch.full((2,), 1 / 3))
    assert torch.allclose(error(one_off, zero, [p + 2 for p in zero]), torch.full((2,), 1 / 12))
    assert not error(zero, zero).any()


def test_packing_is_undone_by_unpacking():
    x = planes(OBLONG)
    for a, b in zip(x, unpack(pack(x), 6, OBLONG), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flipped_planes_decode_to_the_flipped_volume(axis):
    torch.manual_seed(0)
    decoder = tcam_ext.TriplaneDecoder(6, [16, 16], 1)
    x = planes([(8, 6), (6, 5), (8, 5)], batch=1)
    size = (16, 13, 11)
    with torch.no_grad():
        a = decoder(x, size, compute_dtype=torch.float32)
        b = decoder(flip(x, axis), size, compute_dtype=torch.float32)
    torch.testing.assert_close(b, a.flip(axis + 2), rtol=0, atol=1e-6)
