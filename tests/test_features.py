"""Features, read through a real Feast with a real sqlite file or a real redis-server."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flink_llm.breakers import Breakers, BreakerSettings
from flink_llm.errors import CircuitOpen, ConfigError, Outage, RecordError
from flink_llm.feature_admin import apply_repo, describe, fill_demo
from flink_llm.feature_config import repo_config
from flink_llm.feature_keys import KeyField
from flink_llm.feature_row import FeatureRow
from flink_llm.feature_settings import FeatureSettings
from flink_llm.feature_store import disconnect
from flink_llm.features import FeatureClient
from flink_llm.local import demo_data
from flink_llm.services import RealServices, ServiceSettings

REPO = Path(__file__).parent.parent / "feature_repo"
ORDERS = {row["order_id"]: row for row in demo_data.orders()}
CUSTOMERS = {row["user_id"]: row for row in demo_data.customers()}

COMPUTED_REPO = """
from datetime import timedelta
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
batch = FileSource(name="f", path="x.parquet", timestamp_field="event_timestamp")
source = PushSource(name="s", batch_source=batch)
price = FeatureView(name="price", entities=[item], ttl=timedelta(hours=1), source=source,
    schema=[Field(name="item_id", dtype=Int64), Field(name="cents", dtype=Int64)])
twin = FeatureView(name="twin", entities=[item], source=source,
    schema=[Field(name="item_id", dtype=Int64), Field(name="cents", dtype=Int64)])
basket = RequestSource(name="basket", schema=[Field(name="count", dtype=Int64)])

