"""Raw videos -> face tracks -> bags -> shards -> a balanced stream. No torch here; ray only in prepare.py."""
