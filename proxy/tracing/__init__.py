"""Tracing with OpenTelemetry, for those who installed the extra `otel` and set its environment variables.

While it is off nothing of OpenTelemetry is imported: only `spans.py` and `export.py` import it, and only
`start.py` imports these, when it has found that tracing is on.
"""
