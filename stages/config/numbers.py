"""Numbers as people read them."""


def human(number: float) -> str:
    """Short with a decimal prefix: 10059840 -> `10.1 M`."""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"
