"""Why OpenSSL refused a connection, in its own words, which name the one thing to mend."""

import ssl

_MOST_CAUSES = 8


def openssl_words(error: BaseException | None) -> str:
    """Give OpenSSL's reason, from `error` or what it was raised from; empty where OpenSSL has no part in it.

    `certificate has expired`, for instance, or `wrong version number`, where TLS meets something else.
    """
    for _ in range(_MOST_CAUSES):
        match error:
            case None:
                break
            case ssl.SSLCertVerificationError(verify_message=str(words)) if words:
                return words.rstrip(".")
            case ssl.SSLError(reason=str(words)) if words:
                return words.lower().replace("_", " ")
        error = error.__cause__ or error.__context__
    return ""


def mended_by(words: str, *, authorities: str, address: str) -> str:
    """Say what mends a certificate that was refused with these `words`.

    `authorities` and `address` are the settings for trusted authorities and for where the server is.
    """
    said = words.lower()
    if any(part in said for part in ("key usage", "key identifier", "basic constraints", "x509v3")):
        return (
            "have the certificate issued by another authority: this one's is not as RFC 5280 asks, and Python"
            " 3.13 and newer refuse it, whatever is trusted (openssl req -x509 makes a good one with -addext"
            " keyUsage=critical,keyCertSign,cRLSign)"
        )
    if "mismatch" in said:
        return f"set {address} to a name that is in the certificate, or have one issued for that name"
    if "expired" in said or "not yet valid" in said:
        return "renew the certificate there, or set the clock of this machine"
    if any(part in said for part in ("self-signed", "self signed", "unable to get", "unable to verify")):
        return f"put its authority into {authorities} (that of an egress proxy where it opens TLS)"
    return f"see to the certificate there, and to {authorities}"
