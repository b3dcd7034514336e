"""Why a rule has no value for a response."""


class RuleFailedError(Exception):
    """A response could not be judged; the message is the reason that is counted."""
