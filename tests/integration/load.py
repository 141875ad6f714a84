"""Sends requests at an even rate until its standard input ends: SERVERS TOPIC KEYS PER_SECOND.

A process of its own: it keeps its rate whatever the test's own Python does meanwhile.
"""

import json
import select
import sys
import time

from kafka import KafkaProducer


def main() -> None:
    """Request i has the id `r<i>` and the key `s<i % KEYS>`; all are sent when it ends."""
    servers, topic, keys, per_s = sys.argv[1:]
    producer = KafkaProducer(bootstrap_servers=servers)
    began, sent = time.monotonic(), 0
    while not select.select([sys.stdin], [], [], max(0.0, began + sent / int(per_s) - time.monotonic()))[0]:
        value = {"request_id": f"r{sent}", "session_id": f"s{sent % int(keys)}"}
        producer.send(topic, value=json.dumps(value).encode())
        sent += 1
    producer.close()


if __name__ == "__main__":
    main()
