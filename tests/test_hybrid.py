"""The hybrid GPT: no sample of the future, generation equal to one pass, the study's arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlab.foundations.audio import log_mel
from speechlab.foundations.corpus import embedded_corpus
from speechlab.foundations.sampling import Sampling
from speechlab.foundations.transformer import TransformerConfig
from speechlab.lm.gpt import GPT, Clips, GPTConfig, GPTTraining, generate, likelihood, train_gpt
from speechlab.lm.hybrid import (
    HYBRID_CONFIGS,
    CausalMel,
    DecodedMel,
    HybridConfig,
    HybridGPT,
    clip_mels,
    continue_wav,
    fit_config,
    load_gpt,
    plot_study,
    study_rows,
    study_table,
    training_clips,
)
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer

ROOT = Path(__file__).resolve().parent.parent
BODY = TransformerConfig(32, 2, 4, context=128)
INSIDE = TransformerConfig(16, 1, 2, context=8)
SMALL = HybridConfig(body=BODY, mel=TransformerConfig(16, 1, 2, context=128))
HOP = 320


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.from_pretrained("small-causal").fold()


@pytest.fixture(scope="module")
def corpus():
    return embedded_corpus("smoke").split("test")[:4]


def make(config: HybridConfig = SMALL, seed: int = 0) -> HybridGPT:
    """Random weights, large enough that nothing hides in rounding."""
    torch.manual_seed(seed)
    model = HybridGPT(config).eval()
    for weight in model.parameters():
        weight.data.mul_(4) if weight.dim() > 1 else weight.data.add_(0.3)
    return model


def future_changes(model, framing, frames: int, t: int, seed: int, rest: int = 0) -> float:
    """Largest change of a logit up to token t + 1 when all that follows token t is replaced."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (1, model.config.heard, frames), generator=rng)
    wav = 0.3 * torch.randn(1, 1, frames * HOP - rest, generator=rng).clamp(-3, 3)
    other = wav.clone()
    other[..., HOP * (t + 1) :] = 0.9 * torch.rand(other[..., HOP * (t + 1) :].shape, generator=rng)
    with torch.no_grad():
        one, two = (model(codes, None, framing(w)) for w in (wav, other))
    return float((one - two)[..., : t + 2, :].abs().max())


causal_framings = st.builds(
    CausalMel,
    n_fft=st.sampled_from([320, 512, 1024, 2048]),
    lookahead=st.sampled_from([0, 0, -1, -HOP]),
)


@pytest.mark.filterwarnings("ignore:mel filters")
@settings(max_examples=40, deadline=None)
@given(framing=causal_framings, data=st.data(), seed=st.integers(0, 99), rest=st.integers(0, 319))
def test_no_sample_of_the_future_changes_a_logit(framing, data, seed, rest):
    """THE LEAKAGE TEST: identical bit for bit."""
    frames = data.draw(st.integers(2, 40))
    t = data.draw(st.integers(0, frames - 2))
    assert future_changes(make(), framing, frames, t, seed, rest) == 0


