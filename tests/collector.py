"""A collector of OpenTelemetry's: Flink's metrics over gRPC, spans over HTTP, as the protocol has them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2


class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
    """`values`: the latest of each metric that is one number, sums added up; `spans`: all of them."""

    def __init__(self):
        self.values = {}
        self.spans = []
        self._grpc = grpc.server(ThreadPoolExecutor(1))
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(self, self._grpc)
        self.metrics_at = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.traces_at = f"http://127.0.0.1:{self._http.server_port}/v1/traces"

    def __enter__(self):
        self._grpc.start()
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._grpc.stop(None)
        self._http.shutdown()
        self._http.server_close()

    def Export(self, request, context):
        for resource in request.resource_metrics:
            for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                if metric.WhichOneof("data") == "gauge":
                    point = metric.gauge.data_points[-1]
                    self.values[metric.name] = getattr(point, point.WhichOneof("value"))
                elif metric.WhichOneof("data") == "sum":  # Flink sends what has been added since
                    added = sum(getattr(point, point.WhichOneof("value")) for point in metric.sum.data_points)
                    self.values[metric.name] = self.values.get(metric.name, 0) + added
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def _handler(self):
        spans = self.spans

        class Traces(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
                spans.extend(
                    span for one in request.resource_spans for scope in one.scope_spans for span in scope.spans
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        return Traces

    def records(self):
        """Request id → the error's code, None for none."""
        found = {}
        for span in self.spans:
            facts = _facts(span)
            if "flink_llm.request_id" in facts:
                found[facts["flink_llm.request_id"]] = facts.get("error.type")
        return found

    def stages_of(self, request_id):
        """Names of the spans below a record's."""
        of = [span.span_id for span in self.spans if _facts(span).get("flink_llm.request_id") == request_id]
        return {span.name for span in self.spans if span.parent_span_id in of}


def _facts(span):
    return {each.key: each.value.string_value for each in span.attributes}
