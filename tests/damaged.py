"""What may stand where a JSON record should be, each of which some parser answers in its own way."""

NO_JSON = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"seed": ' + b"1" * 5000 + b"}"]
NO_RECORD = [*NO_JSON, b"[]", b"7", b"{}"]
"""The last one is an object; every record has a field that must be there."""
