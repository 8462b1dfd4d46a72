"""TensorBoard: event files in ``run_dir/tensorboard``, one folder for the server and one for the
trainer. Tables and alerts are texts there; bundles are not kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.schema import Settings
from reporting.interface import WriterKind
from reporting.records import Alert, Bundle, Figures, Greeting, Row

FOLDER = "tensorboard"


class TensorboardWriter:
    """Implements ``Writer``. The step of a point is its time in whole seconds, so that curves of
    server and trainer lie over each other by step as well as by wall time."""

    def __init__(self, greeting: Greeting) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2
        self._tensor: Any = lambda data: tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[data.encode()]
        )
        folder = Path(greeting.folder) / FOLDER / greeting.role
        self._files: Any = EventFileWriter(str(folder))

    def figures(self, record: Figures) -> None:
        value = self._summary.Summary.Value
        self._add(
            record.unix_s,
            [value(tag=tag, simple_value=number) for tag, number in record.values.items()],
        )

    def row(self, record: Row) -> None:
        self._add_text(record.unix_s, record.table, json.dumps(record.cells))

    def alert(self, record: Alert) -> None:
        self._add_text(record.unix_s, "alerts", f"{record.title}: {record.text}")

    def bundle(self, record: Bundle) -> None:
        """Nothing: TensorBoard keeps no weights."""

    def close(self) -> None:
        self._files.close()

    def _add_text(self, unix_s: float, tag: str, text: str) -> None:
        data = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self._summary.SummaryMetadata(plugin_data=data)
        self._add(
            unix_s,
            [self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=self._tensor(text))],
        )

    def _add(self, unix_s: float, values: list[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._files.add_event(self._event(wall_time=unix_s, step=int(unix_s), summary=summary))
        self._files.flush()


def _asked_by(settings: Settings) -> str | None:
    return "tensorboard.enabled" if settings.tensorboard.enabled else None


KIND = WriterKind(
    extra="tensorboard",
    module="tensorboard",
    asked_by=_asked_by,
    section=lambda settings: settings.tensorboard.model_dump(mode="json"),
    open=TensorboardWriter,
    where=lambda settings: f"tensorboard --logdir {settings.run_dir / FOLDER}",
)
