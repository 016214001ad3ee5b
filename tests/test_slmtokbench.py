"""SLMTokBench: adapters, readers, Eq. 1, tables."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same_codes import assert_same_codes

from speechlab.foundations.audio import resample
from speechlab.foundations.columns import Values, codes_column, with_column
from speechlab.foundations.contracts import CodeSpec
from speechlab.foundations.ctc import ctc_symbols, spoken, symbols_column
from speechlab.foundations.judges import Recognizer, SpeakerEncoder
from speechlab.tokenizer import benchmark as bench
from speechlab.tokenizer.codecs import TransformersCodec, UnitsCodec, load_codec
from speechlab.tokenizer.speech_tokenizer import SpeechTokenizer
from speechlab.tokenizer.teachers import MFCC, Teacher, Units


@pytest.fixture(scope="module", autouse=True)
def own_cache(corpus, tmp_path_factory):
    """Columns of this module are computed here, not found in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEECHLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def ours():
    return SpeechTokenizer.load("speechtokenizer-small")


@pytest.fixture(scope="module")
def coded(ours, corpus):
    return bench.with_codes(ours, corpus)


@pytest.fixture(scope="module")
def units(corpus):
    return UnitsCodec(Units.fit(Teacher.untrained(width=16, layers=1), corpus[:6], 16))


def test_codes_and_symbols_are_those_of_each_recording(ours, coded, corpus):
    assert coded.columns["codes"].spec == ours.spec
    symbols = ctc_symbols(corpus, "characters")
    for utterance in corpus.split("test")[:3]:
        codes = coded.columns["codes"].cut(utterance.id)
        assert_same_codes(ours, utterance.wav, codes[None])
        numbers = coded.columns["symbols"].cut(utterance.id).tolist()
        assert [symbols[n - 1] for n in numbers] == spoken(utterance.entry, "characters")
    phones = bench.with_codes(ours, corpus[:2], "phones").columns["symbols"]
    wanted, entry = ctc_symbols(corpus[:2]), corpus.entries[1]
    assert [wanted[n - 1] for n in phones.cut(entry.id).tolist()] == spoken(entry)


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
def test_embeddings_start_where_they_say(ours, coded, embedding):
    config = bench.ReaderConfig(
        steps=1, width=4, batch_size=4, embedding=embedding, learning_rate=0
    )
    reader = bench.train_reader(ours, coded, (0, 2), config)
    assert len(reader.tables) == 2
    table = reader.tables[0].weight.detach()
    assert float(table.square().mean()) == pytest.approx(1, rel=0.01)
    assert table.mean(dim=0).abs().max() < 1e-3
    own = ours.codebooks()[0] - ours.codebooks()[0].mean(dim=0)
    if embedding == "codebook":
        torch.testing.assert_close(table, own / own.square().mean().sqrt(), rtol=1e-3, atol=1e-3)
    sizes = {"codebook": 64, "centroids": 80, "random": 64}
    assert table.shape == (256, sizes[embedding])
    with pytest.raises(ValueError, match="embedding is 'x'"):
        bench.ReaderConfig(embedding="x")


def test_centroids_are_mean_mels(ours, coded, corpus):
    from speechlab.foundations.audio import log_mel

    tokens = {e.id: coded.columns["codes"].cut(e.id) for e in corpus.entries}
    (table,) = bench.reader_tables(ours, (0, 1), "centroids", coded)
    code = int(torch.bincount(torch.cat([t[0] for t in tokens.values()])).argmax())
    rows = []
    for u in corpus.split("train"):
        mel = log_mel(u.wav, 16000, hop_length=320, floor=1e-2)[0].T
        rows += [mel[t] for t, c in enumerate(tokens[u.id][0, : len(mel)]) if int(c) == code]
    torch.testing.assert_close(table[code], torch.stack(rows).mean(dim=0), rtol=1e-3, atol=1e-4)


def test_a_reader_learns_what_tokens_say(corpus):
    """Tokens that spell the text are read; tokens of other utterances are not."""

    class Speller:
        spec = CodeSpec(30, 1)

        def codebooks(self):
            return [torch.eye(30)]

    symbols = ctc_symbols(corpus, "characters")
    number = {s: i + 1 for i, s in enumerate(symbols)}
    tokens = {}
    for entry in corpus.entries:
        path = [n for s in spoken(entry, "characters") for n in (number[s], 0)]
        tokens[entry.id] = torch.tensor([path], dtype=torch.int16).numpy()
    corpus = with_column(corpus, symbols_column(symbols, "characters"), "")
    corpus = corpus.with_values("codes", Values(tokens))
    config = bench.ReaderConfig(steps=150, width=24, batch_size=8, learning_rate=1e-2)
    reader = bench.train_reader(Speller(), corpus, (0, 1), config)
    test = corpus.split("test")
    good = bench.text_alignment(reader, test, (0, 1), symbols)
    names = [e.id for e in test.entries]
    wrong = tokens | dict(zip(names, [tokens[n] for n in names[1:] + names[:1]]))
    bad = bench.text_alignment(reader, test.with_values("codes", Values(wrong)), (0, 1), symbols)
    assert good.cer.value < 0.5 < bad.cer.value
    assert good.information > 20
    assert bad.information < good.information / 4


