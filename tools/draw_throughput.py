"""Draw images/throughput.svg, the plot of the README, from results/*-peers.json, which `make peers` wrote."""
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"vllm": "vLLM float32", "vllm bf16": "vLLM bfloat16", "vllm int8": "vLLM int8", "nano_vllm": "nano_vllm float32",
         "nano_vllm bf16": "nano_vllm bfloat16", "nano_vllm int8": "nano_vllm int8", "llama.cpp bf16": "llama.cpp bfloat16",
         "llama.cpp q8_0": "llama.cpp Q8_0"}     # of engines, in the order in which they are drawn
COLORS = {"vllm": "0.55", "nano_vllm": "#56a0d3", "llama.cpp": "#c3a878"}


def medians(engines: dict, figure: str = "output_tokens_per_second") -> dict[str, dict[str, float]]:
    "{work: {engine: median of a figure of its runs}} of what `make peers` stores."
    works = next(iter(engines.values()))["runs"]
    return {work: {name: statistics.median(run[figure] for run in engine["runs"][work])
                   for name, engine in engines.items()} for work in works}


def draw(record: dict, path: Path):
    "One panel for each kind of work, a bar for each engine; no background, and greys that both themes show."
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "throughput", "text.color": "0.5", "axes.labelcolor": "0.5", "xtick.color": "0.5",
                     "ytick.color": "0.5", "axes.edgecolor": "0.5", "font.size": 9}
    rates = medians(record["data"])
    fig, axes = plt.subplots(1, len(rates), figsize=(9, 0.6 + 0.26*len(record["data"])), layout="constrained")
    for ax, (work, of) in zip(axes, rates.items()):
        bars = ax.barh([NAMES[name] for name in of], list(of.values()), color=[COLORS[name.split()[0]] for name in of])
        ax.bar_label(bars, fmt="%.0f", padding=3)
        ax.invert_yaxis()
        ax.margins(x=.25)
        ax.set_title(work, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        if ax is not axes[0]: ax.set_yticks([])
    axes[1].set_xlabel(f"output tokens/s, SmolLM2-135M on {record['machine']['name']}")
    fig.savefig(path, transparent=True, metadata={"Date": None})


def main():
    records = [json.loads(path.read_text()) for path in ROOT.glob("results/*-peers.json")]
    draw(max(records, key=lambda record: (len(record["data"]), record.get("date", ""))), ROOT/"images/throughput.svg")   # with most engines, the newest


if __name__ == "__main__": main()
