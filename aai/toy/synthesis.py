"""Synthesises the sound of scenes: one voice per object and one bed per ambience, by plain signal processing.

All content lies below 8 kHz, so 16 kHz carries everything. Voices and beds are brought to a fixed level: the
object's level follows the scene's size, the ambience's does not. Pitch, rate of events, timbre and reverberation are
the scene's; they change the voice and leave the bed alone. Two objects sound one after the other.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.signal
from numpy.typing import NDArray

from aai.toy.grammar import TWO_RATE, Scene

Signal = NDArray[np.float64]
Rng = np.random.Generator
Bed = Callable[[Rng, Signal, int], Signal]
"""(random generator, time axis in seconds [S], sample rate in Hz) -> sound of any level [S]."""

OBJECT_DB = (-36.0, -18.0)
"""rms level of the object at size 0 and at size 1, dB full scale."""
AMBIENCE_DB = {"clear": -52.0, "rain": -38.0, "night": -38.0, "snow": -37.0}
"""rms level of each ambience, dB full scale."""
PITCH_OCTAVES = 2.0
"""From the lowest pitch of an object's voice to the highest."""
SLOWEST = 4.9
"""How many times as long the time between two events is at rate 0 as at rate 1."""
RT60_S, DRR_DB = (0.5, 0.8), (-5.0, 0.0)
"""Under an arch: time in which the room's sound decays by 60 dB, and level of the direct sound above the room's."""
MAX_CREST = 5.0
"""An object's peaks are rounded off above this multiple of its rms, so that loud clicks do not clip."""


@dataclass(frozen=True)
class Manner:
    """How an object sounds: what its base pitch, and the time between its events, are multiplied with."""

    pitch: float
    period: float

    @classmethod
    def of(cls, pitch: float, rate: float) -> "Manner":
        """From a scene's values of 0 to 1."""
        return cls(2 ** (PITCH_OCTAVES * (pitch - 0.5)), SLOWEST ** (0.5 - rate))


Voice = Callable[[Rng, Signal, int, Manner], Signal]
"""(random generator, time axis in seconds [S], sample rate in Hz, manner) -> sound of any level [S]."""


# ---------------------------------------------------------------- building blocks