@on_demand_feature_view(sources=[price, basket], schema=[Field(name="each", dtype=Int64)], mode="python")
def share(inputs):
    class OfItsOwn(Exception):
        pass

    errors = {-1: RuntimeError, -2: AssertionError, -3: NotImplementedError, -4: OfItsOwn, -5: ConnectionError}
    for count in inputs["count"]:
        if count in errors:
            raise errors[count]("of one record")
    return {"each": [cents // count for cents, count in zip(inputs["cents"], inputs["count"])]}

both = FeatureService(name="both", features=[price, twin])
"""

MIXED_REPO = """
from datetime import timedelta
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Int64, String

item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
batch = FileSource(name="f", path="x.parquet", timestamp_field="event_timestamp")
source = PushSource(name="s", batch_source=batch)
number, name = Field(name="item_id", dtype=Int64), Field(name="user_id", dtype=String)
price = FeatureView(name="price", entities=[item], ttl=timedelta(days=30), source=source,
    schema=[number, Field(name="cents", dtype=Int64)])
stock = FeatureView(name="stock", entities=[item], ttl=timedelta(hours=1), source=source,
    schema=[number, Field(name="pieces", dtype=Int64)])
owner = FeatureView(name="owner", entities=[item], source=source, schema=[number, name])
profile = FeatureView(name="profile", entities=[user], source=source, schema=[name, Field(name="tier", dtype=String)])
unheld = [FeatureView(name="unheld", entities=[item], source=source, schema=[number, Field(name="n", dtype=Int64)])]

@on_demand_feature_view(sources=[price, stock], schema=[Field(name="worth", dtype=Int64)], mode="python")
def value(inputs):
    return {"worth": [cents * pieces for cents, pieces in zip(inputs["cents"], inputs["pieces"])]}

owner_first = FeatureService(name="owner_first", features=[owner, profile])
profile_first = FeatureService(name="profile_first", features=[profile, owner])
lost = FeatureService(name="lost", features=unheld)
"""

ON_DEMAND_OF_UNHELD = """
@on_demand_feature_view(sources=unheld, schema=[Field(name="twice", dtype=Int64)], mode="python")
def doubled(inputs):
    return {"twice": [2 * n for n in inputs["n"]]}
"""


def run(test: Callable[[FeatureClient], Awaitable[Any]], where: FeatureSettings, **clocks: Any) -> Any:
    """Runs one test on a client that is closed afterwards."""

    async def main() -> Any:
        client = FeatureClient(where, **clocks)
        try:
            return await test(client)
        finally:
            await client.close()

    return asyncio.run(main())


def changed(where: FeatureSettings, **fields: Any) -> FeatureSettings:
    return msgspec.structs.replace(where, **fields)


def counted(client: FeatureClient) -> list[int]:
    """The number of keys of each read that reaches Feast's store from now on."""
    sizes: list[int] = []
    online = client.store._store.provider.online_store
    read = online.online_read

    def reading(config: Any, table: Any, entity_keys: Any, requested_features: Any = None) -> Any:
        sizes.append(len(entity_keys))
        return read(config, table, entity_keys, requested_features)

    online.online_read = reading
    return sizes


async def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> FeatureSettings:
    """The shipped repository, applied and filled, with its files in a folder of their own."""
    where = FeatureSettings(repo=str(REPO), state=str(tmp_path_factory.mktemp("shop")))
    apply_repo(where)
    assert fill_demo(where) == {"customer_profile": 200, "order_status": 500}
    return where


@pytest.fixture
def own_shop(shop: FeatureSettings, tmp_path: Path) -> FeatureSettings:
    """A copy of the filled shop that a test may break."""
    shutil.copytree(str(shop.state), tmp_path / "state")
    return changed(shop, state=str(tmp_path / "state"))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> FeatureSettings:
    """A repository with an INT64 key, an on-demand view and a service whose features collide."""
    repo = tmp_path_factory.mktemp("computed")
    (repo / "definitions.py").write_text(COMPUTED_REPO)
    shutil.copy(REPO / "feature_store.yaml", repo)
    where = FeatureSettings(repo=str(repo))
    apply_repo(where)
    write(where, "price", [{"item_id": n, "cents": n * 100} for n in range(1, 6)])
    return where


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> FeatureSettings:
    """A repository of views with several ttls, and of services that no table can be made of."""
    repo = tmp_path_factory.mktemp("mixed")
    (repo / "definitions.py").write_text(MIXED_REPO)
    shutil.copy(REPO / "feature_store.yaml", repo)
    where = FeatureSettings(repo=str(repo))
    apply_repo(where)
    return where


def write(where: FeatureSettings, view: str, rows: list[dict[str, Any]], at: datetime | None = None) -> None:
    import pandas as pd
    from feast import FeatureStore  # slow to import

    frame = pd.DataFrame(rows).assign(event_timestamp=at or datetime.now(UTC))
    store = FeatureStore(config=repo_config(where))
    store.write_to_online_store(view, frame)
    disconnect(store)


def test_a_row_holds_its_keys_and_features(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        row = await client.table("order_status").get(order_id="1042")
        today = datetime.now(UTC).date()
        assert dict(row) == next(r for r in demo_data.orders(today=today) if r["order_id"] == "1042")
        assert row.found and not row.stale
        assert row.age_s is not None and 0 <= row.age_s < 600

    run(test, shop)


def test_a_service_reads_all_its_views(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        chat = client.table("support_chat")
        row = await chat.get(user_id="user-3", order_id=1042)
        assert row["first_name"] == CUSTOMERS["user-3"]["first_name"] and row["carrier"] == ORDERS["1042"]["carrier"]
        assert row["order_id"] == "1042" and row.found
        alone = await chat.get(user_id="user-3", order_id=None)
        assert alone["first_name"] == row["first_name"] and alone["carrier"] is None and not alone.found

    run(test, shop)


def test_what_waits_at_the_same_moment_is_one_read_of_each_view(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        chat, orders = client.table("support_chat"), client.table("order_status")
        await client.start()
        sizes = counted(client)
        ids = list(ORDERS)[:40]
        rows = await asyncio.gather(
            *(chat.get(user_id="user-1", order_id=number) for number in ids),
            *(orders.get(order_id=number) for number in ids),
        )
        assert [row["order_item"] for row in rows] == [ORDERS[number]["order_item"] for number in ids] * 2
        assert sorted(sizes) == [1, 40]

    run(test, changed(shop, batch_window_ms=20))


def test_a_batch_has_a_limit_and_what_comes_during_a_read_shares_the_next(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        await client.start()
        sizes = counted(client)
        await asyncio.gather(*(orders.get(order_id=number) for number in list(ORDERS)[:25]))
        assert sizes == [10, 10, 5]
        read = client.store.read

        def slow(source: str, keys: Any) -> Any:
            time.sleep(0.2)
            return read(source, keys)

        client.store.read = slow  # type: ignore[method-assign]
        del sizes[:]
        first = asyncio.create_task(orders.get(order_id="1042"))
        await asyncio.sleep(0.1)
        late = [asyncio.create_task(orders.get(order_id=number)) for number in list(ORDERS)[:5]]
        await asyncio.sleep(0.02)
        late[3].cancel()
        await asyncio.gather(first, *late, return_exceptions=True)
        assert sizes == [1, 4]

    run(test, changed(shop, batch_limit=10))


@settings(max_examples=30, deadline=None)
@given(
    wanted=st.lists(st.one_of(st.sampled_from(list(ORDERS)), st.text(max_size=8)), max_size=30),
    pauses=st.lists(st.integers(0, 3), max_size=30),
    limit=st.integers(1, 8),
)
def test_each_caller_gets_its_own_row(shop: FeatureSettings, wanted: list[str], pauses: list[int], limit: int) -> None:
    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")

        async def one(number: str, pause: int) -> None:
            await asyncio.sleep(pause / 1000)
            row = await orders.get(order_id=number)
            assert row["order_id"] == number and row.found == (number in ORDERS)
            assert row["order_item"] == ORDERS.get(number, {}).get("order_item")

        waits = pauses + [0] * len(wanted)
        await asyncio.gather(*(one(n, p) for n, p in zip(wanted, waits, strict=False)))

    run(test, changed(shop, batch_limit=limit, batch_window_ms=1))


def test_an_absent_row_has_no_values(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        row = await client.table("order_status").get(order_id="999999999")
        assert (row.found, row.stale, row.age_s, row["carrier"]) == (False, False, None, None)

    run(test, shop)


@pytest.mark.parametrize(
    ("freshness", "days", "found"),
    [({}, 29, True), ({}, 31, False), ({"order_status": 60.0}, 1, False), ({"order_status": 4e6}, 31, True)],
    ids=["within the ttl", "older than the ttl", "older than configured", "configured beyond the ttl"],
)
def test_an_old_row_counts_as_absent(
    shop: FeatureSettings, freshness: dict[str, float], days: int, found: bool
) -> None:
    async def test(client: FeatureClient) -> None:
        row = await client.table("order_status").get(order_id="1042")
        assert row.found is found and row.stale is not found
        assert (row["carrier"] is not None) is found and (row.age_s is not None) is found

    run(test, changed(shop, freshness=freshness), now=lambda: time.time() + days * 86_400)


def test_rows_from_the_future_are_young_and_warned_of_once(
    shop: FeatureSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        assert [(await orders.get(order_id="1042")).age_s for _ in range(2)] == [0.0, 0.0]

    run(test, shop, now=lambda: time.time() - 18_000)
    assert [r.getMessage() for r in caplog.records] == [
        "order_status: rows are dated in the future; do clocks or time zones (TZ) differ?"
    ]


@pytest.mark.parametrize("value", [1.5, True, b"1042", ["1042"], "\ud800", pytest.param(10**5000, id="long int")])
def test_a_key_of_another_type_is_the_records_fault(shop: FeatureSettings, value: Any) -> None:
    async def test(client: FeatureClient) -> None:
        with pytest.raises(RecordError, match="the key order_id must be STRING, got ") as caught:
            await client.table("order_status").get(order_id=value)
        assert caught.value.code == "invalid"

    run(test, shop)


@given(value=st.one_of(st.integers(), st.text(max_size=25), st.booleans(), st.floats(), st.binary()))
def test_a_number_key_takes_whole_numbers_in_range_only(value: Any) -> None:
    field = KeyField("n", "int64_val")
    whole = isinstance(value, int) and not isinstance(value, bool)
    digits = isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit()
    if (whole or (digits and len(value) < 21)) and -(2**63) <= int(value) < 2**63:
        assert field.convert(value) == int(value)
    else:
        with pytest.raises(RecordError):
            field.convert(value)


def test_unknown_names_are_config_errors_that_name_the_nearest(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        await client.start()
        with pytest.raises(ConfigError, match="'order_stats'; did you mean 'order_status'"):
            client.table("order_stats")
        with pytest.raises(ConfigError, match="'orderid'; did you mean 'order_id'"):
            await orders.get(orderid="1042")
        with pytest.raises(ConfigError, match="order_id was not given"):
            await orders.get()

    run(test, shop)

    async def early(client: FeatureClient) -> None:
        client.table("suport_chat")
        with pytest.raises(ConfigError, match="did you mean 'support_chat'"):
            await client.start()

    run(early, shop)

    async def freshness(client: FeatureClient) -> None:
        with pytest.raises(ConfigError, match=r"features.freshness: .* did you mean 'order_status'"):
            await client.start()

    run(freshness, changed(shop, freshness={"order_statuses": 1.0}))


def test_a_repository_that_is_absent_or_not_applied_is_a_config_error(tmp_path: Path) -> None:
    for where, says in (
        (FeatureSettings(repo=str(tmp_path)), "feature_store.yaml cannot be read"),
        (FeatureSettings(repo=str(REPO), state=str(tmp_path)), "`flink-llm features apply CONFIG` makes it"),
        (FeatureSettings(repo=str(REPO), online_store={"type": "nonsense"}), "Feast refuses"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            describe(where)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("registry: 5", "registry is of type int; write a mapping, or its path alone"),
        ("registry: [a]", "registry is of type list; write a mapping, or its path alone"),
        ("online_store: 7", "online_store is of type int; write a mapping, or its type alone"),
        (
            "online_store: {type: redis, connection_string: 'h:1,password=${NOT_SET_AT_ALL}'}",
            r"online_store\.connection_string: the environment variable NOT_SET_AT_ALL is not set",
        ),
    ],
)
def test_a_section_that_is_none_is_a_config_error(tmp_path: Path, yaml: str, says: str) -> None:
    (tmp_path / "feature_store.yaml").write_text(f"project: shop\nprovider: local\n{yaml}\n")
    with pytest.raises(ConfigError, match=says) as caught:
        apply_repo(FeatureSettings(repo=str(tmp_path)))
    assert "\n" not in str(caught.value) and str(tmp_path / "feature_store.yaml") in str(caught.value)


def test_only_variables_of_what_is_read_must_be_set(shop: FeatureSettings, tmp_path: Path) -> None:
    store = "online_store: {type: redis, connection_string: 'h:1,password=${NOT_SET_AT_ALL}'}"
    text = (REPO / "feature_store.yaml").read_text().split("online_store:")[0]
    text += f"{store}\noffline_store: {{type: file}}\ntags: {{by: '${{NOT_SET_AT_ALL}}'}}\n"
    (tmp_path / "feature_store.yaml").write_text(text + "entity_key_serialization_version: 3\n")
    file = str(Path(str(shop.state)) / "online_store.db")
    assert describe(changed(shop, repo=str(tmp_path), online_store={"path": file})).problems == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("127.0.0.1", "its part 1 is neither HOST:PORT nor NAME=VALUE"),
        ("redis://:hunter2@127.0.0.1:6379", "its part 1 is neither"),
        ("127.0.0.1:port", "its part 1 is neither"),
        ("127.0.0.1:65536", "its part 1 is neither"),
        ("127.0.0.1:6379,password=see,hunter2", "its part 3 is neither"),
        ("127.0.0.1:6379,password=see,hunter2=1", "the name of its part 3 is nothing that redis.Redis takes"),
        ("127.0.0.1:6379,pasword=hunter2", "the name of its part 2 is 'pasword', perhaps for 'password'"),
        ("password=hunter2", "it names no HOST:PORT"),
    ],
)
def test_a_connection_string_that_redis_cannot_have_is_a_config_error(
    shop: FeatureSettings, text: str, says: str
) -> None:
    where = changed(shop, online_store={"type": "redis", "connection_string": text})
    for work in (describe, apply_repo):
        with pytest.raises(ConfigError, match=rf"^features\.online_store\.connection_string: .*{says}") as caught:
            work(where)
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_raised_for_every_key_is_an_outage_and_described(shop: FeatureSettings) -> None:
    text = "127.0.0.1:6379,socket_connect_timeout=soon"
    where = changed(shop, online_store={"type": "redis", "connection_string": text})

    async def test(client: FeatureClient) -> None:
        with pytest.raises(Outage, match="TypeError"):
            await client.table("order_status").get(order_id="1042")

    run(test, where)
    assert all("cannot be read: TypeError" in problem for problem in describe(where).problems)
    assert len(describe(where).problems) == 2


def test_a_store_of_no_type_is_sqlite(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        assert (await client.table("order_status").get(order_id="1042")).found

    run(test, changed(shop, online_store={"path": "online_store.db"}))


def test_a_file_that_is_no_registry_is_a_config_error(own_shop: FeatureSettings) -> None:
    file = Path(str(own_shop.state)) / "registry.db"
    file.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match=r"registry\.db is no registry: delete it, and `flink-llm features apply"):
        describe(own_shop)


def test_a_registry_that_is_away_at_the_start_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flink_llm.services.START_RETRY_S", 0.05)
    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir()
    shutil.copytree(REPO, tmp_path / "repo", ignore=shutil.ignore_patterns("__pycache__"))
    yaml = tmp_path / "repo" / "feature_store.yaml"
    registry = f"registry:\n  registry_type: sql\n  path: sqlite:///{here}/registry.db"
    yaml.write_text(yaml.read_text().replace("registry:\n  path: data/registry.db", registry))
    where = FeatureSettings(repo=str(tmp_path / "repo"))
    apply_repo(where)
    here.rename(away)

    async def main() -> None:
        services = RealServices(ServiceSettings(features=where))
        orders = services.features("order_status")
        starting = asyncio.create_task(services.start())
        await until(lambda: starting.done() or "features cannot be opened yet" in caplog.text, 60)
        assert not starting.done()
        away.rename(here)
        await starting
        assert not (await orders.get(order_id="1042")).found
        await services.close()

    asyncio.run(main())


def test_an_outage_may_be_asked_for_by_any_thread(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        loop = asyncio.get_running_loop()
        asking = loop.run_in_executor(None, lambda: [client.outage_since for _ in range(20_000)])
        while not asking.done():
            for number in range(300):
                client._failed(f"view {number}", {(number,): []}, Outage("gone"))
            for number in range(300):
                client._recovered(f"view {number}")
            await asyncio.sleep(0)
        await asking

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run(test, shop, breakers=Breakers(BreakerSettings(failures=0, reset_s=3600.0)))
    finally:
        sys.setswitchinterval(before)


def test_a_store_that_is_gone_is_an_outage_until_it_is_back(own_shop: FeatureSettings) -> None:
    file = Path(str(own_shop.state)) / "online_store.db"

    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        assert (await orders.get(order_id="1042")).found and client.outage_since is None
        before = time.monotonic()
        file.rename(file.with_suffix(".away"))
        with pytest.raises(Outage, match="feature store"):
            await orders.get(order_id="1042")
        since = client.outage_since
        assert since is not None and before <= since <= time.monotonic()
        results = await asyncio.gather(*(orders.get(order_id=n) for n in range(3)), return_exceptions=True)
        assert all(isinstance(result, Outage) for result in results) and client.outage_since == since
        assert not file.exists()
        file.with_suffix(".away").rename(file)
        await until(lambda: client.outage_since is None)
        assert (await orders.get(order_id="1042")).found

    run(test, own_shop)


def test_a_view_that_is_gone_is_an_outage_of_its_own(
    own_shop: FeatureSettings,
) -> None:
    file = Path(str(own_shop.state)) / "online_store.db"

    def rename(old: str, new: str) -> None:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute(f"ALTER TABLE shop_{old} RENAME TO shop_{new}")

    async def test(client: FeatureClient) -> None:
        orders, users = client.table("order_status"), client.table("customer_profile")
        await client.start()
        rename("order_status", "away")
        for _ in range(3):
            found = await asyncio.gather(
                users.get(user_id="user-1"), orders.get(order_id="1042"), return_exceptions=True
            )
            assert isinstance(found[0], FeatureRow) and found[0].found
            assert isinstance(found[1], Outage) and "order_status" in str(found[1])
            assert client.outage_since is not None
        await asyncio.sleep(0.2)
        assert client.outage_since is not None
        breaker = client.breaker("order_status")
        assert breaker.level > 0 and client.breaker("customer_profile").level == 0
        with pytest.raises(CircuitOpen, match=r"features\.order_status has failed 3 times"):
            await orders.get(order_id="1042")
        assert (await client.table("support_chat").get(user_id="user-1", order_id=None))["first_name"]
        rename("away", "order_status")
        await until(lambda: client.outage_since is None)
        assert (await orders.get(order_id="1042")).found

    breakers = Breakers(BreakerSettings(failures=3, reset_s=0.05))
    run(test, changed(own_shop, batch_window_ms=20), breakers=breakers)


@pytest.mark.parametrize("error", [TypeError("bound"), AttributeError("_conn"), KeyError("path")], ids=repr)
def test_a_store_that_cannot_be_met_is_an_outage_whatever_it_raises(shop: FeatureSettings, error: Exception) -> None:
    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        await client.start()
        meet = client.store._meet

        def fails() -> None:
            raise error

        client.store._meet = fails  # type: ignore[method-assign]
        with pytest.raises(Outage, match=type(error).__name__):
            await orders.get(order_id="1042")
        client.store._meet = meet  # type: ignore[method-assign]
        await until(lambda: client.outage_since is None)

    run(test, shop)


def test_a_hanging_store_is_an_outage_and_does_not_stop_the_loop(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        await orders.get(order_id="1042")
        online = client.store._store.provider.online_store
        read = online.online_read
        online.online_read = lambda *args: time.sleep(1.0) or read(*args)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        started = time.monotonic()
        with pytest.raises(Outage, match=r"no answer in 0\.3 s"):
            await orders.get(order_id="1042")
        assert time.monotonic() - started < 0.9 and ticks > 10
        ticking.cancel()
        online.online_read = read
        await until(lambda: client.outage_since is None)
        assert (await orders.get(order_id="1042")).found

    run(test, changed(shop, timeout_s=0.3))


def test_a_read_after_close_is_refused(shop: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        await client.start()
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await orders.get(order_id="1042")

    run(test, shop)


def test_a_locked_store_is_an_outage(own_shop: FeatureSettings) -> None:
    file = Path(str(own_shop.state)) / "online_store.db"

    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("PRAGMA journal_mode = DELETE")
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(Outage, match="locked"):
                await orders.get(order_id="1042")
        await until(lambda: client.outage_since is None)

    run(test, changed(own_shop, timeout_s=0.5))


def test_two_read_while_another_process_writes(own_shop: FeatureSettings) -> None:
    file = Path(str(own_shop.state)) / "online_store.db"
    script = (
        "import sqlite3, sys, time\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    db.execute('BEGIN IMMEDIATE')\n"
        "    db.execute('UPDATE shop_order_status SET created_ts = 1')\n"
        "    time.sleep(0.05)\n"
        "    db.execute('COMMIT')\n"
    )

    async def test(client: FeatureClient) -> None:
        other = FeatureClient(own_shop)
        tables = [client.table("order_status"), other.table("order_status")]
        ends = time.monotonic() + 1.0
        while time.monotonic() < ends:
            rows = await asyncio.gather(*(table.get(order_id="1042") for table in tables))
            assert all(row.found for row in rows)
        await other.close()

    with subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            run(test, own_shop)
        finally:
            writer.kill()


def test_an_on_demand_view_is_computed_for_each_row_alone(computed: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        share = client.table("share")
        rows = await asyncio.gather(
            share.get(item_id=3, count=2),
            share.get(item_id="4", count=4),
            share.get(item_id=5, count=0),
            share.get(item_id=77, count=1),
            return_exceptions=True,
        )
        assert dict(rows[0]) == {"item_id": 3, "count": 2, "each": 150}  # type: ignore[call-overload]
        assert dict(rows[1]) == {"item_id": 4, "count": 4, "each": 100}  # type: ignore[call-overload]
        assert isinstance(rows[2], RecordError) and rows[2].code == "missing_features"
        assert isinstance(rows[3], FeatureRow) and not rows[3].found and rows[3]["each"] is None
        assert client.outage_since is None

    run(test, computed)

    async def later(client: FeatureClient) -> None:
        row = await client.table("share").get(item_id=3, count=2)
        assert row.stale and row["each"] is None

    run(later, computed, now=lambda: time.time() + 7200)
    run(later, changed(computed, freshness={"price": 5.0}), now=lambda: time.time() + 600)


def test_one_record_that_cannot_be_computed_holds_up_no_other(
    computed: FeatureSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: FeatureClient) -> None:
        share = client.table("share")
        for count, kind in {-1: "RuntimeError", -2: "Assertion", -3: "NotImplemented", -4: "OfItsOwn"}.items():
            one, other = await asyncio.gather(
                share.get(item_id=3, count=2), share.get(item_id=4, count=count), return_exceptions=True
            )
            assert isinstance(one, FeatureRow) and one["each"] == 150
            assert isinstance(other, RecordError) and other.code == "missing_features" and kind in str(other)
        assert client.outage_since is None
        with pytest.raises(Outage, match="of one record"):
            await share.get(item_id=4, count=-5)
        assert client.outage_since is not None
        await until(lambda: client.outage_since is None)
        assert (await share.get(item_id=3, count=3))["each"] == 100

    run(test, computed, breakers=Breakers(BreakerSettings(failures=1, reset_s=0.05)))


def test_a_row_that_cannot_be_decoded_fails_alone(own_shop: FeatureSettings) -> None:
    file = Path(str(own_shop.state)) / "online_store.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute(
            "UPDATE shop_order_status SET value = X'FF' WHERE rowid = (SELECT MAX(rowid) FROM shop_order_status)"
        )

    async def test(client: FeatureClient) -> None:
        orders = client.table("order_status")
        rows = await asyncio.gather(*(orders.get(order_id=number) for number in ORDERS), return_exceptions=True)
        failed = [row for row in rows if not isinstance(row, FeatureRow)]
        assert [str(error) for error in failed] == ["the row of order_status cannot be read: DecodeError"]
        assert isinstance(failed[0], RecordError) and client.outage_since is None

    run(test, own_shop)


def test_a_registry_that_goes_bad_while_a_job_runs_is_an_outage(computed: FeatureSettings, tmp_path: Path) -> None:
    shutil.copytree(computed.repo, tmp_path / "repo")

    async def test(client: FeatureClient) -> None:
        share = client.table("share")
        assert (await share.get(item_id=3, count=2)).found
        (tmp_path / "repo" / "data" / "registry.db").write_bytes(b"garbage")
        client.store._store.registry.cached_registry_proto_created = None  # as after its time to live
        with pytest.raises(Outage, match="DecodeError"):
            await share.get(item_id=3, count=2)

    run(test, changed(computed, repo=str(tmp_path / "repo")))


def test_a_row_that_cannot_be_computed_is_found_by_halving(computed: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        share = client.table("share")
        await client.start()
        sizes = counted(client)
        rows = await asyncio.gather(*(share.get(item_id=3, count=n) for n in range(64)), return_exceptions=True)
        assert isinstance(rows[0], RecordError)
        assert [row["each"] for row in rows[1:] if isinstance(row, FeatureRow)] == [300 // n for n in range(1, 64)]
        assert len(sizes) < 40

    run(test, changed(computed, batch_window_ms=20))


def test_a_computed_row_is_as_old_as_its_oldest_source_and_expires_with_the_first(mixed: FeatureSettings) -> None:
    write(mixed, "price", [{"item_id": 1, "cents": 50}], datetime.now(UTC) - timedelta(days=1))
    write(mixed, "stock", [{"item_id": 1, "pieces": 3}])

    async def young(client: FeatureClient) -> None:
        row = await client.table("value").get(item_id=1)
        assert (row["worth"], row.found, row.stale) == (150, True, False)
        assert row.age_s is not None and row.age_s > 86_000

    async def old(client: FeatureClient) -> None:
        row = await client.table("value").get(item_id=1)
        assert (row["worth"], row.found, row.stale) == (None, False, True)

    run(young, mixed)
    run(old, mixed, now=lambda: time.time() + 7200)
    run(old, changed(mixed, freshness={"value": 3600.0}))
    run(young, changed(mixed, freshness={"value": 1e6}), now=lambda: time.time() + 7200)


@pytest.mark.parametrize(
    ("service", "says"),
    [
        ("owner_first", "the feature user_id of owner is named like a key"),
        ("profile_first", "the feature user_id of owner is named like a key"),
        ("lost", "the service lost takes the view 'unheld', which the registry does not hold"),
    ],
)
def test_a_service_that_no_table_can_be_made_of_is_a_config_error(
    mixed: FeatureSettings, service: str, says: str
) -> None:
    async def test(client: FeatureClient) -> None:
        client.table(service)
        with pytest.raises(ConfigError, match=says):
            await client.start()

    run(test, mixed)
    assert any(says in problem for problem in describe(mixed).problems)


def test_an_on_demand_view_of_one_that_is_not_registered_is_a_config_error(
    mixed: FeatureSettings, tmp_path: Path
) -> None:
    shutil.copytree(mixed.repo, tmp_path / "repo")
    (tmp_path / "repo" / "definitions.py").write_text(MIXED_REPO + ON_DEMAND_OF_UNHELD)
    where = FeatureSettings(repo=str(tmp_path / "repo"))
    apply_repo(where)
    with pytest.raises(ConfigError, match="the on-demand view doubled takes the view 'unheld'"):
        describe(where)


def test_the_demos_rows_need_the_demos_views(computed: FeatureSettings) -> None:
    with pytest.raises(ConfigError, match="lacks the demo's views customer_profile, order_status"):
        fill_demo(computed)


def test_a_service_with_two_features_of_one_name_is_refused(computed: FeatureSettings) -> None:
    async def test(client: FeatureClient) -> None:
        client.table("both")
        with pytest.raises(ConfigError, match="both: the feature cents comes from price and from twin"):
            await client.start()

    run(test, computed)


def test_apply_repeats_and_removes_what_is_defined_no_more(computed: FeatureSettings, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(computed.repo, repo)
    where = FeatureSettings(repo=str(repo))
    apply_repo(where)
    report = describe(where)
    assert len(report.problems) == 1 and "the feature cents comes from" in report.problems[0]
    assert [(view.name, view.rows) for view in report.views] == [("price", 5), ("share", None), ("twin", 0)]
    shorter = COMPUTED_REPO.replace("twin = ", "_ = ").replace("[price, twin]", "[price]")
    shorter = shorter.replace("_ = FeatureView", "_ = lambda **_: FeatureView")
    (repo / "definitions.py").write_text(shorter)
    apply_repo(where)
    assert [view.name for view in describe(where).views] == ["price", "share"]
    assert "definitions" not in sys.modules


def test_describe_tells_what_a_job_would_see(shop: FeatureSettings) -> None:
    report = describe(shop)
    assert report.problems == [] and report.services == {"support_chat": ["customer_profile", "order_status"]}
    assert [(v.name, v.keys, v.rows) for v in report.views] == [
        ("customer_profile", ["user_id"], 200),
        ("order_status", ["order_id"], 500),
    ]
    assert sorted(p.name for p in REPO.iterdir() if p.name != "__pycache__") == [
        "definitions.py",
        "feature_store.yaml",
    ]


def test_secrets_are_masked() -> None:
    store = {"type": "redis", "connection_string": "h:6379,password=hunter2,db=1"}
    assert "hunter2" not in repr(FeatureSettings(online_store=store))


def test_demo_data_is_the_same_for_a_seed() -> None:
    assert demo_data.orders(3, 50) == demo_data.orders(3, 50) != demo_data.orders(4, 50)
    assert "1042" in ORDERS and len(ORDERS) == 500 and len(CUSTOMERS) == 200
    assert all(number.isdigit() and 4 <= len(number) <= 6 for number in ORDERS)


def start_redis(port: int, folder: Path) -> "subprocess.Popen[bytes]":
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "yes",
        "--dir",
        str(folder),
    ]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as probe:
            probe.sendall(b"PING\r\n")
            if probe.recv(16).startswith(b"+PONG"):
                return server
        time.sleep(0.05)
    server.kill()
    raise AssertionError(f"redis-server does not answer on port {port}")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A redis-server of its own; `server` may be replaced by a test that ends it."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on PATH (Debian: apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    held: dict[str, Any] = {"port": port, "folder": tmp_path, "server": start_redis(port, tmp_path)}
    yield held
    held["server"].kill()
    held["server"].wait()


def test_redis_answers_like_sqlite_and_may_go_away(redis: dict[str, Any], tmp_path: Path) -> None:
    where = FeatureSettings(
        repo=str(REPO),
        state=str(tmp_path / "state"),
        online_store={"type": "redis", "connection_string": f"127.0.0.1:{redis['port']}"},
        timeout_s=0.5,
        freshness={"customer_profile": 3600.0},
    )
    apply_repo(where)
    fill_demo(where)
    assert describe(where).problems == []

    async def test(client: FeatureClient) -> None:
        orders, chat = client.table("order_status"), client.table("support_chat")
        await client.start()
        sizes = counted(client)
        rows = await asyncio.gather(*(orders.get(order_id=number) for number in ORDERS))
        assert [row["order_item"] for row in rows] == [row["order_item"] for row in ORDERS.values()]
        assert sum(sizes) == 500 and max(sizes) == 256
        absent = await orders.get(order_id="no such order")
        assert (absent.found, absent.age_s, absent["carrier"]) == (False, None, None)
        write(
            where,
            "customer_profile",
            [CUSTOMERS["user-1"] | {"user_id": "old"}],
            datetime.now(UTC) - timedelta(1),
        )
        assert (await chat.get(user_id="old", order_id="1042")).stale

        os.kill(redis["server"].pid, signal.SIGSTOP)
        with pytest.raises(Outage):
            await orders.get(order_id="1042")
        assert client.outage_since is not None
        os.kill(redis["server"].pid, signal.SIGCONT)
        await until(lambda: client.outage_since is None)

        redis["server"].kill()
        redis["server"].wait()
        with pytest.raises(Outage, match=r"refused|closed|reset"):
            await orders.get(order_id="1042")
        redis["server"] = start_redis(redis["port"], redis["folder"])
        await until(lambda: client.outage_since is None)
        assert (await orders.get(order_id="1042")).found

    run(test, where)
