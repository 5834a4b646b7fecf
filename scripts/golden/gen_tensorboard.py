"""An event file by TensorBoard's own writer, with fixed times.  usage: gen_tensorboard.py OUT  (needs `tensorboard`)"""
import sys

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def summary(scalars):
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])


EVENTS = [
    Event(wall_time=1_700_000_000.5, file_version="brain.Event:2"),
    Event(wall_time=1_700_000_001.0, step=0, summary=summary({"eval/loss": 3.25})),
    Event(
        wall_time=1_700_000_002.25,
        step=300,
        summary=summary(
            {
                "train/loss": 2.5,
                "train/learning_rate": 2e-4,
                "train/grad_norm": 0.75,
                "train/epoch": 1.25,
                "perf/tokens_per_second": 203.5,
                "perf/rss_bytes": float(3 << 30),
            }
        ),
    ),
]

with open(sys.argv[1], "wb") as file:
    writer = RecordWriter(file)
    for event in EVENTS:
        writer.write(event.SerializeToString())
