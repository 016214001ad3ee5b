"""SpeechTokenizer's losses against float64 loops, and the balancer's promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.tokenizer.discriminators import (
    Discriminators,
    DiscriminatorsConfig,
    interleaved,
)
from speechlab.tokenizer.losses import (
    GradientBalancer,
    LossWeights,
    MultiScaleMel,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    time_loss,
    total_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore:of 64 mel filters")


def noise(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 4), st.integers(0, 2), st.sampled_from([1, 3, 5]), st.integers(17, 30),
       st.integers(9, 30), st.integers(1, 2))  # fmt: skip
def test_a_dilated_convolution_is_a_plain_one_on_rows_taken_apart(d, pads, kernel, rows, bins, s):
    """Any padding, also one that is no multiple of the dilation; stride on the other axis."""
    for padding in (pads * d, pads):
        conv = torch.nn.Conv2d(2, 4, (kernel, 3), (1, s), (padding, 2), (d, 2), groups=2)
        x = noise(2, 2, rows, bins)
        torch.testing.assert_close(interleaved(conv, x), conv(x))


def mel_by_hand(x: np.ndarray, n_fft: int, n_mels: int) -> np.ndarray:
    """Mel magnitudes in float64: DFT by matrix, triangles from the HTK formula."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    bins = n_fft // 2 + 1
    dft = np.exp(-2j * np.pi * np.outer(np.arange(n_fft), np.arange(bins)) / n_fft)
    padded = np.pad(x, n_fft // 2)
    starts = range(0, len(padded) - n_fft + 1, n_fft // 4)
    frames = np.array([padded[s : s + n_fft] * window for s in starts])
    size = np.abs(frames @ dft) / np.sqrt((window**2).sum())
    mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
    points = 700 * (10 ** (np.linspace(0, mel(8000), n_mels + 2) / 2595) - 1)
    frequencies = np.linspace(0, 8000, bins)
    bank = np.zeros((bins, n_mels))
    for m in range(n_mels):
        low, middle, high = points[m : m + 3]
        rising = (frequencies - low) / (middle - low)
        falling = (high - frequencies) / (high - middle)
        bank[:, m] = np.maximum(0, np.minimum(rising, falling))
    return size @ bank


@pytest.mark.parametrize("log", [True, False])
def test_multi_scale_mel_matches_float64_loops(log):
    """Eq. 4, scale by scale. Empty filters are left out of both norms."""
    wav, rebuilt = noise(2, 1, 5000), noise(2, 1, 5000, seed=1)
    module = MultiScaleMel(16000, log=log, floor=1e-3)
    total = 0.0
    for exponent in range(5, 12):
        pair = [
            np.array([mel_by_hand(row[0].double().numpy(), 2**exponent, 64) for row in x])
            for x in (wav, rebuilt)
        ]
        live = pair[0].sum(axis=(0, 1)) > 0
        if log:
            pair = [np.log10(np.maximum(x, 1e-3)) for x in pair]
        difference = (pair[0] - pair[1])[..., live]
        total += np.abs(difference).mean() + math.sqrt((difference**2).mean())
    assert float(module(wav, rebuilt)) == pytest.approx(total, rel=1e-4)


def test_empty_filters_are_dropped_and_reported():
    with pytest.warns(UserWarning, match="at 32") as caught:
        module = MultiScaleMel(16000)
    for n_fft, count in module.dropped.items():
        assert getattr(module, f"bank_{n_fft}").shape[1] == 64 - count
        assert f"{count} at {n_fft}" in str(caught[0].message)
    assert 1024 not in module.dropped
    assert all((getattr(module, f"bank_{s.n_fft}").sum(0) > 0).all() for s in module.scales)


def test_mel_loss_has_finite_gradients_in_silence():
    rebuilt = torch.zeros(1, 1, 4000, requires_grad=True)
    MultiScaleMel(16000, log=False)(noise(1, 1, 4000), rebuilt).backward()
    assert torch.isfinite(rebuilt.grad).all()


def test_time_loss_is_the_mean_absolute_difference():
    wav, rebuilt = noise(2, 1, 50), noise(2, 1, 50, seed=1)
    slow = sum(abs(float(a) - float(b)) for a, b in zip(wav.flatten(), rebuilt.flatten())) / 100
    assert float(time_loss(wav, rebuilt)) == pytest.approx(slow, rel=1e-5)


def test_hinge_losses_match_float64_loops():
    """Eq. 5 for K = 3 critics with maps of different sizes."""
    real, fake = [[2 * noise(2, n, seed=s + n) for n in (5, 9, 1)] for s in (0, 50)]
    critic = generator = 0.0
    for r, f in zip(real, fake):
        critic += sum(max(1 - float(v), 0) for v in r.flatten()) / r.numel() / 3
        critic += sum(max(1 + float(v), 0) for v in f.flatten()) / f.numel() / 3
        generator += sum(max(1 - float(v), 0) for v in f.flatten()) / f.numel() / 3
    assert float(discriminator_loss(real, fake)) == pytest.approx(critic, rel=1e-5)
    assert float(adversarial_loss(fake)) == pytest.approx(generator, rel=1e-5)
    with pytest.raises(ValueError, match="kind is 'wgan'"):
        adversarial_loss(fake, "wgan")


def test_feature_loss_matches_float64_loops():
    """Eq. 6."""
    real, fake = [
        [[noise(2, 3, 4, seed=s), noise(2, 7, seed=s + 1)], [noise(2, 5, seed=s + 2)]]
        for s in (0, 10)
    ]
    total, count = 0.0, 0
    for maps_real, maps_fake in zip(real, fake):
        for one, two in zip(maps_real, maps_fake):
            a, b = one.double().numpy(), two.double().numpy()
            total, count = total + np.abs(a - b).mean() / np.abs(a).mean(), count + 1
    assert float(feature_loss(real, fake)) == pytest.approx(total / count, rel=1e-5)
    leaf = real[0][0].requires_grad_(True)
    loss = feature_loss(real, [[2 * leaf.detach(), fake[0][1]], fake[1]])
    assert not loss.requires_grad  # nothing flows into the recordings' side


@given(
    values=st.lists(st.floats(0, 10), min_size=6, max_size=6),
    weights=st.lists(st.floats(0, 100), min_size=6, max_size=6),
)
def test_total_is_the_weighted_sum(values, weights):
    """Eq. 8."""
    names = ("time", "mel", "adversarial", "feature", "commit", "distill")
    terms = {n: torch.tensor(v, dtype=torch.double) for n, v in zip(names, values)}
    found = total_loss(terms, LossWeights(**dict(zip(names, weights))))
    assert float(found) == pytest.approx(sum(v * w for v, w in zip(values, weights)), abs=1e-9)


def test_unknown_terms_and_weights_are_refused():
    with pytest.raises(ValueError, match="mell"):
        total_loss({"mell": torch.tensor(1.0)})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mel is"):
            LossWeights(mel=bad)


@given(scale=st.floats(1e-4, 1e4), share=st.floats(0.1, 10))
def test_balancer_ignores_units_and_keeps_shares(scale, share):
    """With orthogonal gradients, each loss's part of the result is its share, in any unit."""
    output = noise(3, 1, 40).requires_grad_(True)
    losses = {"a": scale * output[..., :20].sum(), "b": output[..., 20:].square().sum()}
    balanced = GradientBalancer({"a": share, "b": 1.0})(losses, output)
    (gradient,) = torch.autograd.grad(balanced, output)
    sizes = [gradient[..., part].flatten(1).norm(dim=1).mean() for part in
             (slice(0, 20), slice(20, 40))]  # fmt: skip
    assert float(sizes[0] / sizes[1]) == pytest.approx(share, rel=1e-3)
    assert float(sum(sizes)) * 3 == pytest.approx(1.0, rel=1e-3)  # the mean over three signals


def test_balancer_averages_over_steps():
    balancer = GradientBalancer({"a": 1.0}, decay=0.5)
    sizes = []
    for factor in (1.0, 3.0):
        output = torch.ones(1, 1, 4, requires_grad=True)
        (g,) = torch.autograd.grad(balancer({"a": factor * output.sum()}, output), output)
        sizes.append(float(g.norm()))
    # gradients of norm 2 and 6; averages 2 and (1 + 6) / 1.5
    assert sizes == pytest.approx([1.0, 6 / (7 / 1.5)], rel=1e-5)


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": -1.0}])
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="shares is"):
        GradientBalancer(shares)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: time_loss(torch.zeros(1, 9), torch.zeros(1, 9)), "wav is"),
        (lambda: time_loss(torch.zeros(1, 1, 9), torch.zeros(1, 1, 8)), "equal and not empty"),
        (lambda: time_loss(torch.zeros(1, 1, 0), torch.zeros(1, 1, 0)), "equal and not empty"),
        (lambda: time_loss(torch.zeros(1, 1, 9).long(), torch.zeros(1, 1, 9)), "wav is"),
        (lambda: MultiScaleMel(16000)(torch.zeros(1, 1, 99), [1]), "rebuilt is"),
        (lambda: MultiScaleMel(16000, floor=0), "floor is 0"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("samples", [4000, 4001, 8123])
def test_critics_give_scores_and_layers(samples):
    critics = Discriminators(
        DiscriminatorsConfig((2, 5), 2, (512, 256), period_width=2, scale_width=8, stft_width=4)
    )
    scores, features = critics(noise(2, 1, samples))
    assert len(scores) == len(features) == 6
    assert all(s.shape[0] == 2 and s.dim() == 2 for s in scores)
    total = sum(s.mean() for s in scores)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critics.parameters())


def test_critics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="all empty"):
        DiscriminatorsConfig((), 0, ())
    with pytest.raises(ValueError, match="wav has 100 samples"):
        Discriminators(DiscriminatorsConfig.small())(noise(1, 1, 100))