def centred(wav: torch.Tensor) -> torch.Tensor:
    """The usual frames, as most libraries make them."""
    return log_mel(wav, 16000, n_mels=64)[..., : -(-wav.shape[-1] // HOP)]


@pytest.mark.parametrize(
    "framing", [centred, CausalMel(lookahead=HOP), CausalMel(lookahead=64)],
    ids=["centred", "off by one", "four milliseconds"],
)  # fmt: skip
def test_the_leakage_test_fails_where_there_is_a_leak(framing):
    """The same test on framings that reach into the next token: it must not pass."""
    found = [future_changes(make(), framing, 30, t, seed=t) for t in (0, 5, 20)]
    assert min(found) > 1e-3


@given(
    st.integers(1, 6000), st.sampled_from([320, 640, 1024]), st.sampled_from([-320, -7, 0, 7, 320])
)
@settings(max_examples=30, deadline=None)
def test_slices_are_windows_that_end_with_their_token(samples, n_fft, lookahead):
    """Against a loop over windows: slice t covers samples (t + 1) * hop + lookahead - n_fft on."""
    framing = CausalMel(n_fft=n_fft, n_mels=20, lookahead=lookahead)
    wav = 0.1 * torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(samples))
    mel = framing(wav)
    assert mel.shape == (1, 20, -(-samples // HOP))
    for t in range(mel.shape[2]):
        window = torch.zeros(1, 1, n_fft)
        first = (t + 1) * HOP + lookahead - n_fft
        for place in range(n_fft):
            if 0 <= first + place < samples:
                window[..., place] = wav[..., first + place]
        torch.testing.assert_close(mel[..., t], framing.mel(window)[..., 0], rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_slices_in_pieces(sizes):
    framing, frames = CausalMel(), sum(sizes)
    wav = 0.1 * torch.randn(2, 1, frames * HOP)
    parts, past = [], None
    for piece in wav.split([n * HOP for n in sizes], dim=-1):
        found, past = framing.stream(piece, past)
        parts.append(found)
    torch.testing.assert_close(torch.cat(parts, dim=2), framing(wav))


DEPTH = replace(SMALL, levels=8, input_levels=1, pattern="depth", depth=INSIDE, mel_levels=8)
WIDE = replace(SMALL, levels=3)


@pytest.mark.parametrize("config", [SMALL, WIDE, DEPTH], ids=["coarse", "parallel", "depth"])
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_generation_equals_one_pass(config, lengths, seed):
    """Tokens, sound, slice, next token: with a cache, without, and checked by a full pass."""
    tokenizer = SpeechTokenizer.from_pretrained("small-causal").fold()
    model = make(config, seed=1)
    prompts = [torch.randint(256, (config.levels, n)) for n in lengths]
    found = []
    for cached in (True, False):
        found.append(generate(model, prompts, 12, Sampling(0.9, top_k=9), seed, min_frames=12,
                              tokenizer=tokenizer, cached=cached).codes)  # fmt: skip
    assert all(torch.equal(one, two) for one, two in zip(*found))
    rule = Sampling(0)
    greedy = generate(model, prompts, 8, rule, min_frames=8, tokenizer=tokenizer).codes
    framing = CausalMel(**config.framing)
    for prompt, codes in zip(prompts, greedy):
        codes = codes[None]
        with torch.no_grad():
            logits = model(codes, None, framing(tokenizer.decode(codes)))[..., :256]
        new = slice(prompt.shape[1], None)
        chosen = logits[:, :, :-1].gather(-1, codes[..., None])[..., new, :]
        best = logits[:, :, :-1].amax(-1, keepdim=True)[..., new, :]
        assert (best - chosen).max() < 1e-2  # the choice, or a tie in the last digits


def test_a_recorded_prompt_is_heard(tokenizer, corpus):
    model, wav = make(DEPTH), corpus[0].wav[..., : 40 * HOP]
    both = [continue_wav(model, tokenizer, wav, 0.4, Sampling(0), recorded=r, min_frames=20)
            for r in (True, False)]  # fmt: skip
    assert both[0].codes.shape == both[1].codes.shape == (1, 8, 60)
    assert not torch.equal(both[0].codes[..., 40:], both[1].codes[..., 40:])
    assert both[0].wav.shape[-1] == 60 * HOP and both[0].prompt_frames == 40


def test_rows_that_end_do_not_disturb_the_others(tokenizer):
    model = make(DEPTH, seed=2)
    prompts = [torch.randint(256, (8, n)) for n in (6, 3, 9, 1)]
    found = generate(model, prompts, 25, Sampling(2.0), 7, tokenizer=tokenizer)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 25, Sampling(2.0), 7, tokenizer=tokenizer, first_row=row)
        assert torch.equal(alone.codes[0], found.codes[row])
        assert alone.reasons[0] == found.reasons[row]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_other_precisions(kind, tokenizer):
    model, prompt = make(DEPTH).to(kind), torch.randint(256, (1, 8, 5))
    assert model(prompt, None, torch.randn(1, 64, 5)).dtype == kind
    assert generate(model, prompt, 4, tokenizer=tokenizer, min_frames=4).codes[0].shape == (8, 9)


def test_padding_is_not_heard():
    model, codes, mel = make(), torch.randint(256, (2, 1, 9)), torch.randn(2, 64, 9)
    mel[1, :, 5:] = 50.0
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    found, alone = model(codes, mask, mel)[1, :, :6], model(codes[1:, :, :5], None, mel[1:, :, :5])
    torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-4)


def test_mel_statistics_come_from_the_clips():
    mels = [3 + 2 * torch.randn(64, 50) for _ in range(20)]
    clips = Clips([torch.zeros(1, 50).short()] * 20, [str(i) for i in range(20)], mels)
    model = HybridGPT(SMALL).fit_mel(clips)
    assert (model.mel_mean - 3).abs().max() < 0.3 and (model.mel_scale - 2).abs().max() < 0.3


def test_the_mel_is_learned_from(tmp_path):
    """Codes that only the slice before them tells: the hybrid learns them, the GPT cannot."""
    rng = torch.Generator().manual_seed(0)
    codes = [torch.randint(8, (1, 20), generator=rng).short() for _ in range(64)]
    mels = []
    for row in codes:  # slice t holds code t + 1
        mel = torch.zeros(64, 20)
        mel[row[0, 1:].long(), torch.arange(19)] = 1.0
        mels.append(mel)
    clips = Clips(codes, [str(i) for i in range(64)], mels)
    training = GPTTraining(80, 16, 1e-2, 5)
    hybrid = HybridGPT(replace(SMALL, codebook_size=8)).fit_mel(clips)
    hybrid, _ = train_gpt(hybrid, clips, tmp_path / "hybrid", training)
    plain = GPT(GPTConfig(8, body=BODY))
    plain, _ = train_gpt(plain, Clips(codes, clips.ids), tmp_path / "plain", training)
    assert likelihood(hybrid, clips).level()["nll"] < 0.5
    assert likelihood(plain, Clips(codes, clips.ids)).level()["nll"] > 1.5


def test_clip_mels_are_aligned_with_codes(tokenizer, corpus):
    clips, framing = Clips.encode(tokenizer, corpus), CausalMel()
    for options in ((), (tokenizer, 1)):
        mels = clip_mels(corpus, clips, framing, *options)
        assert [m.shape[1] for m in mels] == clips.lengths.tolist()
    wanted = framing(tokenizer.decode(clips.codes[2][:1].long()[None]))[0]
    torch.testing.assert_close(mels[2].float(), wanted, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="other recordings"):
        clip_mels(corpus[1:], clips, framing)


def test_training_clips_find_their_shards(tokenizer, corpus, tmp_path):
    config = fit_config(DEPTH, tokenizer, "small-causal")
    one = training_clips(corpus, tokenizer, config, tmp_path)
    times = [path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")]
    two = training_clips(corpus, tokenizer, replace(config, mel_levels=0), tmp_path)
    assert times == [path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")]
    assert not torch.equal(one.mels[0], two.mels[0])  # decoded, and recorded
    plain = training_clips(corpus, tokenizer, GPTConfig(levels=8), tmp_path)
    assert plain.mels is None and plain.codes[0].shape[0] == 8


@pytest.mark.parametrize("config", [SMALL, DEPTH, GPTConfig(levels=2, body=BODY)])
def test_load_gpt_knows_the_kind(config, tmp_path):
    kind = HybridGPT if isinstance(config, HybridConfig) else GPT
    kind(config).save_pretrained(tmp_path)
    found = load_gpt(tmp_path)
    assert type(found) is kind and found.config == config


@pytest.mark.parametrize("name", ["gpt-small", "hybrid-small"])
def test_shipped_models_speak(name, tokenizer, corpus):
    """Better than chance on every level, and sound of ordinary loudness."""
    model = load_gpt(name)
    clips = Clips.encode(tokenizer, corpus)
    if isinstance(model, HybridGPT):
        framing = CausalMel(**model.config.framing)
        clips = replace(clips, mels=clip_mels(corpus, clips, framing, tokenizer, 8))
    found = likelihood(model, clips)
    assert all(found.level(q)["nll"] < 0.95 * np.log(256) for q in range(8))
    made = continue_wav(model, tokenizer, corpus[1].wav[..., :16000], 1.0, min_frames=50)
    new = made.wav[..., 16000:]
    assert made.codes.shape == (1, 8, 100) and 1e-3 < float(new.square().mean().sqrt()) < 0.5
    card = (ROOT / f"data/checkpoints/{name}/README.md").read_text()
    assert "made by" in card and "| 8 |" in card


def test_the_published_sizes():
    """3.7 M and 40 M in the paper; the hybrid 4 M."""
    from speechlab.lm.gpt import GPT_CONFIGS

    with torch.device("meta"):
        counts = {
            name: sum(w.numel() for w in kind(config).parameters()) / 1e6
            for name, kind, config in (
                ("gpt-s", GPT, GPT_CONFIGS["gpt-s"]), ("gpt-l", GPT, GPT_CONFIGS["gpt-l"]),
                ("hybrid", HybridGPT, HYBRID_CONFIGS["hybrid"]),
            )
        }  # fmt: skip
    assert 3.6 < counts["gpt-s"] < 3.8 and 39 < counts["gpt-l"] < 42
    assert 3.6 < counts["hybrid"] < 4.1


def small_report() -> dict:
    """Two settings, two seeds, three voices whose differences are -.4, -.5 and -.6 on average."""
    runs = []
    for seed, shift in enumerate((0.05, -0.05)):
        for name, by_voice in (("tokens", (2.0, 2.2, 2.1)), ("hybrid", (1.6, 1.7, 1.5))):
            values = [v + shift * (name == "hybrid") for v in by_voice]
            runs.append({
                "name": name, "seed": seed, "nll": float(np.mean(values)), "accuracy": 0.5,
                "perplexity": 9.0, "parameters": 1000, "mflops": 1.0, "train_nll": 1.0, "fed": {},
                "bits_per_second": 99.0, "by_voice": dict(zip("abc", values)),
            })  # fmt: skip
    return {"data": "speech", "runs": runs}


def test_study_means_and_intervals():
    rows = {row["name"]: row for row in study_rows(small_report())}
    less = rows["hybrid"]["minus tokens"]
    assert less.value == pytest.approx(-0.5)
    half = 4.302653 * np.std([-0.4, -0.5, -0.6], ddof=1) / np.sqrt(3)  # t, three voices
    assert less.high - less.value == pytest.approx(half, rel=1e-4)
    assert "-0.500 [-0.748, -0.252]" in study_table(small_report())
    ax = plot_study(small_report())
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.5])


@pytest.mark.parametrize("data", ["speech", "music"])
def test_the_stored_study_is_whole(data):
    """Every setting, the compared ones with every seed; equal parameters where it matters."""
    report = json.loads((ROOT / f"data/results/hybrid_{data}.json").read_text())
    seeds = {run["seed"] for run in report["runs"]}
    from hybrid import SETTINGS

    for name in SETTINGS:
        found = {run["seed"] for run in report["runs"] if run["name"] == name}
        assert found == seeds or (found and name not in ("tokens", "tokens, 10x", "hybrid"))
    rows = {row["name"]: row for row in study_rows(report)}
    small = rows["tokens"]["parameters"]
    assert abs(rows["hybrid"]["parameters"] / small - 1) < 0.01
    assert 9 < rows["tokens, 10x"]["parameters"] / small < 12
    assert abs(rows["tokens, same FLOPs"]["mflops"] / rows["hybrid"]["mflops"] - 1) < 0.03


def test_the_study_runs(tmp_path):
    """The script itself, at its smallest."""
    import subprocess
    import sys

    command = [sys.executable, ROOT / "benchmarks/hybrid.py", tmp_path / "out.json", "--quick"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    report = json.loads((tmp_path / "out.json").read_text())
    assert len({run["name"] for run in report["runs"]}) == 12
    assert report["runs"][2]["fed"].keys() == {"level 1", "levels 1-4", "levels 1-8"}


CODES = torch.zeros(1, 1, 5).long()


def ordinary() -> SpeechTokenizer:
    """A tokeniser that looks ahead."""
    return SpeechTokenizer.from_pretrained("speechtokenizer-small")


BAD = [
    (lambda t: make()(CODES, None, torch.zeros(1, 64, 4)), r"mel is \(1, 64, 4\)"),
    (lambda t: make()(CODES, None, None), "mel is a NoneType"),
    (lambda t: make()(CODES, None, torch.full((1, 64, 5), torch.nan)), "NaN"),
    (lambda t: HybridConfig(pattern="delay", levels=2), "parallel or depth"),
    (lambda t: HybridConfig(body=replace(BODY, context=4096)), "mel's context"),
    (lambda t: CausalMel(hop_length=2000), "hop_length 2000 exceeds n_fft 1024"),
    (lambda t: CausalMel(lookahead=5).stream(torch.zeros(1, 1, 320)), "lookahead is 5"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(1, 1, 0)), "wav"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(2, 1, 320)), "2 signals"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(1, 1, 320 * 120)), "a prompt of 120"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(1, 1, 3200), 0.0), "max_frames is 0"),
    (
        lambda t: continue_wav(make(replace(DEPTH, codebook_size=64)), t, torch.zeros(1, 1, 3200)),
        "64 codes, the tokeniser 256",
    ),
    (lambda t: DecodedMel(make(), ordinary(), []), "not causal"),
    (lambda t: DecodedMel(make(replace(SMALL, hop_length=160)), t, []), "hop_length is 160"),
    (lambda t: DecodedMel(make(replace(SMALL, sample_rate=8000)), t, []), "sample_rate is 8000"),
    (lambda t: generate(make(), None, 5), "tokenizer is missing"),
    (lambda t: HybridGPT(SMALL).fit_mel(Clips([CODES[0]], ["a"])), "clips have no mels"),
    (
        lambda t: clip_mels(
            embedded_corpus("smoke")[:1], Clips.encode(t, embedded_corpus("smoke")[:1]),
            CausalMel(), ordinary(),
        ),
        "would leak",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input(call, words, tokenizer):
    with pytest.raises(ValueError, match=words):
        call(tokenizer)


def test_the_command_line(tmp_path, corpus, monkeypatch):
    from typer.testing import CliRunner

    from speechlab.cli import app
    from speechlab.foundations.audio import load_wav, save_wav

    monkeypatch.setenv("SPEECHLAB_DEVICE", "cpu")
    save_wav(tmp_path / "in.wav", corpus[0].wav[..., :24000], 16000)
    for kind in ("gpt-small", "hybrid-small"):
        train = ["train", "gpt", f"{tmp_path}/{kind}", "--config", kind, "--size", "smoke"]
        done = CliRunner().invoke(app, [*train, "--steps", "2", "--batch-size", "4"])
        assert done.exit_code == 0, done.output
        assert "| 8 |" in done.output and (tmp_path / kind / "report.json").exists()
        command = ["continue", f"{tmp_path}/in.wav", f"{tmp_path}/out.wav", "--seconds", "0.5"]
        done = CliRunner().invoke(app, [*command, "--model", f"{tmp_path}/{kind}", "--keep", "1"])
        assert done.exit_code == 0, done.output
        assert "50 frames of prompt" in done.output
        assert load_wav(tmp_path / "out.wav", 16000)[0].shape[-1] >= 50 * HOP
    done = CliRunner().invoke(app, [*command, "--seconds", "60", "--model", f"{tmp_path}/{kind}"])
    assert isinstance(done.exception, ValueError) and "holds 512 frames" in str(done.exception)
