"""Metis' second stage: what a level hears, its loss, writing; the four models as one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.contracts import CodeSpec, CodeSpecError, mask_of
from speechlab.metis.acoustic import (
    PUBLISHED_STEPS,
    AcousticConfig,
    AcousticDecoder,
    acoustic_loss,
    level_shares,
    steps_by_level,
    write_codes,
)
from speechlab.metis.decoding import PRESETS, Guidance
from speechlab.metis.masked_lm import MaskedLM, MaskedLMConfig, Masking, timed, write
from speechlab.metis.speaking import Metis, Writing
from speechlab.metis.ssl_tokens import SpeechToTokens, SSLTokenizer, SSLTokensConfig
from speechlab.tokenizer.codecs import load_codec
from speechlab.tokenizer.teachers import Teacher

SIZE, LEVELS, SAID = 20, 3, 9
CONFIG = AcousticConfig(CodeSpec(SIZE, LEVELS), CodeSpec(SAID, 1), timed(16, 2, 2, context=64))
RULE = PRESETS["metis"]


def loud(config: AcousticConfig = CONFIG, seed: int = 0) -> AcousticDecoder:
    """Random weights large enough that everything matters; float64."""
    model, draw = AcousticDecoder(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.4)
    return model.double().eval()


def example(rows: int = 2, frames: int = 10, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(SIZE, (rows, LEVELS, frames), generator=draw)
    tokens = torch.randint(SAID, (rows, frames), generator=draw)
    prompt = mask_of(torch.tensor([3, 0][:rows]), frames)
    mask = (torch.rand(rows, frames, generator=draw) < 0.5) & ~prompt
    return codes, tokens, prompt, mask, torch.rand(rows, generator=draw).double()


@pytest.mark.parametrize("level", range(LEVELS))
def test_the_input_is_the_sum_that_the_paper_describes(level):
    """Frame by frame in plain loops."""
    model, (codes, tokens, prompt, mask, time) = loud(), example()
    first, second = model.read[0], model.read[2]
    wanted = torch.zeros(2, 10, 16).double()
    for row in range(2):
        for i in range(10):
            said = model.tokens.weight[tokens[row, i]] + model.level.weight[level]
            x = second.weight @ F.silu(first.weight @ said + first.bias) + second.bias
            for q in range(LEVELS):
                code = int(codes[row, q, i])
                hidden = mask[row, i] if q == level else (q > level and not prompt[row, i])
                x = x + model.codes[q].weight[SIZE if hidden else code]
            wanted[row, i] = x
    head = model.heads[level]
    wanted = model.stack(wanted, time) @ head.weight.T + head.bias
    found = model(codes, level, mask, time, tokens, prompt)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_a_level_hears_and_what_not():
    model, (codes, tokens, prompt, mask, time) = loud(), example()
    mask[:, 6] = True

    def changed(q: int, i: int, level: int = 1) -> bool:
        other = codes.clone()
        other[0, q, i] = (other[0, q, i] + 1) % SIZE
        pair = (model(c, level, mask, time, tokens, prompt) for c in (codes, other))
        return not torch.equal(*pair)

    shown = int((~mask[0]).nonzero()[-1])
    assert changed(0, 6)  # the level below
    assert changed(2, 1)  # a level above, in the prompt
    assert not changed(2, 6)  # a level above, after it
    assert not changed(1, 6)  # its own, hidden
    assert changed(1, shown)


RATES = [(16000, 320), (24000, 480), (24000, 320), (16000, 640)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from(RATES))
def test_tokens_on_the_grid_of_any_codec(lengths, rate):
    """Each row hears its own tokens, whatever the padding; its last one behind its end."""
    config = AcousticConfig(CodeSpec(SIZE, 2, *rate), CodeSpec(SAID, 1), timed(8, 1, 2))
    model, most = AcousticDecoder(config), max(lengths)
    tokens = torch.arange(most).expand(len(lengths), -1) + 100 * torch.arange(len(lengths))[:, None]
    frames = config.frames_for(most)
    assert (frames - 1) * rate[1] * 50 < most * rate[0] <= frames * rate[1] * 50
    found = model.on_grid(tokens, frames, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        middle = [(i + 0.5) * rate[1] / rate[0] for i in range(frames)]
        wanted = [100 * row + min(int(m * 50 + 1e-9), length - 1) for m in middle]
        assert found[row].tolist() == wanted
    with pytest.raises(ValueError, match=f"{most} tokens last {frames} frames, not"):
        model.on_grid(tokens, frames + 1)


def test_levels_are_drawn_as_published():
    shares = level_shares(12)
    wanted = [2 * (12 - j) / (12 * 13) for j in range(12)]
    assert [float(p) for p in shares] == pytest.approx(wanted)
    codes, tokens, *_ = example()
    seen, draw = [], torch.Generator().manual_seed(0)

    def spy(codes, level, mask, *rest):
        seen.append(level)
        return torch.zeros(*mask.shape, SIZE)

    for _ in range(3000):
        acoustic_loss(spy, codes, tokens, torch.ones(2, 10).bool(), Masking(), generator=draw)
    counts = torch.bincount(torch.tensor(seen), minlength=3) / 3000
    torch.testing.assert_close(counts.double(), level_shares(3), atol=0.03, rtol=0)


def test_the_loss_is_the_mean_nll_of_hidden_codes_of_one_level():
    model, (codes, tokens, *_) = loud(), example()
    valid = mask_of(torch.tensor([10, 7]), 10)
    masking = Masking(least=0.0)
    holes = codes.where(valid.unsqueeze(1), -1), tokens.where(valid, -1)  # as codecs write them
    loss, metrics = acoustic_loss(model, *holes, valid, masking, 1,
                                  torch.Generator().manual_seed(5))  # fmt: skip
    t, mask, prompt = masking.draw(valid, torch.Generator().manual_seed(5))
    total = count = right = 0
    for row, n in enumerate((10, 7)):
        part = (codes[row : row + 1, :, :n], 1, mask[row : row + 1, :n], t[row : row + 1],
                tokens[row : row + 1, :n], prompt[row : row + 1, :n])  # fmt: skip
        log_p = model(*part)[0].log_softmax(-1)
        for i in mask[row, :n].nonzero()[:, 0].tolist():
            total, count = total - float(log_p[i, codes[row, 1, i]].detach()), count + 1
            right += int(log_p[i].argmax() == codes[row, 1, i])
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-5)
    assert float(metrics["right"]) == pytest.approx(right / count)


LENGTHS = st.lists(st.tuples(st.integers(0, 6), st.integers(3, 9)), min_size=1, max_size=3)
GUIDED = (Guidance(0.0), Guidance(1.5, rescale=0.75))


@given(LENGTHS, st.sampled_from(GUIDED), st.integers(0, 5))
def test_a_batch_gives_what_its_rows_give_alone(lengths, guidance, seed):
    model, draw = loud(), torch.Generator().manual_seed(seed)
    prompts = [torch.randint(SIZE, (LEVELS, p), generator=draw) for p, _ in lengths]
    tokens = [torch.randint(SAID, (p + n,), generator=draw) for p, n in lengths]
    steps = (3, 2, 1)
    both = write_codes(model, tokens, prompts, RULE, steps, guidance, seed)
    for row, (p, n) in enumerate(lengths):
        assert both[row].shape == (LEVELS, p + n)
        assert torch.equal(both[row][:, :p], prompts[row])
        assert 0 <= int(both[row].min()) <= int(both[row].max()) < SIZE
        alone = write_codes(model, [tokens[row]], [prompts[row]], RULE, steps, guidance, seed, row)
        assert torch.equal(both[row], alone[0])


def test_writing_is_level_after_level():
    """A plain loop over levels with the masked model's own `write`."""
    model, draw = loud(), torch.Generator().manual_seed(3)
    known = torch.randint(SIZE, (LEVELS, 4), generator=draw)
    tokens = torch.randint(SAID, (12,), generator=draw)
    prompt = mask_of(torch.tensor([4]), 12)
    codes = torch.zeros(1, LEVELS, 12, dtype=torch.long)
    codes[0, :, :4] = known
    for q, steps in enumerate((4, 2, 1)):
        around = model.around(codes, q, tokens[None], prompt).detach()
        codes[:, q] = write(model.at(q), codes[:, q], ~prompt, RULE, steps, prompt=prompt,
                            frames=around, seed=(8, q))  # fmt: skip
    found = write_codes(model, [tokens], [known], RULE, (4, 2, 1), seed=8)
    assert torch.equal(found[0], codes[0])
    coarse = write_codes(model, [tokens], [known], RULE, (4,), seed=8)
    assert torch.equal(coarse[0], codes[0, :1])


