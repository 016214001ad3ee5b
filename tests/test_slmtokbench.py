"""SLMTokBench: adapters, readers, Eq. 1, tables."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.judges import Recognizer, SpeakerEncoder, ctc_symbols
from speechlab.tokenizer import benchmark as bench
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer
from speechlab.tokenizer.teachers import Teacher, Units


@pytest.fixture(scope="module")
def ours():
    return bench.TokenizerCodec(
        SpeechTokenizer.from_pretrained("speechtokenizer-small").fold(), "ours"
    )


@pytest.fixture(scope="module")
def units(corpus):
    return bench.UnitsCodec(Units.fit(Teacher.untrained(width=16, layers=1), corpus[:6], 16))


def test_pair_likelihoods_sum_all_paths():
    """log q(y | x) of every pair, by enumerating paths in float64."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, 3, generator=generator).log_softmax(-1) for n in (3, 4)]
    targets = [[1], [1, 2]]
    found = bench.pair_likelihoods(scores, targets)
    for i, one in enumerate(scores):
        for j, text in enumerate(targets):
            total = 0.0
            for path in itertools.product(range(3), repeat=len(one)):
                merged = [s for t, s in enumerate(path) if t == 0 or s != path[t - 1]]
                if [s for s in merged if s] == text:
                    total += math.exp(sum(float(one[t, s]) for t, s in enumerate(path)))
            assert float(found[i, j]) == pytest.approx(math.log(total), rel=1e-4)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_mutual_information_is_equation_1(count, seed):
    logq = torch.randn(count, count, generator=torch.Generator().manual_seed(seed)).double()
    total = sum(float(logq[i, i]) - float(logq[i, j]) for i in range(count) for j in range(count))
    assert bench.mutual_information(logq) == pytest.approx(total / count**2, abs=1e-9)
    shifted = bench.mutual_information(logq + 5 * torch.eye(count))
    expected = total / count**2 + 5 * (count - 1) / count
    assert shifted == pytest.approx(expected, abs=1e-9)
    assert bench.mutual_information(logq, torch.full((count,), 2)) == pytest.approx(
        total / count**2 / 2, abs=1e-9
    )


def test_impossible_pairs_are_left_out():
    logq = torch.tensor([[-1.0, -math.inf], [-3.0, -2.0]])
    assert bench.mutual_information(logq) == pytest.approx((0 + 1 + 0) / 3)
    with pytest.raises(ValueError, match="no text fits"):
        bench.mutual_information(torch.full((2, 2), -math.inf))


def test_reader_ignores_what_lies_behind_a_row():
    torch.manual_seed(0)
    reader = bench.TokenReader([torch.randn(16, 8)] * 2, 5, 6).eval()
    codes, frames = torch.randint(16, (3, 2, 20)), torch.tensor([11, 20, 4])
    before = reader(codes, frames)
    changed = codes.clone()
    changed[0, :, 11:] = 3
    torch.testing.assert_close(reader(changed, frames)[:, :4], before[:, :4])
    torch.testing.assert_close(reader(changed, frames)[0, :11], before[0, :11])


@pytest.mark.parametrize("embedding", ["codebook", "centroids", "random"])
def test_embeddings_start_where_they_say(ours, corpus, embedding):
    tokens = bench.encode_corpus(ours, corpus)
    config = bench.ReaderConfig(
        steps=1, width=4, batch_size=4, embedding=embedding, learning_rate=0
    )
    reader = bench.train_reader(ours, tokens, corpus, (0, 2), config)
    table = reader.tables[0].weight.detach()
    assert float(table.square().mean()) == pytest.approx(1, rel=0.01)
    assert table.mean(dim=0).abs().max() < 1e-3
    own = ours.vectors()[0] - ours.vectors()[0].mean(dim=0)
    if embedding == "codebook":
        torch.testing.assert_close(table, own / own.square().mean().sqrt(), rtol=1e-3, atol=1e-3)
    sizes = {"codebook": 64, "centroids": 80, "random": 64}
    assert table.shape == (256, sizes[embedding])
    with pytest.raises(ValueError, match="embedding is 'x'"):
        bench.ReaderConfig(embedding="x")


