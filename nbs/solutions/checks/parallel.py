"Checks of the exercises of the chapter on ranks."
import queue
import threading

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_ring_sends(ring_sends):
    for num_bytes, ranks in ((1200, 2), (1200, 3), (1200, 4), (64 * 10**6, 64), (1200, 1)):
        each = 2 * num_bytes * (ranks - 1) / ranks
        expect(ring_sends, (num_bytes, ranks), [each, ranks * each],
               f"twice {ranks - 1} steps, in each of which a rank sends one of {ranks} pieces, of {num_bytes / ranks:g} bytes", tolerance=1e-3)


@exercise
def check_break_even(break_even):
    for bandwidth, latency, ranks in ((3e12, 10e-6, 2), (3e12, 10e-6, 4), (20e9, 100e-6, 2), (1e12, 5e-6, 8)):
        wanted = 2 * latency * bandwidth * ranks / (ranks - 1)
        expect(break_even, (bandwidth, latency, ranks), wanted,
               f"whole it reads {wanted:.4g} bytes in {wanted / bandwidth:.3g} s; cut in {ranks}, {wanted / ranks / bandwidth:.3g} s and two exchanges "
               "of a layer take as long", tolerance=wanted * 1e-6)


class Pipe:
    "Bytes on their way; reading more than there is would wait for ever."

    def __init__(self): self.data = bytearray()

    def write(self, data):
        if not isinstance(data, (bytes, bytearray, memoryview)): raise WrongAnswer(f"write({show(data)}): only bytes can be written")
        self.data += data

    def read(self, n):
        if n > len(self.data): raise WrongAnswer(f"read({n}), but only {len(self.data)} bytes have been sent: the receiver would wait for ever")
        data, self.data = bytes(self.data[:n]), self.data[n:]
        return data


@exercise
def check_channel(Channel):
    messages = {"a word": "go", "a dictionary": dict(ids=[1, 2, 3], lens=(4,)), "None": None, "100,000 numbers": list(range(100_000)),
                "bytes that look like a length": b"\x00\x00\x00\x05", "300 letters": "x" * 300, "a number of more than 64 bits": 2**80}
    pipe = Pipe()
    sender, receiver = (attempt("Channel(write, read)", Channel, pipe.write, pipe.read) for _ in range(2))
    for name, message in messages.items():
        attempt(f"send of {name}", sender.send, message)
        got = attempt(f"receive of {name}", receiver.receive)
        require(got == message and type(got) is type(message), f"{name} was sent, and {show(got)} received")
        require(not pipe.data, f"after {name} has been received, {len(pipe.data)} of its bytes are left, and belong to nobody")
    for message in messages.values(): attempt("send of several messages in a row", sender.send, message)
    for name, message in messages.items():
        got = attempt(f"receive of {name}, sent with others in a row", receiver.receive)
        require(got == message, f"{name} was sent, among others, and {show(got)} received", "a message ends where the next one begins")


@exercise
def check_to_blame(to_blame):
    for codes, noted, wanted, why in (
            ({1: None, 2: None}, None, None, "all are running"), ({1: None, 2: -9}, None, 2, "rank 2 was killed"),
            ({1: 1, 2: -9}, None, 2, "rank 1 has ended as well, since its connection broke when rank 2 was killed"),
            ({1: 1, 2: -9}, 1, 2, "a rank that was killed could leave no note; the note of rank 1 tells of the consequence"),
            ({1: 1, 2: 1, 3: 1}, 3, 3, "rank 3 was the first to leave a note"), ({1: None, 2: None}, 2, 2, "rank 2 has left a note and is about to end"),
            ({1: None, 2: 3}, None, 2, "rank 2 has ended by itself"), ({1: None, 2: 0}, None, 2, "a rank that has ended without an error is missing, too"),
            ({1: None, 2: -6, 3: -9}, None, 2, "of several that were killed, the one with the smallest number")):
        expect(to_blame, (codes, noted), wanted, why)


def run_ranks(all_reduce, held):
    "What each rank's call gives, all running at once, and how much each has sent."
    size, wires = len(held), [queue.Queue() for _ in held]     # the wire into each rank
    sent, results, failures = [0] * size, [None] * size, []

    def run(rank):
        def send(number):
            if isinstance(number, (list, tuple, dict)): raise WrongAnswer(f"rank {rank} sends {show(number)}; a message is one number")
            sent[rank] += 1
            wires[(rank + 1) % size].put(number)

        def receive():
            try: return wires[rank].get(timeout=1)
            except queue.Empty: raise WrongAnswer(f"rank {rank} waits for a message that nobody sends") from None
        try: results[rank] = attempt(f"all_reduce on rank {rank} of {size}, which holds {held[rank]},", all_reduce, rank, size, list(held[rank]), send, receive)
        except WrongAnswer as error: failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(10)
    if failures: raise min(failures, key=lambda error: "waits for a message" in str(error))
    left = sum(wire.qsize() for wire in wires)
    return results, sent, left


@exercise
def check_all_reduce(all_reduce):
    for held in ([[1, 2, 3], [10, 20, 30], [100, 200, 300]], [[1, 2], [10, 20]], [[7]], [[10**r * (i + 1) for i in range(5)] for r in range(5)]):
        size = len(held)
        results, sent, left = run_ranks(all_reduce, held)
        wanted = [sum(column) for column in zip(*held)]
        for rank, got in enumerate(results):
            case = f"of {size} ranks that hold {show(held)}, rank {rank}"
            require(got is not None, f"{case} gets None. Is a `return` missing?")
            require(hasattr(got, "__len__") and list(got) == wanted, f"{case} gets {show(got)}, expected {wanted}")
        require(not left, f"{size} ranks: {left} messages have been sent that nobody received")
        require(max(sent) <= 2 * (size - 1), f"{size} ranks: a rank sends {max(sent)} numbers, and {2 * (size - 1)} are enough",
                "each piece goes round once to be added up and once to be handed out")
    return "and no rank sends more than it has to"
