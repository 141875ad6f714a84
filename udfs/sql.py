"""Models and features as SQL functions, vectorised: the rows of a batch run at once and are waited for together.

    llm_generate(model, prompt [, options])            STRING
    llm_embed(model, text [, options])                 ARRAY<FLOAT>
    llm_classify(model, text [, options])              STRING, the likeliest label
    llm_extract(model, text, schema [, options])       STRING, JSON that fits the JSON Schema
    feature_lookup(features, key [, key ...])          STRING, a JSON object

NULL in the model, the text or a key gives NULL. So does a row that fails; the function of the same name
with `_row` behind it says why: a ROW of `value`, `error_code`, `error_message` and more. `extractor` makes a
function that gives a typed ROW.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pandas as pd
from pyflink.table import DataTypes, TableEnvironment
from pyflink.table.types import DataType
from pyflink.table.udf import FunctionContext, ScalarFunction, udf

from flink_llm import config
from flink_llm.call import Failed, Outcome, Result
from flink_llm.errors import ConfigError
from flink_llm.logs import shape_logs
from flink_llm.orphans import end_with_task_manager
from flink_llm.services import ServiceSettings, open_services
from flink_llm.telemetry_settings import TelemetrySettings
from flink_llm.udfs import answers
from flink_llm.udfs.arguments import rows_of
from flink_llm.udfs.batches import Batches, RowFunction
from flink_llm.udfs.columns import Column, row_of, schema_of
from flink_llm.udfs.counters import GROUP, Counts

PARAMETER = "flink-llm.config"
"""The job parameter that names a configuration file, where a function was not given its services."""
VARIABLE = "FLINK_LLM_CONFIG"
"""The same as an environment variable of the task managers."""


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """What a function is called with, and what it gives.

    `kind` is the method of `Context` that the first argument is given to. `texts` are the arguments that must be
    there, all text; `options` are those that a call may give, None for a function that takes keys instead.
    `value` is the result's type, `more` what a `_row` tells besides.
    """

    name: str
    kind: str
    function: RowFunction
    texts: int
    options: tuple[str, ...] | None
    value: DataType
    more: dict[str, DataType] = {}

    def row_type(self) -> DataType:
        """What a `_row` gives."""
        errors = {"error_code": DataTypes.STRING(), "error_message": DataTypes.STRING()}
        fields = {"value": self.value, **errors, **self.more}
        return DataTypes.ROW([DataTypes.FIELD(name, each) for name, each in fields.items()])


class _Function(ScalarFunction):  # type: ignore[misc]
    """A function as Flink calls it; `shape` makes its value of an answer or a failure."""

    def __init__(
        self, signature: Signature, shape: Callable[[Outcome], Any], services: Any, schema: str | None = None,
        telemetry: TelemetrySettings | None = None,
    ) -> None:  # fmt: skip
        self._signature = signature
        self._shape = shape
        self._services = services
        self._schema = schema
        self._telemetry = telemetry

    def open(self, function_context: FunctionContext) -> None:
        end_with_task_manager()
        services, telemetry, job = self._services, self._telemetry, "sql"
        if services is None:
            settings = _configured(function_context)
            services = ServiceSettings(
                models=settings.models, host=settings.host, features=settings.features, breaker=settings.breaker
            )
            telemetry, job = telemetry or settings.telemetry, settings.name
        if telemetry is not None:
            shape_logs(telemetry.logs)
        signature = self._signature
        self._batches = Batches(
            signature.name, signature.kind, signature.function, open_services(services), job, telemetry
        )
        self._batches.start()
        self._counters = Counts(_group(function_context), self._batches.metrics.counts)

    def close(self) -> None:
        if hasattr(self, "_batches"):
            self._batches.close()

    def is_deterministic(self) -> bool:
        return False  # else Flink may call it twice for one row, where its result is selected by and selected

    def eval(self, *arguments: Any) -> pd.Series:
        signature = self._signature
        if self._schema is not None:
            arguments = (*arguments[:2], self._schema, *arguments[2:])
        rows = rows_of(signature.name, arguments, signature.texts, signature.options)
        outcomes = self._batches.answer(rows, fixed=isinstance(arguments[0], str))
        self._counters.tell()
        return pd.Series([None if each is None else self._shape(each) for each in outcomes], dtype=object)


class _Plain:
    """The value, NULL for a row that failed."""

    def __call__(self, outcome: Outcome) -> Any:
        return msgspec.json.decode(outcome.value)["value"] if isinstance(outcome, Result) else None


class _Told:
    """The value, or why there is none, and what else is told."""

    def __init__(self, more: Sequence[str]) -> None:
        self._more = more

    def __call__(self, outcome: Outcome) -> Any:
        if isinstance(outcome, Failed):
            return {"error_code": outcome.code, "error_message": outcome.message}
        answer = msgspec.json.decode(outcome.value)
        return {name: answer.get(name) for name in ("value", *self._more)}


class _Typed:
    """The value's JSON as a row of columns; `errors` says why there is none."""

    def __init__(self, row: Column, *, errors: bool) -> None:
        self._row = row
        self._errors = errors

    def __call__(self, outcome: Outcome) -> Any:
        if isinstance(outcome, Result):
            found = msgspec.json.decode(msgspec.json.decode(outcome.value)["value"])
            if isinstance(found, dict):
                return {name: part.convert(found.get(name)) for name, part in self._row.parts.items()}
            outcome = Failed("model_error", "the reply is no JSON object")
        return {"error_code": outcome.code, "error_message": outcome.message} if self._errors else None