def test_published_size():
    with torch.device("meta"):
        model = AcousticDecoder(AcousticConfig.published())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 353


def test_bad_input():
    model, (codes, tokens, *_) = loud(), example()
    row, known = tokens[0], codes[0, :, :4]
    for arguments, message in (
        (([row], [codes[0]], RULE, (1, 1, 1)), "those of the prompt and of what follows"),
        (([row], [known, known], RULE, (1, 1, 1)), "1 rows of tokens, 2 prompts"),
        (([row], [known[:2]], RULE, (1, 1, 1)), "prompt has 2 levels; wanted exactly 3"),
        (([row + 9], [known], RULE, (1, 1, 1)), "tokens range from"),
        (([row], [known], RULE, (1, 1, 1, 1)), "levels in steps is 4"),
        (([row], [known], RULE, (0, 1, 1)), "steps is 0"),
        (([row], [known], RULE, (9, 1, 1)), "steps is 9, but at most 6"),
        (([], [], RULE), "0 rows of tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            write_codes(model, *arguments)
    for level in (-1, 3):
        with pytest.raises(ValueError, match=f"level is {level}, codes have 3 levels"):
            model.around(codes, level, tokens, codes[:, 0] > 0)
    with pytest.raises(ValueError, match="tokens have 2 levels"):
        AcousticConfig(tokens=CodeSpec(9, 2))


def test_steps_by_level():
    assert steps_by_level(8) == (16, 8, 4, 2, 1, 1, 1, 1)
    assert steps_by_level(2) == (16, 8)
    assert steps_by_level(6, (40, 16), 20) == (20, 16, 1, 1, 1, 1)
    assert sum(PUBLISHED_STEPS) == 66
    assert len(PUBLISHED_STEPS) == AcousticConfig.published().codes.n_q


def test_one_batch_overfits():
    torch.manual_seed(0)
    model, (codes, tokens, *_) = AcousticDecoder(CONFIG), example(2, 12)
    steers = [p for n, p in model.named_parameters() if ".steer." in n]
    assert steers
    assert not any(p.any() for p in steers)  # norms start as plain ones
    optimizer, draw = torch.optim.Adam(model.parameters(), 5e-3), torch.Generator().manual_seed(0)
    valid, losses = torch.ones(2, 12).bool(), []
    for _ in range(300):
        loss, _ = acoustic_loss(model, codes, tokens, valid, Masking(least=0.0), generator=draw)
        optimizer.zero_grad(), loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) / 20 < 0.5 < 2.5 < losses[0]


@pytest.fixture(scope="module")
def metis():
    torch.manual_seed(0)
    small, tiny = timed(32, 1, 2), SSLTokensConfig(32, 16, width=16, blocks=1)
    reader = SpeechToTokens(Teacher.untrained(width=32, layers=1), SSLTokenizer(tiny))
    codec = load_codec("speechtokenizer-small")
    writer = MaskedLM(MaskedLMConfig(reader.spec, small)).eval()
    acoustic = AcousticDecoder(AcousticConfig(codec.spec, reader.spec, small)).eval()
    return Metis(reader, writer, acoustic, codec)


def test_babble_in_batches_and_seeds(metis, corpus):
    voices = [corpus[0].wav[..., :16000], None, corpus[1].wav[..., :7000]]
    both = metis.babble(voices, 0.4, seed=2)
    assert [tuple(one.wav.shape) for one in both] == [(1, 1, 6400)] * 3
    for row, voice in enumerate(voices):
        alone = metis.babble([voice], 0.4, seed=2, first_row=row)[0]
        assert torch.equal(alone.codes, both[row].codes)
        assert torch.equal(alone.tokens, both[row].tokens)
    assert not torch.equal(metis.babble(voices[:1], 0.4, seed=3)[0].codes, both[0].codes)


def test_repeat_keeps_the_tokens_and_the_length(metis, corpus):
    wav, like = corpus[0].wav[..., :8000], corpus[1].wav[..., :6400]
    made = metis.repeat([wav], [like], Writing(level_steps=(4, 1)))[0]
    assert torch.equal(made.tokens, metis.reader.encode(wav)[0, 0])
    assert made.wav.shape == (1, 1, 8000)


def test_a_short_neighbour_changes_nothing(metis, corpus):
    wavs, like = [corpus[0].wav[..., :8000], corpus[2].wav[..., :960]], corpus[1].wav[..., :6400]
    both = metis.repeat(wavs, [like, None])
    for row, (wav, prompt) in enumerate(zip(wavs, [like, None])):
        alone = metis.repeat([wav], [prompt], first_row=row)[0]
        assert torch.equal(alone.codes, both[row].codes)


def test_models_that_do_not_belong_together_are_refused(metis):
    other = SpeechToTokens(metis.reader.teacher, SSLTokenizer(metis.reader.tokenizer.config), "x")
    with pytest.raises(CodeSpecError, match=r"reader's tokens belong to another tokeniser \(x\)"):
        Metis(other, metis.writer, metis.acoustic, metis.codec)
    with pytest.raises(CodeSpecError, match="codec's codes belong to another"):
        Metis(metis.reader, metis.writer, metis.acoustic, load_codec("encodec-small"))
    for wav, message in (
        (torch.zeros(1, 1, 8000), r"prompts\[0\] is silent"),
        (torch.ones(1, 2, 8000), "2 channels"),
        (torch.ones(2, 1, 8000), r"prompts\[0\] has 2 signals"),
    ):
        with pytest.raises(ValueError, match=message):
            metis.babble([wav])
    with pytest.raises(ValueError, match="prompts are empty"):
        metis.repeat([], [])
    with pytest.raises(ValueError, match="1 wavs, 2 prompts"):
        metis.repeat([torch.ones(1, 1, 8000)], [None, None])
    for seconds in (0.0, 0.001, float("nan"), 21.0):
        with pytest.raises(ValueError, match="seconds is"):
            metis.babble([None], seconds)