def test_centroids_are_mean_mels(ours, corpus):
    from speechlab.foundations.audio import log_mel

    tokens = bench.encode_corpus(ours, corpus)
    (table,) = bench._tables(ours, (0, 1), "centroids", tokens, corpus)
    code = int(torch.bincount(torch.cat([t[0].long() for t in tokens.values()])).argmax())
    rows = []
    for u in corpus.split("train"):
        mel = log_mel(u.wav, 16000, hop_length=320, floor=1e-2)[0].T
        rows += [mel[t] for t, c in enumerate(tokens[u.id][0, : len(mel)]) if int(c) == code]
    torch.testing.assert_close(table[code], torch.stack(rows).mean(dim=0), rtol=1e-3, atol=1e-4)


def test_a_reader_learns_what_tokens_say(corpus):
    """Tokens that spell the text are read; tokens of other utterances are not."""

    class Speller:
        name, sample_rate, hop_length, n_q, codebook_size = "speller", 16000, 320, 1, 30

        def vectors(self):
            return [torch.eye(30)]

    symbols = ctc_symbols(corpus, "characters")
    number = {s: i + 1 for i, s in enumerate(symbols)}
    from speechlab.foundations.judges import spoken

    tokens = {}
    for entry in corpus.entries:
        path = [n for s in spoken(entry, "characters") for n in (number[s], 0)]
        tokens[entry.id] = torch.tensor([path], dtype=torch.int16)
    config = bench.ReaderConfig(steps=150, width=24, batch_size=8, learning_rate=1e-2)
    reader = bench.train_reader(Speller(), tokens, corpus, (0, 1), config)
    test = corpus.split("test")
    good = bench.text_alignment(reader, tokens, test, (0, 1), symbols)
    names = [e.id for e in test.entries]
    wrong = tokens | dict(zip(names, [tokens[n] for n in names[1:] + names[:1]]))
    bad = bench.text_alignment(reader, wrong, test, (0, 1), symbols)
    assert good.cer.value < 0.5 < bad.cer.value
    assert good.information > 20
    assert bad.information < good.information / 4


def test_preservation_of_everything_and_of_one_level(ours, corpus):
    part = corpus.split("test")[:4]
    tokens = bench.encode_corpus(ours, part)
    reader, voice = (
        Recognizer.from_pretrained("phone-recognizer"),
        SpeakerEncoder.from_pretrained("speaker-encoder"),
    )
    one, all_levels = (
        bench.preservation(ours, tokens, part, levels, reader, voice) for levels in ((0, 1), (0, 8))
    )
    assert one.keys() == all_levels.keys() == {"PER", "similarity"}
    assert all_levels["similarity"] > one["similarity"]
    second = bench.preservation(ours, tokens, part, (1, 2), reader, voice)
    assert second["PER"] > one["PER"]  # level 2 alone: what level 1 left over


def test_units_cannot_be_decoded(units, corpus):
    part = corpus.split("test")[:2]
    tokens = bench.encode_corpus(units, part)
    reader = Recognizer.from_pretrained("phone-recognizer")
    assert bench.preservation(units, tokens, part, (0, 1), reader, None) == {}
    assert units.vectors()[0].shape[0] == units.codebook_size == 16


