"""Text to sound: FastSpeech2 and vocoders beside those of transformers, and Griffin-Lim.

    python benchmarks/tts.py [--json] [--quick] [--threads N]

Random weights of equal number on both sides: transformers' FastSpeech2Conformer (about as many
parameters as `FastSpeech2Config.small`) with its HiFi-GAN (about as many as the small vocoder), at
the same 100 phones and 6 frames a phone: the duration predictors are made to say 6. Sounds cannot
be compared, only their lengths. Then the shipped models on a real sentence: seconds of work for a
second of sound (smaller is better), text included, and the time to the first sound of a stream.
"""

from __future__ import annotations

import math

import torch
from common import interleaved, options, report, rows_for
from transformers import (
    FastSpeech2ConformerConfig,
    FastSpeech2ConformerHifiGan,
    FastSpeech2ConformerHifiGanConfig,
    FastSpeech2ConformerModel,
)

from speechlab.tts.fastspeech2 import FastSpeech2, FastSpeech2Config
from speechlab.tts.mels import MelSpec, griffin_lim
from speechlab.tts.synthesis import TextToSpeech
from speechlab.tts.vocoder import FramesConfig, HiFiGANConfig, Vocoder, VocoderConfig

FRAMES = 6  # a phone


def ours() -> tuple[FastSpeech2, Vocoder]:
    """The small sizes, with durations of six frames."""
    model = FastSpeech2(FastSpeech2Config.small(speakers=("one",))).eval()
    out = model.predictors["duration"].out
    torch.nn.init.zeros_(out.weight)
    torch.nn.init.constant_(out.bias, math.log(FRAMES + 1))
    return model, Vocoder(VocoderConfig(net=FramesConfig())).eval()


def theirs() -> tuple[FastSpeech2ConformerModel, FastSpeech2ConformerHifiGan]:
    """The same numbers of parameters, the same frames."""
    block = {"encoder_layers": 3, "decoder_layers": 3, "encoder_linear_units": 192,
             "decoder_linear_units": 192, "encoder_kernel_size": 7, "decoder_kernel_size": 7}
    narrow = {f"{name}_predictor_channels": 96 for name in ("duration", "pitch", "energy")}
    config = FastSpeech2ConformerConfig(
        hidden_size=104, **block, **narrow, pitch_predictor_layers=2, pitch_predictor_kernel_size=3,
        speech_decoder_postnet_units=128, vocab_size=95,
    )  # fmt: skip
    model = FastSpeech2ConformerModel(config).eval()
    torch.nn.init.zeros_(model.duration_predictor.linear.weight)
    torch.nn.init.constant_(model.duration_predictor.linear.bias, math.log(FRAMES + 1))
    vocoder = FastSpeech2ConformerHifiGan(FastSpeech2ConformerHifiGanConfig(
        upsample_initial_channel=128, upsample_rates=[8, 8, 2, 2],
        upsample_kernel_sizes=[16, 16, 4, 4],
    )).eval()  # fmt: skip
    return model, vocoder


def size(*models: torch.nn.Module) -> int:
    """Parameters, with weight norm folded."""
    return sum(p.numel() for m in models for n, p in m.named_parameters() if "original0" not in n)


@torch.inference_mode()
def main() -> None:
    chosen = options(__doc__)
    rounds, count = (1, 10) if chosen.quick else (15, 100)
    torch.manual_seed(0)
    (acoustic, vocoder), (peer, peer_vocoder) = ours(), theirs()
    for one, two in ((acoustic, peer), (vocoder, peer_vocoder)):
        share = size(one) / size(two)
        assert 0.8 < share < 1.25, f"{type(one).__name__}: {size(one)} and {size(two)} parameters"
    numbers = torch.randint(1, 90, (1, count))
    phones, who = torch.stack([numbers, torch.zeros_like(numbers)], dim=1), torch.tensor([0])
    mel = acoustic(phones, who).refined
    drawn = peer(numbers, attention_mask=torch.ones_like(numbers)).spectrogram
    assert mel.shape[-1] == drawn.shape[1] == FRAMES * count
    hifigan = Vocoder(VocoderConfig(net=HiFiGANConfig(channels=128))).fold()
    results = rows_for(f"{count} phones to a mel", interleaved({
        "ours": lambda: acoustic(phones, who),
        "transformers FastSpeech2Conformer": lambda: peer(
            numbers, attention_mask=torch.ones_like(numbers)),
    }, rounds))  # fmt: skip
    results += rows_for(f"mel of {FRAMES * count} frames to sound", interleaved({
        "ours": lambda: vocoder(mel),
        "transformers HiFi-GAN": lambda: peer_vocoder(drawn),
        "our HiFi-GAN": lambda: hifigan(mel),
        "Griffin-Lim, 32 rounds": lambda: griffin_lim(mel, MelSpec()),
    }, rounds))  # fmt: skip
    results += rows_for(f"{count} phones to sound", interleaved({
        "ours": lambda: vocoder(acoustic(phones, who).refined),
        "transformers, both": lambda: peer_vocoder(
            peer(numbers, attention_mask=torch.ones_like(numbers)).spectrogram),
    }, rounds))  # fmt: skip
    tts = TextToSpeech.load()
    text = "The parcel was late, so we waited in the rain until the driver came round the corner."
    seconds = tts.speak(text).shape[-1] / tts.sample_rate
    times = interleaved({
        "ours": lambda: tts.speak(text),
        "first sound of a stream": lambda: next(tts.stream(text)),
    }, rounds)  # fmt: skip
    results += [
        {"case": f"{seconds:.1f} s of speech, shipped models", "ours": times["ours"] / seconds,
         "peer": "real time", "peer_value": 1.0, "unit": "s/s", "ratio": seconds / times["ours"]},
        {"case": "first sound of a stream", "ours": times["first sound of a stream"],
         "peer": "the whole sentence", "peer_value": times["ours"], "unit": "s",
         "ratio": times["ours"] / times["first sound of a stream"]},
    ]  # fmt: skip
    report(results, chosen.json, "transformers")


if __name__ == "__main__":
    main()
