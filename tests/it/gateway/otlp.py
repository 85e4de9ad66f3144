"""Reads OTLP with the protocol's official classes: one request a line on stdin, as `json BASE64` or `protobuf BASE64`; what they say,
in protobuf's own JSON with names as the protocol has them, one a line on stdout. Fails where a request is not what the protocol allows."""

import base64
import json
import sys

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

IDS = {"traceId", "spanId", "parentSpanId"}


def plain(value):
    """OTLP's JSON is protobuf's, but for ids, which are hexadecimal."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: base64.b64encode(bytes.fromhex(one)).decode() if name in IDS else plain(one) for name, one in value.items()}
    return value


for line in sys.stdin:
    kind, body = line.split()
    body = base64.b64decode(body)
    if kind == "json":
        request = json_format.ParseDict(plain(json.loads(body)), ExportTraceServiceRequest())
    else:
        request = ExportTraceServiceRequest.FromString(body)
    print(json.dumps(json_format.MessageToDict(request)))
