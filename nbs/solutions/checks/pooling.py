"Checks of the exercises of the chapter on pooling."
import torch
import torch.nn.functional as F

from . import attempt, exercise, require, show


def near(case, got, wanted, *why):
    "Is `got` the tensor `wanted`, up to rounding?"
    require(got is not None, f"{case} gives None", "Is a `return` missing?")
    if isinstance(got, (list, tuple)) and got and all(map(torch.is_tensor, got)): got = attempt(case, torch.stack, list(got))
    try: got = torch.as_tensor(got, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError): require(False, f"{case} gives {show(got)}, which is no tensor")
    require(got.shape == wanted.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    require(bool((got - wanted).abs().max() < 1e-5), f"{case} gives {show(got.tolist())}, expected {show(wanted.tolist())}", *why)


def why_wrong_length(got, n):
    "What to say of a vector whose length is not 1."
    try: length = float(torch.as_tensor(got, dtype=torch.float32).norm())
    except (TypeError, ValueError, RuntimeError): return []
    return [] if abs(length - 1) < 1e-4 else [f"its length is {length:.3f}, and should be 1"]


@exercise
def check_shorten_vector(shorten_vector):
    g = torch.Generator().manual_seed(0)
    for size, n in ((3, 2), (8, 1), (8, 8), (576, 64)):
        vector = F.normalize(torch.randn(size, generator=g), dim=0)
        case = f"a vector of {size} numbers, n={n}: shorten_vector"
        got = attempt(case, shorten_vector, vector.tolist(), n)
        near(case, got, F.normalize(vector[:n], dim=0), *why_wrong_length(got, n))


@exercise
def check_mean_pool(mean_pool):
    g = torch.Generator().manual_seed(1)
    for lengths in ([3], [1, 1], [2, 5, 1], [1, 7, 4, 4]):
        states = torch.randn(sum(lengths), 6, generator=g) + 1
        wanted = torch.stack([F.normalize(part.mean(0), dim=0) for part in states.split(lengths)])
        case = f"texts of {lengths} tokens: mean_pool"
        got = attempt(case, mean_pool, states.clone(), list(lengths))
        why = "which tokens belong to which text?"
        if torch.is_tensor(got) and got.shape == wanted.shape:
            if bool((got.norm(dim=1) - 1).abs().max() > 1e-4): why = "the means should have length 1"
            last = F.normalize(states[torch.tensor(lengths).cumsum(0) - 1], dim=1)
            if bool((got - last).abs().max() < 1e-5): why = "that is the last state, not the mean"
        near(case, got, wanted, why)


def num_kept(value) -> int:
    "How many numbers a tensor has, or entries something else that holds some."
    return value.numel() if torch.is_tensor(value) else len(value) if hasattr(value, "__len__") else 0


@exercise
def check_running_mean(RunningMean):
    g = torch.Generator().manual_seed(2)
    for sizes in ([4], [1, 1, 1], [5, 1], [3, 8, 2] + [1] * 20):
        states, case = torch.randn(sum(sizes), 6, generator=g) + 1, f"pieces of {show(sizes)} tokens: RunningMean"
        mean = attempt(case, RunningMean)
        require(mean is not None and hasattr(mean, "add") and hasattr(mean, "vector"), f"{case} has no add or no vector")
        seen = 0
        for piece in states.split(sizes):
            before = piece.clone()
            attempt(f"{case}.add", mean.add, piece)
            require(torch.equal(piece, before), f"{case}.add changes the states it is given", "they are the engine's")
            seen += len(piece)
            wanted = F.normalize(states[:seen].mean(0), dim=0)
            near(f"{case}.vector after {seen} tokens", attempt(f"{case}.vector", mean.vector), wanted,
                 "a piece counts by its tokens, and asking for the vector changes nothing")
    kept = sum(map(num_kept, (getattr(mean, name, None) for name in (*getattr(mean, "__dict__", ()), *getattr(RunningMean, "__slots__", ())))))
    require(kept <= 7, f"after {seen} tokens RunningMean keeps {kept} numbers or entries", "one vector and one number are enough")
