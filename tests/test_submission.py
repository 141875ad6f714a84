"""What is said of a cluster's other jobs and of its slots; asking it is tested in integration."""

import pytest

from flink_llm.errors import ConfigError
from flink_llm.submission import check_name, check_slots


def test_a_job_of_the_same_name_is_named_with_what_to_do():
    jobs = [("other", "1" * 32, "RUNNING"), ("chat", "2" * 32, "RESTARTING")]
    check_name("new", jobs)
    with pytest.raises(
        ConfigError, match=r"^name: a job 'chat' is on this cluster already \(2{32}, RESTARTING\).*: stop"
    ):
        check_name("chat", jobs)


def test_fewer_slots_than_subtasks_are_refused_unless_the_scheduler_makes_do():
    check_slots(4, 4, adaptive=False)
    check_slots(5, 4, adaptive=True)
    with pytest.raises(ConfigError, match=r"^flink.parallelism is 5, the cluster has 4 slots: .*numberOfTaskSlots"):
        check_slots(5, 4, adaptive=False)
