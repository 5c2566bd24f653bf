"""Whether Kafka answers, asked only when somebody doubts it."""

from __future__ import annotations

import threading
import time

from confluent_kafka import KafkaException

from connector.kafka.clients import Kafka


class Reachability(threading.Thread):
    """Knows whether Kafka answers; asks only when somebody has a doubt, so that an idle process stays idle."""

    def __init__(self, kafka: Kafka) -> None:
        """Prepare the thread, which begins with a doubt."""
        super().__init__(name="kafka-reachability", daemon=True)
        self.admin = kafka.admin()
        """Fit for any thread, and connected already once Kafka has answered."""
        self._answered = threading.Event()
        self._doubted = threading.Event()
        self._doubted.set()
        self._closed = False
        self.problem: str | None = "Kafka was not reached yet"
        """Why Kafka counts as away; None while it answers."""

    def doubt(self, _error: object = None) -> None:
        """Ask Kafka whether it is there; fits as librdkafka's `error_cb`."""
        self._doubted.set()

    def await_answer(self, seconds: float) -> None:
        """Return once Kafka answers, or after so long."""
        self._answered.wait(seconds)

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._doubted.set()

    def run(self) -> None:
        """Ask at each doubt, until an answer comes."""
        while True:
            self._doubted.wait()
            if self._closed:
                return
            self._doubted.clear()
            try:
                self.admin.topics(timeout=3)
                self.problem = None
                self._answered.set()
            except KafkaException as error:
                self.problem = f"Kafka does not answer: {self.admin.trouble() or error.args[0].str()}"
                self._answered.clear()
                self._doubted.set()
                time.sleep(0.5)
