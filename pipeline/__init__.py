"""Raw videos -> face tracks -> bags -> shards -> a balanced stream. No torch here; ray only in prepare.py."""

import os

# onnxruntime's wheel for Linux (1.32) makes a device id in the home folder when it is imported, and knows a server to
# report to. Faces are worked on here: nothing is reported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