def _band(rng: Rng, num_samples: int, sample_rate_hz: int, low_hz: float, high_hz: float, tilt: float = 0.0) -> Signal:
    """Gaussian noise between two frequencies with soft edges; its amplitude goes as frequency ** tilt."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    f = np.fft.rfftfreq(num_samples, 1 / sample_rate_hz) + 1e-3
    below, above = np.square(low_hz / f), np.square(f / high_hz)
    shape = 1 / ((1 + below * below * below) * (1 + above * above * above))
    if tilt:
        shape *= (f / low_hz) ** tilt
    return np.fft.irfft(spectrum * shape, num_samples)


def _harmonics(phase: Signal, amplitudes: Sequence[float] | Signal, decay: Signal | None = None) -> Signal:
    """Sum of sines at whole multiples of a phase in radians; harmonic k is damped by `decay` ** k.

    Powers of one complex exponential: a multiplication per harmonic instead of a sine.
    """
    step = np.exp(1j * phase) if decay is None else decay * np.exp(1j * phase)
    power, out = np.ones_like(step), np.zeros_like(phase)
    for amplitude in amplitudes:
        power *= step
        out += amplitude * power.imag
    return out


def _phase(frequency_hz: Signal, sample_rate_hz: int) -> Signal:
    """The running phase of a gliding tone."""
    return 2 * np.pi * np.cumsum(frequency_hz) / sample_rate_hz


def _events(
    rng: Rng,
    t: Signal,
    sample_rate_hz: int,
    starts_s: Sequence[float],
    length_s: float,
    make: Callable[[Rng, Signal, int], Signal],
) -> Signal:
    """Adds one sound per start time, each made by `make(rng, time of the event, its number)`."""
    out = np.zeros_like(t)
    for number, start_s in enumerate(starts_s):
        first = round(start_s * sample_rate_hz)
        local = t[: max(0, min(round(length_s * sample_rate_hz), len(t) - first))]
        if len(local):
            out[first : first + len(local)] += make(rng, local, number)
    return out


def _starts(rng: Rng, t: Signal, sample_rate_hz: int, every_s: float, jitter_s: float) -> list[float]:
    """Roughly regular start times over the whole clip."""
    end_s = len(t) / sample_rate_hz
    grid = np.arange(rng.uniform(0.0, 0.5) * every_s, end_s, every_s)
    return [max(0.0, s) for s in grid + rng.uniform(-jitter_s, jitter_s, len(grid))]


def _swell(t: Signal, length_s: float) -> Signal:
    """A bell-shaped envelope over an event."""
    return np.sin(np.pi * np.clip(t / length_s, 0, 1)) ** 0.7


# ---------------------------------------------------------------- objects


def _dog(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """Barks: a falling harsh harmonic tone with breath noise."""
    pitch = 395 * how.pitch * rng.uniform(0.98, 1.02)

    def bark(rng: Rng, t: Signal, _: int) -> Signal:
        phase = _phase(pitch * rng.uniform(0.93, 1.07) * (1.15 - 1.6 * t), rate)
        tone = _harmonics(phase, (0.6, 1.0, 0.9, 0.6, 0.4, 0.25, 0.15))
        breath = 1.3 * _band(rng, len(t), rate, 500, 2200)
        return (tone + breath) * np.exp(-t / 0.09) * (1 - np.exp(-t / 0.006))

    return _events(rng, t, rate, _starts(rng, t, rate, 0.5 * how.period, 0.05 * how.period), 0.26, bark)


def _bell(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """Strikes: the inharmonic partials of a church bell, the high ones dying first."""
    pitch = 570 * how.pitch * rng.uniform(0.98, 1.02)
    multiples = (0.5, 1.0, 1.2, 1.5, 2.0, 2.66, 3.01, 4.1)
    amplitudes = (0.5, 1.0, 0.8, 0.5, 0.9, 0.4, 0.4, 0.25)

    def strike(rng: Rng, t: Signal, _: int) -> Signal:
        return sum(
            (
                a * rng.uniform(0.7, 1.3) * np.exp(-t * (1.2 + 0.9 * m)) * np.sin(2 * np.pi * pitch * m * t)
                for m, a in zip(multiples, amplitudes, strict=True)
            ),
            np.zeros_like(t),
        )

    return _events(rng, t, rate, _starts(rng, t, rate, 0.75 * how.period, 0.06 * how.period), 3.0, strike)


def _car(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """An engine that revs up and down (harmonics of a low firing rate over rolling noise), and a horn of two tones."""
    pedal = np.sin(2 * np.pi * 1.1 / how.period * t + rng.uniform(0, 6.3))
    revs = 62 * how.pitch * rng.uniform(0.98, 1.02) * (1 + 0.28 * pedal)
    tone = _harmonics(_phase(revs, rate), 1 / np.arange(1, 15) ** 0.6)
    horn_hz = 430 * how.pitch * rng.uniform(0.98, 1.02)

    def honk(rng: Rng, t: Signal, _: int) -> Signal:
        tones = sum(_harmonics(2 * np.pi * horn_hz * m * t, (1.0, 0.7, 0.5, 0.3)) for m in (1.0, 1.26))
        return 1.5 * tones * _swell(t, 0.16)

    honks = _events(rng, t, rate, _starts(rng, t, rate, 0.5 * how.period, 0.04 * how.period), 0.16, honk)
    return (
        honks + 0.4 * (tone + 14 * _band(rng, len(t), rate, 60 * how.pitch, 400 * how.pitch)) * (revs / revs.max()) ** 2
    )


def _bird(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """Chirps: short arcs of a nearly pure high tone, in groups."""
    pitch, rise = 2600 * how.pitch * rng.uniform(0.98, 1.02), 600 * how.pitch
    groups = _starts(rng, t, rate, 0.55 * how.period, 0.05 * how.period)
    starts: list[float] = []
    for group in groups:
        starts += [group, group + 0.12]

    def chirp(rng: Rng, t: Signal, _: int) -> Signal:
        arc = _swell(t, 0.09)
        return arc * _harmonics(_phase(pitch + rise * arc * rng.uniform(0.7, 1.2), rate), (1.0,))

    return _events(rng, t, rate, starts, 0.09, chirp)


def _clock(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """Tick and tock: two short clicks of a small resonant case."""
    case_hz = 1300 * how.pitch * rng.uniform(0.98, 1.02)

    def tick(rng: Rng, t: Signal, number: int) -> Signal:
        f = case_hz * (1.0 if number % 2 else 1.3) * rng.uniform(0.99, 1.01)
        ring = np.sin(2 * np.pi * f * t) + 0.6 * np.sin(2 * np.pi * 2.7 * f * t)
        return np.exp(-t / 0.014) * (ring + 0.7 * rng.standard_normal(len(t)) * np.exp(-t / 0.004))

    return _events(rng, t, rate, _starts(rng, t, rate, 0.26 * how.period, 0.008), 0.09, tick)


def _guitar(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """A plucked arpeggio: harmonics that die faster the higher they are."""
    root = 180 * how.pitch * rng.uniform(0.98, 1.02)
    chord = root * np.array([1.0, 1.26, 1.5, 2.0])
    order = rng.permutation(8) % 4
    pluck_at = rng.uniform(0.15, 0.3)

    def pluck(rng: Rng, t: Signal, number: int) -> Signal:
        k = np.arange(1, 11)
        phase = 2 * np.pi * chord[order[number % 8]] * rng.uniform(0.997, 1.003) * t
        body = _harmonics(phase, np.abs(np.sin(np.pi * k * pluck_at)) / k**0.9, decay=np.exp(-0.8 * t))
        return body * np.exp(-2.2 * t)

    return _events(rng, t, rate, _starts(rng, t, rate, 0.31 * how.period, 0.02 * how.period), 1.0, pluck)


def _siren(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """A wail: a bright tone that sweeps up and down without a break."""
    sweep = np.sin(2 * np.pi * 1.0 / how.period * t + rng.uniform(0, 6.3))
    frequency = 940 * how.pitch * rng.uniform(0.98, 1.02) * 2 ** (0.55 * sweep)
    return _harmonics(_phase(frequency, rate), (1.0, 0.55, 0.4, 0.2, 0.12)) * (1 + 0.5 * sweep)


def _frog(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """Croaks: a low voice chopped into pulses, the second half of each croak higher."""
    pitch, pulses_hz = 220 * how.pitch * rng.uniform(0.98, 1.02), rng.uniform(32, 44)

    def croak(rng: Rng, t: Signal, _: int) -> Signal:
        step = np.where(t > 0.16, 1.35, 1.0) * pitch * rng.uniform(0.95, 1.05)
        tone = _harmonics(_phase(step, rate), (0.5, 0.7, 1.0, 0.8, 0.5, 0.3))
        return tone * (0.5 + 0.5 * np.sin(2 * np.pi * pulses_hz * t)) ** 3 * _swell(t, 0.34)

    return _events(rng, t, rate, _starts(rng, t, rate, 0.6 * how.period, 0.05 * how.period), 0.34, croak)


def _drum(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """A beat: a falling low thud and a noisy snare in turn."""
    thud_hz, snare_gain = 85 * how.pitch * rng.uniform(0.98, 1.02), rng.uniform(0.7, 1.0)

    def hit(rng: Rng, t: Signal, number: int) -> Signal:
        if number % 2 == 0:
            return 1.6 * np.sin(_phase(thud_hz * (1 + 1.8 * np.exp(-t / 0.03)), rate)) * np.exp(-t / 0.1)
        snare = 1.6 * _band(rng, len(t), rate, 900 * how.pitch, 4000 * how.pitch) + 0.6 * np.sin(
            2 * np.pi * 190 * how.pitch * t
        )
        return snare_gain * snare * np.exp(-t / 0.06)

    return _events(rng, t, rate, _starts(rng, t, rate, 0.29 * how.period, 0.01), 0.3, hit)


def _train(rng: Rng, t: Signal, rate: int, how: Manner) -> Signal:
    """A steam engine: quick low chugs and a whistle of three steady tones."""
    root, start_s = 580 * how.pitch * rng.uniform(0.98, 1.02), rng.uniform(0.1, 0.7)

    def chug(rng: Rng, t: Signal, number: int) -> Signal:
        strength = 1.3 if number % 4 == 0 else 0.9
        return (
            strength
            * _band(rng, len(t), rate, 90 * how.pitch, 700 * how.pitch)
            * np.exp(-t / 0.05)
            * (1 - np.exp(-t / 0.01))
        )

    def whistle(rng: Rng, t: Signal, _: int) -> Signal:
        tones = sum(_harmonics(2 * np.pi * root * m * t, (1.0, 0.4)) for m in (1.0, 1.19, 1.41))
        return 0.11 * (tones + 1.5 * _band(rng, len(t), rate, 1500, 4000)) * _swell(t, 0.8)

    chugs = _events(rng, t, rate, _starts(rng, t, rate, 0.16 * how.period, 0.006), 0.14, chug)
    return chugs + _events(rng, t, rate, [start_s], 0.8, whistle)


# ---------------------------------------------------------------- ambiences


def _clear(rng: Rng, t: Signal, rate: int) -> Signal:
    """The noise floor of a recorder outdoors."""
    return _band(rng, len(t), rate, 80, 7000, tilt=-0.5)


def _rain(rng: Rng, t: Signal, rate: int) -> Signal:
    """Bright steady noise with single drops."""
    drops = np.zeros(len(t))
    hits = rng.integers(0, len(t), max(1, round(90 * len(t) / rate)))
    drops[hits] = rng.uniform(2, 7, len(hits))
    ring = t[: round(0.004 * rate)]
    click = np.exp(-ring / 0.0009) * np.sin(2 * np.pi * rng.uniform(3200, 4200) * ring)
    return _band(rng, len(t), rate, 700, 7200, tilt=0.1) + np.convolve(drops, click)[: len(t)]


def _night(rng: Rng, t: Signal, rate: int) -> Signal:
    """Crickets: bursts of three pulses of a high tone, a second one farther away."""
    out = 0.04 * _band(rng, len(t), rate, 100, 3000, tilt=-0.5)
    for gain in (1.0, 0.4):
        song_hz, every_s, offset = rng.uniform(4200, 5000), rng.uniform(0.26, 0.4), rng.uniform(0, 0.3)
        inside = (t + offset) % every_s
        pulses = np.clip(np.sin(2 * np.pi * 22 * inside), 0, 1) * (inside < 3 / 22)
        out += gain * pulses * np.sin(2 * np.pi * song_hz * t)
    return out


def _snow(rng: Rng, t: Signal, rate: int) -> Signal:
    """Gusts of dull wind."""
    gust = 1 + 0.7 * np.sin(2 * np.pi * rng.uniform(0.3, 0.7) * t + rng.uniform(0, 6.3))
    return _band(rng, len(t), rate, 150, rng.uniform(420, 560)) * gust


_VOICES: dict[str, Voice] = {
    "dog": _dog,
    "bell": _bell,
    "car": _car,
    "bird": _bird,
    "clock": _clock,
    "guitar": _guitar,
    "siren": _siren,
    "frog": _frog,
    "drum": _drum,
    "train": _train,
}
_BEDS: dict[str, Bed] = {"clear": _clear, "rain": _rain, "night": _night, "snow": _snow}


# ---------------------------------------------------------------- scenes


def _to_level(signal: Signal, level_db: float) -> Signal:
    return signal * (10 ** (level_db / 20) / (np.sqrt(np.mean(signal**2)) + 1e-12))


def _time_axis(duration_s: float, sample_rate_hz: int) -> Signal:
    if duration_s <= 0 or sample_rate_hz < 16000:
        raise ValueError(f"need {duration_s=} > 0 and {sample_rate_hz=} >= 16000")
    return np.arange(round(duration_s * sample_rate_hz)) / sample_rate_hz


@functools.lru_cache(maxsize=2)  # what is heard of a clip also moves its picture
def object_sound(scene: Scene, duration_s: float, sample_rate_hz: int = 16000) -> Signal:
    """The object, or two, alone: [S], rms between `OBJECT_DB` by the scene's size, give or take 1 dB."""
    t = _time_axis(duration_s, sample_rate_hz)
    rng = np.random.default_rng((scene.seed, 10))
    level_db = OBJECT_DB[0] + (OBJECT_DB[1] - OBJECT_DB[0]) * scene.size + rng.uniform(-1, 1)
    unit = _two(rng, t, sample_rate_hz, scene) if scene.second else _one(rng, t, sample_rate_hz, scene, scene.obj)
    if scene.place == "arch":
        unit = _reverberant(rng, unit, sample_rate_hz)
    unit = _to_level(unit, 0.0)
    sound = _to_level(MAX_CREST * np.tanh(unit / MAX_CREST), level_db)
    sound.flags.writeable = False  # whoever asks next gets the same
    return sound


