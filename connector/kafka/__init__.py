"""Kafka through librdkafka; the only place that imports `confluent_kafka`.

The producer is idempotent and never gives a message up for being slow: an outage is not a message's fault. The consumer
stores an offset only when told to, after the database has the message.
"""

from confluent_kafka import KafkaError, KafkaException, Message

from connector.kafka.admin import Admin, GroupMember, GroupState, Rights, TopicState
from connector.kafka.already_sent import AlreadySent
from connector.kafka.clients import Kafka
from connector.kafka.copies import Copies, Copy, find_copies
from connector.kafka.dead_letters import DeadLetters, DeadLetterUndelivered
from connector.kafka.deliveries import LARGEST_MESSAGE, Fate, fate_of, headers_of, size_of
from connector.kafka.letter_box import Letter, LetterBox, Sending
from connector.kafka.log_scan import LogScan, Partition, Record
from connector.kafka.options import option_problems
from connector.kafka.publisher import PARTITION_BY_KEY, Publisher
from connector.kafka.reachability import Reachability
from connector.kafka.subscription import Subscription, ends_of

__all__ = [
    "LARGEST_MESSAGE",
    "PARTITION_BY_KEY",
    "Admin",
    "AlreadySent",
    "Copies",
    "Copy",
    "DeadLetterUndelivered",
    "DeadLetters",
    "Fate",
    "GroupMember",
    "GroupState",
    "Kafka",
    "KafkaError",
    "KafkaException",
    "Letter",
    "LetterBox",
    "LogScan",
    "Message",
    "Partition",
    "Publisher",
    "Reachability",
    "Record",
    "Rights",
    "Sending",
    "Subscription",
    "TopicState",
    "ends_of",
    "fate_of",
    "find_copies",
    "headers_of",
    "option_problems",
    "size_of",
]
