"""Which types of personal data and secrets curation replaces."""

from pydantic import model_validator

from stages.config.base import Config


class PiiConfig(Config):
    """A switch for each type. All decide the result; a type that is off stays in the text as it is."""

    emails: bool = True
    """Whether e-mail addresses become <EMAIL>."""
    phones: bool = True
    """Whether phone numbers become <PHONE>: with country code, in US format, or by the words around them."""
    cards: bool = True
    """Whether numbers of payment cards become <CREDIT_CARD>."""
    ibans: bool = True
    """Whether IBANs become <IBAN>."""
    social_security_numbers: bool = True
    """Whether US social security numbers become <SSN>."""
    ip_addresses: bool = True
    """Whether public IP addresses become <IPV4> and <IPV6>."""
    logins: bool = True
    """Whether user and password in a URL become <LOGIN>."""
    secrets: bool = True
    """Whether tokens, passwords and API keys become <SECRET>, and private keys <PRIVATE_KEY>."""

    @model_validator(mode="after")
    def _replaces_something(self) -> "PiiConfig":
        if not any(value for _, value in self):
            raise ValueError("every type is off, so nothing would be replaced; use scrub_pii=false to say so")
        return self