def _one(rng: Rng, t: Signal, rate: int, scene: Scene, name: str) -> Signal:
    """An object's voice in the scene's manner; of two objects, neither is quick or slow."""
    how = Manner.of(scene.pitch, TWO_RATE if scene.second else scene.rate)
    return _to_level(_in_timbre(_VOICES[name](rng, t, rate, how), scene.timbre, rate), 0.0)


def _two(rng: Rng, t: Signal, rate: int, scene: Scene) -> Signal:
    """The first object in the first half, the second in the second."""
    half, parts = len(t) // 2, []
    for name, length in ((scene.obj, half), (str(scene.second), len(t) - half)):
        fade = np.minimum(1.0, (np.arange(length)[::-1] + 1) / (0.02 * rate))  # no click where a sound is cut off
        parts.append(fade * _one(rng, t[:length], rate, scene, name))
    return np.concatenate(parts)


def _in_timbre(signal: Signal, timbre: int, rate: int) -> Signal:
    """As it is, brighter, duller, or hollow (peaks and dips by the octave)."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(signal), 1 / rate), 50.0) / 500)
    gain_db = (0.0 * octaves, 3.0 * octaves, -3.0 * octaves, 9.0 * np.sin(2 * np.pi * 0.9 * octaves))[timbre]
    return np.fft.irfft(np.fft.rfft(signal) * 10 ** (gain_db / 20), len(signal))


def _reverberant(rng: Rng, signal: Signal, rate: int) -> Signal:
    """The sound and that of a room: noise that decays exponentially."""
    rt60_s, drr_db = rng.uniform(*RT60_S), rng.uniform(*DRR_DB)
    t = np.arange(round(rt60_s * rate)) / rate
    response = rng.standard_normal(len(t)) * np.exp(-np.log(1000) * t / rt60_s)
    room = scipy.signal.oaconvolve(signal, response)[: len(signal)]
    return _to_level(signal, drr_db) + _to_level(room, 0.0)


def ambience_sound(scene: Scene, duration_s: float, sample_rate_hz: int = 16000) -> Signal:
    """The ambience alone: [S], at its level of `AMBIENCE_DB`."""
    t = _time_axis(duration_s, sample_rate_hz)
    rng = np.random.default_rng((scene.seed, 11))
    return _to_level(_BEDS[scene.ambience](rng, t, sample_rate_hz), AMBIENCE_DB[scene.ambience])


def synthesise(scene: Scene, duration_s: float, sample_rate_hz: int = 16000) -> NDArray[np.float32]:
    """The sound of a scene: float32 [S] within [-1, 1]. The same scene gives the same sound.

    sample_rate_hz must be at least 16000 (ValueError): the crickets need it.
    """
    mix = object_sound(scene, duration_s, sample_rate_hz) + ambience_sound(scene, duration_s, sample_rate_hz)
    return (mix * min(1.0, 0.98 / np.abs(mix).max())).astype(np.float32)


def level_envelope(audio: NDArray[np.floating], sample_rate_hz: int, times_s: Signal, window_s: float = 0.1) -> Signal:
    """How loud a sound [S] is around each of the times [F], from 0 (its quietest) to 1 (its loudest)."""
    power = np.concatenate([[0.0], np.cumsum(np.asarray(audio, np.float64) ** 2)])
    centres = np.asarray(times_s) * sample_rate_hz
    half = window_s * sample_rate_hz / 2
    first = np.clip(centres - half, 0, len(audio) - 1).astype(int)
    last = np.clip(centres + half, 1, len(audio)).astype(int)
    rms = np.sqrt((power[last] - power[first]) / np.maximum(last - first, 1))
    span = rms.max() - rms.min()
    return (rms - rms.min()) / span if span > 0 else np.zeros_like(rms)
