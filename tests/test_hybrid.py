"""The hybrid GPT: no sample of the future, generation equal to one pass, the study's arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpt import coded_corpus

from speechlab import load
from speechlab.foundations.audio import log_mel
from speechlab.foundations.batches import make_batch
from speechlab.foundations.columns import codes_column, with_column
from speechlab.foundations.contracts import CodeSpec, CodeSpecError
from speechlab.foundations.corpus import embedded_corpus
from speechlab.foundations.models import ModelError
from speechlab.foundations.recipes import Optim
from speechlab.foundations.sampling import Sampling
from speechlab.foundations.training import TrainConfig
from speechlab.foundations.transformer import TransformerConfig
from speechlab.lm.generation import generate
from speechlab.lm.gpt import GPT, GPT_CONFIGS, GPTConfig, token_nll
from speechlab.lm.gpt_training import GPTRecipe, fit_config
from speechlab.lm.hybrid import (
    HYBRID_CONFIGS,
    CausalMel,
    DecodedMel,
    HybridConfig,
    HybridGPT,
    HybridRecipe,
    continue_wav,
    mel_column,
)
from speechlab.lm.likelihood import likelihood
from speechlab.studies import whisper_gpt
from speechlab.studies.study import reproduce
from speechlab.studies.whisper_gpt import SETTINGS, plot_study, study_rows, study_table
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer

ROOT = Path(__file__).resolve().parent.parent
BODY = TransformerConfig(32, 2, 4, context=128)
INSIDE = TransformerConfig(16, 1, 2, context=8)
SMALL = HybridConfig(body=BODY, mel=TransformerConfig(16, 1, 2, context=128))
HOP = 320


@pytest.fixture(scope="module")
def tokenizer():
    return SpeechTokenizer.load("small-causal")


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


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 6])
def test_the_hybrid_from_its_prefixes_in_float64(frames):
    """-log p of token t, computed anew from c_1 … c_(t-1) and x_1 … x_(t-1) and nothing else."""
    model = make().double()
    rng = torch.Generator().manual_seed(frames)
    codes = torch.randint(256, (1, 1, frames), generator=rng)
    mel = torch.randn(1, 64, frames, generator=rng, dtype=torch.float64) * 2 - 1
    model.mel_mean.normal_(generator=rng), model.mel_scale.uniform_(0.5, 2.0, generator=rng)
    table, first = model.tokens[0].weight, model.config.empty
    into, fuse, split = model.mel_in, model.fuse.weight, model.config.body.dim
    wanted = []
    for t in range(frames + 1):
        words = [first, *codes[0, 0, :t].tolist()]
        slices = [model.mel_start]
        for s in range(t):
            bands = [(mel[0, b, s] - model.mel_mean[b]) / model.mel_scale[b] for b in range(64)]
            slices.append(torch.stack(bands))
        heard = model.mel_body(torch.stack([into.weight @ x + into.bias for x in slices])[None])[0]
        rows = [
            fuse[:, :split] @ table[word] + fuse[:, split:] @ sound
            for word, sound in zip(words, heard)
        ]
        last = model.head(model.body(torch.stack(rows)[None])[0, -1])
        right = model.config.end if t == frames else int(codes[0, 0, t])
        top = float(last.max())
        total = sum(math.exp(float(x) - top) for x in last)
        wanted.append(top + math.log(total) - float(last[right]))
    logits = model(codes, None, mel)
    targets = [*codes[0, 0].tolist(), model.config.end]
    found = [-float(row.log_softmax(-1)[c]) for row, c in zip(logits[0, 0], targets)]
    assert found == pytest.approx(wanted, rel=1e-9)


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
        found, past = framing.step(piece, past)
        parts.append(found)
    torch.testing.assert_close(torch.cat(parts, dim=2), framing(wav))


DEPTH = replace(SMALL, levels=8, input_levels=1, pattern="depth", depth=INSIDE, mel_levels=8)
WIDE = replace(SMALL, levels=3)


@pytest.mark.parametrize("config", [SMALL, WIDE, DEPTH], ids=["coarse", "parallel", "depth"])
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_generation_equals_one_pass(config, lengths, seed):
    """Tokens, sound, slice, next token: with a cache, without, and checked by a full pass."""
    tokenizer = SpeechTokenizer.load("small-causal")
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


def test_mel_statistics_come_from_the_corpus():
    mels = [3 + 2 * torch.randn(64, 50) for _ in range(20)]
    corpus = coded_corpus([torch.zeros(1, 50).long()] * 20, 256, mels)
    model = HybridGPT(SMALL).fit_mel(corpus)
    assert (model.mel_mean - 3).abs().max() < 0.3 and (model.mel_scale - 2).abs().max() < 0.3


def test_the_mel_is_learned_from(tmp_path):
    """Codes that only the slice before them tells: the hybrid learns them, the GPT cannot."""
    rng = torch.Generator().manual_seed(0)
    codes = [torch.randint(8, (1, 20), generator=rng) for _ in range(64)]
    mels = []
    for row in codes:  # slice t holds code t + 1
        mel = torch.zeros(64, 20)
        mel[row[0, 1:], torch.arange(19)] = 1.0
        mels.append(mel)
    corpus = coded_corpus(codes, 8, mels)
    options = {
        "optim": Optim(1e-2, 5, 0.1, (0.9, 0.95), 0.1), "loop": TrainConfig(80), "batch_size": 16,
    }  # fmt: skip
    hybrid, _ = HybridRecipe(model=SMALL, **options).train(tmp_path / "hybrid", corpus)
    plain, _ = GPTRecipe(model=GPTConfig(body=BODY), **options).train(tmp_path / "plain", corpus)
    assert type(hybrid) is HybridGPT and type(plain) is GPT
    assert hybrid.mel_scale.max() < 0.5  # fitted before it learned
    assert likelihood(hybrid, corpus).level()["nll"] < 0.5
    assert likelihood(plain, corpus).level()["nll"] > 1.5


def test_mels_are_aligned_with_codes(tokenizer, corpus):
    framing = CausalMel()
    coded = with_column(corpus, codes_column(tokenizer), "")
    for options in ((), (tokenizer, 1)):
        both = with_column(coded, mel_column(framing, *options), "")
        for entry in both.entries:
            mel, codes = (both.columns[name].cut(entry.id) for name in ("mel", "codes"))
            assert mel.shape == (64, codes.shape[1])
    wav = corpus[2].wav
    wanted = framing(tokenizer.decode(tokenizer.encode(wav, 1)))[0]
    found = both.columns["mel"].cut(corpus.entries[2].id)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    recorded = with_column(coded, mel_column(framing), "").columns["mel"]
    torch.testing.assert_close(
        recorded.cut(corpus.entries[2].id), framing(wav)[0], rtol=2e-3, atol=2e-3
    )
    lacking = with_column(corpus[1:], mel_column(framing), "").columns["mel"]
    with pytest.raises(ValueError, match="no value for"):  # mels of other recordings
        coded.with_values("mel", lacking)


def test_columns_are_found_again(tokenizer, corpus, tmp_path, monkeypatch):
    """Codes are computed once for all models; slices once for each way to hear."""
    monkeypatch.setenv("SPEECHLAB_CACHE", str(tmp_path))

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("columns/*/*")}

    assert fit_config(DEPTH, tokenizer) == replace(DEPTH, codes=tokenizer.spec)
    recipe = HybridRecipe(model=DEPTH)
    one = recipe.columns(corpus)
    before = files()
    assert len({path.parent for path in before}) == 2  # codes and mel
    again = recipe.columns(corpus)
    assert files() == before
    two = replace(recipe, model=replace(DEPTH, mel_levels=0)).columns(corpus)
    assert before.items() < files().items() and len(files()) == len(before) * 3 // 2
    name = corpus.entries[0].id
    decoded, same, recorded = (part.columns["mel"].cut(name) for part in (one, again, two))
    assert torch.equal(decoded, same) and not torch.equal(decoded, recorded)
    plain = GPTRecipe(model=GPTConfig(levels=8)).columns(corpus)
    assert list(plain.columns) == ["codes"] and plain.columns["codes"].cut(name).shape[0] == 8
    assert len(files()) == len(before) * 3 // 2
    few = GPTRecipe(model=GPTConfig(levels=2)).columns(corpus).columns["codes"]
    assert few.cut(name).shape[0] == few.spec.n_q == 2
    assert few.spec == tokenizer.spec.levels(2)


@pytest.mark.parametrize("config", [SMALL, DEPTH, GPTConfig(levels=2, body=BODY)])
def test_load_knows_the_kind(config, tmp_path):
    kind = HybridGPT if isinstance(config, HybridConfig) else GPT
    model = kind(config)
    model.save(tmp_path)
    for found in (load(tmp_path), GPT.load(tmp_path)):
        assert type(found) is kind and found.config == config and not found.training
        for name, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)
    if kind is GPT:
        with pytest.raises(ModelError, match="type 'gpt', wanted 'hybrid-gpt'"):
            HybridGPT.load(tmp_path)


@pytest.mark.parametrize("name", ["gpt-small", "hybrid-small"])
def test_shipped_models_speak(name, tokenizer, corpus):
    """Better than chance on every level, and sound of ordinary loudness."""
    model = load(name)
    assert model.config.codes == tokenizer.spec
    coded = with_column(corpus, codes_column(tokenizer))
    if isinstance(model, HybridGPT):
        coded = with_column(coded, mel_column(CausalMel(**model.config.framing), tokenizer, 8))
    found = likelihood(model, coded)
    assert all(found.level(q)["nll"] < 0.95 * np.log(256) for q in range(8))
    made = continue_wav(model, tokenizer, corpus[1].wav[..., :16000], 1.0, min_frames=50)
    new = made.wav[..., 16000:]
    assert made.codes.shape == (1, 8, 100) and 1e-3 < float(new.square().mean().sqrt()) < 0.5
    card = (ROOT / f"data/checkpoints/{name}/README.md").read_text()
    assert "made by" in card and "| 8 |" in card


def test_the_published_sizes():
    """3.7 M and 40 M in the paper; the hybrid 4 M."""
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
    for name in SETTINGS:
        found = {run["seed"] for run in report["runs"] if run["name"] == name}
        assert found == seeds or (found and name not in ("tokens", "tokens, 10x", "hybrid"))
    rows = {row["name"]: row for row in study_rows(report)}
    small = rows["tokens"]["parameters"]
    assert abs(rows["hybrid"]["parameters"] / small - 1) < 0.01
    assert 9 < rows["tokens, 10x"]["parameters"] / small < 12
    assert abs(rows["tokens, same FLOPs"]["mflops"] / rows["hybrid"]["mflops"] - 1) < 0.03


def test_the_study_runs(tmp_path, monkeypatch):
    """The study itself, at its smallest; what was measured is not measured again."""
    path = reproduce("hybrid_speech", "smoke", tmp_path, tmp_path / "out.json")
    report = json.loads(path.read_text())
    assert [run["name"] for run in report["runs"]] == list(SETTINGS) and len(SETTINGS) == 12
    assert report["runs"][2]["fed"].keys() == {"level 1", "levels 1-4", "levels 1-8"}
    assert report["data"] == "speech" and {row["name"] for row in study_rows(report)} == {*SETTINGS}
    assert all(0 < run["nll"] < 7 and run["by_voice"] for run in report["runs"])

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(whisper_gpt, "measure_setting", never)
    again = json.loads(reproduce("hybrid_speech", "smoke", tmp_path).read_text())
    assert again["runs"] == report["runs"]


CODES = torch.zeros(1, 1, 5).long()


def ordinary() -> SpeechTokenizer:
    """A tokeniser that looks ahead."""
    return SpeechTokenizer.load("speechtokenizer-small")


def of_codes(*numbers, **options) -> HybridGPT:
    """A model of another tokeniser's codes."""
    return make(replace(DEPTH, codes=CodeSpec(*numbers, **options)))


