"""What the shop knows about its customers and their orders.

`ttl` is how old a row may be before a reader of this library counts it as absent; a job's
`features.freshness` overrides it. Rows come by `store.push` to the push sources, or by
`store.write_to_online_store`.
"""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Int64, String

customer = Entity(
    name="customer",
    join_keys=["user_id"],
    value_type=ValueType.STRING,
    description="A customer of the shop",
)
order = Entity(
    name="order",
    join_keys=["order_id"],
    value_type=ValueType.STRING,
    description="An order, by the number that customers are told",
)

customer_events = PushSource(
    name="customer_events",
    batch_source=FileSource(
        name="customer_history",
        path="data/customer_profile.parquet",
        timestamp_field="event_timestamp",
    ),
)
order_events = PushSource(
    name="order_events",
    batch_source=FileSource(
        name="order_history",
        path="data/order_status.parquet",
        timestamp_field="event_timestamp",
    ),
)

customer_profile = FeatureView(
    name="customer_profile",
    entities=[customer],
    ttl=timedelta(days=90),
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="first_name", dtype=String),
        Field(name="loyalty_tier", dtype=String),
        Field(name="open_orders", dtype=Int64),
        Field(name="last_viewed_product", dtype=String),
        Field(name="recommended_product", dtype=String),
    ],
    source=customer_events,
    description="Who a customer is and what to recommend",
)

order_status = FeatureView(
    name="order_status",
    entities=[order],
    ttl=timedelta(days=30),
    schema=[
        Field(name="order_id", dtype=String),
        Field(name="order_status", dtype=String),
        Field(name="order_date", dtype=String, description="ISO 8601 date"),
        Field(name="delivery_date", dtype=String, description="ISO 8601 date"),
        Field(name="carrier", dtype=String),
        Field(name="order_item", dtype=String),
    ],
    source=order_events,
    description="Where an order is and when it arrives",
)

support_chat = FeatureService(
    name="support_chat",
    features=[customer_profile, order_status],
    description="What the support chat grounds its answers in",
)
