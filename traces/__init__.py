"""What was seen: traces on disk, their summary and their pictures."""

from traces.trace import Trace, TraceHeader
from traces.trace_file import TraceFile, TraceFolder, write_trace

__all__ = ["Trace", "TraceFile", "TraceFolder", "TraceHeader", "write_trace"]