def _group(function_context: FunctionContext) -> Any:
    try:
        return function_context.get_metric_group().add_group(GROUP)
    except RuntimeError:  # python.metric.enabled: false
        return None


def _configured(function_context: FunctionContext) -> config.JobConfig:
    path = function_context.get_job_parameter(PARAMETER, "") or os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(
            f"these functions do not know their models: SET 'pipeline.global-job-parameters' = '{PARAMETER}:/path/"
            f"job.yaml', or set {VARIABLE} for the task managers, or call register_functions(tables, services)"
        )
    return config.load(path)


_GENERATED = {"finish_reason": DataTypes.STRING(), "model_hash": DataTypes.STRING()}
_SIGNATURES = [
    Signature(
        name="llm_generate", kind="model", function=answers.generate, texts=2, options=answers.GENERATION,
        value=DataTypes.STRING(), more=_GENERATED,
    ),
    Signature(
        name="llm_extract", kind="model", function=answers.extract, texts=3, options=answers.GENERATION,
        value=DataTypes.STRING(), more=_GENERATED,
    ),
    Signature(
        name="llm_embed", kind="embed", function=answers.embed, texts=2, options=answers.EMBEDDING,
        value=DataTypes.ARRAY(DataTypes.FLOAT()), more={"model_hash": DataTypes.STRING()},
    ),
    Signature(
        name="llm_classify", kind="classify", function=answers.classify, texts=2, options=answers.CLASSIFICATION,
        value=DataTypes.STRING(), more={"score": DataTypes.DOUBLE(), "model_hash": DataTypes.STRING()},
    ),
    Signature(
        name="feature_lookup", kind="features", function=answers.look_up, texts=1, options=None,
        value=DataTypes.STRING(), more={"age_s": DataTypes.DOUBLE()},
    ),
]  # fmt: skip
_BY_NAME = {signature.name: signature for signature in _SIGNATURES}


def _function(name: str, services: Any = None, telemetry: TelemetrySettings | None = None) -> Any:
    """A function of the table above, or its `_row`, as PyFlink registers it."""
    signature = _BY_NAME[name.removesuffix("_row")]
    told = name.endswith("_row")
    shape = _Told(list(signature.more)) if told else _Plain()
    result = signature.row_type() if told else signature.value
    function = _Function(signature, shape, services, telemetry=telemetry)
    return udf(function, result_type=result, func_type="pandas", name=name)


NAMES = (*_BY_NAME, *(f"{name}_row" for name in _BY_NAME))
"""All functions of this module, under which `register_functions` registers them."""

# By these names SQL finds them: CREATE FUNCTION llm_generate AS 'flink_llm.udfs.sql.llm_generate' LANGUAGE PYTHON.
llm_generate = _function("llm_generate")
llm_generate_row = _function("llm_generate_row")
llm_extract = _function("llm_extract")
llm_extract_row = _function("llm_extract_row")
llm_embed = _function("llm_embed")
llm_embed_row = _function("llm_embed_row")
llm_classify = _function("llm_classify")
llm_classify_row = _function("llm_classify_row")
feature_lookup = _function("feature_lookup")
feature_lookup_row = _function("feature_lookup_row")


def extractor(
    wanted: type | Mapping[str, Any],
    *,
    name: str = "llm_extract",
    errors: bool = False,
    services: ServiceSettings | Callable[[], Any] | None = None,
    telemetry: TelemetrySettings | None = None,
) -> Any:
    """A function of (model, text [, options]) whose result is a typed ROW of what a text says.

    `wanted` is a msgspec Struct or the JSON Schema of an object: its fields are the ROW's, nested objects as text
    that holds their JSON. With `errors` the ROW has `error_code` and `error_message` as well. Raises ConfigError
    for a schema of something else.
    """
    row = row_of(wanted).flat()
    told = {part: DataTypes.STRING() for part in ("error_code", "error_message") if errors}
    if told.keys() & row.parts.keys():
        raise ConfigError(f"{name}: with errors=True the schema cannot have error_code or error_message of its own")
    fields = {part: column.data_type() for part, column in row.parts.items()} | told
    result = DataTypes.ROW([DataTypes.FIELD(part, each) for part, each in fields.items()])
    schema = msgspec.json.encode(schema_of(wanted)).decode()
    function = _Function(_BY_NAME["llm_extract"], _Typed(row, errors=errors), services, schema, telemetry)
    return udf(function, result_type=result, func_type="pandas", name=name)


def register_functions(
    tables: TableEnvironment,
    services: ServiceSettings | Callable[[], Any] | None = None,
    *,
    extract: Mapping[str, type | Mapping[str, Any]] | None = None,
    telemetry: TelemetrySettings | None = None,
) -> None:
    """Registers all functions with a table environment, as temporary system functions.

    `services` are the models and features they know; without them each looks for a configuration file when it
    opens, as from the SQL client. `telemetry` is what they tell of their rows: by default what such a file says,
    else nothing. `extract` maps names to what an `extractor` of that name is to find. Raises ConfigError.
    """
    for name in NAMES:
        tables.create_temporary_system_function(name, _function(name, services, telemetry))
    for name, wanted in (extract or {}).items():
        if name in NAMES:
            raise ConfigError(f"extract: {name} is a function of the library: give yours another name")
        tables.create_temporary_system_function(
            name, extractor(wanted, name=name, services=services, telemetry=telemetry)
        )