def test_preservation_of_everything_and_of_one_level(ours, coded, corpus):
    part, tokens = corpus.split("test")[:4], coded.split("test")[:4]
    reader, voice = (
        Recognizer.load("phone-recognizer"),
        SpeakerEncoder.load("speaker-encoder"),
    )
    one, all_levels = (
        bench.preservation(ours, tokens, part, levels, reader, voice) for levels in ((0, 1), (0, 8))
    )
    assert one.keys() == all_levels.keys() == {"PER", "similarity"}
    assert all_levels["similarity"] > one["similarity"]
    second = bench.preservation(ours, tokens, part, (1, 2), reader, voice)
    assert second["PER"] > one["PER"]  # level 2 alone: what level 1 left over


def test_preservation_hides_no_faults(ours, coded, corpus):
    """A judge that fails is no codec that cannot decode."""

    class Broken:
        sample_rate = 16000

        def transcribe(self, *_):
            raise TypeError("a fault of the judge")

    part, tokens = corpus.split("test")[:2], coded.split("test")[:2]
    with pytest.raises(TypeError, match="a fault of the judge"):
        bench.preservation(ours, tokens, part, (0, 1), Broken(), None)


def test_a_reader_spells_what_the_corpus_holds(ours, coded):
    with pytest.raises(ValueError, match="holds characters, the reader is to spell phones"):
        bench.train_reader(ours, coded, config=bench.ReaderConfig(steps=2, width=4, units="phones"))


def test_units_of_other_features_have_other_codes(corpus):
    """The centres alone do not tell what a unit means."""
    one = Units.fit(MFCC(), corpus[:4], 8)
    for other in (
        Units(MFCC(normalise=False), one.mean, one.scale, one.centres),
        Units(MFCC(), one.mean + 1, one.scale, one.centres),
    ):
        keys = [codes_column(UnitsCodec(units)).key for units in (one, other)]
        assert keys[0] != keys[1]
    assert codes_column(UnitsCodec(copy.deepcopy(one))).key == codes_column(UnitsCodec(one)).key


def test_units_cannot_be_decoded(units, corpus):
    part = corpus.split("test")[:2]
    tokens = bench.with_codes(units, part)
    assert tokens.columns["codes"].cut(part.entries[0].id).shape[0] == 1
    reader = Recognizer.load("phone-recognizer")
    assert bench.preservation(units, tokens, part, (0, 1), reader, None) == {}
    assert units.codebooks()[0].shape[0] == units.spec.codebook_size == 16


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
    codec = TransformersCodec(model)
    spec = codec.spec
    wav = 0.1 * torch.randn(1, 1, 31000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    codes = codec.encode(wav)
    assert codes.shape == (1, spec.n_q, -(-31000 // spec.hop_length))
    assert 0 <= int(codes.min()) <= int(codes.max()) < spec.codebook_size
    rebuilt = codec.decode(codes, 31000)
    assert rebuilt.shape == wav.shape
    padded = torch.nn.functional.pad(wav, (0, -31000 % spec.hop_length))
    if codec.kind == "encodec":
        wide = model.config.target_bandwidths[-1]
        wanted = model(padded, bandwidth=wide).audio_values
    else:
        wanted = model(padded).audio_values
    torch.testing.assert_close(
        rebuilt, wanted.reshape(1, 1, -1)[..., :31000].clamp(-1, 1), atol=1e-4, rtol=1e-3
    )
    vectors = codec.codebooks()
    assert len(vectors) == spec.n_q
    assert all(len(v) == spec.codebook_size for v in vectors)
    with pytest.raises(TypeError, match="first_level"):  # it decodes from the first level on
        codec.decode(codes, 31000, first_level=1)
    with pytest.raises(NotImplementedError):
        codec.decode(codes, 31000, mask=torch.ones(codes.shape[::2], dtype=torch.bool))
    model.save_pretrained(tmp_path)
    again = load_codec(f"{codec.kind}:{tmp_path}", corpus)
    assert torch.equal(again.encode(wav), codes)
    assert replace(again.spec, name=spec.name) == spec
    part = corpus[:1]
    coded = bench.with_codes(codec, part)
    assert coded.sample_rate == spec.sample_rate
    values = coded.columns["codes"]
    assert values.rows.keys() == {part.entries[0].id}
    moved = resample(part[0].wav, 16000, spec.sample_rate)
    assert torch.equal(values.cut(part.entries[0].id)[None], codec.encode(moved))
    reader = Recognizer.load("phone-recognizer")
    assert bench.preservation(codec, coded, part, (0, 1), reader, None).keys() == {"PER"}
    assert bench.preservation(codec, coded, part, (1, 2), reader, None) == {}


def test_load_codec(corpus):
    assert load_codec("speechtokenizer-small", corpus).spec.n_q == 8
    found = load_codec("units:tiny-hubert", corpus, 16)
    assert (found.spec.n_q, found.spec.codebook_size) == (1, 16)
    with pytest.raises(ValueError, match="fitted on a corpus"):
        load_codec("units:tiny-hubert")
    with pytest.raises(ValueError, match="must be 'encodec'"):
        TransformersCodec(Teacher.untrained(width=16, layers=1).model)


def test_bench_is_resumed_and_tabulated(tmp_path, units, ours, corpus, monkeypatch):
    judges = (
        Recognizer.load("character-recognizer"),
        SpeakerEncoder.load("speaker-encoder"),
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
    with pytest.raises(TypeError):  # another reader: its rows are not there
        bench.bench_tokens(codecs, *arguments, 2, replace(quick, width=5), tmp_path)
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
