"""Sizes of the check on a card, and of its rehearsal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """Presets of make_checkpoint.py, tokens of a row, steps, and where runs compute; one of a rehearsal's does
    on the emulated driver, which takes its time. A model of 32B takes so many bytes, with a margin; a long run
    needs so many seconds, and one of 32B, at least."""

    rehearsal: bool
    deadline_s: float
    preset_8b: str
    preset_32b: str
    curve_preset: str
    length: int
    length_32b: int
    length_long: int
    curve_length: int
    steps: int
    warm_up: int
    curve_steps: int
    curve_learning_rate: str
    budget: str
    bytes_32b: int
    need_long_s: float
    need_32b_s: float
    device: str
    device_checkpoint: str


CARD = Setup(
    rehearsal=False,
    deadline_s=465,
    preset_8b="llama-3.1-8b",
    preset_32b="32b",
    curve_preset="small",
    length=4096,
    length_32b=8192,
    length_long=120_000,
    curve_length=320,
    steps=10,
    warm_up=3,
    curve_steps=200,
    # At three times as much the losses of bf16 and f32 part by chance.
    curve_learning_rate="3e-4",
    budget="23.5GiB",
    bytes_32b=20 << 30,
    need_long_s=150,
    need_32b_s=45,
    device="cuda",
    device_checkpoint="cuda",
)

REHEARSAL = Setup(
    rehearsal=True,
    deadline_s=400,
    preset_8b="tiny",
    preset_32b="tiny",
    curve_preset="tiny",
    length=32,
    length_32b=48,
    length_long=64,
    curve_length=32,
    steps=4,
    warm_up=1,
    curve_steps=30,
    curve_learning_rate="1e-3",
    budget="1GiB",
    bytes_32b=64 << 20,
    need_long_s=20,
    need_32b_s=20,
    device="cpu",
    device_checkpoint="cuda",
)
