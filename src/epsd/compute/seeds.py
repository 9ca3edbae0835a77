"""One seed for a run, and from it one for each thing that is drawn."""

import hashlib


def mix(*parts: int | str) -> int:
    """A stable seed in [0, 2^63) for the thing that `parts` name, e.g. `mix(seed, "order", epoch)`.

    The same on every machine and in every process (`hash()` is not); 1 and "1" differ, ("ab",) and ("a", "b") too.
    """
    text = "\x1f".join(f"{'text' if isinstance(part, str) else 'int'}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
