"""What Kafka has of the messages that are named, written to a file from which the tables can be mended."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from connector.envelope import outbox_id_of
from connector.errors import ConfigurationError
from connector.kafka import LogScan, Partition


def write_copies(path: Path, scan: LogScan, ranges: Mapping[Partition, tuple[int, int]], ids: Collection[int]) -> int:
    """Write a line of JSON for each copy of these messages; return how many of the messages Kafka has.

    Raises:
        ConfigurationError: the file cannot be written.
        KafkaException, ServiceUnavailable: Kafka does not answer.
    """
    found: set[int] = set()
    try:
        with path.open("w", encoding="utf-8") as file:
            for records in scan.read(ranges if ids else {}):
                for record in records:
                    outbox_id = outbox_id_of(record.value)
                    if outbox_id is None or outbox_id not in ids or record.value is None:
                        continue
                    found.add(outbox_id)
                    topic, partition = record.partition
                    place = {
                        "topic": topic,
                        "partition": partition,
                        "offset": record.offset,
                        "key": (record.key or b"").decode("utf-8", "replace"),
                    }
                    # As it stands: read and written again, long numbers would be others. Between tokens a line may end.
                    copy = record.value.decode("utf-8", "replace").replace("\n", " ").replace("\r", " ")
                    file.write(f'{json.dumps(place, ensure_ascii=False)[:-1]}, "copy": {copy}}}\n')
    except OSError as error:
        raise ConfigurationError([f"--copies {path}: cannot be written: {error.strerror}"]) from None
    return len(found)