def small_model(kind):
    import transformers

    settings = {
        "encodec": {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16},
        "dac": {
            "encoder_hidden_size": 4, "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 3,
            "decoder_hidden_size": 32, "upsampling_ratios": [8, 5, 4, 2], "codebook_size": 32,
            "codebook_dim": 4, "sampling_rate": 16000,
        },
        "mimi": {
            "num_filters": 4, "hidden_size": 16, "codebook_size": 32, "num_hidden_layers": 1,
            "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "codebook_dim": 8,
            "intermediate_size": 16, "vector_quantization_hidden_dimension": 8,
            "upsample_groups": 16,
        },
    }[kind]  # fmt: skip
    name = kind.capitalize()
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("kind", ["encodec", "dac", "mimi"])
def test_codecs_of_transformers(kind, tmp_path, corpus):
    model = small_model(kind)
    codec = bench.TransformersCodec(model)
    wav = 0.1 * torch.randn(1, 1, 31000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    codes = codec.encode(wav)
    assert codes.shape == (1, codec.n_q, -(-31000 // codec.hop_length))
    assert 0 <= int(codes.min()) <= int(codes.max()) < codec.codebook_size
    rebuilt = codec.decode(codes, 31000)
    assert rebuilt.shape == wav.shape
    padded = torch.nn.functional.pad(wav, (0, -31000 % codec.hop_length))
    if codec.kind == "encodec":
        wide = model.config.target_bandwidths[-1]
        wanted = model(padded, bandwidth=wide).audio_values
    else:
        wanted = model(padded).audio_values
    torch.testing.assert_close(
        rebuilt, wanted.reshape(1, 1, -1)[..., :31000].clamp(-1, 1), atol=1e-4, rtol=1e-3
    )
    vectors = codec.vectors()
    assert len(vectors) == codec.n_q
    assert all(len(v) == codec.codebook_size for v in vectors)
    with pytest.raises(NotImplementedError):
        codec.decode(codes, 31000, first_level=1)
    model.save_pretrained(tmp_path)
    again = bench.load_codec(f"{codec.kind}:{tmp_path}", corpus)
    assert torch.equal(again.encode(wav), codes)
    assert bench.encode_corpus(codec, corpus[:1]).keys() == {corpus.entries[0].id}


def test_load_codec(corpus):
    assert bench.load_codec("speechtokenizer-small", corpus).n_q == 8
    found = bench.load_codec("units:tiny-hubert", corpus, 16)
    assert (found.n_q, found.codebook_size) == (1, 16)
    with pytest.raises(ValueError, match="must be 'encodec'"):
        bench.TransformersCodec(Teacher.untrained(width=16, layers=1).model)


def test_bench_is_resumed_and_tabulated(tmp_path, units, ours, corpus, monkeypatch):
    judges = (
        Recognizer.from_pretrained("character-recognizer"),
        SpeakerEncoder.from_pretrained("speaker-encoder"),
    )
    quick = bench.ReaderConfig(steps=2, width=4, batch_size=4)
    arguments = (corpus, *judges, [(0, 1), (0, 8)], [(0, 1)])
    codecs = {"ours": [ours], "units": [units]}
    result = bench.bench_tokens(codecs, *arguments, 2, quick, tmp_path)
    names = [(row["codec"], row["levels"], row["seed"]) for row in result["rows"]]
    wanted = [("ours", "RVQ-1", 0), ("ours", "RVQ-1:8", 0)]
    wanted += [("ours", "RVQ-1", 1)]  # of one model, the resynthesis is measured once
    assert names == [*wanted, ("units", "RVQ-1", 0), ("units", "RVQ-1", 1)]
    assert "information" in result["rows"][0]
    assert "information" not in result["rows"][1]
    assert "WER resynthesis" in result["rows"][1]
    assert "WER resynthesis" not in result["rows"][2]
    assert "WER resynthesis" not in result["rows"][3]
    with pytest.raises(ValueError, match="2 models for 3 seeds"):
        bench.bench_tokens({"ours": [ours, ours]}, *arguments, 3, quick)
    monkeypatch.setattr(bench, "_one_row", None)  # nothing may be computed again
    again = bench.bench_tokens(codecs, *arguments, 2, quick, tmp_path)
    assert again["rows"] == result["rows"]
    table = bench.benchmark_table(json.loads(json.dumps(result)))
    assert table.count("\n| ours |") == 2
    assert "±" in table
    assert "ceilings" in table
    assert len(bench.plot_benchmark(result).axes) == 4


def test_summary_means_over_seeds():
    rows = [
        {"codec": "a", "levels": "RVQ-1", "seed": s, "similarity": v} for s, v in enumerate((1, 3))
    ]
    found = bench.summarise({"rows": rows})["a", "RVQ-1"]["similarity"]
    assert (found.value, found.count) == (2, 2)


@pytest.mark.parametrize("text", ["", "0", "3:2", "x", "1:", "-1"])
def test_bad_levels(text):
    if text == "1:":
        assert bench.parse_levels(text) == [(0, 1)]
        return
    with pytest.raises(ValueError, match="levels"):
        bench.parse_levels(text)
