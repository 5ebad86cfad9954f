"""Triton's interpreter in tests, a tenth faster.

At each launch, and at each call of a kernel's helper, it goes through all names of `triton.language` for those that it has to replace.
They are always the same, so here they are looked for once."""
import inspect


class Remembered:
    "The module `inspect`, except that the members of `parts` are those that `wanted` takes, found beforehand."

    def __init__(self, parts, wanted):
        self.names = {part: [name for name, member in inspect.getmembers(part) if wanted(member)] for part in parts}

    def __getattr__(self, name): return getattr(inspect, name)

    def getmembers(self, part):
        if part not in self.names: return inspect.getmembers(part)
        return [(name, getattr(part, name)) for name in self.names[part]]


def remember_names():
    "From now on, if kernels are interpreted; before the first one runs."
    from triton import language as tl
    from triton.runtime import interpreter
    interpreter.inspect = Remembered([tl, tl.core, tl.core.tensor, tl.math], tl.core.is_builtin)