def batch_of(mels: list[torch.Tensor] | None):
    """A batch of five tokens, with these slices."""
    return make_batch(coded_corpus([CODES[0]], 256, mels), [(0, 0, 5 * HOP)], sound=False)


BAD = [
    (lambda t: make()(CODES, None, torch.zeros(1, 64, 4)), r"mel is \(1, 64, 4\)"),
    (lambda t: make()(CODES, None, None), "mel is a NoneType"),
    (lambda t: make()(CODES, None, torch.full((1, 64, 5), torch.nan)), "NaN"),
    (lambda t: HybridConfig(pattern="delay", levels=2), "parallel or depth"),
    (lambda t: HybridConfig(body=replace(BODY, context=4096)), "mel's context"),
    (lambda t: CausalMel(hop_length=2000), "hop_length 2000 exceeds n_fft 1024"),
    (lambda t: CausalMel(lookahead=5).step(torch.zeros(1, 1, 320)), "lookahead is 5"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(1, 1, 0)), "wav"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(2, 1, 320)), "2 signals"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(1, 1, 320 * 120)), "a prompt of 120"),
    (lambda t: continue_wav(make(DEPTH), t, torch.zeros(1, 1, 3200), 0.0), "max_frames is 0"),
    (lambda t: continue_wav(of_codes(64, 8), t, torch.zeros(1, 1, 3200)),
     r"\(small-causal\): their codebook_size is 256, wanted 64"),
    (lambda t: DecodedMel(make(), ordinary(), []), "not causal"),
    (lambda t: DecodedMel(of_codes(256, 8, 16000, 160), t, []), "hop_length is 320, wanted 160"),
    (lambda t: DecodedMel(of_codes(256, 8, 8000), t, []), "sample_rate is 16000, wanted 8000"),
    (lambda t: DecodedMel(of_codes(256, 8, fingerprint=5), t, []), "fingerprint is .*00000005"),
    (lambda t: generate(make(), None, 5), "tokenizer is missing"),
    (lambda t: HybridGPT(SMALL).fit_mel(coded_corpus([CODES[0]])), "corpus has no column 'mel'"),
    (lambda t: mel_column(CausalMel(), ordinary()), "would leak"),
    (lambda t: token_nll(make(), batch_of([torch.zeros(64, 4)])), r"mel is \(1, 64, 4\).*64, 5\)"),
    (lambda t: token_nll(make(), batch_of(None)), "mel is a NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input(call, words, tokenizer):
    with pytest.raises(ValueError, match=words):
        call(tokenizer)


def test_codes_of_another_tokenizer_are_refused(tokenizer, corpus):
    """At the door, not as noise: the codebooks' checksum differs."""
    model, wav = make(DEPTH), corpus[0].wav[..., :3200]
    model.config = replace(DEPTH, codes=replace(tokenizer.spec, fingerprint=1))
    with pytest.raises(CodeSpecError, match="another tokeniser"):
        continue_wav(model, tokenizer, wav, 0.2)
    model.config = replace(DEPTH, codes=tokenizer.spec)
    assert continue_wav(model, tokenizer, wav, 0.2, min_frames=10).codes.shape == (1, 8, 20)


@pytest.mark.parametrize(("name", "kind"), [("gpt", GPT), ("hybrid", HybridGPT)])
def test_the_command_line(name, kind, tmp_path, corpus, monkeypatch, capsys):
    from speechlab.cli.main import main, run
    from speechlab.foundations.audio_files import load_wav, save_wav

    monkeypatch.setenv("SPEECHLAB_DEVICE", "cpu")
    save_wav(tmp_path / "in.wav", corpus[0].wav[..., :24000], 16000)
    made = tmp_path / "made"
    train = ["train", name, "smoke", "--out", str(made), "--loop.steps", "2", "--batch-size", "4"]
    run(train)
    assert "| 8 |" in capsys.readouterr().out and (made / "report.json").exists()
    assert type(load(made)) is kind and load(made).config.codes.name == "small-causal"
    command = ["continue", f"{tmp_path}/in.wav", f"{tmp_path}/out.wav", "--model", str(made)]
    command.append("--force")
    run([*command, "--seconds", "0.5", "--keep", "1"])
    assert "50 frames of prompt" in capsys.readouterr().out
    assert load_wav(tmp_path / "out.wav", 16000)[0].shape[-1] >= 50 * HOP
    with pytest.raises(ValueError, match="holds 512 frames"):
        run([*command, "--keep", "1", "--seconds", "60"])
    with pytest.raises(SystemExit, match="1"):  # to people: one line
        main([*command, "--keep", "1", "--seconds", "60"])
    error = capsys.readouterr().err
    assert "holds 512 frames" in error and "Traceback" not in error
